//! `berth-node file`: an object of a store becomes a file, and a file an object, by the library that does so for pods.
//!
//! How far the work is lies in a record in a directory of its own. The same command goes on from there, and removes it at the
//! end.

mod desk;
mod error;

use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use berth_api::defaults;
use berth_core::ids::{Digest, Sha256Sum};
use berth_core::reason::ReasonClass;
use berth_core::retry::{Failures, Fault, Next};
use berth_core::units::Bytes;
use berth_device::files::{remove_if_there, rename_durably};
use berth_objectstore::StoreError;
use berth_objectstore::s3::S3Store;
use berth_objectstore::source::ObjectSource;
use berth_record::SentFile;
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use self::desk::Desk;
pub use self::error::FileCommandError;
use super::object_store::StoreArgs;
use crate::args::Output;
use crate::files::{self, FileError, Progress};
use crate::telemetry::chain;

/// For how long a store that sends nothing counts as slow.
const STALL: Duration = Duration::from_secs(defaults::STALL_TIMEOUT_SECONDS);

/// Flags of `berth-node file`.
#[derive(Clone, Debug, Args)]
pub struct FileArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: FileCommand,
}

/// What can be done with files.
#[derive(Clone, Debug, Subcommand)]
pub enum FileCommand {
    /// Fetches an object of a store into a file. Stopped at any moment, the same command goes on where it was.
    ///
    /// The file appears, or is replaced, once all of the object is there and verified; until then it lies in `.FILE.berth`
    /// beside it. Credentials come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, …).
    Fetch(Box<FetchArgs>),
    /// Sends a file to a store. Stopped at any moment, the same command goes on where it was.
    ///
    /// It ends well once the store vouches for every byte, or all of them were read back. Credentials come from the environment
    /// (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, …).
    Send(Box<SendArgs>),
}

/// Flags of `berth-node file fetch`.
#[derive(Clone, Debug, Args)]
pub struct FetchArgs {
    /// The object's key.
    pub key: String,
    /// The file that it becomes.
    pub file: PathBuf,
    /// The object's version, in a bucket that keeps versions. Default: the latest.
    #[arg(long)]
    pub version_id: Option<String>,
    /// What the object's bytes must add up to: `sha256:…`.
    #[arg(long)]
    pub checksum: Option<Digest>,
    /// Where.
    #[command(flatten)]
    pub store: StoreArgs,
    /// How.
    #[command(flatten)]
    pub manner: MannerArgs,
}

/// Flags of `berth-node file send`.
#[derive(Clone, Debug, Args)]
pub struct SendArgs {
    /// The file. It must not change meanwhile.
    pub file: PathBuf,
    /// The object's key. What is there is replaced.
    pub key: String,
    /// Where it is kept how far the work is, until it is done. Default: a directory of its own among the system's temporary ones.
    #[arg(long, value_name = "DIR")]
    pub work_dir: Option<PathBuf>,
    /// Where.
    #[command(flatten)]
    pub store: StoreArgs,
    /// How.
    #[command(flatten)]
    pub manner: MannerArgs,
}

