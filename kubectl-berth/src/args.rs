//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use berth_api::defaults::SYSTEM_NAMESPACE;
use berth_core::transfer::TransferKind;
use clap::{Parser, Subcommand, ValueEnum};

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

/// What is asked for, by flags.
#[derive(Clone, Debug, clap::Args)]
pub struct RequestFlags {
    /// The most that would be written, for example `20Gi`. Default with `--template`: the template's size.
    #[arg(long, value_name = "SIZE")]
    pub size: Option<String>,

    /// This pool only.
    #[arg(long, value_name = "POOL", conflicts_with = "selector")]
    pub pool: Option<String>,

    /// Pools with these labels only, for example `tier=fast,site=a`.
    #[arg(short = 'l', long, value_name = "LABELS", value_parser = parse_labels)]
    pub selector: Option<Labels>,

    /// How the space would be used. Default: `Block` with `--template`, otherwise `File`.
    #[arg(long, value_enum, ignore_case = true)]
    pub access: Option<Access>,

    /// The `TemplateImport` that a volume would start from, as `namespace/name`.
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = parse_object)]
    pub template: Option<(String, String)>,

    /// This node only.
    #[arg(long, value_name = "NODE")]
    pub node: Option<String>,

    /// This zone only.
    #[arg(long, value_name = "ZONE")]
    pub zone: Option<String>,

    /// Its priority; higher ones come first among those that wait.
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-1000..=1000))]
    pub priority: Option<i32>,
}

/// Flags of `kubectl berth fit`.
#[derive(Clone, Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("request").required(true).multiple(true).args(["size", "file", "template"]))]
pub struct FitArgs {
    /// What is asked about.
    #[command(flatten)]
    pub flags: RequestFlags,

    /// A manifest of a `StagingReservation`, in YAML or JSON; `-` is standard input.
    #[arg(short, long, value_name = "FILE", conflicts_with_all = ["size", "pool", "selector", "access", "template", "node", "zone", "priority"])]
    pub file: Option<PathBuf>,

    /// The namespace that would ask. Default: the manifest's, or the context's.
    #[arg(short, long)]
    pub namespace: Option<String>,

    /// How the answer is printed.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// Flags of `kubectl berth reserve`.
#[derive(Clone, Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("request").required(true).multiple(true).args(["size", "template"]))]
pub struct ReserveArgs {
    /// The reservation's name.
    #[arg(value_name = "RESERVATION")]
    pub name: String,

    /// What is asked for.
    #[command(flatten)]
    pub flags: RequestFlags,

    /// Wait in the pool's queue where there is no room, or be refused at once. Default: as the pool says.
    #[arg(long, value_enum, ignore_case = true)]
    pub when_full: Option<WhenFull>,

    /// How long it stays after nothing has used it any more, for example `2h30m`. Default: `1h`.
    #[arg(long, value_name = "SPAN")]
    pub ttl: Option<String>,

    /// Its namespace. Default: the context's.
    #[arg(short, long)]
    pub namespace: Option<String>,

    /// Wait, and show progress, until it is ready or refused.
    #[arg(long)]
    pub wait: bool,

    /// Wait no longer than this many seconds; ends with 1 then. Default: as long as it takes.
    #[arg(long, value_name = "SECONDS", requires = "wait")]
    pub at_most: Option<u64>,

    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// Flags of `kubectl berth release`.
#[derive(Clone, Debug, clap::Args)]
pub struct ReleaseArgs {
    /// The reservation.
    #[arg(value_name = "RESERVATION")]
    pub name: String,

    /// Its namespace. Default: the context's.
    #[arg(short, long)]
    pub namespace: Option<String>,

    /// Wait until its node has given the space back.
    #[arg(long)]
    pub wait: bool,

