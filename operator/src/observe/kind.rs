//! One kind: its watch, its objects, and its queue.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use berth_api::parse;
use berth_core::ids::ObjectName;
use berth_core::reason::Reason;
use futures::TryStreamExt as _;
use futures::channel::mpsc;
use kube::api::ObjectMeta;
use kube::runtime::controller::ReconcileRequest;
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher::Event;
use kube::{Api, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;

use super::guarded::{Bad, Guarded};
use super::{Observer, State, Touched, history};
use crate::telemetry::chain;

/// A kind that is watched.
pub trait Observed:
    Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug + Send + Sync + 'static
{
    /// Where its objects are kept.
    fn objects(observer: &Observer) -> &Kind<Self>;
    /// Enters this object into the view, in place of an older form of it. False if the view is as it was before.
    fn enter(&self, state: &mut State) -> bool;
    /// Takes this object out of the view.
    fn leave(&self, state: &mut State);
    /// What a change of this object is to the controllers.
    fn touched(&self) -> Touched;
}

/// The objects of one kind, and those that are to be looked at.
#[derive(Debug)]
pub struct Kind<K: Resource<DynamicType = ()> + Clone + 'static>
where
    K::DynamicType: Eq + Hash,
{
    writer: Mutex<Writer<K>>,
    relist: Mutex<Option<Relist<K>>>,
    /// The objects as they were last seen.
    pub reader: Store<K>,
    queue: mpsc::UnboundedSender<ReconcileRequest<K>>,
    queued: Mutex<Option<mpsc::UnboundedReceiver<ReconcileRequest<K>>>>,
}

/// A list of the whole kind while it arrives. It shows one moment, and may be older than an answer to our own write that
/// came since.
#[derive(Debug)]
struct Relist<K> {
    /// The newest form of each object that was entered meanwhile, and the version that it had before.
    entered: BTreeMap<ObjectName, (Arc<K>, Option<u128>)>,
    /// Objects in the list that cannot be read.
    unreadable: BTreeSet<ObjectName>,
}

impl<K> Default for Relist<K> {
    fn default() -> Self {
        Self { entered: BTreeMap::new(), unreadable: BTreeSet::new() }
    }
}

impl<K: Resource<DynamicType = ()> + Clone + 'static> Default for Kind<K> {
    fn default() -> Self {
        let writer = Writer::default();
        let (queue, queued) = mpsc::unbounded();
        Self {
            reader: writer.as_reader(),
            writer: Mutex::new(writer),
            relist: Mutex::default(),
            queue,
            queued: Mutex::new(Some(queued)),
        }
    }
}

impl<K: Resource<DynamicType = ()> + Clone + 'static> Kind<K> {
    /// Asks for an object to be looked at; asked for twice, it is looked at once.
    pub fn queue(&self, object: ObjectRef<K>) {
        if self.queue.unbounded_send(object.into()).is_err() {
            tracing::debug!(kind = %K::kind(&()), "nothing is looked at any more");
        }
    }

    /// The receiving end of the queue; there is one.
    pub fn take_queue(&self) -> Option<mpsc::UnboundedReceiver<ReconcileRequest<K>>> {
        self.queued.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Every object, as it was last seen.
    pub fn all(&self) -> Vec<Arc<K>> {
        self.reader.state()
    }

    fn relist(&self) -> MutexGuard<'_, Option<Relist<K>>> {
        self.relist.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, event: &Event<K>) {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner).apply_watcher_event(event);
    }
}

/// Watches a kind for ever. Errors are logged and tried again with growing pauses, as the server asks for.
pub async fn watch<K: Observed>(observer: &Observer) {
    let api: Api<Guarded<K>> = Api::all(observer.client.clone());
    let events = history::events(observer, api);
    let mut events = std::pin::pin!(events);
    let mut listed = false;
    loop {
        match events.try_next().await {
            Ok(Some(event)) => {
                let done = matches!(event, Event::InitDone);
                take(observer, event);
                if done && !listed {
                    listed = true;
                    observer.one_synced();
                }
            }
            Ok(None) => return,
            Err(error) => tracing::warn!(kind = %K::kind(&()), error = chain(&error), "watch interrupted"),
        }
    }
}

