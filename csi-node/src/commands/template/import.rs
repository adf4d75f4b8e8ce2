//! `berth-node template import`: a file into an image store.

use std::io::{self, IsTerminal as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_api::defaults;
use berth_core::ids::{Digest, NodeName, ObjectName, Sha256Sum, Uid};
use berth_core::stages::{Shape, Stage};
use berth_core::units::{Bytes, Generation};
use berth_image::{ProbeError, probe_file};
use berth_objectstore::chunks::caibx::{ChunkSize, IndexError};
use berth_objectstore::chunks::store::{ChunkStore, OpenError};
use berth_objectstore::layout::{LayoutError, StoreLayout};
use berth_objectstore::s3::S3Store;
use berth_record::{CreateError, NodeRecord, OpenError as RecordOpenError};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::sys::statvfs::statvfs;
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use crate::args::Output;
use crate::commands::object_store::{StoreArgs, StoreArgsError};
use crate::transfer::probe::checked;
use crate::transfer::{
    Durable, Journal, Limits, Observer, Origin, Reporter, Snapshot, Source, TransferError, TransferJob,
    abandon, import,
};

/// Flags of `berth-node template import`.
#[derive(Clone, Debug, Args)]
pub struct ImportArgs {
    /// The image: raw, qcow2, vmdk, vhd or vhdx. It is read where it lies, and never written.
    pub file: PathBuf,
    /// Where.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Where in the bucket the image store lies.
    #[arg(long, env = "BERTH_STORE_PREFIX", default_value = "")]
    pub prefix: String,
    /// The store's chunk size in KiB: a power of two from 64 to 4096.
    #[arg(long, value_name = "KIB", default_value_t = defaults::CHUNK_SIZE_BYTES >> 10)]
    pub chunk_size: u64,
    /// Namespace and name of the template: `NAMESPACE/NAME`.
    #[arg(long, value_parser = object_name)]
    pub name: ObjectName,
    /// What the file's bytes must add up to: `sha256:…`.
    #[arg(long)]
    pub checksum: Option<Digest>,
    /// The largest virtual size in GiB.
    #[arg(long, value_name = "GIB", default_value_t = defaults::SIZE_LIMIT_BYTES >> 30)]
    pub max_virtual_size: u64,
    /// Where the work is kept until it is done: the index, and the raw image if a tool must convert. Default: a directory
    /// of its own among the system's temporary ones.
    #[arg(long)]
    pub work_dir: Option<PathBuf>,
    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// Why a template was not imported.
#[derive(Debug, Error)]
pub enum TemplateError {
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
    /// The image cannot be imported.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// The work directory is too small.
    #[error("{} has {available} available, and up to {needed} are needed", path.display())]
    Space {
        /// The directory.
        path: PathBuf,
        /// What it has.
        available: Bytes,
        /// What is needed.
        needed: Bytes,
    },
    /// The chunk size.
    #[error("--chunk-size")]
    ChunkSize(#[from] IndexError),
    /// The prefix.
    #[error("--prefix")]
    Prefix(#[from] LayoutError),
    /// The client.
    #[error(transparent)]
    Connect(#[from] StoreArgsError),
    /// The store.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The record in the work directory cannot be made.
    #[error(transparent)]
    CreateRecord(#[from] CreateError),
    /// The record in the work directory cannot be opened.
    #[error(transparent)]
    OpenRecord(#[from] RecordOpenError),
    /// The import.
    #[error("failed to import {}", path.display())]
    Import {
        /// The image.
        path: PathBuf,
        /// Why.
        source: Box<TransferError>,
    },
    /// The result cannot be printed.
    #[error("failed to print the result")]
    Print(#[source] io::Error),
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TemplateError {
    let path = path.to_owned();
    move |source| TemplateError::File { action, path, source }
}

/// Runs the command until it is done or `cancel` is cancelled.
pub async fn run(args: &ImportArgs, cancel: &CancellationToken) -> Result<(), TemplateError> {
    let durable = import_file(args, cancel).await?;
    print(args, &durable).map_err(TemplateError::Print)
}

/// Imports a file, and removes what the work has left.
pub async fn import_file(args: &ImportArgs, cancel: &CancellationToken) -> Result<Durable, TemplateError> {
    let file = args.file.canonicalize().map_err(failed("find", &args.file))?;
    probe_file(&file)?;
    let uid = work_uid(args, &file)?;
    let chunk_size = ChunkSize::new(Bytes::kib(args.chunk_size))?;
    let limits = limits(args);
    let dir = args.work_dir.clone().unwrap_or_else(|| std::env::temp_dir().join(format!("berth-{uid}")));
    std::fs::create_dir_all(&dir).map_err(failed("make", &dir))?;
    let job = TransferJob {
        uid: uid.clone(),
        generation: Generation::FIRST,
        name: args.name.clone(),
        node: NodeName::from("command"),
        limits,
        format: None,
        checksum: args.checksum.map(|digest| digest.0),
        promised: space(&file, &dir, &limits, chunk_size)?,
        dir,
    };
    let chunks = open_store(args, chunk_size).await?;
    let record = job.dir.join("record.redb");
    let journal = Journal::new(Arc::new(open_record(&record, &job.node)?), uid, job.generation);
    let (bar, source) = (Arc::new(Bar::new(args)), Source::Staged(Origin::Local(file)));
    let reporter: Arc<dyn Reporter> = Arc::clone(&bar) as _;
    let outcome = import(&job, &source, &chunks, &journal, &reporter, &*bar, cancel).await;
    bar.0.finish_and_clear();
    if let Err(error) = &outcome
        && !matches!(error, TransferError::Cancelled | TransferError::Exhausted { .. })
        && let Err(left) = abandon(&job, &chunks, &journal, false).await
    {
        tracing::warn!(error = left.chain(), "traces of the failed import stay");
    }
    // Only what another start goes on with stays.
    if !matches!(outcome, Err(TransferError::Cancelled | TransferError::Exhausted { .. })) {
        clean_up(args, &job, &record, journal)?;
    }
    outcome.map_err(|source| TemplateError::Import { path: args.file.clone(), source: Box::new(source) })
}

/// The identity of the work: the same file, unchanged, under the same name goes on where it was; anything else does not.
fn work_uid(args: &ImportArgs, file: &Path) -> Result<Uid, TemplateError> {
    let meta = file.metadata().map_err(failed("look at", file))?;
    let name = file.as_os_str().as_encoded_bytes();
    let text =
        format!("{}\n{}\n{}.{}\n{}", meta.dev(), meta.size(), meta.mtime(), meta.mtime_nsec(), args.name);
    let sum = Sha256Sum::of(&[text.as_bytes(), b"\n", name].concat()).to_string();
    Ok(Uid(format!("file-{}", &sum[..32])))
}

fn limits(args: &ImportArgs) -> Limits {
    Limits {
        virtual_size: Bytes::gib(args.max_virtual_size),
        bytes: Bytes(u64::MAX),
        stall: Duration::from_secs(defaults::STALL_TIMEOUT_SECONDS),
        retries: defaults::RETRY_LIMIT,
    }
}

/// What the work needs, if the directory has it.
fn space(file: &Path, dir: &Path, limits: &Limits, chunk_size: ChunkSize) -> Result<Bytes, TemplateError> {
    let probe = probe_file(file)?;
    let imported =
        |source: TransferError| TemplateError::Import { path: file.to_owned(), source: Box::new(source) };
    let probed = checked(&probe, Bytes::ZERO, limits).map_err(imported)?;
    let shape = Shape { in_place: true, ..probed.shape(Some(chunk_size.size())) };
    let found = statvfs(dir).map_err(|errno| failed("look at the space of", dir)(errno.into()))?;
    let available = Bytes(found.blocks_available().saturating_mul(found.fragment_size()));
    let needed = shape.peak_bytes();
    if needed > available {
        return Err(TemplateError::Space { path: dir.to_owned(), available, needed });
    }
    Ok(needed)
}

async fn open_store(args: &ImportArgs, chunk_size: ChunkSize) -> Result<ChunkStore<S3Store>, TemplateError> {
    let store = args.store.connect().await?;
    Ok(ChunkStore::open_or_create(store, StoreLayout::new(&args.prefix)?, chunk_size).await?)
}

fn open_record(path: &Path, node: &NodeName) -> Result<NodeRecord, TemplateError> {
    match NodeRecord::open(path, node) {
        Err(RecordOpenError::NotFound { .. }) => Ok(NodeRecord::create(path, node)?),
        other => Ok(other?),
    }
}

/// Removes the record, and the directory if it is ours.
fn clean_up(
    args: &ImportArgs,
    job: &TransferJob,
    record: &Path,
    journal: Journal,
) -> Result<(), TemplateError> {
    drop(journal);
    std::fs::remove_file(record).map_err(failed("remove", record))?;
    if args.work_dir.is_none() {
        std::fs::remove_dir(&job.dir).map_err(failed("remove", &job.dir))?;
    }
    Ok(())
}

fn print(args: &ImportArgs, durable: &Durable) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match args.output {
        Output::Text => writeln!(
            out,
            "{} is {}: {} virtual, {} of them data, {} stored in {} chunks",
            args.name,
            durable.digest,
            durable.virtual_size,
            durable.real_size,
            durable.stored_bytes,
            durable.chunks
        ),
        Output::Json => {
            let mut value = serde_json::to_value(durable)?;
            value["name"] = args.name.to_string().into();
            writeln!(out, "{value}")
        }
    }
}

/// The progress bar, where a person looks.
struct Bar(ProgressBar);

impl Bar {
    fn new(args: &ImportArgs) -> Self {
        let shown = io::stderr().is_terminal() && args.output == Output::Text;
        let target = if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(100), target);
        if let Ok(style) = ProgressStyle::with_template("{msg:<8} {wide_bar} {pos:>3} %  {elapsed_precise}") {
            bar.set_style(style);
        }
        Self(bar)
    }
}

impl Reporter for Bar {
    fn progress(&self, shape: &Shape, now: Snapshot) {
        let percent = u64::from(shape.percent(now.stage, now.done, now.total));
        self.0.set_position(percent.max(self.0.position()));
        if now.stage >= Stage::Upload || now.done == Bytes::ZERO {
            self.0.set_message(now.stage.as_str());
        }
    }
}

impl Observer for Bar {
    fn attempt(&self, _: u32) {}

    fn retrying(&self, error: &TransferError, pause: Duration) {
        self.0.println(format!("{}; tried again in {} s", error.chain(), pause.as_secs()));
    }
}

/// `NAMESPACE/NAME` of a template.
pub(super) fn object_name(text: &str) -> Result<ObjectName, String> {
    let part = |part: &str| {
        let valid = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
        !part.is_empty() && part.bytes().all(valid)
    };
    match text.split_once('/') {
        Some((namespace, name)) if part(namespace) && part(name) => Ok(ObjectName::new(namespace, name)),
        _ => Err("NAMESPACE/NAME, of lower-case letters, digits, dashes and dots".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_two_parts() {
        assert_eq!(object_name("images/debian-12"), Ok(ObjectName::new("images", "debian-12")));
        for wrong in ["debian", "/x", "x/", "a/b/c", "A/b", ""] {
            assert!(object_name(wrong).is_err(), "{wrong}");
        }
    }
}
