//! Power cuts at random moments of every operation. See [`berth_e2e::crash`].

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use berth_e2e::crash::{self, CrashOptions, Kind};
use berth_e2e::kernel::KernelHost;
use clap::{Parser, Subcommand};

/// Cuts the power of a machine while its pool is worked on, and looks at what is left.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Power cuts.
    #[arg(long, default_value_t = 100)]
    cuts: u64,
    /// Determines operations, moments and what the disk keeps.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Machines at the same time.
    #[arg(long, default_value_t = 2)]
    lanes: u64,
    /// Gives the program this defect; the command must then fail.
    #[arg(long)]
    sabotage: Option<String>,
    /// Cuts these operations only, for example `volumeClone`.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Kind>,
    /// Keeps disks and logs in this folder. Default: a temporary one that goes away.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Tells what happens on standard error.
    #[arg(long)]
    verbose: bool,
    /// Prints the defects.
    #[arg(long)]
    list_sabotages: bool,
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// What runs in the machine.
    #[command(hide = true)]
    Play {
        /// The program under test with its arguments.
        #[arg(last = true)]
        program: Vec<String>,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    if let Some(Part::Play { program }) = args.part {
        crash::play(&program)?;
        return Ok(ExitCode::SUCCESS);
    }
    let sabotages = crash::sabotages();
    if args.list_sabotages {
        for name in &sabotages {
            println!("{name}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(name) = args.sabotage.as_deref().filter(|name| !sabotages.contains(name)) {
        anyhow::bail!("no sabotage is called {name}; there are: {}", sabotages.join(", "));
    }
    if let Some(obstacle) = KernelHost::obstacle() {
        anyhow::bail!("this machine cannot run it: {obstacle}");
    }
    let temporary = tempfile::tempdir().context("no temporary directory")?;
    let Args { cuts, seed, lanes, sabotage, dir, only, verbose, .. } = args;
    let sabotaged = sabotage.is_some();
    let dir = dir.unwrap_or_else(|| temporary.path().to_owned());
    let report = crash::run(&CrashOptions { dir, cuts, seed, lanes, sabotage, only, verbose })?;
    println!("seed {seed}");
    report.coverage().iter().for_each(|line| println!("{line}"));
    // A defect is noticed by what it breaks, or not at all.
    let failures = if sabotaged { report.damage() } else { report.failures(cuts) };
    failures.iter().take(10).for_each(|failure| println!("FAILED {failure}"));
    println!("{}", report.totals());
    Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
