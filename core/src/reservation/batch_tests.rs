use super::*;
use crate::fixture::{HOUR, hold, image, ledger, node_pool, pool, reservation, template, view};
use crate::ids::ObjectName;
use crate::ledger::Class;
use crate::reason::Reason;
use crate::reservation::decide;
use crate::units::Bytes;
use crate::view::{Access, PoolChoice, TenantLimit, WhenFull};

const NOW: Timestamp = Timestamp(100_000);

struct Dice(u64);

impl Dice {
    fn draw(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }

    fn one_in(&mut self, chances: u64) -> bool {
        self.draw(chances) == 0
    }
}

/// Two pools, two nodes, up to 14 requests. With `first`, something has to be written of some before they are promised.
fn scene(dice: &mut Dice, first: bool) -> View {
    let mut view = view(&[("a", 60 + dice.draw(60)), ("b", 60)]);
    let mut other = pool("q");
    other.labels.insert("tier".to_owned(), "fast".to_owned());
    view.pools.insert(other.name.clone(), other);
    view.enter_ledger(ledger("q", "a", 50));
    let carrier = view.nodes.values_mut().next().expect("a");
    carrier.pools.insert(PoolName::from("q"), node_pool(50));
    for pool in view.pools.values_mut() {
        pool.max_queued = if dice.one_in(3) { 3 } else { 100 };
        pool.max_queue_millis = if dice.one_in(3) { 200_000 } else { HOUR };
        if dice.one_in(3) {
            let limit =
                TenantLimit { namespaces: BTreeMap::new(), bytes: Some(Bytes(70)), reservations: Some(3) };
            pool.tenant_limits.push(limit);
        }
    }
    let import = template(30, 20);
    view.imports.insert(import.name.clone(), import);
    for node in ["a", "b"] {
        let staged = image(node, 20, 0);
        if !first || dice.one_in(2) {
            view.images.insert(staged.name.clone(), staged);
        }
    }
    if dice.one_in(2) {
        hold(&mut view, "b", "there", Class::Images, 10 + dice.draw(30));
    }
    view.index = None;
    let mut view = view.part(&view.pools.keys().cloned().collect());
    for number in 0..3 + dice.draw(12) {
        let mut request = request(dice, number);
        request.has_finalizer = !first || dice.one_in(2);
        if !first && request.template.is_some() {
            request.pools = PoolChoice::Named(PoolName::from("p")); // where the image's objects are
        }
        view.enter_reservation(request);
    }
    view
}

fn request(dice: &mut Dice, number: u64) -> crate::view::ReservationView {
    let mut request = reservation(&format!("r{number}"), 5 + dice.draw(40), dice.draw(100_000));
    request.claim_namespace = format!("tenant-{}", dice.draw(3));
    request.priority = i32::try_from(dice.draw(2)).expect("small");
    request.when_full = dice.one_in(4).then_some(WhenFull::Reject);
    if dice.one_in(3) {
        request.state = ReservationState::Queued;
        request.queued_since = Some(request.created);
    }
    match dice.draw(4) {
        0 => request.pools = PoolChoice::Labelled(BTreeMap::new()),
        1 => request.pools = PoolChoice::Named(PoolName::from("q")),
        _ => {}
    }
    if dice.one_in(4) {
        request.access = Access::Block;
        request.template = Some(ObjectName::new("ns", "template"));
        request.claim_namespace = "ns".to_owned();
    }
    request
}

/// What a change makes of the objects, if nobody else writes.
fn carry_out(view: &mut View, uid: &Uid, change: &Change) {
    match change {
        Change::WriteLedger { name, revision, promises, .. } => {
            let found = view.ledgers.values().find(|ledger| ledger.name == *name).expect("there").clone();
            assert_eq!(*revision, found.revision + 1, "one write per ledger and round");
            view.enter_ledger(LedgerView { revision: *revision, promises: promises.clone(), ..found });
        }
        Change::CreateImage { name, .. } if view.images.contains_key(name) => {}
        Change::CreateImage { name, image, pool, node, .. } => {
            let mut made = crate::fixture::image(node.as_str(), image.real_size.0, 0);
            made.uid = Uid(format!("uid-{name}"));
            (made.name, made.pool) = (name.clone(), pool.clone());
            (made.digest, made.virtual_size) = (image.digest, image.virtual_size);
            view.images.insert(name.clone(), made);
        }
        Change::GuardReservation { .. }
        | Change::AssignReservation { .. }
        | Change::ReportReservation { .. } => {
            let mut found = view.remove_reservation(uid).expect("there");
            match change {
                Change::AssignReservation { placement, image, .. } => {
                    found.assignment = Some(placement.clone());
                    found.assigned_image.clone_from(image);
                    found.state = ReservationState::Promised;
                }
                Change::ReportReservation { report, .. } => found.state = report.state,
                _ => found.has_finalizer = true,
            }
            view.enter_reservation(found);
        }
        _ => {}
    }
}

