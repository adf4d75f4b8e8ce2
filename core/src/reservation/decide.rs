//! The next steps for one reservation: guard, promise, assign, report. Each pass returns only what the view justifies, at
//! most one ledger write, and can be cut off after any change: the next pass, by any operator, goes on from there.

use crate::change::{Change, ReservationReport};
use crate::ids::Uid;
use crate::ledger::Behind;
use crate::reason::Reason;
use crate::units::{Bytes, Generation, Timestamp};
use crate::view::{LedgerView, Placement, ReservationState, ReservationView, View, WhenFull};

use super::need::{Need, Unmet};
use super::place::{Candidate, Verdict, candidates, choose, explain, least_shortfall, promises_at, staged};
use super::queue::{Ahead, Policy, ahead};
use super::release;
use super::state::{Event, next};

/// How often a request that waits is looked at without any other cause, in milliseconds.
const LOOK_MILLIS: u64 = 10_000;
/// How soon it is looked at again after an earlier request that is about to be decided, in milliseconds.
const SOON_MILLIS: u64 = 200;

/// The next steps for the reservation with this UID.
pub fn decide(view: &View, uid: &Uid, now: Timestamp) -> Vec<Change> {
    let Some(reservation) = view.reservations.get(uid) else { return Vec::new() };
    if reservation.deleting {
        return release::decide(view, reservation);
    }
    if let Some(place) = &reservation.assignment {
        return assigned(view, reservation, place, now);
    }
    if reservation.state == ReservationState::Refused {
        return release::withdraw(view, reservation, None).into_iter().collect();
    }
    let need = match Need::of(view, reservation, now) {
        Ok(need) => need,
        Err(unmet) if unmet.for_ever => return vec![refuse(reservation, unmet.reason, unmet.message, None)],
        Err(unmet) => return unmet_for_now(view, reservation, unmet, now),
    };
    if view.ledgers_of(uid).next().is_some() {
        return resume(view, reservation, &need);
    }
    admit(view, reservation, &need, now)
}

/// Promised, but not assigned: an operator ended between the two. The first ledger that holds an entry gets it.
fn resume(view: &View, reservation: &ReservationView, need: &Need) -> Vec<Change> {
    let sound = view.ledgers_of(&reservation.uid).find(|ledger| view.behind(ledger).is_none());
    let entry = sound.and_then(|ledger| Some((ledger, ledger.promises.get(&reservation.uid)?)));
    if let Some((ledger, entry)) = entry
        && !need.is_met_by(entry, view.pools.get(&ledger.pool))
    {
        // Only a refusal, which excludes every assignment by its version, makes it safe to take the entry back.
        let needed = need.own_in(view.block_of(&ledger.pool)).charge.data;
        let promised = entry.charge.data;
        let message =
            format!("{promised} were promised before its template changed; {needed} are needed now");
        return vec![refuse(
            reservation,
            Reason::CapacityRefused,
            message,
            Some(needed.saturating_sub(promised)),
        )];
    }
    match sound {
        Some(ledger) => vec![assign(reservation, ledger, need, false)],
        None => vec![Change::RetryAfter { millis: LOOK_MILLIS }],
    }
}

fn assign(reservation: &ReservationView, ledger: &LedgerView, need: &Need, reused: bool) -> Change {
    let generation =
        ledger.promises.get(&reservation.uid).map_or(Generation::FIRST, |entry| entry.generation);
    Change::AssignReservation {
        name: reservation.name.clone(),
        version: reservation.version.clone(),
        placement: Placement { pool: ledger.pool.clone(), node: ledger.node.clone(), generation },
        image: need.image.as_ref().map(|image| image.assigned_at(&ledger.pool, &ledger.node)),
        reused,
    }
}

fn admit(view: &View, reservation: &ReservationView, need: &Need, now: Timestamp) -> Vec<Change> {
    let all = candidates(view, reservation, need);
    let ahead = ahead(view, reservation, &all, now);
    let is_open = |candidate: &Candidate| {
        let at = all.iter().position(|other| std::ptr::eq(other, candidate));
        !ahead.iter().any(|earlier| at.is_some_and(|at| earlier.places.contains(&at)))
    };
    let Some(best) = choose(&all, is_open) else { return wait(view, reservation, need, &all, &ahead, now) };
    if !reservation.has_finalizer {
        let (name, uid) = (reservation.name.clone(), reservation.uid.clone());
        return vec![Change::GuardReservation { name, uid }];
    }
    let Some(ledger) = view.ledgers.get(&(best.pool.clone(), best.node.clone())) else { return Vec::new() };
    promise(view, reservation, need, ledger)
}

