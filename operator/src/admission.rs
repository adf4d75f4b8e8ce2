//! Requests that have no place yet: gathered while earlier ones are carried out, and decided about in rounds.
//!
//! A round is about some pools, and no other round is about them at the same time. What asks while it runs is in the next
//! one: the more there is to do, the more requests share one write of a ledger. What a round decides is decided in
//! [`berth_core::reservation::decide_all`].

use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::sync::{Mutex, MutexGuard, PoisonError};

use berth_core::change::Change;
use berth_core::ids::{PoolName, Uid};
use berth_core::reservation::{Round, decide_all};
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::{Notify, Semaphore, oneshot};
use tokio_util::sync::CancellationToken;

use crate::apply::{ApplyError, Outcome};
use crate::context::{Context, now, released_early};

/// How many rounds may run at once, each about other pools.
pub const LANES: usize = 16;
/// How many requests one round gives a place at most.
const MOST: usize = 256;
/// How many writes of one round are under way at once.
const WRITES: usize = 12;
/// How many writes of all rounds are.
const ALL_WRITES: usize = 48;
/// How soon a request is decided about again whose image's object has just been made, in milliseconds: by then its watch has
/// most often shown it, and that is looked at as well.
const SOON_MILLIS: u64 = 100;

/// What became of each request of a round.
type Answers = BTreeMap<Uid, Result<Outcome, ApplyError>>;

/// The requests that are to be decided about.
#[derive(Debug)]
pub struct Admission {
    state: Mutex<State>,
    changed: Notify,
    writes: Semaphore,
}

impl Default for Admission {
    fn default() -> Self {
        Self { state: Mutex::default(), changed: Notify::new(), writes: Semaphore::new(ALL_WRITES) }
    }
}

#[derive(Debug, Default)]
struct State {
    /// In the order in which they came.
    asked: BTreeMap<u64, Asked>,
    next: u64,
    /// What rounds are about now.
    busy: BTreeSet<PoolName>,
}

#[derive(Debug)]
struct Asked {
    uid: Uid,
    pools: BTreeSet<PoolName>,
    answer: oneshot::Sender<Result<Outcome, ApplyError>>,
}

/// The requests of one round.
#[derive(Debug)]
struct Turn {
    pools: BTreeSet<PoolName>,
    asked: Vec<Asked>,
}

