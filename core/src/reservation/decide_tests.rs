use super::*;
use crate::fixture::{HOUR, add, at, hold, image, placed, reservation, template, view};
use crate::ids::{NodeName, ObjectName, PoolName};
use crate::ledger::Class;
use crate::units::Generation;
use crate::view::{Access, PoolChoice};

const NOW: Timestamp = Timestamp(10 * HOUR);

fn ask(view: &View, name: &str) -> Vec<Change> {
    decide(view, &Uid::from(name), NOW)
}

fn told(view: &View, name: &str) -> ReservationReport {
    let changes = ask(view, name);
    match changes.first() {
        Some(Change::ReportReservation { report, .. }) => report.clone(),
        _ => panic!("no report: {changes:?}"),
    }
}

fn clone_of_template(name: &str, size: u64) -> ReservationView {
    let mut request = reservation(name, size, 0);
    request.access = Access::Block;
    request.template = Some(ObjectName::new("ns", "template"));
    request
}

#[test]
fn guarded_then_promised_and_assigned_then_told() {
    let mut view = view(&[("a", 100)]);
    let mut request = reservation("r", 40, 0);
    request.has_finalizer = false;
    let uid = add(&mut view, request);
    assert!(matches!(&ask(&view, "r")[..], [Change::GuardReservation { .. }]));
    view.reservations.get_mut(&uid).expect("there").has_finalizer = true;
    let changes = ask(&view, "r");
    let [Change::WriteLedger { promises, revision: 2, .. }, Change::AssignReservation { placement, .. }] =
        &changes[..]
    else {
        panic!("{changes:?}");
    };
    assert_eq!(promises[&uid].charge.data, Bytes(40));
    assert_eq!(*placement, placed("p", "a", 1));
    let request = view.reservations.get_mut(&uid).expect("there");
    request.assignment = Some(placement.clone());
    view.ledgers.get_mut(&at("p", "a")).expect("there").promises.clone_from(promises);
    assert_eq!(told(&view, "r").state, ReservationState::Promised);
    view.reservations.get_mut(&uid).expect("there").prepared = Some(Generation::FIRST);
    assert_eq!(told(&view, "r").state, ReservationState::Ready);
}

#[test]
fn an_operator_that_ended_between_promise_and_assignment_is_continued() {
    let mut view = view(&[("a", 100), ("b", 100)]);
    add(&mut view, reservation("r", 40, 0));
    hold(&mut view, "b", "r", Class::Images, 40);
    let changes = ask(&view, "r");
    assert!(
        matches!(&changes[..], [Change::AssignReservation { placement, .. }] if *placement == placed("p", "b", 1)),
        "{changes:?}"
    );
    hold(&mut view, "a", "r", Class::Images, 40);
    let changes = ask(&view, "r");
    assert!(
        matches!(&changes[..], [Change::AssignReservation { placement, .. }] if placement.node.as_str() == "a")
    );
    view.reservations.values_mut().for_each(|request| request.assignment = Some(placed("p", "b", 1)));
    let stray = view.without(&view.ledgers[&at("p", "a")], &[&Uid::from("r")]);
    assert_eq!(ask(&view, "r"), [stray], "the entry that lost goes");
}

#[test]
fn a_promise_is_not_assigned_to_a_template_that_changed_since() {
    let mut view = view(&[("a", 100)]);
    let import = template(50, 20);
    view.imports.insert(import.name.clone(), import);
    add(&mut view, clone_of_template("r", 10));
    hold(&mut view, "a", "r", Class::Volumes, 30);
    let refused = told(&view, "r");
    assert_eq!((refused.state, refused.reason), (ReservationState::Refused, Reason::CapacityRefused));
    assert_eq!(refused.shortfall, Some(Bytes(20)));
    view.reservations.values_mut().for_each(|request| request.state = ReservationState::Refused);
    assert!(matches!(&ask(&view, "r")[..], [Change::WriteLedger { promises, .. }] if promises.is_empty()));
    view.reservations.values_mut().for_each(|request| request.state = ReservationState::Pending);
    hold(&mut view, "a", "r", Class::Volumes, 50);
    assert!(matches!(&ask(&view, "r")[..], [Change::AssignReservation { .. }]));
}

