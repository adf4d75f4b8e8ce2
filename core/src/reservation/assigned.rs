//! The next steps for a reservation that has its place: it is prepared there, ready, and expires; what it was promised may have
//! been lost with a ledger, and is promised again.

use crate::change::{Change, ReservationReport};
use crate::ledger::Behind;
use crate::reason::Reason;
use crate::retire::is_leaving;
use crate::units::Timestamp;
use crate::view::{Placement, ReservationState, ReservationView, View};

use super::decide::{LOOK_MILLIS, SOON_MILLIS, create_image, report};
use super::expiry::{self, Expiry};
use super::grow::{self, Growth};
use super::held;
use super::need::Need;
use super::place::staged;
use super::release;
use super::room;
use super::state::{Event, next};

/// A reservation that has its place: entries elsewhere go, a lost image comes back, and its state is told.
pub(super) fn decide(
    view: &View,
    reservation: &ReservationView,
    place: &Placement,
    now: Timestamp,
) -> Vec<Change> {
    if let Some(stray) = release::withdraw(view, reservation, Some(place)) {
        return vec![stray];
    }
    if let Some(changes) = held::promise_again(view, reservation, place, now) {
        return changes;
    }
    let growth = grow::decide(view, reservation, place, now);
    if let Some(Growth::Promise(larger)) = growth {
        return vec![*larger];
    }
    let prepared = reservation.prepared == Some(place.generation);
    // While its pool is not open, nothing is told of it: what was prepared there still is.
    if !prepared
        && view.told_of(place).is_some()
        && let Some(changes) = restore_image(view, reservation, place, now)
    {
        return changes;
    }
    let Ok(mut state) = next(reservation.state, Event::Assign) else { return Vec::new() };
    // One event at a time, as the API server takes it, also where the node was faster than this report.
    if prepared
        && state == reservation.state
        && let Ok(ready) = next(state, Event::Prepare)
    {
        state = ready;
    }
    let mut expires = None;
    if state == ReservationState::Ready {
        match expiry::judge(view, reservation, place, now) {
            Expiry::Never => {}
            Expiry::At(time) => expires = Some(time),
            Expiry::Due { idle_millis } => return vec![expiry::expire(reservation, place, idle_millis)],
        }
    }
    let (reason, message) = where_it_stands(view, reservation, place, state, now);
    if growth == Some(Growth::Leaders) {
        return vec![Change::RetryAfter { millis: LOOK_MILLIS }];
    }
    let told = ReservationReport { expires, ..ReservationReport::new(state, reason, message) };
    let look = expires.map(|time| time.millis_since(now).max(SOON_MILLIS));
    if let Some(Growth::Refused { reason, message, shortfall, removals }) = growth {
        let told = ReservationReport { reason, message, shortfall, ..told };
        let again = if reason == Reason::Reclaiming { room::LOOK_MILLIS } else { LOOK_MILLIS };
        let again = Change::RetryAfter { millis: look.map_or(again, |look| look.min(again)) };
        return [report(reservation, told), again].into_iter().chain(removals).collect();
    }
    let look = look.map(|millis| Change::RetryAfter { millis });
    std::iter::once(report(reservation, told)).chain(look).collect()
}

/// What is said of a promise beside its state.
fn where_it_stands(
    view: &View,
    reservation: &ReservationView,
    place: &Placement,
    state: ReservationState,
    now: Timestamp,
) -> (Reason, String) {
    let prepared = reservation.prepared == Some(place.generation);
    match view.ledger_at(place).and_then(|ledger| view.behind(ledger)) {
        // A revision alone is most often a view that lags.
        Some(behind @ (Behind::Lineage { .. } | Behind::Missing { .. })) if !prepared => {
            (Reason::LedgerBehind, format!("the node refuses new work: {behind}"))
        }
        None if !prepared
            && view.told_of(place).is_some()
            && let Some(unmet) = without_image(view, reservation, place, now) =>
        {
            unmet
        }
        _ if state == ReservationState::Ready => {
            (Reason::Ready, format!("ready in pool {} on node {}", place.pool, place.node))
        }
        _ if view.is_lost(&place.node) => (
            Reason::NodeLost,
            format!("promised in pool {}, but node {} does not report", place.pool, place.node),
        ),
        _ => promised(place),
    }
}

/// What is said of a reservation that has its place and nothing more: it is written together with that.
pub fn promised(place: &Placement) -> (Reason, String) {
    (Reason::Promised, format!("promised in pool {} on node {}", place.pool, place.node))
}

/// The image of a reservation that is not ready yet may have been swept by an operator that did not see the reservation:
/// it is made and promised again. `None` if there is nothing to do, or nothing that can be done.
fn restore_image(
    view: &View,
    reservation: &ReservationView,
    place: &Placement,
    now: Timestamp,
) -> Option<Vec<Change>> {
    let assigned = reservation.assigned_image.as_ref()?;
    let ledger = view.ledger_at(place).filter(|ledger| view.behind(ledger).is_none())?;
    let need = Need::of(view, reservation, now).ok()?;
    if need.image.as_ref()?.image.digest != assigned.digest || !ledger.promises.contains_key(&reservation.uid)
    {
        return None;
    }
    if let Some(create) = create_image(view, &need, ledger) {
        return Some(vec![create]);
    }
    let image = staged(view, ledger, &need)?;
    if is_leaving(ledger, image) {
        return Some(vec![Change::RetryAfter { millis: SOON_MILLIS }]);
    }
    if ledger.promises.contains_key(&image.uid) {
        return None;
    }
    let new = [(image.uid.clone(), image.promise(view.block_of(&ledger.pool)))];
    let Err(shortfall) = crate::budget::fits(ledger, &new) else { return Some(vec![ledger.with(&new)]) };
    if let Some(changes) = room::for_lost(view, reservation, ledger, &new, now) {
        return Some(changes);
    }
    let Placement { pool, node, .. } = place;
    let message =
        format!("its image was lost with the ledger of pool {pool} on node {node}, which {shortfall}");
    let told = ReservationReport::new(reservation.state, Reason::InsufficientCapacity, message);
    Some(vec![report(reservation, told), Change::RetryAfter { millis: LOOK_MILLIS }])
}

/// Why the image of a reservation that is not ready is not at its place, and cannot be made again either: only a person can
/// help, who brings its template back or deletes the reservation. `None` if it is there, or can be made.
fn without_image(
    view: &View,
    reservation: &ReservationView,
    place: &Placement,
    now: Timestamp,
) -> Option<(Reason, String)> {
    let assigned = reservation.assigned_image.as_ref()?;
    let ledger = view.ledger_at(place)?;
    let image = view.images.get(&assigned.staged_image);
    if image.is_some_and(|image| ledger.promises.contains_key(&image.uid)) {
        return None;
    }
    let why = match Need::of(view, reservation, now) {
        Err(unmet) => (unmet.reason, unmet.message),
        Ok(need) if need.image.as_ref().is_some_and(|image| image.image.digest == assigned.digest) => {
            return None;
        }
        Ok(_) => (Reason::TemplateNotFound, "its template has another image now".to_owned()),
    };
    let (pool, node) = (&place.pool, &place.node);
    Some((why.0, format!("its image is not in pool {pool} on node {node} any more: {}", why.1)))
}
