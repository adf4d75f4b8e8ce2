use super::*;
use crate::fixture::{HOUR, add, at, hold, image, placed, reservation, template, view};
use crate::ids::{NodeName, ObjectName, PoolName};
use crate::ledger::Class;
use crate::reservation::fit;
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
fn a_promise_without_an_assignment_is_guarded_before_it_is_assigned() {
    let mut view = view(&[("a", 100)]);
    let mut request = reservation("r", 10, 0);
    request.has_finalizer = false;
    let uid = add(&mut view, request);
    hold(&mut view, "a", "r", Class::Images, 10);
    let changes = decide(&view, &uid, Timestamp(0));
    assert!(matches!(&changes[..], [Change::GuardReservation { .. }]), "{changes:?}");
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
    let promised = told(&view, "r");
    assert_eq!(
        (promised.state, promised.reason),
        (ReservationState::Promised, Reason::Promised),
        "one at a time, however fast its node was"
    );
    view.reservations.get_mut(&uid).expect("there").state = ReservationState::Promised;
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
fn until_every_node_was_heard_nothing_is_assigned_to_a_promise_and_nothing_is_refused() {
    let waits = |view: &View| matches!(&ask(view, "r")[..], [Change::RetryAfter { .. }]);
    let mut scene = view(&[("a", 100), ("b", 100)]);
    add(&mut scene, reservation("r", 40, 0));
    hold(&mut scene, "b", "r", Class::Images, 40);
    scene.unheard = true;
    assert!(waits(&scene), "node a may hold its bytes since before a restore: {:?}", ask(&scene, "r"));
    scene.unheard = false;
    assert!(matches!(&ask(&scene, "r")[..], [Change::AssignReservation { .. }]));

    let mut scene = view(&[("a", 100)]);
    add(&mut scene, clone_of_template("r", 10));
    scene.unheard = true;
    assert!(waits(&scene), "what a node holds needs no template: {:?}", ask(&scene, "r"));
    scene.reservations.values_mut().for_each(|request| request.invalid = Some("no size".to_owned()));
    assert!(matches!(&ask(&scene, "r")[..], [Change::ReportReservation { .. }]), "no node holds that");
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
fn a_volume_whose_size_was_changed_after_its_promise_begins_with_what_was_promised() {
    let mut view = view(&[("a", 100)]);
    let mut volume = reservation("r", 30, 0);
    volume.access = Access::Block;
    add(&mut view, volume);
    hold(&mut view, "a", "r", Class::Volumes, 30);
    for size in [30, 40, 20, 1000] {
        view.reservations.values_mut().for_each(|request| request.max_size = Bytes(size));
        assert!(matches!(&ask(&view, "r")[..], [Change::AssignReservation { .. }]), "{size}");
    }
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

fn decided(name: &str, view: &View) -> (Reason, Option<Bytes>) {
    let report = told(view, name);
    (report.reason, report.shortfall)
}

#[test]
fn a_limit_of_a_namespace_is_waited_for_or_refused_with_numbers_and_only_the_leader_admits() {
    let mut view = view(&[("a", 100)]);
    let limit = crate::view::TenantLimit {
        namespaces: std::collections::BTreeMap::new(),
        bytes: Some(Bytes(50)),
        reservations: None,
    };
    view.pools.values_mut().for_each(|pool| pool.tenant_limits = vec![limit.clone()]);
    hold(&mut view, "a", "held", Class::Images, 40);
    add(&mut view, reservation("r", 30, 0));
    assert_eq!(decided("r", &view), (Reason::TenantLimit, Some(Bytes(20))));
    assert_eq!(told(&view, "r").state, ReservationState::Queued);
    let mut other = reservation("other", 60, 1);
    other.claim_namespace = "other".to_owned();
    add(&mut view, other.clone());
    assert_eq!(decided("other", &view), (Reason::TenantLimit, Some(Bytes(10))), "more than its limit alone");
    other.max_size = Bytes(50);
    add(&mut view, other);
    assert!(matches!(&ask(&view, "other")[..], [Change::WriteLedger { .. }, _]), "nothing waits for it");
    view.leader = false;
    assert!(matches!(&ask(&view, "other")[..], [Change::RetryAfter { .. }]));
    view.reservations.values_mut().for_each(|request| request.when_full = Some(WhenFull::Reject));
    let refused = told(&view, "r");
    assert_eq!((refused.state, refused.reason), (ReservationState::Refused, Reason::CapacityRefused));
    assert_eq!(refused.shortfall, Some(Bytes(20)));
}

#[test]
fn a48_a_cordoned_pool_takes_nothing_new_and_refuses_who_may_not_wait() {
    let mut view = view(&[("a", 100)]);
    view.pools.values_mut().for_each(|pool| pool.service = crate::view::Service::Cordoned);
    add(&mut view, reservation("r", 30, 0));
    let waits = told(&view, "r");
    assert_eq!((waits.state, waits.reason), (ReservationState::Queued, Reason::Cordoned));
    assert_eq!(waits.considered[0].message, "pool p on node a takes nothing new: it is Cordoned");
    view.reservations.values_mut().for_each(|request| request.when_full = Some(WhenFull::Reject));
    assert_eq!(told(&view, "r").state, ReservationState::Refused);
}

#[test]
fn every_place_is_told_with_what_is_missing_there() {
    let mut view = view(&[("a", 100), ("b", 80)]);
    hold(&mut view, "a", "x", Class::Images, 60);
    hold(&mut view, "b", "y", Class::Images, 60);
    add(&mut view, reservation("r", 60, 0));
    let told = told(&view, "r").considered;
    assert_eq!(told.len(), 2);
    assert_eq!(told[1].reason, Reason::InsufficientCapacity);
    assert_eq!((told[0].shortfall, told[1].shortfall), (Some(Bytes(20)), Some(Bytes(40))));
    let ledger = view.ledgers.get_mut(&at("p", "b")).expect("there");
    ledger.promises.clear();
    let changes = ask(&view, "r");
    let [_, Change::AssignReservation { considered, .. }] = &changes[..] else { panic!("{changes:?}") };
    assert_eq!(
        (considered[0].chosen, considered[0].node.as_str(), considered[1].shortfall),
        (true, "b", Some(Bytes(20)))
    );
    for number in 0..40 {
        let name = NodeName(format!("node-{number:02}"));
        let mut node = view.nodes[&NodeName::from("a")].clone();
        node.name = name.clone();
        node.live = false;
        view.nodes.insert(name, node);
    }
    view.ledgers.get_mut(&at("p", "b")).expect("there").capacity =
        crate::view::LedgerCapacity::shared(Bytes(1));
    assert_eq!(
        consider(
            &candidates(
                &view,
                &view.reservations[&Uid::from("r")],
                &Need::of(&view, &view.reservations[&Uid::from("r")], NOW).expect("plain")
            ),
            None
        )
        .len(),
        16
    );
}

#[test]
fn a6_a_second_reservation_joins_an_image_that_is_still_copied_and_is_not_charged_for_it() {
    let mut view = view(&[("a", 100)]);
    let import = template(30, 20);
    view.imports.insert(import.name.clone(), import);
    let mut staged = image("a", 20, 0);
    staged.ready = false;
    hold(&mut view, "a", staged.uid.as_str(), Class::Images, 20);
    view.images.insert(staged.name.clone(), staged.clone());
    let mut first = clone_of_template("first", 30);
    first.assignment = Some(placed("p", "a", 1));
    first.state = ReservationState::Promised;
    hold(&mut view, "a", "first", Class::Volumes, 30);
    add(&mut view, first);
    add(&mut view, clone_of_template("second", 30));
    let changes = ask(&view, "second");
    let [Change::WriteLedger { promises, .. }, Change::AssignReservation { reused: true, image, .. }] =
        &changes[..]
    else {
        panic!("{changes:?}");
    };
    assert_eq!(promises.len(), 3, "its own volume and nothing else");
    assert_eq!(promises[&Uid::from("second")].charge.data, Bytes(30));
    assert_eq!(image.as_ref().expect("named").staged_image, staged.name);
}

#[test]
fn a9_an_idle_reference_says_when_it_ends_and_ends_by_its_version() {
    let mut view = view(&[("a", 100)]);
    let mut idle = reservation("r", 30, 0);
    idle.assignment = Some(placed("p", "a", 1));
    idle.prepared = Some(Generation::FIRST);
    idle.state = ReservationState::Ready;
    idle.ttl_millis = Some(1000);
    add(&mut view, idle);
    hold(&mut view, "a", "r", Class::Images, 30);
    let changes = ask(&view, "r");
    let [Change::ReportReservation { report, .. }, Change::RetryAfter { millis: 1000 }] = &changes[..] else {
        panic!("{changes:?}");
    };
    assert_eq!(report.expires, Some(Timestamp(NOW.0 + 1000)));
    view.reservations.values_mut().for_each(|request| request.expires = Some(NOW));
    let changes = ask(&view, "r");
    assert!(
        matches!(&changes[..], [Change::ExpireReservation { version, .. }] if version.0 == "1"),
        "{changes:?}"
    );
    let pool = view.nodes.get_mut(&NodeName::from("a")).expect("there").pools.values_mut().next();
    pool.expect("one").in_use.insert(Uid::from("r"));
    assert_eq!(told(&view, "r").expires, None, "in use: taken back");
}

#[test]
fn a_dry_run_promises_nothing_and_tells_what_would_happen() {
    let mut view = view(&[("a", 100)]);
    let mut tried = reservation("tried", 60, 0);
    tried.dry_run = true;
    tried.has_finalizer = false;
    add(&mut view, tried);
    let fits = told(&view, "tried");
    assert_eq!((fits.state, fits.reason), (ReservationState::Pending, Reason::DryRun));
    let answer = fits.dry_run.expect("answered");
    assert_eq!((answer.fits, answer.place, answer.peak), (true, Some(at("p", "a")), Bytes(60)));
    add(&mut view, reservation("r", 60, 1));
    assert!(matches!(&ask(&view, "r")[..], [Change::WriteLedger { .. }, _]), "it keeps nobody waiting");
    hold(&mut view, "a", "x", Class::Images, 70);
    view.reservations.get_mut(&Uid::from("r")).expect("there").created = Timestamp(0);
    let answer = told(&view, "tried").dry_run.expect("answered");
    assert_eq!((answer.fits, answer.position, answer.shortfall), (false, Some(2), Some(Bytes(30))));
    assert!(ask(&view, "tried").iter().all(|change| !matches!(change, Change::WriteLedger { .. })));
}

#[test]
fn the_peak_of_a_fit_counts_the_image_only_where_it_is_not_there() {
    let mut view = view(&[("a", 100)]);
    let import = template(30, 20);
    view.imports.insert(import.name.clone(), import);
    let request = clone_of_template("r", 10);
    let alone = fit(&view, &request, NOW);
    assert_eq!((alone.peak, alone.place, alone.position), (Bytes(50), Some(at("p", "a")), None));
    let staged = image("a", 20, 0);
    hold(&mut view, "a", staged.uid.as_str(), Class::Images, 20);
    view.images.insert(staged.name.clone(), staged);
    assert_eq!(fit(&view, &request, NOW).peak, Bytes(30));
    view.imports.clear();
    assert_eq!(fit(&view, &request, NOW).reason, Reason::TemplateNotFound);
}