#[test]
fn what_does_not_fit_waits_in_order_with_numbers() {
    let mut view = view(&[("a", 100)]);
    hold(&mut view, "a", "x", Class::Images, 60);
    add(&mut view, reservation("first", 60, 1));
    add(&mut view, reservation("second", 10, 2));
    let first = told(&view, "first");
    assert_eq!((first.state, first.reason), (ReservationState::Queued, Reason::InsufficientCapacity));
    assert_eq!((first.queue, first.shortfall), (Some((1, Bytes::ZERO)), Some(Bytes(20))));
    assert_eq!(first.message, "60 bytes asked for: pool p on node a lacks 20 bytes for images");
    let second = told(&view, "second");
    assert_eq!((second.reason, second.queue), (Reason::Queued, Some((2, Bytes(60)))), "it must not overtake");
    view.ledgers.values_mut().for_each(|ledger| ledger.promises.clear());
    assert!(matches!(&ask(&view, "first")[..], [Change::WriteLedger { .. }, _]));
}

#[test]
fn refusals_are_told_with_their_reason_and_shortfall() {
    let mut view = view(&[("a", 100)]);
    hold(&mut view, "a", "x", Class::Images, 60);
    add(&mut view, reservation("huge", 101, 0));
    let huge = told(&view, "huge");
    assert_eq!((huge.state, huge.reason), (ReservationState::Refused, Reason::LargerThanPool));
    assert_eq!(huge.shortfall, Some(Bytes(1)));
    let mut reject = reservation("reject", 50, 0);
    reject.when_full = Some(WhenFull::Reject);
    add(&mut view, reject);
    let refused = told(&view, "reject");
    assert_eq!((refused.state, refused.reason), (ReservationState::Refused, Reason::CapacityRefused));
    assert_eq!(refused.shortfall, Some(Bytes(10)));
    let mut invalid = reservation("invalid", 1, 0);
    invalid.invalid = Some("spec.maxSize: `x`".to_owned());
    add(&mut view, invalid);
    assert_eq!(told(&view, "invalid").reason, Reason::InvalidSpec);
    let mut late = reservation("late", 50, 0);
    late.state = ReservationState::Queued;
    late.queued_since = Some(Timestamp(9 * HOUR));
    add(&mut view, late);
    let late = told(&view, "late");
    assert_eq!((late.reason, late.shortfall), (Reason::QueueTimeout, Some(Bytes(10))));
    assert!(late.message.starts_with("waited 3600 s of 3600 s: pool p on node a lacks"), "{}", late.message);
}

#[test]
fn a_request_that_may_not_wait_is_not_refused_while_anything_is_undecided() {
    let mut view = view(&[("a", 100)]);
    add(&mut view, reservation("earlier", 50, 0));
    let mut reject = reservation("reject", 40, 1);
    reject.when_full = Some(WhenFull::Reject);
    add(&mut view, reject);
    assert!(
        matches!(&ask(&view, "reject")[..], [Change::RetryAfter { .. }]),
        "an earlier one is about to be decided"
    );
    view.reservations.get_mut(&Uid::from("earlier")).expect("there").state = ReservationState::Queued;
    let refused = told(&view, "reject");
    assert_eq!((refused.reason, refused.shortfall), (Reason::CapacityRefused, Some(Bytes::ZERO)));
    view.nodes.values_mut().for_each(|node| node.reported = false);
    assert_eq!(told(&view, "reject").state, ReservationState::Queued, "the node may still report");
    view.nodes.clear();
    assert_eq!(told(&view, "reject").reason, Reason::NoMatchingNode);
    view.pools.clear();
    assert_eq!(told(&view, "reject").reason, Reason::NoMatchingPool);
}

