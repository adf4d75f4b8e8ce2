//! A control group for each tool: it can be killed as a whole, also after our own restart, and its memory is bounded
//! apart from ours.
//!
//! Version 2 where it is mounted with the memory controller, otherwise version 1 (`memory`), otherwise version 2
//! without a memory bound. Sources: `admin-guide/cgroup-v2.rst` and `admin-guide/cgroup-v1/memory.rst` of the kernel.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use berth_core::ids::is_uid;
use berth_core::units::Bytes;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use thiserror::Error;

use crate::mounts::{self, MountError, MountInfo};

/// All groups of tools lie below this one.
const PARENT: &str = "berth-tools";
const REMOVE_WAIT: Duration = Duration::from_secs(2);
const DROP_WAIT: Duration = Duration::from_millis(200);

/// Why a tool has no group of its own, or a group could not be emptied.
#[derive(Debug, Error)]
pub enum GroupError {
    /// No hierarchy that serves is mounted.
    #[error("no control group hierarchy is mounted")]
    NoHierarchy,
    /// The list of mounts could not be read.
    #[error("failed to look for control group hierarchies")]
    Mounts(#[source] MountError),
    /// Not 1 to 64 lower-case letters, digits and dashes.
    #[error("`{0}` cannot name a control group")]
    Name(String),
    /// The hierarchy is closed to us.
    #[error("failed to {action} {path}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The group or its file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Its processes did not end though they were killed.
    #[error("control group {path} is not empty", path = path.display())]
    NotEmpty {
        /// The group.
        path: PathBuf,
    },
}

/// Which interface a group has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// Version 1, the memory hierarchy.
    V1,
    /// Version 2.
    V2,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1 => "version 1",
            Self::V2 => "version 2",
        })
    }
}

/// A group for one tool. Dropping it kills what is in it and removes it, as far as that goes in 200 ms, unless it was told
/// to outlive that.
#[derive(Debug)]
pub struct ToolGroup {
    path: PathBuf,
    version: Version,
    memory_bounded: bool,
    left_alone: bool,
}

impl ToolGroup {
    /// Makes the group `name`. What an earlier owner of that name left behind is killed and removed first.
    /// That its memory is not bounded is no error: see [`ToolGroup::memory_bounded`].
    pub fn create(name: &str, memory: Bytes) -> Result<Self, GroupError> {
        if !is_uid(name) {
            return Err(GroupError::Name(name.to_owned()));
        }
        let (base, version) = base()?;
        let parent = base.join(PARENT);
        make(&parent)?;
        let path = parent.join(name);
        let mut group = Self { path, version, memory_bounded: false, left_alone: false };
        group.empty(REMOVE_WAIT)?;
        make(&group.path)?;
        group.memory_bounded = match version {
            Version::V1 => write(&group.path.join("memory.limit_in_bytes"), &memory.0.to_string()).is_ok(),
            Version::V2 => bound_v2(&base, &parent, &group.path, memory),
        };
        Ok(group)
    }

    /// The group of this name as an earlier process has left it, with what is in it; `None` if there is none. Dropping it
    /// leaves it as it is.
    pub fn find(name: &str) -> Result<Option<Self>, GroupError> {
        if !is_uid(name) {
            return Err(GroupError::Name(name.to_owned()));
        }
        let (base, version) = base()?;
        let path = base.join(PARENT).join(name);
        Ok(path.is_dir().then_some(Self { path, version, memory_bounded: false, left_alone: true }))
    }

    /// Dropping it leaves it as it is from now on.
    #[must_use = "it is the same group"]
    pub fn outliving(mut self) -> Self {
        self.left_alone = true;
        self
    }

    /// True if the kernel took the memory limit.
    pub fn memory_bounded(&self) -> bool {
        self.memory_bounded
    }

    /// Which interface it has.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Where it lies in the hierarchy.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The ids of the processes in it.
    pub fn processes(&self) -> Result<Vec<i32>, GroupError> {
        let path = self.path.join("cgroup.procs");
        match fs::read_to_string(&path) {
            Ok(text) => Ok(text.lines().filter_map(|line| line.parse().ok()).collect()),
            Err(error) if is_gone(&error) => Ok(Vec::new()),
            Err(source) => Err(GroupError::Io { action: "read", path, source }),
        }
    }

    /// Kills what is in it and removes it, within two seconds.
    pub fn remove(mut self) -> Result<(), GroupError> {
        self.left_alone = true;
        self.empty(REMOVE_WAIT)
    }

    /// The file through which a process enters it.
    pub(crate) fn entrance(&self) -> Result<File, GroupError> {
        let path = self.path.join("cgroup.procs");
        OpenOptions::new().write(true).open(&path).map_err(|source| GroupError::Io {
            action: "open",
            path,
            source,
        })
    }

