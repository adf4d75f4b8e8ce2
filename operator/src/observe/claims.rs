//! Which claims and `PersistentVolumes` Kubernetes has: of the former metadata alone, of the latter the volumes that they name.
//!
//! **Guarantees.** Nothing is said of them until both lists were whole. An error of a watch changes nothing: what is decided
//! of them is confirmed by the API server before anything goes. Without the rights to watch them, nothing is ever said.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use berth_api::parse::{SELECTED_NODE, named_reservation};
use berth_core::ids::{NodeName, Uid};
use berth_core::view::Claims;
use futures::TryStreamExt as _;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::Event;
use kube::{Api, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Observer, history};
use crate::telemetry::chain;

/// Both lists, as far as they are known.
#[derive(Debug, Default)]
pub struct Known {
    claims: Option<BTreeMap<Uid, Option<NodeName>>>,
    volumes: Option<BTreeMap<String, Uid>>,
}

impl Known {
    fn tell(&self, grace: Duration) -> Option<Claims> {
        let named: BTreeSet<Uid> = self.volumes.as_ref()?.values().cloned().collect();
        let grace_millis = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        Some(Claims { selected: self.claims.clone()?, named, grace_millis })
    }
}

/// Starts both watches.
pub fn spawn(observer: &Arc<Observer>, tasks: &TaskTracker, stop: &CancellationToken) {
    let (one, token) = (observer.clone(), stop.clone());
    tasks.spawn(async move {
        let api: Api<PartialObjectMeta<PersistentVolumeClaim>> = Api::all(one.client.clone());
        let read = |claim: &PartialObjectMeta<PersistentVolumeClaim>| {
            let selected = claim.annotations().get(SELECTED_NODE).map(|node| NodeName::from(node.as_str()));
            Some((Uid::from(claim.uid()?), selected))
        };
        token.run_until_cancelled(watch(&one, api, read, |known| &mut known.claims)).await
    });
    let (one, token) = (observer.clone(), stop.clone());
    tasks.spawn(async move {
        let api: Api<PersistentVolume> = Api::all(one.client.clone());
        let read = |volume: &PersistentVolume| Some((volume.name_any(), named_reservation(volume)?));
        token.run_until_cancelled(watch(&one, api, read, |known| &mut known.volumes)).await
    });
}

/// Keeps one of the lists.
async fn watch<O, K, V>(
    observer: &Observer,
    api: Api<O>,
    read: impl Fn(&O) -> Option<(K, V)>,
    list: impl Fn(&mut Known) -> &mut Option<BTreeMap<K, V>>,
) where
    O: Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug + Send + 'static,
    K: Ord,
    V: PartialEq,
{
    let events = history::events(observer, api);
    let mut events = std::pin::pin!(events);
    let mut listing = BTreeMap::new();
    loop {
        match events.try_next().await {
            Ok(Some(Event::Init)) => listing.clear(),
            Ok(Some(Event::InitApply(object))) => listing.extend(read(&object)),
            Ok(Some(Event::InitDone)) => {
                let whole = std::mem::take(&mut listing);
                change(observer, |known| {
                    *list(known) = Some(whole);
                    true
                });
            }
            Ok(Some(Event::Apply(object))) => change(observer, |known| {
                let Some((key, value)) = read(&object) else { return false };
                let Some(all) = list(known) else { return false };
                if all.get(&key) == Some(&value) {
                    return false;
                }
                all.insert(key, value);
                true
            }),
            Ok(Some(Event::Delete(object))) => change(observer, |known| {
                let key = read(&object).map(|(key, _)| key);
                key.and_then(|key| list(known).as_mut()?.remove(&key)).is_some()
            }),
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(kind = %O::kind(&()), error = chain(&error), "watch interrupted");
            }
        }
    }
}

/// Makes a change of what is known. Reservations are looked at from time to time anyway, which is soon enough.
fn change(observer: &Observer, make: impl FnOnce(&mut Known) -> bool) {
    let mut state = observer.write();
    if make(&mut state.known_claims) {
        state.view.claims = state.known_claims.tell(observer.claim_grace);
    }
}
