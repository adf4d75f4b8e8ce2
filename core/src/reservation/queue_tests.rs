use super::*;
use crate::change::Change;
use crate::fixture::{add, hold, pool, reservation, template, thin_view, view};
use crate::ids::{NodeName, ObjectName, PoolName};
use crate::ledger::{Class, Promise};
use crate::reservation::{Outcome, candidates, decide, fit};
use crate::view::{Access, PoolChoice, Service, TenantLimit};
use proptest::prelude::*;

fn names_at(view: &View, request: &ReservationView, now: Timestamp) -> Vec<String> {
    let need = Need::of(view, request, now).expect("plain");
    let all = candidates(view, request, &need);
    let backlog = Backlog::around(view, request, now);
    backlog.ahead(view, request, &need, &all).into_iter().map(|ahead| ahead.uid.0).collect()
}

fn names(view: &View, request: &ReservationView) -> Vec<String> {
    names_at(view, request, Timestamp(0))
}

fn of(namespace: &str, name: &str, priority: i32, created: u64) -> ReservationView {
    let mut request = reservation(name, 10, created);
    request.claim_namespace = namespace.to_owned();
    request.priority = priority;
    request
}

#[test]
fn earlier_requests_for_the_same_place_are_ahead_in_order_and_no_others() {
    let mut view = view(&[("a", 100), ("b", 20)]);
    let last = reservation("z", 10, 9);
    add(&mut view, reservation("y", 10, 9));
    add(&mut view, reservation("second", 10, 2));
    add(&mut view, reservation("first", 50, 1));
    add(&mut view, reservation("later", 10, 10));
    let mut gone = reservation("gone", 10, 0);
    gone.deleting = true;
    add(&mut view, gone);
    let mut refused = reservation("refused", 10, 0);
    refused.state = ReservationState::Refused;
    add(&mut view, refused);
    let mut tried = reservation("tried", 10, 0);
    tried.dry_run = true;
    add(&mut view, tried);
    add(&mut view, reservation("promised", 10, 0));
    hold(&mut view, "a", "promised", Class::Images, 10);
    let mut elsewhere = reservation("elsewhere", 10, 0);
    elsewhere.pools = PoolChoice::Named(PoolName::from("q"));
    add(&mut view, elsewhere);
    add(&mut view, reservation("too-large", 200, 0));
    assert_eq!(names(&view, &last), ["first", "second", "y"]);
    let mut pinned = last.clone();
    pinned.node = Some(NodeName::from("b"));
    assert_eq!(names(&view, &pinned), ["second", "y"], "50 never fits on b");
}

#[test]
fn priority_comes_first_then_turns_of_namespaces_then_arrival() {
    let mut view = view(&[("a", 100)]);
    for request in [
        of("greedy", "g1", 0, 1),
        of("greedy", "g2", 0, 2),
        of("greedy", "g3", 0, 3),
        of("modest", "m1", 0, 4),
        of("urgent", "u1", 5, 5),
    ] {
        add(&mut view, request);
    }
    let last = of("last", "z", -1, 6);
    assert_eq!(names(&view, &last), ["u1", "g1", "m1", "g2", "g3"]);
    let modest = view.reservations[&Uid::from("m1")].clone();
    assert_eq!(names(&view, &modest), ["u1", "g1"], "two of greedy's wait for modest's first");
}

#[test]
fn who_holds_less_of_the_pool_comes_first() {
    let mut view = view(&[("a", 100)]);
    let holder = of("greedy", "holder", 0, 0);
    add(&mut view, holder);
    hold(&mut view, "a", "holder", Class::Images, 10);
    add(&mut view, of("greedy", "g1", 0, 1));
    add(&mut view, of("modest", "m1", 0, 2));
    add(&mut view, of("modest", "m2", 0, 3));
    assert_eq!(names(&view, &of("last", "z", -1, 6)), ["m1", "g1", "m2"]);
}