/// The image's object first, because its UID is its promise's key; then everything in one ledger write.
fn promise(view: &View, reservation: &ReservationView, need: &Need, ledger: &LedgerView) -> Vec<Change> {
    if let Some(create) = create_image(view, need, ledger) {
        return vec![create];
    }
    let new = promises_at(view, ledger, &reservation.uid, need);
    let reused = need.image.is_some() && new.len() == 1;
    vec![ledger.with(&new), assign(reservation, ledger, need, reused)]
}

fn create_image(view: &View, need: &Need, ledger: &LedgerView) -> Option<Change> {
    let image = need.image.as_ref().filter(|_| staged(view, ledger, need).is_none())?;
    Some(Change::CreateImage {
        name: image.name_at(&ledger.pool, &ledger.node),
        image: image.image.clone(),
        pool: ledger.pool.clone(),
        node: ledger.node.clone(),
        store: image.store.clone(),
    })
}

/// A reservation that has its place: entries elsewhere go, a lost image comes back, and its state is told.
fn assigned(view: &View, reservation: &ReservationView, place: &Placement, now: Timestamp) -> Vec<Change> {
    if let Some(stray) = release::withdraw(view, reservation, Some(place)) {
        return vec![stray];
    }
    let prepared = reservation.prepared == Some(place.generation);
    if !prepared && let Some(changes) = restore_image(view, reservation, place, now) {
        return changes;
    }
    let Ok(mut state) = next(reservation.state, Event::Assign) else { return Vec::new() };
    if prepared && let Ok(ready) = next(state, Event::Prepare) {
        state = ready;
    }
    let (reason, message) = match view.ledger_at(place).and_then(|ledger| view.behind(ledger)) {
        // A revision alone is most often a view that lags.
        Some(behind @ (Behind::Lineage { .. } | Behind::Missing { .. })) if !prepared => {
            (Reason::LedgerBehind, format!("the node refuses new work: {behind}"))
        }
        _ if prepared => (Reason::Ready, format!("ready in pool {} on node {}", place.pool, place.node)),
        _ if view.is_lost(&place.node) => (
            Reason::NodeLost,
            format!("promised in pool {}, but node {} does not report", place.pool, place.node),
        ),
        _ => (Reason::Promised, format!("promised in pool {} on node {}", place.pool, place.node)),
    };
    vec![report(reservation, ReservationReport { state, reason, message, queue: None, shortfall: None })]
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
    if image.deleting {
        return Some(vec![Change::RetryAfter { millis: SOON_MILLIS }]);
    }
    if ledger.promises.contains_key(&image.uid) {
        return None;
    }
    let new = [(image.uid.clone(), image.promise(view.block_of(&ledger.pool)))];
    crate::budget::fits(ledger, &new).ok()?;
    Some(vec![ledger.with(&new)])
}

/// It cannot be told yet what is needed: it waits, but not for space.
fn unmet_for_now(view: &View, reservation: &ReservationView, unmet: Unmet, now: Timestamp) -> Vec<Change> {
    if let Some(late) = too_late(view, reservation, &unmet.message, None, now) {
        return vec![late];
    }
    let Ok(state) = next(reservation.state, Event::Wait) else { return Vec::new() };
    let Unmet { reason, message, .. } = unmet;
    let told =
        report(reservation, ReservationReport { state, reason, message, queue: None, shortfall: None });
    vec![told, Change::RetryAfter { millis: SOON_MILLIS * 5 }]
}