fn waiting(view: &View) -> BTreeSet<Uid> {
    view.open_to(None).map(|request| request.uid.clone()).collect()
}

/// Rounds until nothing changes any more.
fn in_rounds(mut view: View) -> View {
    for _ in 0..8 {
        let round = decide_all(view.clone(), &waiting(&view), 100, NOW);
        let before = view.clone();
        for (uid, change) in &round.first {
            carry_out(&mut view, uid, change);
        }
        for commit in &round.commits {
            carry_out(&mut view, &Uid::default(), &commit.write);
            commit.assigned.iter().for_each(|(uid, change)| carry_out(&mut view, uid, change));
        }
        for (uid, changes) in &round.others {
            for change in changes {
                carry_out(&mut view, uid, change);
            }
        }
        if view == before {
            return view;
        }
    }
    panic!("it does not settle")
}

/// One decision after the other, the first in the order that holds at that moment first.
fn one_by_one(mut view: View) -> View {
    for _ in 0..8 {
        let before = view.clone();
        let mut seen = BTreeSet::new();
        loop {
            let backlog = Backlog::of(&view, NOW);
            let next = backlog.order().find(|uid| !seen.contains(*uid)).cloned();
            let apart = || waiting(&view).into_iter().find(|uid| !seen.contains(uid));
            let Some(uid) = next.or_else(apart) else { break };
            seen.insert(uid.clone());
            loop {
                let unchanged = view.clone();
                for change in decide(&view, &uid, NOW) {
                    carry_out(&mut view, &uid, &change);
                }
                if view == unchanged || !waiting(&view).contains(&uid) {
                    break;
                }
            }
        }
        if view == before {
            return view;
        }
    }
    panic!("it does not settle")
}

/// Who has which place, and what became of the others.
fn outcome(view: &View) -> Vec<String> {
    let told = view.reservations.values().map(|request| {
        let place = request.assignment.as_ref().map(|place| format!("{}/{}", place.pool, place.node));
        format!("{} {:?} {place:?}", request.name, request.state)
    });
    told.collect()
}

#[test]
fn a_round_ends_where_decisions_one_by_one_end() {
    let (mut granted, mut shared, mut refused, mut queued) = (0, 0, 0, 0);
    for seed in 0..3000 {
        let view = scene(&mut Dice(seed), false);
        let rounds = in_rounds(view.clone());
        assert_eq!(outcome(&rounds), outcome(&one_by_one(view.clone())), "seed {seed}");
        shared += writes_shared(&view, &rounds);
        let count = |state| rounds.reservations.values().filter(|request| request.state == state).count();
        granted += count(ReservationState::Promised);
        refused += count(ReservationState::Refused);
        queued += count(ReservationState::Queued);
    }
    println!("{granted} granted, {shared} writes of ledgers shared, {refused} refused, {queued} queued");
    assert!(granted > 5000 && shared > 1000 && refused > 1000 && queued > 1000);
}

/// Where something comes first, what was asked for later may be placed earlier, in what is not kept free for it; but bounds
/// and limits hold, and nothing that would fit is left waiting.
#[test]
fn bounds_and_limits_hold_where_something_has_to_come_first() {
    for seed in 0..2000 {
        let view = scene(&mut Dice(seed), true);
        let rounds = in_rounds(view.clone());
        writes_shared(&view, &rounds);
        for pool in rounds.pools.values() {
            let Some(limit) = pool.tenant_limits.first() else { continue };
            for tenant in ["tenant-0", "tenant-1", "tenant-2", "ns"] {
                let held = rounds.reservations.values().filter(|request| {
                    let here = request.assignment.as_ref().is_some_and(|place| place.pool == pool.name);
                    here && request.claim_namespace == tenant
                });
                assert!(held.count() <= 3, "seed {seed}: {limit:?}");
            }
        }
        assert_eq!(outcome(&rounds), outcome(&one_by_one(rounds.clone())), "seed {seed}: something was left");
    }
}

/// How many promises shared a write with another; every ledger within its bounds.
fn writes_shared(before: &View, after: &View) -> usize {
    let shared = after.ledgers.iter().map(|(place, ledger)| {
        assert_eq!(crate::budget::fits(ledger, &[]), Ok(()));
        let new = ledger.promises.len() - before.ledgers[place].promises.len();
        new.saturating_sub(usize::try_from(ledger.revision - 1).expect("few"))
    });
    shared.sum()
}

