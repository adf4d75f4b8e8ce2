//! `cargo xtask bench`: ours beside other tools, interleaved in one run.
//!
//! Rules. What is compared runs in the same rounds, in an order that turns with every round; what counts is the median of
//! the per-round ratios, because the machine changes under a run. Every result is compared byte for byte with what it
//! was made from. CPU time and memory come from GNU time, bytes from the S3 server's own log or from the disk.

mod export;
mod import;
mod inputs;
mod measure;
mod programs;
mod report;
mod scale;
mod server;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use clap::{Args, ValueEnum};

/// Flags of `cargo xtask bench`.
#[derive(Args)]
pub struct BenchArgs {
    /// What to measure.
    #[arg(value_enum, default_value_t = Subject::Import)]
    subject: Subject,
    /// How often everything is run; the medians of fewer than 3 say little.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: u32,
    /// How much data the image holds, in MiB; its virtual size is twice that.
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    data: u64,
    /// How many reservations B12 and B13 make.
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(100..=100_000))]
    reservations: u32,
    /// Over how many nodes. Default: 500 for B12, 400 for B13.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=5_000))]
    nodes: Option<u32>,
    /// Over how many pools; each node carries one.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pools: u32,
    /// How Berth is built.
    #[arg(long, value_enum, default_value_t = Profile::Release)]
    profile: Profile,
    /// Where inputs are kept between runs. Default: `berth/bench` in the user's folder for such files.
    #[arg(long, env = "BERTH_BENCH_DIR")]
    dir: Option<PathBuf>,
    /// Put the table into `docs/benchmarks.md`.
    #[arg(long)]
    write: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Subject {
    /// A qcow2 file into an image store.
    Import,
    /// A disk into a compressed image in an object store.
    #[value(name = "B5")]
    B5,
    /// Thousands of reservations: how fast they are promised, with how many writes.
    #[value(name = "B12")]
    B12,
    /// Thousands of reservations: what it costs when nothing happens.
    #[value(name = "B13")]
    B13,
}

/// A profile of cargo's.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Profile {
    /// As it is shipped.
    Release,
    /// For trying the benchmark itself: most of the code is not optimised.
    Dev,
}

impl Profile {
    const fn cargo_name(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Dev => "dev",
        }
    }

    const fn folder(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Dev => "debug",
        }
    }
}

/// Runs the benchmark and prints its table.
pub fn run(root: &Path, args: &BenchArgs) -> anyhow::Result<()> {
    match args.subject {
        Subject::Import => import(root, args),
        Subject::B5 => export(root, args),
        Subject::B12 => scale::run(root, args, "B12"),
        Subject::B13 => scale::run(root, args, "B13"),
    }
}

fn import(root: &Path, args: &BenchArgs) -> anyhow::Result<()> {
    let (ours, dir) = ready(root, args)?;
    let inputs = inputs::prepare(&dir, args.data)?;
    let results = import::run(&ours, &inputs, &dir, args.rounds)?;
    let text = report::tables(args, "Import of a qcow2 file", &results);
    println!("{text}");
    keep(root, args, "import", &text)
}

fn export(root: &Path, args: &BenchArgs) -> anyhow::Result<()> {
    let (ours, dir) = ready(root, args)?;
    let inputs = inputs::prepare(&dir, args.data)?;
    let results = export::run(&ours, &inputs, &dir, args.rounds)?;
    let (ratio, target) = (export::ratio(&results), export::TARGET);
    let verdict = if ratio <= target { "ok" } else { "short" };
    let tables = report::tables(args, "Export of a disk", &[results]);
    let text = format!("{tables}\nB5 ratio={ratio:.2} target={target} {verdict}\n");
    print!("{text}");
    keep(root, args, "B5", &text)
}

/// Our programs, and the folder to work in.
fn ready(root: &Path, args: &BenchArgs) -> anyhow::Result<(programs::Ours, PathBuf)> {
    programs::check()?;
    let ours = programs::build(root, args.profile)?;
    let dir = match &args.dir {
        Some(dir) => dir.clone(),
        None => default_dir()?,
    };
    ensure!(!dir.starts_with(root), "{} lies in the tree", dir.display());
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok((ours, dir))
}

/// Puts a table into the documentation, if that was asked for.
fn keep(root: &Path, args: &BenchArgs, subject: &str, text: &str) -> anyhow::Result<()> {
    if args.write {
        let path = root.join("docs/benchmarks.md");
        report::write(&path, subject, text)?;
        eprintln!("wrote {}", path.display());
    }
    Ok(())
}

/// `${XDG_CACHE_HOME:-$HOME/.cache}/berth/bench`.
fn default_dir() -> anyhow::Result<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()).map(PathBuf::from);
    let base = base.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
    Ok(base.context("neither XDG_CACHE_HOME nor HOME is set: give --dir")?.join("berth/bench"))
}
