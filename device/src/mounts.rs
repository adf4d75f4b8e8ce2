//! Mounts: what is mounted where, and mounting, binding and unmounting so that asking twice gives the same answer.
//!
//! Truth is the kernel's: `/proc/self/mountinfo` (format: `Documentation/filesystems/proc.rst` of the kernel, 3.5).

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use thiserror::Error;

/// Mounts that lie on top of each other at one place are taken down one by one, at most this many.
const MAX_STACKED: usize = 32;
/// A place that is in use for longer than this is in use. Children of this process hold its open files between their
/// fork and their exec, which makes places busy for an instant.
const BUSY_WAIT: Duration = Duration::from_secs(1);

/// One line of the kernel's list of mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountInfo {
    /// The mount's id.
    pub id: u64,
    /// Major and minor number of the file system's device.
    pub device: (u32, u32),
    /// What part of the file system is mounted.
    pub root: PathBuf,
    /// Where.
    pub mount_point: PathBuf,
    /// Options of this mount, such as `rw,nosuid`.
    pub options: String,
    /// The type of the file system.
    pub fs_type: String,
    /// What it was mounted from: a device, or a name.
    pub source: PathBuf,
    /// Options of the file system.
    pub super_options: String,
}

impl MountInfo {
    /// True if one of the mount's own options is `option`.
    pub fn has_option(&self, option: &str) -> bool {
        self.options.split(',').any(|one| one == option)
    }
}

/// Why mounts could not be read or changed.
#[derive(Debug, Error)]
pub enum MountError {
    /// The kernel's list could not be read.
    #[error("failed to read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A line of the kernel's list is not of the documented form.
    #[error("line {line} of the list of mounts is not understood")]
    Malformed {
        /// Its number, from 1.
        line: usize,
    },
    /// Something else is mounted there.
    #[error("{found} is mounted at {target}, not {wanted}", found = found.display(), target = target.display(), wanted = wanted.display())]
    Occupied {
        /// The place.
        target: PathBuf,
        /// What is mounted there.
        found: PathBuf,
        /// What was to be mounted.
        wanted: PathBuf,
    },
    /// It is in use and was left as it is.
    #[error("{target} is in use", target = target.display())]
    Busy {
        /// The place.
        target: PathBuf,
    },
    /// The place or the thing to be mounted could not be prepared.
    #[error("failed to prepare {path}", path = path.display())]
    Prepare {
        /// The place.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel refused.
    #[error("failed to {action} {target}", target = target.display())]
    Kernel {
        /// What was tried.
        action: &'static str,
        /// The place.
        target: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
}

/// The file systems that Berth makes and mounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FsType {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
}

impl FsType {
    /// The kernel's name of it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }
}

impl std::fmt::Display for FsType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How a file system is mounted. Always `nosuid,nodev`: its content may come from an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "options of mount(8), each on or off by itself")]
pub struct MountOptions {
    /// Nothing is written, not even by log recovery at mount (`noload`, `norecovery`).
    pub read_only: bool,
    /// Reading does not write access times.
    pub no_access_times: bool,
    /// No program on it can be run.
    pub no_exec: bool,
    /// XFS only: mount though a file system with the same UUID is mounted, as every clone has.
    pub duplicate_uuid: bool,
}

/// All mounts that this process sees, in the order they were made.
pub fn list() -> Result<Vec<MountInfo>, MountError> {
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read(path).map_err(|source| MountError::Read { path: path.to_owned(), source })?;
    parse(&text)
}

/// Reads a list of mounts in the kernel's format.
pub fn parse(text: &[u8]) -> Result<Vec<MountInfo>, MountError> {
    text.split(|&byte| byte == b'\n')
        .enumerate()
        .filter(|(_, line)| !line.is_empty())
        .map(|(index, line)| parse_line(line).ok_or(MountError::Malformed { line: index + 1 }))
        .collect()
}

fn parse_line(line: &[u8]) -> Option<MountInfo> {
    let mut fields = line.split(|&byte| byte == b' ');
    let id = utf8(fields.next()?).parse().ok()?;
    let _parent = fields.next()?;
    let device = utf8(fields.next()?);
    let (major, minor) = device.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    let root = path_of(fields.next()?);
    let mount_point = path_of(fields.next()?);
    let options = utf8(fields.next()?);
    fields.by_ref().find(|field| *field == b"-")?; // optional fields end here
    let fs_type = utf8(fields.next()?);
    let source = path_of(fields.next()?);
    let super_options = utf8(fields.next().unwrap_or_default());
    Some(MountInfo { id, device, root, mount_point, options, fs_type, source, super_options })
}

fn utf8(field: &[u8]) -> String {
    String::from_utf8_lossy(field).into_owned()
}

