//! What an API server that was restored, or a ledger that was deleted, has forgotten of a reservation, and its node has not.
//!
//! **Guarantees.** What a node holds for a reservation stays where it is: the reservation is given that place and no other,
//! and the promise is taken back only once the reservation is being deleted, after the node has given the bytes back. What
//! was assigned and is promised nowhere is promised again, if there is room, for which images that nothing needs go, but never a
//! volume that was given back: it would come back empty.

use crate::budget::fits;
use crate::change::{Change, Considered, ReservationReport};
use crate::ids::Uid;
use crate::ledger::{LedgerRecord as _, Promise};
use crate::reason::Reason;
use crate::units::Timestamp;
use crate::view::{Access, LedgerView, NodePoolState, Placement, ReservationState, ReservationView, View};

use super::decide::report;
use super::need::Need;
use super::room;

/// How often a reservation that waits for a ledger is looked at without any other cause, in milliseconds.
const LOOK_MILLIS: u64 = 2_000;

/// True if the node of this ledger says that it holds bytes for `uid`.
pub(super) fn holds(view: &View, ledger: &LedgerView, uid: &Uid) -> bool {
    view.report_of(&ledger.pool, &ledger.node).is_some_and(|report| is_held(report, uid))
}

fn is_held(report: &NodePoolState, uid: &Uid) -> bool {
    report.obeyed.contains_key(uid) && report.held().any(|(held, _)| held == uid)
}

/// True if some node says that it holds bytes for `uid`.
pub(super) fn is_held_anywhere(view: &View, uid: &Uid) -> bool {
    view.nodes.values().flat_map(|node| node.pools.values()).any(|report| is_held(report, uid))
}

/// True if a node that can be heard still says that it has given bytes of `uid` back: it would not obey the same promise again
/// before it has forgotten that.
fn is_remembered(view: &View, uid: &Uid) -> bool {
    let live = view.nodes.values().filter(|node| node.live && node.reported);
    live.flat_map(|node| node.pools.values()).any(|report| report.released.contains_key(uid))
}

/// The write that takes a promise away under which its node has given the bytes back already: the node forgets that only once
/// no ledger names it, and would not obey it before.
fn given_back(view: &View, uid: &Uid) -> Option<Change> {
    let is_over = |ledger: &&LedgerView| {
        let node = view.nodes.get(&ledger.node).filter(|node| node.live && node.reported);
        let released = node.and_then(|node| node.pools.get(&ledger.pool)?.released.get(uid));
        let entry = released.zip(ledger.promises.get(uid));
        entry.is_some_and(|(released, promise)| *released >= promise.generation)
            && view.behind(ledger).is_none()
    };
    let ledger = view.ledgers_of(uid).find(is_over)?;
    Some(view.without(ledger, &[uid]))
}

/// The next steps for a reservation without a place that was placed before the API server went back in time: where a node
/// still holds its bytes, it gets the same place. `None` if no node knows it.
pub(super) fn adopt(view: &View, reservation: &ReservationView, now: Timestamp) -> Option<Vec<Change>> {
    let uid = &reservation.uid;
    if reservation.state == ReservationState::Refused {
        return None;
    }
    if !is_held_anywhere(view, uid) {
        let wait = || vec![Change::RetryAfter { millis: LOOK_MILLIS }];
        return is_remembered(view, uid)
            .then(|| given_back(view, uid).map_or_else(wait, |write| vec![write]));
    }
    let mut sound = view.ledgers_of(uid).filter(|l| holds(view, l, uid) && view.behind(l).is_none());
    let Some(ledger) = sound.next() else { return Some(vec![Change::RetryAfter { millis: LOOK_MILLIS }]) };
    if !reservation.has_finalizer {
        return Some(vec![Change::GuardReservation { name: reservation.name.clone(), uid: uid.clone() }]);
    }
    let generation = ledger.promises.get(uid)?.generation;
    let (pool, node) = (ledger.pool.clone(), ledger.node.clone());
    let need = Need::of(view, reservation, now).ok();
    let image = need.and_then(|need| Some(need.image?.assigned_at(&pool, &node)));
    let considered = Considered {
        pool: pool.clone(),
        node: node.clone(),
        reason: Reason::Promised,
        message: "the node holds its bytes".to_owned(),
        shortfall: None,
        chosen: true,
    };
    Some(vec![Change::AssignReservation {
        name: reservation.name.clone(),
        version: reservation.version.clone(),
        placement: Placement { pool, node, generation },
        image,
        reused: false,
        considered: vec![considered],
    }])
}

