//! What the controllers share, and how one pass goes: look, decide, apply.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use berth_core::change::Change;
use berth_core::ids::{ObjectName, ledger_name};
use berth_core::units::Timestamp;
use berth_core::view::View;

use crate::apply::{Applier, ApplyError, Outcome};
use crate::metrics::Metrics;
use crate::observe::Observer;
use crate::sabotage;

/// How often a decision is taken again because the ledger that it wants to write is another one by now.
const LEDGER_ROUNDS: usize = 4;

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
    ledgers: Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>>,
    failures: Mutex<BTreeMap<(&'static str, ObjectName), u32>>,
}

impl Context {
    /// Ready to be used.
    pub fn new(observer: Arc<Observer>, applier: Applier, metrics: Arc<Metrics>) -> Self {
        Self { observer, applier, metrics, ledgers: Mutex::default(), failures: Mutex::default() }
    }

    /// One pass. Writes of the same ledger by this process follow each other, each decided after the one before it,
    /// so that only other operators are met in compare-and-swap; so do all of a pool that limits what namespaces hold in
    /// all of its ledgers.
    pub async fn decide_and_apply(
        &self,
        decide: impl Fn(&View, Timestamp) -> Vec<Change>,
    ) -> Result<Outcome, ApplyError> {
        let decide = || self.observer.view(|view| decide(&released_early(view), now()));
        let mut changes = decide();
        for _ in 0..LEDGER_ROUNDS {
            let Some(wanted) = self.turn_of(&changes) else { break };
            let lock = self.ledger(&wanted);
            let _held = lock.lock().await;
            changes = decide();
            if self.turn_of(&changes).as_ref() == Some(&wanted) {
                return self.apply(&changes).await;
            }
        }
        match ledger_of(&changes) {
            // The decision does not settle on one ledger: let others go first.
            Some(name) => {
                Err(ApplyError::Conflict { operation: "choose", object: format!("StagingLedger {name}") })
            }
            None => self.apply(&changes).await,
        }
    }

    /// What these changes take turns on: the ledger that they write, or all ledgers of its pool.
    fn turn_of(&self, changes: &[Change]) -> Option<String> {
        let name = ledger_of(changes)?;
        let limited = self.observer.view(|view| {
            let limited = view.pools.values().filter(|pool| !pool.tenant_limits.is_empty());
            let mut places = limited.flat_map(|pool| view.nodes.keys().map(move |node| (&pool.name, node)));
            places.find(|(pool, node)| ledger_name(pool, node) == name).map(|(pool, _)| format!("{pool}/*"))
        });
        Some(limited.unwrap_or_else(|| name.to_owned()))
    }

    async fn apply(&self, changes: &[Change]) -> Result<Outcome, ApplyError> {
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

    fn ledger(&self, name: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut ledgers = self.ledgers.lock().unwrap_or_else(PoisonError::into_inner);
        ledgers.entry(name.to_owned()).or_default().clone()
    }
}

/// The ledger that these changes write, if any.
fn ledger_of(changes: &[Change]) -> Option<&str> {
    changes.iter().find_map(|change| match change {
        Change::WriteLedger { name, .. } => Some(name.as_str()),
        _ => None,
    })
}

/// The view itself; with the defect, one in which every node has reported the bytes of what is being deleted gone.
fn released_early(view: &View) -> std::borrow::Cow<'_, View> {
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