fn path_of(field: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescape(field)))
}

/// Undoes the kernel's `\ooo`, by which it writes blanks, tabs, newlines and backslashes.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        if let (b'\\', Some(value)) = (byte, octal(after)) {
            plain.push(value);
            rest = &after[3..];
        } else {
            plain.push(byte);
            rest = after;
        }
    }
    plain
}

fn octal(text: &[u8]) -> Option<u8> {
    let digits = text.get(..3)?;
    let value = digits.iter().try_fold(0_u32, |sum, digit| {
        (b'0'..=b'7').contains(digit).then(|| sum * 8 + u32::from(digit - b'0'))
    })?;
    u8::try_from(value).ok()
}

/// What is mounted at `target` (the topmost, if several), or `None`. A target that does not exist has no mount.
pub fn is_mounted(target: &Path) -> Result<Option<MountInfo>, MountError> {
    let place = resolve(target);
    Ok(list()?.into_iter().rfind(|mount| mount.mount_point == place))
}

/// The path without symbolic links in its parent; the last part is left alone, so a dead mount is not touched.
fn resolve(target: &Path) -> PathBuf {
    let Some(name) = target.file_name() else { return target.to_owned() };
    match target.parent().map(fs::canonicalize) {
        Some(Ok(parent)) => parent.join(name),
        _ => target.to_owned(),
    }
}

/// Mounts the file system on `device` at the directory `target`, which is made if need be.
/// Already mounted from this device: nothing to do.
///
/// # Errors
/// [`MountError::Occupied`] if something else is mounted there.
pub fn mount_device(
    device: &Path,
    target: &Path,
    fs_type: FsType,
    options: MountOptions,
) -> Result<(), MountError> {
    let metadata = fs::metadata(device).map_err(|source| prepare_error(device, source))?;
    if let Some(found) = is_mounted(target)? {
        if found.device == numbers(metadata.rdev()) && metadata.file_type().is_block_device() {
            return Ok(());
        }
        return Err(occupied(target, found.source, device));
    }
    fs::create_dir_all(target).map_err(|source| prepare_error(target, source))?;
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    flags.set(MsFlags::MS_RDONLY, options.read_only);
    flags.set(MsFlags::MS_NOATIME, options.no_access_times);
    flags.set(MsFlags::MS_NOEXEC, options.no_exec);
    let mut data = Vec::new();
    if options.read_only {
        data.push(if fs_type == FsType::Xfs { "norecovery" } else { "noload" });
    }
    if options.duplicate_uuid && fs_type == FsType::Xfs {
        data.push("nouuid");
    }
    let data = data.join(",");
    mount(Some(device), target, Some(fs_type.as_str()), flags, Some(data.as_str()))
        .map_err(|source| kernel_error("mount", target, source))
}

fn numbers(device: u64) -> (u32, u32) {
    let number = |part: u64| u32::try_from(part).unwrap_or(u32::MAX);
    (number(nix::sys::stat::major(device)), number(nix::sys::stat::minor(device)))
}

/// Shows `source`, a directory, a file or a device node, at `target` as well; `target` is made if need be, as a
/// directory for a directory and as a file for anything else. Already there: only made read-only if asked to.
/// Read-only protects files; the content of a device behind a node is only protected by the device itself.
///
/// # Errors
/// [`MountError::Occupied`] if something else is mounted there.
pub fn bind_mount(source: &Path, target: &Path, read_only: bool) -> Result<(), MountError> {
    let wanted = fs::metadata(source).map_err(|error| prepare_error(source, error))?;
    match is_mounted(target)? {
        Some(found) if !same_object(&wanted, target)? => return Err(occupied(target, found.source, source)),
        Some(found) if found.has_option("ro") || !read_only => return Ok(()),
        Some(_) => {}
        None => {
            make_target(&wanted, target)?;
            mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .map_err(|errno| kernel_error("bind to", target, errno))?;
        }
    }
    if read_only { remount_read_only(target) } else { Ok(()) }
}

/// Shows `source`, a directory of a workload's files, at `target` as well, so that nothing in it is run, is a device or gives
/// rights, and nothing is written if `read_only`. Already there: only made so.
///
/// # Errors
/// [`MountError::Occupied`] if something else is mounted there.
pub fn bind_files(source: &Path, target: &Path, read_only: bool) -> Result<(), MountError> {
    bind_mount(source, target, false)?;
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    flags.set(MsFlags::MS_RDONLY, read_only);
    remount(target, flags)
}