#[test]
fn who_has_waited_for_a_quarter_of_the_time_is_overtaken_no_more() {
    let mut view = view(&[("a", 100)]);
    let quarter = view.pools[&PoolName::from("p")].max_queue_millis / 4;
    add(&mut view, of("low", "old", -1000, 1));
    add(&mut view, of("low", "older", -1000, 0));
    let urgent = of("urgent", "u", 1000, 2);
    assert_eq!(names(&view, &urgent), Vec::<String>::new());
    assert_eq!(names_at(&view, &urgent, Timestamp(quarter)), ["older"]);
    assert_eq!(names_at(&view, &urgent, Timestamp(quarter + 1)), ["older", "old"]);
}

#[test]
fn who_waits_for_a_limit_of_its_own_namespace_keeps_nobody_waiting() {
    let mut view = view(&[("a", 100)]);
    let pool = view.pools.values_mut().next().expect("one");
    let namespaces = BTreeMap::from([("tier".to_owned(), "small".to_owned())]);
    pool.tenant_limits = vec![TenantLimit { namespaces, bytes: Some(Bytes(5)), reservations: None }];
    add(&mut view, of("small", "limited", 0, 0));
    let other = of("other", "z", 0, 1);
    assert_eq!(names(&view, &other), ["limited"], "nobody knows yet that it is limited");
    view.namespaces.insert("small".to_owned(), [("tier".to_owned(), "small".to_owned())].into());
    assert_eq!(names(&view, &other), Vec::<String>::new());
}

#[test]
fn the_most_generous_pool_counts() {
    let mut view = view(&[]);
    let mut strict = pool("q");
    strict.when_full = WhenFull::Reject;
    strict.max_queued = 5;
    view.pools.insert(strict.name.clone(), strict);
    let mut request = reservation("r", 1, 0);
    request.pools = PoolChoice::Labelled(BTreeMap::new());
    let policy = Policy::of(&view, &request).expect("two pools");
    assert_eq!((policy.when_full, policy.length), (WhenFull::Queue, 1000));
    request.when_full = Some(WhenFull::Reject);
    assert_eq!(Policy::of(&view, &request).expect("two pools").when_full, WhenFull::Reject);
    request.pools = PoolChoice::Named(PoolName::from("none"));
    assert_eq!(Policy::of(&view, &request), None);
}

/// A stream of requests into one place that gives one unit of space back per step; says after how many steps each was
/// served.
fn served(requests: &[(u8, i32, u64)], slots: usize) -> BTreeMap<String, u64> {
    const STEP: u64 = 60_000;
    let mut view = view(&[("a", 100)]);
    let mut served = BTreeMap::new();
    for step in 0..500_u64 {
        let now = Timestamp(step * STEP);
        for (number, (tenant, priority, at)) in requests.iter().enumerate() {
            if *at == step {
                add(&mut view, of(&format!("t{tenant}"), &format!("r{number:03}"), *priority, now.0));
            }
        }
        let backlog = Backlog::of(&view, now);
        let line = backlog.pools.values().next().expect("one").clone();
        for waiting in line.into_iter().take(slots) {
            view.reservations.remove(&waiting.uid);
            served.insert(waiting.uid.0, step);
        }
        if served.len() == requests.len() {
            break;
        }
    }
    served
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn nobody_starves_in_a_stream_however_others_are_favoured(
        favoured in proptest::collection::vec((0..4_u8, 0..3_i32), 40..160),
        unlucky_at in 0..20_u64,
    ) {
        // More arrive per step than are served, all of higher priority than the unlucky one.
        let mut requests: Vec<(u8, i32, u64)> = favoured
            .iter()
            .enumerate()
            .map(|(number, (tenant, priority))| (*tenant, *priority, number as u64 / 2))
            .collect();
        requests.push((9, -1000, unlucky_at));
        let served = served(&requests, 1);
        prop_assert_eq!(served.len(), requests.len());
        let unlucky = served[&format!("r{:03}", requests.len() - 1)];
        // A quarter of an hour until it is overdue, and then those that came before it.
        let before = requests.iter().filter(|(_, _, at)| *at <= unlucky_at).count() as u64;
        prop_assert!(unlucky <= unlucky_at + 15 + before, "served at {}", unlucky);
    }

    #[test]
    fn two_operators_with_the_same_view_see_one_order_and_somebody_is_always_first(
        requests in proptest::collection::vec((0..4_u8, -2..3_i32, 0..30_u64, 1..100_u64), 1..30),
        now in 0..2_000_000_u64,
    ) {
        let mut view = view(&[("a", 100)]);
        let mut all = Vec::new();
        for (number, (tenant, priority, minute, size)) in requests.iter().enumerate() {
            let mut request = of(&format!("t{tenant}"), &format!("r{number:02}"), *priority, minute * 60_000);
            request.max_size = Bytes(*size);
            all.push(add(&mut view, request));
        }
        let whole = Backlog::of(&view, Timestamp(now));
        let lines: Vec<usize> = all.iter().map(|uid| {
            let request = &view.reservations[uid];
            let need = Need::of(&view, request, Timestamp(now)).expect("plain");
            let places = candidates(&view, request, &need);
            let around = Backlog::around(&view, request, Timestamp(now));
            let ahead = whole.ahead(&view, request, &need, &places);
            assert_eq!(around.ahead(&view, request, &need, &places), ahead);
            ahead.len()
        }).collect();
        let mut sorted = lines;
        sorted.sort_unstable();
        prop_assert_eq!(sorted, (0..all.len()).collect::<Vec<_>>(), "one strict order");
    }
}