fn take<K: Observed>(observer: &Observer, event: Event<Guarded<K>>) {
    match event {
        Event::Apply(Guarded(Ok(object))) => enter(observer, object, Source::Watch),
        Event::Apply(Guarded(Err(bad))) => unreadable::<K>(observer, &bad),
        Event::Delete(Guarded(object)) => leave(observer, &object),
        Event::Init => {
            // What could not be read stays so until the list is whole: sweeps need all of the truth.
            let _state = observer.write();
            K::objects(observer).write(&Event::Init);
            *K::objects(observer).relist() = Some(Relist::default());
        }
        Event::InitApply(Guarded(Ok(object))) => {
            K::objects(observer).write(&Event::InitApply(slim(object)));
        }
        Event::InitApply(Guarded(Err(bad))) => {
            // The last readable form goes through the new list.
            if let Some(last) = observer.stored::<K>(&name_of(&bad.metadata)) {
                K::objects(observer).write(&Event::InitApply(K::clone(&last)));
            }
            unreadable::<K>(observer, &bad);
            if let Some(relist) = &mut *K::objects(observer).relist() {
                relist.unreadable.insert(name_of(&bad.metadata));
            }
        }
        Event::InitDone => replace_all::<K>(observer),
    }
}

/// Without what nothing here reads: who wrote which field is often most of an object.
fn slim<K: Observed>(mut object: K) -> K {
    object.meta_mut().managed_fields = None;
    object
}

/// Where the form of an object comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A watch.
    Watch,
    /// The answer to a request of our own. It may arrive after the watch has shown the object's end, so it never brings
    /// an object into the view.
    Answer,
}

/// Takes one object in, unless a newer form of it is known: watches lag behind the answers to our own writes.
pub fn enter<K: Observed>(observer: &Observer, object: K, source: Source) {
    let object = slim(object);
    let name = name_of(object.meta());
    let touched = object.touched();
    let changed = {
        let mut state = observer.write();
        let before = observer.stored::<K>(&name);
        if source == Source::Answer && before.as_ref().is_none_or(|before| before.uid() != object.uid()) {
            return;
        }
        let mut version_before = None;
        if let Some(before) = before {
            version_before = version(before.meta());
            if before.uid() == object.uid() && version(before.meta()) > version(object.meta()) {
                return;
            }
            if before.uid() != object.uid() {
                before.leave(&mut state);
            }
        }
        state.show(&K::kind(&()), &name);
        let changed = object.enter(&mut state);
        if let Some(relist) = &mut *K::objects(observer).relist() {
            let form = Arc::new(object.clone());
            let entered = relist.entered.entry(name).or_insert_with(|| (Arc::clone(&form), version_before));
            entered.0 = form;
        }
        K::objects(observer).write(&Event::Apply(object));
        changed
    };
    if changed {
        observer.touch(&touched);
    }
}

fn leave<K: Observed>(observer: &Observer, object: &Result<K, Bad>) {
    let name = name_of(object.as_ref().map_or_else(|bad| &bad.metadata, K::meta));
    let mut gone = None;
    {
        let mut state = observer.write();
        state.show(&K::kind(&()), &name);
        if let Some(last) = observer.stored::<K>(&name) {
            last.leave(&mut state);
            K::objects(observer).write(&Event::Delete(K::clone(&last)));
            gone = Some(last.touched());
        }
    }
    if let Some(touched) = gone {
        observer.touch(&touched);
    }
}

