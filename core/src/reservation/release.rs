//! Giving a promise back. What a node may have obeyed leaves a ledger only after the node has said that its bytes are gone;
//! what no assignment ever named may go at once.

use crate::change::{Change, ReservationReport};
use crate::lost;
use crate::reason::Reason;
use crate::retire;
use crate::view::{LedgerView, Placement, ReservationState, ReservationView, View};

use super::decide::{HEARD_MILLIS, report};
use super::held;

/// The write that removes this reservation's promise from the first ledger other than `keep`'s, or of another generation.
/// Only for entries that no assignment can name any more: it is fixed elsewhere, refused for ever, or being deleted. One that
/// a node obeys, as after the API server went back in time, is revoked first, and only of what is being deleted. Nothing goes
/// before every node was heard, or is lost.
pub(super) fn withdraw(
    view: &View,
    reservation: &ReservationView,
    keep: Option<&Placement>,
) -> Option<Change> {
    if view.unheard {
        return None; // a node that has not been heard yet may obey it since before the API server went back in time
    }
    let uid = &reservation.uid;
    let mut strays = view.ledgers_of(uid).filter(|ledger| {
        let entry = ledger.promises.get(uid);
        let kept = keep.is_some_and(|keep| {
            ledger.pool == keep.pool
                && ledger.node == keep.node
                && entry.is_some_and(|entry| entry.generation == keep.generation)
        });
        !kept && view.behind(ledger).is_none()
    });
    strays.find_map(|ledger| take_back(view, reservation, ledger))
}

fn take_back(view: &View, reservation: &ReservationView, ledger: &LedgerView) -> Option<Change> {
    let uid = &reservation.uid;
    let promise = ledger.promises.get(uid)?;
    let report = view.report_of(&ledger.pool, &ledger.node);
    let over = report.is_some_and(|report| retire::is_over(report, uid, promise));
    if promise.revoked.is_none() && held::holds(view, ledger, uid) {
        return reservation.deleting.then(|| ledger.revoking(&[uid]));
    }
    (promise.revoked.is_none() || over).then(|| view.without(ledger, &[uid]))
}

/// The next steps for a reservation that is being deleted.
pub(super) fn decide(view: &View, reservation: &ReservationView) -> Vec<Change> {
    let assignment = reservation.assignment.as_ref();
    if assignment.is_none() && view.unheard {
        // A node that has not been heard yet may hold its bytes since before the API server went back in time.
        return vec![Change::RetryAfter { millis: HEARD_MILLIS }];
    }
    if let Some(stray) = withdraw(view, reservation, assignment) {
        return vec![stray];
    }
    let step = match assignment {
        None => never_assigned(view, reservation),
        Some(place) => give_back(view, reservation, place),
    };
    match step {
        Step::Write(change) => vec![*change],
        Step::Done if reservation.has_finalizer => {
            vec![Change::UnguardReservation { name: reservation.name.clone(), uid: reservation.uid.clone() }]
        }
        Step::Done => Vec::new(),
        Step::Wait(reason, message) => {
            let state = ReservationState::Releasing;
            vec![report(reservation, ReservationReport::new(state, reason, message))]
        }
    }
}

enum Step {
    Write(Box<Change>),
    Wait(Reason, String),
    Done,
}

/// Nothing assigns an object that is being deleted, and an operator that does not see that yet fails on its version.
fn never_assigned(view: &View, reservation: &ReservationView) -> Step {
    match view.ledgers_of(&reservation.uid).next() {
        None if held::is_held_anywhere(view, &reservation.uid) => {
            Step::Wait(Reason::LedgerBehind, "a node holds its bytes, and no ledger says so yet".to_owned())
        }
        None => Step::Done,
        Some(ledger) if view.behind(ledger).is_some() => behind(&ledger.name),
        Some(ledger) => {
            let (node, pool) = (&ledger.node, &ledger.pool);
            Step::Wait(
                Reason::Releasing,
                format!("node {node} has still to give back the bytes in pool {pool}"),
            )
        }
    }
}

fn give_back(view: &View, reservation: &ReservationView, place: &Placement) -> Step {
    let uid = &reservation.uid;
    let report = view.report_of(&place.pool, &place.node);
    let released = report.and_then(|report| report.released.get(uid)).is_some_and(|g| *g >= place.generation);
    let lost = lost::releases(view, reservation, &place.pool, &place.node);
    let Some(ledger) = view.ledger_at(place) else {
        let message = format!("waits for the ledger of pool {} on node {}", place.pool, place.node);
        return if released || lost { Step::Done } else { Step::Wait(Reason::LedgerBehind, message) };
    };
    // A ledger lacks what was given up: by the last report of a node that is gone, it is behind for that alone.
    if view.behind(ledger).is_some() && !lost {
        return behind(&ledger.name);
    }
    if !ledger.promises.contains_key(uid) {
        return Step::Done;
    }
    if released || lost {
        return Step::Write(Box::new(view.without(ledger, &[uid])));
    }
    let lost = view.is_lost(&place.node);
    let gives_back = format!("node {} has still to give back the bytes in pool {}", place.node, place.pool);
    match (lost, &reservation.only_copy) {
        (true, _) => Step::Wait(Reason::NodeLost, gives_back),
        (false, Some(copy)) => Step::Wait(Reason::OnlyCopy, format!("{gives_back}: {copy}")),
        (false, None) => Step::Wait(Reason::Releasing, gives_back),
    }
}

