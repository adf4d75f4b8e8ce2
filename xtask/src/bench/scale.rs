//! B12 and B13: the program of `e2e` that makes many reservations, with the operator as it is shipped.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};

use super::programs::{cargo, target};
use super::{BenchArgs, Profile, keep};

/// Builds both programs, runs one of the subjects, and shows its table; the last line says whether its target was reached.
pub fn run(root: &Path, args: &BenchArgs, subject: &str) -> anyhow::Result<()> {
    let status = cargo(root)
        .args(["build", "--profile", args.profile.cargo_name()])
        .args(["--package", "berth-operator", "--bin", "berth-operator"])
        .args(["--package", "berth-e2e", "--bin", "bench-scale"])
        .status()
        .context("running cargo build")?;
    ensure!(status.success(), "the operator and its benchmark do not build: {status}");
    let folder = target(root)?.join(args.profile.folder());
    let mut bench = Command::new(folder.join("bench-scale"));
    bench.arg(subject).arg("--operator").arg(folder.join("berth-operator"));
    bench.args(["--reservations", &args.reservations.to_string(), "--pools", &args.pools.to_string()]);
    if let Some(nodes) = args.nodes {
        bench.args(["--nodes", &nodes.to_string()]);
    }
    let output = bench.stderr(Stdio::inherit()).output().context("running bench-scale")?;
    let mut text = String::from_utf8(output.stdout).context("reading what bench-scale printed")?;
    if args.profile == Profile::Dev {
        text.insert_str(0, "**Development build**: only writes and memory mean anything. ");
    }
    keep(root, args, subject, &text)?;
    print!("{text}");
    ensure!(output.status.success(), "a promise was not kept");
    Ok(())
}
