//! `cargo xtask model`: as many random histories as asked for, against the invariants of the model of `tests/model`.

#![allow(clippy::disallowed_methods)] // no decision: a command line

#[path = "../tests/model/histories/mod.rs"]
mod histories;

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use histories::sabotage::Sabotage;
use histories::{Options, Outcome, one, run};

/// Runs random histories of two operators and three nodes, and counts what must never happen.
#[derive(Debug, Parser)]
#[command(name = "model")]
struct Args {
    /// How many histories.
    #[arg(long, default_value_t = 10_000)]
    histories: u64,
    /// Determines the histories.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Runs the one history that has this seed of its own, as a failure names it.
    #[arg(long)]
    history: Option<u64>,
    /// Puts this defect in; the command must then fail.
    #[arg(long)]
    sabotage: Option<String>,
    /// Prints the defects.
    #[arg(long)]
    list_sabotages: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.list_sabotages {
        for (_, name, _) in Sabotage::ALL {
            println!("{name}");
        }
        return ExitCode::SUCCESS;
    }
    let known = |name: &String| Sabotage::ALL.iter().find(|(_, known, _)| known == name);
    let Some(sabotage) = args.sabotage.as_ref().map_or(Some(Sabotage::None), |name| Some(known(name)?.0))
    else {
        eprintln!("no such sabotage; --list-sabotages prints what there is");
        return ExitCode::from(2);
    };
    let outcome = match args.history {
        Some(seed) => single(seed, sabotage),
        None => many(&args, sabotage),
    };
    let mut failures: Vec<String> = outcome.failures.iter().map(ToString::to_string).collect();
    if args.history.is_none() && sabotage == Sabotage::None {
        failures.extend(outcome.coverage.shortfalls());
    }
    for failure in &failures {
        println!("FAILED {failure}");
    }
    println!("{}", outcome.summary());
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn single(seed: u64, sabotage: Sabotage) -> Outcome {
    let mut outcome = Outcome::default();
    let (coverage, failure) = one(seed, sabotage);
    outcome.add(&coverage, failure);
    outcome
}

/// Runs them all, and says on standard error how far it is.
fn many(args: &Args, sabotage: Sabotage) -> Outcome {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (histories, seed) = (args.histories, args.seed);
    let options = Options { histories, seed, sabotage, until: sabotage.noticed_by(), threads };
    let (started, shown) = (Instant::now(), AtomicU64::new(0));
    let outcome = run(&options, &|done| {
        let seconds = started.elapsed().as_secs();
        if seconds >= shown.load(Ordering::Relaxed) + 10 {
            shown.store(seconds, Ordering::Relaxed);
            eprintln!("{done} of {histories} histories in {seconds} s");
        }
    });
    println!("seed {seed}: {} histories in {} s", outcome.coverage.histories, started.elapsed().as_secs());
    print!("{}", outcome.coverage);
    outcome
}
