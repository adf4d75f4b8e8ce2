//! Imports whose processes are killed at random moments. See [`berth_e2e::kill`].

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use berth_e2e::kill::{self, KillOptions, Report, SABOTAGES, Stage, Victim};
use berth_e2e::site::Site;
use clap::Parser;

/// Imports an image while operator, node agent and S3 server are killed in every stage, and looks at what is left.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Kills in each stage.
    #[arg(long, default_value_t = 5)]
    kills_per_stage: u64,
    /// Data of the image, in MiB; a multiple of 8.
    #[arg(long, default_value_t = 1024)]
    data_mib: u64,
    /// Determines moments, victims and pauses.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Gives the node agent this defect; the command must then fail.
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
    if args.list_sabotages {
        for name in SABOTAGES {
            println!("{name}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(name) = args.sabotage.as_deref().filter(|name| !SABOTAGES.contains(name)) {
        anyhow::bail!("no sabotage is called {name}; there are: {}", SABOTAGES.join(", "));
    }
    if let Some(obstacle) = Site::obstacle() {
        anyhow::bail!("this machine cannot run it: {obstacle}");
    }
    let temporary = tempfile::tempdir().context("no temporary directory")?;
    let Args { kills_per_stage, data_mib, seed, sabotage, dir, .. } = args;
    let dir = dir.unwrap_or_else(|| temporary.path().to_owned());
    let report = kill::run(&KillOptions { dir, data_mib, kills_per_stage, seed, sabotage }).await?;
    print(&report, seed);
    let failures = report.failures();
    failures.iter().take(10).for_each(|failure| println!("FAILED {failure}"));
    Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(report: &Report, seed: u64) {
    println!("seed {seed}; kills:");
    for stage in Stage::ALL {
        let count = |victim| report.kills.get(&(stage, victim)).copied().unwrap_or_default();
        let by: Vec<_> = Victim::ALL.map(|victim| format!("{victim:?} {}", count(victim))).into();
        println!("  {stage}: {}", by.join(", "));
    }
    report.imports.iter().for_each(|line| println!("{line}"));
    println!("windows of data: {}", report.windows);
}
