//! Loop devices: a file, or a part of one, as a block device.
//!
//! The kernel never scans them for partitions: a partition is reached by attaching its extent
//! ([`crate::partition::partition_of`]). Identity is the backing file's device and inode, not a path or a number.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use berth_core::units::Bytes;
use nix::errno::Errno;
use thiserror::Error;

use crate::partition::Extent;
use crate::sys;

const CONTROL: &str = "/dev/loop-control";
const ATTEMPTS: u32 = 64;
/// How often a device that ignores discards is renewed before it is taken as it is.
const RENEWALS: u32 = 8;
const DETACH_WAIT: Duration = Duration::from_secs(5);

/// Why a loop device could not be had or let go.
#[derive(Debug, Error)]
pub enum LoopError {
    /// The kernel's loop control is missing or closed to us.
    #[error("failed to use {CONTROL}")]
    Control {
        /// What the system said.
        source: io::Error,
    },
    /// The backing file could not be opened.
    #[error("failed to open backing file {path}", path = path.display())]
    Backing {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A loop device could not be opened, bound or examined.
    #[error("failed to {action} {device}", device = device.display())]
    Device {
        /// What was tried.
        action: &'static str,
        /// The device.
        device: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Every device found free was taken by someone else first.
    #[error("no free loop device after {attempts} attempts")]
    Contended {
        /// How many.
        attempts: u32,
    },
    /// The device is bound to something else now and was left alone.
    #[error("{device} is no longer bound to the file it was attached for", device = device.display())]
    Rebound {
        /// The device.
        device: PathBuf,
    },
    /// Others still have the device open; the kernel unbinds it when the last of them closes it.
    #[error("{device} is still open elsewhere", device = device.display())]
    InUse {
        /// The device.
        device: PathBuf,
    },
}

/// How a file is attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoopOptions {
    /// Writes are refused by the device.
    pub read_only: bool,
    /// The file is read and written past the page memory of its file system, where that can.
    pub direct_io: bool,
    /// Only this part of the file; the whole if absent.
    pub extent: Option<Extent>,
    /// Discards do nothing, so that the file keeps the space it was given.
    pub keep_space: bool,
}

/// An attached loop device. Dropping it does not detach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoopDevice {
    /// Its node, `/dev/loopN`.
    pub path: PathBuf,
    /// N.
    pub number: u32,
    /// Device number and inode of the file behind it.
    pub backing: (u64, u64),
    /// True if it bypasses page memory.
    pub direct_io: bool,
    /// True if it refuses writes.
    pub read_only: bool,
    /// The first byte of the file that it shows.
    pub offset: Bytes,
    /// How many bytes it shows at most; 0: to the end of the file.
    pub size_limit: Bytes,
}

impl LoopDevice {
    /// Its present size.
    pub fn size(&self) -> Result<Bytes, LoopError> {
        let file = open_node(&self.path, true)?;
        sys::block_device_bytes(&file).map(Bytes).map_err(|e| device_error("measure", &self.path, e))
    }

    /// Makes it as long as its file has become.
    pub fn refresh_size(&self) -> Result<Bytes, LoopError> {
        let file = open_node(&self.path, true)?;
        sys::loop_set_capacity(&file).map_err(|e| device_error("resize", &self.path, e))?;
        sys::block_device_bytes(&file).map(Bytes).map_err(|e| device_error("measure", &self.path, e))
    }

    /// Writes out what the kernel holds in memory of it, and forgets it: the next read sees the file.
    pub fn flush(&self) -> Result<(), LoopError> {
        let file = open_node(&self.path, true)?;
        sys::flush_buffers(&file).map_err(|e| device_error("flush", &self.path, e))
    }

    fn shows(&self, options: &LoopOptions) -> bool {
        let extent = options.extent.unwrap_or(Extent { offset: Bytes::ZERO, length: Bytes::ZERO });
        (self.read_only, self.offset, self.size_limit) == (options.read_only, extent.offset, extent.length)
    }
}

