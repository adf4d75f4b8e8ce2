//! Where a reservation may go, and why not elsewhere. Deterministic: two operators with the same view choose alike.

use std::fmt::{self, Write as _};

use crate::budget::{Shortfall, fits, fits_empty, free};
use crate::change::Considered;
use crate::ids::{NodeName, PoolName, Uid};
use crate::ledger::{Behind, Class, Promise};
use crate::pool::OTHER_AREA;
use crate::reason::Reason;
use crate::retire::is_leaving;
use crate::thin::{BlockSize, Stopped};
use crate::units::Bytes;
use crate::view::{
    ImageView, LedgerView, NodePoolState, NodeState, PoolView, ReservationView, Service, Strategy, View,
};

use super::need::{ImageNeed, Need, image_promise};
use super::tenant::{self, Holdings, TenantExcess};

/// How many places are told in a status.
const TOLD: usize = 16;

/// A pool on a node, and whether the reservation can go there now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The pool.
    pub pool: PoolName,
    /// The node.
    pub node: NodeName,
    /// How the pool chooses among places.
    pub strategy: Strategy,
    /// Whether, or why not.
    pub verdict: Verdict,
}

/// Whether a reservation can go to a place now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It can.
    Fits {
        /// What its class has left there now.
        free: Bytes,
        /// True if the image that it starts from is promised there.
        present: bool,
    },
    /// Too much is promised to others.
    Short(Shortfall),
    /// It would not fit if nothing were promised.
    TooLarge(Shortfall),
    /// The node says that the pool cannot be used.
    Unusable {
        /// Why.
        reason: Reason,
        /// For people.
        message: String,
    },
    /// A kernel pool that it needs takes nothing more.
    Stopped(Stopped),
    /// The node's Lease has run out.
    NodeLost,
    /// The node has not reported since this operator began to watch.
    NotReported,
    /// The ledger is older than what the node has obeyed.
    Behind(Behind),
    /// The ledger has not been made yet.
    NoLedger,
    /// The staged image is being removed there.
    ImageLeaving,
    /// The pool takes nothing new there.
    Cordoned(Service),
    /// The reservations of its namespace hold as much of the pool as they may.
    TenantLimit(TenantExcess),
    /// What its namespace holds of the pool cannot be told: why.
    Unjudged(String),
}

impl Verdict {
    /// True if a request that may not wait is refused for it: only other promises that go, or a person, can help.
    pub const fn refuses(&self) -> bool {
        match self {
            Self::Short(_) | Self::TooLarge(_) | Self::Cordoned(_) | Self::TenantLimit(_) => true,
            Self::Stopped(stopped) => stopped.is_about_space(),
            _ => false,
        }
    }

    /// True if it is only room that is missing for now, so that images that go may help.
    pub(super) const fn is_about_room(&self) -> bool {
        match self {
            Self::Short(_) => true,
            Self::Stopped(stopped) => stopped.is_about_space(),
            _ => false,
        }
    }

    /// The documented reason for a place that cannot be used.
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Fits { .. } => Reason::Queued,
            Self::Short(Shortfall { bound: crate::budget::Bound::Promises, .. }) => Reason::LedgerFull,
            Self::Short(_) => Reason::InsufficientCapacity,
            Self::TooLarge(_) => Reason::LargerThanPool,
            Self::Unusable { reason, .. } => *reason,
            Self::Stopped(stopped) => stopped.reason(),
            Self::NodeLost => Reason::NodeLost,
            Self::NotReported | Self::NoLedger => Reason::NoMatchingNode,
            Self::Behind(_) => Reason::LedgerBehind,
            Self::ImageLeaving => Reason::Releasing,
            Self::Cordoned(_) => Reason::Cordoned,
            Self::TenantLimit(_) => Reason::TenantLimit,
            Self::Unjudged(_) => Reason::ObjectUnreadable,
        }
    }

    /// How many bytes are missing, if it is bytes that are missing.
    pub fn shortfall(&self) -> Option<Bytes> {
        match self {
            Self::Short(shortfall) | Self::TooLarge(shortfall) => Some(shortfall.bytes),
            Self::TenantLimit(excess) => excess.shortfall(),
            _ => None,
        }
    }
}

