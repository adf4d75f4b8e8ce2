//! What a node's administrator installs so that the host leaves the disks of guests alone, and whether it is in force.
//!
//! udev, LVM, mdadm and multipath look at every block device that appears. [`FILES`] keep them from ours: by the dm UUID
//! `BERTH-…`, the identifier of an NBD device, and the file behind a loop device. Berth installs none of it by itself.

mod arrays;
mod filter;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

use self::filter::{Filters, rejects};
use crate::files::{self, FileError};
use crate::preflight::{Check, check};
use crate::program::{self, find_program};
use crate::thin::LVM_ENVIRONMENT;

/// A file, by its place below `/etc`.
#[derive(Clone, Copy, Debug)]
pub struct HostFile {
    /// Where it belongs, relative to `/etc`.
    pub path: &'static str,
    /// What it holds. The first word of the first line is `# Berth:`.
    pub content: &'static str,
}

macro_rules! host_file {
    ($path:literal) => {
        HostFile { path: $path, content: include_str!(concat!("../../charts/berth/files/host/", $path)) }
    };
}

/// The rule for udev.
const UDEV: HostFile = host_file!("udev/rules.d/09-berth-guest-disks.rules");
/// The fragment for LVM.
const LVM: HostFile = host_file!("lvm/berth.conf");
/// The fragment for mdadm.
const MDADM: HostFile = host_file!("mdadm/berth.conf");
/// The blacklist for multipath.
const MULTIPATH: HostFile = host_file!("multipath/conf.d/berth.conf");

/// All of them. Those of LVM and mdadm are fragments that nothing reads: only the host's administrator knows what has to stand
/// beside them.
pub const FILES: [HostFile; 5] = [UDEV, host_file!("modprobe.d/berth.conf"), LVM, MDADM, MULTIPATH];

/// How every file of ours begins.
const MARK: &str = "# Berth:";
/// Where udev looks for rules, below the host's root.
const RULES: [&str; 4] = ["etc/udev/rules.d", "run/udev/rules.d", "usr/lib/udev/rules.d", "lib/udev/rules.d"];
/// Where a program of a host is.
const PROGRAMS: [&str; 4] = ["usr/sbin", "sbin", "usr/bin", "bin"];
/// The parameter of the module nbd; in a container it is the host's.
const MAX_PART: &str = "/sys/module/nbd/parameters/max_part";
/// LVM reads its settings within milliseconds.
const LIMIT: Duration = Duration::from_secs(10);
/// Names of ours that no host may look at: a thin device, an NBD device, a loop device by the link of the udev rule.
const NAMES: [&str; 3] = ["/dev/mapper/berth-0f3c9a1e-volumes", "/dev/nbd0", "/dev/berth/loop0"];
/// Nodes of ours, as mdadm finds them.
const NODES: [&str; 3] = ["/dev/dm-7", "/dev/nbd0", "/dev/loop0"];