/// Attaches `file`; a device that shows the same of the same file already is taken over instead.
/// Callers make sure that one file is attached by one of them at a time.
pub fn attach(file: &Path, options: LoopOptions) -> Result<LoopDevice, LoopError> {
    if let Some(device) = find(file)?.into_iter().find(|device| device.shows(&options)) {
        if options.keep_space {
            ignore_discards(&device)?;
        }
        return Ok(device);
    }
    let backing = OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .open(file)
        .map_err(|source| LoopError::Backing { path: file.to_owned(), source })?;
    let control = open_control()?;
    for attempt in 0..ATTEMPTS {
        let number =
            sys::loop_get_free(&control).map_err(|errno| LoopError::Control { source: errno.into() })?;
        let path = node_of(number);
        let node = match open_node(&path, options.read_only) {
            Err(LoopError::Device { source, .. }) if is_gone(&source) => continue, // renewed at this moment
            node => node?,
        };
        match sys::loop_configure(&node, &backing, 512, describe(file, options)) {
            Ok(()) => {
                drop(node);
                let device = examine(&path)?.ok_or(LoopError::Rebound { device: path })?;
                let result = if options.keep_space {
                    ignore_discards(&device)
                } else if attempt < RENEWALS && ignores_discards(&device) {
                    detach(&device)?; // which renews it for the next attempt
                    continue;
                } else {
                    Ok(())
                };
                return match result {
                    Ok(()) => Ok(device),
                    Err(error) => detach(&device).and(Err(error)),
                };
            }
            Err(Errno::EBUSY | Errno::ENXIO) => {}
            Err(errno) => return Err(device_error("bind", &path, errno)),
        }
    }
    Err(LoopError::Contended { attempts: ATTEMPTS })
}

fn describe(file: &Path, options: LoopOptions) -> sys::LoopInfo64 {
    let mut info = sys::LoopInfo64::EMPTY;
    if options.read_only {
        info.flags |= sys::LO_READ_ONLY;
    }
    if options.direct_io {
        info.flags |= sys::LO_DIRECT_IO;
    }
    if let Some(extent) = options.extent {
        info.offset = extent.offset.0;
        info.size_limit = extent.length.0;
    }
    let name = file.as_os_str().as_encoded_bytes();
    let length = name.len().min(info.file_name.len() - 1);
    info.file_name[..length].copy_from_slice(&name[..length]);
    info
}

/// Makes a device ignore discards, so that nothing gives its file's space back.
fn ignore_discards(device: &LoopDevice) -> Result<(), LoopError> {
    fs::write(queue_of(device).join("discard_max_bytes"), "0").map_err(|source| LoopError::Device {
        action: "disable discards of",
        device: device.path.clone(),
        source,
    })
}

/// True if somebody disabled discards of a device that could do them.
fn ignores_discards(device: &LoopDevice) -> bool {
    let read = |name: &str| fs::read_to_string(queue_of(device).join(name)).unwrap_or_default();
    read("discard_max_bytes").trim() == "0" && read("discard_max_hw_bytes").trim() != "0"
}

/// Has the kernel make a detached device that ignores discards anew. It keeps that setting with the device's number,
/// for whoever is given the number next, and newer kernels do not take it back (tried on Linux 6.18).
fn renew(device: &LoopDevice) {
    let renewed = open_control().and_then(|control| {
        sys::loop_renew(&control, device.number).map_err(|e| device_error("renew", &device.path, e))
    });
    if let Err(error) = renewed {
        tracing::warn!(%error, "discards stay disabled for the next use of this loop device");
    }
}

fn open_control() -> Result<File, LoopError> {
    let opened = OpenOptions::new().read(true).write(true).open(CONTROL);
    opened.map_err(|source| LoopError::Control { source })
}

fn queue_of(device: &LoopDevice) -> PathBuf {
    PathBuf::from(format!("/sys/block/loop{}/queue", device.number))
}

/// All loop devices that show `file` or a part of it. A file that is not there has none.
pub fn find(file: &Path) -> Result<Vec<LoopDevice>, LoopError> {
    let metadata = match fs::metadata(file) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(LoopError::Backing { path: file.to_owned(), source }),
    };
    let identity = (metadata.dev(), metadata.ino());
    let mut found = Vec::new();
    for (number, _) in bound_devices()? {
        if let Some(device) = examine(&node_of(number))?
            && device.backing == identity
        {
            found.push(device);
        }
    }
    Ok(found)
}

