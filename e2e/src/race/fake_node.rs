//! Nodes that exist as API objects only. They follow the protocol of a node's agent: renew a Lease, report pools, obey
//! a promise only when ledger and assignment agree, and report a release some time after the deletion was seen.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use berth_api::defaults::{NODE_LEASE_DURATION_SECONDS, SYSTEM_NAMESPACE, node_manager};
use berth_api::staging_node::{NodePool, Obeyed, Released, StagingNodeSpec};
use berth_api::{StagingLedger, StagingNode, StagingReservation};
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::follow::{Seen, follow};
use crate::seeded::Seeded;

/// How often a node renews its Lease: fast, so that a restarted operator soon admits again.
const RENEW: Duration = Duration::from_millis(700);
/// How often a node looks whether something is to be done.
const LOOK: Duration = Duration::from_millis(15);

/// A pool on a node.
#[derive(Debug, Clone, Default)]
struct Carried {
    uid: String,
    total: i64,
    lineage: Option<String>,
    revision: i64,
    promised: BTreeMap<String, i64>,
    obeyed: BTreeMap<String, i64>,
    released: BTreeMap<String, i64>,
}

/// A reservation that is assigned to one of the nodes.
#[derive(Debug, Clone)]
struct Work {
    name: String,
    uid: String,
    pool: String,
    node: String,
    generation: i64,
    /// When the bytes will be gone; set when the deletion was seen.
    gone_at: Option<Instant>,
    given_back: bool,
    prepared: bool,
}

#[derive(Debug, Default)]
struct State {
    /// By node and pool.
    pools: BTreeMap<(String, String), Carried>,
    work: BTreeMap<String, Work>,
    /// Nodes whose report is to be written anew.
    dirty: BTreeMap<String, bool>,
}

/// The nodes; their tasks end when this is dropped.
pub struct FakeNodes {
    state: Arc<Mutex<State>>,
    _tasks: JoinSet<()>,
}

/// A node that could not be made.
#[derive(Debug, thiserror::Error)]
#[error("could not make StagingNode {node}")]
pub struct FakeNodeError {
    /// Its name.
    pub node: String,
    /// What the API server answered.
    pub source: kube::Error,
}

impl FakeNodes {
    /// Makes `names` and lets them work for the reservations of `namespace`.
    ///
    /// # Errors
    /// [`FakeNodeError`].
    pub async fn start(
        client: &Client,
        namespace: &str,
        names: &[String],
        seed: u64,
    ) -> Result<Self, FakeNodeError> {
        let state = Arc::new(Mutex::new(State::default()));
        let mut tasks = JoinSet::new();
        let nodes: Api<StagingNode> = Api::all(client.clone());
        for node in names {
            let object = StagingNode::new(node, StagingNodeSpec { node_name: node.clone() });
            let made = nodes.create(&PostParams::default(), &object).await;
            made.map_err(|source| FakeNodeError { node: node.clone(), source })?;
            lock(&state).dirty.insert(node.clone(), true);
            tasks.spawn(renew(client.clone(), node.clone()));
            tasks.spawn(serve(client.clone(), namespace.to_owned(), node.clone(), state.clone()));
        }
        let (into, api) = (state.clone(), Api::<StagingLedger>::all(client.clone()));
        tasks.spawn(async move {
            follow("StagingLedger", api, |seen| lock(&into).ledger(seen)).await;
        });
        let (into, api) = (state.clone(), Api::<StagingReservation>::namespaced(client.clone(), namespace));
        let mut seeded = Seeded::part(seed, 0x6e6f_6465);
        tasks.spawn(async move {
            follow("StagingReservation", api, |seen| lock(&into).reservation(seen, &mut seeded)).await;
        });
        Ok(Self { state, _tasks: tasks })
    }

    /// Lets `node` carry a pool of `total` bytes.
    pub fn carry(&self, node: &str, pool: &str, uid: &str, total: i64) {
        let mut state = lock(&self.state);
        let carried = Carried { uid: uid.to_owned(), total, ..Carried::default() };
        state.pools.insert((node.to_owned(), pool.to_owned()), carried);
        state.dirty.insert(node.to_owned(), true);
    }

