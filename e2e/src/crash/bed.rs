//! The machine whose power is cut: a guest with one disk, on which everything of the node lies, and beside it the log of
//! what was written to that disk.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::player::marks;
use super::stamp::{BLOCK, Content};
use crate::kernel::{
    BootError, CommandError, Disk, GIB, KernelHost, LogEntry, MIB, Replayed, Running, WriteLog, WriteLogError,
};
use crate::ours::{BuildError, NODE, NODE_SABOTAGE, RECORD_DUMP};
use crate::seeded::Seeded;

/// The dm device with the log.
pub const DISK: &str = "disk";
/// What the pool lies on.
pub const POOL_DEVICE: &str = "/dev/mapper/pooldisk";
/// The image that volumes start from.
pub const TEMPLATE_FILE: &str = "/run/crash/state/template.raw";
/// Its size. Unit: bytes.
pub const TEMPLATE_SIZE: u64 = 8 * MIB;
/// Tells what the kernel, LVM and the record say.
pub const LOOK: &str = include_str!("../../crash/look.sh");

const STAGE: &str = include_str!("../../crash/stage.sh");
/// The mark that it leaves in the log at its end.
const STAGED: &str = "staged";
/// Room for the pool, and 128 MiB for the node's state.
const DISK_SIZE: u64 = GIB + 128 * MIB;
const LOG_SIZE: u64 = 8 * GIB;
/// In so many of 100 cases the moment is one at which writes can be lost, if there is any.
const SOMETHING_TO_LOSE: u64 = 80;
/// How long a look before the start may take on a busy machine.
const STAGE_LIMIT: Duration = Duration::from_secs(180);

/// Why the bed is out of order.
#[derive(Debug, thiserror::Error)]
pub enum BedError {
    /// The guest.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Something in it.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The log.
    #[error(transparent)]
    Log(#[from] WriteLogError),
    /// A program of ours.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// A file.
    #[error("failed to use {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The programs that run in the guest.
#[derive(Debug, Clone)]
pub struct Programs {
    player: PathBuf,
    node: PathBuf,
    dump: PathBuf,
    sabotage: Option<String>,
}

impl Programs {
    /// This program as the player, and the others, built if need be.
    ///
    /// # Errors
    /// [`BedError`].
    pub fn obtain(sabotage: Option<&str>) -> Result<Self, BedError> {
        let this = Path::new("/proc/self/exe");
        let player =
            fs::read_link(this).map_err(|source| BedError::File { path: this.to_owned(), source })?;
        let node = if sabotage.is_some() { NODE_SABOTAGE } else { NODE };
        let (node, dump) = (node.obtain()?, RECORD_DUMP.obtain()?);
        Ok(Self { player, node, dump, sabotage: sabotage.map(str::to_owned) })
    }
}

/// What a disk holds after its power was cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cut {
    /// All that the kernel had given to the disk.
    AsItWas,
    /// What it was told is safe, and nothing else.
    Lost,
    /// What it was told is safe, and some of the rest.
    Reordered,
    /// For a time before the cut, the disk refused every write.
    Failing,
}

impl Cut {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::AsItWas, Self::Lost, Self::Reordered, Self::Failing];

    /// Whether the disk is made from the log.
    pub const fn is_replay(self) -> bool {
        matches!(self, Self::Lost | Self::Reordered)
    }
}

/// What the look before the start has found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Staged {
    /// Metadata volumes that `thin_check` has looked at.
    pub checked: u64,
    /// Those that it refuses.
    pub bad: Vec<String>,
    /// What LVM says where it cannot read the device of the pool.
    pub unreadable: Option<String>,
    /// The record as it lay on the disk.
    pub record: Option<serde_json::Value>,
}

/// A disk made from the log.
#[derive(Debug, Default)]
pub struct Remade {
    /// Script lines whose end is in the part of the log that was replayed.
    pub ended: BTreeSet<usize>,
    /// Writes that are there and that are not.
    pub replayed: Replayed,
}

/// A guest with its disks.
#[derive(Debug)]
pub struct Bed {
    dir: PathBuf,
    host: Option<KernelHost>,
    programs: Programs,
    new: bool,
}

