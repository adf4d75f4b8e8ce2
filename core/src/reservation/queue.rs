//! Who waits, in which order.
//!
//! Each pool has one order, in which nobody takes a place that an earlier one waits for, so that a large request is not
//! starved by small ones:
//! 1. who has waited longer than a quarter of the pool's `maxQueueTime`, in order of arrival;
//! 2. the others by priority, the highest first; among equals by turns of namespaces: what would be a namespace's first
//!    reservation in the pool comes before what would be another's second, whatever it holds there counted; then in order
//!    of arrival.
//!
//! The first rule bounds how long anybody can be overtaken. A request that waits for a limit of its own namespace, or cannot be
//! read, keeps nobody waiting. One that takes no room at a place waits for nobody there.

use std::collections::{BTreeMap, BTreeSet};

use crate::budget::fits_empty;
use crate::ids::{NodeName, PoolName, Uid};
use crate::ledger::{Charge, MAX_PROMISES};
use crate::units::{Bytes, Timestamp};
use crate::view::{LedgerView, PoolView, ReservationState, ReservationView, Service, View, WhenFull};

use super::need::Need;
use super::place::{Candidate, everything, may_use, promises_at, stopped};
use super::tenant::{self, Holdings};

/// The part of a pool's `maxQueueTime` after which a request is overtaken no more.
const OVERDUE_PART: u64 = 4;
/// How many entries of a ledger one request needs at most: its own, and its image's.
const ENTRIES: usize = 2;

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
    may_wait(reservation) && view.ledgers_of(&reservation.uid).next().is_none()
}

fn may_wait(reservation: &ReservationView) -> bool {
    !reservation.deleting
        && !reservation.dry_run
        && reservation.assignment.is_none()
        && reservation.state != ReservationState::Refused
        && reservation.invalid.is_none()
}

/// The order of those that wait, for each pool: what it was when it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    pools: BTreeMap<PoolName, Vec<Waiting>>,
}

/// One that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Waiting {
    uid: Uid,
    need: Need,
    queued: bool,
    /// True if it waits for a limit of its own namespace, or until that can be judged.
    limited: bool,
    /// True if nobody overtakes it any more.
    overdue: bool,
}

/// Sorts before what comes later: overdue, priority, turn, arrival, UID.
type Rank = (bool, i32, u32, Timestamp, Uid);

impl Backlog {
    /// Of all pools. Costs a pass over all reservations, and a sort of those that wait.
    pub fn of(view: &View, now: Timestamp) -> Self {
        Self::among(view, now, None, |_| true)
    }

    /// Of the pools that `request` may go to, with the request in its place even if the view lacks it.
    pub fn around(view: &View, request: &ReservationView, now: Timestamp) -> Self {
        Self::among(view, now, Some(request), |pool| request.pools.allows(pool))
    }

    fn among(
        view: &View,
        now: Timestamp,
        request: Option<&ReservationView>,
        concerns: impl Fn(&PoolView) -> bool,
    ) -> Self {
        let promised: BTreeSet<&Uid> =
            view.ledgers.values().flat_map(|ledger| ledger.promises.keys()).collect();
        let others = view.reservations.values().filter(|other| {
            may_wait(other)
                && view.unreadable_object(&other.uid).is_none()
                && !promised.contains(&other.uid)
                && request.is_none_or(|request| request.uid != other.uid)
        });
        let waiting: Vec<(&ReservationView, Need)> = others
            .chain(request)
            .filter_map(|other| Some((other, Need::of(view, other, now).ok()?)))
            .collect();
        let pools = view.pools.values().filter(|pool| concerns(pool));
        Self { pools: pools.map(|pool| (pool.name.clone(), ordered(view, pool, &waiting, now))).collect() }
    }

    /// Everything that waits, pool after pool, each in its order.
    pub(super) fn order(&self) -> impl Iterator<Item = &Uid> {
        self.pools.values().flatten().map(|waiting| &waiting.uid)
    }

    /// It is known now that this one waits.
    pub(super) fn waits(&mut self, uid: &Uid) {
        let known = self.pools.values_mut().flatten().filter(|waiting| waiting.uid == *uid);
        known.for_each(|waiting| waiting.queued = true);
    }

