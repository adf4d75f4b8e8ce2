//! Imports and transfers: what is tried again, followed, or has to pause.

use berth_core::transfer::TransferKind;
use clap::Subcommand;

use super::Output;

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

#[cfg(test)]
mod tests {
    use super::*;

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
}