impl Bed {
    /// With an empty disk.
    ///
    /// # Errors
    /// [`BedError`].
    pub fn new(dir: &Path, programs: Programs) -> Result<Self, BedError> {
        let bed = Self { dir: dir.to_owned(), host: None, programs, new: true };
        bed.file("", fs::create_dir_all(dir))?;
        let template: Vec<u8> =
            (0..TEMPLATE_SIZE / BLOCK as u64).flat_map(|block| Content::Template(block).bytes()).collect();
        bed.file("template.raw", fs::write(dir.join("template.raw"), template))?;
        bed.empty("disk.img", DISK_SIZE)?;
        Ok(bed)
    }

    /// Switches it on, puts the devices together, and looks at what is there.
    ///
    /// # Errors
    /// [`BedError`]; [`BedError::Command`] if the state's file system cannot be mounted.
    pub fn boot(&mut self) -> Result<Staged, BedError> {
        self.empty("log.img", LOG_SIZE)?;
        self.copy("disk.img", "base.img")?;
        if let Some(host) = &self.host {
            host.boot_again()?;
        } else {
            let disk = |name, size| Disk::new(name, size).without_discard();
            let host = KernelHost::at(&self.dir).memory(640 * MIB);
            let host = host.disk_with(disk("log", LOG_SIZE)).disk_with(disk("disk", DISK_SIZE));
            self.host = Some(host.env("BERTH_RECORD_DUMP", &self.programs.dump).boot()?);
        }
        let template = self.dir.join("template.raw");
        let script = self.dir.join("stage.sh");
        self.file("stage.sh", fs::write(&script, STAGE))?;
        let words = [script.as_os_str(), if self.new { "1" } else { "0" }.as_ref(), template.as_os_str()];
        let words = ["bash".as_ref()].into_iter().chain(words);
        let output = self.host().command(words).limit(STAGE_LIMIT).run()?;
        self.new = false;
        Ok(staged(&output.text()))
    }

    /// Starts the player with this script.
    ///
    /// # Errors
    /// [`BedError`].
    pub fn play(&self, script: String) -> Result<Running, BedError> {
        let node = [self.programs.node.as_os_str()];
        let arguments = ["batch", "--state-dir", "/run/crash/state/berth", "--mount-root", "/run/crash/mnt"];
        let arguments = arguments.iter().chain(&["--node-name", "crash"]).map(AsRef::as_ref);
        let player = [self.programs.player.as_os_str(), "play".as_ref(), "--".as_ref()];
        let mut command = self.host().command(player.into_iter().chain(node).chain(arguments)).input(script);
        if let Some(name) = &self.programs.sabotage {
            command = command.env("BERTH_SABOTAGE", name);
        }
        Ok(command.start()?)
    }

    /// Makes the disk refuse every write from now on, until it is switched on again.
    ///
    /// # Errors
    /// [`BedError`].
    pub fn refuse_writes(&self) -> Result<(), BedError> {
        let script = "s=$(blockdev --getsz /dev/ubdb)
            dmsetup reload ground --table \"0 $s flakey /dev/ubdb 0 0 3600 1 error_writes\"
            dmsetup suspend --nolockfs --noflush ground
            dmsetup resume ground";
        Ok(self.host().shell(script).map(drop)?)
    }

    /// Cuts the power.
    pub fn cut(&self) {
        self.host().cut();
    }

    /// What the guest is, in one line.
    pub fn description(&self) -> String {
        self.host().description()
    }

    /// Makes the disk anew as a cut may have left it while line `number` of the script was carried out (the start of the
    /// program, if none): at a random flush, with or without some of what was not safe yet.
    ///
    /// # Errors
    /// [`BedError`].
    pub fn remake(&self, number: Option<usize>, cut: Cut, seeded: &mut Seeded) -> Result<Remade, BedError> {
        self.copy("base.img", "next.img")?;
        let mut log = WriteLog::open(&self.dir.join("log.img"), &self.dir.join("next.img"))?;
        let entries = log.entries()?;
        let end = moment(&entries, number, seeded);
        let percent = if cut == Cut::Reordered { seeded.between(1, 3) * 25 } else { 0 };
        let replayed = log.replay_cut(end, || seeded.chance(percent))?;
        drop(log);
        self.file("disk.img", fs::rename(self.dir.join("next.img"), self.dir.join("disk.img")))?;
        Ok(Remade { ended: ended(&entries[..end]), replayed })
    }

    fn host(&self) -> &KernelHost {
        self.host.as_ref().expect("it was booted before")
    }

    fn empty(&self, name: &str, size: u64) -> Result<(), BedError> {
        let made = File::create(self.dir.join(name)).and_then(|file| file.set_len(size));
        self.file(name, made)
    }

