//! One conversion: a confined child with two open files, watched until it ends.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use berth_core::units::Bytes;
use nix::libc;
use nix::unistd::{Gid, Uid, fchown};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::guard::{GuardError, SourceDriver, guard_file};
use super::progress::{Parser, Progress};
use crate::cgroup::ToolGroup;
use crate::confine::{Confinement, confine};
use crate::program::{find_program, keep_tail};

/// Direct IO may touch a file in units of this size.
const DIRECT_UNIT: Bytes = Bytes::kib(4);

/// What a conversion may use.
#[derive(Clone, Debug)]
pub struct ConvertLimits {
    /// The virtual size of the image as read in memory-safe code, and what was promised for the target: no byte is
    /// written beyond it, and an image that turns out to be larger fails. A smaller one is followed by zeros.
    pub virtual_size: Bytes,
    /// Memory of the tool, with what the kernel holds of its files.
    pub memory: Bytes,
    /// It is killed when it neither reads, writes nor advances for so long.
    pub stall: Duration,
    /// User and group id that it runs as, if we are root. Two conversions that must not disturb each other have two.
    pub user: u32,
    /// Name of its control group: unique among running conversions, the same for each attempt of one transfer.
    pub group: String,
}

impl ConvertLimits {
    /// 512 MiB of memory, 60 s without movement, the user `nobody`.
    pub fn new(virtual_size: Bytes, group: impl Into<String>) -> Self {
        Self {
            virtual_size,
            memory: Bytes::mib(512),
            stall: Duration::from_secs(60),
            user: 65534,
            group: group.into(),
        }
    }
}

/// What of the disk one run of the tool converts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where it begins: a multiple of 1 MiB.
    pub from: Bytes,
    /// How long it is: a multiple of 1 MiB; `None` to the end of the disk.
    pub len: Option<Bytes>,
}

impl Part {
    /// All of it.
    pub const WHOLE: Self = Self { from: Bytes::ZERO, len: None };

    /// What begins at `from`, at most `window` of a disk of `size`. Whatever is larger or smaller than it says shows at its end,
    /// so that the last part has no length.
    pub fn at(from: Bytes, window: Bytes, size: Bytes) -> Self {
        let len = (window < size.saturating_sub(from)).then_some(window);
        Self { from, len }
    }
}

/// What a conversion did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted {
    /// The space that the target takes.
    pub allocated: Bytes,
    /// What confinement this node did not give, as one phrase each; empty where it was complete.
    pub unconfined: Vec<String>,
}

