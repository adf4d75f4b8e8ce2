//! The next steps for one reservation: guard, promise, assign, report. Each pass returns only what the view justifies, at
//! most one ledger write, and can be cut off after any change: the next pass, by any operator, goes on from there.

use crate::change::{Change, Considered, ReservationReport};
use crate::ids::Uid;
use crate::reason::Reason;
use crate::units::{Bytes, Generation, Timestamp};
use crate::view::{LedgerView, Placement, ReservationState, ReservationView, View, WhenFull};

use super::abandoned;
use super::assigned;
use super::fit;
use super::held;
use super::need::{Need, Unmet};
use super::place::{
    Candidate, Verdict, candidates, choose, consider, explain, least_shortfall, promises_at, staged,
};
use super::queue::{Ahead, Backlog, Policy};
use super::release;
use super::state::{Event, next};
use super::tenant;

/// How often a request that waits is looked at without any other cause, in milliseconds.
pub(super) const LOOK_MILLIS: u64 = 10_000;
/// How soon a request is looked at again that waits until every node has been heard, in milliseconds.
pub(super) const HEARD_MILLIS: u64 = 1000;
/// How soon it is looked at again after an earlier request that is about to be decided, in milliseconds.
pub(super) const SOON_MILLIS: u64 = 200;

/// The next steps for the reservation with this UID.
pub fn decide(view: &View, uid: &Uid, now: Timestamp) -> Vec<Change> {
    decide_among(view, None, uid, now)
}

/// The next steps for the reservation with this UID, among those that wait in this order. Without one, it is made anew
/// where it is needed, which costs a pass over all that wait.
pub fn decide_among(view: &View, backlog: Option<&Backlog>, uid: &Uid, now: Timestamp) -> Vec<Change> {
    let Some(reservation) = view.reservations.get(uid) else { return Vec::new() };
    if view.unreadable_object(uid).is_some() || view.elsewhere.contains(uid) {
        return Vec::new(); // what is shown of it is not what it is, or not all that there is
    }
    if reservation.deleting {
        return release::decide(view, reservation);
    }
    if let Some(lost) = crate::lost::give_up(view, reservation) {
        return vec![lost];
    }
    if let Some(changes) = abandoned::sweep(view, reservation, now) {
        return changes;
    }
    if let Some(place) = &reservation.assignment {
        return assigned::decide(view, reservation, place, now);
    }
    if let Some(changes) = held::adopt(view, reservation, now) {
        return changes;
    }
    if reservation.state == ReservationState::Refused {
        return release::withdraw(view, reservation, None).into_iter().collect();
    }
    if reservation.dry_run && reservation.invalid.is_none() {
        return fit::dry_run(view, reservation, now);
    }
    if view.unheard && reservation.invalid.is_none() {
        // A node that has not been heard yet may hold its bytes since before the API server went back in time.
        return vec![Change::RetryAfter { millis: HEARD_MILLIS }];
    }
    let need = match Need::of(view, reservation, now) {
        Ok(need) => need,
        Err(unmet) if unmet.for_ever => return vec![refuse(reservation, unmet.reason, unmet.message, None)],
        Err(unmet) => return unmet_for_now(view, reservation, unmet, now),
    };
    if view.ledgers_of(uid).next().is_some() {
        return resume(view, reservation, &need);
    }
    match backlog {
        Some(backlog) => admit(view, reservation, &need, backlog, now),
        None => admit(view, reservation, &need, &Backlog::around(view, reservation, now), now),
    }
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
        Some(_) if !reservation.has_finalizer => {
            vec![Change::GuardReservation { name: reservation.name.clone(), uid: reservation.uid.clone() }]
        }
        Some(ledger) => {
            let considered = Considered {
                pool: ledger.pool.clone(),
                node: ledger.node.clone(),
                reason: Reason::Promised,
                message: "it was promised here before it was assigned".to_owned(),
                shortfall: None,
                chosen: true,
            };
            vec![assign(reservation, ledger, need, false, vec![considered])]
        }
        None => vec![Change::RetryAfter { millis: LOOK_MILLIS }],
    }
}

