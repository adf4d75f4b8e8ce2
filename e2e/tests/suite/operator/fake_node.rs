//! A node made of API objects alone: it reports, renews its Lease, obeys its ledger, and releases when told to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use berth_api::staging_ledger::LedgerPromise;
use berth_api::staging_node::{NodePool, Obeyed, Released, StagingNodeSpec, StagingNodeStatus};
use berth_api::{StagedImage, StagingLedger, StagingNode, StagingReservation};
use berth_e2e::cluster::SYSTEM_NAMESPACE;
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::task::JoinHandle;

/// Between two looks of the node.
const PERIOD: Duration = Duration::from_millis(100);

/// How long its requests may fail before that is a fault.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running fake node; dropping it silences it.
pub struct FakeNode {
    releases: Arc<AtomicBool>,
    in_use: Arc<Mutex<BTreeSet<String>>>,
    written: Arc<AtomicI64>,
    reachable: Arc<AtomicBool>,
    client: Arc<Mutex<Client>>,
    task: JoinHandle<anyhow::Error>,
}

/// What the node remembers, as its record would.
struct Memory {
    client: Client,
    name: String,
    pool: String,
    total: i64,
    lineage: Option<String>,
    revision: i64,
    obeyed: BTreeMap<String, LedgerPromise>,
    released: BTreeMap<String, i64>,
    in_use: Arc<Mutex<BTreeSet<String>>>,
    /// Bytes that are written in the pool.
    written: Arc<AtomicI64>,
    /// Its ledger is older than what it has obeyed, or is gone.
    behind: bool,
}

impl FakeNode {
    /// Makes the node's objects and starts it: it carries `pool` with `total` bytes.
    pub async fn start(client: Client, name: &str, pool: &str, total: i64) -> anyhow::Result<Self> {
        let in_use = Arc::new(Mutex::new(BTreeSet::new()));
        let written = Arc::new(AtomicI64::new(0));
        let mut memory = Memory {
            in_use: in_use.clone(),
            written: written.clone(),
            client,
            name: name.to_owned(),
            pool: pool.to_owned(),
            total,
            lineage: None,
            revision: 0,
            obeyed: BTreeMap::new(),
            released: BTreeMap::new(),
            behind: false,
        };
        let nodes: Api<StagingNode> = Api::all(memory.client.clone());
        let node = StagingNode::new(name, StagingNodeSpec { node_name: name.to_owned() });
        nodes.create(&PostParams::default(), &node).await.context("make the StagingNode")?;
        let releases = Arc::new(AtomicBool::new(true));
        let may_release = releases.clone();
        let reachable = Arc::new(AtomicBool::new(true));
        let reaches = reachable.clone();
        let latest = Arc::new(Mutex::new(memory.client.clone()));
        let client = latest.clone();
        memory.round(&releases).await?;
        let task = tokio::spawn(async move {
            let mut well = Instant::now();
            loop {
                memory.client = latest.lock().unwrap_or_else(PoisonError::into_inner).clone();
                if !reaches.load(Ordering::SeqCst) {
                    well = Instant::now();
                } else if let Err(error) = memory.round(&may_release).await {
                    // An API server that is on its way back may refuse for a while what it allows later.
                    if well.elapsed() > PATIENCE {
                        return error;
                    }
                } else {
                    well = Instant::now();
                }
                tokio::time::sleep(PERIOD).await;
            }
        });
        Ok(Self { releases, in_use, written, reachable, client, task })
    }

    /// Goes on with other credentials: those of a node end with its Node object.
    pub fn use_client(&self, client: Client) {
        *self.client.lock().unwrap_or_else(PoisonError::into_inner) = client;
    }

    /// Whether it reaches the API server. What it remembers stays, as on its disk.
    pub fn set_reachable(&self, reachable: bool) {
        self.reachable.store(reachable, Ordering::SeqCst);
    }

    /// Whether it gives bytes back when a reservation is deleted.
    pub fn set_releases(&self, releases: bool) {
        self.releases.store(releases, Ordering::SeqCst);
    }

