//! The end of a reference that nothing uses any more. The *reference* ends: what it refers to is given back as with any
//! deletion, and the node itself gives nothing back that is in use.
//!
//! When it ends stands in the reservation's status, so that no operator has to remember since when it is idle: it is set
//! when the reservation is first seen idle, taken back when it is seen in use, and put off by a renewal and by every use that
//! its node has seen end, also by one that no operator has seen.

use crate::change::Change;
use crate::units::Timestamp;
use crate::view::{Placement, ReservationView, View};

/// How far in the future a renewal or a use may lie, by a clock that is not ours, in milliseconds. A clock that is further
/// ahead puts nothing off; one that is behind puts the end off by so much less.
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
    if !view.sweeps() {
        return reservation.expires.map_or(Expiry::Never, Expiry::At);
    }
    let Some(report) = view.told_of(place) else { return Expiry::Never };
    if report.in_use.contains(&reservation.uid) {
        return Expiry::Never;
    }
    let told = [reservation.renewed, reservation.last_used].into_iter().flatten();
    let needed = told.filter(|time| time.0 <= now.0.saturating_add(SKEW_MILLIS)).max();
    let put_off = needed.map(|time| Timestamp(time.0.saturating_add(ttl)));
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
    fn a9_an_idle_reference_ends_and_one_in_use_never_does() {
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
    fn a9_a_use_that_no_operator_has_seen_puts_the_end_off() {
        let (view, mut request) = idle();
        request.expires = Some(Timestamp(TTL));
        request.last_used = Some(Timestamp(10 * TTL - 1));
        assert_eq!(ask(&view, &request, 10 * TTL), Expiry::At(Timestamp(11 * TTL - 1)));
        request.renewed = Some(Timestamp(10 * TTL));
        assert_eq!(ask(&view, &request, 10 * TTL), Expiry::At(Timestamp(11 * TTL)), "the later one counts");
        request.renewed = Some(Timestamp(1000 * TTL));
        assert_eq!(ask(&view, &request, 10 * TTL), Expiry::At(Timestamp(11 * TTL - 1)), "each by itself");
        request.last_used = Some(Timestamp(10 * TTL + SKEW_MILLIS + 1));
        assert!(matches!(ask(&view, &request, 10 * TTL), Expiry::Due { .. }), "a clock of the far future");
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
