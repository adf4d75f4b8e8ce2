//! `berth-node transfer`: an image from anywhere, as one object in a bucket, in the format of another tool.

mod source;

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_api::defaults;
use berth_core::ids::{Digest, NodeName, ObjectName, Sha256Sum, Uid};
use berth_core::transfer::{Compression, NoRoute, OutputFormat};
use berth_core::units::{Bytes, Generation};
use berth_image::{ImageFormat, ProbeError};
use berth_objectstore::chunks::store::OpenError;
use berth_objectstore::layout::LayoutError;
use clap::{Args, ValueEnum};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use self::source::{Looked, SourceArg, source_arg};
use super::object_store::{StoreArgs, StoreArgsError};
use super::work_dir::{Bar, WorkDir, WorkDirError};
use crate::args::{DefaultStaging, Output};
use crate::transfer::{
    CONVERSION_WINDOW, Claim, Limits, ObjectAttempt, ObjectTarget, Reporter, SentObject, TransferError,
    TransferJob, abandon_object, again, send,
};

/// A format that is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    /// The disk's bytes.
    Raw,
    /// QEMU's, compressed with deflate.
    Qcow2,
    /// QEMU's, compressed with zstd: QEMU 5.1 and later.
    Qcow2Zstd,
    /// QEMU's, not compressed.
    Qcow2Plain,
    /// `VMware`'s, stream-optimised.
    Vmdk,
    /// Virtual PC's and Azure's, dynamic.
    Vhd,
}

impl From<FormatArg> for OutputFormat {
    fn from(format: FormatArg) -> Self {
        match format {
            FormatArg::Raw => Self::Raw,
            FormatArg::Qcow2 => Self::Qcow2 { compression: Compression::Zlib },
            FormatArg::Qcow2Zstd => Self::Qcow2 { compression: Compression::Zstd },
            FormatArg::Qcow2Plain => Self::Qcow2 { compression: Compression::None },
            FormatArg::Vmdk => Self::Vmdk,
            FormatArg::Vhd => Self::Vhd,
        }
    }
}

/// A format that is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SourceFormatArg {
    /// The disk's bytes.
    Raw,
    /// QEMU's.
    Qcow2,
    /// `VMware`'s.
    Vmdk,
    /// Virtual PC's and Azure's.
    Vhd,
    /// Hyper-V's.
    Vhdx,
}

impl From<SourceFormatArg> for ImageFormat {
    fn from(format: SourceFormatArg) -> Self {
        match format {
            SourceFormatArg::Raw => Self::Raw,
            SourceFormatArg::Qcow2 => Self::Qcow2,
            SourceFormatArg::Vmdk => Self::Vmdk,
            SourceFormatArg::Vhd => Self::Vhd,
            SourceFormatArg::Vhdx => Self::Vhdx,
        }
    }
}