impl Candidate {
    /// Why it was chosen of all that fit.
    pub(super) fn chosen_because(&self) -> String {
        let Self { pool, node, strategy, .. } = self;
        match &self.verdict {
            Verdict::Fits { present: true, .. } if *strategy == Strategy::PreferPresent => {
                format!("{strategy:?}: pool {pool} on node {node} has the image")
            }
            Verdict::Fits { free, .. } if *strategy != Strategy::FirstFit => {
                format!("{strategy:?}: pool {pool} on node {node} has {free} left, the most")
            }
            _ => format!("{strategy:?}: pool {pool} on node {node} is the first by name"),
        }
    }
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pool {} on node {} ", self.pool, self.node)?;
        match &self.verdict {
            Verdict::Fits { free, .. } => write!(f, "has {free} left, for requests that came earlier"),
            Verdict::Short(shortfall) => write!(f, "{shortfall}"),
            Verdict::TooLarge(shortfall) => write!(f, "{shortfall} even when empty"),
            Verdict::Unusable { reason, message } if message.is_empty() => {
                write!(f, "cannot be used: {reason}")
            }
            Verdict::Unusable { reason, message } => write!(f, "cannot be used: {reason}: {message}"),
            Verdict::Stopped(stopped) => write!(f, "{stopped}"),
            Verdict::NodeLost => f.write_str("is lost: the node no longer renews its Lease"),
            Verdict::NotReported => f.write_str("has not reported yet"),
            Verdict::Behind(behind) => write!(f, "is behind: {behind}"),
            Verdict::NoLedger => f.write_str("has no ledger yet"),
            Verdict::ImageLeaving => f.write_str("is removing its copy of the image"),
            Verdict::Cordoned(service) => write!(f, "takes nothing new: it is {service:?}"),
            Verdict::TenantLimit(excess) => write!(f, "{excess}"),
            Verdict::Unjudged(why) => {
                write!(f, "limits what the namespace holds, which cannot be told: {why}")
            }
        }
    }
}

/// True if the reservation's fields allow this pool on this node.
pub(super) fn may_use(reservation: &ReservationView, pool: &PoolView, node: &NodeState) -> bool {
    !pool.deleting
        && pool.invalid.is_none()
        && reservation.pools.allows(pool)
        && reservation.node.as_ref().is_none_or(|only| *only == node.name)
        && reservation.zone.as_ref().is_none_or(|zone| node.zone.as_ref() == Some(zone))
}

/// Every place that the reservation's fields allow, in order of pool and node, with what speaks against it.
pub fn candidates(view: &View, reservation: &ReservationView, need: &Need) -> Vec<Candidate> {
    let mut all = Vec::new();
    for pool in view.pools.values().filter(|pool| reservation.pools.allows(pool)) {
        let asked = need.own_in(pool.block).charge.data;
        let limited = !pool.tenant_limits.is_empty();
        let holdings = limited.then(|| Holdings::of(view, pool));
        let excess = holdings.and_then(|held| held.excess(view, pool, reservation, asked));
        let unjudged = tenant::unjudged(view, pool, &reservation.claim_namespace);
        for (name, node) in &view.nodes {
            if !node.pools.contains_key(&pool.name) || !may_use(reservation, pool, node) {
                continue;
            }
            let verdict = match (judge(view, reservation, need, pool, name), &excess, &unjudged) {
                (verdict, Some(excess), _)
                    if verdict.is_about_room() || matches!(verdict, Verdict::Fits { .. }) =>
                {
                    Verdict::TenantLimit(excess.clone())
                }
                (Verdict::Fits { .. }, None, Some(why)) => Verdict::Unjudged(why.clone()),
                (verdict, ..) => verdict,
            };
            let (pool, strategy) = (pool.name.clone(), pool.strategy);
            all.push(Candidate { pool, node: name.clone(), strategy, verdict });
        }
    }
    all
}

