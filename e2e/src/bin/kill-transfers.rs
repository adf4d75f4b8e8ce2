//! Transfers whose processes are killed at random moments. See [`berth_e2e::kill_transfers`].

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use berth_e2e::kill::{Stage, Victim};
use berth_e2e::kill_transfers::{self, KillOptions, Report, SABOTAGES};
use berth_e2e::site::Site;
use clap::Parser;

/// Transfers an image in every way while operator, node agent and object store are killed, and looks at what is left.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Kills in all.
    #[arg(long, default_value_t = 24)]
    kills: u64,
    /// Data of the image, in MiB; a multiple of 8.
    #[arg(long, default_value_t = 256)]
    data_mib: u64,
    /// Determines moments, victims, pauses and faults.
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
    let Args { kills, data_mib, seed, sabotage, dir, .. } = args;
    let dir = dir.unwrap_or_else(|| temporary.path().to_owned());
    let report = kill_transfers::run(&KillOptions { dir, data_mib, kills, seed, sabotage }).await?;
    print(&report, seed);
    Ok(if report.failures().is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(report: &Report, seed: u64) {
    println!("seed {seed}; kills:");
    for stage in Stage::ALL {
        let count = |victim| report.kills.get(&(stage, victim)).copied().unwrap_or_default();
        let by: Vec<_> = Victim::ALL.map(|victim| format!("{victim:?} {}", count(victim))).into();
        println!("  {stage}: {}", by.join(", "));
    }
    report.transfers.iter().for_each(|line| println!("{line}"));
    println!("transfers: {:?}; faults of the object store: {:?}", report.routes, report.faults);
    report.failures().iter().take(10).for_each(|failure| println!("FAILED {failure}"));
    println!(
        "kills={} identical={} repeated_windows_max={} orphans={}",
        report.all_kills(),
        report.identical,
        report.repeated_windows_max,
        report.orphans
    );
}