fn assign(
    reservation: &ReservationView,
    ledger: &LedgerView,
    need: &Need,
    reused: bool,
    considered: Vec<Considered>,
) -> Change {
    let generation =
        ledger.promises.get(&reservation.uid).map_or(Generation::FIRST, |entry| entry.generation);
    Change::AssignReservation {
        name: reservation.name.clone(),
        version: reservation.version.clone(),
        placement: Placement { pool: ledger.pool.clone(), node: ledger.node.clone(), generation },
        image: need.image.as_ref().map(|image| image.assigned_at(&ledger.pool, &ledger.node)),
        reused,
        considered,
    }
}

fn admit(
    view: &View,
    reservation: &ReservationView,
    need: &Need,
    backlog: &Backlog,
    now: Timestamp,
) -> Vec<Change> {
    let all = candidates(view, reservation, need);
    let ahead = backlog.ahead(view, reservation, need, &all);
    let is_open = |at: usize| !ahead.iter().any(|earlier| earlier.places.contains(&at));
    let Some(chosen) = choose(&all, is_open) else {
        let line = Line { all: &all, ahead: &ahead, length: backlog.length(view, reservation) };
        return wait(view, reservation, need, &line, now);
    };
    let best = &all[chosen];
    let limited = view
        .pools
        .get(&best.pool)
        .is_some_and(|pool| tenant::is_limited(view, pool, &reservation.claim_namespace));
    if limited && !view.leader {
        return vec![Change::RetryAfter { millis: LOOK_MILLIS }];
    }
    if !reservation.has_finalizer {
        let (name, uid) = (reservation.name.clone(), reservation.uid.clone());
        return vec![Change::GuardReservation { name, uid }];
    }
    let Some(ledger) = view.ledgers.get(&(best.pool.clone(), best.node.clone())) else { return Vec::new() };
    promise(view, reservation, need, ledger, consider(&all, Some(chosen)))
}

/// The image's object first, because its UID is its promise's key; then everything in one ledger write.
fn promise(
    view: &View,
    reservation: &ReservationView,
    need: &Need,
    ledger: &LedgerView,
    considered: Vec<Considered>,
) -> Vec<Change> {
    if let Some(create) = create_image(view, need, ledger) {
        return vec![create];
    }
    let new = promises_at(view, ledger, &reservation.uid, need);
    let reused = need.image.is_some() && new.len() == 1;
    vec![ledger.with(&new), assign(reservation, ledger, need, reused, considered)]
}

pub(super) fn create_image(view: &View, need: &Need, ledger: &LedgerView) -> Option<Change> {
    let image = need.image.as_ref().filter(|_| staged(view, ledger, need).is_none())?;
    Some(Change::CreateImage {
        name: image.name_at(&ledger.pool, &ledger.node),
        image: image.image.clone(),
        pool: ledger.pool.clone(),
        node: ledger.node.clone(),
        store: image.store.clone(),
    })
}

/// It cannot be told yet what is needed: it waits, but not for space.
fn unmet_for_now(view: &View, reservation: &ReservationView, unmet: Unmet, now: Timestamp) -> Vec<Change> {
    if let Some(late) = too_late(view, reservation, &unmet.message, None, now) {
        return vec![late];
    }
    let Ok(state) = next(reservation.state, Event::Wait) else { return Vec::new() };
    let Unmet { reason, message, .. } = unmet;
    let told = report(reservation, ReservationReport::new(state, reason, message));
    vec![told, Change::RetryAfter { millis: SOON_MILLIS * 5 }]
}

/// The places that a request could go to, and the line that it stands in.
struct Line<'l> {
    all: &'l [Candidate],
    ahead: &'l [Ahead],
    /// How many wait already.
    length: u32,
}