#[test]
fn requests_that_get_a_place_in_one_ledger_share_its_write() {
    let mut view = view(&[("a", 1000)]);
    for number in 0..20 {
        let mut request = reservation(&format!("r{number:02}"), 10, number);
        request.has_finalizer = number != 3;
        crate::fixture::add(&mut view, request);
    }
    let round = decide_all(view.clone(), &BTreeSet::from([Uid::from("r00")]), 100, NOW);
    assert!(matches!(&round.first[..], [(uid, Change::GuardReservation { .. })] if uid.as_str() == "r03"));
    assert_eq!(round.again, BTreeSet::from([Uid::from("r03")]));
    let [Commit { write: Change::WriteLedger { promises, revision: 2, .. }, assigned }] = &round.commits[..]
    else {
        panic!("{:?}", round.commits)
    };
    assert_eq!((promises.len(), assigned.len()), (19, 19), "not the one without a finalizer");
    let round = decide_all(view, &BTreeSet::from([Uid::from("r19")]), 5, NOW);
    assert_eq!(round.commits[0].assigned.len(), 4, "five places, one of them kept free");
    assert_eq!(round.again, BTreeSet::from([Uid::from("r03"), Uid::from("r19")]));
}

#[test]
fn an_image_is_promised_with_the_first_request_that_may_be_promised_it() {
    let mut view = view(&[("a", 200)]);
    let import = template(30, 20);
    view.imports.insert(import.name.clone(), import);
    for number in 0..3 {
        let mut request = reservation(&format!("r{number}"), 30, number);
        (request.access, request.template) = (Access::Block, Some(ObjectName::new("ns", "template")));
        crate::fixture::add(&mut view, request);
    }
    let asked: BTreeSet<Uid> = view.reservations.keys().cloned().collect();
    let round = decide_all(view.clone(), &asked, 100, NOW);
    let made: Vec<&Change> = round.first.iter().map(|(_, change)| change).collect();
    let [create @ Change::CreateImage { .. }] = made[..] else { panic!("{made:?}") };
    assert_eq!((round.commits.len(), round.again.len()), (0, 3), "all of them need it");
    carry_out(&mut view, &Uid::from("r0"), create);
    let round = decide_all(view, &asked, 100, NOW);
    let [Commit { write: Change::WriteLedger { promises, .. }, assigned }] = &round.commits[..] else {
        panic!("{:?}", round.commits)
    };
    assert_eq!((promises.len(), assigned.len()), (4, 3), "three volumes, one image");
}

#[test]
fn what_cannot_be_met_is_said_of_those_who_asked() {
    let mut view = view(&[("a", 50)]);
    for number in 0..3 {
        crate::fixture::add(&mut view, reservation(&format!("r{number}"), 40, number));
    }
    let round = decide_all(view, &BTreeSet::from([Uid::from("r2")]), 100, NOW);
    assert_eq!(round.commits[0].assigned.len(), 1);
    let [(uid, changes)] = &round.others[..] else { panic!("{:?}", round.others) };
    let told = changes.iter().find_map(|change| match change {
        Change::ReportReservation { report, .. } => Some((report.state, report.reason, report.queue)),
        _ => None,
    });
    let expected = (ReservationState::Queued, Reason::InsufficientCapacity, Some((2, Bytes(40))));
    assert_eq!((uid.as_str(), told), ("r2", Some(expected)));
}

#[test]
fn what_makes_room_in_a_ledger_waits_for_the_promises_of_the_round() {
    let scene = |guarded: bool| {
        let mut view = view(&[("a", 100)]);
        hold(&mut view, "a", "there", Class::Images, 30);
        let import = template(40, 40);
        view.imports.insert(import.name.clone(), import);
        let idle = image("a", 40, 0);
        let ledger = view.ledgers.values_mut().next().expect("one");
        ledger.promises.insert(idle.uid.clone(), idle.promise(None));
        view.images.insert(idle.name.clone(), idle);
        let mut small = reservation("r1", 20, 0);
        small.has_finalizer = guarded;
        crate::fixture::add(&mut view, small);
        crate::fixture::add(&mut view, reservation("r2", 50, 1));
        view
    };
    let asked = BTreeSet::from([Uid::from("r1"), Uid::from("r2")]);
    let round = decide_all(scene(false), &asked, 100, NOW);
    assert_eq!((&round.commits[..], &round.others[..]), (&[][..], &[][..]), "r1 has no finalizer yet");
    assert_eq!(round.again, asked);
    let round = decide_all(scene(true), &asked, 100, NOW);
    assert_eq!((round.commits.len(), &round.others[..]), (1, &[][..]), "one write of the ledger");
    assert_eq!(round.again, BTreeSet::from([Uid::from("r2")]));
    let mut view = scene(true);
    view.reservations.remove(&Uid::from("r1"));
    hold(&mut view, "a", "r1", Class::Images, 20);
    let round = decide_all(view, &BTreeSet::from([Uid::from("r2")]), 100, NOW);
    let [(_, changes)] = &round.others[..] else { panic!("{:?}", round.others) };
    let retires = |change: &Change| matches!(change, Change::WriteLedger { promises, .. } if promises[&Uid::from("image-a")].revoked.is_some());
    assert!(changes.iter().any(retires), "then the image goes: {changes:?}");
}

