//! The safety commands: programs of `e2e`, which run everything else of ours.

use std::env;
use std::path::Path;
use std::process::Command;

use anyhow::Context;

/// Runs the program `name` with `arguments` until it ends, and ends as it has.
///
/// # Errors
/// When cargo cannot be run.
pub fn run(root: &Path, name: &str, arguments: &[String]) -> anyhow::Result<()> {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root).args(["run", "--quiet", "--package", "berth-e2e", "--bin", name, "--"]);
    let status = cargo.args(arguments).status().context("failed to run cargo")?;
    if !status.success() {
        // Not an error: nothing may be printed after the last line of the command.
        std::process::exit(status.code().unwrap_or(1));
    }
    Ok(())
}