fn judge(
    view: &View,
    reservation: &ReservationView,
    need: &Need,
    pool: &PoolView,
    node: &NodeName,
) -> Verdict {
    let (Some(state), Some(report)) = (view.nodes.get(node), view.report_of(&pool.name, node)) else {
        return Verdict::NotReported;
    };
    if !report.usable {
        return Verdict::Unusable { reason: report.reason, message: report.message.clone() };
    }
    if pool.capacity(report).is_none() {
        return Verdict::Unusable { reason: Reason::PoolAreaFailed, message: OTHER_AREA.to_owned() };
    }
    let Some(ledger) = view.ledgers.get(&(pool.name.clone(), node.clone())) else { return Verdict::NoLedger };
    let all = promises_at(view, ledger, &reservation.uid, need);
    let image = staged(view, ledger, need);
    let stopped = stopped_or_full(report, ledger, &all);
    if let Some(stopped) = stopped.filter(|stopped| !stopped.is_about_space()) {
        return Verdict::Stopped(stopped);
    }
    if let Err(shortfall) = fits_empty(&ledger.capacity, &everything(need, &reservation.uid, pool.block)) {
        return Verdict::TooLarge(shortfall);
    }
    match pool.service_on(node) {
        Service::Open => {}
        closed @ (Service::Cordoned | Service::Draining) => return Verdict::Cordoned(closed),
    }
    if state.is_lost() {
        return Verdict::NodeLost;
    }
    if !state.live || !state.reported {
        return Verdict::NotReported;
    }
    if let Some(behind) = view.behind(ledger) {
        return Verdict::Behind(behind);
    }
    if image.is_some_and(|image| is_leaving(ledger, image)) {
        return Verdict::ImageLeaving;
    }
    if let Some(stopped) = stopped {
        return Verdict::Stopped(stopped);
    }
    match fits(ledger, &all) {
        Ok(()) => Verdict::Fits {
            free: free(ledger, need.class()),
            present: image.is_some_and(|image| ledger.promises.contains_key(&image.uid)),
        },
        Err(shortfall) => Verdict::Short(shortfall),
    }
}

/// The first kernel pool that takes nothing more of all those that have to take some of this.
pub(super) fn stopped(report: &NodePoolState, all: &[(Uid, Promise)]) -> Option<Stopped> {
    let state = report.thin.as_ref()?;
    let mut needed = all.iter().filter(|(_, promise)| promise.charge.data > Bytes::ZERO);
    needed.find_map(|(_, promise)| state.stopped(promise.class))
}

/// The same, where volumes may be overcommitted: then their kernel pool takes nothing more once they have written all that they
/// can attain.
pub(super) fn stopped_or_full(
    report: &NodePoolState,
    ledger: &LedgerView,
    all: &[(Uid, Promise)],
) -> Option<Stopped> {
    stopped(report, all).or_else(|| full(report, ledger, all))
}

/// The kernel pool of volumes, if these have to take some of this and are overcommitted and full.
pub(crate) fn full(report: &NodePoolState, ledger: &LedgerView, all: &[(Uid, Promise)]) -> Option<Stopped> {
    let volumes =
        |(_, promise): &(Uid, Promise)| promise.class == Class::Volumes && promise.charge.data > Bytes::ZERO;
    let concerned = ledger.capacity.overcommit.is_over() && all.iter().any(volumes);
    report.thin.as_ref().filter(|_| concerned)?.volumes_full(ledger.attainable_by_volumes())
}

/// The staged image at this ledger's place, if the need has one and the object is there.
pub(super) fn staged<'v>(view: &'v View, ledger: &LedgerView, need: &Need) -> Option<&'v ImageView> {
    let name = need.image.as_ref()?.name_at(&ledger.pool, &ledger.node);
    view.images.get(&name)
}