fn behind(ledger: &str) -> Step {
    Step::Wait(Reason::LedgerBehind, format!("ledger {ledger} is older than what its node has obeyed"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{add, at, hold, placed, reservation, view};
    use crate::ids::{NodeName, PoolName, Uid};
    use crate::ledger::Class;
    use crate::reservation;
    use crate::units::{Generation, Timestamp};

    fn decide(view: &View) -> Vec<Change> {
        reservation::decide(view, &Uid::from("r"), Timestamp(0))
    }

    fn deleted(assigned: bool) -> View {
        let mut view = view(&[("a", 100), ("b", 100)]);
        let mut request = reservation("r", 10, 0);
        request.deleting = true;
        request.assignment = assigned.then(|| placed("p", "b", 1));
        add(&mut view, request);
        view
    }

    #[test]
    fn never_assigned_loses_its_entries_and_then_its_finalizer() {
        let mut view = deleted(false);
        hold(&mut view, "a", "r", Class::Images, 10);
        view.unheard = true;
        assert!(matches!(&decide(&view)[..], [Change::RetryAfter { .. }]), "a node may obey it");
        view.unheard = false;
        let changes = decide(&view);
        assert!(
            matches!(&changes[..], [Change::WriteLedger { promises, .. }] if promises.is_empty()),
            "{changes:?}"
        );
        view.ledgers.values_mut().for_each(|ledger| ledger.promises.clear());
        view.unheard = true;
        assert!(matches!(&decide(&view)[..], [Change::RetryAfter { .. }]), "a node may hold its bytes");
        view.unheard = false;
        assert!(matches!(&decide(&view)[..], [Change::UnguardReservation { .. }]));
        view.reservations.values_mut().for_each(|reservation| reservation.has_finalizer = false);
        assert_eq!(decide(&view), []);
    }

    #[test]
    fn an_assigned_one_waits_for_its_node_whatever_happens() {
        let mut view = deleted(true);
        hold(&mut view, "a", "r", Class::Images, 10);
        hold(&mut view, "b", "r", Class::Images, 10);
        let stray = view.without(&view.ledgers[&at("p", "a")], &[&Uid::from("r")]);
        assert_eq!(decide(&view), [stray], "the entry that was never named goes first");
        view.ledgers.get_mut(&at("p", "a")).expect("there").promises.clear();
        let changes = decide(&view);
        let [Change::ReportReservation { report, .. }] = &changes[..] else { panic!("{changes:?}") };
        assert_eq!((report.state, report.reason), (ReservationState::Releasing, Reason::Releasing));
        assert_eq!(report.message, "node b has still to give back the bytes in pool p");
        let request = view.reservations.get_mut(&Uid::from("r")).expect("there");
        request.only_copy = Some("`a` is being sent".to_owned());
        let changes = decide(&view);
        let [Change::ReportReservation { report, .. }] = &changes[..] else { panic!("{changes:?}") };
        assert_eq!((report.state, report.reason), (ReservationState::Releasing, Reason::OnlyCopy));
        assert!(report.message.ends_with("in pool p: `a` is being sent"), "{}", report.message);
        view.nodes.get_mut(&NodeName::from("b")).expect("there").live = false;
        let changes = decide(&view);
        let [Change::ReportReservation { report, .. }] = &changes[..] else { panic!("{changes:?}") };
        assert_eq!(report.reason, Reason::NodeLost);
    }

    #[test]
    fn released_by_the_node_it_goes_from_the_ledger_and_then_for_good() {
        let mut view = deleted(true);
        hold(&mut view, "b", "r", Class::Images, 10);
        let pool = |view: &mut View| {
            let node = view.nodes.get_mut(&NodeName::from("b")).expect("there");
            std::mem::replace(
                node.pools.get_mut(&PoolName::from("p")).expect("there"),
                crate::fixture::node_pool(100),
            )
        };
        let mut report = pool(&mut view);
        report.released.insert(Uid::from("r"), Generation::FIRST);
        view.nodes.get_mut(&NodeName::from("b")).expect("there").pools.insert(PoolName::from("p"), report);
        assert!(matches!(&decide(&view)[..], [Change::WriteLedger { promises, .. }] if promises.is_empty()));
        view.ledgers.values_mut().for_each(|ledger| ledger.promises.clear());
        assert!(matches!(&decide(&view)[..], [Change::UnguardReservation { .. }]));
        let mut report = pool(&mut view);
        report.obeyed_revision = 9;
        view.nodes.get_mut(&NodeName::from("b")).expect("there").pools.insert(PoolName::from("p"), report);
        let changes = decide(&view);
        let [Change::ReportReservation { report, .. }] = &changes[..] else { panic!("{changes:?}") };
        assert_eq!(report.reason, Reason::LedgerBehind, "an old ledger that lacks the entry proves nothing");
    }
}
