//! Everything that CI runs can be run from here: `cargo xtask <command>`.

mod bench;
mod codegen;
mod layers;
mod safety;
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
    /// Cut the power of a machine at random moments of every operation on its pool.
    Crash(Arguments),
    /// Kill the processes of imports at random moments.
    KillImport(Arguments),
    /// Kill the processes of transfers at random moments, with an object store that fails.
    KillTransfers(Arguments),
    /// Let two operators admit at the same time.
    AdmissionRace(Arguments),
    /// Run random histories of operators and nodes, all in memory.
    Model(Arguments),
    /// Run the tests; the last line is `N passed, N failed, N skipped`.
    Test {
        /// What to test, as arguments of `cargo test`; everything if none.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        selection: Vec<String>,
    },
}

/// What a safety command is given.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
struct Arguments {
    /// Passed on; `--help` shows what there is.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

fn main() -> anyhow::Result<()> {
    match Args::parse().task {
        Task::Bench(args) => bench::run(&root(), &args),
        Task::Codegen { check } => codegen::run(&root(), check),
        Task::CheckLayers => layers::run(&root()),
        Task::Crash(given) => safety::run(&root(), "crash", &given.arguments),
        Task::KillImport(given) => safety::run(&root(), "kill-import", &given.arguments),
        Task::KillTransfers(given) => safety::run(&root(), "kill-transfers", &given.arguments),
        Task::AdmissionRace(given) => safety::run(&root(), "admission-race", &given.arguments),
        Task::Model(given) => safety::run_model(&root(), &given.arguments),
        Task::Test { selection } => test_run::run(&root(), &selection),
    }
}

/// The folder of the workspace.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}