/// Why a file was not written.
#[derive(Debug, Error)]
pub enum HostConfigError {
    /// A file of this name is there, and not ours.
    #[error("{path} is there and was not written by Berth; move it away first", path = path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// The file or its folder could not be read or made.
    #[error("failed to {action} {path}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file could not be written.
    #[error(transparent)]
    Write(#[from] FileError),
}

/// Writes all files below a folder, which takes the place of `/etc`. Older versions of them are replaced; may be repeated.
///
/// # Errors
/// [`HostConfigError::Foreign`] if there is another file of that name; those before it were written.
pub fn write(folder: &Path) -> Result<Vec<PathBuf>, HostConfigError> {
    FILES.iter().map(|file| write_one(folder, file)).collect()
}

fn write_one(folder: &Path, file: &HostFile) -> Result<PathBuf, HostConfigError> {
    let path = folder.join(file.path);
    match fs::read_to_string(&path) {
        Ok(text) if text.starts_with(MARK) => {}
        Ok(_) => return Err(HostConfigError::Foreign { path }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(HostConfigError::Io { action: "read", path, source }),
    }
    let parent = path.parent().unwrap_or(folder);
    fs::create_dir_all(parent).map_err(|source| {
        let path = parent.to_owned();
        HostConfigError::Io { action: "make", path, source }
    })?;
    files::write_durably(&path, file.content.as_bytes())?;
    Ok(path)
}

/// The names of the checks, as in a preflight.
pub const CHECKS: [&str; 5] = ["udev-rule", "lvm-filter", "nbd-partitions", "mdadm-devices", "multipath"];

/// Whether a host whose root is `root` leaves the disks of guests alone. Blocks for well under a second; changes nothing.
pub fn checks(root: &Path) -> Vec<Check> {
    let results = [
        udev(root),
        lvm(root),
        partitions(fs::read_to_string(MAX_PART).ok().as_deref()),
        mdadm(root),
        multipath(root),
    ];
    CHECKS.into_iter().zip(results).map(|(name, result)| check(name, false, result)).collect()
}

fn udev(root: &Path) -> Result<String, String> {
    if !root.join("run/udev").exists() {
        return Ok("there is no udev".to_owned());
    }
    let name = Path::new(UDEV.path).file_name().unwrap_or_default();
    let found = RULES.iter().map(|folder| root.join(folder).join(name)).find(|path| path.exists());
    let advice = "berth-node host-config --dir /etc, then udevadm control --reload";
    let Some(path) = found else {
        return Err(format!("no {} below {}: run {advice}", name.display(), root.display()));
    };
    match fs::read_to_string(&path) {
        Ok(text) if text == UDEV.content => Ok(path.display().to_string()),
        Ok(_) => Err(format!("{} is of another version: run {advice}", path.display())),
        Err(error) => Err(format!("{} cannot be read: {error}", path.display())),
    }
}

/// LVM itself is asked for its settings: they may come from several files, and from profiles.
fn lvm(root: &Path) -> Result<String, String> {
    if find_program("lvm").is_none() {
        return Ok("there is no LVM".to_owned());
    }
    let folder = root.join("etc/lvm");
    let folder = folder.to_string_lossy();
    let mut environment = LVM_ENVIRONMENT.to_vec();
    if root != Path::new("/") {
        environment.push(("LVM_SYSTEM_DIR", &folder));
    }
    let words = ["lvmconfig", "--typeconfig", "full", "devices"].map(std::ffi::OsStr::new);
    let text = program::run_whole("lvm", &words, &environment, 1 << 20, LIMIT)
        .map_err(|error| format!("LVM does not tell its filter: {error}"))?;
    let filters = Filters::parse(&text);
    let list = folder_of_lists(root).join(filters.devices_file());
    if filters.uses_devices_file() && list.exists() {
        return Ok(format!("LVM looks only at what {} lists", list.display()));
    }
    let seen: Vec<_> = NAMES.into_iter().filter(|name| !rejects(&filters, name)).collect();
    if seen.is_empty() {
        return Ok("the filter of LVM rejects disks of guests".to_owned());
    }
    Err(format!(
        "LVM would look at {}: put global_filter of {}, which berth-node host-config writes, into lvm.conf or lvmlocal.conf",
        seen.join(", "),
        LVM.path
    ))
}

fn folder_of_lists(root: &Path) -> PathBuf {
    root.join("etc/lvm/devices")
}

fn partitions(max_part: Option<&str>) -> Result<String, String> {
    match max_part.map(str::trim) {
        None => Ok("the module nbd is not loaded".to_owned()),
        Some("0") => Ok("the kernel looks for no partitions on NBD devices".to_owned()),
        Some(other) => Err(format!(
            "the kernel looks for partitions on NBD devices (max_part={other}): run berth-node host-config --dir /etc and, \
             while no NBD device is in use, modprobe -r nbd; modprobe nbd"
        )),
    }
}

fn has_program(root: &Path, program: &str) -> bool {
    PROGRAMS.iter().any(|folder| root.join(folder).join(program).exists())
}

fn multipath(root: &Path) -> Result<String, String> {
    if !has_program(root, "multipathd") {
        return Ok("there is no multipath".to_owned());
    }
    let path = root.join("etc").join(MULTIPATH.path);
    if fs::read_to_string(&path).is_ok_and(|text| text == MULTIPATH.content) {
        return Ok(path.display().to_string());
    }
    Err(format!(
        "multipath may look at NBD devices: {} is missing or of another version; run berth-node host-config --dir /etc, then \
         multipathd reconfigure",
        path.display()
    ))
}

fn mdadm(root: &Path) -> Result<String, String> {
    if !has_program(root, "mdadm") {
        return Ok("there is no mdadm".to_owned());
    }
    let seen = arrays::looks_at(&arrays::configuration(&root.join("etc")), &NODES);
    if seen.is_empty() {
        return Ok("mdadm looks at no disk of a guest".to_owned());
    }
    Err(format!(
        "mdadm --assemble --scan would look at {}: put the line DEVICE of {}, which berth-node host-config writes, into mdadm.conf",
        seen.join(", "),
        MDADM.path
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_written_again_and_never_over_others() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            assert_eq!(write(dir.path()).unwrap().len(), FILES.len());
        }
        for file in FILES {
            assert_eq!(fs::read_to_string(dir.path().join(file.path)).unwrap(), file.content);
            assert!(file.content.starts_with(MARK), "{}", file.path);
        }
        let foreign = dir.path().join(MULTIPATH.path);
        fs::write(&foreign, "blacklist {}").unwrap();
        let error = write(dir.path()).unwrap_err();
        assert!(matches!(&error, HostConfigError::Foreign { path } if *path == foreign), "{error}");
        assert_eq!(fs::read_to_string(&foreign).unwrap(), "blacklist {}");
    }

    #[test]
    fn what_is_missing_is_told_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let (root, etc) = (dir.path(), dir.path().join("etc"));
        assert_eq!(udev(root).unwrap(), "there is no udev");
        assert_eq!(
            (mdadm(root).unwrap(), multipath(root).unwrap()),
            ("there is no mdadm".to_owned(), "there is no multipath".to_owned())
        );
        for path in ["run/udev", "sbin"] {
            fs::create_dir_all(root.join(path)).unwrap();
        }
        for program in ["mdadm", "multipathd"] {
            fs::write(root.join("sbin").join(program), "").unwrap();
        }
        assert!(udev(root).unwrap_err().contains("berth-node host-config"));
        assert!(multipath(root).unwrap_err().contains("conf.d"));
        assert!(mdadm(root).unwrap_err().contains("/dev/dm-7, /dev/nbd0, /dev/loop0"));
        write(&etc).unwrap();
        udev(root).unwrap();
        multipath(root).unwrap();
        mdadm(root).expect_err("nothing reads the fragment there");
        fs::copy(etc.join(MDADM.path), etc.join("mdadm/mdadm.conf")).unwrap();
        mdadm(root).unwrap();
        fs::write(etc.join(UDEV.path), "# Berth: of long ago").unwrap();
        assert!(udev(root).unwrap_err().contains("another version"));
    }

    #[test]
    fn partitions_are_looked_for_unless_the_module_is_told_not_to() {
        assert!(partitions(None).is_ok() && partitions(Some("0\n")).is_ok());
        assert!(partitions(Some("31\n")).unwrap_err().contains("max_part=31"));
    }

    #[test]
    fn the_shipped_filter_rejects_what_is_ours() {
        let line = LVM.content.lines().find(|line| line.contains("global_filter =")).unwrap();
        let filters = Filters::parse(line);
        for name in NAMES {
            assert!(rejects(&filters, name), "{name}");
        }
        for name in ["/dev/sda", "/dev/loop0", "/dev/mapper/berthold", "/dev/berth0"] {
            assert!(!rejects(&filters, name), "{name}");
        }
    }
}