/// Why there is no converted image.
#[derive(Debug, Error)]
pub enum ConvertError {
    /// The image is not to be opened by the tool.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// The tool is not installed.
    #[error("qemu-img is not installed")]
    NotInstalled,
    /// One of the two files could not be prepared or finished.
    #[error("failed to {action} {path}", path = path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The tool could not be started or watched.
    #[error("failed to run qemu-img for {path}", path = path.display())]
    Run {
        /// The source.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It stood still and was killed.
    #[error("qemu-img stood still for {} s at {percent} % of {path}: {output}", stall.as_secs(), path = path.display())]
    Stalled {
        /// The source.
        path: PathBuf,
        /// For how long.
        stall: Duration,
        /// How far it had come.
        percent: u8,
        /// The end of what it printed.
        output: String,
    },
    /// It failed.
    #[error("qemu-img failed on {path} ({status}): {output}", path = path.display())]
    Failed {
        /// The source.
        path: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it printed.
        output: String,
    },
}

/// Converts a part of the image `source` of format `driver` into the same place of the raw, sparse file `target`. For the part
/// at the beginning that is made, or emptied first if an earlier attempt left it; the others go on in it. When this returns,
/// the target is durable. Dropping the future kills the tool.
///
/// The format is stated, backing files are off, and the tool gets both files as open descriptors: it needs no path,
/// and finds none that its user may not read. While it runs, the two files belong to that user.
pub async fn convert_to_raw(
    source: &Path,
    driver: SourceDriver,
    target: &Path,
    part: Part,
    limits: &ConvertLimits,
    progress: impl FnMut(Progress) + Send,
) -> Result<Converted, ConvertError> {
    let mut unconfined = Vec::new();
    let files = Files::open(source, driver, target, part, limits)?;
    let group = tool_group(limits, &mut unconfined);
    // Order matters when the future is dropped: the child goes first, then its group, then the files' ownership.
    let format = (driver, part);
    let mut child = start(source, format, &files, group.as_ref(), limits, &mut unconfined)?;
    watch(&mut child, source, &files, limits.stall, progress).await?;
    if let Some(Err(error)) = group.map(ToolGroup::remove) {
        unconfined.push(error.to_string());
    }
    let size = limits.virtual_size;
    let finished =
        tokio::task::spawn_blocking(move || files.finish(size)).await.map_err(io::Error::from).flatten();
    let allocated = finished.map_err(|error| ConvertError::File {
        action: "finish",
        path: target.to_owned(),
        source: error,
    })?;
    Ok(Converted { allocated, unconfined })
}

fn tool_group(limits: &ConvertLimits, unconfined: &mut Vec<String>) -> Option<ToolGroup> {
    match ToolGroup::create(&limits.group, limits.memory) {
        Ok(group) => {
            if !group.memory_bounded() {
                unconfined.push("the tool's memory has no limit of its own".to_owned());
            }
            Some(group)
        }
        Err(error) => {
            unconfined.push(format!("the tool has no control group of its own: {error}"));
            None
        }
    }
}

/// Both files, lent to the tool's user until this is dropped.
struct Files {
    source: File,
    target: File,
    owners: Option<[(u32, u32); 2]>,
    direct: [bool; 2],
    padded_size: Bytes,
}

impl Files {
    fn open(
        source_path: &Path,
        driver: SourceDriver,
        target_path: &Path,
        part: Part,
        limits: &ConvertLimits,
    ) -> Result<Self, ConvertError> {
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| ConvertError::File { action, path, source }
        };
        let source = File::open(source_path).map_err(failed("open", source_path))?;
        guard_file(&source, source_path, driver)?;
        let target = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(part.from == Bytes::ZERO)
            .mode(0o600)
            .open(target_path)
            .map_err(failed("open", target_path))?;
        let padded_size = limits.virtual_size.round_up(DIRECT_UNIT);
        target.set_len(padded_size.0).map_err(failed("size", target_path))?;
        let direct = [takes_direct_io(&source), takes_direct_io(&target)];
        let mut files = Self { source, target, owners: None, direct, padded_size };
        files.lend(limits.user).map_err(failed("hand to the tool's user", target_path))?;
        Ok(files)
    }

    fn lend(&mut self, user: u32) -> io::Result<()> {
        if !Uid::effective().is_root() {
            return Ok(());
        }
        let owner = |file: &File| file.metadata().map(|metadata| (metadata.uid(), metadata.gid()));
        self.owners = Some([owner(&self.source)?, owner(&self.target)?]);
        set_owner(&self.source, (user, user))?;
        set_owner(&self.target, (user, user))
    }

    /// Cuts the padding off and makes the target durable; how much space it takes.
    fn finish(self, size: Bytes) -> io::Result<Bytes> {
        self.target.set_len(size.0)?;
        self.target.sync_all()?;
        Ok(Bytes(self.target.metadata()?.blocks().saturating_mul(512)))
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        if let Some([source, target]) = self.owners {
            for (file, owner) in [(&self.source, source), (&self.target, target)] {
                if let Err(error) = set_owner(file, owner) {
                    tracing::warn!(%error, "a file stays with the tool's user");
                }
            }
        }
    }
}

fn set_owner(file: &File, (user, group): (u32, u32)) -> io::Result<()> {
    fchown(file, Some(Uid::from_raw(user)), Some(Gid::from_raw(group))).map_err(io::Error::from)
}

