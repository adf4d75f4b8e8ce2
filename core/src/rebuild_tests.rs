use super::*;
use crate::fixture::{add, at, digest, hold, image, placed, promise, reservation, template, view};
use crate::ids::{NodeName, PoolName};
use crate::ledger::{Behind, Class, is_behind};
use crate::units::{Bytes, Generation, Timestamp};
use crate::view::{Access, LedgerCapacity, ObjectVersion, ReservationState};

/// A ledger at revision 3 of a node that has recorded revision 9 of it and holds `held`: name and bytes.
fn restored(held: &[(&str, u64)]) -> View {
    let mut view = view(&[("a", 100)]);
    let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
    ledger.revision = 3;
    let lineage = ledger.lineage.clone();
    let node = view.nodes.get_mut(&NodeName::from("a")).expect("there");
    node.version = ObjectVersion("77".to_owned());
    let report = node.pools.values_mut().next().expect("one");
    (report.lineage, report.obeyed_revision) = (Some(lineage), 9);
    for (name, bytes) in held {
        report.obeyed.insert(Uid::from(*name), Generation::FIRST);
        report.recorded.insert(Uid::from(*name), promise(name, Class::Images, *bytes));
    }
    view
}

fn report(view: &mut View) -> &mut NodePoolState {
    let node = view.nodes.get_mut(&NodeName::from("a")).expect("there");
    node.pools.values_mut().next().expect("one")
}

fn ledger(view: &View) -> &LedgerView {
    &view.ledgers[&at("p", "a")]
}

fn ask(view: &View) -> Option<Change> {
    first(view, &view.pools[&PoolName::from("p")])
}

/// Puts the rebuilt ledger in place of the old one.
fn carry_out(view: &mut View) {
    let change = ask(view).expect("it is behind");
    let new = outcome(ledger(view), &change, Lineage::from("new")).expect("of this ledger");
    view.ledgers.insert(at("p", "a"), new);
}

#[test]
fn a_rebuilt_ledger_holds_what_the_node_holds_and_who_still_waits_and_is_obeyed() {
    let mut view = restored(&[("known", 10), ("lost", 80)]);
    add(&mut view, reservation("known", 10, 0));
    let mut waits = reservation("waits", 5, 0);
    waits.assignment = Some(placed("p", "a", 1));
    add(&mut view, waits);
    hold(&mut view, "a", "waits", Class::Images, 5);
    add(&mut view, reservation("waits-too", 60, 0));
    hold(&mut view, "a", "waits-too", Class::Images, 60);
    hold(&mut view, "a", "nobody", Class::Images, 5);
    let mut leaving = reservation("leaving", 5, 0);
    leaving.deleting = true;
    add(&mut view, leaving);
    hold(&mut view, "a", "leaving", Class::Images, 5);
    hold(&mut view, "a", "given-back", Class::Images, 5);
    add(&mut view, reservation("given-back", 5, 0));
    report(&mut view).released.insert(Uid::from("given-back"), Generation::FIRST);

    let Some(Change::RebuildLedger {
        node,
        report: seen,
        revision,
        capacity,
        promises,
        rebuilt,
        version,
        ..
    }) = ask(&view)
    else {
        panic!("{:?}", ask(&view))
    };
    assert_eq!(
        (node, seen, version),
        (NodeName::from("a"), ObjectVersion("77".to_owned()), ledger(&view).version.clone())
    );
    let names: Vec<&str> = promises.keys().map(Uid::as_str).collect();
    assert_eq!(names, ["known", "lost", "waits"]);
    assert_eq!(
        (revision, capacity.total.data),
        (10, Bytes(100)),
        "what waits and does not fit goes on waiting"
    );
    assert_eq!((rebuilt.revision, rebuilt.recovered), (9, BTreeSet::from([Uid::from("lost")])));
    carry_out(&mut view);
    assert_eq!(is_behind(ledger(&view), report(&mut view.clone())), None);
    assert_eq!(ask(&view), None);
}

#[test]
fn capacity_is_what_the_node_reports_now_and_covers_what_it_holds() {
    let mut view = restored(&[("held", 95)]);
    view.ledgers.values_mut().for_each(|ledger| ledger.capacity = LedgerCapacity::shared(Bytes(400)));
    for (total, expected) in [(100, 100), (90, 95)] {
        report(&mut view).total = Bytes(total);
        let Some(Change::RebuildLedger { capacity, .. }) = ask(&view) else { panic!("it is behind") };
        assert_eq!(capacity.total.data, Bytes(expected));
    }
}

