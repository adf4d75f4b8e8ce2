//! The safety commands: programs of `e2e`, which run everything else of ours, and the model of `core`.

use std::env;
use std::path::Path;
use std::process::Command;

use anyhow::Context;

/// Runs the program `name` with `arguments` until it ends, and ends as it has.
///
/// # Errors
/// When cargo cannot be run.
pub fn run(root: &Path, name: &str, arguments: &[String]) -> anyhow::Result<()> {
    cargo_run(root, &["--package", "berth-e2e", "--bin", name], arguments)
}

/// Runs the model, optimized: it is as fast as its histories are many.
///
/// # Errors
/// When cargo cannot be run.
pub fn run_model(root: &Path, arguments: &[String]) -> anyhow::Result<()> {
    cargo_run(root, &["--release", "--package", "berth-core", "--example", "model"], arguments)
}

fn cargo_run(root: &Path, program: &[&str], arguments: &[String]) -> anyhow::Result<()> {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root).args(["run", "--quiet"]).args(program).arg("--");
    let status = cargo.args(arguments).status().context("failed to run cargo")?;
    if !status.success() {
        // Not an error: nothing may be printed after the last line of the command.
        std::process::exit(status.code().unwrap_or(1));
    }
    Ok(())
}
