//! One kind: its watch, its objects, and its queue.

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use berth_core::ids::ObjectName;
use futures::TryStreamExt as _;
use futures::channel::mpsc;
use kube::api::ObjectMeta;
use kube::core::{DeserializeGuard, error_boundary::InvalidObject};
use kube::runtime::controller::ReconcileRequest;
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt as _, watcher as watch_objects};
use kube::{Api, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;

use super::{Observer, State, Touched};
use crate::telemetry::chain;

/// A kind that is watched.
pub trait Observed:
    Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug + Send + Sync + 'static
{
    /// Where its objects are kept.
    fn objects(observer: &Observer) -> &Kind<Self>;
    /// Enters this object into the view, in place of an older form of it.
    fn enter(&self, state: &mut State);
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
    /// The objects as they were last seen.
    pub reader: Store<K>,
    queue: mpsc::UnboundedSender<ReconcileRequest<K>>,
    queued: Mutex<Option<mpsc::UnboundedReceiver<ReconcileRequest<K>>>>,
}

impl<K: Resource<DynamicType = ()> + Clone + 'static> Default for Kind<K> {
    fn default() -> Self {
        let writer = Writer::default();
        let (queue, queued) = mpsc::unbounded();
        Self {
            reader: writer.as_reader(),
            writer: Mutex::new(writer),
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

    fn write(&self, event: &Event<K>) {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner).apply_watcher_event(event);
    }
}

/// Watches a kind for ever. Errors are logged and tried again with growing pauses, as the server asks for.
pub async fn watch<K: Observed>(observer: &Observer) {
    let api: Api<DeserializeGuard<K>> = Api::all(observer.client.clone());
    let events = watch_objects(api, watcher::Config::default()).default_backoff();
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

fn take<K: Observed>(observer: &Observer, event: Event<DeserializeGuard<K>>) {
    match event {
        Event::Apply(DeserializeGuard(Ok(object))) => enter(observer, object, Source::Watch),
        Event::Apply(DeserializeGuard(Err(bad))) => unreadable::<K>(observer, &bad),
        Event::Delete(DeserializeGuard(object)) => leave(observer, &object),
        Event::Init => {
            K::objects(observer).write(&Event::Init);
            let mut state = observer.write();
            state.unreadable.retain(|(kind, _)| *kind != K::kind(&()));
            state.settle_leader();
        }
        Event::InitApply(DeserializeGuard(Ok(object))) => {
            K::objects(observer).write(&Event::InitApply(object));
        }
        Event::InitApply(DeserializeGuard(Err(bad))) => {
            // The last readable form goes through the new list.
            if let Some(last) = observer.stored::<K>(&name_of(&bad.metadata)) {
                K::objects(observer).write(&Event::InitApply(K::clone(&last)));
            }
            unreadable::<K>(observer, &bad);
        }
        Event::InitDone => replace_all::<K>(observer),
    }
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
    let name = name_of(object.meta());
    let touched = object.touched();
    {
        let mut state = observer.write();
        let before = observer.stored::<K>(&name);
        if source == Source::Answer && before.as_ref().is_none_or(|before| before.uid() != object.uid()) {
            return;
        }
        if let Some(before) = before {
            if before.uid() == object.uid() && version(before.meta()) > version(object.meta()) {
                return;
            }
            if before.uid() != object.uid() {
                before.leave(&mut state);
            }
        }
        state.unreadable.remove(&(K::kind(&()).into_owned(), name));
        object.enter(&mut state);
        state.settle_leader();
        K::objects(observer).write(&Event::Apply(object));
    }
    observer.touch(&touched);
}

fn leave<K: Observed>(observer: &Observer, object: &Result<K, InvalidObject>) {
    let name = name_of(object.as_ref().map_or_else(|bad| &bad.metadata, K::meta));
    let mut gone = None;
    {
        let mut state = observer.write();
        state.unreadable.remove(&(K::kind(&()).into_owned(), name.clone()));
        state.settle_leader();
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

fn unreadable<K: Observed>(observer: &Observer, bad: &InvalidObject) {
    let name = name_of(&bad.metadata);
    tracing::error!(kind = %K::kind(&()), object = %name, error = bad.error, "object cannot be read; sweeps pause");
    let mut state = observer.write();
    state.unreadable.insert((K::kind(&()).into_owned(), name));
    state.settle_leader();
}

/// A complete list has arrived: what it does not name is gone. If any object is older in it than it was, the API server
/// went back in time (an etcd restore), and every node has to report anew before its ledgers are trusted.
fn replace_all<K: Observed>(observer: &Observer) {
    let mut backwards = false;
    {
        let mut state = observer.write();
        let before = K::objects(observer).reader.state();
        K::objects(observer).write(&Event::InitDone);
        for old in before {
            let now = observer.stored::<K>(&name_of(old.meta()));
            backwards |=
                now.is_some_and(|now| now.uid() == old.uid() && version(now.meta()) < version(old.meta()));
            old.leave(&mut state);
        }
        for object in K::objects(observer).reader.state() {
            object.enter(&mut state);
        }
        state.settle_leader();
        if backwards {
            tracing::warn!(kind = %K::kind(&()), "the API server went back in time: every node has to report anew");
            super::nodes::forget_reports(&mut state);
        }
    }
    observer.touch(&Touched::Everything);
}

/// Namespace, empty for cluster-scoped kinds, and name.
pub fn name_of(meta: &ObjectMeta) -> ObjectName {
    ObjectName::new(meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
}

/// Resource versions of one resource are numbers that rise, as the API server writes them to etcd; `None` for anything
/// else, which counts as older than every number.
fn version(meta: &ObjectMeta) -> Option<u128> {
    meta.resource_version.as_deref().and_then(|text| text.parse().ok())
}