/// The next steps for a reservation whose place has no promise for it, because its ledger was deleted or restored. `None` if
/// it is promised there, or if that cannot be told yet. What its node has given back was deleted, and a restore has undone
/// that: nothing takes its place, and a person has to delete it once more.
pub(super) fn promise_again(
    view: &View,
    reservation: &ReservationView,
    place: &Placement,
    now: Timestamp,
) -> Option<Vec<Change>> {
    let uid = &reservation.uid;
    let told = view.told_of(place)?;
    let ledger = view.ledger_at(place).filter(|ledger| view.behind(ledger).is_none())?;
    let is_promised = ledger.promises.contains_key(uid);
    let released = told.released.get(uid).is_some_and(|generation| *generation >= place.generation);
    if released && is_promised {
        return Some(vec![view.without(ledger, &[uid])]);
    }
    if is_promised {
        return None;
    }
    if released || was_given_back(reservation, place) {
        let reason = if reservation.access == Access::Block { Reason::VolumeLost } else { Reason::FileLost };
        let message = format!(
            "node {} has given its bytes back since the API server's data were saved: delete it",
            place.node
        );
        return Some(vec![say(reservation, reason, message)]);
    }
    let (pool, node) = (&place.pool, &place.node);
    let lost = format!("its promise was lost with the ledger of pool {pool} on node {node}");
    let need = match Need::of_assigned(view, reservation, now) {
        Ok(need) => need,
        Err(unmet) => {
            return Some(vec![say(reservation, unmet.reason, format!("{lost}: {}", unmet.message))]);
        }
    };
    let own = Promise { generation: place.generation, ..need.own_in(view.block_of(&place.pool)) };
    let new = [(uid.clone(), own)];
    let Err(shortfall) = fits(ledger, &new) else { return Some(vec![ledger.with(&new)]) };
    room::for_lost(view, reservation, ledger, &new, now).or_else(|| {
        let again = Change::RetryAfter { millis: LOOK_MILLIS };
        let message = format!("{lost}, which {shortfall}");
        Some(vec![say(reservation, Reason::InsufficientCapacity, message), again])
    })
}

/// True for a volume that was there, at this place, by what is shown of it: one that its node does not hold is lost.
pub(crate) fn was_given_back(reservation: &ReservationView, place: &Placement) -> bool {
    let was_ready =
        reservation.state == ReservationState::Ready || reservation.prepared == Some(place.generation);
    was_ready && reservation.access == Access::Block
}