#[test]
fn a_volume_that_was_there_and_is_not_held_is_not_promised_again() {
    let mut view = restored(&[]);
    let mut volume = reservation("volume", 10, 0);
    volume.assignment = Some(placed("p", "a", 1));
    (volume.access, volume.state) = (Access::Block, ReservationState::Ready);
    let uid = add(&mut view, volume);
    hold(&mut view, "a", "volume", Class::Volumes, 10);
    let promised = |view: &View| {
        let Some(Change::RebuildLedger { promises, .. }) = ask(view) else { panic!("it is behind") };
        promises.contains_key(&uid)
    };
    assert!(!promised(&view), "it was given back: it would come back empty");
    view.reservations.values_mut().for_each(|volume| volume.state = ReservationState::Promised);
    assert!(promised(&view), "it may never have been made");
}

#[test]
fn it_waits_for_the_leader_a_report_and_all_of_each_promise() {
    for missing in [
        (|view: &mut View| view.leader = false) as fn(&mut View),
        |view| view.nodes.values_mut().for_each(|node| node.reported = false),
        |view| view.nodes.values_mut().for_each(|node| node.live = false),
        |view| report(view).recorded.clear(),
        |view| report(view).recorded.values_mut().for_each(|promise| promise.generation = Generation(2)),
        |view| report(view).obeyed_revision = 3,
    ] {
        let mut view = restored(&[("held", 10)]);
        hold(&mut view, "a", "held", Class::Images, 10);
        assert!(ask(&view).is_some());
        missing(&mut view);
        assert_eq!(ask(&view), None);
    }
}

#[test]
fn every_way_of_being_behind_is_mended_and_only_by_a_ledger_made_from_the_present_record() {
    for spoil in [
        (|_: &mut View| {}) as fn(&mut View),
        |view| report(view).lineage = Some(Lineage::from("of-a-deleted-ledger")),
        |view| report(view).obeyed_revision = 3,
    ] {
        let mut view = restored(&[("held", 10)]);
        spoil(&mut view);
        carry_out(&mut view);
        let told = report(&mut view).clone();
        assert_eq!(is_behind(ledger(&view), &told), None);
        let rebuilt = ledger(&view).clone();
        let mut later = told.clone();
        later.obeyed_revision += 1;
        assert!(
            matches!(is_behind(&rebuilt, &later), Some(Behind::Lineage { .. })),
            "the record has moved on"
        );
        let mut more = told.clone();
        more.obeyed.insert(Uid::from("more"), Generation::FIRST);
        assert!(matches!(is_behind(&rebuilt, &more), Some(Behind::Missing { .. })), "the record holds more");
        let mut other = told;
        other.lineage = Some(Lineage::from("other"));
        assert!(
            matches!(is_behind(&rebuilt, &other), Some(Behind::Lineage { .. })),
            "it is another node's record"
        );
    }
}

#[test]
fn what_has_no_holder_is_kept_until_a_person_decides() {
    let mut view = restored(&[("lost", 10)]);
    carry_out(&mut view);
    let new = Lineage::from("new");
    (report(&mut view).lineage, report(&mut view).obeyed_revision) = (Some(new), 10);
    let ask = |view: &View| crate::pool::decide(view, &PoolName::from("p"), Timestamp(0));
    let asks = |view: &View| ask(view).iter().any(|change| matches!(change, Change::ConfirmGone { .. }));
    assert!(!asks(&view));
    let rebuilt = view.ledgers.get_mut(&at("p", "a")).expect("there").rebuilt.as_mut().expect("rebuilt");
    rebuilt.recovered.clear();
    assert!(asks(&view), "struck from the set it is an orphan like any other");
}

#[test]
fn a_copy_of_a_durable_image_is_not_kept_for_a_holder_that_is_lost() {
    let mut view = restored(&[]);
    let copy = image("a", 20, 0);
    report(&mut view).obeyed.insert(copy.uid.clone(), Generation::FIRST);
    report(&mut view).recorded.insert(copy.uid.clone(), copy.promise(None));
    carry_out(&mut view);
    let kept = |view: &View| {
        let ledger = ledger(view);
        is_kept(view, ledger, &copy.uid, &ledger.promises[&copy.uid])
    };
    assert!(kept(&view), "its template is lost too");
    let import = template(30, 20);
    assert_eq!(import.durable.as_ref().expect("ready").digest, digest());
    view.imports.insert(import.name.clone(), import);
    assert!(!kept(&view));
}