fn takes_direct_io(file: &File) -> bool {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).is_ok()
}

fn start(
    path: &Path,
    (driver, part): (SourceDriver, Part),
    files: &Files,
    group: Option<&ToolGroup>,
    limits: &ConvertLimits,
    unconfined: &mut Vec<String>,
) -> Result<Child, ConvertError> {
    let program = find_program("qemu-img").ok_or(ConvertError::NotInstalled)?;
    let run_error = |source| ConvertError::Run { path: path.to_owned(), source };
    let inherited = [&files.source, &files.target].map(File::try_clone);
    let [source, target] = inherited.map(|file| file.map_err(run_error));
    let (source, target) = (source?, target?);
    let user = Uid::effective().is_root().then_some(limits.user);
    if user.is_none() {
        unconfined.push("the tool runs as this process's own user".to_owned());
    }
    let entrance = group.map(ToolGroup::entrance).transpose();
    let group = entrance.unwrap_or_else(|error| {
        unconfined.push(error.to_string());
        None
    });
    let mut command = Command::new(program);
    command.args(arguments(driver, part, source.as_raw_fd(), target.as_raw_fd(), files.direct));
    command.env_clear().env("LC_ALL", "C").current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let file_size = Some(files.padded_size.0);
    let inherited = vec![source.into(), target.into()];
    confine(command.as_std_mut(), Confinement { user, file_size, group, inherited });
    command.spawn().map_err(run_error)
}

/// The source is described as JSON: there a missing backing file can be said (`null`), and nothing needs escaping. A part of a disk
/// is a raw disk at an offset of another one, as `BlockdevOptionsRaw` of QEMU's `qapi/block-core.json` has it.
fn arguments(driver: SourceDriver, part: Part, source: i32, target: i32, direct: [bool; 2]) -> Vec<String> {
    let mut description = serde_json::json!({
        "driver": driver.as_str(),
        "read-only": true,
        "backing": null,
        "file": { "driver": "file", "filename": format!("/proc/self/fd/{source}"), "read-only": true },
    });
    if driver == SourceDriver::Vpc {
        description["force_size_calc"] = "current_size".into(); // the header's size, not one guessed from its creator
    }
    let mut target = vec![format!("driver=raw,file.driver=file,file.filename=/proc/self/fd/{target}")];
    if part != Part::WHOLE {
        description = serde_json::json!({ "driver": "raw", "read-only": true, "offset": part.from.0, "file": description });
        target.push(format!("offset={}", part.from.0));
    }
    if let Some(len) = part.len {
        description["size"] = len.0.into();
        target.push(format!("size={}", len.0));
    }
    let mode = |direct: bool| if direct { "none" } else { "writeback" }.to_owned();
    let mut arguments =
        ["convert", "-p", "-n", "--target-is-zero", "--target-image-opts"].map(str::to_owned).to_vec();
    arguments.extend(["-T".to_owned(), mode(direct[0]), "-t".to_owned(), mode(direct[1])]);
    arguments.push(format!("json:{description}"));
    arguments.push(target.join(","));
    arguments
}