fn wait(
    view: &View,
    reservation: &ReservationView,
    need: &Need,
    all: &[Candidate],
    ahead: &[Ahead],
    now: Timestamp,
) -> Vec<Change> {
    let policy = Policy::of(view, reservation);
    let shortfall = least_shortfall(all);
    let too_large = all.iter().all(|candidate| matches!(candidate.verdict, Verdict::TooLarge(_)));
    if !all.is_empty() && too_large {
        let message = format!("{} asked for: {}", need.bytes(), explain(all));
        return vec![refuse(reservation, Reason::LargerThanPool, message, shortfall)];
    }
    let blocked = |candidate: &Candidate| matches!(candidate.verdict, Verdict::Fits { .. });
    let decided = all.iter().all(|candidate| candidate.verdict.is_about_space() || blocked(candidate));
    if policy.is_some_and(|policy| policy.when_full == WhenFull::Reject) && decided && !all.is_empty() {
        if all.iter().any(blocked) && !ahead.iter().all(|earlier| earlier.queued) {
            return vec![Change::RetryAfter { millis: SOON_MILLIS }];
        }
        let message = format!("{} asked for: {}", need.bytes(), explain(all));
        let shortfall = shortfall.or_else(|| Some(behind_others(need, all, ahead)));
        return vec![refuse(reservation, Reason::CapacityRefused, message, shortfall)];
    }
    if let Some(late) = too_late(view, reservation, &explain(all), shortfall, now) {
        return vec![late];
    }
    let length = u32::try_from(ahead.len()).unwrap_or(u32::MAX);
    if let Some(policy) = policy.filter(|policy| length >= policy.length)
        && reservation.state != ReservationState::Queued
    {
        let message = format!("{length} requests wait already, of {} that may", policy.length);
        return vec![refuse(reservation, Reason::QueueFull, message, shortfall)];
    }
    let Ok(state) = next(reservation.state, Event::Wait) else { return Vec::new() };
    let (reason, message) = why(view, reservation, need, all);
    let queue = Some((length.saturating_add(1), ahead.iter().map(|earlier| earlier.bytes).sum()));
    let told = report(reservation, ReservationReport { state, reason, message, queue, shortfall });
    vec![told, Change::RetryAfter { millis: until_late(policy, reservation, now).min(LOOK_MILLIS) }]
}

/// What is missing where there is space, but for requests that came earlier.
fn behind_others(need: &Need, all: &[Candidate], ahead: &[Ahead]) -> Bytes {
    let at_each = all.iter().enumerate().filter_map(|(at, candidate)| {
        let Verdict::Fits { free, .. } = candidate.verdict else { return None };
        let before = ahead.iter().filter(|earlier| earlier.places.contains(&at)).map(|earlier| earlier.bytes);
        Some(before.sum::<Bytes>().saturating_add(need.bytes()).saturating_sub(free))
    });
    at_each.min().unwrap_or_default()
}

/// The reason that is nearest to being solved, and what speaks against each place.
fn why(view: &View, reservation: &ReservationView, need: &Need, all: &[Candidate]) -> (Reason, String) {
    if !view.pools.values().any(|pool| reservation.pools.allows(pool)) {
        return (Reason::NoMatchingPool, "no pool has this name, or these labels".to_owned());
    }
    if all.is_empty() {
        return (Reason::NoMatchingNode, "no node carries a pool that may be used".to_owned());
    }
    let order = [
        Reason::Queued,
        Reason::InsufficientCapacity,
        Reason::Releasing,
        Reason::LedgerFull,
        Reason::DataAlmostFull,
        Reason::MetadataAlmostFull,
        Reason::LedgerBehind,
        Reason::NoMatchingNode,
        Reason::NodeLost,
    ];
    let reasons: Vec<Reason> = all.iter().map(|candidate| candidate.verdict.reason()).collect();
    let first = order.into_iter().find(|reason| reasons.contains(reason)).unwrap_or(reasons[0]);
    (first, format!("{} asked for: {}", need.bytes(), explain(all)))
}

fn until_late(policy: Option<Policy>, reservation: &ReservationView, now: Timestamp) -> u64 {
    let (Some(policy), Some(since)) = (policy, reservation.queued_since) else { return LOOK_MILLIS };
    policy.millis.saturating_sub(now.millis_since(since)).max(1)
}

/// The refusal of a request that has waited as long as its pools allow.
fn too_late(
    view: &View,
    reservation: &ReservationView,
    why: &str,
    shortfall: Option<Bytes>,
    now: Timestamp,
) -> Option<Change> {
    let policy = Policy::of(view, reservation)?;
    let since = reservation.queued_since.filter(|_| reservation.state == ReservationState::Queued)?;
    let waited = now.millis_since(since);
    let message = || format!("waited {} s of {} s: {why}", waited / 1000, policy.millis / 1000);
    (waited >= policy.millis).then(|| refuse(reservation, Reason::QueueTimeout, message(), shortfall))
}

fn refuse(
    reservation: &ReservationView,
    reason: Reason,
    message: String,
    shortfall: Option<Bytes>,
) -> Change {
    let state = ReservationState::Refused;
    report(reservation, ReservationReport { state, reason, message, queue: None, shortfall })
}

pub(super) fn report(reservation: &ReservationView, report: ReservationReport) -> Change {
    Change::ReportReservation {
        name: reservation.name.clone(),
        uid: reservation.uid.clone(),
        version: reservation.version.clone(),
        report,
    }
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
