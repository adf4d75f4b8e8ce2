//! Images that may go because nothing needs them, and when they do.
//!
//! **Guarantees.** An image goes only if no live reservation names it, none that waits would start from it, another copy of
//! it is known or its template was deleted, and it has not been used for `reclaim.keepWarm`. How long it has not been used
//! only ranks such images. The leader alone retires one; how that is made safe, see [`crate::retire`].

use std::collections::BTreeSet;

use crate::budget::{Area, Sums, fits};
use crate::change::Change;
use crate::ids::{Digest, ObjectName, Uid};
use crate::ledger::{Charge, Promise};
use crate::lost;
use crate::reservation::{full, is_waiting, wants_image};
use crate::retire::{is_leaving, leaving, retire};
use crate::units::{Bytes, Timestamp};
use crate::view::{ImageView, LedgerView, PoolView, ReservationView, Service, TransferView, View};

/// How many images of one ledger are removed in one pass.
const AT_ONCE: usize = 256;

/// Why images go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// Nothing has used it for `reclaim.ttl`.
    Unused,
    /// More is promised than `reclaim.highWatermark`.
    HighWatermark,
    /// A request would wait or be refused otherwise.
    Shortfall,
    /// The pool takes nothing new, or is being deleted.
    Draining,
    /// The node is gone, and the pool's policy gives copies up.
    NodeLost,
}

impl Cause {
    /// The name in status and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unused => "Unused",
            Self::HighWatermark => "HighWatermark",
            Self::Shortfall => "Shortfall",
            Self::Draining => "Draining",
            Self::NodeLost => "NodeLost",
        }
    }
}

/// What reservations need of images.
pub struct Needs<'v> {
    view: &'v View,
    named: BTreeSet<&'v str>,
    /// Requests without a place, and what they start from.
    wanting: Vec<(&'v ReservationView, Digest)>,
}

impl<'v> Needs<'v> {
    /// Looks at every reservation once.
    pub fn of(view: &'v View) -> Self {
        let mut needs = Self { view, named: BTreeSet::new(), wanting: Vec::new() };
        for reservation in view.reservations.values() {
            if let Some(image) = reservation.assigned_image.as_ref().filter(|_| !reservation.deleting) {
                needs.named.insert(&image.staged_image);
            }
            if reservation.assignment.is_some() || reservation.template.is_none() {
                continue;
            }
            let import = reservation.template.as_ref().and_then(|name| view.imports.get(name));
            if let Some(durable) = import.and_then(|import| import.durable.as_ref()) {
                needs.wanting.push((reservation, durable.digest));
            }
        }
        needs
    }

    /// True if a live reservation names the image, or one that waits could be placed beside it.
    pub fn need(&self, image: &ImageView) -> bool {
        if self.named.contains(image.name.as_str()) {
            return true;
        }
        let Some(pool) = self.view.pools.get(&image.pool) else { return false };
        let takes_new = !pool.deleting && pool.service_on(&image.node) == Service::Open;
        self.wanting.iter().any(|(reservation, digest)| {
            *digest == image.digest
                && reservation.pools.allows(pool)
                && wants_image(self.view, reservation, &image.digest)
                && (takes_new && is_waiting(self.view, reservation)
                    || self.view.ledgers_of(&reservation.uid).next().is_some())
        })
    }
}

/// True if the image may go without being lost: it is durable in an image store that is there to stay, or its template was
/// deleted. Where the store is gone, or goes, nobody could fetch the image again.
pub fn has_other_copy(view: &View, image: &ImageView) -> bool {
    let is_there = |store: &ObjectName| view.stores.get(store).is_some_and(|store| !store.deleting);
    let stays = |import: &TransferView| import.stores.iter().all(is_there);
    image.given_up || templates_of(view, &image.digest).any(stays)
}

/// The templates that stay and have this image.
pub(crate) fn templates_of<'v>(view: &'v View, digest: &Digest) -> impl Iterator<Item = &'v TransferView> {
    view.imports.values().filter(move |import| {
        !import.deleting && import.durable.as_ref().is_some_and(|durable| durable.digest == *digest)
    })
}

