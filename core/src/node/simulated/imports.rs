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

#[test]
fn every_directory_bounds_who_writes_in_it_but_that_of_an_import_that_is_shown() {
    let bounds = |view: &NodeView| {
        let steps = plan(view, Timestamp(5));
        steps.into_iter().find_map(|step| match step {
            Step::MakeWorkDir { bounded, .. } => Some(bounded),
            _ => None,
        })
    };
    let mut node = asked();
    node.view.reservations.retain(|uid, _| *uid == Uid::from("work"));
    node.view.images.clear();
    for _ in 0..2 {
        node.round(plan(&node.view, Timestamp(5))).unwrap();
    }
    node.report();
    assert_eq!(bounds(&node.view), Some(true), "of a user");

    let uid = Uid::from("imp");
    node.view.reservations.get_mut(&Uid::from("work")).unwrap().import = Some(uid.clone());
    assert_eq!(bounds(&node.view), None, "its import may yet be shown");
    node.view.imports.insert(uid.clone(), import(true));
    assert_eq!(bounds(&node.view), Some(false), "its promise is exactly what its files take");
    let edits: [fn(&mut NodeImport); 3] = [
        |import| import.reservation.name = "other".to_owned(),
        |import| import.ended = true,
        |import| import.deleting = true,
    ];
    for edit in edits {
        let mut view = node.view.clone();
        edit(view.imports.get_mut(&uid).unwrap());
        assert_eq!(bounds(&view), None, "{:?} does not need it", view.imports[&uid]);
    }
}