    /// Copies without the holes.
    fn copy(&self, from: &str, to: &str) -> Result<(), BedError> {
        let mut copy = std::process::Command::new("cp");
        copy.args(["--sparse=always", "--reflink=auto"]).args([self.dir.join(from), self.dir.join(to)]);
        let copied = copy.status().and_then(|status| {
            if status.success() { Ok(()) } else { Err(io::Error::other(status.to_string())) }
        });
        self.file(to, copied)
    }

    fn file(&self, name: &str, done: io::Result<()>) -> Result<(), BedError> {
        done.map_err(|source| BedError::File { path: self.dir.join(name), source })
    }
}

/// Which entry of the log comes last: a flush between the marks of a line that does not come to its end, or the end of the
/// log.
fn moment(entries: &[LogEntry], number: Option<usize>, seeded: &mut Seeded) -> usize {
    let at =
        |text: &str| entries.iter().position(|entry| matches!(entry, LogEntry::Mark(mark) if mark == text));
    let (begin, end) = marks(number.unwrap_or_default());
    let begin = at(if number.is_some() { &begin } else { STAGED });
    let Some(begin) = begin else { return entries.len() };
    let end = at(&end).unwrap_or(entries.len());
    let flushes = (begin..end).filter(|at| entries[*at] == LogEntry::Flush);
    let mut moments: Vec<usize> = flushes.chain([end]).collect();
    if seeded.chance(SOMETHING_TO_LOSE) {
        let losing: Vec<usize> = moments.iter().copied().filter(|at| can_lose(&entries[..*at])).collect();
        moments = if losing.is_empty() { moments } else { losing };
    }
    let chosen = seeded.between(0, moments.len() as u64 - 1);
    moments[usize::try_from(chosen).unwrap_or_default()]
}

/// Whether something was written that no flush has made safe.
fn can_lose(entries: &[LogEntry]) -> bool {
    let since = entries.iter().rev().take_while(|entry| **entry != LogEntry::Flush);
    since.into_iter().any(|entry| *entry == LogEntry::Write { safe: false })
}

fn ended(entries: &[LogEntry]) -> BTreeSet<usize> {
    let number = |entry: &LogEntry| match entry {
        LogEntry::Mark(mark) => mark.strip_prefix("end-")?.parse().ok(),
        _ => None,
    };
    entries.iter().filter_map(number).collect()
}

fn staged(text: &str) -> Staged {
    let (lines, record) = text.split_once("record\n").unwrap_or((text, ""));
    let mut staged = Staged {
        record: serde_json::Deserializer::from_str(record).into_iter().next().and_then(Result::ok),
        ..Staged::default()
    };
    // The record comes among the checks: its own lines are those of JSON.
    for line in lines.lines().chain(record.lines()) {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["check", _, "good"] => staged.checked += 1,
            ["check", volume, "bad"] => {
                staged.checked += 1;
                staged.bad.push(volume.to_owned());
            }
            ["unreadable", ..] => staged.unreadable = Some(line.to_owned()),
            _ => {}
        }
    }
    staged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(text: &str) -> LogEntry {
        LogEntry::Mark(text.to_owned())
    }

    #[test]
    fn a_moment_lies_between_the_marks_of_its_line_and_what_ended_before_it_is_known() {
        let entries = [
            LogEntry::Flush,
            mark("begin-0"),
            LogEntry::Flush,
            mark("end-0"),
            mark("begin-1"),
            LogEntry::Write { safe: false },
            LogEntry::Flush,
            LogEntry::Flush,
            mark("end-1"),
        ];
        let mut seen = BTreeSet::new();
        for seed in 0..100 {
            seen.insert(moment(&entries, Some(1), &mut Seeded::new(seed)));
        }
        assert_eq!(seen, BTreeSet::from([6, 7, 8]));
        assert_eq!(ended(&entries[..7]), BTreeSet::from([0]));
        assert_eq!(moment(&entries, Some(2), &mut Seeded::new(1)), entries.len());
    }

    #[test]
    fn what_the_stage_says_is_read() {
        let text = "check g/berth-1-images-metadata good\nrecord\n{\n \"tables\": {}\n}\ncheck g/berth-1-volumes-metadata bad";
        let staged = staged(text);
        assert_eq!((staged.checked, staged.bad.len(), staged.unreadable.is_none()), (2, 1, true));
        assert_eq!(staged.record, Some(serde_json::json!({"tables": {}})));
    }
}