/// Since when nothing has been made from it.
pub fn unused_since(image: &ImageView) -> Timestamp {
    image.last_used.unwrap_or(image.created).max(image.created)
}

/// The images of a ledger's place that may go now, the longest unused first.
fn idle<'v>(
    view: &'v View,
    needs: &Needs<'_>,
    ledger: &LedgerView,
    warm_millis: u64,
    now: Timestamp,
) -> Vec<&'v ImageView> {
    let mut idle: Vec<&ImageView> = of_place(view, ledger)
        .filter(|image| !is_leaving(ledger, image) && !needs.need(image) && has_other_copy(view, image))
        .filter(|image| now.millis_since(unused_since(image)) >= warm_millis)
        .collect();
    idle.sort_by_key(|image| (unused_since(image), &image.name));
    idle
}

/// Images with a promise in this ledger.
fn of_place<'v>(view: &'v View, ledger: &LedgerView) -> impl Iterator<Item = &'v ImageView> {
    view.images.values().filter(|image| {
        image.pool == ledger.pool && image.node == ledger.node && ledger.promises.contains_key(&image.uid)
    })
}

/// What makes room for a request: images that go already, and those that have to go as well.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Room<'v> {
    /// Their bytes are being given back: their promises, and their names.
    pub leaving: Vec<(&'v Uid, &'v str)>,
    /// To be retired.
    pub next: Vec<&'v ImageView>,
}

impl Room<'_> {
    /// What is promised in the ledger to all of them.
    pub fn bytes(&self, ledger: &LedgerView) -> Bytes {
        let leaving = self.leaving.iter().map(|(uid, _)| *uid);
        let all = leaving.chain(self.next.iter().map(|image| &image.uid));
        all.filter_map(|uid| ledger.promises.get(uid)).map(|promise| promise.charge.data).sum()
    }

    /// The names of all of them.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let leaving = self.leaving.iter().map(|(_, name)| *name);
        leaving.chain(self.next.iter().map(|image| image.name.as_str()))
    }
}

/// The images without which `new` fits into the ledger, and into its kernel pools: as few as possible, and rather the longest
/// unused. `None` if it would not fit without all that may go, if it does not need any to go, or if its node could not give
/// anything back now.
pub fn for_shortfall<'v>(
    view: &'v View,
    ledger: &'v LedgerView,
    new: &[(Uid, Promise)],
    now: Timestamp,
) -> Option<Room<'v>> {
    let pool = view.pools.get(&ledger.pool)?;
    let node = view.nodes.get(&ledger.node)?;
    if !node.live || !node.reported || view.behind(ledger).is_some() {
        return None;
    }
    let leaving: Vec<(&Uid, &str)> = leaving(view, ledger).collect();
    let fits_without = |next: &[&ImageView]| {
        let going = leaving.iter().map(|(uid, _)| *uid);
        let gone: Vec<&Uid> = going.chain(next.iter().map(|image| &image.uid)).collect();
        // As the ledger will be: what was grown for an image is not free for volumes.
        let Change::WriteLedger { capacity, promises, .. } = view.without(ledger, &gone) else {
            return false;
        };
        let after = LedgerView { capacity, promises, ..ledger.clone() };
        fits(&after, new).is_ok() && !stays_stopped(view, ledger, &after, new)
    };
    let mut next: Vec<&ImageView> = Vec::new();
    let mut idle =
        idle(view, &Needs::of(view), ledger, pool.reclaim.keep_warm_millis, now).into_iter().take(AT_ONCE);
    while !fits_without(&next) {
        next.push(idle.next()?);
    }
    for at in (0..next.len()).rev() {
        let mut fewer = next.clone();
        fewer.remove(at);
        if fits_without(&fewer) {
            next = fewer;
        }
    }
    (!next.is_empty() || !leaving.is_empty()).then_some(Room { leaving, next })
}