/// Flags of both.
#[derive(Clone, Debug, Args)]
pub struct MannerArgs {
    /// How often in a row a fault that passes is tried again without coming any further.
    #[arg(long, default_value_t = defaults::RETRY_LIMIT)]
    pub retries: u32,
    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// Runs the command until it is done or `cancel` is cancelled.
///
/// # Errors
/// [`FileCommandError`]; what the same command can go on with stays.
pub async fn run(args: &FileArgs, cancel: &CancellationToken) -> Result<(), FileCommandError> {
    match &args.command {
        FileCommand::Fetch(args) => {
            let (size, sum) = fetch(args, cancel).await?;
            let place = format!("s3://{}/{}", args.store.bucket, args.key);
            print(&args.manner, (args.file.as_path(), place.as_str()), size, sum, None)
        }
        FileCommand::Send(args) => {
            let sent = send(args, cancel).await?;
            let place = format!("s3://{}/{}", args.store.bucket, args.key);
            print(&args.manner, (args.file.as_path(), place.as_str()), sent.size, sent.sha256, Some(&sent))
        }
    }
}

async fn fetch(args: &FetchArgs, cancel: &CancellationToken) -> Result<(Bytes, Digest), FileCommandError> {
    let store = args.store.connect().await?;
    let endpoint = args.store.store_endpoint.as_deref().unwrap_or_default();
    let version = args.version_id.as_deref().unwrap_or_default();
    let desk = Desk::for_fetch(&args.file, &[endpoint, &args.store.bucket, &args.key, version])?;
    let bar = Bar::new("Fetch", &args.manner);
    let fetched = bar
        .persist(args.manner.retries, cancel, async || {
            let source = ObjectSource::new(store.clone(), &args.key, args.version_id.clone(), STALL);
            files::fetch(&desk.work(bar.progress(), cancel), source.into()).await
        })
        .await;
    let verified = match fetched {
        Ok(()) => verify(args, &store, &desk, &bar, cancel).await,
        Err(error) => Err(error.into()),
    };
    bar.bar.finish_and_clear();
    match verified {
        Ok((size, sum)) => {
            rename_durably(&desk.file(), &args.file).map_err(FileCommandError::Place)?;
            desk.remove()?;
            Ok((size, sum))
        }
        // What has arrived is not what was asked for: nothing can go on with it.
        Err(error @ FileCommandError::Checksum { .. }) => {
            remove_if_there(&desk.file()).map_err(FileCommandError::Place)?;
            desk.remove()?;
            Err(error)
        }
        Err(error) => {
            desk.remove_unless_begun()?;
            Err(error)
        }
    }
}

/// Reads what has arrived back, and compares it with what was asked for, or with what the store says of the object.
async fn verify(
    args: &FetchArgs,
    store: &S3Store,
    desk: &Desk,
    bar: &Bar,
    cancel: &CancellationToken,
) -> Result<(Bytes, Digest), FileCommandError> {
    bar.stage("Verify");
    let work = desk.work(bar.progress(), cancel);
    let (size, sum) = tokio::task::spawn_blocking(move || files::sum(&work)).await??;
    let differs = |expected: String| FileCommandError::Checksum {
        file: args.file.clone(),
        found: Digest(sum),
        expected,
    };
    if let Some(wanted) = args.checksum.filter(|wanted| wanted.0 != sum) {
        return Err(differs(wanted.to_string()));
    }
    if args.checksum.is_none() && args.version_id.is_none() {
        let stored = match store.stored(&args.key).await {
            Err(StoreError::NotFound { .. }) => return Ok((size, Digest(sum))), // removed since; what it was is here
            stored => stored.map_err(FileError::from)?,
        };
        // One that was made of parts has a checksum of these, and a number behind it.
        let whole = stored.sha256.as_ref().filter(|told| !told.contains('-'));
        if let Some(told) = whole.filter(|_| !stored.has_sum(sum)) {
            return Err(differs(format!("base64 {told}, which the store says of it")));
        }
    }
    Ok((size, Digest(sum)))
}

async fn send(args: &SendArgs, cancel: &CancellationToken) -> Result<SentFile, FileCommandError> {
    let store = args.store.connect().await?;
    let endpoint = args.store.store_endpoint.as_deref().unwrap_or_default();
    let desk =
        Desk::for_send(&args.file, args.work_dir.as_deref(), &[endpoint, &args.store.bucket, &args.key])?;
    let bar = Bar::new("Upload", &args.manner);
    let sent = bar
        .persist(args.manner.retries, cancel, async || {
            files::push(&desk.work(bar.progress(), cancel), &store, &args.key).await
        })
        .await;
    bar.bar.finish_and_clear();
    match sent {
        Ok(sent) => {
            desk.remove()?;
            Ok(sent)
        }
        Err(error) => {
            desk.remove_unless_begun()?;
            Err(error.into())
        }
    }
}

fn print(
    manner: &MannerArgs,
    (file, place): (&Path, &str),
    size: Bytes,
    digest: Digest,
    sent: Option<&SentFile>,
) -> Result<(), FileCommandError> {
    let mut out = io::stdout().lock();
    let file = file.display().to_string();
    let printed = match manner.output {
        Output::Text if sent.is_some() => writeln!(out, "{file} is {place}: {size}, {digest}"),
        Output::Text => writeln!(out, "{place} is {file}: {size}, {digest}"),
        Output::Json => {
            let mut told =
                json!({"file": file, "object": place, "size": size.0, "digest": digest.to_string()});
            if let Some(sent) = sent {
                told["etag"] = json!(sent.etag);
                told["versionId"] = json!(sent.version);
            }
            writeln!(out, "{told}")
        }
    };
    printed.map_err(FileCommandError::Print)
}

/// The progress bar, where a person looks, and how far the work ever came.
struct Bar {
    bar: ProgressBar,
    reached: Arc<AtomicU64>,
}

impl Bar {
    fn new(stage: &'static str, manner: &MannerArgs) -> Self {
        let shown = io::stderr().is_terminal() && manner.output == Output::Text;
        let target = if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(None, target);
        let style = "{msg:<8} {wide_bar} {percent:>3} %  {bytes} of {total_bytes}  {bytes_per_sec}  {eta}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        bar.set_message(stage);
        Self { bar, reached: Arc::default() }
    }

    fn stage(&self, stage: &'static str) {
        self.bar.set_message(stage);
        self.bar.set_position(0);
        self.bar.reset_eta();
    }

    fn progress(&self) -> Progress {
        let (bar, reached) = (self.bar.clone(), Arc::clone(&self.reached));
        Arc::new(move |done, total| {
            if bar.length() != Some(total.0) {
                bar.set_length(total.0);
                bar.set_position(done.0);
                bar.reset_eta(); // what an earlier command has done tells nothing of the rate
            }
            bar.set_position(done.0);
            reached.fetch_max(done.0, Ordering::Relaxed);
        })
    }

    /// Tries until it is done, or has failed for good or as often as it may in a row without coming any further.
    async fn persist<T>(
        &self,
        retries: u32,
        cancel: &CancellationToken,
        attempt: impl AsyncFn() -> Result<T, FileError>,
    ) -> Result<T, FileError> {
        let mut failures = Failures::default();
        loop {
            let before = self.reached.load(Ordering::Relaxed);
            let error = match attempt().await {
                Err(error) if !matches!(error, FileError::Cancelled) => error,
                outcome => return outcome,
            };
            let ends = error.reason().class() == ReasonClass::Terminal;
            let fault = if ends { Fault::Lasting } else { Fault::Passing };
            let progressed = self.reached.load(Ordering::Relaxed) > before;
            let Next::Again(millis) = failures.note(fault, progressed, retries) else { return Err(error) };
            let said = format!("{}; tried again in {} s", chain(&error), millis / 1000);
            tracing::warn!("{said}");
            self.bar.println(said);
            let pause = tokio::time::sleep(Duration::from_millis(millis));
            cancel.run_until_cancelled(pause).await.ok_or(FileError::Cancelled)?;
        }
    }
}

/// What stands for one piece of work in the name of a directory.
fn name_of(parts: &[&str]) -> String {
    Sha256Sum::of(parts.join("\n").as_bytes()).to_string()[..16].to_owned()
}
