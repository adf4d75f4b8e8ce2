//! Random histories against the sentences that must always hold: what is promised never exceeds what there is, what is in
//! use and what is nowhere else stays, and everything that was asked for comes to its end. `cargo xtask model` runs more of
//! them.

mod histories;

use histories::sabotage::Sabotage;
use histories::{Options, run};

const SEED: u64 = 1;
/// How many histories a defect may take to be noticed.
const NOTICED_WITHIN: u64 = 10_000;

fn options(histories: u64, sabotage: Sabotage) -> Options {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    Options { histories, seed: SEED, sabotage, until: sabotage.noticed_by(), threads }
}

#[test]
fn promises_hold_in_every_history() {
    let outcome = run(&options(10_000, Sabotage::None), &|_| {});
    println!("{}{}", outcome.coverage, outcome.summary());
    for failure in &outcome.failures {
        println!("{failure}");
    }
    assert!(outcome.failures.is_empty(), "{}", outcome.summary());
    assert_eq!(outcome.coverage.shortfalls(), Vec::<String>::new());
}

#[test]
fn every_sabotage_is_found() {
    for (sabotage, name, wrong) in Sabotage::ALL {
        let outcome = run(&options(NOTICED_WITHIN, *sabotage), &|_| {});
        let found = outcome.failures.iter().find(|failure| failure.wrong == *wrong);
        let what = found.map(|failure| (failure.seed, &failure.what));
        println!("{name}: after {} histories: {what:?}", outcome.coverage.histories);
        assert!(found.is_some(), "{name}: {wrong:?} was not noticed: {:?}", outcome.failures);
    }
}
