//! The counter: it watches ledgers, reservations and nodes with a client of its own, keeps every version for the replay,
//! and knows what is there now.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use berth_api::staging_ledger::LedgerBytes;
use berth_api::{StagingLedger, StagingNode, StagingReservation};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry;
use kube::{Api, Client, ResourceExt as _};
use serde_json::Value;
use tokio::task::JoinSet;

use super::follow::{FollowError, Seen, follow};
use super::judge::{Change, Entry, Fact, Place};

/// What is counted.
const KINDS: [&str; 3] = ["StagingLedger", "StagingReservation", "StagingNode"];

/// What the counter has seen.
#[derive(Debug, Default)]
pub struct Record {
    /// Every version since the last [`Counter::take`].
    changes: Vec<Change>,
    /// The last version seen of each object: by kind and name.
    latest: BTreeMap<(&'static str, String), u64>,
    /// Reservations that are there: by name, with where they are.
    reservations: BTreeMap<String, Option<Place>>,
    /// How many entries each ledger has, by pool and node.
    ledgers: BTreeMap<(String, String), usize>,
    /// Why the counting has a gap.
    gap: Option<String>,
}

/// The counting tasks; they end when this is dropped.
pub struct Counter {
    record: Arc<Mutex<Record>>,
    _tasks: JoinSet<()>,
}

impl Counter {
    /// Begins to count the reservations of `namespace`, all ledgers and all nodes.
    pub fn start(client: &Client, namespace: &str) -> Self {
        let record = Arc::new(Mutex::new(Record::default()));
        let mut tasks = JoinSet::new();
        let into = record.clone();
        let api: Api<StagingLedger> = Api::all(client.clone());
        tasks.spawn(async move {
            let error = follow("StagingLedger", api, |seen| lock(&into).ledger(seen)).await;
            lock(&into).interrupted(&error);
        });
        let into = record.clone();
        let api: Api<StagingReservation> = Api::namespaced(client.clone(), namespace);
        tasks.spawn(async move {
            let error = follow("StagingReservation", api, |seen| lock(&into).reservation(seen)).await;
            lock(&into).interrupted(&error);
        });
        let into = record.clone();
        let api: Api<StagingNode> = Api::all(client.clone());
        tasks.spawn(async move {
            let error = follow("StagingNode", api, |seen| lock(&into).node(seen)).await;
            lock(&into).interrupted(&error);
        });
        Self { record, _tasks: tasks }
    }

    /// Where a reservation is: `None` once it is gone, or before it was seen.
    pub fn reservation(&self, name: &str) -> Option<Option<Place>> {
        lock(&self.record).reservations.get(name).cloned()
    }

    /// How many promises a ledger has, if it is there.
    pub fn promises(&self, pool: &str, node: &str) -> Option<usize> {
        lock(&self.record).ledgers.get(&(pool.to_owned(), node.to_owned())).copied()
    }

    /// The last version of an object that was seen.
    pub fn latest(&self, kind: &'static str, name: &str) -> u64 {
        lock(&self.record).latest.get(&(kind, name.to_owned())).copied().unwrap_or_default()
    }

    /// Takes what was recorded so far.
    ///
    /// # Errors
    /// What may have been missed.
    pub fn take(&self) -> Result<Vec<Change>, String> {
        let mut record = lock(&self.record);
        match record.gap.clone() {
            Some(gap) => Err(gap),
            None => Ok(std::mem::take(&mut record.changes)),
        }
    }

    /// Takes what was recorded up to the last version that every watch has reached. While objects still change, one kind
    /// may have been seen further than another, and what is missing would look as if it had not happened.
    ///
    /// # Errors
    /// What may have been missed.
    pub fn take_seen_by_all(&self) -> Result<Vec<Change>, String> {
        let horizon = lock(&self.record).horizon();
        let mut changes = self.take()?;
        changes.retain(|change| change.version <= horizon);
        Ok(changes)
    }
}

fn lock(record: &Mutex<Record>) -> MutexGuard<'_, Record> {
    record.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The object's version as a number: all kinds lie in one etcd, whose revisions they are.
pub fn version_of(object: &impl kube::ResourceExt) -> u64 {
    object.resource_version().and_then(|version| version.parse().ok()).unwrap_or_default()
}

impl Record {
    fn interrupted(&mut self, error: &FollowError) {
        self.gap = Some(error.to_string());
    }

    /// Each watch shows the versions of its kind in order: up to here, nothing is missing.
    fn horizon(&self) -> u64 {
        let reached = |wanted: &str| {
            let of_kind = self.latest.iter().filter(|((kind, _), _)| *kind == wanted);
            of_kind.map(|(_, version)| *version).max().unwrap_or_default()
        };
        KINDS.into_iter().map(reached).min().unwrap_or_default()
    }

    fn push(&mut self, kind: &'static str, name: String, version: u64, fact: Fact) {
        self.latest.insert((kind, name), version);
        self.changes.push(Change { version, fact });
    }