    /// Takes a pool off every node.
    pub fn drop_pool(&self, pool: &str) {
        let mut state = lock(&self.state);
        let nodes: Vec<_> = state.pools.keys().filter(|(_, name)| name == pool).cloned().collect();
        for key in nodes {
            state.pools.remove(&key);
            state.dirty.insert(key.0, true);
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn ledger(&mut self, seen: Seen<StagingLedger>) {
        let Seen::Now(ledger) = seen else { return };
        let spec = ledger.spec;
        let key = (spec.scope.node_name, spec.pool_name);
        let Some(pool) = self.pools.get_mut(&key) else { return };
        let lineage = pool.lineage.get_or_insert_with(|| spec.lineage.clone());
        if *lineage != spec.lineage || spec.revision < pool.revision {
            return;
        }
        pool.revision = spec.revision;
        // What the ledger no longer has need not be acknowledged any more.
        pool.released.retain(|uid, _| spec.promises.contains_key(uid));
        let sound = spec.promises.into_iter().filter(|(_, promise)| promise.revoked_revision.is_none());
        pool.promised = sound.map(|(uid, promise)| (uid, promise.generation)).collect();
        self.dirty.insert(key.0, true);
    }

    fn reservation(&mut self, seen: Seen<StagingReservation>, seeded: &mut Seeded) {
        let reservation = match seen {
            Seen::Now(reservation) => reservation,
            Seen::Gone(reservation) => {
                let uid = reservation.uid().unwrap_or_default();
                let obeyed = |work: &Work| {
                    let pool = self.pools.get(&(work.node.clone(), work.pool.clone()));
                    pool.is_some_and(|pool| pool.obeyed.contains_key(&work.uid))
                };
                match self.work.get_mut(&uid) {
                    // It went without asking: the bytes go all the same, or nothing of the pool could be used again.
                    Some(work) if obeyed(work) => work.gone_at = work.gone_at.or(Some(Instant::now())),
                    _ => drop(self.work.remove(&uid)),
                }
                return;
            }
        };
        let uid = reservation.uid().unwrap_or_default();
        let Some(assignment) = reservation.status.as_ref().and_then(|status| status.assignment.clone())
        else {
            return;
        };
        let work = self.work.entry(uid.clone()).or_insert_with(|| Work {
            name: reservation.name_any(),
            uid,
            pool: assignment.pool.clone().unwrap_or_default(),
            node: assignment.node.clone(),
            generation: assignment.generation,
            gone_at: None,
            given_back: false,
            prepared: false,
        });
        if reservation.metadata.deletion_timestamp.is_some() && work.gone_at.is_none() {
            work.gone_at = Some(Instant::now() + seeded.millis(10, 120));
        }
    }

    /// Obeys and releases what is due on `node`; returns whether its report has to be written.
    fn act(&mut self, node: &str) -> bool {
        let mut dirty = self.dirty.insert(node.to_owned(), false).unwrap_or_default();
        for work in self.work.values_mut().filter(|work| work.node == node) {
            let Some(pool) = self.pools.get_mut(&(node.to_owned(), work.pool.clone())) else { continue };
            if work.given_back {
                continue;
            }
            // Also what is being deleted already. Only once a ledger that names it was seen can it be told whether a
            // ledger that does not name it is a later or an earlier one.
            if pool.promised.get(&work.uid) == Some(&work.generation) {
                dirty |= pool.obeyed.insert(work.uid.clone(), work.generation).is_none();
            }
            if work.gone_at.is_some_and(|at| at <= Instant::now()) && pool.obeyed.remove(&work.uid).is_some()
            {
                work.given_back = true;
                pool.released.insert(work.uid.clone(), work.generation);
                dirty = true;
            }
        }
        dirty
    }

    fn report(&self, node: &str) -> Vec<NodePool> {
        let list = |map: &BTreeMap<String, i64>| -> Vec<Released> {
            map.iter()
                .map(|(uid, generation)| Released { uid: uid.clone(), generation: *generation })
                .collect()
        };
        let pools = self.pools.iter().filter(|((carrier, _), _)| carrier == node);
        pools
            .map(|((_, name), pool)| NodePool {
                name: name.clone(),
                uid: pool.uid.clone(),
                usable: true,
                reason: "Ready".to_owned(),
                total_bytes: pool.total,
                lineage: pool.lineage.clone(),
                obeyed_revision: pool.revision,
                released: list(&pool.released),
                obeyed: pool
                    .obeyed
                    .iter()
                    .map(|(uid, generation)| Obeyed {
                        uid: uid.clone(),
                        generation: *generation,
                        ..Obeyed::default()
                    })
                    .collect(),
                ..NodePool::default()
            })
            .collect()
    }

    /// What is obeyed on `node` and not yet said to be ready.
    fn unprepared(&mut self, node: &str) -> Vec<Work> {
        let pools = &self.pools;
        let obeyed = |work: &Work| {
            let pool = pools.get(&(node.to_owned(), work.pool.clone()));
            pool.is_some_and(|pool| pool.obeyed.contains_key(&work.uid))
        };
        let due = self.work.values_mut().filter(|work| work.node == node && !work.prepared && obeyed(work));
        due.map(|work| {
            work.prepared = true;
            work.clone()
        })
        .collect()
    }
}

/// The node's loop. What is obeyed is reported before anything is said to be ready.
async fn serve(client: Client, namespace: String, node: String, state: Arc<Mutex<State>>) {
    let nodes: Api<StagingNode> = Api::all(client.clone());
    let reservations: Api<StagingReservation> = Api::namespaced(client, &namespace);
    let manager = node_manager(&node);
    loop {
        let dirty = lock(&state).act(&node);
        if dirty {
            let report = json!({ "status": { "pools": lock(&state).report(&node) } });
            if nodes.patch_status(&node, &PatchParams::default(), &Patch::Merge(&report)).await.is_err() {
                lock(&state).dirty.insert(node.clone(), true);
            }
        }
        let unprepared = lock(&state).unprepared(&node);
        for work in unprepared {
            let ready = json!({
                "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation",
                "metadata": { "name": work.name, "uid": work.uid },
                "status": { "preparedGeneration": work.generation, "path": format!("/none/{}", work.uid) },
            });
            // A reservation that went meanwhile needs nothing any more.
            reservations
                .patch_status(&work.name, &PatchParams::apply(&manager).force(), &Patch::Apply(&ready))
                .await
                .ok();
        }
        sleep(LOOK).await;
    }
}

/// Renews the node's Lease.
async fn renew(client: Client, node: String) {
    let leases: Api<Lease> = Api::namespaced(client, SYSTEM_NAMESPACE);
    let name = lease_name(&node);
    loop {
        let lease = json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": { "name": name },
            "spec": {
                "holderIdentity": node, "leaseDurationSeconds": NODE_LEASE_DURATION_SECONDS,
                "renewTime": format!("{:.6}", jiff::Timestamp::now()),
            },
        });
        leases.patch(&name, &PatchParams::apply("berth-node").force(), &Patch::Apply(&lease)).await.ok();
        sleep(RENEW).await;
    }
}

