//! The command line.

mod requests;
mod work;

use std::path::PathBuf;
use std::time::Duration;

use berth_api::defaults::SYSTEM_NAMESPACE;
use clap::{Parser, Subcommand, ValueEnum};

pub use requests::{Access, FitArgs, ReleaseArgs, RequestFlags, ReserveArgs, WhenFull};
pub use work::{RetryArgs, TransferArgs, TransferCommand, WaitArgs, WorkName};

use crate::observe::Scope;
use crate::pages::{CompleteArgs, CompletionsArgs, ManArgs};

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
#[allow(clippy::large_enum_variant)] // there is one, made from the command line
pub enum Command {
    /// Those that ask the API server.
    #[command(flatten)]
    Cluster(ClusterCommand),
    /// Those about this program itself.
    #[command(flatten)]
    Pages(PagesCommand),
}

/// The commands that ask the API server.
#[derive(Clone, Debug, Subcommand)]
pub enum ClusterCommand {
    /// Checks that every promise, placement and report agrees with the others.
    ///
    /// Ends with 0 if everything does, with 1 if there are findings, with 2 if it could not be checked.
    Check(CheckArgs),
    /// Shows pools, nodes, imports, transfers and reservations in one table.
    Status(StatusArgs),
    /// Says of one reservation where it is, why, and what it waits for.
    Explain(ExplainArgs),
    /// Says whether and where a request would be admitted now; promises nothing.
    ///
    /// Ends with 0 if it fits now, with 1 if it would wait, with 2 if it would be refused.
    Fit(FitArgs),
    /// Makes a reservation.
    ///
    /// With `--wait`, ends with 0 once it is ready, with 1 if it was not in time, with 2 if it is refused.
    Reserve(ReserveArgs),
    /// Ends a reservation: its node gives the bytes back, then the space is free.
    ///
    /// With `--wait`, ends with 0 once that is done, with 1 if it was not in time.
    Release(ReleaseArgs),
    /// Keeps a reservation that nothing uses for another while.
    Renew(RenewArgs),
    /// Lets an import or a transfer that has failed be tried again.
    Retry(RetryArgs),
    /// Follows a transfer or an import, has a transfer pause, and lets it go on.
    #[command(subcommand)]
    Transfer(TransferCommand),
    /// Empties a pool: it takes nothing new, and images that nothing refers to go. Shows what still holds it.
    Drain(DrainArgs),
    /// Lets a pool take nothing new; what is there stays.
    Cordon(PoolArgs),
    /// Lets a pool take what is new again, after `cordon` or `drain`.
    Uncordon(PoolArgs),
    /// Looks for what keeps Berth from working: nodes, clocks, stores, definitions, ledgers.
    ///
    /// Ends with 0 if nothing is broken, with 1 if something is.
    Doctor(DoctorArgs),
}

/// The commands about this program itself.
#[derive(Clone, Debug, Subcommand)]
pub enum PagesCommand {
    /// Writes man pages.
    Man(ManArgs),
    /// Prints completions for a shell.
    Completions(CompletionsArgs),
    /// Answers kubectl, which completes `kubectl berth`.
    #[command(name = "__complete", hide = true)]
    Complete(CompleteArgs),
}

/// Flags of `kubectl berth explain`.
#[derive(Clone, Debug, clap::Args)]
pub struct ExplainArgs {
    /// The reservation.
    #[arg(value_name = "RESERVATION")]
    pub name: String,

    /// Its namespace. Default: the context's.
    #[arg(short, long)]
    pub namespace: Option<String>,

    /// How the explanation is printed.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// Flags of `kubectl berth renew`.
#[derive(Clone, Debug, clap::Args)]
pub struct RenewArgs {
    /// The reservation.
    #[arg(value_name = "RESERVATION")]
    pub name: String,

    /// Its namespace. Default: the context's.
    #[arg(short, long)]
    pub namespace: Option<String>,

    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// Flags of `kubectl berth drain`.
#[derive(Clone, Debug, clap::Args)]
pub struct DrainArgs {
    /// The pool.
    #[arg(value_name = "POOL")]
    pub pool: String,

    /// On this node only; may be given more than once. Default: on all.
    #[arg(long, value_name = "NODE")]
    pub node: Vec<String>,

    /// Wait, and show progress, until only volumes are left or nothing.
    #[arg(long, conflicts_with = "undo")]
    pub wait: bool,

    /// Wait no longer than this many seconds; ends with 1 then. Default: as long as it takes.
    #[arg(long, value_name = "SECONDS", requires = "wait")]
    pub at_most: Option<u64>,

    /// Let it take what is new again.
    #[arg(long)]
    pub undo: bool,

    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// Flags of `kubectl berth cordon` and `kubectl berth uncordon`.
#[derive(Clone, Debug, clap::Args)]
pub struct PoolArgs {
    /// The pool.
    #[arg(value_name = "POOL")]
    pub pool: String,
}

/// Flags of `kubectl berth doctor`.
#[derive(Clone, Debug, clap::Args)]
pub struct DoctorArgs {
    /// Only this node, and the image stores that it looks after.
    #[arg(long, value_name = "NODE")]
    pub node: Option<String>,

    /// Show what is in order too, each in its own line.
    #[arg(long)]
    pub all: bool,

    /// How the findings are printed.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
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
            Command::Cluster(ClusterCommand::Status(StatusArgs { output: Output::Json, namespace: Some(_) }))
        ));
    }

    #[test]
    fn a_drain_that_is_undone_is_not_waited_for() {
        assert!(Args::try_parse_from(["kubectl-berth", "drain", "fast", "--undo", "--wait"]).is_err());
        assert!(Args::try_parse_from(["kubectl-berth", "drain", "fast", "--at-most", "5"]).is_err());
        let words = ["kubectl-berth", "drain", "fast", "--node", "a", "--node", "b", "--wait"];
        assert!(Args::try_parse_from(words).is_ok());
    }
}
