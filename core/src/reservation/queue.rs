//! Who waits, in which order. Plain first come, first served: a request never overtakes an earlier one that waits for the
//! same place, so that a large one is not starved by small ones.

use crate::budget::fits_empty;
use crate::ids::Uid;
use crate::units::{Bytes, Timestamp};
use crate::view::{ReservationState, ReservationView, View, WhenFull};

use super::need::Need;
use super::place::{Candidate, everything, may_use};

/// An earlier request that waits for a place that a later one could use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ahead {
    /// Its UID.
    pub uid: Uid,
    /// What it asks for.
    pub bytes: Bytes,
    /// True if it is known to wait; false if nothing has decided about it yet.
    pub queued: bool,
    /// The indexes, in the list of candidates, of the places that it waits for.
    pub places: Vec<usize>,
}

/// True if nothing is promised to it and something might be.
pub fn is_waiting(view: &View, reservation: &ReservationView) -> bool {
    !reservation.deleting
        && reservation.assignment.is_none()
        && reservation.state != ReservationState::Refused
        && reservation.invalid.is_none()
        && view.ledgers_of(&reservation.uid).next().is_none()
}

/// The earlier requests that wait for one of these places, in order of arrival.
pub(super) fn ahead(
    view: &View,
    reservation: &ReservationView,
    all: &[Candidate],
    now: Timestamp,
) -> Vec<Ahead> {
    let place = (reservation.created, &reservation.uid);
    let mut found: Vec<(Timestamp, Ahead)> = Vec::new();
    for other in view.reservations.values() {
        if (other.created, &other.uid) >= place || !is_waiting(view, other) {
            continue;
        }
        let Ok(need) = Need::of(view, other, now) else { continue };
        let places: Vec<usize> =
            (0..all.len()).filter(|at| waits_for(view, other, &need, &all[*at])).collect();
        if !places.is_empty() {
            let queued = other.state == ReservationState::Queued;
            found
                .push((other.created, Ahead { uid: other.uid.clone(), bytes: need.bytes(), queued, places }));
        }
    }
    found.sort_by(|(a, one), (b, two)| (a, &one.uid).cmp(&(b, &two.uid)));
    found.into_iter().map(|(_, ahead)| ahead).collect()
}

/// True if `other` may use the place, and could if it were empty.
fn waits_for(view: &View, other: &ReservationView, need: &Need, place: &Candidate) -> bool {
    let Some(pool) = view.pools.get(&place.pool) else { return false };
    let ledger = view.ledgers.get(&(place.pool.clone(), place.node.clone()));
    may_use(other, pool, &place.node)
        && ledger.is_some_and(|ledger| {
            fits_empty(&ledger.capacity, &everything(need, &other.uid, pool.block)).is_ok()
        })
}

/// What the pools that a reservation may go to say about waiting: the most generous of each, and `Reject` only if all do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Policy {
    pub when_full: WhenFull,
    pub millis: u64,
    pub length: u32,
}

impl Policy {
    pub(super) fn of(view: &View, reservation: &ReservationView) -> Option<Self> {
        let pools = view.pools.values().filter(|pool| reservation.pools.allows(pool));
        let mut policy: Option<Self> = None;
        for pool in pools {
            let when_full = reservation.when_full.unwrap_or(pool.when_full);
            let before = policy.unwrap_or(Self { when_full, millis: 0, length: 0 });
            let all_reject = before.when_full == WhenFull::Reject && when_full == WhenFull::Reject;
            policy = Some(Self {
                when_full: if all_reject { WhenFull::Reject } else { WhenFull::Queue },
                millis: before.millis.max(pool.max_queue_millis),
                length: before.length.max(pool.max_queued),
            });
        }
        policy
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{add, hold, pool, reservation, view};
    use crate::ids::{NodeName, PoolName};
    use crate::ledger::Class;
    use crate::reservation::candidates;
    use crate::view::PoolChoice;

    fn names(view: &View, request: &ReservationView) -> Vec<String> {
        let need = Need::of(view, request, Timestamp(0)).expect("plain");
        let all = candidates(view, request, &need);
        ahead(view, request, &all, Timestamp(0)).into_iter().map(|ahead| ahead.uid.0).collect()
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
    fn the_most_generous_pool_counts() {
        let mut view = view(&[]);
        let mut strict = pool("q");
        strict.when_full = WhenFull::Reject;
        strict.max_queued = 5;
        view.pools.insert(strict.name.clone(), strict);
        let mut request = reservation("r", 1, 0);
        request.pools = PoolChoice::Labelled(std::collections::BTreeMap::new());
        let policy = Policy::of(&view, &request).expect("two pools");
        assert_eq!((policy.when_full, policy.length), (WhenFull::Queue, 1000));
        request.when_full = Some(WhenFull::Reject);
        assert_eq!(Policy::of(&view, &request).expect("two pools").when_full, WhenFull::Reject);
        request.pools = PoolChoice::Named(PoolName::from("none"));
        assert_eq!(Policy::of(&view, &request), None);
    }
}
