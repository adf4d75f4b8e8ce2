//! The labels of namespaces, for the limits of tenants. Only metadata is asked for.

use std::collections::BTreeMap;

use futures::TryStreamExt as _;
use k8s_openapi::api::core::v1::Namespace;
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::Event;
use kube::{Api, ResourceExt as _};

use super::{Observer, Touched, history};
use crate::telemetry::chain;

type Labels = BTreeMap<String, String>;

/// Watches for ever. Errors are logged and tried again with growing pauses; what was seen last stays.
pub async fn watch(observer: &Observer) {
    let api: Api<PartialObjectMeta<Namespace>> = Api::all(observer.client.clone());
    let events = history::events(observer, api);
    let mut events = std::pin::pin!(events);
    let (mut first, mut listing) = (true, BTreeMap::new());
    loop {
        match events.try_next().await {
            Ok(Some(Event::Init)) => listing.clear(),
            Ok(Some(Event::InitApply(namespace))) => {
                let (name, labels) = read(&namespace);
                listing.insert(name, labels);
            }
            Ok(Some(Event::InitDone)) => {
                let all = std::mem::take(&mut listing);
                change(observer, |known| *known = all);
                if std::mem::take(&mut first) {
                    observer.one_synced();
                }
            }
            Ok(Some(Event::Apply(namespace))) => {
                let (name, labels) = read(&namespace);
                change(observer, |known| drop(known.insert(name, labels)));
            }
            Ok(Some(Event::Delete(namespace))) => {
                change(observer, |known| drop(known.remove(&namespace.name_any())));
            }
            Ok(None) => return,
            Err(error) => tracing::warn!(kind = "Namespace", error = chain(&error), "watch interrupted"),
        }
    }
}

fn read(namespace: &PartialObjectMeta<Namespace>) -> (String, Labels) {
    (namespace.name_any(), namespace.labels().clone())
}

/// Makes a change of what is known. If it matters to a pool, everything is looked at again: that is rare.
fn change(observer: &Observer, make: impl FnOnce(&mut BTreeMap<String, Labels>)) {
    let matters = {
        let mut state = observer.write();
        let before = state.view.namespaces.clone();
        make(&mut state.view.namespaces);
        let limited = state.view.pools.values().any(|pool| !pool.tenant_limits.is_empty());
        limited && before != state.view.namespaces
    };
    if matters {
        observer.touch(&Touched::Everything);
    }
}