    /// Takes one out that was promised its place in the only pool that it waited for. False, and nothing changed, if the order
    /// of the others is another one by that: then it has to be made anew. It is the same after the first of a line, because
    /// what its namespace holds more is what waits less: only not where limits count, nor after one that took no turn.
    pub(super) fn advance(&mut self, view: &View, uid: &Uid) -> bool {
        let mut lines = self.pools.iter_mut().filter(|(_, line)| line.iter().any(|one| one.uid == *uid));
        let (Some((pool, line)), None) = (lines.next(), lines.next()) else { return false };
        let limited = view.pools.get(pool).is_none_or(|pool| !pool.tenant_limits.is_empty());
        let steady = !limited && line.first().is_some_and(|first| first.uid == *uid && !first.overdue);
        if steady {
            line.remove(0);
        }
        steady
    }

    /// The earlier requests that wait for one of these places, in order; none where the reservation takes no room.
    pub(super) fn ahead(
        &self,
        view: &View,
        reservation: &ReservationView,
        need: &Need,
        all: &[Candidate],
    ) -> Vec<Ahead> {
        let mut found: Vec<Ahead> = Vec::new();
        let mut index: BTreeMap<&Uid, usize> = BTreeMap::new();
        let takes_room = |at: &usize| !takes_no_room(view, reservation, need, &all[*at]);
        for (pool, line) in &self.pools {
            let places = (0..all.len()).filter(|at| all[*at].pool == *pool).filter(takes_room);
            let places: Vec<usize> = places.collect();
            if places.is_empty() {
                continue;
            }
            for earlier in line.iter().take_while(|earlier| earlier.uid != reservation.uid) {
                let Some(other) = view.reservations.get(&earlier.uid).filter(|_| !earlier.limited) else {
                    continue;
                };
                let here = places
                    .iter()
                    .copied()
                    .filter(|at| waits_for(view, other, earlier, (&all[*at].pool, &all[*at].node)));
                let here: Vec<usize> = here.collect();
                if here.is_empty() {
                    continue;
                }
                let at = *index.entry(&earlier.uid).or_insert(found.len());
                if at == found.len() {
                    let (uid, bytes) = (earlier.uid.clone(), earlier.need.bytes());
                    found.push(Ahead { uid, bytes, queued: earlier.queued, places: Vec::new() });
                }
                found[at].places.extend(here);
            }
        }
        found
    }

    /// How many others wait already in the pools that a reservation may go to, or came before it.
    pub(super) fn length(&self, view: &View, reservation: &ReservationView) -> u32 {
        let arrived = (reservation.created, &reservation.uid);
        let others: BTreeSet<&Uid> = self
            .pools
            .iter()
            .filter(|(pool, _)| view.pools.get(*pool).is_some_and(|pool| reservation.pools.allows(pool)))
            .flat_map(|(_, line)| line)
            .filter(|other| other.uid != reservation.uid)
            .filter(|other| {
                let known = view.reservations.get(&other.uid);
                other.queued || known.is_some_and(|known| (known.created, &known.uid) < arrived)
            })
            .map(|other| &other.uid)
            .collect();
        u32::try_from(others.len()).unwrap_or(u32::MAX)
    }
}

/// Of those that nobody overtakes any more and that wait for room in this ledger: how many there are, and what they ask for. None
/// where the pool takes nothing new, because then none of them gets a place there.
pub(super) fn overdue(view: &View, ledger: &LedgerView, now: Timestamp) -> (usize, Bytes) {
    let Some(pool) = view.pools.get(&ledger.pool) else { return (0, Bytes::ZERO) };
    if pool.service_on(&ledger.node) != Service::Open {
        return (0, Bytes::ZERO);
    }
    let backlog = Backlog::among(view, now, None, |other| other.name == pool.name);
    let waiting = backlog.pools.values().flatten().filter(|waiting| {
        let other = view.reservations.get(&waiting.uid).filter(|_| waiting.overdue && !waiting.limited);
        let takes_room = waiting.need.image.is_some() || waiting.need.bytes() > Bytes::ZERO;
        takes_room && other.is_some_and(|other| waits_for(view, other, waiting, (&ledger.pool, &ledger.node)))
    });
    waiting
        .fold((0, Bytes::ZERO), |(count, sum), waiting| (count + 1, sum.saturating_add(waiting.need.bytes())))
}