/// The device with this node, if it is bound to anything.
pub fn examine(node: &Path) -> Result<Option<LoopDevice>, LoopError> {
    let file = match open_node(node, true) {
        Err(LoopError::Device { source, .. }) if is_gone(&source) => return Ok(None),
        other => other?,
    };
    match sys::loop_status(&file) {
        Ok(info) => Ok(Some(LoopDevice {
            path: node.to_owned(),
            number: info.number,
            backing: (info.device, info.inode),
            direct_io: info.flags & sys::LO_DIRECT_IO != 0,
            read_only: info.flags & sys::LO_READ_ONLY != 0,
            offset: Bytes(info.offset),
            size_limit: Bytes(info.size_limit),
        })),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(device_error("examine", node, errno)),
    }
}

/// Loop devices whose backing file lies below `root`, with its path as the kernel names it: for checks that nothing
/// is left, and to find what is ours after a crash.
pub fn list_below(root: &Path) -> Result<Vec<(LoopDevice, PathBuf)>, LoopError> {
    let root = fs::canonicalize(root).unwrap_or_else(|_| root.to_owned());
    let mut ours = Vec::new();
    for (number, backing) in bound_devices()? {
        if backing.starts_with(&root)
            && let Some(device) = examine(&node_of(number))?
        {
            ours.push((device, backing));
        }
    }
    Ok(ours)
}

/// Number and backing file of every bound loop device, from sysfs.
fn bound_devices() -> Result<Vec<(u32, PathBuf)>, LoopError> {
    let sys_block = Path::new("/sys/block");
    let error = |source| LoopError::Device { action: "list", device: sys_block.to_owned(), source };
    let mut devices = Vec::new();
    for entry in fs::read_dir(sys_block).map_err(error)? {
        let entry = entry.map_err(error)?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("loop")?.parse().ok());
        let (Some(number), Ok(text)) = (number, fs::read_to_string(entry.path().join("loop/backing_file")))
        else {
            continue;
        };
        let text = text.trim_end_matches('\n');
        devices.push((number, PathBuf::from(text.strip_suffix(" (deleted)").unwrap_or(text))));
    }
    devices.sort();
    Ok(devices)
}

/// Detaches `device`, and returns when the kernel has let the file go. Already detached: nothing to do.
///
/// # Errors
/// [`LoopError::Rebound`] if it is bound to another file by now, which stays bound. [`LoopError::InUse`] if others
/// have it open for longer than five seconds; it is then unbound at their close.
pub fn detach(device: &LoopDevice) -> Result<(), LoopError> {
    match examine(&device.path)? {
        None => return Ok(()),
        Some(now) if now.backing != device.backing => {
            return Err(LoopError::Rebound { device: device.path.clone() });
        }
        Some(_) => {}
    }
    let spoiled = ignores_discards(device);
    let node = open_node(&device.path, true)?;
    match sys::loop_clear(&node) {
        Ok(()) | Err(Errno::ENXIO) => drop(node),
        Err(errno) => return Err(device_error("unbind", &device.path, errno)),
    }
    let deadline = Instant::now() + DETACH_WAIT;
    while examine(&device.path)?.is_some_and(|now| now.backing == device.backing) {
        if Instant::now() >= deadline {
            return Err(LoopError::InUse { device: device.path.clone() });
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    if spoiled {
        renew(device);
    }
    Ok(())
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::ENOENT | Errno::ENXIO | Errno::ENODEV))
}

fn node_of(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

fn open_node(path: &Path, read_only: bool) -> Result<File, LoopError> {
    OpenOptions::new().read(true).write(!read_only).open(path).map_err(|source| LoopError::Device {
        action: "open",
        device: path.to_owned(),
        source,
    })
}

fn device_error(action: &'static str, device: &Path, errno: Errno) -> LoopError {
    LoopError::Device { action, device: device.to_owned(), source: errno.into() }
}
