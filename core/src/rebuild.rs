//! Rebuilding a ledger that is behind from what its node has recorded: after the API server was restored from a backup, after
//! a ledger was deleted, and after a node came back that had been given up.
//!
//! **Guarantees.** Whatever the node holds is promised afterwards, at the generation at which it holds it, and counts. What
//! else the ledger promised stays only for a holder that still waits for it here, and only where it fits beside that: a holder
//! that is left out waits, or is promised its space again when there is room. The new ledger has a lineage of its own and
//! names the record that it was made from: the node obeys it only if its record is still that one. Nothing is given back:
//! a promise whose holder is not found stays until a person decides ([`is_kept`]).

use std::collections::{BTreeMap, BTreeSet};

use crate::budget::fits;
use crate::change::Change;
use crate::ids::{Lineage, Uid, staged_image_name};
use crate::ledger::{Charge, Holder, LedgerRecord as _, Promise, Rebuilt};
use crate::pool::is_there;
use crate::reservation::was_given_back;
use crate::view::{LedgerView, NodePoolState, PoolView, View};

/// The rebuilding of the first of the pool's ledgers that can be.
pub(crate) fn first(view: &View, pool: &PoolView) -> Option<Change> {
    let ledgers = view.ledgers.values().filter(|ledger| ledger.pool == pool.name);
    ledgers.filter(|_| view.sweeps()).find_map(|ledger| rebuilt(view, ledger))
}

/// The write that makes a ledger that is behind hold what its node does. `None` if it is not behind, if the node has not
/// reported since this operator began to watch, or if it does not tell enough of each promise.
pub fn rebuilt(view: &View, ledger: &LedgerView) -> Option<Change> {
    let node = view.nodes.get(&ledger.node).filter(|node| node.live && node.reported)?;
    let report = node.pools.get(&ledger.pool)?;
    view.behind(ledger)?;
    let lineage = report.lineage.clone().unwrap_or_else(|| ledger.lineage.clone());
    let held = held(report)?;
    let recovered: BTreeSet<Uid> = held
        .iter()
        .filter(|(uid, promise)| !is_there(view, uid, &promise.holder))
        .map(|(uid, _)| uid.clone())
        .collect();
    let pool = view.pools.get(&ledger.pool);
    let reported = pool.filter(|_| report.usable).and_then(|pool| pool.capacity(report));
    let capacity = reported.unwrap_or(ledger.capacity).covering(ledger.capacity.overcommit, held.values());
    let revision = ledger.revision.max(report.obeyed_revision).saturating_add(1);
    let mut next = LedgerView { capacity, promises: held, ..ledger.clone() };
    for new in awaited(view, ledger, report) {
        if fits(&next, std::slice::from_ref(&new)).is_ok() {
            next.promises.extend([new]);
        }
    }
    for (uid, promise) in retired(view, ledger) {
        // Its node does not hold it and never will: it takes no bytes.
        let nothing = Promise { charge: Charge::default(), ..promise.clone() };
        next.promises.entry(uid.clone()).or_insert(nothing).revoked = Some(revision);
    }
    let promises = next.promises;
    Some(Change::RebuildLedger {
        name: ledger.name.clone(),
        version: ledger.version.clone(),
        node: ledger.node.clone(),
        report: node.version.clone(),
        revision,
        capacity,
        promises,
        rebuilt: Rebuilt { lineage, revision: report.obeyed_revision, recovered },
    })
}

/// What the node holds, as it has recorded it. `None` if it does not tell all of one promise, as an older version would not.
fn held(report: &NodePoolState) -> Option<BTreeMap<Uid, Promise>> {
    let recorded = |(uid, generation): (&Uid, _)| {
        let promise = report.recorded.get(uid).filter(|promise| promise.generation == generation)?;
        Some((uid.clone(), promise.clone()))
    };
    report.held().map(recorded).collect()
}

/// Promises of the ledger that the node has never obeyed, to holders that still wait for them here.
fn awaited(view: &View, ledger: &LedgerView, report: &NodePoolState) -> Vec<(Uid, Promise)> {
    let waits = |uid: &Uid, promise: &Promise| match &promise.holder {
        Holder::Reservation(_) => view.reservations.get(uid).is_some_and(|reservation| {
            !reservation.deleting
                && reservation.assignment.as_ref().is_none_or(|place| {
                    place.pool == ledger.pool
                        && place.node == ledger.node
                        && place.generation == promise.generation
                        && !was_given_back(reservation, place)
                })
        }),
        Holder::Image(name) => {
            view.images.get(name).is_some_and(|image| image.uid == *uid && !image.deleting)
        }
    };
    let known = |uid: &Uid| report.obeyed.contains_key(uid) || report.released.contains_key(uid);
    let kept = ledger
        .promises
        .iter()
        .filter(|(uid, promise)| promise.revoked.is_none() && !known(uid) && waits(uid, promise));
    kept.map(|(uid, promise)| (uid.clone(), promise.clone())).collect()
}

/// Images that the ledger has retired and whose objects are there: somebody may be about to delete these.
fn retired<'v>(view: &'v View, ledger: &'v LedgerView) -> impl Iterator<Item = (&'v Uid, &'v Promise)> {
    let image = |promise: &Promise| matches!(promise.holder, Holder::Image(_)) && promise.revoked.is_some();
    let retired = ledger.promises.iter().filter(move |(_, promise)| image(promise));
    retired.filter(|(uid, promise)| is_there(view, uid, &promise.holder))
}

/// True if a promise stays although its holder does not exist: it came from the node's record, and what lies under it may be
/// the only copy. An image that is durable in an image store is not.
pub(crate) fn is_kept(view: &View, ledger: &LedgerView, uid: &Uid, promise: &Promise) -> bool {
    let recovered = ledger.rebuilt.as_ref().is_some_and(|rebuilt| rebuilt.recovered.contains(uid));
    let durable = |name: &str| {
        let imports = view.imports.values().filter(|import| !import.deleting);
        imports
            .filter_map(|import| import.durable.as_ref())
            .any(|durable| staged_image_name(&durable.digest, &ledger.pool, &ledger.node) == name)
    };
    recovered
        && match &promise.holder {
            Holder::Reservation(_) => true,
            Holder::Image(name) => !durable(name),
        }
}

/// The ledger that a [`Change::RebuildLedger`] leads to, with this lineage.
pub fn outcome(ledger: &LedgerView, change: &Change, new: Lineage) -> Option<LedgerView> {
    let Change::RebuildLedger { name, revision, capacity, promises, rebuilt, .. } = change else {
        return None;
    };
    (*name == ledger.name).then(|| LedgerView {
        lineage: new,
        revision: *revision,
        capacity: *capacity,
        promises: promises.clone(),
        rebuilt: Some(rebuilt.clone()),
        ..ledger.clone()
    })
}

#[cfg(test)]
#[path = "rebuild_tests.rs"]
mod tests;