/// Follows the child to its end. It is killed when nothing about it has moved for `stall`.
async fn watch(
    child: &mut Child,
    path: &Path,
    files: &Files,
    stall: Duration,
    mut progress: impl FnMut(Progress) + Send,
) -> Result<(), ConvertError> {
    let run_error = |source| ConvertError::Run { path: path.to_owned(), source };
    let (mut out, mut err) = (child.stdout.take(), child.stderr.take());
    let (mut out_buffer, mut err_buffer) = ([0; 1024], [0; 1024]);
    let (mut parser, mut output) = (Parser::default(), Vec::new());
    let mut last = Progress::default();
    let mut seen = movement(child, files);
    let mut moved_at = Instant::now();
    let mut tick =
        tokio::time::interval((stall / 4).clamp(Duration::from_millis(10), Duration::from_secs(1)));
    while out.is_some() || err.is_some() {
        tokio::select! {
            n = read(&mut out, &mut out_buffer) => {
                if let Some(now) = parser.feed(&out_buffer[..n]) {
                    last = now;
                    moved_at = Instant::now();
                    progress(now);
                }
            }
            n = read(&mut err, &mut err_buffer) => keep_tail(&mut output, &err_buffer[..n]),
            _ = tick.tick() => {
                let now = movement(child, files);
                if now != seen {
                    (seen, moved_at) = (now, Instant::now());
                } else if moved_at.elapsed() >= stall {
                    child.kill().await.map_err(run_error)?;
                    let (output, percent) = (text(&output), last.percent);
                    return Err(ConvertError::Stalled { path: path.to_owned(), stall, percent, output });
                }
            }
        }
    }
    let status = child.wait().await.map_err(run_error)?;
    if status.success() {
        return Ok(());
    }
    Err(ConvertError::Failed { path: path.to_owned(), status, output: text(&output) })
}

fn text(output: &[u8]) -> String {
    String::from_utf8_lossy(output).trim().to_owned()
}

/// Reads a piece; at the end of the pipe, forgets it. Waits for ever once it is forgotten.
async fn read(pipe: &mut Option<impl AsyncRead + Unpin>, buffer: &mut [u8]) -> usize {
    let Some(open) = pipe else { return std::future::pending().await };
    let n = open.read(buffer).await.unwrap_or(0);
    if n == 0 {
        *pipe = None;
    }
    n
}

/// Something that changes while the tool works: bytes it asked the kernel for, and space that the target takes.
fn movement(child: &Child, files: &Files) -> (String, u64) {
    let io = child.id().and_then(|id| std::fs::read_to_string(format!("/proc/{id}/io")).ok());
    (io.unwrap_or_default(), files.target.metadata().map_or(0, |metadata| metadata.blocks()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_is_stated_and_nothing_else_is_opened() {
        let arguments = arguments(SourceDriver::Qcow2, Part::WHOLE, 7, 8, [true, false]);
        let description = arguments.iter().find_map(|argument| argument.strip_prefix("json:")).unwrap();
        let description: serde_json::Value = serde_json::from_str(description).unwrap();
        assert_eq!(description["driver"], "qcow2");
        assert_eq!(description["backing"], serde_json::Value::Null);
        assert!(description.as_object().unwrap().contains_key("backing"), "absent would mean: look for one");
        assert_eq!(description["file"]["filename"], "/proc/self/fd/7");
        assert_eq!(description["read-only"], true);
        assert_eq!(arguments.last().unwrap(), "driver=raw,file.driver=file,file.filename=/proc/self/fd/8");
    }

    #[test]
    fn parts_cover_the_disk_and_the_last_one_is_open() {
        let (window, size) = (Bytes::mib(4), Bytes(9_000_448));
        let at = |mib: u64| Part::at(Bytes::mib(mib), window, size);
        assert_eq!(at(0), Part { from: Bytes::ZERO, len: Some(window) });
        assert_eq!(at(4), Part { from: Bytes::mib(4), len: Some(window) });
        assert_eq!(at(8), Part { from: Bytes::mib(8), len: None });
        assert_eq!(Part::at(Bytes::ZERO, window, window), Part::WHOLE);
        let arguments = arguments(SourceDriver::Vhdx, at(4), 7, 8, [false, false]);
        let description = arguments.iter().find_map(|argument| argument.strip_prefix("json:")).unwrap();
        let description: serde_json::Value = serde_json::from_str(description).unwrap();
        assert_eq!((&description["driver"], &description["file"]["driver"]), (&"raw".into(), &"vhdx".into()));
        assert_eq!((&description["offset"], &description["size"]), (&(4 << 20).into(), &(4 << 20).into()));
        assert!(arguments.last().unwrap().ends_with(",offset=4194304,size=4194304"), "{arguments:?}");
    }
}