fn unreadable<K: Observed>(observer: &Observer, bad: &Bad) {
    let object = parse::unreadable(&K::kind(&()), &bad.metadata, bad.problem.clone());
    tracing::error!(%object, "sweeps pause");
    if let Some(events) = observer.events.get() {
        let named = Guarded::<K>(Err(bad.clone()));
        let message = format!("{object}. Nothing is decided about it, and sweeps and reclaim rest");
        events.say(&named, "Read", Reason::ObjectUnreadable, &message);
    }
    observer.write().hide(object);
}

/// A complete list has arrived: what it does not name is gone. If any object is older in it than it was, the API server
/// went back in time (an etcd restore), and every node has to report anew before its ledgers are trusted. What was entered
/// while the list arrived may be newer than it: that stays, and does not count.
fn replace_all<K: Observed>(observer: &Observer) {
    let mut backwards = false;
    {
        let mut state = observer.write();
        let objects = K::objects(observer);
        let Relist { entered, unreadable } = objects.relist().take().unwrap_or_default();
        let before = objects.reader.state();
        objects.write(&Event::InitDone);
        for old in before {
            let name = name_of(old.meta());
            let known = entered.get(&name).map_or_else(|| version(old.meta()), |(_, before)| *before);
            let now = observer.stored::<K>(&name);
            backwards |= now.is_some_and(|now| now.uid() == old.uid() && version(now.meta()) < known);
            old.leave(&mut state);
        }
        for (newer, _) in entered.into_values().filter(|_| !backwards) {
            let listed = observer.stored::<K>(&name_of(newer.meta()));
            let same = listed.filter(|listed| listed.uid() == newer.uid());
            if same.is_some_and(|listed| version(listed.meta()) < version(newer.meta())) {
                objects.write(&Event::Apply(K::clone(&newer)));
            }
        }
        let kind = K::kind(&());
        state.view.unreadable.retain(|one| one.kind != kind || unreadable.contains(&one.name));
        for object in K::objects(observer).reader.state() {
            object.enter(&mut state);
        }
    }
    if backwards {
        observer.went_back();
    }
    observer.touch(&Touched::Everything);
}

