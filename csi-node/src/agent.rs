//! The node's agent: observe → plan → execute → report, again whenever something changes.

pub mod asked;
pub mod execute;
pub mod files;
pub mod fill;
pub mod heartbeat;
pub mod jobs;
pub mod lazy;
pub mod news;
pub mod observe;
pub mod pools;
pub mod report;
pub mod sources;
pub mod space;
pub mod stores;
pub mod transfers;
pub mod volumes;
pub mod watches;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_core::node::{Halted, Step, plan};
use berth_core::units::Timestamp;

use self::pools::Pools;
use crate::area::templates;
use crate::node::{Node, now};
use crate::telemetry::chain;

/// At most this long until it looks again, though nothing seems to have changed.
const RESYNC: Duration = Duration::from_secs(5);
/// How often it asks whether the machine should be looked at again.
const PREFLIGHT: Duration = Duration::from_secs(60);
/// How many times in a row it plans before it reports.
const ROUNDS: usize = 16;
/// The first pause after a step has failed, in milliseconds; it doubles up to a minute.
const PAUSE_MILLIS: u64 = 500;

/// Steps that failed, and when they may be tried again.
#[derive(Default)]
struct Failed(BTreeMap<String, (u32, Timestamp)>);

impl Failed {
    fn may_run(&self, step: &Step) -> bool {
        self.0.get(&format!("{step:?}")).is_none_or(|(_, again)| *again <= now())
    }

    /// What may be run now, and nothing behind a step for the same object that may not.
    fn due(&self, steps: Vec<Step>) -> Vec<Step> {
        let mut halted = Halted::default();
        let mut due = |step: &Step| {
            let may = !halted.bars(step) && self.may_run(step);
            if !may {
                halted.note(step);
            }
            may
        };
        steps.into_iter().filter(|step| due(step)).collect()
    }

    fn note(&mut self, step: &Step, ok: bool) {
        let key = format!("{step:?}");
        if ok {
            self.0.remove(&key);
            return;
        }
        if self.0.len() > 4096 {
            self.0.clear();
        }
        let entry = self.0.entry(key).or_default();
        let pause = (PAUSE_MILLIS << entry.0.min(7)).min(60_000);
        *entry = (entry.0.saturating_add(1), Timestamp(now().0 + pause));
    }
}

/// Runs until the node stops. Returns when the pass that was under way has ended.
pub async fn run(node: Arc<Node>) {
    let mut failed = Failed::default();
    let looker = Arc::clone(&node);
    let looking = node.stop.clone().run_until_cancelled_owned(async move {
        loop {
            tokio::time::sleep(PREFLIGHT).await;
            let node = Arc::clone(&looker);
            drop(tokio::task::spawn_blocking(move || node.preflight.refresh()).await);
        }
    });
    tokio::spawn(looking);
    let mut looked = Instant::now(); // it was done at the start
    let mut forgotten = false;
    while !node.stop.is_cancelled() {
        if looked.elapsed() >= RESYNC {
            looked = Instant::now();
            let resuming = Arc::clone(&node);
            drop(tokio::task::spawn_blocking(move || mend(&resuming.pools)).await);
        }
        if !forgotten && node.watches.synced() {
            forgotten = true;
            transfers::forget_others(&node).await;
        }
        pass(&node, &mut failed).await;
        let woken = tokio::time::timeout(RESYNC, node.wake.notified());
        tokio::select! {
            () = node.stop.cancelled() => {}
            _ = woken => {}
        }
    }
}

/// Resumes what was left suspended, and attaches templates that nobody could serve; volumes that start from them are shown
/// then. Blocks.
fn mend(pools: &Pools) {
    let data_plane = pools.data_plane();
    data_plane.resume_left_behind();
    for pool in pools.all() {
        let _turn = pool.turn();
        templates::restore_missing(&pool.record, data_plane);
        if templates::hides_volumes(&pool)
            && let Err(error) = pool.area.start(&pool.record)
        {
            tracing::warn!(pool = %pool.name, error = chain(&error), "what starts from its templates is not shown");
        }
    }
}

/// Plans, executes and reports until nothing can be done at once.
async fn pass(node: &Arc<Node>, failed: &mut Failed) {
    for _ in 0..ROUNDS {
        if !node.watches.synced() {
            return; // what is not known yet must not look like what is not there
        }
        match round(node, failed).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => return tracing::warn!(error = chain(&error), "pass ends early"),
        }
    }
    node.wake.notify_one();
}

/// Plans and executes once; if nothing could be done, reports. True if there may be more to do at once.
async fn round(node: &Arc<Node>, failed: &mut Failed) -> Result<bool, report::ReportError> {
    let begun = node.watches.begun();
    let view = observe::observe(node).await?;
    let steps = failed.due(plan(&view, now()));
    if steps.is_empty() {
        return report::report(node).await;
    }
    let mut halted = Halted::default();
    for step in steps {
        if node.stop.is_cancelled() || node.watches.begun() != begun {
            return Ok(false);
        }
        if halted.bars(&step) {
            continue;
        }
        let ok = run_step(node, &step).await;
        failed.note(&step, ok);
        if !ok {
            halted.note(&step);
        }
    }
    Ok(true)
}

async fn run_step(node: &Arc<Node>, step: &Step) -> bool {
    tracing::debug!(?step, "step");
    match execute::execute(node, step).await {
        Ok(()) => {
            node.metrics.step(step, true);
            true
        }
        Err(error) => {
            node.metrics.step(step, false);
            tracing::warn!(?step, error = chain(&error), "step failed");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_core::ids::Uid;
    use berth_core::units::Generation;

    #[test]
    fn what_follows_a_step_that_rests_for_the_same_object_rests_too() {
        let remove = |uid: &str| Step::RemoveVolume { pool: "p".into(), reservation: Uid::from(uid) };
        let released = |uid: &str| Step::Released {
            pool: "p".into(),
            holder: Uid::from(uid),
            generation: Generation(1),
        };
        let steps = vec![remove("a"), released("a"), remove("b"), released("b")];
        let mut failed = Failed::default();
        assert_eq!(failed.due(steps.clone()), steps);
        failed.note(&remove("a"), false);
        assert_eq!(failed.due(steps.clone()), steps[2..]);
        failed.note(&remove("a"), true);
        assert_eq!(failed.due(steps.clone()), steps);
    }
}
