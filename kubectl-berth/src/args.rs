//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use berth_api::defaults::SYSTEM_NAMESPACE;
use clap::{Parser, Subcommand, ValueEnum};

use crate::observe::Scope;

/// Shows what Berth promises and what waits, and checks that everything is as it must be.
#[derive(Clone, Debug, Parser)]
#[command(name = "kubectl-berth", bin_name = "kubectl berth", version)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,

    /// A kubeconfig file. Default: as kubectl finds it, from `KUBECONFIG` or the home folder.
    #[arg(long, global = true, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// The kubeconfig's context to use. Default: its current one.
    #[arg(long, global = true, value_name = "NAME")]
    pub context: Option<String>,

    /// The namespace of Berth's own objects.
    #[arg(long, global = true, value_name = "NAMESPACE", default_value = SYSTEM_NAMESPACE)]
    pub system_namespace: String,

    /// How long the API server may take to show everything, in seconds.
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 60,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub timeout: u64,
}

impl Args {
    /// Where, and for how long, to look.
    pub fn limits(&self) -> Scope {
        Scope { system_namespace: self.system_namespace.clone(), timeout: Duration::from_secs(self.timeout) }
    }
}

/// The commands.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Checks that every promise, placement and report agrees with the others.
    ///
    /// Ends with 0 if everything does, with 1 if there are findings, with 2 if it could not be checked.
    Check(CheckArgs),
    /// Shows pools, nodes, imports and reservations in one table.
    Status(StatusArgs),
}

/// Flags of `kubectl berth check`.
#[derive(Clone, Debug, clap::Args)]
pub struct CheckArgs {
    /// How the findings are printed.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,

    /// How often to look, one second apart: what concerns several objects is a finding only if it was seen every time.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=60))]
    pub looks: u32,
}

/// Flags of `kubectl berth status`.
#[derive(Clone, Debug, clap::Args)]
pub struct StatusArgs {
    /// How the rows are printed.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,

    /// Only the imports and reservations of this namespace. Default: of all.
    #[arg(short, long)]
    pub namespace: Option<String>,
}

/// How a command prints its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn no_looks_and_no_time_are_refused() {
        assert!(Args::try_parse_from(["kubectl-berth", "check", "--looks", "0"]).is_err());
        assert!(Args::try_parse_from(["kubectl-berth", "status", "--timeout", "0"]).is_err());
        let args =
            Args::try_parse_from(["kubectl-berth", "status", "-n", "team", "-o", "json"]).expect("valid");
        assert!(matches!(
            args.command,
            Command::Status(StatusArgs { output: Output::Json, namespace: Some(_) })
        ));
    }
}
