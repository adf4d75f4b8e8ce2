//! The API server as far as one pass of the operator meets it: lists and single objects that a test chose, and every
//! request noted. What is listed and what is read one by one may differ, as a watch lags behind what is stored.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::{Method, Request, Response};
use berth_operator::apply::Applier;
use berth_operator::events::Events;
use berth_operator::metrics::Metrics;
use berth_operator::observe::Observer;
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long the first lists may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// What else is watched, by plural.
const WATCHED_BESIDE: &[&str] =
    &["leases", "namespaces", "nodes", "persistentvolumeclaims", "persistentvolumes"];
/// Where the kinds are.
pub const KINDS: &str = "/apis/staging.berth.dev/v1alpha1";

/// What is stored, and what was asked.
#[derive(Clone, Default)]
pub struct ApiServer {
    /// What each watch shows, by the plural of its kind.
    pub listed: BTreeMap<&'static str, Vec<Value>>,
    /// What is read and written one by one, by path.
    pub stored: BTreeMap<String, Value>,
    asked: Arc<Mutex<Vec<(Method, String, Value)>>>,
}

impl ApiServer {
    /// Writes that were asked for, each with its path and body. Events are not counted.
    pub fn writes(&self) -> Vec<(Method, String, Value)> {
        let asked = self.asked.lock().unwrap();
        let is_write = |one: &&(Method, String, Value)| one.0 != Method::GET && !one.1.contains("/events");
        asked.iter().filter(is_write).cloned().collect()
    }

    /// The notes of events that were written.
    pub fn notes(&self) -> Vec<String> {
        let asked = self.asked.lock().unwrap();
        let events =
            asked.iter().filter(|(method, path, _)| *method == Method::POST && path.contains("/events"));
        events.map(|(.., event)| event["note"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// How often this path was read.
    pub fn reads(&self, path: &str) -> usize {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|(method, asked, _)| *method == Method::GET && asked == path).count()
    }

    async fn answer(&self, request: Request<Body>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path().to_owned();
        let query = parts.uri.query().unwrap_or_default();
        if query.split('&').any(|pair| pair == "watch=true" || pair == "watch=1") {
            return std::future::pending().await; // nothing changes
        }
        let body = body.collect_bytes().await.expect("a request's body is in memory");
        let body = serde_json::from_slice(&body).unwrap_or_default();
        self.asked.lock().unwrap().push((parts.method.clone(), path.clone(), body));
        let plural = path.rsplit('/').next().unwrap_or_default();
        let object = path.strip_suffix("/status").unwrap_or(&path);
        let (status, answer) = match self.stored.get(object) {
            Some(stored) => (200, stored.clone()),
            None if path == format!("{KINDS}/{plural}") || WATCHED_BESIDE.contains(&plural) => {
                let items = self.listed.get(plural).cloned().unwrap_or_default();
                (
                    200,
                    json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": "50"}, "items": items}),
                )
            }
            None => (
                404,
                json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}),
            ),
        };
        Response::builder().status(status).body(answer.to_string().into_bytes().into()).expect("a response")
    }

    /// An operator whose watches have shown all that is listed.
    pub async fn operator(&self) -> Operator {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let server = server.clone();
            async move { Ok::<_, Infallible>(server.answer(request).await) }
        });
        let client = Client::new(service, "default");
        let (stop, tasks, metrics) = (CancellationToken::new(), TaskTracker::new(), Arc::default());
        let (observer, confirmations) =
            Observer::new(client.clone(), "berth-system".to_owned(), Duration::ZERO);
        let observer = Arc::new(observer);
        let events = Events::start(client.clone(), "a", Arc::<Metrics>::clone(&metrics), &tasks, &stop);
        observer.start(events.clone(), confirmations, &tasks, &stop);
        tokio::time::timeout(PATIENCE, observer.wait_until_synced()).await.expect("every kind is listed");
        let applier = Applier::new(client, Arc::clone(&observer), events, metrics, "a");
        Operator { applier, observer, _stop: stop.drop_guard() }
    }
}

/// The writing side of an operator, and what it sees.
pub struct Operator {
    pub applier: Applier,
    pub observer: Arc<Observer>,
    _stop: tokio_util::sync::DropGuard,
}
