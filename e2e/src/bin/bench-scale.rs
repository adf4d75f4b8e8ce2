//! B12 and B13: many reservations over many nodes against a real API server. See [`berth_e2e::scale`].

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use berth_e2e::scale::{self, Idle, Sizes, Throughput, Writes};
use clap::{Parser, ValueEnum};

/// Reservations per second as a share of bare status patches: at least this.
const RATIO: f64 = 0.4;
/// Reservations per second: at least this.
const RATE: f64 = 200.0;
/// Writes per second while nothing happens: at most this.
const IDLE_WRITES: f64 = 30.0;
/// A silent node counts as lost within this: its Lease lasts 40 s, and is looked at every second.
const LOST: Duration = Duration::from_secs(42);

/// Measures how fast reservations are promised, and what it costs when nothing happens.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// What to measure.
    subject: Subject,
    /// How many reservations.
    #[arg(long, default_value_t = 20_000)]
    reservations: usize,
    /// How many nodes. Default: 500 for B12, 400 for B13.
    #[arg(long)]
    nodes: Option<usize>,
    /// How many pools; each node carries one.
    #[arg(long, default_value_t = 50)]
    pools: usize,
    /// For how long it is watched when nothing happens, in seconds.
    #[arg(long, default_value_t = 60)]
    quiet: u64,
    /// The operator's program.
    #[arg(long)]
    operator: PathBuf,
    /// Without the policy that puts finalizers on reservations as they are created: the operator does it, by a write each.
    #[arg(long)]
    unguarded: bool,
    /// Keeps data and logs in this folder. Default: a temporary one that goes away.
    #[arg(long)]
    dir: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Subject {
    /// How fast reservations are promised, and with how many writes.
    #[value(name = "B12")]
    B12,
    /// What it costs when nothing happens.
    #[value(name = "B13")]
    B13,
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let temporary = tempfile::tempdir().context("no temporary directory")?;
    let dir = args.dir.clone().unwrap_or_else(|| temporary.path().to_owned());
    let nodes = args.nodes.unwrap_or(match args.subject {
        Subject::B12 => 500,
        Subject::B13 => 400,
    });
    let Args { reservations, pools, quiet, operator, unguarded, .. } = args;
    let quiet = Duration::from_secs(quiet);
    let sizes = Sizes { reservations, nodes, pools, quiet, operator, guarded: !unguarded };
    let guard = if unguarded { "the operator" } else { "an admission policy" };
    println!("{reservations} reservations of 1 GiB, {nodes} nodes, {pools} pools; finalizers by {guard}.\n");
    let ok = match args.subject {
        Subject::B12 => b12(&scale::throughput(&dir, &sizes).await?),
        Subject::B13 => b13(&scale::idle(&dir, &sizes).await?),
    };
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Short of a target is no failure of the run; a promise that was not kept is.
fn b12(found: &Throughput) -> bool {
    let (pace, median, most) = found.paced;
    println!("| | |\n|---|---:|");
    println!(
        "| bare status patches, before and after | {:.0}/s, {:.0}/s |",
        found.yardstick[0], found.yardstick[1]
    );
    println!("| reservations, all declared beforehand | {:.0}/s |", found.rate);
    println!(
        "| from the operator's start to the first promise | {:.1} s |",
        found.first_promise.as_secs_f64()
    );
    println!("| writes for each | {:.2} |", found.writes_each());
    println!(
        "| declared to reserved at {pace:.0}/s: median, 99 % | {:.2} s, {:.2} s |",
        median.as_secs_f64(),
        most.as_secs_f64()
    );
    println!(
        "| memory of the operator: with all, at most | {} MiB, {} MiB |",
        found.memory.0, found.memory.1
    );
    println!("| restart of the operator until it has seen all | {:.1} s |", found.restart.as_secs_f64());
    println!("| promised beyond a capacity | {} bytes |\n", found.overcommitted.max(0));
    written(&found.writes.0);
    let kept = found.overcommitted <= 0;
    let reached = found.ratio() >= RATIO && found.rate >= RATE && most < Duration::from_secs(1) && kept;
    println!("B12 ratio={:.2} target={RATIO} {}", found.ratio(), verdict(reached));
    kept
}

fn b13(found: &Idle) -> bool {
    let seconds = found.quiet.as_secs();
    println!(
        "| ready reservations | writes of Leases in {seconds} s | other writes in {seconds} s |\n|---:|---:|---:|"
    );
    for ((ready, writes), beside) in found.times.iter().zip(found.beside_leases()) {
        println!("| {ready} | {} | {beside} |", writes.of("leases"));
    }
    println!("\n| | |\n|---|---:|");
    println!("| writes per second, Leases included | {:.1} |", found.per_second());
    println!("| a silent node counted as lost after | {:.1} s |", found.lost_after.as_secs_f64());
    println!(
        "| memory of the operator: with all, at most | {} MiB, {} MiB |",
        found.memory.0, found.memory.1
    );
    println!("| promised beyond a capacity | {} bytes |\n", found.overcommitted.max(0));
    written(&found.times[1].1);
    let kept = found.overcommitted <= 0;
    let reached = found.per_second() <= IDLE_WRITES && found.lost_after <= LOST && kept;
    println!("B13 ratio={:.2} target=1 {}", found.per_second() / IDLE_WRITES, verdict(reached));
    kept
}

fn written(writes: &Writes) {
    println!("| written | times |\n|---|---:|");
    writes.all().for_each(|(what, count)| println!("| `{what}` | {count} |"));
    println!();
}

const fn verdict(reached: bool) -> &'static str {
    if reached { "ok" } else { "short" }
}
