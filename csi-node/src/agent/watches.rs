//! What the API server shows this node: its own objects, and the pools and stores that all share.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use berth_api::{
    ImageStore, ImageTransfer, StagedImage, StagingLedger, StagingNode, StagingPool, StagingReservation,
    TemplateImport,
};
use berth_core::ids::{NodeName, node_lease_name};
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Node as KubeNode;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::reflector::{self, Store};
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, DefaultBackoff, watcher};
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
    /// Transfers that are assigned to it.
    pub transfers: Store<ImageTransfer>,
    /// All image stores.
    pub stores: Store<ImageStore>,
    /// Its own report.
    pub report: Store<StagingNode>,
    /// Of each watch, the beginning whose list it has shown.
    listed: Vec<Arc<AtomicU64>>,
    changes: watch::Receiver<u64>,
    /// The version of each of its own objects that was met last, by kind.
    versions: Mutex<HashMap<String, Option<u128>>>,
    /// How often they began: once, and whenever the API server had gone back in time.
    begun: watch::Sender<u64>,
}

/// What every watch needs to run.
struct Starter {
    wake: Arc<Notify>,
    stop: CancellationToken,
    listed: Vec<Arc<AtomicU64>>,
    changes: watch::Sender<u64>,
    begun: watch::Sender<u64>,
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
        let (changes, changed) = watch::channel(0);
        let begun = watch::Sender::new(1);
        let mut starter = Starter { wake, stop, listed: Vec::new(), changes, begun: begun.clone() };
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
            transfers: starter.start(Api::all(client.clone()), by("status.assignment.node")),
            stores: starter.start(Api::all(client.clone()), watcher::Config::default()),
            report: starter.start(Api::all(client.clone()), by("metadata.name")),
            listed: starter.listed,
            changes: changed,
            versions: Mutex::default(),
            begun,
        }
    }

    /// True once every watch has shown a list, of after the API server last went back in time.
    pub fn synced(&self) -> bool {
        let begun = *self.begun.borrow();
        self.listed.iter().all(|listed| listed.load(Ordering::Acquire) == begun)
    }

    /// How often they began. What was seen before the last time may be of a state that is no more.
    pub fn begun(&self) -> u64 {
        *self.begun.borrow()
    }

    /// Takes note of an object of this node's that the API server has just shown, `None` if it is not there, or written. Versions of
    /// an object only rise: if it is older than it was, or gone though nobody deletes it, the API server went back in time, as
    /// after an etcd restore. Watches from before are silent until it has come as far again, so all begin anew, and until each
    /// has shown a list nothing is obeyed or reported.
    pub fn met<K: Resource<DynamicType = ()>>(&self, object: Option<&K>) {
        let version = object.and_then(|object| object.meta().resource_version.as_deref()?.parse().ok());
        let mut versions = self.versions.lock().unwrap_or_else(PoisonError::into_inner);
        let before: Option<u128> = versions.insert(K::kind(&()).into_owned(), version).flatten();
        drop(versions);
        if version < before {
            tracing::warn!("the API server went back in time: every watch begins anew");
            self.begun.send_modify(|count| *count += 1);
        }
    }

    /// Counts what was seen: changes whenever anything does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }
}

impl Starter {
    fn start<K>(&mut self, api: Api<K>, config: watcher::Config) -> Store<K>
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    {
        let (reader, mut writer) = reflector::store();
        let listed = Arc::new(AtomicU64::new(0));
        self.listed.push(Arc::clone(&listed));
        let (wake, changes) = (Arc::clone(&self.wake), self.changes.clone());
        let (stop, mut begun) = (self.stop.clone(), self.begun.subscribe());
        tokio::spawn(stop.run_until_cancelled_owned(async move {
            let begin = || Box::pin(watcher(api.clone(), config.clone()).backoff(Pauses::default()));
            let (mut events, mut which) = (begin(), *begun.borrow_and_update());
            loop {
                let event = tokio::select! {
                    event = events.next() => event,
                    Ok(()) = begun.changed() => {
                        (events, which) = (begin(), *begun.borrow_and_update());
                        continue;
                    }
                };
                let Some(event) = event else { return };
                if let Ok(event) = &event {
                    writer.apply_watcher_event(event);
                }
                match event {
                    Ok(watcher::Event::InitDone) => listed.store(which, Ordering::Release),
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

/// How long a watch that failed waits before it begins again: as usual, but [`LONGEST_PAUSE`] at most, so that a node hears of
/// its work soon after an API server is back that was away.
#[derive(Default)]
struct Pauses(DefaultBackoff);

/// See [`Pauses`].
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.0.next().map(|pause| pause.min(LONGEST_PAUSE))
    }
}

impl Backoff for Pauses {
    fn reset(&mut self) {
        self.0.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_api_server_that_is_back_is_heard_within_seconds() {
        let mut pauses = Pauses::default();
        let waited: Vec<_> = pauses.by_ref().take(20).collect();
        assert_eq!(waited.len(), 20, "it is tried for ever");
        assert!(waited.iter().all(|pause| *pause <= LONGEST_PAUSE), "{waited:?}");
        assert!(waited[19] > waited[0], "the pauses grow: {waited:?}");
        pauses.reset();
        assert!(pauses.next() < Some(LONGEST_PAUSE), "and begin anew");
    }
}
