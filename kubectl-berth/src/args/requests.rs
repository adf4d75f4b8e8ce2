//! What is asked for: by `fit`, `reserve` and `release`.

use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;

use super::Output;

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

    /// Whether to wait.
    #[command(flatten)]
    pub waiting: Waiting,

    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// Whether a command waits for what it has asked for.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Waiting {
    /// Wait, and show progress, until it is over.
    #[arg(long)]
    pub wait: bool,

    /// Wait no longer than this many seconds; ends with 1 then. Default: as long as it takes.
    #[arg(long, value_name = "SECONDS", requires = "wait")]
    at_most: Option<u64>,
}

impl Waiting {
    /// The longest time to wait, if there is one.
    pub fn at_most(self) -> Option<Duration> {
        self.at_most.map(Duration::from_secs)
    }
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

    /// Whether to wait.
    #[command(flatten)]
    pub waiting: Waiting,

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
    use clap::Parser as _;

    use crate::args::Args;

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
}
