//! `berth-node template import`: a file into an image store.

use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_api::defaults;
use berth_core::ids::{Digest, NodeName, ObjectName, Sha256Sum, Uid};
use berth_core::stages::Shape;
use berth_core::units::{Bytes, Generation};
use berth_image::{ProbeError, probe_file};
use berth_objectstore::chunks::caibx::{ChunkSize, IndexError};
use berth_objectstore::chunks::store::{ChunkStore, OpenError};
use berth_objectstore::layout::{LayoutError, StoreLayout};
use berth_objectstore::s3::S3Store;
use clap::Args;
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use crate::args::Output;
use crate::commands::object_store::{StoreArgs, StoreArgsError};
use crate::commands::work_dir::{Bar, WorkDir, WorkDirError};
use crate::transfer::probe::checked;
use crate::transfer::{
    CONVERSION_WINDOW, Durable, Limits, Origin, Reporter, Source, TransferError, TransferJob, abandon, import,
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
    /// A file.
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
    /// The work directory.
    #[error(transparent)]
    WorkDir(#[from] WorkDirError),
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
    let (uid, node) = (work_uid(args, &file)?, NodeName::from("command"));
    let chunk_size = ChunkSize::new(Bytes::kib(args.chunk_size))?;
    let limits = limits(args);
    let needed = needed(&file, &limits, chunk_size)?;
    let dir = WorkDir::open(args.work_dir.as_deref(), &uid, &node)?;
    dir.check_space(needed)?;
    let job = TransferJob {
        uid,
        generation: Generation::FIRST,
        name: args.name.clone(),
        node,
        limits,
        format: None,
        checksum: args.checksum.map(|digest| digest.0),
        promised: needed,
        dir: dir.path.clone(),
    };
    let chunks = open_store(args, chunk_size).await?;
    let journal = dir.journal();
    let (bar, source) = (Arc::new(Bar::new(args.output)), Source::Staged(Origin::Local(file)));
    let reporter: Arc<dyn Reporter> = Arc::clone(&bar) as _;
    let outcome = import(&job, &source, &chunks, &journal, &reporter, &*bar, cancel).await;
    bar.clear();
    // Only what another start goes on with stays.
    let goes_on = matches!(outcome, Err(TransferError::Cancelled | TransferError::Exhausted { .. }));
    if outcome.is_err()
        && !goes_on
        && let Err(left) = abandon(&job, &chunks, &journal, false).await
    {
        tracing::warn!(error = left.chain(), "traces of the failed import stay");
    }
    if !goes_on {
        drop(journal);
        dir.remove()?;
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
        conversion_window: CONVERSION_WINDOW,
    }
}

/// What the work needs.
fn needed(file: &Path, limits: &Limits, chunk_size: ChunkSize) -> Result<Bytes, TemplateError> {
    let probe = probe_file(file)?;
    let imported =
        |source: TransferError| TemplateError::Import { path: file.to_owned(), source: Box::new(source) };
    let probed = checked(&probe, Bytes::ZERO, limits).map_err(imported)?;
    let shape = Shape { in_place: true, ..probed.shape(Some(chunk_size.size())) };
    Ok(shape.peak_bytes())
}

async fn open_store(args: &ImportArgs, chunk_size: ChunkSize) -> Result<ChunkStore<S3Store>, TemplateError> {
    let store = args.store.connect().await?;
    Ok(ChunkStore::open_or_create(store, StoreLayout::new(&args.prefix)?, chunk_size).await?)
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

/// `NAMESPACE/NAME` of a template.
pub(crate) fn object_name(text: &str) -> Result<ObjectName, String> {
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