/// True if a kernel pool takes nothing of `new` although the ledger becomes what `after` is. What is given back of it by that is
/// at most what was promised to those that the node holds.
fn stays_stopped(view: &View, ledger: &LedgerView, after: &LedgerView, new: &[(Uid, Promise)]) -> bool {
    let Some(report) = view.report_of(&ledger.pool, &ledger.node) else { return false };
    let Some(thin) = &report.thin else { return false };
    let gone = ledger.promises.iter().filter(|(uid, _)| !after.promises.contains_key(*uid));
    let held = gone.filter(|(uid, _)| report.obeyed.contains_key(*uid)).map(|(_, promise)| promise.charge);
    let freed = held.fold(Charge::default(), |sum, charge| Charge {
        data: sum.data.saturating_add(charge.data),
        metadata: sum.metadata.saturating_add(charge.metadata),
    });
    let mut classes = new.iter().filter(|(_, new)| new.charge.data > Bytes::ZERO).map(|(_, new)| new.class);
    let attainable = after.attainable_by_volumes();
    classes.any(|class| thin.stopped_without(class, freed, attainable).is_some())
        || full(report, after, new).is_some()
}

/// What the leader retires in the first of the pool's ledgers with anything to retire: everything unneeded where it drains or
/// its node is given up, else what is above the high watermark.
pub fn decide(view: &View, pool: &PoolView, now: Timestamp) -> Vec<Change> {
    let ledgers: Vec<&LedgerView> = view.ledgers_in(&pool.name).collect();
    let concerned = |ledger: &LedgerView| {
        lost::is_given_up(view, &pool.name, &ledger.node)
            || is_draining(pool, ledger)
            || is_above(&Sums::of(ledger.promises.values()), ledger, pool.reclaim.high_percent)
    };
    if !view.sweeps() || !ledgers.iter().any(|ledger| concerned(ledger)) {
        return Vec::new();
    }
    let needs = Needs::of(view);
    let each = ledgers.into_iter().map(|ledger| of_ledger(view, &needs, pool, ledger, now));
    each.into_iter().find(|changes| !changes.is_empty()).unwrap_or_default()
}

fn of_ledger(
    view: &View,
    needs: &Needs<'_>,
    pool: &PoolView,
    ledger: &LedgerView,
    now: Timestamp,
) -> Vec<Change> {
    let all = |cause| {
        let mut idle = idle(view, needs, ledger, 0, now);
        idle.truncate(AT_ONCE);
        retire(view, ledger, &idle, cause)
    };
    if lost::is_given_up(view, &pool.name, &ledger.node) {
        return all(Cause::NodeLost);
    }
    if is_draining(pool, ledger) {
        return all(Cause::Draining);
    }
    retire(view, ledger, &above_watermark(view, needs, pool, ledger, now), Cause::HighWatermark)
}

fn is_draining(pool: &PoolView, ledger: &LedgerView) -> bool {
    pool.deleting || pool.service_on(&ledger.node) == Service::Draining
}

/// True if more than this percentage of the ledger's capacity is promised.
fn is_above(promised: &Sums, ledger: &LedgerView, percent: u32) -> bool {
    let capacity = &ledger.capacity;
    let (data, total) = (promised.data(Area::Total, capacity.overcommit.percent).0, capacity.total.data.0);
    u128::from(data) * 100 > u128::from(total) * u128::from(percent)
}

/// Nothing, unless more is promised than the high watermark; then the longest unused images down to the low one. What
/// goes already counts as gone.
fn above_watermark<'v>(
    view: &'v View,
    needs: &Needs<'_>,
    pool: &PoolView,
    ledger: &LedgerView,
    now: Timestamp,
) -> Vec<&'v ImageView> {
    let mut gone: BTreeSet<&Uid> = leaving(view, ledger).map(|(uid, _)| uid).collect();
    let above = |gone: &BTreeSet<&Uid>, percent| {
        let kept = ledger.promises.iter().filter(|(uid, _)| !gone.contains(uid)).map(|(_, promise)| promise);
        is_above(&Sums::of(kept), ledger, percent)
    };
    let mut next = Vec::new();
    if !above(&gone, pool.reclaim.high_percent) {
        return next;
    }
    for image in idle(view, needs, ledger, pool.reclaim.keep_warm_millis, now).into_iter().take(AT_ONCE) {
        if !above(&gone, pool.reclaim.low_percent) {
            break;
        }
        gone.insert(&image.uid);
        next.push(image);
    }
    next
}

#[cfg(test)]
#[path = "reclaim_tests.rs"]
mod tests;
