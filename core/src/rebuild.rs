//! Rebuilding a ledger that is behind from what its node has recorded: after the API server was restored from a backup, after
//! a ledger was deleted, and after a node came back that had been given up.
//!
//! **Guarantees.** Whatever the node holds is promised afterwards, at the generation at which it holds it, and counts. What
//! else the ledger promised stays only for a holder that still waits for it here. The new ledger has a lineage of its own and
//! names the record that it was made from: the node obeys it only if its record is still that one. Nothing is given back:
//! a promise whose holder is not found stays until a person decides ([`is_kept`]).

use std::collections::{BTreeMap, BTreeSet};

use crate::change::Change;
use crate::ids::{Lineage, Uid, staged_image_name};
use crate::ledger::{Holder, LedgerRecord as _, Promise, Rebuilt};
use crate::pool::is_there;
use crate::view::{LedgerView, NodePoolState, PoolView, View};

/// The rebuilding of the first of the pool's ledgers that can be.
pub(crate) fn first(view: &View, pool: &PoolView) -> Option<Change> {
    let ledgers = view.ledgers.values().filter(|ledger| ledger.pool == pool.name);
    ledgers.filter(|_| view.leader).find_map(|ledger| rebuilt(view, ledger))
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
    let mut promises: BTreeMap<Uid, Promise> = awaited(view, ledger, report);
    promises.extend(held);
    Some(Change::RebuildLedger {
        name: ledger.name.clone(),
        version: ledger.version.clone(),
        node: ledger.node.clone(),
        report: node.version.clone(),
        revision: ledger.revision.max(report.obeyed_revision).saturating_add(1),
        capacity: ledger.capacity.covering(promises.values()),
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
fn awaited(view: &View, ledger: &LedgerView, report: &NodePoolState) -> BTreeMap<Uid, Promise> {
    let waits = |uid: &Uid, promise: &Promise| match &promise.holder {
        Holder::Reservation(_) => view.reservations.get(uid).is_some_and(|reservation| {
            !reservation.deleting
                && reservation.assignment.as_ref().is_none_or(|place| {
                    place.pool == ledger.pool
                        && place.node == ledger.node
                        && place.generation == promise.generation
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