    /// Wait no longer than this many seconds; ends with 1 then. Default: as long as it takes.
    #[arg(long, value_name = "SECONDS", requires = "wait")]
    pub at_most: Option<u64>,

    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// What becomes of a request for which there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum WhenFull {
    /// It waits.
    Queue,
    /// It is refused.
    Reject,
}

/// How reserved space is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum Access {
    /// A directory.
    File,
    /// A volume.
    Block,
    /// Nothing is written.
    Stream,
}

/// Labels that something must carry, all of them.
pub type Labels = std::collections::BTreeMap<String, String>;

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

/// Flags of `kubectl berth retry`.
#[derive(Clone, Debug, clap::Args)]
pub struct RetryArgs {
    /// The `TemplateImport`, or, as `transfer/NAME`, the `ImageTransfer`.
    #[arg(value_name = "NAME", value_parser = |text: &str| WorkName::parse(text, TransferKind::Import))]
    pub what: WorkName,

    /// Its namespace. Default: the context's.
    #[arg(short, long)]
    pub namespace: Option<String>,

    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// The commands of `kubectl berth transfer`.
#[derive(Clone, Debug, Subcommand)]
pub enum TransferCommand {
    /// Shows how far it is, with a bar, until it has ended.
    ///
    /// Ends with 0 if it succeeded, with 1 if it had not ended in time, with 2 if it failed.
    Wait(WaitArgs),
    /// Has it pause: it keeps its node, its space and what it has done.
    Suspend(TransferArgs),
    /// Lets it go on where it paused.
    Resume(TransferArgs),
}

/// Flags of `kubectl berth transfer wait`.
#[derive(Clone, Debug, clap::Args)]
pub struct WaitArgs {
    /// The `ImageTransfer`, or, as `import/NAME`, the `TemplateImport`.
    #[arg(value_name = "NAME", value_parser = |text: &str| WorkName::parse(text, TransferKind::Transfer))]
    pub what: WorkName,

    /// Its namespace. Default: the context's.
    #[arg(short, long)]
    pub namespace: Option<String>,

    /// Wait no longer than this many seconds. Default: as long as it takes.
    #[arg(long, value_name = "SECONDS")]
    pub at_most: Option<u64>,

    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// Flags of `kubectl berth transfer suspend` and `kubectl berth transfer resume`.
#[derive(Clone, Debug, clap::Args)]
pub struct TransferArgs {
    /// The `ImageTransfer`.
    #[arg(value_name = "NAME")]
    pub name: String,