/// `berth-node-` and the first 16 hexadecimal digits of the name's SHA-256.
pub(crate) fn lease_name(node: &str) -> String {
    let sum = Sha256::digest(node.as_bytes());
    let hex: String = sum.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("berth-node-{hex}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_api::fields::Assignment;

    fn ledger(revision: i64, promised: bool) -> Seen<StagingLedger> {
        let promise = json!({
            "holder": { "kind": "StagingReservation", "namespace": "race", "name": "r" },
            "class": "Images", "dataBytes": 1, "metadataBytes": 0, "generation": 1,
        });
        let promises = if promised { json!({ "u": promise }) } else { json!({}) };
        let none = json!({ "dataBytes": 9, "metadataBytes": 0 });
        let ledger = json!({
            "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingLedger", "metadata": { "name": "l" },
            "spec": {
                "poolName": "p", "scope": { "nodeName": "n" }, "lineage": "l", "revision": revision,
                "capacity": { "images": none, "volumes": none, "total": none }, "promises": promises,
            },
        });
        Seen::Now(serde_json::from_value(ledger).expect("a ledger"))
    }

    fn deleted() -> StagingReservation {
        let mut reservation: StagingReservation = serde_json::from_value(json!({
            "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation",
            "metadata": { "name": "r", "uid": "u", "deletionTimestamp": "2026-01-01T00:00:00Z" },
            "spec": { "poolName": "p", "maxSize": "1", "access": "File" },
        }))
        .expect("a reservation");
        let assignment = Assignment { pool: Some("p".to_owned()), node: "n".to_owned(), generation: 1 };
        reservation.status.get_or_insert_default().assignment = Some(assignment);
        reservation
    }

    #[test]
    fn what_is_given_back_is_told_until_a_later_ledger_lacks_it() {
        let mut state = State::default();
        let carried = Carried { uid: "pool".to_owned(), total: 9, ..Carried::default() };
        state.pools.insert(("n".to_owned(), "p".to_owned()), carried);
        state.reservation(Seen::Now(deleted()), &mut Seeded::new(1));
        state.work.get_mut("u").expect("assigned here").gone_at = Some(Instant::now());
        let told = |state: &mut State| {
            state.act("n");
            state.report("n")[0].released.len()
        };
        assert_eq!(told(&mut state), 0, "no ledger has promised it yet");
        state.ledger(ledger(1, false));
        assert_eq!(told(&mut state), 0, "this one may be older than the promise");
        state.ledger(ledger(2, true));
        assert_eq!(told(&mut state), 1);
        state.ledger(ledger(1, false));
        assert_eq!(told(&mut state), 1, "the watch of ledgers lags");
        state.ledger(ledger(3, false));
        assert_eq!(told(&mut state), 0, "the operator has taken it in");
    }
}
