//! Imports: probed, then run in what is prepared for them.

use super::*;
use crate::transfer::TransferKind;

fn import(planned: bool) -> NodeTransfer {
    NodeTransfer {
        kind: TransferKind::Import,
        name: ObjectName::new("ns", "t"),
        deleting: false,
        generation: Generation(1),
        reservation: ObjectName::new("ns", "work"),
        suspended: false,
        planned,
        ended: false,
        released: None,
    }
}

#[test]
fn an_import_is_probed_then_run_in_its_prepared_directory_then_left_alone() {
    let mut node = asked();
    let uid = Uid::from("imp");
    node.view.transfers.insert(uid.clone(), import(false));
    let probe = Step::StartProbe { transfer: uid.clone(), generation: Generation(1) };
    assert!(plan(&node.view, Timestamp(5)).contains(&probe), "a probe needs no pool");
    node.view.transfers.insert(uid.clone(), import(true));
    assert!(!plan(&node.view, Timestamp(5)).iter().any(|step| matches!(step, Step::StartTransfer { .. })));
    let waiting = node.view.transfers.remove(&uid).unwrap();
    node.settle().unwrap();
    node.view.transfers.insert(uid.clone(), waiting);
    let start = Step::StartTransfer {
        transfer: uid.clone(),
        generation: Generation(1),
        pool: "p".into(),
        reservation: "work".into(),
        promised: Bytes::mib(64),
    };
    assert_eq!(plan(&node.view, Timestamp(5)), [start]);
    let job = JobKey { kind: JobKind::Transfer, uid: uid.clone(), generation: Generation(1) };
    node.view.jobs.insert(job.clone());
    assert_eq!(plan(&node.view, Timestamp(5)), []);

    node.view.reservations.get_mut(&Uid::from("work")).unwrap().deleting = true;
    assert_eq!(plan(&node.view, Timestamp(5)), [], "its directory stays while it is written in");
    let stop = Step::StopJob { job: job.clone() };
    let unknown = NodeView { transfers: BTreeMap::new(), ..node.view.clone() };
    assert_eq!(plan(&unknown, Timestamp(5)), std::slice::from_ref(&stop), "so it does for one not shown");
    node.view.transfers.get_mut(&uid).unwrap().generation = Generation(2);
    let steps = plan(&node.view, Timestamp(5));
    assert_eq!(steps[0], stop, "placed anew");
    assert!(!steps.iter().any(|step| matches!(step, Step::RemoveWorkDir { .. } | Step::Released { .. })));
    node.view.transfers.get_mut(&uid).unwrap().deleting = true;
    node.view.jobs.clear();
    let abandon = Step::AbandonTransfer { transfer: uid.clone(), generation: Generation(2) };
    assert!(plan(&node.view, Timestamp(5)).contains(&abandon));
    node.view.transfers.get_mut(&uid).unwrap().released = Some(Generation(2));
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
    node.view.reservations.get_mut(&Uid::from("work")).unwrap().transfer = Some(uid.clone());
    assert_eq!(bounds(&node.view), None, "its import may yet be shown");
    node.view.transfers.insert(uid.clone(), import(true));
    assert_eq!(bounds(&node.view), Some(false), "its promise is exactly what its files take");
    let edits: [fn(&mut NodeTransfer); 3] = [
        |import| import.reservation.name = "other".to_owned(),
        |import| import.ended = true,
        |import| import.deleting = true,
    ];
    for edit in edits {
        let mut view = node.view.clone();
        edit(view.transfers.get_mut(&uid).unwrap());
        assert_eq!(bounds(&view), None, "{:?} does not need it", view.transfers[&uid]);
    }
}

#[test]
fn one_that_pauses_is_neither_probed_nor_begun_and_what_it_has_made_stays() {
    let mut node = asked();
    node.settle().unwrap();
    let uid = Uid::from("imp");
    for planned in [false, true] {
        let paused = NodeTransfer { kind: TransferKind::Transfer, suspended: true, ..import(planned) };
        node.view.transfers.insert(uid.clone(), paused);
        assert_eq!(plan(&node.view, Timestamp(5)), [], "planned: {planned}");
        node.view.transfers.get_mut(&uid).unwrap().suspended = false;
        assert_eq!(plan(&node.view, Timestamp(5)).len(), 1, "planned: {planned}");
    }
    for kind in [JobKind::Probe, JobKind::Transfer] {
        let job = JobKey { kind, uid: uid.clone(), generation: Generation(1) };
        node.view.jobs = BTreeSet::from([job.clone()]);
        node.view.transfers.get_mut(&uid).unwrap().suspended = false;
        assert_eq!(plan(&node.view, Timestamp(5)), []);
        node.view.transfers.get_mut(&uid).unwrap().suspended = true;
        assert_eq!(plan(&node.view, Timestamp(5)), [Step::StopJob { job }], "and nothing else is done");
    }
    node.view.jobs.clear();
    node.view.transfers.get_mut(&uid).unwrap().deleting = true;
    let abandon = Step::AbandonTransfer { transfer: uid, generation: Generation(1) };
    assert_eq!(plan(&node.view, Timestamp(5)), [abandon], "what is deleted goes all the same");
}

#[test]
fn what_needs_no_space_works_under_any_live_reservation_of_its_own() {
    let mut node = asked();
    let uid = Uid::from("imp");
    let start = |view: &NodeView| {
        plan(view, Timestamp(5)).into_iter().find_map(|step| match step {
            Step::StartTransfer { reservation, promised, .. } => Some((reservation, promised)),
            _ => None,
        })
    };
    let spare = node.view.reservations.get_mut(&Uid::from("work")).unwrap();
    (spare.access, spare.transfer) = (Access::Stream, Some(uid.clone()));
    spare.name.name = "spare".to_owned();
    node.settle().unwrap();
    node.view.transfers.insert(uid.clone(), import(true));
    let (reservation, _) = start(&node.view).expect("it begins");
    assert_eq!(reservation, Uid::from("work"));
    let of = |view: &mut NodeView, transfer: &str| {
        view.reservations.get_mut(&Uid::from("work")).unwrap().transfer = Some(Uid::from(transfer));
    };
    of(&mut node.view, "another");
    assert_eq!(start(&node.view), None, "not under that of another one");
    of(&mut node.view, "imp");
    node.view.reservations.get_mut(&Uid::from("work")).unwrap().deleting = true;
    assert_eq!(start(&node.view), None, "nor under one that is being given back");
}