    /// Whether something on it uses the reservation with this UID.
    pub fn set_in_use(&self, uid: &str, used: bool) {
        let mut in_use = self.in_use.lock().unwrap_or_else(PoisonError::into_inner);
        if used {
            in_use.insert(uid.to_owned());
        } else {
            in_use.remove(uid);
        }
    }

    /// How many bytes are written in its pool.
    pub fn set_written(&self, bytes: i64) {
        self.written.store(bytes, Ordering::SeqCst);
    }

    /// The fault that ended it, if one did.
    pub async fn fault(self) -> Option<anyhow::Error> {
        if self.task.is_finished() {
            return Some((&mut { self }.task).await.unwrap_or_else(anyhow::Error::from));
        }
        None
    }
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Memory {
    /// One look: obey, release, report, and only then renew the Lease.
    async fn round(&mut self, releases: &AtomicBool) -> anyhow::Result<()> {
        let ledgers: Api<StagingLedger> = Api::all(self.client.clone());
        let fields = ListParams::default().fields(&format!("spec.scope.nodeName={}", self.name));
        let ledgers = ledgers.list(&fields).await.context("list ledgers")?;
        let reservations: Api<StagingReservation> = Api::all(self.client.clone());
        let fields = ListParams::default().fields(&format!("status.assignment.node={}", self.name));
        let reservations = reservations.list(&fields).await.context("list reservations")?;
        let images: Api<StagedImage> = Api::all(self.client.clone());
        let mut images = images.list(&ListParams::default()).await.context("list images")?.items;
        images.retain(|image| image.spec.node_name == self.name && image.spec.pool_name == self.pool);
        // Read after what was listed: a deletion seen there came after the order to keep the bytes.
        let releases = releases.load(Ordering::SeqCst);
        let holders = self.holders(&reservations.items, &images);
        match ledgers.iter().find(|ledger| ledger.spec.pool_name == self.pool) {
            Some(ledger) => self.obey(ledger, &holders, releases),
            None => self.behind = self.lineage.is_some(),
        }
        self.report().await.context("report")?;
        self.prepare(&reservations.items).await.context("prepare")?;
        self.renew().await.context("renew the Lease")
    }

    /// Whoever may hold a promise here: generation, and whether it is being deleted.
    fn holders(
        &self,
        reservations: &[StagingReservation],
        images: &[StagedImage],
    ) -> BTreeMap<String, (i64, bool)> {
        let mut holders = BTreeMap::new();
        for reservation in reservations {
            let assigned = reservation.status.as_ref().and_then(|status| status.assignment.as_ref());
            if let Some(assigned) = assigned.filter(|a| a.pool.as_ref() == Some(&self.pool)) {
                let leaving = reservation.metadata.deletion_timestamp.is_some();
                holders.insert(reservation.uid().unwrap_or_default(), (assigned.generation, leaving));
            }
        }
        for image in images {
            let leaving = image.metadata.deletion_timestamp.is_some();
            holders.insert(image.uid().unwrap_or_default(), (1, leaving));
        }
        holders
    }

    /// Releases go on whatever the ledger is; nothing new is obeyed of one that lacks what was obeyed before.
    fn obey(&mut self, ledger: &StagingLedger, holders: &BTreeMap<String, (i64, bool)>, releases: bool) {
        let spec = &ledger.spec;
        let own = self.lineage.clone().unwrap_or_else(|| spec.lineage.clone());
        let from = spec.rebuilt_from.as_ref();
        let follows = own == spec.lineage
            || from.is_some_and(|from| from.lineage == own && from.revision >= self.revision);
        let complete = self.obeyed.iter().all(|(uid, held)| {
            spec.promises.get(uid).is_some_and(|promise| promise.generation == held.generation)
        });
        self.behind = !follows || spec.revision < self.revision || !complete;
        for (uid, (generation, _)) in holders.iter().filter(|(_, (_, leaving))| *leaving && releases) {
            if self.obeyed.remove(uid).is_some() || spec.promises.contains_key(uid) {
                self.released.insert(uid.clone(), *generation);
            }
        }
        if self.behind {
            return;
        }
        self.lineage = Some(spec.lineage.clone());
        self.revision = spec.revision;
        self.released.retain(|uid, _| spec.promises.contains_key(uid));
        for (uid, (generation, _)) in holders.iter().filter(|(_, (_, leaving))| !leaving) {
            if let Some(promise) = spec.promises.get(uid).filter(|promise| promise.generation == *generation)
            {
                self.obeyed.insert(uid.clone(), promise.clone());
            }
        }
        // What the ledger has revoked is given back without an object that asks for it.
        for (uid, promise) in spec.promises.iter().filter(|(_, p)| p.revoked_revision.is_some() && releases) {
            if self.obeyed.remove(uid).is_some() {
                self.released.insert(uid.clone(), promise.generation);
            }
        }
    }

    async fn report(&self) -> kube::Result<()> {
        let released = self.released.iter();
        let obeyed = self.obeyed.iter().map(|(uid, promise)| Obeyed {
            uid: uid.clone(),
            generation: promise.generation,
            recorded: self.behind.then(|| promise.clone()),
        });
        let pool = NodePool {
            name: self.pool.clone(),
            usable: true,
            reason: "Ready".to_owned(),
            total_bytes: self.total,
            used_bytes: self.written.load(Ordering::SeqCst),
            lineage: self.lineage.clone(),
            obeyed_revision: self.revision,
            released: released
                .map(|(uid, generation)| Released { uid: uid.clone(), generation: *generation })
                .collect(),
            obeyed: obeyed.collect(),
            in_use: self.in_use.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect(),
            ..NodePool::default()
        };
        let status = StagingNodeStatus { pools: vec![pool], ..StagingNodeStatus::default() };
        let body = json!({
            "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingNode",
            "metadata": {"name": self.name}, "status": status,
        });
        let nodes: Api<StagingNode> = Api::all(self.client.clone());
        nodes.patch_status(&self.name, &self.manager(), &Patch::Apply(body)).await.map(drop)
    }

    /// Says of what it has obeyed that it is ready.
    async fn prepare(&self, reservations: &[StagingReservation]) -> kube::Result<()> {
        for reservation in reservations {
            let Some(promise) = self.obeyed.get(&reservation.uid().unwrap_or_default()) else { continue };
            let generation = &promise.generation;
            let namespace = reservation.namespace().unwrap_or_default();
            let status = reservation.status.clone().unwrap_or_default();
            if status.prepared_generation == Some(*generation)
                || reservation.metadata.deletion_timestamp.is_some()
            {
                continue;
            }
            let body = json!({
                "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation",
                "metadata": {"name": reservation.name_any(), "uid": reservation.uid()},
                "status": {"preparedGeneration": generation, "path": "/staging"},
            });
            let api: Api<StagingReservation> = Api::namespaced(self.client.clone(), &namespace);
            match api.patch_status(&reservation.name_any(), &self.manager(), &Patch::Apply(body)).await {
                Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => {}
                other => other.map(drop)?,
            }
        }
        Ok(())
    }

    async fn renew(&self) -> kube::Result<()> {
        let hash = Sha256::digest(self.name.as_bytes());
        let hex: String = hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        let name = format!("berth-node-{hex}");
        let now = jiff::Timestamp::now();
        let body = json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name},
            "spec": {
                "holderIdentity": self.name, "leaseDurationSeconds": 40,
                "renewTime": format!("{now:.6}"),
            },
        });
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), SYSTEM_NAMESPACE);
        leases.patch(&name, &self.manager(), &Patch::Apply(body)).await.map(drop)
    }

    fn manager(&self) -> PatchParams {
        PatchParams::apply(&format!("berth-node/{}", self.name)).force()
    }
}
