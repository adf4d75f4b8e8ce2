//! Events: each change of state and each refusal, with numbers, in `events.k8s.io/v1`.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

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

/// How many events of the normal course of things may be written in a row.
const BURST: u32 = 200;
/// How many more of them may be written per second. What they say is in the objects' conditions as well.
const PER_SECOND: u32 = 5;

/// What is left for events of the normal course of things.
#[derive(Debug)]
struct Budget {
    left: u32,
    since: Instant,
}

impl Budget {
    /// Takes one, if there is one.
    fn take(&mut self, now: Instant) -> bool {
        let new = u32::try_from(now.duration_since(self.since).as_millis()).unwrap_or(u32::MAX);
        let new = new.saturating_mul(PER_SECOND) / 1000;
        if new > 0 {
            (self.left, self.since) = (self.left.saturating_add(new).min(BURST), now);
        }
        let taken = self.left > 0;
        self.left = self.left.saturating_sub(1);
        taken
    }
}

/// Takes events and never makes anybody wait.
#[derive(Clone, Debug)]
pub struct Events {
    queue: mpsc::Sender<(Event, ObjectReference)>,
    budget: Arc<Mutex<Budget>>,
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
        let budget = Arc::new(Mutex::new(Budget { left: BURST, since: Instant::now() }));
        Self { queue, budget, metrics }
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
        let mut budget = self.budget.lock().unwrap_or_else(PoisonError::into_inner);
        if reason.class() == ReasonClass::Normal && !budget.take(Instant::now()) {
            return;
        }
        drop(budget);
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
    use super::*;

    #[test]
    fn normal_events_are_few_when_there_are_many() {
        let start = Instant::now();
        let mut budget = Budget { left: BURST, since: start };
        let taken = |budget: &mut Budget, at| {
            (0..1000).filter(|_| budget.take(start + Duration::from_millis(at))).count()
        };
        assert_eq!(taken(&mut budget, 0), 200);
        assert_eq!(taken(&mut budget, 1000), 5);
        assert_eq!(taken(&mut budget, 1150), 0);
        assert_eq!(taken(&mut budget, 1200), 1);
    }

    #[test]
    fn notes_are_cut_between_characters() {
        assert_eq!(cut("abc", 3), "abc");
        assert_eq!(cut("abcd", 3), "abc");
        assert_eq!(cut("aää", 2), "a");
    }
}
