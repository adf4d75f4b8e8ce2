//! What a run could leave behind on the machine: processes, mounts, loop devices, device-mapper devices, network
//! namespaces. Taken before and after, and compared.

use std::collections::BTreeSet;
use std::fmt::{self, Display, Formatter};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::stat::{major, minor};
use serde_json::Value;

/// What is there at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    things: BTreeSet<Thing>,
}

/// One thing that could be left behind.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Thing {
    /// A process that is a child of this one, or whose command line names the folder of the run: its id and the
    /// command line.
    Process(u32, String),
    /// A mount, by the path it covers.
    Mount(PathBuf),
    /// A loop device with the file behind it.
    Loop(String, PathBuf),
    /// A device-mapper device, by name.
    Mapper(String),
    /// A named network namespace.
    Network(String),
}

impl Display for Thing {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(pid, command) => write!(f, "process {pid}: {command}"),
            Self::Mount(path) => write!(f, "mount {}", path.display()),
            Self::Loop(device, file) => write!(f, "{device} on {}", file.display()),
            Self::Mapper(name) => write!(f, "device-mapper device {name}"),
            Self::Network(name) => write!(f, "network namespace {name}"),
        }
    }
}

impl Snapshot {
    /// Everything of the machine, and the processes that name `dir`. What cannot be read counts as not there.
    pub fn of_machine(dir: &Path) -> Self {
        let mut things = BTreeSet::new();
        things.extend(processes(dir));
        things.extend(mounts("self").into_iter().map(Thing::Mount));
        things.extend(loops().into_iter().map(|device| Thing::Loop(device.node, device.file)));
        things.extend(names("/sys/block", |name| {
            let label = fs::read_to_string(format!("/sys/block/{name}/dm/name")).ok()?;
            Some(Thing::Mapper(label.trim().to_owned()))
        }));
        things.extend(names("/run/netns", |name| Some(Thing::Network(name.to_owned()))));
        Self { things }
    }

    /// The same without what lies in the machine's temporary folder: there, tests of others come and go.
    #[must_use]
    pub fn outside_temporary(mut self) -> Self {
        let temporary = std::env::temp_dir();
        self.things.retain(|thing| match thing {
            Thing::Mount(path) | Thing::Loop(_, path) => !path.starts_with(&temporary),
            Thing::Process(..) | Thing::Mapper(_) | Thing::Network(_) => true,
        });
        self
    }

    /// Only what has to do with `dir`: for a machine on which others work at the same time.
    pub fn below(dir: &Path) -> Self {
        let ours: BTreeSet<String> = loops_below(dir).into_iter().map(|device| device.node).collect();
        let mut all = Self::of_machine(dir);
        all.things.retain(|thing| match thing {
            Thing::Process(..) => true,
            Thing::Mount(path) => path.starts_with(dir),
            Thing::Loop(node, _) => ours.contains(node),
            Thing::Mapper(name) => name.starts_with("berth-"),
            Thing::Network(_) => false,
        });
        all
    }

    /// What `after` has and this has not.
    pub fn added<'a>(&'a self, after: &'a Self) -> Vec<&'a Thing> {
        after.things.difference(&self.things).collect()
    }

