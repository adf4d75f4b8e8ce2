//! What the controllers share, and how one pass goes: look, decide, apply.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use berth_api::StagingLedger;
use berth_core::change::Change;
use berth_core::ids::{ObjectName, PoolName};
use berth_core::units::Timestamp;
use berth_core::view::View;

use crate::admission::Admission;
use crate::apply::{Applier, ApplyError, Outcome};
use crate::metrics::Metrics;
use crate::observe::Observer;
use crate::sabotage;

/// How often a decision is taken again because the ledger that it wants to write is another one by now.
const LEDGER_ROUNDS: usize = 4;

/// A pool is looked at this often at most: what it holds changes with every promise.
const POOL_PACE: Duration = Duration::from_secs(1);
/// Where there are many pools, so much longer for each.
const POOLS_PACE: Duration = Duration::from_millis(50);

/// How long the writes of one pass may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the controllers share.
pub struct Context {
    /// The only reader.
    pub observer: Arc<Observer>,
    /// The only writer.
    pub applier: Applier,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Requests without a place.
    pub admission: Admission,
    pools: Mutex<BTreeMap<PoolName, Arc<tokio::sync::Mutex<()>>>>,
    passes: Mutex<BTreeMap<String, Instant>>,
    failures: Mutex<BTreeMap<(&'static str, ObjectName), u32>>,
}

impl Context {
    /// Ready to be used.
    pub fn new(observer: Arc<Observer>, applier: Applier, metrics: Arc<Metrics>) -> Self {
        Self {
            observer,
            applier,
            metrics,
            admission: Admission::default(),
            pools: Mutex::default(),
            passes: Mutex::default(),
            failures: Mutex::default(),
        }
    }

    /// One pass. Writes of the ledgers of one pool by this process follow each other, each decided after the one before it, so
    /// that only other operators are met in compare-and-swap.
    pub async fn decide_and_apply(
        &self,
        decide: impl Fn(&View, Timestamp) -> Vec<Change>,
    ) -> Result<Outcome, ApplyError> {
        let decide = || {
            self.observer.judge_unheard();
            self.observer.view(|view| decide(&released_early(view), now()))
        };
        let mut changes = decide();
        for _ in 0..LEDGER_ROUNDS {
            let Some(wanted) = self.pool_of(&changes) else { break };
            let _held = self.hold(&BTreeSet::from([wanted.clone()])).await;
            changes = decide();
            if self.pool_of(&changes).as_ref() == Some(&wanted) {
                return self.apply(&changes).await;
            }
        }
        match ledger_of(&changes) {
            // The decision does not settle on one pool: let others go first.
            Some(name) => {
                Err(ApplyError::Conflict { operation: "choose", object: format!("StagingLedger {name}") })
            }
            None => self.apply(&changes).await,
        }
    }

    /// The pool of the ledger that these changes write.
    fn pool_of(&self, changes: &[Change]) -> Option<PoolName> {
        let ledger = self.observer.stored::<StagingLedger>(&ObjectName::new("", ledger_of(changes)?))?;
        Some(PoolName(ledger.spec.pool_name.clone()))
    }

    /// Waits until nothing else of this process writes ledgers of these pools, and keeps it so.
    pub async fn hold(&self, pools: &BTreeSet<PoolName>) -> Vec<tokio::sync::OwnedMutexGuard<()>> {
        let mut held = Vec::with_capacity(pools.len());
        // In order of their names: two that want the same pools do not wait for each other.
        for pool in pools {
            let lock = self
                .pools
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .entry(pool.clone())
                .or_default()
                .clone();
            held.push(lock.lock_owned().await);
        }
        held
    }

    /// How long to wait with the next pass over this pool; nothing, and the pass counts, if the last was long enough ago.
    pub fn wait_for_turn(&self, pool: &str) -> Option<Duration> {
        let mut passes = self.passes.lock().unwrap_or_else(PoisonError::into_inner);
        let pace = POOL_PACE.max(POOLS_PACE * u32::try_from(passes.len()).unwrap_or(u32::MAX));
        let left = passes.get(pool).and_then(|last| pace.checked_sub(last.elapsed()));
        if left.is_none() {
            passes.insert(pool.to_owned(), Instant::now());
        }
        left
    }

    /// Makes changes, in time.
    ///
    /// # Errors
    /// At the first that did not go through.
    pub async fn apply(&self, changes: &[Change]) -> Result<Outcome, ApplyError> {
        let applied = tokio::time::timeout(PATIENCE, self.applier.apply(changes)).await;
        applied.unwrap_or(Err(ApplyError::Silent(PATIENCE)))
    }

    /// Counts one more fault in a row; returns how many came before.
    pub fn count_failure(&self, kind: &'static str, name: &ObjectName) -> u32 {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let count = failures.entry((kind, name.clone())).or_default();
        *count = count.saturating_add(1);
        *count - 1
    }

    /// It went well: the next fault is the first.
    pub fn forget_failures(&self, kind: &'static str, name: &ObjectName) {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).remove(&(kind, name.clone()));
    }
}

/// The ledger that these changes write, if any.
fn ledger_of(changes: &[Change]) -> Option<&str> {
    changes.iter().find_map(|change| match change {
        Change::WriteLedger { name, .. } | Change::RebuildLedger { name, .. } => Some(name.as_str()),
        _ => None,
    })
}

/// The view itself; with the defect, one in which every node has reported the bytes of what is being deleted gone.
pub(crate) fn released_early(view: &View) -> std::borrow::Cow<'_, View> {
    use std::borrow::Cow;
    if !sabotage::active(sabotage::EARLY_RELEASE) {
        return Cow::Borrowed(view);
    }
    let mut view = view.clone();
    for ledger in view.ledgers.values() {
        if let Some(pool) = view.nodes.get_mut(&ledger.node).and_then(|node| node.pools.get_mut(&ledger.pool))
        {
            pool.released
                .extend(ledger.promises.iter().map(|(uid, promise)| (uid.clone(), promise.generation)));
        }
    }
    Cow::Owned(view)
}

/// The time, for decisions: they never read a clock themselves.
pub fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