fn same_object(wanted: &fs::Metadata, target: &Path) -> Result<bool, MountError> {
    let there = fs::metadata(target).map_err(|error| prepare_error(target, error))?;
    Ok((there.dev(), there.ino(), there.rdev()) == (wanted.dev(), wanted.ino(), wanted.rdev()))
}

fn make_target(wanted: &fs::Metadata, target: &Path) -> Result<(), MountError> {
    if wanted.is_dir() {
        return fs::create_dir_all(target).map_err(|error| prepare_error(target, error));
    }
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent).map_err(|error| prepare_error(parent, error))?;
    }
    fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(target)
        .map(drop)
        .map_err(|error| prepare_error(target, error))
}

/// A remount replaces all flags, so those the mount has are given again.
fn remount_read_only(target: &Path) -> Result<(), MountError> {
    remount(target, MsFlags::MS_RDONLY)
}

fn remount(target: &Path, added: MsFlags) -> Result<(), MountError> {
    let info = is_mounted(target)?;
    let mut flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | added;
    for (option, flag) in [
        ("nosuid", MsFlags::MS_NOSUID),
        ("nodev", MsFlags::MS_NODEV),
        ("noexec", MsFlags::MS_NOEXEC),
        ("noatime", MsFlags::MS_NOATIME),
        ("nodiratime", MsFlags::MS_NODIRATIME),
        ("relatime", MsFlags::MS_RELATIME),
    ] {
        if info.as_ref().is_some_and(|mount| mount.has_option(option)) {
            flags |= flag;
        }
    }
    let result = mount(None::<&str>, target, None::<&str>, flags, None::<&str>);
    result.map_err(|errno| {
        let _ = umount2(target, MntFlags::UMOUNT_NOFOLLOW); // never leave a mount that allows more than was asked for
        kernel_error("restrict", target, errno)
    })
}

/// Unmounts all that is mounted at `target`, which stays as an empty place. Nothing there: nothing to do.
///
/// # Errors
/// [`MountError::Busy`] if it is in use for longer than a second; it stays mounted.
pub fn unmount(target: &Path) -> Result<(), MountError> {
    let deadline = Instant::now() + BUSY_WAIT;
    let mut taken_down = 0;
    while is_mounted(target)?.is_some() {
        match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) if taken_down < MAX_STACKED => taken_down += 1,
            Err(Errno::EINTR | Errno::EINVAL | Errno::ENOENT | Errno::EBUSY) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(Errno::EBUSY) | Ok(()) => return Err(MountError::Busy { target: target.to_owned() }),
            Err(errno) => return Err(kernel_error("unmount", target, errno)),
        }
    }
    Ok(())
}

fn occupied(target: &Path, found: PathBuf, wanted: &Path) -> MountError {
    MountError::Occupied { target: target.to_owned(), found, wanted: wanted.to_owned() }
}

fn prepare_error(path: &Path, source: io::Error) -> MountError {
    MountError::Prepare { path: path.to_owned(), source }
}

fn kernel_error(action: &'static str, target: &Path, source: Errno) -> MountError {
    MountError::Kernel { action, target: target.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel_are_understood() {
        let text = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 propagate_from:2 - ext3 /dev/root rw,errors=continue\n\
            37 35 0:5 / /a\\040b\\134c\\011d rw - xfs /dev/loop\\0407 rw\n\
            38 35 0:6 / /plain\\9 ro - tmpfs none\n";
        let mounts = parse(text).unwrap();
        assert_eq!(mounts.len(), 3);
        assert_eq!((mounts[0].id, mounts[0].device), (36, (98, 0)));
        assert_eq!(mounts[0].root, Path::new("/mnt1"));
        assert_eq!(mounts[0].fs_type, "ext3");
        assert_eq!(mounts[0].super_options, "rw,errors=continue");
        assert!(mounts[0].has_option("noatime") && !mounts[0].has_option("no"));
        assert_eq!(mounts[1].mount_point, Path::new("/a b\\c\td"));
        assert_eq!(mounts[1].source, Path::new("/dev/loop 7"));
        assert_eq!(mounts[2].mount_point, Path::new("/plain\\9"), "not an escape");
    }

    #[test]
    fn other_lines_are_refused() {
        for line in [&b"36 35 98 / / rw - ext4 x rw"[..], b"x 35 98:0 / / rw - a b c", b"36 35 98:0 / / rw"] {
            assert!(matches!(parse(line), Err(MountError::Malformed { line: 1 })));
        }
    }

    #[test]
    fn this_machine_has_a_root_and_nothing_on_new_directories() {
        assert!(is_mounted(Path::new("/")).unwrap().is_some());
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(is_mounted(dir.path()).unwrap(), None);
        unmount(dir.path()).unwrap();
        unmount(&dir.path().join("missing")).unwrap();
    }
}