/// What has to be entered at this place: the image only if it is not promised there yet. An image that has no object
/// yet counts under an empty UID, which is never written.
pub(super) fn promises_at(
    view: &View,
    ledger: &LedgerView,
    holder: &Uid,
    need: &Need,
) -> Vec<(Uid, Promise)> {
    let block = view.block_of(&ledger.pool);
    let Some(image) = &need.image else { return need.promises(holder, block, None) };
    let name = image.name_at(&ledger.pool, &ledger.node);
    let entry = match view.images.get(&name) {
        Some(staged) if ledger.promises.contains_key(&staged.uid) => None,
        Some(staged) => Some((staged.uid.clone(), staged.promise(block))),
        None => Some((Uid::default(), promise_of(image, &name, block))),
    };
    need.promises(holder, block, entry)
}

fn promise_of(need: &ImageNeed, name: &str, block: Option<BlockSize>) -> Promise {
    image_promise(name, need.image.real_size, need.image.virtual_size, block)
}

/// Everything that has to be promised in a pool with such blocks where nothing is.
pub(super) fn everything(need: &Need, holder: &Uid, block: Option<BlockSize>) -> Vec<(Uid, Promise)> {
    let image = need.image.as_ref().map(|image| (Uid::default(), promise_of(image, "", block)));
    need.promises(holder, block, image)
}

/// The index of the best of the places that fit and that `open` allows by their index. Where they are in pools with
/// different strategies, the strategy of the first by name decides; between equals, the first by name wins.
pub fn choose(all: &[Candidate], open: impl Fn(usize) -> bool) -> Option<usize> {
    let fitting = || {
        all.iter().enumerate().filter_map(|(at, candidate)| match candidate.verdict {
            Verdict::Fits { free, present } if open(at) => Some((at, present, free)),
            _ => None,
        })
    };
    let (first, ..) = fitting().next()?;
    let strategy = all[first].strategy;
    let rank = |present: bool, free: Bytes| match strategy {
        Strategy::FirstFit => (false, Bytes::ZERO),
        Strategy::MostFree => (false, free),
        Strategy::PreferPresent => (present, free),
    };
    let mut best: Option<(usize, (bool, Bytes))> = None;
    for (at, present, free) in fitting() {
        let rank = rank(present, free);
        if best.is_none_or(|(_, other)| rank > other) {
            best = Some((at, rank));
        }
    }
    best.map(|(at, _)| at)
}

/// What is told of the places in a status: the chosen one first, then the others by name, as many as may be told.
pub(super) fn consider(all: &[Candidate], chosen: Option<usize>) -> Vec<Considered> {
    let others = (0..all.len()).filter(|at| Some(*at) != chosen);
    let told = chosen.into_iter().chain(others).take(TOLD);
    told.map(|at| {
        let (candidate, chosen) = (&all[at], Some(at) == chosen);
        let (reason, message) = match (&candidate.verdict, chosen) {
            (_, true) => (Reason::Promised, candidate.chosen_because()),
            (Verdict::Fits { free, .. }, false) => (candidate.verdict.reason(), format!("{free} are left")),
            (_, false) => (candidate.verdict.reason(), candidate.to_string()),
        };
        let (pool, node) = (candidate.pool.clone(), candidate.node.clone());
        Considered { pool, node, reason, message, shortfall: candidate.verdict.shortfall(), chosen }
    })
    .collect()
}

/// The least that is missing anywhere, if space is missing somewhere.
pub(super) fn least_shortfall(all: &[Candidate]) -> Option<Bytes> {
    all.iter().filter_map(|candidate| candidate.verdict.shortfall()).min()
}

/// What speaks against each place; at most five are named.
pub(super) fn explain(all: &[Candidate]) -> String {
    const NAMED: usize = 5;
    let mut text = all.iter().take(NAMED).map(ToString::to_string).collect::<Vec<_>>().join("; ");
    if all.len() > NAMED {
        let _ = write!(text, "; and {} more", all.len() - NAMED); // writing to a String cannot fail
    }
    text
}

#[cfg(test)]
#[path = "place_tests.rs"]
mod tests;