/// Those that may go to this pool, in its order.
fn ordered(
    view: &View,
    pool: &PoolView,
    waiting: &[(&ReservationView, Need)],
    now: Timestamp,
) -> Vec<Waiting> {
    let holdings = Holdings::of(view, pool);
    let mut line: Vec<&(&ReservationView, Need)> =
        waiting.iter().filter(|(other, _)| other.pools.allows(pool)).collect();
    let overdue = |other: &ReservationView| {
        let since = other.queued_since.unwrap_or(other.created);
        now.millis_since(since) >= pool.max_queue_millis / OVERDUE_PART
    };
    line.sort_by_key(|(other, _)| (-other.priority, other.created, &other.uid));
    let mut turns: BTreeMap<&str, u32> = BTreeMap::new();
    let mut ranked: Vec<(Rank, Waiting)> = Vec::with_capacity(line.len());
    for (other, need) in line {
        let asked = need.own_in(pool.block).charge.data;
        let limited = holdings.excess(view, pool, other, asked).is_some()
            || tenant::unjudged(view, pool, &other.claim_namespace).is_some();
        let overdue = overdue(other);
        let rank = if overdue {
            (false, 0, 0, other.created, other.uid.clone())
        } else {
            let namespace = other.claim_namespace.as_str();
            let turn = turns.entry(namespace).or_insert_with(|| holdings.count(namespace));
            *turn = turn.saturating_add(1);
            (true, -other.priority, *turn, other.created, other.uid.clone())
        };
        let queued = other.state == ReservationState::Queued;
        let (uid, need) = (other.uid.clone(), need.clone());
        ranked.push((rank, Waiting { uid, need, queued, limited, overdue }));
    }
    ranked.sort_by(|(one, _), (two, _)| one.cmp(two));
    ranked.into_iter().map(|(_, waiting)| waiting).collect()
}

/// True if nothing but entries of no bytes would be made for it there, and whoever is first in the line still finds the entries
/// that it needs. Then nobody gets its room later for it.
fn takes_no_room(view: &View, reservation: &ReservationView, need: &Need, place: &Candidate) -> bool {
    let ledger = view.ledgers.get(&(place.pool.clone(), place.node.clone()));
    let Some(ledger) = ledger.filter(|_| need.bytes() == Bytes::ZERO) else { return false };
    let new = promises_at(view, ledger, &reservation.uid, need);
    let free = MAX_PROMISES.saturating_sub(ledger.promises.len());
    new.iter().all(|(_, promise)| promise.charge == Charge::default()) && free >= new.len() + ENTRIES
}

/// True if `other` may use the place, and could if it were empty. It does not wait for space where a kernel pool that it
/// needs is damaged: the other class goes on there.
fn waits_for(
    view: &View,
    other: &ReservationView,
    waiting: &Waiting,
    (pool, node): (&PoolName, &NodeName),
) -> bool {
    let ledger = view.ledgers.get(&(pool.clone(), node.clone()));
    let report = view.report_of(pool, node);
    let (Some(pool), Some(node)) = (view.pools.get(pool), view.nodes.get(node)) else { return false };
    let all = everything(&waiting.need, &other.uid, pool.block);
    let damaged =
        || report.and_then(|report| stopped(report, &all)).is_some_and(|stopped| !stopped.is_about_space());
    may_use(other, pool, node)
        && ledger.is_some_and(|ledger| fits_empty(&ledger.capacity, &all).is_ok())
        && !damaged()
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

    /// For how long a request has waited and for how long it may, in milliseconds, once that is over.
    pub(super) fn exceeded(view: &View, reservation: &ReservationView, now: Timestamp) -> Option<(u64, u64)> {
        let most = Self::of(view, reservation)?.millis;
        let since = reservation.queued_since.filter(|_| reservation.state == ReservationState::Queued)?;
        let waited = now.millis_since(since);
        (waited >= most).then_some((waited, most))
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