    /// Its namespace. Default: the context's.
    #[arg(short, long)]
    pub namespace: Option<String>,

    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// An import or a transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkName {
    /// Its kind.
    pub kind: TransferKind,
    /// Its name.
    pub name: String,
}

impl WorkName {
    /// Reads `NAME`, which is of the kind `usual`, or `KIND/NAME` with a name that kubectl has for the kind, or a shorter one.
    fn parse(text: &str, usual: TransferKind) -> Result<Self, String> {
        let (kind, name) = match text.split_once('/') {
            None => (usual, text),
            Some((kind, name)) => match kind.to_ascii_lowercase().as_str() {
                "import" | "imports" | "templateimport" | "templateimports" | "tmplimp" => {
                    (TransferKind::Import, name)
                }
                "transfer" | "transfers" | "imagetransfer" | "imagetransfers" | "imgx" => {
                    (TransferKind::Transfer, name)
                }
                kind => return Err(format!("`{kind}` is neither `import` nor `transfer`")),
            },
        };
        if name.is_empty() {
            return Err("the name is missing".to_owned());
        }
        Ok(Self { kind, name: name.to_owned() })
    }
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

/// `key=value,key=value`.
fn parse_labels(text: &str) -> Result<Labels, String> {
    let pair = |pair: &str| {
        let (key, value) = pair.split_once('=').unwrap_or_default();
        let usable = !key.is_empty() && !key.contains('!') && !value.contains('=');
        usable.then(|| (key.to_owned(), value.to_owned()))
    };
    let all: Option<Labels> = text.split(',').map(pair).collect();
    all.ok_or_else(|| format!("`{text}` is not of the form key=value,key=value"))
}

/// `namespace/name`.
fn parse_object(text: &str) -> Result<(String, String), String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => Err(format!("`{text}` is not of the form namespace/name")),
    }
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
    fn work_may_be_named_with_its_kind() {
        let usual = WorkName::parse("debian", TransferKind::Transfer).expect("a name");
        assert_eq!(usual.kind, TransferKind::Transfer);
        let parse = |text: &str| WorkName::parse(text, TransferKind::Import);
        let is = |kind| Ok(WorkName { kind, name: "debian".to_owned() });
        for import in ["debian", "import/debian", "templateimports/debian", "TmplImp/debian"] {
            assert_eq!(parse(import), is(TransferKind::Import), "{import}");
        }
        for transfer in ["transfer/debian", "imagetransfer/debian", "imgx/debian"] {
            assert_eq!(parse(transfer), is(TransferKind::Transfer), "{transfer}");
        }
        for bad in ["pod/debian", "transfer/", ""] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn fit_takes_a_request_by_flags_or_as_a_manifest() {
        let parse = |flags: &[&str]| {
            let words = ["kubectl-berth", "fit"].iter().chain(flags);
            Args::try_parse_from(words).map_err(|error| error.to_string())
        };
        for good in [
            &["--size", "20Gi", "--pool", "fast", "--access", "block", "--priority", "-5"][..],
            &["--template", "images/debian", "-l", "tier=fast,site=a"],
            &["-f", "request.yaml", "-n", "team"],
        ] {
            assert!(parse(good).is_ok(), "{good:?}: {:?}", parse(good));
        }
        for (bad, says) in [
            (&[][..], "--size"),
            (&["--pool", "fast"], "--size"),
            (&["--size", "1Gi", "--pool", "p", "-l", "a=b"], "cannot be used with"),
            (&["--size", "1Gi", "-f", "x.yaml"], "cannot be used with"),
            (&["--size", "1Gi", "-l", "fast"], "`fast` is not of the form key=value"),
            (&["--size", "1Gi", "-l", "a!=b"], "`a!=b` is not of the form key=value"),
            (&["--template", "debian"], "`debian` is not of the form namespace/name"),
            (&["--size", "1Gi", "--priority", "1001"], "1001"),
            (&["--size", "1Gi", "--access", "nfs"], "nfs"),
        ] {
            let error = parse(bad).expect_err("refused");
            assert!(error.contains(says), "{bad:?}: {error}");
        }
    }

    #[test]
    fn a41_a_reservation_is_made_of_the_flags_that_fit_takes() {
        let parse = |flags: &[&str]| {
            let words = ["kubectl-berth", "reserve"].iter().chain(flags);
            Args::try_parse_from(words).map(drop).map_err(|error| error.to_string())
        };
        let all =
            ["room", "--size", "20Gi", "--pool", "fast", "--when-full", "reject", "--ttl", "2h", "--wait"];
        assert_eq!(parse(&all), Ok(()));
        assert_eq!(parse(&["disk", "--template", "images/debian", "--zone", "a"]), Ok(()));
        for (bad, says) in [
            (&["--size", "1Gi"][..], "RESERVATION"),
            (&["room"], "--size"),
            (&["room", "--size", "1Gi", "--at-most", "5"], "--wait"),
            (&["room", "--size", "1Gi", "--when-full", "maybe"], "maybe"),
            (&["room", "-f", "x.yaml"], "-f"),
        ] {
            let error = parse(bad).expect_err("refused");
            assert!(error.contains(says), "{bad:?}: {error}");
        }
    }

    #[test]
    fn a_drain_that_is_undone_is_not_waited_for() {
        assert!(Args::try_parse_from(["kubectl-berth", "drain", "fast", "--undo", "--wait"]).is_err());
        assert!(Args::try_parse_from(["kubectl-berth", "drain", "fast", "--at-most", "5"]).is_err());
        let words = ["kubectl-berth", "drain", "fast", "--node", "a", "--node", "b", "--wait"];
        assert!(Args::try_parse_from(words).is_ok());
    }
}