/// Flags of `berth-node transfer`.
#[derive(Clone, Debug, Args)]
pub struct TransferArgs {
    /// The image: a file, an http or https address, or `store:NAMESPACE/NAME` for an image of the image store.
    #[arg(value_parser = source_arg)]
    pub source: SourceArg,
    /// The key of the object that it becomes. What is there is replaced.
    #[arg(long)]
    pub key: String,
    /// The format of the object.
    #[arg(long, value_enum)]
    pub format: FormatArg,
    /// The bucket, of the object and of the image store.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Where in the bucket the image store lies, for `store:`.
    #[arg(long, env = "BERTH_STORE_PREFIX", default_value = "")]
    pub prefix: String,
    /// The source's format. Default: what its head says.
    #[arg(long, value_enum)]
    pub source_format: Option<SourceFormatArg>,
    /// What the source's bytes must add up to: `sha256:…`.
    #[arg(long)]
    pub checksum: Option<Digest>,
    /// Whether the source is fetched into the work directory first.
    #[arg(long, value_enum, default_value_t = DefaultStaging::Auto)]
    pub staging: DefaultStaging,
    /// The largest virtual size in GiB.
    #[arg(long, value_name = "GIB", default_value_t = defaults::SIZE_LIMIT_BYTES >> 30)]
    pub max_virtual_size: u64,
    /// Where the work is kept until it is done. Default: a directory of its own among the system's temporary ones.
    #[arg(long)]
    pub work_dir: Option<PathBuf>,
    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// Why an image was not transferred.
#[derive(Debug, Error)]
pub enum TransferCommandError {
    /// A file or directory.
    #[error("failed to {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The image cannot be read.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// The way that is asked for.
    #[error("--staging")]
    Route(#[from] NoRoute),
    /// There is no such image.
    #[error("the image store has no image {0}")]
    NoImage(ObjectName),
    /// The prefix.
    #[error("--prefix")]
    Prefix(#[from] LayoutError),
    /// The client.
    #[error(transparent)]
    Connect(#[from] StoreArgsError),
    /// The image store.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The work directory.
    #[error(transparent)]
    WorkDir(#[from] WorkDirError),
    /// The transfer.
    #[error("the transfer failed")]
    Transfer(#[from] TransferError),
    /// The result cannot be printed.
    #[error("failed to print the result")]
    Print(#[source] io::Error),
}

impl TransferCommandError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }
}

/// Nobody else has the work of a command.
struct Ours;

impl Claim for Ours {
    fn holds(&self) -> BoxFuture<'_, bool> {
        futures::future::ready(true).boxed()
    }
}

/// Runs the command until it is done or `cancel` is cancelled.
pub async fn run(args: &TransferArgs, cancel: &CancellationToken) -> Result<(), TransferCommandError> {
    let object = transfer(args, cancel).await?;
    print(args, &object).map_err(TransferCommandError::Print)
}

/// Transfers an image, and removes what the work has left.
async fn transfer(
    args: &TransferArgs,
    cancel: &CancellationToken,
) -> Result<SentObject, TransferCommandError> {
    let store = args.store.connect().await?;
    let (format, limits) = (args.source_format.map(ImageFormat::from), limits(args));
    let Looked { source, shape, identity } = match &args.source {
        SourceArg::File(path) => source::file(path, format, &limits)?,
        SourceArg::Url(url) => {
            source::url(url, format, &limits, (args.staging.into(), args.checksum.is_some())).await?
        }
        SourceArg::Stored(name) => {
            source::stored(store.clone(), &args.prefix, name, args.staging.into()).await?
        }
    };
    let (uid, node) = (work_uid(args, &identity), NodeName::from("command"));
    let dir = WorkDir::open(args.work_dir.as_deref(), &uid, &node)?;
    dir.check_space(shape.peak_bytes())?;
    let job = TransferJob {
        uid,
        generation: Generation::FIRST,
        name: ObjectName::new("command", "transfer"),
        node,
        limits,
        format,
        checksum: args.checksum.map(|digest| digest.0),
        promised: shape.peak_bytes(),
        dir: dir.path.clone(),
    };
    let target = ObjectTarget { store, key: args.key.clone(), format: args.format.into() };
    let (journal, bar) = (dir.journal(), Arc::new(Bar::new(args.output)));
    let reporter: Arc<dyn Reporter> = Arc::clone(&bar) as _;
    let attempt = ObjectAttempt {
        job: &job,
        source: &source,
        target: &target,
        journal: &journal,
        reporter: &reporter,
        resume: None,
        claim: &Ours,
    };
    let outcome = again(&journal, limits.retries, &*bar, cancel, || send(&attempt, cancel)).await;
    bar.clear();
    // Only what another start goes on with stays.
    let goes_on = matches!(outcome, Err(TransferError::Cancelled | TransferError::Exhausted { .. }));
    if outcome.is_err()
        && !goes_on
        && let Err(left) = abandon_object(&job, &target, &journal, None).await
    {
        tracing::warn!(error = left.chain(), "traces of the failed transfer stay");
    }
    if !goes_on {
        drop(journal);
        dir.remove()?;
    }
    Ok(outcome?)
}

/// The identity of the work: the same source, unchanged, to the same object goes on where it was; anything else does not.
fn work_uid(args: &TransferArgs, identity: &str) -> Uid {
    let StoreArgs { store_endpoint, bucket, .. } = &args.store;
    let endpoint = store_endpoint.as_deref().unwrap_or_default();
    let text = format!("{identity}\n{endpoint}\n{bucket}\n{}\n{:?}", args.key, args.format);
    Uid(format!("transfer-{}", &Sha256Sum::of(text.as_bytes()).to_string()[..32]))
}

fn limits(args: &TransferArgs) -> Limits {
    Limits {
        virtual_size: Bytes::gib(args.max_virtual_size),
        bytes: Bytes(u64::MAX),
        stall: Duration::from_secs(defaults::STALL_TIMEOUT_SECONDS),
        retries: defaults::RETRY_LIMIT,
        conversion_window: CONVERSION_WINDOW,
    }
}

fn print(args: &TransferArgs, object: &SentObject) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match args.output {
        Output::Text => writeln!(
            out,
            "s3://{}/{} has {}, of a disk of {}",
            args.store.bucket, args.key, object.size, object.virtual_size
        ),
        Output::Json => {
            let mut value = serde_json::to_value(object)?;
            value["key"] = args.key.clone().into();
            writeln!(out, "{value}")
        }
    }
}
