//! What the API server shows this node: its own objects, and the pools and stores that all share.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use berth_api::{
    ImageStore, StagedImage, StagingLedger, StagingNode, StagingPool, StagingReservation, TemplateImport,
};
use berth_core::ids::{NodeName, node_lease_name};
use futures::{StreamExt as _, pin_mut};
use k8s_openapi::api::core::v1::Node as KubeNode;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::reflector::{self, Store};
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

/// Label on the CSI reservations that this node made: the name of its Lease.
pub const LABEL_MADE_BY: &str = "staging.berth.dev/made-by";

/// The watches of one node.
pub struct Watches {
    /// All pools.
    pub pools: Store<StagingPool>,
    /// The Kubernetes node itself.
    pub node: Store<KubeNode>,
    /// Its ledgers.
    pub ledgers: Store<StagingLedger>,
    /// Its staged images.
    pub images: Store<StagedImage>,
    /// Reservations that are assigned to it.
    pub assigned: Store<StagingReservation>,
    /// CSI reservations that it made, assigned or not.
    pub made: Store<StagingReservation>,
    /// Imports that are assigned to it.
    pub imports: Store<TemplateImport>,
    /// All image stores.
    pub stores: Store<ImageStore>,
    /// Its own report.
    pub report: Store<StagingNode>,
    unsynced: Arc<AtomicUsize>,
    changes: watch::Receiver<u64>,
}

/// What every watch needs to run.
struct Starter {
    wake: Arc<Notify>,
    stop: CancellationToken,
    unsynced: Arc<AtomicUsize>,
    changes: watch::Sender<u64>,
}

impl Watches {
    /// Starts all watches of `node`. They end with `stop`.
    pub fn start(
        client: &Client,
        node: &NodeName,
        namespace: &str,
        wake: Arc<Notify>,
        stop: CancellationToken,
    ) -> Self {
        let unsynced = Arc::new(AtomicUsize::new(0));
        let (changes, changed) = watch::channel(0);
        let starter = Starter { wake, stop, unsynced: Arc::clone(&unsynced), changes };
        let by = |field: &str| watcher::Config::default().fields(&format!("{field}={node}"));
        let label = format!("{LABEL_MADE_BY}={}", node_lease_name(node));
        Self {
            pools: starter.start(Api::all(client.clone()), watcher::Config::default()),
            node: starter.start(Api::all(client.clone()), by("metadata.name")),
            ledgers: starter.start(Api::all(client.clone()), by("spec.scope.nodeName")),
            images: starter.start(Api::all(client.clone()), by("spec.nodeName")),
            assigned: starter.start(Api::all(client.clone()), by("status.assignment.node")),
            made: starter
                .start(Api::namespaced(client.clone(), namespace), watcher::Config::default().labels(&label)),
            imports: starter.start(Api::all(client.clone()), by("status.assignment.node")),
            stores: starter.start(Api::all(client.clone()), watcher::Config::default()),
            report: starter.start(Api::all(client.clone()), by("metadata.name")),
            unsynced,
            changes: changed,
        }
    }

    /// True once every watch has shown its first list.
    pub fn synced(&self) -> bool {
        self.unsynced.load(Ordering::Acquire) == 0
    }

    /// Counts what was seen: changes whenever anything does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }
}

impl Starter {
    fn start<K>(&self, api: Api<K>, config: watcher::Config) -> Store<K>
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    {
        let (reader, writer) = reflector::store();
        self.unsynced.fetch_add(1, Ordering::AcqRel);
        let (wake, unsynced, changes) =
            (Arc::clone(&self.wake), Arc::clone(&self.unsynced), self.changes.clone());
        let stop = self.stop.clone();
        tokio::spawn(stop.run_until_cancelled_owned(async move {
            let events = watcher(api, config).default_backoff().reflect(writer);
            pin_mut!(events);
            let mut listed = false;
            while let Some(event) = events.next().await {
                match event {
                    Ok(watcher::Event::InitDone) if !listed => {
                        listed = true;
                        unsynced.fetch_sub(1, Ordering::AcqRel);
                    }
                    Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => continue,
                    Ok(_) => {}
                    Err(error) => {
                        tracing::warn!(kind = %K::kind(&()), error = crate::telemetry::chain(&error), "watch interrupted");
                        continue;
                    }
                }
                changes.send_modify(|seen| *seen += 1);
                wake.notify_one();
            }
        }));
        reader
    }
}