    fn ledger(&mut self, seen: Seen<StagingLedger>) {
        let (ledger, gone) = match seen {
            Seen::Now(ledger) => (ledger, false),
            Seen::Gone(ledger) => (ledger, true),
        };
        let (pool, node) = (ledger.spec.pool_name.clone(), ledger.spec.scope.node_name.clone());
        if gone {
            self.ledgers.remove(&(pool.clone(), node.clone()));
        } else {
            self.ledgers.insert((pool.clone(), node.clone()), ledger.spec.promises.len());
        }
        let entry = |uid: &String| {
            let promise = &ledger.spec.promises[uid];
            Entry {
                class: format!("{:?}", promise.class),
                bytes: promise.data_bytes,
                generation: promise.generation,
                writer: writer(ledger.managed_fields(), uid),
                revoked: promise.revoked_revision,
            }
        };
        let promises = ledger.spec.promises.keys().map(|uid| (uid.clone(), entry(uid))).collect();
        let data = |bytes: &LedgerBytes| bytes.data_bytes;
        let capacity = &ledger.spec.capacity;
        let capacity = [data(&capacity.images), data(&capacity.volumes), data(&capacity.total)];
        let (lineage, revision) = (ledger.spec.lineage.clone(), ledger.spec.revision);
        let fact = Fact::Ledger { pool, node, lineage, revision, capacity, promises, gone };
        self.push("StagingLedger", ledger.name_any(), version_of(&ledger), fact);
    }

    fn reservation(&mut self, seen: Seen<StagingReservation>) {
        let (reservation, gone) = match seen {
            Seen::Now(reservation) => (reservation, false),
            Seen::Gone(reservation) => (reservation, true),
        };
        let assignment = reservation.status.as_ref().and_then(|status| status.assignment.clone());
        let place = assignment.map(|assignment| Place {
            pool: assignment.pool.unwrap_or_default(),
            node: assignment.node,
            generation: assignment.generation,
        });
        let (name, version) = (reservation.name_any(), version_of(&reservation));
        if gone {
            self.reservations.remove(&name);
        } else {
            self.reservations.insert(name.clone(), place.clone());
        }
        let deleting = reservation.metadata.deletion_timestamp.is_some();
        let uid = reservation.uid().unwrap_or_default();
        let finalizers = reservation.finalizers().to_vec();
        let writer = last_writer(reservation.managed_fields());
        let fact = Fact::Reservation { uid, place, deleting, gone, finalizers, writer };
        self.push("StagingReservation", name, version, fact);
    }

    fn node(&mut self, seen: Seen<StagingNode>) {
        let Seen::Now(node) = seen else { return };
        let (mut released, mut obeyed, mut revisions) = (BTreeMap::new(), BTreeSet::new(), BTreeMap::new());
        for pool in node.status.iter().flat_map(|status| &status.pools) {
            released.extend(pool.released.iter().map(|one| (one.uid.clone(), one.generation)));
            obeyed.extend(pool.obeyed.iter().map(|one| one.uid.clone()));
            revisions.insert(pool.name.clone(), pool.obeyed_revision);
        }
        let fact = Fact::Report { node: node.spec.node_name.clone(), released, obeyed, revisions };
        self.push("StagingNode", node.name_any(), version_of(&node), fact);
    }
}

/// Who wrote the object last.
fn last_writer(managed: &[ManagedFieldsEntry]) -> Option<String> {
    managed.iter().max_by_key(|entry| entry.time.clone()).and_then(|entry| entry.manager.clone())
}

/// Who wrote the promise to `uid`: the API server records the owner of each entry, or of the whole map if it is atomic.
fn writer(managed: &[ManagedFieldsEntry], uid: &str) -> Option<String> {
    let key = format!("f:{uid}");
    let promises = |entry: &ManagedFieldsEntry| -> Option<Value> {
        entry.fields_v1.as_ref()?.0.get("f:spec")?.get("f:promises").cloned()
    };
    let whole = |fields: &Value| fields.as_object().is_some_and(serde_json::Map::is_empty);
    let found = managed
        .iter()
        .find(|entry| promises(entry).is_some_and(|map| map.get(&key).is_some() || whole(&map)));
    found.and_then(|entry| entry.manager.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(record: &mut Record, kind: &'static str, version: u64) {
        let node = "n".to_owned();
        let fact = Fact::Report {
            node,
            released: BTreeMap::new(),
            obeyed: BTreeSet::new(),
            revisions: BTreeMap::new(),
        };
        record.push(kind, format!("{kind}-{version}"), version, fact);
    }

    #[test]
    fn only_what_every_watch_has_reached_is_taken_while_objects_change() {
        let record = Arc::new(Mutex::new(Record::default()));
        let counter = Counter { record: record.clone(), _tasks: JoinSet::new() };
        seen(&mut lock(&record), "StagingReservation", 9);
        seen(&mut lock(&record), "StagingLedger", 4);
        assert!(counter.take_seen_by_all().expect("no gap").is_empty(), "nothing of the nodes was seen");
        seen(&mut lock(&record), "StagingNode", 6);
        seen(&mut lock(&record), "StagingLedger", 5);
        let versions: Vec<u64> =
            counter.take_seen_by_all().expect("no gap").iter().map(|change| change.version).collect();
        assert_eq!(versions, [5]);
    }
}