    /// Looks with `look` until nothing is there that this has not, for `limit` at most: the kernel lets mounts and
    /// loop devices go a moment after their last user. Returns what stays.
    pub fn settle(&self, limit: Duration, look: impl Fn() -> Self) -> Vec<Thing> {
        let deadline = Instant::now() + limit;
        loop {
            let after = look();
            let added: Vec<Thing> = self.added(&after).into_iter().cloned().collect();
            if added.is_empty() || Instant::now() >= deadline {
                return added;
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// The paths that the mounts of process `pid` (or `self`) cover.
pub fn mounts(pid: &str) -> Vec<PathBuf> {
    mount_points(&fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default())
}

/// The paths that the mounts of a `/proc/PID/mountinfo` cover.
pub fn mount_points(mountinfo: &str) -> Vec<PathBuf> {
    mountinfo
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|path| PathBuf::from(unescaped(path)))
        .collect()
}

/// A loop device in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loop {
    /// Its node, `/dev/loopN`.
    pub node: String,
    /// The file behind it, as the kernel can name it from here: without the mounts of a namespace that is gone.
    pub file: PathBuf,
    /// Device number (`major:minor`) and inode of that file.
    pub identity: (String, u64),
    /// Its own device number.
    number: String,
}

/// The loop devices in use. None where `losetup` (package mount) cannot list them.
pub fn loops() -> Vec<Loop> {
    let columns = "NAME,MAJ:MIN,BACK-MAJ:MIN,BACK-INO,BACK-FILE";
    let listed = Command::new("losetup").args(["--json", "--list", "--output", columns]).output();
    let listed = listed.ok().and_then(|output| serde_json::from_slice::<Value>(&output.stdout).ok());
    let devices = listed.as_ref().and_then(|listed| listed["loopdevices"].as_array());
    // Numbers are text in some versions, with spaces around them.
    let text =
        |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned).trim().to_owned();
    let read = |device: &Value| {
        let file = text(&device["back-file"]);
        Loop {
            node: text(&device["name"]),
            file: PathBuf::from(file.strip_suffix(" (deleted)").unwrap_or(&file)),
            identity: (text(&device["back-maj:min"]), text(&device["back-ino"]).parse().unwrap_or_default()),
            number: text(&device["maj:min"]),
        }
    };
    devices.into_iter().flatten().map(read).collect()
}

/// The loop devices whose file lies below `dir`, and those whose file lies in a file system on one of these: found
/// by inode, so that it does not matter in which namespace a file system is, or was, mounted. Those that hold others
/// come last.
pub fn loops_below(dir: &Path) -> Vec<Loop> {
    let mut others = loops();
    if others.is_empty() {
        return others;
    }
    let mut files = BTreeSet::new();
    collect_files(dir, &mut files);
    let mut ours: Vec<Loop> = Vec::new();
    loop {
        let known: BTreeSet<&String> = ours.iter().map(|device| &device.number).collect();
        let is_ours = |device: &Loop| {
            device.file.starts_with(dir)
                || files.contains(&device.identity)
                || known.contains(&device.identity.0)
        };
        let (found, rest): (Vec<_>, Vec<_>) = others.into_iter().partition(is_ours);
        if found.is_empty() {
            ours.reverse();
            return ours;
        }
        ours.extend(found);
        others = rest;
    }
}

/// The identities of all regular files below `dir`.
fn collect_files(dir: &Path, files: &mut BTreeSet<(String, u64)>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_dir() {
            collect_files(&entry.path(), files);
        } else if metadata.is_file() {
            let device = metadata.dev();
            files.insert((format!("{}:{}", major(device), minor(device)), metadata.ino()));
        }
    }
}

/// Detaches every loop device of [`loops_below`]: for when the nodes that attached them are gone for good. Returns
/// those that stay attached.
pub fn detach_loops_below(dir: &Path) -> Vec<Loop> {
    let ours = loops_below(dir);
    for device in &ours {
        // What it says is seen in the next list.
        Command::new("losetup").args(["--detach", &device.node]).output().ok();
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let now = loops();
        let left: Vec<Loop> = ours.iter().filter(|device| now.contains(device)).cloned().collect();
        if left.is_empty() || Instant::now() >= deadline {
            return left;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Our children, and other processes whose command line names `dir`; zombies have none.
fn processes(dir: &Path) -> Vec<Thing> {
    let (own, dir) = (std::process::id(), dir.to_string_lossy().into_owned());
    names("/proc", |name| {
        let pid: u32 = name.parse().ok().filter(|pid| *pid != own)?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok().filter(|command| !command.is_empty())?;
        let command = String::from_utf8_lossy(&command).replace('\0', " ").trim().to_owned();
        // The parent is the second field behind the name, which is in parentheses.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1));
        let child = parent.is_some_and(|parent| parent == own.to_string());
        (child || command.contains(&dir)).then_some(Thing::Process(pid, command))
    })
}

fn names<T>(dir: &str, mut made: impl FnMut(&str) -> Option<T>) -> Vec<T> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| made(entry.file_name().to_str()?)).collect()
}

/// Undoes the octal escapes of `/proc/PID/mountinfo`.
fn unescaped(text: &str) -> String {
    let mut plain = text.to_owned();
    for (escape, character) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        plain = plain.replace(escape, character);
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Program;

    #[test]
    fn a_process_that_names_the_folder_is_found_until_it_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let before = Snapshot::below(dir.path());
        let script = format!("sleep 60; : {}", dir.path().display());
        let child = Program::new("sh", Path::new("sh"), &dir.path().join("log"))
            .args(["-c", &script])
            .spawn()
            .unwrap();
        let added = before.settle(Duration::ZERO, || Snapshot::below(dir.path()));
        assert!(
            added.iter().any(|thing| matches!(thing, Thing::Process(pid, _) if *pid == child.pid())),
            "{added:?}"
        );
        drop(child);
        let left = before.settle(Duration::from_secs(10), || Snapshot::below(dir.path()));
        assert!(left.is_empty(), "{left:?}");
    }

    #[test]
    fn the_root_is_a_mount_and_escapes_are_undone() {
        assert!(mounts("self").contains(&PathBuf::from("/")));
        assert_eq!(unescaped("/a\\040b\\134"), "/a b\\");
    }
}
