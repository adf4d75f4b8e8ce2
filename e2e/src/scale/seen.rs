//! What the operator has written, as another process sees it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use berth_api::staging_ledger::LedgerPromise;
use berth_api::staging_node::{NodePool, Obeyed};
use berth_api::staging_reservation::ReservationState;
use berth_api::{StagingLedger, StagingReservation};
use kube::ResourceExt as _;

use crate::race::follow::Seen;

/// What each reservation asks for. Unit: bytes.
pub const REQUEST_BYTES: i64 = 1 << 30;

/// A reservation that has a place.
#[derive(Debug, Clone)]
struct Placed {
    name: String,
    node: String,
    generation: i64,
    prepared: bool,
}

/// A ledger as it was last seen.
#[derive(Debug, Clone)]
struct Ledger {
    lineage: String,
    revision: i64,
    promises: BTreeMap<String, LedgerPromise>,
}

/// Everything that was seen.
#[derive(Debug, Default)]
pub struct World {
    /// The pool of each node, by name and UID.
    pub pools: BTreeMap<String, (String, String)>,
    /// What each node reports that it has. Unit: bytes.
    pub node_bytes: i64,
    ledgers: BTreeMap<String, Ledger>,
    placed: BTreeMap<String, Placed>,
    /// How many have a place, by node.
    count: BTreeMap<String, i64>,
    dirty: BTreeSet<String>,
    /// What each node reported last.
    reported: BTreeMap<String, NodePool>,
    /// When each was first seen to be promised, by name.
    pub promised: BTreeMap<String, Instant>,
    /// How many are ready.
    pub ready: BTreeSet<String>,
    /// The most that was promised beyond a capacity. Unit: bytes.
    pub overcommitted: i64,
    /// Set if a watch may have missed something: nothing can be said then.
    pub gap: Option<String>,
}

impl World {
    /// Nodes with one pool each, by name and UID, of this size.
    pub fn new(pools: BTreeMap<String, (String, String)>, node_bytes: i64) -> Self {
        Self { pools, node_bytes, ..Self::default() }
    }

    /// How many ledgers there are.
    pub fn ledgers(&self) -> usize {
        self.ledgers.len()
    }

    /// Takes in a version of a ledger.
    pub fn ledger(&mut self, seen: Seen<StagingLedger>) {
        let Seen::Now(ledger) = seen else { return };
        let spec = ledger.spec;
        let sum: i64 = spec.promises.values().map(|promise| promise.data_bytes).sum();
        let capacity = spec.capacity.total.data_bytes.min(self.node_bytes);
        self.overcommitted = self.overcommitted.max(sum - capacity);
        let node = spec.scope.node_name;
        self.dirty.insert(node.clone());
        let ledger = Ledger { lineage: spec.lineage, revision: spec.revision, promises: spec.promises };
        self.ledgers.insert(node, ledger);
    }

    /// Takes in a version of a reservation.
    pub fn reservation(&mut self, seen: Seen<StagingReservation>) {
        let Seen::Now(reservation) = seen else { return };
        let (name, uid) = (reservation.name_any(), reservation.uid().unwrap_or_default());
        let Some(status) = reservation.status else { return };
        let Some(assignment) = status.assignment else { return };
        match status.state {
            Some(ReservationState::Promised) => {
                self.promised.entry(name.clone()).or_insert_with(Instant::now);
            }
            Some(ReservationState::Ready) => {
                self.ready.insert(name.clone());
            }
            _ => {}
        }
        if self.placed.contains_key(&uid) {
            return;
        }
        let (node, generation) = (assignment.node, assignment.generation);
        let count = self.count.entry(node.clone()).or_default();
        *count += 1;
        // By what was asked for, whatever the ledgers say.
        self.overcommitted = self.overcommitted.max(*count * REQUEST_BYTES - self.node_bytes);
        self.dirty.insert(node.clone());
        self.placed.insert(uid, Placed { name, node, generation, prepared: false });
    }

