//! Everything that CI runs can be run from here: `cargo xtask <command>`.

mod bench;
mod codegen;
mod layers;
mod test_run;

use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};

/// Tasks of the Berth workspace.
#[derive(Parser)]
#[command(name = "xtask")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Measure Berth beside other tools.
    Bench(bench::BenchArgs),
    /// Write the CRDs and the generated tables of the documentation.
    Codegen {
        /// Only compare; fail if a file is not what the code says.
        #[arg(long)]
        check: bool,
    },
    /// Fail if a crate depends on one that it may not.
    CheckLayers,
    /// Run the tests; the last line is `N passed, N failed, N skipped`.
    Test {
        /// What to test, as arguments of `cargo test`; everything if none.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        selection: Vec<String>,
    },
}

fn main() -> anyhow::Result<()> {
    match Args::parse().task {
        Task::Bench(args) => bench::run(&root(), &args),
        Task::Codegen { check } => codegen::run(&root(), check),
        Task::CheckLayers => layers::run(&root()),
        Task::Test { selection } => test_run::run(&root(), &selection),
    }
}

/// The folder of the workspace.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}
