//! Room for what would wait or be refused otherwise: images that nothing needs go first. That helps where too much is promised,
//! and where a kernel pool is full and gains by it; it helps no kernel pool that is damaged.

use crate::change::{Change, ReservationReport};
use crate::ids::Uid;
use crate::ledger::Promise;
use crate::reason::Reason;
use crate::reclaim::{Cause, Room, for_shortfall};
use crate::retire::retire;
use crate::units::{Bytes, Timestamp};
use crate::view::{LedgerView, ReservationState, ReservationView, View};

use super::decide::report;
use super::need::Need;
use super::place::{Candidate, promises_at};
use super::queue::{Ahead, Policy};
use super::state::{Event, next};

/// How soon a request that waits for removals is looked at without any other cause, in milliseconds.
pub(super) const LOOK_MILLIS: u64 = 2000;
/// How many images a message names.
const NAMED: usize = 4;

/// The removals that make room for the request at the place that loses fewest images, then fewest bytes, and what is said
/// of it meanwhile. `None` if no place that nobody waits for already can be made large enough, or if it has waited for that
/// as long as its pools allow. Only the leader retires; the others say the same and leave it to the leader.
pub(super) fn make(
    view: &View,
    reservation: &ReservationView,
    need: &Need,
    all: &[Candidate],
    ahead: &[Ahead],
    now: Timestamp,
) -> Option<Vec<Change>> {
    let (ledger, room) = best(view, reservation, need, all, ahead, now)?;
    if Policy::exceeded(view, reservation, now).is_some() {
        return None;
    }
    let state = next(reservation.state, Event::Wait).unwrap_or(ReservationState::Queued);
    let told = ReservationReport {
        queue: Some((1, Bytes::ZERO)),
        ..ReservationReport::new(state, Reason::Reclaiming, message(ledger, &room, need.bytes()))
    };
    let told = [report(reservation, told), Change::RetryAfter { millis: LOOK_MILLIS }];
    Some(told.into_iter().chain(removals(view, ledger, &room)).collect())
}

fn removals(view: &View, ledger: &LedgerView, room: &Room<'_>) -> Vec<Change> {
    if view.sweeps() { retire(view, ledger, &room.next, Cause::Shortfall) } else { Vec::new() }
}

/// The removals that make room in this ledger for what has its place there already, and what is said of them. It stands in no
/// line. `None` if they would not be enough.
pub(super) fn in_ledger(
    view: &View,
    ledger: &LedgerView,
    new: &[(Uid, Promise)],
    now: Timestamp,
) -> Option<(String, Vec<Change>)> {
    let room = for_shortfall(view, ledger, new, now)?;
    let asked = new.iter().map(|(_, promise)| promise.charge.data).sum();
    Some((message(ledger, &room, asked), removals(view, ledger, &room)))
}

/// The same for a promise that was lost with its ledger: all that is to be done now.
pub(super) fn for_lost(
    view: &View,
    reservation: &ReservationView,
    ledger: &LedgerView,
    new: &[(Uid, Promise)],
    now: Timestamp,
) -> Option<Vec<Change>> {
    let (message, removals) = in_ledger(view, ledger, new, now)?;
    let told = ReservationReport::new(reservation.state, Reason::Reclaiming, message);
    let told = [report(reservation, told), Change::RetryAfter { millis: LOOK_MILLIS }];
    Some(told.into_iter().chain(removals).collect())
}

/// The place that loses fewest images, then fewest bytes, to make room for the request, and what it loses. `None` if no place
/// that nobody waits for already can be made large enough.
pub(super) fn best<'v>(
    view: &'v View,
    reservation: &ReservationView,
    need: &Need,
    all: &[Candidate],
    ahead: &[Ahead],
    now: Timestamp,
) -> Option<(&'v LedgerView, Room<'v>)> {
    let waited_for = |at: usize| ahead.iter().any(|earlier| earlier.places.contains(&at));
    let places = all
        .iter()
        .enumerate()
        .filter(|(at, candidate)| candidate.verdict.is_about_room() && !waited_for(*at));
    let rooms = places.filter_map(|(_, candidate)| {
        let ledger = view.ledgers.get(&(candidate.pool.clone(), candidate.node.clone()))?;
        let new: Vec<(Uid, Promise)> = promises_at(view, ledger, &reservation.uid, need);
        Some((ledger, for_shortfall(view, ledger, &new, now)?))
    });
    rooms.min_by_key(|(ledger, room)| (room.next.len(), room.bytes(ledger), &ledger.name))
}

pub(super) fn message(ledger: &LedgerView, room: &Room<'_>, asked: Bytes) -> String {
    let images: Vec<&str> = room.names().collect();
    let more = images.len().saturating_sub(NAMED);
    let named = images[..images.len().min(NAMED)].join(", ");
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!(
        "{asked} asked for: {} of images that nothing refers to are removed first in pool {} on node {}: {named}{more}",
        room.bytes(ledger),
        ledger.pool,
        ledger.node,
    )
}