#[test]
fn the_queue_is_bounded_for_those_who_come_new() {
    let mut view = view(&[("a", 100)]);
    view.pools.values_mut().for_each(|pool| pool.max_queued = 1);
    hold(&mut view, "a", "x", Class::Images, 60);
    add(&mut view, reservation("first", 60, 1));
    let uid = add(&mut view, reservation("second", 60, 2));
    assert_eq!(told(&view, "first").state, ReservationState::Queued);
    assert_eq!(told(&view, "second").reason, Reason::QueueFull);
    let second = view.reservations.get_mut(&uid).expect("there");
    second.state = ReservationState::Queued;
    second.queued_since = Some(NOW);
    assert_eq!(told(&view, "second").state, ReservationState::Queued, "who waits already goes on waiting");
}

#[test]
fn refused_is_for_ever_and_holds_nothing() {
    let mut view = view(&[("a", 100)]);
    let mut refused = reservation("r", 10, 0);
    refused.state = ReservationState::Refused;
    add(&mut view, refused);
    assert_eq!(ask(&view, "r"), [], "there would be room now");
    hold(&mut view, "a", "r", Class::Images, 10);
    assert!(matches!(&ask(&view, "r")[..], [Change::WriteLedger { promises, .. }] if promises.is_empty()));
}

#[test]
fn image_and_volume_are_promised_in_one_write_and_shared_afterwards() {
    let mut view = view(&[("a", 100)]);
    let import = template(30, 20);
    view.imports.insert(import.name.clone(), import);
    add(&mut view, clone_of_template("one", 10));
    assert!(matches!(&ask(&view, "one")[..], [Change::CreateImage { .. }]), "its UID is needed first");
    let staged = image("a", 20, 0);
    let name = staged.name.clone();
    view.images.insert(name.clone(), staged.clone());
    let changes = ask(&view, "one");
    let [Change::WriteLedger { promises, .. }, Change::AssignReservation { image, reused: false, .. }] =
        &changes[..]
    else {
        panic!("{changes:?}");
    };
    assert_eq!(promises[&staged.uid].charge.data, Bytes(20));
    assert_eq!(promises[&Uid::from("one")].charge.data, Bytes(30));
    assert_eq!(image.as_ref().expect("named").staged_image, name);
    view.ledgers.get_mut(&at("p", "a")).expect("there").promises.clone_from(promises);
    let one = view.reservations.get_mut(&Uid::from("one")).expect("there");
    one.assignment = Some(placed("p", "a", 1));
    one.assigned_image.clone_from(image);
    add(&mut view, clone_of_template("two", 10));
    let changes = ask(&view, "two");
    assert!(
        matches!(&changes[..], [Change::WriteLedger { promises, .. }, Change::AssignReservation { reused: true, .. }]
        if promises.len() == 3),
        "{changes:?}"
    );
    view.images.clear();
    assert!(
        matches!(&ask(&view, "one")[..], [Change::CreateImage { .. }]),
        "it was swept too early: made again"
    );
    let mut again = staged;
    again.uid = Uid::from("again");
    view.images.insert(name, again);
    assert!(matches!(&ask(&view, "one")[..], [Change::WriteLedger { promises, .. }]
        if promises.contains_key(&Uid::from("again"))));
}

#[test]
fn a_ledger_that_is_behind_takes_nothing() {
    let mut view = view(&[("a", 100)]);
    add(&mut view, reservation("r", 10, 0));
    let node = view.nodes.get_mut(&NodeName::from("a")).expect("there");
    let pool = node.pools.get_mut(&PoolName::from("p")).expect("there");
    pool.obeyed.insert(Uid::from("lost"), Generation::FIRST);
    assert_eq!(told(&view, "r").reason, Reason::LedgerBehind);
    hold(&mut view, "a", "r", Class::Images, 10);
    assert!(matches!(&ask(&view, "r")[..], [Change::RetryAfter { .. }]), "nor is anything assigned to it");
}

#[test]
fn a_request_for_any_pool_takes_the_emptiest() {
    let mut view = view(&[("a", 100), ("b", 200)]);
    let mut request = reservation("r", 10, 0);
    request.pools = PoolChoice::Labelled(std::collections::BTreeMap::new());
    add(&mut view, request);
    let changes = ask(&view, "r");
    assert!(
        matches!(&changes[..], [_, Change::AssignReservation { placement, .. }] if placement.node.as_str() == "b")
    );
    assert_eq!(ask(&view, "nobody"), []);
}