fn say(reservation: &ReservationView, reason: Reason, message: String) -> Change {
    report(reservation, ReservationReport::new(reservation.state, reason, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{add, at, hold, placed, reservation, view};
    use crate::ids::NodeName;
    use crate::ledger::Class;
    use crate::reservation::decide;
    use crate::units::Generation;

    fn told<'v>(view: &'v mut View, node: &str) -> &'v mut NodePoolState {
        let node = view.nodes.get_mut(&NodeName::from(node)).expect("there");
        node.pools.values_mut().next().expect("one")
    }

    fn obeyed(view: &mut View, node: &str, name: &str) {
        let lineage = view.ledgers[&at("p", node)].lineage.clone();
        let report = told(view, node);
        report.lineage = Some(lineage);
        report.obeyed.insert(Uid::from(name), Generation::FIRST);
    }

    fn ask(view: &View) -> Vec<Change> {
        decide(view, &Uid::from("r"), Timestamp(0))
    }

    #[test]
    fn what_a_node_holds_is_given_its_place_again_and_no_other() {
        let mut view = view(&[("a", 100), ("b", 100)]);
        let mut request = reservation("r", 10, 0);
        request.has_finalizer = false;
        let uid = add(&mut view, request);
        obeyed(&mut view, "b", "r");
        assert!(matches!(&ask(&view)[..], [Change::RetryAfter { .. }]), "its ledger is behind");
        hold(&mut view, "a", "r", Class::Images, 10);
        hold(&mut view, "b", "r", Class::Images, 10);
        assert!(matches!(&ask(&view)[..], [Change::GuardReservation { .. }]));
        view.reservations.get_mut(&uid).expect("there").has_finalizer = true;
        let changes = ask(&view);
        let [Change::AssignReservation { placement, .. }] = &changes[..] else { panic!("{changes:?}") };
        assert_eq!(*placement, placed("p", "b", 1));
    }

    #[test]
    fn what_a_node_has_given_back_is_placed_anew_once_the_node_has_forgotten_it() {
        let mut view = view(&[("a", 100)]);
        let uid = add(&mut view, reservation("r", 10, 0));
        told(&mut view, "a").released.insert(uid, Generation::FIRST);
        assert!(matches!(&ask(&view)[..], [Change::RetryAfter { .. }]), "it would not be obeyed");
        view.nodes.values_mut().for_each(|node| node.live = false);
        assert!(
            !matches!(&ask(&view)[..], [Change::RetryAfter { .. }]),
            "nor does it wait for a node that is lost"
        );
        view.nodes.values_mut().for_each(|node| node.live = true);
        told(&mut view, "a").released.clear();
        assert!(ask(&view).iter().any(|change| matches!(change, Change::AssignReservation { .. })));
    }

    #[test]
    fn a_restored_promise_does_not_keep_a_node_from_forgetting_what_it_gave_back() {
        let mut view = view(&[("a", 100)]);
        let uid = add(&mut view, reservation("r", 10, 0));
        hold(&mut view, "a", "r", Class::Images, 10);
        told(&mut view, "a").released.insert(uid.clone(), Generation::FIRST);
        let goes = |view: &View| matches!(&ask(view)[..], [Change::WriteLedger { promises, .. }] if promises.is_empty());
        assert!(goes(&view), "the node remembers it for as long as a ledger names it");
        view.nodes.values_mut().for_each(|node| node.reported = false);
        assert!(!goes(&view), "that is not known before the node is heard");
        view.nodes.values_mut().for_each(|node| node.reported = true);
        told(&mut view, "a").obeyed_revision = 9;
        assert!(!goes(&view), "a ledger that is behind is rebuilt first");
        told(&mut view, "a").obeyed_revision = 0;
        let later = Generation::FIRST.next();
        let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
        ledger.promises.get_mut(&uid).expect("there").generation = later;
        assert!(!goes(&view), "it gave back an earlier one");
    }

    #[test]
    fn what_a_node_holds_is_taken_back_only_from_what_is_being_deleted_and_after_the_node() {
        let mut view = view(&[("a", 100), ("b", 100)]);
        let mut request = reservation("r", 10, 0);
        request.assignment = Some(placed("p", "a", 1));
        let uid = add(&mut view, request);
        hold(&mut view, "a", "r", Class::Images, 10);
        hold(&mut view, "b", "r", Class::Images, 10);
        obeyed(&mut view, "b", "r");
        assert!(!ask(&view).iter().any(|change| matches!(change, Change::WriteLedger { .. })));
        view.reservations.get_mut(&uid).expect("there").deleting = true;
        let changes = ask(&view);
        let [Change::WriteLedger { promises, revision, .. }] = &changes[..] else { panic!("{changes:?}") };
        assert_eq!(promises[&uid].revoked, Some(*revision), "its node is told first");
        let ledger = view.ledgers.get_mut(&at("p", "b")).expect("there");
        (ledger.promises, ledger.revision) = (promises.clone(), *revision);
        assert!(!ask(&view).iter().any(|change| matches!(change, Change::WriteLedger { .. })), "it waits");
        let revision = *revision;
        let report = told(&mut view, "b");
        report.obeyed.clear();
        report.released.insert(uid, Generation::FIRST);
        report.obeyed_revision = revision;
        let changes = ask(&view);
        assert!(matches!(&changes[..], [Change::WriteLedger { promises, .. }] if promises.is_empty()));
    }

    #[test]
    fn a_promise_that_is_gone_with_its_ledger_is_made_again_where_it_fits() {
        let mut view = view(&[("a", 100)]);
        let mut request = reservation("r", 60, 0);
        request.assignment = Some(placed("p", "a", 1));
        request.state = ReservationState::Promised;
        let uid = add(&mut view, request);
        let changes = ask(&view);
        assert!(
            matches!(&changes[..], [Change::WriteLedger { promises, .. }] if promises.contains_key(&uid))
        );
        hold(&mut view, "a", "other", Class::Images, 50);
        let changes = ask(&view);
        let Change::ReportReservation { report, .. } = &changes[0] else { panic!("{changes:?}") };
        assert_eq!(report.reason, Reason::InsufficientCapacity);
        view.nodes.values_mut().for_each(|node| node.reported = false);
        assert!(!ask(&view).iter().any(|change| matches!(change, Change::WriteLedger { .. })));
    }

    #[test]
    fn a_deletion_that_a_restore_undid_has_to_be_repeated() {
        for (access, reason) in [(Access::Block, Reason::VolumeLost), (Access::File, Reason::FileLost)] {
            let mut view = view(&[("a", 100)]);
            let mut request = reservation("r", 60, 0);
            request.assignment = Some(placed("p", "a", 1));
            (request.state, request.access) = (ReservationState::Promised, access);
            let uid = add(&mut view, request);
            hold(&mut view, "a", "r", Class::Images, 60);
            told(&mut view, "a").released.insert(uid, Generation::FIRST);
            let changes = ask(&view);
            assert!(
                matches!(&changes[..], [Change::WriteLedger { promises, .. }] if promises.is_empty()),
                "nothing lies under its promise: {changes:?}"
            );
            view.ledgers.values_mut().for_each(|ledger| ledger.promises.clear());
            let changes = ask(&view);
            let [Change::ReportReservation { report, .. }] = &changes[..] else { panic!("{changes:?}") };
            assert_eq!((report.state, report.reason), (ReservationState::Promised, reason));
        }
    }

    #[test]
    fn a_volume_that_was_given_back_is_not_made_again_empty() {
        let mut view = view(&[("a", 100)]);
        let mut request = reservation("r", 60, 0);
        request.assignment = Some(placed("p", "a", 1));
        (request.state, request.access) = (ReservationState::Ready, Access::Block);
        add(&mut view, request);
        let changes = ask(&view);
        let [Change::ReportReservation { report, .. }] = &changes[..] else { panic!("{changes:?}") };
        assert_eq!(report.reason, Reason::VolumeLost);
    }
}
