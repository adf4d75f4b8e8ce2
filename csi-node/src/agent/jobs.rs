//! Long work: one task per key, stopped by its key, never two with the same.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use berth_core::node::view::JobKey;
use thiserror::Error;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long a job may take to stop.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// How long a job that panicked rests before it may begin again.
const PANIC_PAUSE: Duration = Duration::from_secs(5);

/// A job does not stop.
#[derive(Debug, Error)]
#[error("{kind:?} of {uid} has not stopped within {limit:?}", kind = key.kind, uid = key.uid, limit = STOP_LIMIT)]
pub struct StillRunning {
    /// Which.
    pub key: JobKey,
}

struct Running {
    cancel: CancellationToken,
    ended: watch::Receiver<()>,
}

/// The jobs of a node.
pub struct Jobs {
    running: Arc<Mutex<BTreeMap<JobKey, Running>>>,
    tasks: TaskTracker,
    wake: Arc<Notify>,
    stop: CancellationToken,
}

fn lock(running: &Mutex<BTreeMap<JobKey, Running>>) -> MutexGuard<'_, BTreeMap<JobKey, Running>> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Jobs {
    /// None yet. All are told to stop when `stop` is cancelled; `wake` is rung when one ends.
    pub fn new(wake: Arc<Notify>, stop: CancellationToken) -> Self {
        Self { running: Arc::default(), tasks: TaskTracker::new(), wake, stop }
    }

    /// What runs.
    pub fn keys(&self) -> BTreeSet<JobKey> {
        lock(&self.running).keys().cloned().collect()
    }

    /// Starts `work`, unless work with this key runs already. It is to end soon after its token is cancelled.
    pub fn start<F: Future<Output = ()> + Send + 'static>(
        &self,
        key: JobKey,
        work: impl FnOnce(CancellationToken) -> F,
    ) {
        let mut running = lock(&self.running);
        if running.contains_key(&key) || self.stop.is_cancelled() {
            return;
        }
        let cancel = self.stop.child_token();
        let (alive, ended) = watch::channel(());
        running.insert(key.clone(), Running { cancel: cancel.clone(), ended });
        drop(running);
        let task = tokio::spawn(work(cancel));
        let (jobs, wake) = (Arc::clone(&self.running), Arc::clone(&self.wake));
        self.tasks.spawn(async move {
            if let Err(error) = task.await {
                tracing::error!(?key, %error, "job panicked");
                tokio::time::sleep(PANIC_PAUSE).await;
            }
            lock(&jobs).remove(&key);
            drop(alive);
            wake.notify_one();
        });
    }

    /// Stops the work with this key, and returns when it has ended.
    pub async fn stop(&self, key: &JobKey) -> Result<(), StillRunning> {
        let ended = lock(&self.running).get(key).map(|job| {
            job.cancel.cancel();
            job.ended.clone()
        });
        let Some(mut ended) = ended else { return Ok(()) };
        let gone = tokio::time::timeout(STOP_LIMIT, async { while ended.changed().await.is_ok() {} });
        gone.await.map_err(|_| StillRunning { key: key.clone() })
    }

    /// Waits until every job has ended, after `stop` was cancelled; at most `limit`.
    pub async fn drain(&self, limit: Duration) {
        self.tasks.close();
        if tokio::time::timeout(limit, self.tasks.wait()).await.is_err() {
            tracing::warn!(jobs = ?self.keys(), "jobs are cut off");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_core::node::view::JobKind;
    use berth_core::units::Generation;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn key() -> JobKey {
        JobKey { kind: JobKind::Fill, uid: "u".into(), generation: Generation(1) }
    }

    #[tokio::test]
    async fn one_per_key_and_gone_when_stopped() {
        let jobs = Jobs::new(Arc::default(), CancellationToken::new());
        let begun = Arc::new(AtomicUsize::new(0));
        for _ in 0..3 {
            let begun = Arc::clone(&begun);
            jobs.start(key(), |cancel| async move {
                begun.fetch_add(1, Ordering::SeqCst);
                cancel.cancelled().await;
            });
        }
        assert_eq!(jobs.keys().len(), 1);
        jobs.stop(&key()).await.unwrap();
        assert_eq!((jobs.keys().len(), begun.load(Ordering::SeqCst)), (0, 1));
        jobs.stop(&key()).await.unwrap();
    }

    #[tokio::test]
    async fn the_end_of_the_program_ends_all() {
        let stop = CancellationToken::new();
        let jobs = Jobs::new(Arc::default(), stop.clone());
        jobs.start(key(), |cancel| async move { cancel.cancelled().await });
        stop.cancel();
        jobs.drain(Duration::from_secs(5)).await;
        assert!(jobs.keys().is_empty());
        jobs.start(key(), |_| async {});
        assert!(jobs.keys().is_empty(), "nothing begins any more");
    }
}
