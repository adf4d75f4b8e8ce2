//! What is done once the API server has gone back in time, as after an etcd restore.
//!
//! A watch from before asks for what comes after a version that the server has not reached again: it shows nothing, and no error.
//! So no report counts any more then, and every watch begins anew with a list. That it happened is told by the Lease
//! (`lease.rs`), and by a list that shows an older object than a watch did (`kind.rs`).

use std::fmt::Debug;
use std::pin::Pin;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt as _, stream};
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, DefaultBackoff, Event};
use kube::runtime::{WatchStreamExt as _, watcher as watch_objects};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;

use super::{Observer, nodes};

impl Observer {
    /// To be told that the API server has gone back in time: no report counts until it was made anew, and nothing that a
    /// watch has shown until a list shows it.
    pub fn went_back(&self) {
        tracing::warn!(
            "the API server went back in time: every watch begins anew, and every node has to report anew"
        );
        // First the count: an answer that is on its way is of before.
        self.restarts.send_modify(|count| *count += 1);
        *self.since.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        nodes::forget_reports(&mut self.write());
    }
}

/// How long to wait before a watch that failed begins again: as usual, but [`LONGEST_PAUSE`] at most, so that an API server
/// that was away is heard soon after it is back.
#[derive(Default)]
pub struct Pauses(DefaultBackoff);

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

/// The events of a watch, which begins anew whenever the API server has gone back in time.
pub fn events<K>(observer: &Observer, api: Api<K>) -> impl Stream<Item = watcher::Result<Event<K>>> + Send
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    type Events<K> = Pin<Box<dyn Stream<Item = watcher::Result<Event<K>>> + Send>>;
    let begin = move || -> Events<K> {
        Box::pin(watch_objects(api.clone(), watcher::Config::default()).backoff(Pauses::default()))
    };
    let restarts = observer.restarts.subscribe();
    stream::unfold((begin(), begin, restarts), |(mut events, begin, mut restarts)| async move {
        loop {
            tokio::select! {
                event = events.next() => return event.map(|event| (event, (events, begin, restarts))),
                Ok(()) = restarts.changed() => events = begin(),
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use axum::http::{Request, Response};
    use kube::Client;
    use kube::client::Body;
    use tokio_util::sync::CancellationToken;
    use tokio_util::task::TaskTracker;

    use super::super::Observer;
    use crate::events::Events;
    use crate::metrics::Metrics;

    /// How often each path was listed.
    type Lists = Arc<Mutex<BTreeMap<String, usize>>>;

    /// An API server that has nothing, and counts who lists it. Its watches never show anything.
    fn empty(lists: &Lists) -> Client {
        let lists = lists.clone();
        let server = tower::service_fn(move |request: Request<Body>| {
            let lists = lists.clone();
            async move {
                if request.uri().query().is_some_and(|query| query.contains("watch=true")) {
                    std::future::pending::<()>().await;
                }
                let mut lists = lists.lock().expect("no panic");
                *lists.entry(request.uri().path().to_owned()).or_default() += 1;
                let empty = serde_json::json!({
                    "apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": "1"}, "items": [],
                });
                Ok::<_, std::io::Error>(Response::new(Body::from(empty.to_string().into_bytes())))
            }
        });
        Client::new(server, "berth-system")
    }

    async fn until(
        lists: &Lists,
        ready: impl Fn(&BTreeMap<String, usize>) -> bool,
    ) -> BTreeMap<String, usize> {
        for _ in 0..500 {
            let now = lists.lock().expect("no panic").clone();
            if ready(&now) {
                return now;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not in time: {:?}", lists.lock())
    }

    #[tokio::test]
    async fn every_watch_begins_anew() {
        let lists = Lists::default();
        let client = empty(&lists);
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let (observer, confirmations) =
            Observer::new(client.clone(), "berth-system".to_owned(), Duration::ZERO);
        let observer = Arc::new(observer);
        let events = Events::start(client, "here", Arc::new(Metrics::default()), &tasks, &stop);
        observer.start(events, confirmations, &tasks, &stop);
        // Eight kinds of ours, namespaces, Leases, nodes, claims and PersistentVolumes.
        let before = until(&lists, |lists| lists.len() == 13).await;
        assert!(before.values().all(|times| *times == 1), "{before:?}");
        observer.went_back();
        until(&lists, |lists| lists.values().all(|times| *times == 2)).await;
        stop.cancel();
    }
}