/// Namespace, empty for cluster-scoped kinds, and name.
pub fn name_of(meta: &ObjectMeta) -> ObjectName {
    ObjectName::new(meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
}

/// Resource versions of one resource are numbers that rise, as the API server writes them to etcd; `None` for anything
/// else, which counts as older than every number.
pub fn version(meta: &ObjectMeta) -> Option<u128> {
    meta.resource_version.as_deref().and_then(|text| text.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::{Request, Response};
    use berth_api::StagingPool;
    use berth_core::ids::NodeName;
    use berth_core::view::View;
    use kube::Client;
    use kube::client::Body;
    use std::time::Duration;

    fn observer() -> Observer {
        let nobody = tower::service_fn(|_: Request<Body>| async {
            Err::<Response<Body>, _>(std::io::Error::other("nobody listens"))
        });
        Observer::new(Client::new(nobody, "berth-system"), "berth-system".to_owned(), Duration::ZERO).0
    }

    fn pool(name: &str, version: u64) -> StagingPool {
        let pool = serde_json::json!({
            "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingPool",
            "metadata": {"name": name, "uid": format!("u-{name}"), "resourceVersion": version.to_string()},
            "spec": {"backend": {"filesystem": {"path": "/x", "size": "1Gi"}}},
        });
        serde_json::from_value(pool).expect("readable")
    }

    fn list(observer: &Observer, pools: &[(&str, u64)], meanwhile: impl FnOnce(&Observer)) {
        take::<StagingPool>(observer, Event::Init);
        for (name, version) in pools {
            take(observer, Event::InitApply(Guarded(Ok(pool(name, *version)))));
        }
        meanwhile(observer);
        take::<StagingPool>(observer, Event::InitDone);
    }

    /// One node that has reported.
    fn trusted() -> Observer {
        let observer = observer();
        observer.write().confirmed.insert(NodeName::from("n"));
        observer.write().view.kube_nodes = Some([NodeName::from("n")].into());
        list(&observer, &[("a", 10), ("b", 11)], |_| ());
        observer
    }

    #[tokio::test]
    async fn a_node_that_is_not_heard_yet_is_told_of_until_it_reports_or_is_lost() {
        let observer = trusted();
        let name = NodeName::from("n");
        let node = berth_core::view::NodeState {
            name: name.clone(),
            version: berth_core::view::ObjectVersion::default(),
            live: true,
            reported: false,
            silent: false,
            zone: None,
            pools: BTreeMap::new(),
        };
        observer.write().view.nodes.insert(name.clone(), node);
        let unheard = || {
            observer.judge_unheard();
            observer.view(|view| view.unheard)
        };
        assert!(unheard());
        observer.write().view.nodes.values_mut().for_each(|node| node.reported = true);
        assert!(!unheard());
        observer.went_back();
        assert!(observer.view(|view| view.unheard) && unheard(), "at once, and until it reports anew");
        observer.write().view.nodes.values_mut().for_each(|node| node.silent = true);
        assert!(!unheard(), "it is lost");
    }

    fn version_of(observer: &Observer, name: &str) -> Option<u128> {
        version(observer.stored::<StagingPool>(&ObjectName::new("", name))?.meta())
    }

    fn trusts(observer: &Observer) -> bool {
        !observer.read().confirmed.is_empty()
    }

    #[tokio::test]
    async fn an_answer_that_comes_during_a_new_list_stays_and_is_no_step_back_in_time() {
        let observer = trusted();
        list(&observer, &[("a", 10), ("b", 11)], |observer| observer.absorb(pool("a", 12)));
        assert_eq!((version_of(&observer, "a"), version_of(&observer, "b")), (Some(12), Some(11)));
        assert!(trusts(&observer));
        list(&observer, &[("a", 12)], |observer| observer.absorb(pool("b", 13)));
        assert_eq!(version_of(&observer, "b"), None, "what the list does not name is gone");
        assert!(trusts(&observer));
    }

    #[tokio::test]
    async fn a_list_that_is_older_is_a_step_back_in_time_whatever_was_entered_meanwhile() {
        for meanwhile in [false, true] {
            let observer = trusted();
            list(&observer, &[("a", 9), ("b", 11)], |observer| {
                if meanwhile {
                    observer.absorb(pool("a", 12));
                }
            });
            assert!(!trusts(&observer), "{meanwhile}");
            assert_eq!(
                observer.view(|view| view.kube_nodes.clone()),
                None,
                "nor is any node known to be gone"
            );
            assert_eq!(version_of(&observer, "a"), Some(9));
        }
    }

    #[tokio::test]
    async fn sweeps_pause_until_a_new_list_is_whole() {
        let observer = trusted();
        observer.set_leader(true);
        let sweeps = |observer: &Observer| observer.view(View::sweeps);
        assert!(sweeps(&observer));
        let bad = || {
            let text = r#"{"metadata": {"name": "bad", "resourceVersion": "12"}, "spec": 7}"#;
            serde_json::from_str::<Guarded<StagingPool>>(text).expect("guarded")
        };
        take(&observer, Event::Apply(bad()));
        assert!(!sweeps(&observer));
        let said = observer.view(|view| view.unreadable[0].to_string());
        assert!(said.starts_with("StagingPool bad cannot be read: spec: invalid type"), "{said}");
        assert!(observer.view(|view| view.leader), "it still admits");
        take::<StagingPool>(&observer, Event::Init);
        assert!(!sweeps(&observer), "the list that may still name it is not there");
        take(&observer, Event::InitApply(bad()));
        take::<StagingPool>(&observer, Event::InitDone);
        assert!(!sweeps(&observer), "it still cannot be read");
        list(&observer, &[("a", 10), ("b", 11)], |_| ());
        assert!(sweeps(&observer), "it is gone");
    }
}
