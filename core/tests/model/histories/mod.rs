//! Random histories of two operators, three nodes and the people around them. What is decided is decided by the shipped
//! code; the API server, the disks and the watches are simulated, and can be late, refuse, lose answers, and go back in time.

#![allow(clippy::needless_for_each)] // one expression for each of something is a line, not a loop

pub mod coverage;
mod dice;
mod history;
mod node;
mod observer;
mod operator;
mod rounds;
pub mod sabotage;
mod settle;
mod sums;
mod users;
mod world;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use coverage::Coverage;
use dice::Dice;
use history::History;
pub use observer::Wrong;
use sabotage::Sabotage;

/// The fewest operations of a history, before it settles.
pub const LEAST_OPERATIONS: u64 = 50;

/// A history in which something happened that must not.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What the history can be run again with.
    pub seed: u64,
    /// Of which kind.
    pub wrong: Wrong,
    /// What happened.
    pub what: String,
    /// The last operations before it.
    pub told: Vec<String>,
}

impl fmt::Display for Failure {
    /// What it is, how to see it again, and what went before it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, wrong, what, told } = self;
        write!(f, "{wrong:?}: {what}\n  again: --history {seed}\n  {}", told.join("\n  "))
    }
}

/// What came of many histories.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// What happened in them.
    pub coverage: Coverage,
    /// How many had something wrong, by what was wrong first.
    pub counts: BTreeMap<Wrong, u64>,
    /// Some of them.
    pub failures: Vec<Failure>,
}

/// How many histories to run, and how.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How many.
    pub histories: u64,
    /// Determines them.
    pub seed: u64,
    /// With this defect.
    pub sabotage: Sabotage,
    /// Ends with the first history in which this is wrong.
    pub until: Option<Wrong>,
    /// How many at once.
    pub threads: usize,
}

/// How many failures of each kind are kept in full.
const KEPT: usize = 5;

impl Outcome {
    /// Adds one history.
    pub fn add(&mut self, coverage: &Coverage, failure: Option<Failure>) {
        self.coverage.add(coverage);
        if let Some(failure) = failure {
            *self.counts.entry(failure.wrong).or_default() += 1;
            let same = self.failures.iter().filter(|kept| kept.wrong == failure.wrong).count();
            if same < KEPT {
                self.failures.push(failure);
            }
        }
    }

    /// How many histories had this wrong first.
    pub fn count(&self, wrong: Wrong) -> u64 {
        self.counts.get(&wrong).copied().unwrap_or_default()
    }

    /// The last line of the command.
    pub fn summary(&self) -> String {
        format!(
            "histories={} overcommits={} evicted_in_use={} lost_only_copies={} stuck={}",
            self.coverage.histories,
            self.count(Wrong::Overcommit),
            self.count(Wrong::EvictedInUse),
            self.count(Wrong::LostOnlyCopy),
            self.count(Wrong::Stuck)
        )
    }
}

/// Runs histories on several threads. `progress` is told after each how many there have been.
pub fn run(options: &Options, progress: &(dyn Fn(u64) + Sync)) -> Outcome {
    let (next, all) = (AtomicU64::new(0), Mutex::new(Outcome::default()));
    let work = || loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number >= options.histories {
            return;
        }
        let seed = Dice::derived(options.seed, number);
        let (coverage, failure) = one(seed, options.sabotage);
        let mut all = all.lock().expect("no history panics while it is added");
        let ends = failure.as_ref().is_some_and(|failure| options.until == Some(failure.wrong));
        all.add(&coverage, failure);
        progress(all.coverage.histories);
        if ends {
            next.store(options.histories, Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| (0..options.threads.max(1)).for_each(|_| drop(scope.spawn(work))));
    all.into_inner().expect("no history panics while it is added")
}

/// Runs one history.
pub fn one(seed: u64, sabotage: Sabotage) -> (Coverage, Option<Failure>) {
    let mut history = History::new(seed, sabotage);
    let result = history.run();
    let world = history.into_world();
    let failure = result.err().map(|(wrong, what)| {
        let told = world.told.into_iter().collect();
        Failure { seed, wrong, what, told }
    });
    (world.coverage, failure)
}
