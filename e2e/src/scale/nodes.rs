//! Nodes that exist as API objects only: each renews its Lease as often as a real one, and reports what it obeys a few seconds
//! after it changed.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use berth_api::defaults::{NODE_LEASE_DURATION_SECONDS, SYSTEM_NAMESPACE, node_manager};
use berth_api::staging_node::StagingNodeSpec;
use berth_api::{StagingLedger, StagingNode, StagingReservation};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use super::seen::World;
use super::stage::NAMESPACE;
use crate::race::fake_node::lease_name;
use crate::race::follow::follow;

/// How often a node renews its Lease, as a real one does.
const RENEW: Duration = Duration::from_secs(15);
/// How often a node looks whether it has something to report.
const REPORT: Duration = Duration::from_secs(4);
/// How many requests of all nodes are under way at once where all of them have something to do.
const AT_ONCE: usize = 8;

/// The nodes, and what is seen; their tasks end when this is dropped.
pub struct Nodes {
    client: Client,
    names: Vec<String>,
    world: Arc<Mutex<World>>,
    silent: Arc<Mutex<BTreeSet<String>>>,
    tasks: JoinSet<()>,
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Nodes {
    /// Makes them, each with its report and then its Lease, and starts to watch.
    ///
    /// # Errors
    /// If one cannot be made.
    pub async fn start(client: &Client, world: World) -> anyhow::Result<Self> {
        let names: Vec<String> = world.pools.keys().cloned().collect();
        let world = Arc::new(Mutex::new(world));
        let mut nodes =
            Self { client: client.clone(), names, world, silent: Arc::default(), tasks: JoinSet::new() };
        let api: Api<StagingNode> = Api::all(client.clone());
        futures::stream::iter(nodes.names.clone())
            .map(|name| {
                let (api, pool) = (api.clone(), nodes.world().node_pool(&name));
                async move {
                    let object = StagingNode::new(&name, StagingNodeSpec { node_name: name.clone() });
                    api.create(&PostParams::default(), &object).await?;
                    let report = json!({ "status": { "pools": [pool] } });
                    api.patch_status(&name, &PatchParams::default(), &Patch::Merge(&report)).await.map(drop)
                }
            })
            .buffer_unordered(AT_ONCE)
            .try_collect::<()>()
            .await
            .context("making the nodes")?;
        nodes.renew_all().await;
        nodes.watch();
        for (at, node) in nodes.names.iter().enumerate() {
            let (renewals, reports) = (turns(RENEW, &nodes.names, at), turns(REPORT, &nodes.names, at));
            let (silent, world) = (nodes.silent.clone(), nodes.world.clone());
            nodes.tasks.spawn(renew_for_ever(client.clone(), renewals, node.clone(), silent));
            nodes.tasks.spawn(report_for_ever(client.clone(), reports, node.clone(), world));
        }
        Ok(nodes)
    }

    /// What was seen so far. Nothing else is seen meanwhile.
    pub fn world(&self) -> MutexGuard<'_, World> {
        lock(&self.world)
    }

    /// Renews every Lease now.
    pub async fn renew_all(&self) {
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), SYSTEM_NAMESPACE);
        let renewals = self.names.iter().map(|node| renew(leases.clone(), node.clone()));
        futures::stream::iter(renewals).buffer_unordered(AT_ONCE).collect::<()>().await;
    }

    /// Lets a node fall silent.
    pub fn silence(&self, node: &str) {
        lock(&self.silent).insert(node.to_owned());
    }

    /// Lets the nodes say of everything that has a place that it is ready.
    pub async fn prepare(&self) {
        let api: Api<StagingReservation> = Api::namespaced(self.client.clone(), NAMESPACE);
        let due = self.world().unprepared();
        futures::stream::iter(due)
            .for_each_concurrent(AT_ONCE, |(name, uid, generation, node)| {
                let api = api.clone();
                async move {
                    let ready = json!({
                        "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation",
                        "metadata": { "name": name, "uid": uid },
                        "status": { "preparedGeneration": generation, "path": format!("/none/{uid}") },
                    });
                    let params = PatchParams::apply(&node_manager(&node)).force();
                    if let Err(error) = api.patch_status(&name, &params, &Patch::Apply(&ready)).await {
                        eprintln!("{node} could not say that {name} is ready: {error}");
                    }
                }
            })
            .await;
    }

    fn watch(&mut self) {
        let (world, api) = (self.world.clone(), Api::<StagingLedger>::all(self.client.clone()));
        self.tasks.spawn(async move {
            let gap = follow("StagingLedger", api, |seen| lock(&world).ledger(seen)).await;
            lock(&world).gap = Some(gap.to_string());
        });
        let (world, api) =
            (self.world.clone(), Api::<StagingReservation>::namespaced(self.client.clone(), NAMESPACE));
        self.tasks.spawn(async move {
            let gap = follow("StagingReservation", api, |seen| lock(&world).reservation(seen)).await;
            lock(&world).gap = Some(gap.to_string());
        });
    }
}

/// A turn for a node in every `period`; the turns of all nodes are spread over it.
fn turns(period: Duration, nodes: &[String], at: usize) -> Interval {
    let part = period / u32::try_from(nodes.len().max(1)).unwrap_or(u32::MAX);
    let mut turns = interval_at(Instant::now() + part * u32::try_from(at).unwrap_or(u32::MAX), period);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    turns
}

/// A node that waits for the API server keeps no other one waiting.
async fn renew_for_ever(
    client: Client,
    mut turns: Interval,
    node: String,
    silent: Arc<Mutex<BTreeSet<String>>>,
) {
    let leases: Api<Lease> = Api::namespaced(client, SYSTEM_NAMESPACE);
    loop {
        turns.tick().await;
        if !lock(&silent).contains(&node) {
            renew(leases.clone(), node.clone()).await;
        }
    }
}

async fn renew(leases: Api<Lease>, node: String) {
    let name = lease_name(&node);
    let lease = json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": { "name": name },
        "spec": {
            "holderIdentity": node, "leaseDurationSeconds": NODE_LEASE_DURATION_SECONDS,
            "renewTime": format!("{:.6}", jiff::Timestamp::now()),
        },
    });
    // The next one comes soon.
    leases.patch(&name, &PatchParams::apply("berth-node").force(), &Patch::Apply(&lease)).await.ok();
}

async fn report_for_ever(client: Client, mut turns: Interval, node: String, world: Arc<Mutex<World>>) {
    let api: Api<StagingNode> = Api::all(client);
    loop {
        turns.tick().await;
        let Some(pool) = lock(&world).report(&node) else { continue };
        let report = json!({ "status": { "pools": [pool] } });
        if api.patch_status(&node, &PatchParams::default(), &Patch::Merge(&report)).await.is_err() {
            lock(&world).report_again(&node);
        }
    }
}
