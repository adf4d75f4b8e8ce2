//! The end of a reference that nothing uses any more. The *reference* ends: what it refers to is given back as with any
//! deletion, and the node itself gives nothing back that is in use.
//!
//! When it ends stands in the reservation's status, so that no operator has to remember since when it is idle: it is set
//! when the reservation is first seen idle, taken back when it is seen in use, and put off by a renewal.

use crate::change::Change;
use crate::units::Timestamp;
use crate::view::{Placement, ReservationView, View};

/// How far in the future a renewal may lie, by a clock that is not ours, in milliseconds.
const SKEW_MILLIS: u64 = 300_000;

/// Whether, and when, a reservation that is ready ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expiry {
    /// Not by this, or not for now: it is in use, or nobody can tell.
    Never,
    /// At this time, if nothing uses it until then.
    At(Timestamp),
    /// Now.
    Due {
        /// For how long nothing has used it, in milliseconds.
        idle_millis: u64,
    },
}

/// What is to be said of a ready reservation's end. Only the leader moves it; the others repeat what is there.
pub(super) fn judge(view: &View, reservation: &ReservationView, place: &Placement, now: Timestamp) -> Expiry {
    let Some(ttl) = reservation.ttl_millis else { return Expiry::Never };
    if !view.leader {
        return reservation.expires.map_or(Expiry::Never, Expiry::At);
    }
    let known = view.nodes.get(&place.node).filter(|node| node.live && node.reported);
    let Some(report) = known.and_then(|node| node.pools.get(&place.pool)) else { return Expiry::Never };
    if report.in_use.contains(&reservation.uid) {
        return Expiry::Never;
    }
    let renewed = reservation.renewed.filter(|time| time.0 <= now.0.saturating_add(SKEW_MILLIS));
    let put_off = renewed.map(|time| Timestamp(time.0.saturating_add(ttl)));
    let fresh = Timestamp(now.0.saturating_add(ttl));
    let at = reservation.expires.unwrap_or(fresh).max(put_off.unwrap_or_default());
    if now >= at {
        Expiry::Due { idle_millis: ttl.saturating_add(now.millis_since(at)) }
    } else {
        Expiry::At(at)
    }
}

/// The write that ends it.
pub(super) fn expire(reservation: &ReservationView, place: &Placement, idle_millis: u64) -> Change {
    let seconds = idle_millis / 1000;
    Change::ExpireReservation {
        name: reservation.name.clone(),
        uid: reservation.uid.clone(),
        version: reservation.version.clone(),
        pool: place.pool.clone(),
        message: format!(
            "nothing on node {} has used it for {seconds} s; its space in pool {} is given back",
            place.node, place.pool
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{placed, reservation, view};
    use crate::ids::{NodeName, PoolName};
    use crate::view::NodeState;

    const TTL: u64 = 60_000;

    fn idle() -> (View, ReservationView) {
        let mut request = reservation("r", 10, 0);
        request.ttl_millis = Some(TTL);
        request.assignment = Some(placed("p", "a", 1));
        (view(&[("a", 100)]), request)
    }

    fn ask(view: &View, request: &ReservationView, now: u64) -> Expiry {
        judge(view, request, &placed("p", "a", 1), Timestamp(now))
    }

    fn node(view: &mut View) -> &mut NodeState {
        view.nodes.get_mut(&NodeName::from("a")).expect("there")
    }

    #[test]
    fn a47_an_idle_reference_ends_and_one_in_use_never_does() {
        let (mut view, mut request) = idle();
        assert_eq!(ask(&view, &request, 1000), Expiry::At(Timestamp(1000 + TTL)), "first seen idle");
        request.expires = Some(Timestamp(1000 + TTL));
        assert_eq!(ask(&view, &request, 1000 + TTL - 1), Expiry::At(Timestamp(1000 + TTL)));
        assert_eq!(ask(&view, &request, 1000 + TTL), Expiry::Due { idle_millis: TTL });
        let pool = node(&mut view).pools.get_mut(&PoolName::from("p")).expect("there");
        pool.in_use.insert(request.uid.clone());
        assert_eq!(ask(&view, &request, 100 * TTL), Expiry::Never, "a live slow holder");
        request.expires = None;
        node(&mut view).pools.values_mut().for_each(|pool| pool.in_use.clear());
        assert_eq!(ask(&view, &request, 100 * TTL), Expiry::At(Timestamp(101 * TTL)), "idle from now on");
    }

    #[test]
    fn nothing_ends_on_a_node_that_is_lost_or_has_not_reported() {
        let (mut view, mut request) = idle();
        request.expires = Some(Timestamp(0));
        node(&mut view).live = false;
        assert_eq!(ask(&view, &request, TTL), Expiry::Never);
        (node(&mut view).live, node(&mut view).reported) = (true, false);
        assert_eq!(ask(&view, &request, TTL), Expiry::Never);
        node(&mut view).reported = true;
        assert!(matches!(ask(&view, &request, TTL), Expiry::Due { .. }));
        view.nodes.clear();
        assert_eq!(ask(&view, &request, TTL), Expiry::Never);
    }

    #[test]
    fn a_renewal_puts_it_off_by_the_clock_of_this_century() {
        let (view, mut request) = idle();
        request.expires = Some(Timestamp(TTL));
        request.renewed = Some(Timestamp(TTL - 1));
        assert_eq!(ask(&view, &request, TTL), Expiry::At(Timestamp(2 * TTL - 1)));
        request.renewed = Some(Timestamp(TTL + SKEW_MILLIS + 1));
        assert!(matches!(ask(&view, &request, TTL), Expiry::Due { .. }), "a renewal of the far future");
    }

    #[test]
    fn only_the_leader_ends_and_what_has_no_end_has_none() {
        let (mut view, mut request) = idle();
        request.expires = Some(Timestamp(5));
        view.leader = false;
        assert_eq!(ask(&view, &request, 100 * TTL), Expiry::At(Timestamp(5)));
        view.leader = true;
        request.ttl_millis = None;
        assert_eq!(ask(&view, &request, 100 * TTL), Expiry::Never);
    }
}