    /// Version 2 kills a group as a whole (Linux 5.14), otherwise its processes are killed one by one.
    fn kill_all(&self) -> Result<(), GroupError> {
        if self.version == Version::V2 && write(&self.path.join("cgroup.kill"), "1").is_ok() {
            return Ok(());
        }
        for process in self.processes()? {
            let _ = kill(Pid::from_raw(process), Signal::SIGKILL); // one that ended meanwhile is what was wanted
        }
        Ok(())
    }

    fn empty(&self, wait: Duration) -> Result<(), GroupError> {
        let deadline = Instant::now() + wait;
        loop {
            self.kill_all()?;
            match fs::remove_dir(&self.path) {
                Ok(()) => return Ok(()),
                Err(error) if is_gone(&error) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {}
                Err(source) => {
                    return Err(GroupError::Io { action: "remove", path: self.path.clone(), source });
                }
            }
            if Instant::now() >= deadline {
                return Err(GroupError::NotEmpty { path: self.path.clone() });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for ToolGroup {
    fn drop(&mut self) {
        if !self.left_alone
            && let Err(error) = self.empty(DROP_WAIT)
        {
            tracing::warn!(%error, "a tool's control group stays until its name is used again");
        }
    }
}

/// Which version tools would get, by making the common parent.
pub fn probe() -> Result<Version, GroupError> {
    let (base, version) = base()?;
    make(&base.join(PARENT)).map(|()| version)
}

/// Below which group tools get theirs: this process's own, so that its limits hold for them too.
fn base() -> Result<(PathBuf, Version), GroupError> {
    let mounts = mounts::list().map_err(GroupError::Mounts)?;
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let v2 = mounts.iter().find(|mount| mount.fs_type == "cgroup2");
    let v1 = mounts.iter().find(|mount| {
        mount.fs_type == "cgroup" && mount.super_options.split(',').any(|option| option == "memory")
    });
    let v2_has_memory = v2.is_some_and(|mount| {
        let controllers = fs::read_to_string(mount.mount_point.join("cgroup.controllers"));
        controllers.is_ok_and(|list| list.split_whitespace().any(|one| one == "memory"))
    });
    match (v2, v1) {
        (Some(mount), _) if v2_has_memory => Ok((own_group(mount, &own, ""), Version::V2)),
        (_, Some(mount)) => Ok((own_group(mount, &own, "memory"), Version::V1)),
        (Some(mount), None) => Ok((own_group(mount, &own, ""), Version::V2)),
        (None, None) => Err(GroupError::NoHierarchy),
    }
}

/// This process's group in a hierarchy; its root if the mount does not show it.
fn own_group(mount: &MountInfo, own: &str, controller: &str) -> PathBuf {
    let path = own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        fields.next()?.split(',').any(|one| one == controller).then(|| fields.next())?
    });
    let inside = path.map(Path::new).and_then(|path| path.strip_prefix(&mount.root).ok());
    match inside.map(|inside| mount.mount_point.join(inside)) {
        Some(group) if group.is_dir() => group,
        _ => mount.mount_point.clone(),
    }
}

fn bound_v2(base: &Path, parent: &Path, group: &Path, memory: Bytes) -> bool {
    let enable = |at: &Path| write(&at.join("cgroup.subtree_control"), "+memory");
    // A base with processes of its own refuses, unless it is the root: then there is no bound, only the group.
    let enabled = enable(base).and_then(|()| enable(parent));
    let bounded = enabled.and_then(|()| write(&group.join("memory.max"), &memory.0.to_string()));
    if bounded.is_ok() {
        let _ = write(&group.join("memory.oom.group"), "1");
    }
    bounded.is_ok()
}

fn make(path: &Path) -> Result<(), GroupError> {
    match fs::create_dir(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(source) => Err(GroupError::Io { action: "make", path: path.to_owned(), source }),
    }
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    fs::write(path, text)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::ENOENT | Errno::ENODEV))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_the_parent() {
        for name in ["", "..", "a/b", "UPPER"] {
            assert!(matches!(ToolGroup::create(name, Bytes::mib(64)), Err(GroupError::Name(_))), "{name}");
        }
    }

    #[test]
    fn the_own_group_is_found_in_both_versions() {
        let mount = |root: &str, point: &Path| MountInfo {
            id: 1,
            device: (0, 1),
            root: root.into(),
            mount_point: point.to_owned(),
            options: "rw".into(),
            fs_type: "cgroup".into(),
            source: "cgroup".into(),
            super_options: "rw,memory".into(),
        };
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("pod/one")).unwrap();
        let own = "4:memory,hugetlb:/pod/one\n0::/else\n";
        let at = mount("/", dir.path());
        assert_eq!(own_group(&at, own, "memory"), dir.path().join("pod/one"));
        assert_eq!(own_group(&at, own, ""), dir.path(), "a group that the mount does not show");
        assert_eq!(own_group(&mount("/pod", dir.path()), own, "memory"), dir.path());
    }
}