#[test]
fn a_damaged_kernel_pool_holds_back_nobody_of_the_other_class() {
    let mut view = thin_view(&["a"], Bytes::gib(10));
    let mut volume = reservation("volume", 1 << 30, 0);
    volume.access = Access::Block;
    add(&mut view, volume);
    let work = reservation("work", 1 << 30, 1);
    assert_eq!(names(&view, &work), ["volume"], "it waits for the same place");
    let node = view.nodes.values_mut().next().expect("one");
    let report = node.pools.values_mut().next().expect("one");
    report.thin.as_mut().expect("thin").volumes.needs_check = true;
    assert!(names(&view, &work).is_empty(), "space is not what it waits for");
}

#[test]
fn a11_what_takes_no_room_waits_for_nobody() {
    let mut view = view(&[("a", 100)]);
    hold(&mut view, "a", "x", Class::Images, 60);
    let mut large = reservation("large", 90, 0);
    large.state = ReservationState::Queued;
    add(&mut view, large);
    let mut streamed = reservation("s", 1, 1);
    streamed.access = Access::Stream;
    let uid = add(&mut view, streamed);
    let promised = |view: &View| {
        let changes = decide(view, &uid, Timestamp(1));
        matches!(&changes[..], [Change::WriteLedger { .. }, Change::AssignReservation { .. }])
    };
    let waits = |view: &View| {
        let changes = decide(view, &uid, Timestamp(1));
        matches!(&changes[..], [Change::ReportReservation { report, .. }, ..] if report.state == ReservationState::Queued)
    };
    assert!(promised(&view));
    assert_eq!(fit(&view, &view.reservations[&uid], Timestamp(1)).outcome, Outcome::Promised);
    view.pools.values_mut().for_each(|pool| pool.service = Service::Cordoned);
    assert!(waits(&view), "other rules are for it, too");
    view.pools.values_mut().for_each(|pool| pool.service = Service::Open);
    view.reservations.get_mut(&uid).expect("there").template = Some(ObjectName::new("ns", "template"));
    let import = template(30, 20);
    view.imports.insert(import.name.clone(), import);
    assert!(waits(&view), "the image that it starts from takes room");
    view.reservations.get_mut(&uid).expect("there").template = None;
    view.ledgers.values_mut().for_each(|ledger| {
        let one = ledger.promises.values().next().expect("one").clone();
        let entries = (2..MAX_PROMISES)
            .map(|n| (Uid(format!("{n}")), Promise { charge: Charge::default(), ..one.clone() }));
        ledger.promises.extend(entries);
    });
    assert!(waits(&view), "the first in the line may need the last entries of the ledger");
}
