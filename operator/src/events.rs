//! Events: each change of state and each refusal, with numbers, in `events.k8s.io/v1`.

use std::sync::Arc;
use std::time::Duration;

use berth_core::metric::Metric;
use berth_core::reason::{Reason, ReasonClass};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::metrics::Metrics;
use crate::telemetry::chain;

/// How many events may wait to be written; more are counted and dropped, because nothing may wait for an event.
const WAITING: usize = 1024;
/// The API server's limit of a note, in bytes.
const NOTE: usize = 1024;
/// How long writing one event may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Takes events and never makes anybody wait.
#[derive(Clone, Debug)]
pub struct Events {
    queue: mpsc::Sender<(Event, ObjectReference)>,
    metrics: Arc<Metrics>,
}

impl Events {
    /// Starts the task that writes them.
    pub fn start(
        client: Client,
        identity: &str,
        metrics: Arc<Metrics>,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Self {
        let reporter =
            Reporter { controller: "berth-operator".to_owned(), instance: Some(identity.to_owned()) };
        let recorder = Recorder::new(client, reporter);
        let (queue, waiting) = mpsc::channel(WAITING);
        let stop = stop.clone();
        tasks.spawn(async move {
            stop.run_until_cancelled(write(recorder, waiting)).await;
        });
        Self { queue, metrics }
    }

    /// Says of `object` that it came to be so because of `reason`.
    pub fn say<K: Resource<DynamicType = ()>>(
        &self,
        object: &K,
        action: &str,
        reason: Reason,
        message: &str,
    ) {
        let type_ = match reason.class() {
            ReasonClass::Normal => EventType::Normal,
            ReasonClass::Transient | ReasonClass::Terminal => EventType::Warning,
        };
        let event = Event {
            type_,
            reason: reason.as_str().to_owned(),
            note: Some(cut(message, NOTE).to_owned()),
            action: action.to_owned(),
            secondary: None,
        };
        if self.queue.try_send((event, object.object_ref(&()))).is_err() {
            self.metrics.add(Metric::EventsDroppedTotal, &[], 1);
        }
    }
}

async fn write(recorder: Recorder, mut waiting: mpsc::Receiver<(Event, ObjectReference)>) {
    while let Some((event, object)) = waiting.recv().await {
        match tokio::time::timeout(PATIENCE, recorder.publish(&event, &object)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(
                    object = object.name,
                    reason = event.reason,
                    error = chain(&error),
                    "event not written"
                );
            }
            Err(_) => {
                tracing::warn!(object = object.name, reason = event.reason, "event not written in time");
            }
        }
    }
}

/// The longest beginning of `text` of at most `most` bytes that ends between characters.
fn cut(text: &str, most: usize) -> &str {
    if text.len() <= most {
        return text;
    }
    let end = (0..=most).rev().find(|end| text.is_char_boundary(*end)).unwrap_or_default();
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::cut;

    #[test]
    fn notes_are_cut_between_characters() {
        assert_eq!(cut("abc", 3), "abc");
        assert_eq!(cut("abcd", 3), "abc");
        assert_eq!(cut("aää", 2), "a");
    }
}
