//! Imports: probed, then run in what is prepared for them.

use super::*;

fn import(planned: bool) -> NodeImport {
    NodeImport {
        name: ObjectName::new("ns", "t"),
        deleting: false,
        generation: Generation(1),
        reservation: ObjectName::new("ns", "work"),
        planned,
        ended: false,
        released: None,
    }
}

#[test]
fn an_import_is_probed_then_run_in_its_prepared_directory_then_left_alone() {
    let mut node = asked();
    let uid = Uid::from("imp");
    node.view.imports.insert(uid.clone(), import(false));
    let probe = Step::StartProbe { import: uid.clone(), generation: Generation(1) };
    assert!(plan(&node.view, Timestamp(5)).contains(&probe), "a probe needs no pool");
    node.view.imports.insert(uid.clone(), import(true));
    assert!(!plan(&node.view, Timestamp(5)).iter().any(|step| matches!(step, Step::StartImport { .. })));
    let waiting = node.view.imports.remove(&uid).unwrap();
    node.settle().unwrap();
    node.view.imports.insert(uid.clone(), waiting);
    let start = Step::StartImport {
        import: uid.clone(),
        generation: Generation(1),
        pool: "p".into(),
        reservation: "work".into(),
        promised: Bytes::mib(64),
    };
    assert_eq!(plan(&node.view, Timestamp(5)), [start]);
    let job = JobKey { kind: JobKind::Import, uid: uid.clone(), generation: Generation(1) };
    node.view.jobs.insert(job.clone());
    assert_eq!(plan(&node.view, Timestamp(5)), []);

    node.view.reservations.get_mut(&Uid::from("work")).unwrap().deleting = true;
    assert_eq!(plan(&node.view, Timestamp(5)), [], "its directory stays while it is written in");
    let stop = Step::StopJob { job: job.clone() };
    let unknown = NodeView { imports: BTreeMap::new(), ..node.view.clone() };
    assert_eq!(plan(&unknown, Timestamp(5)), std::slice::from_ref(&stop), "so it does for one not shown");
    node.view.imports.get_mut(&uid).unwrap().generation = Generation(2);
    let steps = plan(&node.view, Timestamp(5));
    assert_eq!(steps[0], stop, "placed anew");
    assert!(!steps.iter().any(|step| matches!(step, Step::RemoveWorkDir { .. } | Step::Released { .. })));
    node.view.imports.get_mut(&uid).unwrap().deleting = true;
    node.view.jobs.clear();
    let abandon = Step::AbandonImport { import: uid.clone(), generation: Generation(2) };
    assert!(plan(&node.view, Timestamp(5)).contains(&abandon));
    node.view.imports.get_mut(&uid).unwrap().released = Some(Generation(2));
    assert!(!plan(&node.view, Timestamp(5)).contains(&abandon));
}
