//! Two operators race for the same space; a third process counts. See [`berth_e2e::race`].

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Context as _;
use berth_e2e::ours::OPERATOR_SABOTAGE;
use berth_e2e::race::{self, RaceOptions, Report};
use clap::Parser;

/// Lets two operators race for the same space, with one killed in the middle, and counts what was promised.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// How many histories.
    #[arg(long, default_value_t = 200)]
    histories: u64,
    /// How many of them at once.
    #[arg(long, default_value_t = 16)]
    lanes: u64,
    /// Determines the histories.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Gives the operators this defect; the command must then fail.
    #[arg(long)]
    sabotage: Option<String>,
    /// Keeps data and logs in this folder. Default: a temporary one that goes away.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Prints the defects.
    #[arg(long)]
    list_sabotages: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let known = if args.list_sabotages || args.sabotage.is_some() { sabotages()? } else { String::new() };
    if args.list_sabotages {
        print!("{known}");
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(name) = args.sabotage.as_ref().filter(|name| !known.lines().any(|line| line == name.as_str()))
    {
        anyhow::bail!("no sabotage is called {name}; there are:\n{known}");
    }
    let temporary = tempfile::tempdir().context("no temporary directory")?;
    let Args { histories, lanes, seed, sabotage, dir, .. } = args;
    let dir = dir.unwrap_or_else(|| temporary.path().to_owned());
    let options = RaceOptions { histories, lanes, seed, sabotage };
    let report = race::run(&dir, &options).await?;
    print(&report, seed);
    let failures = report.failures();
    report.trace.iter().for_each(|line| println!("  {line}"));
    failures.iter().take(10).for_each(|failure| println!("FAILED {failure}"));
    Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What the operator itself says it can do wrong.
fn sabotages() -> anyhow::Result<String> {
    let output = Command::new(OPERATOR_SABOTAGE.obtain()?).arg("--list-sabotages").output()?;
    Ok(String::from_utf8(output.stdout)?)
}

fn print(report: &Report, seed: u64) {
    let histories = report.histories.max(1);
    println!("seed {seed}: {} histories, {} operators killed", report.histories, report.kills);
    println!("histories with a kill in their middle: {}", report.killed_during);
    println!("operations: {} ({} per history)", report.operations, report.operations / histories);
    println!("versions seen: {}, admissions: {}", report.tally.versions, report.tally.admissions);
    println!("releases reported by nodes: {}", report.tally.releases);
    println!("deletions in spite of a finalizer: {}", report.tally.slipped);
    for (writer, count) in &report.tally.by_writer {
        println!("promises written by {writer}: {count}");
    }
    for (operator, count) in &report.conflicts {
        println!("ledger conflicts met by {operator}: {count}");
    }
}