impl Admission {
    /// Asks for a decision about a request that may go to these pools; returns when it is carried out. `None` if nothing is
    /// decided any more.
    ///
    /// # Errors
    /// What came of its writes.
    pub async fn ask(&self, uid: Uid, pools: BTreeSet<PoolName>) -> Option<Result<Outcome, ApplyError>> {
        let (answer, answered) = oneshot::channel();
        {
            let mut state = self.lock();
            let number = state.next;
            state.next += 1;
            state.asked.insert(number, Asked { uid, pools, answer });
        }
        self.changed.notify_waiters();
        answered.await.ok()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn next(&self) -> Turn {
        loop {
            let changed = self.changed.notified();
            let turn = self.lock().take();
            match turn {
                Some(turn) => return turn,
                None => changed.await,
            }
        }
    }

    fn finish(&self, turn: Turn, mut answers: Answers) {
        self.lock().busy.retain(|pool| !turn.pools.contains(pool));
        for Asked { uid, answer, .. } in turn.asked {
            // Whoever asked may have gone away.
            drop(answer.send(answers.remove(&uid).unwrap_or(Ok(Outcome::default()))));
        }
        self.changed.notify_waiters();
    }

    /// Nothing is decided any more: nobody waits for it.
    fn close(&self) {
        self.lock().asked.clear();
    }
}

impl State {
    /// The first request whose pools no round is about and no earlier request waits for, and all others that may go nowhere
    /// else.
    fn take(&mut self) -> Option<Turn> {
        let mut awaited = self.busy.clone();
        let first = self.asked.values().find(|asked| {
            let free = asked.pools.is_disjoint(&awaited);
            awaited.extend(asked.pools.iter().cloned());
            free
        })?;
        let pools = first.pools.clone();
        let asked =
            self.asked.extract_if(.., |_, asked| asked.pools.is_subset(&pools)).map(|(_, asked)| asked);
        let asked = asked.collect();
        self.busy.extend(pools.iter().cloned());
        Some(Turn { pools, asked })
    }
}

/// One of the [`LANES`]: carries out round after round until `stop`.
pub async fn run(context: &Context, stop: &CancellationToken) {
    while let Some(turn) = stop.run_until_cancelled(context.admission.next()).await {
        let asked = turn.asked.iter().map(|asked| asked.uid.clone()).collect();
        let round = AssertUnwindSafe(round(context, &turn.pools, &asked)).catch_unwind().await;
        // Its pools must not stay taken: what asked is decided about again when it is next looked at.
        let answers = round.unwrap_or_else(|_| {
            tracing::error!(pools = ?turn.pools, "a round of decisions panicked");
            Answers::new()
        });
        context.admission.finish(turn, answers);
    }
    context.admission.close();
}

/// Decides and writes ledgers under the locks of the pools; assignments need no lock.
async fn round(context: &Context, pools: &BTreeSet<PoolName>, asked: &BTreeSet<Uid>) -> Answers {
    let held = context.hold(pools).await;
    context.observer.judge_unheard();
    let part = context.observer.view(|view| released_early(view).part(pools));
    let Round { first, commits, others, again } = decide_all(part, asked, MOST, now());
    let mut answers: Answers =
        again.into_iter().map(|uid| (uid, Ok(Outcome { wrote: true, retry: None }))).collect();
    let single = |(uid, change)| (uid, vec![change]);
    let makes = |change: &Change| matches!(change, Change::CreateImage { .. });
    let made: BTreeSet<Uid> =
        first.iter().filter(|(_, one)| makes(one)).map(|(uid, _)| uid.clone()).collect();
    for (uid, outcome) in carry_out(context, first.into_iter().map(single)).await {
        // The object of an image is in the view only when its watch has shown it.
        let later = made.contains(&uid).then_some(Outcome { wrote: false, retry: Some(SOON_MILLIS) });
        answers.insert(uid, outcome.map(|outcome| later.unwrap_or(Outcome { wrote: true, ..outcome })));
    }
    let ledgers = commits.into_iter().map(|commit| (commit.assigned, vec![commit.write]));
    let mut assigned = Vec::new();
    for (follow, outcome) in carry_out(context, ledgers).await {
        match outcome {
            Ok(_) => assigned.extend(follow.into_iter().map(single)),
            Err(error) => answers.extend(follow.into_iter().map(|(uid, _)| (uid, Err(error.clone())))),
        }
    }
    drop(held);
    answers.extend(carry_out(context, assigned.into_iter().chain(others)).await);
    answers
}

/// Makes lists of changes, each in order, several at once.
async fn carry_out<T: Send>(
    context: &Context,
    lists: impl Iterator<Item = (T, Vec<Change>)> + Send,
) -> Vec<(T, Result<Outcome, ApplyError>)> {
    let write = |(who, changes): (T, Vec<Change>)| async move {
        let _turn = context.admission.writes.acquire().await;
        (who, context.apply(&changes).await)
    };
    let writes: Vec<_> = lists.map(|list| write(list).boxed()).collect();
    futures::stream::iter(writes).buffer_unordered(WRITES).collect().await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pools(names: &[&str]) -> BTreeSet<PoolName> {
        names.iter().map(|name| PoolName::from(*name)).collect()
    }

    fn uids(turn: Option<&Turn>) -> Vec<&str> {
        turn.into_iter().flat_map(|turn| &turn.asked).map(|asked| asked.uid.as_str()).collect()
    }

    #[tokio::test]
    async fn what_asks_while_a_round_runs_is_in_the_next_and_no_two_are_about_one_pool() {
        let admission = std::sync::Arc::new(Admission::default());
        let ask = |uid: &'static str, names: &[&str]| {
            let (admission, names) = (admission.clone(), pools(names));
            tokio::spawn(async move { admission.ask(Uid::from(uid), names).await })
        };
        let first = ask("p1", &["p"]);
        tokio::task::yield_now().await;
        let turn = admission.next().await;
        assert_eq!(uids(Some(&turn)), ["p1"]);
        for (uid, names) in [("p2", &["p"][..]), ("both", &["p", "q"]), ("q1", &["q"]), ("p3", &["p"])] {
            ask(uid, names);
            tokio::task::yield_now().await;
        }
        let other = admission.lock().take();
        assert_eq!(uids(other.as_ref()), [""; 0], "one that wants both came before, and is not passed");
        let told = Outcome { wrote: true, retry: Some(7) };
        admission.finish(turn, Answers::from([(Uid::from("p1"), Ok(told))]));
        assert!(matches!(first.await, Ok(Some(Ok(outcome))) if outcome == told));
        let next = admission.lock().take().expect("free");
        assert_eq!(uids(Some(&next)), ["p2", "p3"], "they go nowhere else");
        admission.finish(next, Answers::new());
        let last = admission.lock().take();
        assert_eq!(uids(last.as_ref()), ["both", "q1"]);
        ask("r1", &["r"]);
        tokio::task::yield_now().await;
        let beside = admission.lock().take();
        assert_eq!(uids(beside.as_ref()), ["r1"], "about another pool");
        admission.close();
    }
}
