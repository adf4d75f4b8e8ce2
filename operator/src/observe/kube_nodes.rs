//! Which nodes Kubernetes has: by their metadata alone.
//!
//! **Guarantees.** Nothing is said of them until a node that is alive would have renewed its Lease since this operator began
//! to watch, so that one which is missing here and silent there is gone. An error of the watch changes nothing. After the API
//! server went back in time, all of this begins anew, with a new list.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use berth_api::defaults::NODE_LEASE_DURATION_SECONDS;
use berth_core::ids::NodeName;
use futures::TryStreamExt as _;
use k8s_openapi::api::core::v1::Node;
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt as _, watcher as watch_objects};
use kube::{Api, ResourceExt as _};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Observer, Touched, history};
use crate::telemetry::chain;

/// Starts the watch.
pub fn spawn(observer: &Arc<Observer>, tasks: &TaskTracker, stop: &CancellationToken) {
    let (observer, stop) = (observer.clone(), stop.clone());
    tasks.spawn(async move { stop.run_until_cancelled(watch(&observer)).await });
}

async fn watch(observer: &Observer) {
    let mut restarts = observer.restarts.subscribe();
    loop {
        let times = *restarts.borrow_and_update();
        tokio::select! {
            () = watch_until_restart(observer, times) => return,
            changed = restarts.changed() => if changed.is_err() { return },
        }
    }
}

async fn watch_until_restart(observer: &Observer, times: u64) {
    let api: Api<PartialObjectMeta<Node>> = Api::all(observer.client.clone());
    let events = watch_objects(api, watcher::Config::default()).backoff(history::Pauses::default());
    let mut events = std::pin::pin!(events);
    let mut nodes = Nodes::default();
    let lease = Duration::from_secs(u64::from(NODE_LEASE_DURATION_SECONDS.unsigned_abs()));
    let mut settled = Instant::now() + lease;
    let mut told = false;
    loop {
        let event = tokio::select! {
            event = events.try_next() => event,
            () = tokio::time::sleep_until(settled), if !told && nodes.listed => {
                told = true;
                publish(observer, times, &nodes.present);
                continue;
            }
        };
        if told && observer.view(|view| view.kube_nodes.is_none()) {
            // Forgotten: it counts again once a list has come, and after as long as at the start.
            (told, nodes.listed, settled) = (false, false, Instant::now() + lease);
        }
        match event {
            Ok(Some(event)) => {
                if nodes.take(event) && told {
                    publish(observer, times, &nodes.present);
                }
            }
            Ok(None) => return,
            Err(error) => tracing::warn!(kind = "Node", error = chain(&error), "watch interrupted"),
        }
    }
}

fn publish(observer: &Observer, times: u64, nodes: &BTreeSet<NodeName>) {
    {
        let mut state = observer.write();
        if *observer.restarts.borrow() != times {
            return;
        }
        state.view.kube_nodes = Some(nodes.clone());
    }
    // Nodes come and go seldom, and all that is on one may be concerned.
    observer.touch(&Touched::Everything);
}

/// The nodes, as far as the watch has told.
#[derive(Debug, Default)]
struct Nodes {
    present: BTreeSet<NodeName>,
    listing: BTreeSet<NodeName>,
    listed: bool,
}

impl Nodes {
    /// Takes an event in; true if other nodes are present than before.
    fn take(&mut self, event: Event<PartialObjectMeta<Node>>) -> bool {
        match event {
            Event::Init => {
                self.listing.clear();
                false
            }
            Event::InitApply(node) => {
                self.listing.insert(NodeName(node.name_any()));
                false
            }
            Event::InitDone => {
                self.listed = true;
                let listed = std::mem::take(&mut self.listing);
                std::mem::replace(&mut self.present, listed) != self.present
            }
            Event::Apply(node) => self.present.insert(NodeName(node.name_any())),
            Event::Delete(node) => self.present.remove(&NodeName(node.name_any())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> PartialObjectMeta<Node> {
        let mut node = PartialObjectMeta::<Node>::default();
        node.metadata.name = Some(name.to_owned());
        node
    }

    #[test]
    fn a_list_replaces_what_was_known_only_once_it_is_complete() {
        let mut nodes = Nodes::default();
        assert!(!nodes.take(Event::Init) && !nodes.take(Event::InitApply(node("a"))));
        assert!(!nodes.listed && nodes.present.is_empty());
        assert!(nodes.take(Event::InitDone) && nodes.listed);
        assert!(nodes.take(Event::Apply(node("b"))) && !nodes.take(Event::Apply(node("b"))));
        assert!(!nodes.take(Event::Init) && !nodes.take(Event::InitApply(node("b"))));
        assert_eq!(nodes.present.len(), 2, "a list that is cut off takes nothing away");
        assert!(nodes.take(Event::InitDone));
        assert_eq!(nodes.present, BTreeSet::from([NodeName::from("b")]));
        assert!(nodes.take(Event::Delete(node("b"))) && !nodes.take(Event::Delete(node("b"))));
    }
}