fn wait(
    view: &View,
    reservation: &ReservationView,
    need: &Need,
    line: &Line<'_>,
    now: Timestamp,
) -> Vec<Change> {
    let Line { all, ahead, length } = *line;
    let policy = Policy::of(view, reservation);
    if let Some(changes) = super::room::make(view, reservation, need, all, ahead, now) {
        return changes;
    }
    if let Some(refused) = refused(view, reservation, need, line) {
        return vec![refused];
    }
    let shortfall = least_shortfall(all);
    let some_fit = all.iter().any(|candidate| matches!(candidate.verdict, Verdict::Fits { .. }));
    if policy.is_some_and(|policy| policy.when_full == WhenFull::Reject) && is_decided(all) && some_fit {
        // Refused above as soon as those before it are known to wait.
        return vec![Change::RetryAfter { millis: SOON_MILLIS }];
    }
    if let Some(late) = too_late(view, reservation, &explain(all), shortfall, now) {
        return vec![late];
    }
    if let Some(policy) = policy.filter(|policy| length >= policy.length)
        && reservation.state != ReservationState::Queued
    {
        let message = format!("{length} requests wait already, of {} that may", policy.length);
        return vec![refuse(reservation, Reason::QueueFull, message, shortfall)];
    }
    let Ok(state) = next(reservation.state, Event::Wait) else { return Vec::new() };
    let (reason, message) = why(view, reservation, need, all);
    let position = u32::try_from(ahead.len()).unwrap_or(u32::MAX).saturating_add(1);
    let told = ReservationReport {
        queue: Some((position, ahead.iter().map(|earlier| earlier.bytes).sum())),
        shortfall,
        considered: consider(all, None),
        ..ReservationReport::new(state, reason, message)
    };
    let again = Change::RetryAfter { millis: until_late(policy, reservation, now).min(LOOK_MILLIS) };
    vec![report(reservation, told), again]
}

/// True if no place may still turn out to be free for a request that does not wait.
fn is_decided(all: &[Candidate]) -> bool {
    !all.is_empty()
        && all
            .iter()
            .all(|candidate| candidate.verdict.refuses() || matches!(candidate.verdict, Verdict::Fits { .. }))
}

/// The refusal of what no pool could ever hold, and of what may not wait and would have to.
fn refused(view: &View, reservation: &ReservationView, need: &Need, line: &Line<'_>) -> Option<Change> {
    let Line { all, ahead, .. } = *line;
    let blocked = |candidate: &Candidate| matches!(candidate.verdict, Verdict::Fits { .. });
    let too_large = all.iter().all(|candidate| matches!(candidate.verdict, Verdict::TooLarge(_)));
    let rejects = Policy::of(view, reservation).is_some_and(|policy| policy.when_full == WhenFull::Reject);
    let reason = if !all.is_empty() && too_large {
        Reason::LargerThanPool
    } else if rejects && is_decided(all) && (!all.iter().any(blocked) || ahead.iter().all(|a| a.queued)) {
        Reason::CapacityRefused
    } else {
        return None;
    };
    let shortfall =
        least_shortfall(all).or_else(|| all.iter().any(blocked).then(|| behind_others(need, all, ahead)));
    let message = format!("{} asked for: {}", need.bytes(), explain(all));
    let state = ReservationState::Refused;
    let considered = consider(all, None);
    let told = ReservationReport { shortfall, considered, ..ReservationReport::new(state, reason, message) };
    Some(report(reservation, told))
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
        Reason::TenantLimit,
        Reason::ObjectUnreadable,
        Reason::Releasing,
        Reason::LedgerFull,
        Reason::DataAlmostFull,
        Reason::MetadataAlmostFull,
        Reason::Cordoned,
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
    let (waited, most) = Policy::exceeded(view, reservation, now)?;
    let message = format!("waited {} s of {} s: {why}", waited / 1000, most / 1000);
    Some(refuse(reservation, Reason::QueueTimeout, message, shortfall))
}

fn refuse(
    reservation: &ReservationView,
    reason: Reason,
    message: String,
    shortfall: Option<Bytes>,
) -> Change {
    let state = ReservationState::Refused;
    report(reservation, ReservationReport { shortfall, ..ReservationReport::new(state, reason, message) })
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