    /// What a node reports now, if that has changed since it was last asked.
    pub fn report(&mut self, node: &str) -> Option<NodePool> {
        let looked_at = self.dirty.remove(node);
        let report =
            looked_at.then(|| self.node_pool(node)).filter(|now| self.reported.get(node) != Some(now))?;
        self.reported.insert(node.to_owned(), report.clone());
        Some(report)
    }

    /// It could not be written: again.
    pub fn report_again(&mut self, node: &str) {
        self.reported.remove(node);
        self.dirty.insert(node.to_owned());
    }

    /// Obeyed is what the ledger promises and an assignment names, at the same generation.
    pub fn node_pool(&self, node: &str) -> NodePool {
        let (name, uid) = self.pools.get(node).cloned().unwrap_or_default();
        let ledger = self.ledgers.get(node);
        let agreed = |uid: &String, promise: &LedgerPromise| {
            let placed = self.placed.get(uid);
            placed.is_some_and(|placed| placed.node == node && placed.generation == promise.generation)
        };
        let promises = ledger.into_iter().flat_map(|ledger| &ledger.promises);
        let obeyed = promises.filter(|(uid, promise)| agreed(uid, promise)).map(|(uid, promise)| Obeyed {
            uid: uid.clone(),
            generation: promise.generation,
            ..Obeyed::default()
        });
        NodePool {
            name,
            uid,
            usable: true,
            reason: "Ready".to_owned(),
            total_bytes: self.node_bytes,
            lineage: ledger.map(|ledger| ledger.lineage.clone()),
            obeyed_revision: ledger.map_or(0, |ledger| ledger.revision),
            obeyed: obeyed.collect(),
            ..NodePool::default()
        }
    }

    /// Name, UID and generation of what has a place and was not yet said to be ready by its node.
    pub fn unprepared(&mut self) -> Vec<(String, String, i64, String)> {
        let due = self.placed.iter_mut().filter(|(_, placed)| !placed.prepared);
        due.map(|(uid, placed)| {
            placed.prepared = true;
            (placed.name.clone(), uid.clone(), placed.generation, placed.node.clone())
        })
        .collect()
    }
}

/// The time below which this share of them lie. Unit of the share: percent.
pub fn percentile(mut times: Vec<Duration>, percent: usize) -> Duration {
    times.sort_unstable();
    let at = (times.len() * percent).div_ceil(100).saturating_sub(1);
    times.get(at).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_promised_beyond_a_capacity_is_seen_in_ledgers_and_in_placements() {
        let mut world = World { node_bytes: REQUEST_BYTES * 3 / 2, ..World::default() };
        let place = |world: &mut World, name: &str| {
            let reservation = json!({
                "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation",
                "metadata": { "name": name, "uid": name },
                "spec": { "poolName": "p", "maxSize": "1Gi", "access": "File" },
                "status": { "state": "Promised", "assignment": { "pool": "p", "node": "n", "generation": 1 } },
            });
            world.reservation(Seen::Now(serde_json::from_value(reservation).expect("a reservation")));
        };
        place(&mut world, "a");
        place(&mut world, "a");
        assert!(world.overcommitted <= 0, "{}", world.overcommitted);
        place(&mut world, "b");
        assert_eq!((world.overcommitted, world.promised.len()), (REQUEST_BYTES / 2, 2));
    }

    #[test]
    fn a_node_reports_what_is_new_or_was_not_written() {
        let mut world =
            World::new([("n".to_owned(), ("p".to_owned(), "u".to_owned()))].into(), REQUEST_BYTES);
        world.report_again("n");
        assert!(world.report("n").is_some());
        world.dirty.insert("n".to_owned());
        assert_eq!(world.report("n"), None, "it is as it was");
        world.report_again("n");
        assert!(world.report("n").is_some(), "that was not written");
    }

    #[test]
    fn percentiles() {
        let times = |count: u64| (1..=count).map(Duration::from_millis).collect::<Vec<_>>();
        assert_eq!(percentile(times(200), 99), Duration::from_millis(198));
        assert_eq!(percentile(times(1), 50), Duration::from_millis(1));
        assert_eq!(percentile(Vec::new(), 50), Duration::ZERO);
    }
}