#[test]
fn a_round_knows_what_cannot_be_read_and_whose_claims_are_gone() {
    let mut view = view(&[("a", 50)]);
    for number in 0..2 {
        crate::fixture::add(&mut view, reservation(&format!("r{number}"), 40, number));
    }
    view.unreadable.push(crate::fixture::unreadable("StagingReservation", ObjectName::new("ns", "r0"), "r0"));
    let claim = crate::reservation::Claim {
        name: ObjectName::new("ns", "claim"),
        uid: Uid::from("claim"),
        volume: "volume".to_owned(),
        persistent: false,
    };
    let asks = view.reservations.get_mut(&Uid::from("r1")).expect("there");
    (asks.claim, asks.node) = (Some(claim), Some(NodeName::from("a")));
    view.claims = Some(crate::view::Claims::default());
    let (pools, asked) = (view.pools.keys().cloned().collect(), BTreeSet::from([Uid::from("r1")]));
    let round = decide_all(view.part(&pools), &asked, 100, NOW);
    let [Commit { assigned, .. }] = &round.commits[..] else { panic!("{round:?}") };
    assert_eq!(assigned[0].0, Uid::from("r1"), "what is hidden keeps nobody waiting, and nothing is swept");
    view.unreadable.clear();
    let round = decide_all(view.part(&pools), &asked, 100, NOW);
    let [(_, changes)] = &round.others[..] else { panic!("{round:?}") };
    assert!(matches!(&changes[..], [Change::ConfirmAbandoned { .. }, Change::AbandonReservation { .. }]));
}

#[test]
fn a_round_gives_no_place_to_what_may_also_go_to_pools_that_it_does_not_see() {
    let mut view = view(&[("a", 100)]);
    let q = PoolName::from("q");
    view.pools.insert(q.clone(), pool("q"));
    view.enter_ledger(ledger("q", "a", 50));
    let carrier = view.nodes.values_mut().next().expect("a");
    carrier.pools.insert(q.clone(), node_pool(50));
    // As after a restore: it has no place, and the node holds its bytes in the other pool.
    let held = carrier.pools.get_mut(&PoolName::from("p")).expect("there");
    held.obeyed.insert(Uid::from("r"), crate::units::Generation::FIRST);
    let mut anywhere = reservation("r", 40, 0);
    anywhere.pools = PoolChoice::Labelled(BTreeMap::new());
    crate::fixture::add(&mut view, anywhere);
    let mut here = reservation("s", 10, 1);
    here.pools = PoolChoice::Named(q.clone());
    crate::fixture::add(&mut view, here);

    let (r, s) = (Uid::from("r"), Uid::from("s"));
    let both: BTreeSet<Uid> = [r.clone(), s.clone()].into();
    let round = decide_all(view.part(&[q.clone()].into()), &both, 100, NOW);
    assert_eq!(round.commits, [], "{round:?}");
    assert!(
        round.first.is_empty() && round.again.contains(&r),
        "it asks again, with all of its pools: {round:?}"
    );
    assert_eq!(round.others.iter().map(|(uid, _)| uid).collect::<Vec<_>>(), [&s], "it keeps its turn");
    let round = decide_all(view.part(&view.pools.keys().cloned().collect()), &both, 100, NOW);
    assert!(round.commits.iter().all(|commit| commit.assigned.iter().all(|(uid, _)| *uid != r)), "{round:?}");

    let carrier = view.nodes.values_mut().next().expect("a");
    carrier.pools.values_mut().for_each(|pool| pool.obeyed.clear());
    hold(&mut view, "a", "r", Class::Images, 40);
    let round = decide_all(view.part(&[q].into()), &[s.clone()].into(), 100, NOW);
    let placed: Vec<&Uid> = round.commits.iter().flat_map(|c| &c.assigned).map(|(uid, _)| uid).collect();
    assert_eq!(placed, [&s], "what is promised something elsewhere does not wait here: {round:?}");
}
