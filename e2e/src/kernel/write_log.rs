//! What a disk would have held after a power cut at any moment: the log of the kernel's target `log-writes`, replayed.
//!
//! Below a device under test, a table `0 SECTORS log-writes DEVICE LOG` records every write in the order in which the
//! writer was told that it is safe. Replaying the log up to each flush gives what every cut leaves behind at least; a real
//! one may keep any of the writes that the disk had been given and not yet made safe, in any order, and
//! [`WriteLog::replay_cut`] gives such states.
//! The format is that of `drivers/md/dm-log-writes.c` in Linux: a sector with the head, then for each entry a sector
//! with its fields and the data behind it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};

/// How every log begins, as the kernel has it.
const MAGIC: u64 = 0x006a_7366_7773_6872;

/// The only version there is.
const VERSION: u64 = 1;

const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// How much is copied at a time. Unit: bytes.
const PIECE: usize = 1 << 20;

/// Why a log could not be replayed.
#[derive(Debug, thiserror::Error)]
pub enum WriteLogError {
    /// The log or its target could not be read or written.
    #[error("failed to replay a log of writes: {path}")]
    Access {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is no such log.
    #[error("{path} is no log of writes: {reason}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// A moment that the writer could rely on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Point {
    /// It was told that everything before this entry of the log is safe.
    Safe(u64),
    /// It left this mark (`dmsetup message DEVICE 0 mark TEXT`).
    Mark(String),
}

/// One entry of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogEntry {
    /// A write or a discard. By itself it is safe only if it asked for that (`FUA`).
    Write {
        /// Whether it is.
        safe: bool,
    },
    /// Everything that was written before it is safe.
    Flush,
    /// A mark.
    Mark(String),
}

/// What a replay has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Writes that are there.
    pub kept: u64,
    /// Writes that the disk had been given, and has lost.
    pub lost: u64,
}

/// Where an entry is, and what it is.
struct Head {
    number: u64,
    at: u64,
    bytes: u64,
    flags: u64,
    mark: Option<String>,
}

/// A log that is being replayed onto a file with what the device held when the log began.
#[derive(Debug)]
pub struct WriteLog {
    path: PathBuf,
    log: File,
    target_path: PathBuf,
    target: File,
    sector: u64,
    entries: u64,
    /// The next entry.
    entry: u64,
    /// Where it is. Unit: bytes.
    offset: u64,
}

impl WriteLog {
    /// Opens both; nothing is replayed yet.
    ///
    /// # Errors
    /// [`WriteLogError`].
    pub fn open(path: &Path, target: &Path) -> Result<Self, WriteLogError> {
        let access = |path: &Path| {
            let path = path.to_owned();
            move |source| WriteLogError::Access { path, source }
        };
        let log = File::open(path).map_err(access(path))?;
        let mut head = [0; 28];
        log.read_exact_at(&mut head, 0).map_err(access(path))?;
        let (sector, entries) = (u64::from(word32(&head, 24)), word(&head, 16));
        let format = |reason: String| WriteLogError::Format { path: path.to_owned(), reason };
        if (word(&head, 0), word(&head, 8)) != (MAGIC, VERSION) {
            return Err(format("it does not begin as one".to_owned()));
        }
        if !sector.is_power_of_two() || !(512..=65536).contains(&sector) {
            return Err(format(format!("sectors of {sector} bytes")));
        }
        let opened = OpenOptions::new().read(true).write(true).open(target).map_err(access(target))?;
        Ok(Self {
            path: path.to_owned(),
            log,
            target_path: target.to_owned(),
            target: opened,
            sector,
            entries,
            entry: 0,
            offset: sector,
        })
    }

    /// Replays up to the next point; nothing when the log has ended.
    ///
    /// # Errors
    /// [`WriteLogError`].
    pub fn next_point(&mut self) -> Result<Option<Point>, WriteLogError> {
        while let Some(head) = self.next_head()? {
            if let Some(text) = head.mark {
                return Ok(Some(Point::Mark(text)));
            }
            self.copy(head.at, head.bytes, head.flags & DISCARD != 0)?;
            if head.flags & (FLUSH | FUA) != 0 {
                return Ok(Some(Point::Safe(head.number)));
            }
        }
        Ok(None)
    }

    /// Every entry from the beginning; nothing is replayed.
    ///
    /// # Errors
    /// [`WriteLogError`].
    pub fn entries(&mut self) -> Result<Vec<LogEntry>, WriteLogError> {
        self.rewind();
        let mut entries = Vec::new();
        while let Some(head) = self.next_head()? {
            self.skip(&head);
            entries.push(match head.mark {
                Some(text) => LogEntry::Mark(text),
                None if head.flags & FLUSH != 0 => LogEntry::Flush,
                None => LogEntry::Write { safe: head.flags & FUA != 0 },
            });
        }
        self.rewind();
        Ok(entries)
    }

    /// Replays what a power cut may leave behind that comes before entry `end`, a flush, has come to its end, or after all
    /// if there is no such entry: all that was safe then, and of the other writes those that `keep` chooses. The log has
    /// them in no order that binds: the target logs a write when a flush has made it safe.
    ///
    /// # Errors
    /// [`WriteLogError`].
    pub fn replay_cut(
        &mut self,
        end: usize,
        mut keep: impl FnMut() -> bool,
    ) -> Result<Replayed, WriteLogError> {
        let entries = self.entries()?;
        let end = end.min(entries.len());
        let flushed = entries[..end].iter().rposition(|entry| *entry == LogEntry::Flush);
        let mut replayed = Replayed::default();
        for (number, entry) in entries[..end].iter().enumerate() {
            let Some(head) = self.next_head()? else { break };
            let flushed = flushed.is_some_and(|flush| number < flush);
            let safe = flushed || matches!(entry, LogEntry::Write { safe: true });
            if head.mark.is_some() || (head.bytes > 0 && !safe && !keep()) {
                replayed.lost += u64::from(head.mark.is_none());
                self.skip(&head);
                continue;
            }
            replayed.kept += u64::from(head.bytes > 0);
            self.copy(head.at, head.bytes, head.flags & DISCARD != 0)?;
        }
        Ok(replayed)
    }

    fn rewind(&mut self) {
        (self.entry, self.offset) = (0, self.sector);
    }

    /// Reads the head of the next entry; its data come next.
    fn next_head(&mut self) -> Result<Option<Head>, WriteLogError> {
        if self.entry >= self.entries {
            return Ok(None);
        }
        let number = self.entry;
        self.entry += 1;
        let mut fields = vec![0; 512];
        self.read(&mut fields, self.offset)?;
        let [start, sectors, flags, length] = [0, 8, 16, 24].map(|at| word(&fields, at));
        self.offset += self.sector;
        if flags & MARK != 0 {
            let text = usize::try_from(length).ok().and_then(|length| fields.get(32..32 + length));
            let text =
                text.ok_or_else(|| self.format(format!("entry {number} has a mark of {length} bytes")))?;
            let mark = Some(String::from_utf8_lossy(text).trim_end_matches('\0').to_owned());
            return Ok(Some(Head { number, at: 0, bytes: 0, flags, mark }));
        }
        let bytes = sectors.checked_mul(self.sector).zip(start.checked_mul(self.sector));
        let (bytes, at) =
            bytes.ok_or_else(|| self.format(format!("entry {number} writes beyond any disk")))?;
        Ok(Some(Head { number, at, bytes, flags, mark: None }))
    }

    /// Goes on behind the data of an entry.
    fn skip(&mut self, head: &Head) {
        if head.flags & DISCARD == 0 {
            self.offset += head.bytes;
        }
    }

    /// Copies the data of an entry; a discard has none and leaves zeros.
    fn copy(&mut self, at: u64, bytes: u64, discard: bool) -> Result<(), WriteLogError> {
        let failed = |source| WriteLogError::Access { path: self.target_path.clone(), source };
        if discard {
            let length = self.target.metadata().map_err(failed)?.len();
            return punch(&self.target, at, bytes.min(length.saturating_sub(at))).map_err(failed);
        }
        let mut done = 0;
        while done < bytes {
            let size = usize::try_from(bytes - done).map_or(PIECE, |left| left.min(PIECE));
            let mut piece = vec![0; size];
            self.read(&mut piece, self.offset)?;
            self.offset += size as u64;
            let written = self.target.write_all_at(&piece, at + done);
            written.map_err(|source| WriteLogError::Access { path: self.target_path.clone(), source })?;
            done += size as u64;
        }
        Ok(())
    }

    fn read(&self, bytes: &mut [u8], at: u64) -> Result<(), WriteLogError> {
        let read = self.log.read_exact_at(bytes, at);
        read.map_err(|source| WriteLogError::Access { path: self.path.clone(), source })
    }

    fn format(&self, reason: String) -> WriteLogError {
        WriteLogError::Format { path: self.path.clone(), reason }
    }
}

/// Makes a part of a file zeros that take no space.
fn punch(file: &File, at: u64, bytes: u64) -> io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let number = |value: u64| i64::try_from(value).map_err(|_| io::ErrorKind::InvalidInput);
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(file.as_fd(), flags, number(at)?, number(bytes)?)?)
}

/// The little-endian number at `at`, which the callers keep within the array.
fn word(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |number, byte| (number << 8) | u64::from(*byte))
}

fn word32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |number, byte| (number << 8) | u32::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry with its data.
    fn entry(start: u64, sectors: u64, flags: u64, data: &[u8]) -> Vec<u8> {
        let length = if flags & MARK == 0 { 0 } else { data.len() as u64 };
        let mut bytes: Vec<u8> = [start, sectors, flags, length].map(u64::to_le_bytes).concat();
        if flags & MARK != 0 {
            bytes.extend_from_slice(data);
        }
        bytes.resize(512, 0);
        if flags & MARK == 0 {
            bytes.extend_from_slice(data);
        }
        bytes
    }

    fn log(entries: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = [MAGIC, VERSION, entries.len() as u64].map(u64::to_le_bytes).concat();
        bytes.extend_from_slice(&512_u32.to_le_bytes());
        bytes.resize(512, 0);
        bytes.extend(entries.concat());
        bytes
    }

    #[test]
    fn writes_appear_at_their_flush_marks_are_told_and_discards_are_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let (path, target) = (dir.path().join("log"), dir.path().join("target"));
        let entries = [
            entry(1, 1, 0, &[1; 512]),
            entry(0, 0, FLUSH, &[]),
            entry(0, 0, MARK, b"here\0"),
            entry(0, 2, FUA, &[2; 1024]),
            entry(1, 1, DISCARD, &[]),
            entry(0, 0, FLUSH, &[]),
            entry(0, 1, 0, &[3; 512]),
        ];
        std::fs::write(&path, log(&entries)).unwrap();
        std::fs::write(&target, vec![9; 1536]).unwrap();
        let mut replay = WriteLog::open(&path, &target).unwrap();
        let held = || std::fs::read(&target).unwrap().chunks(512).map(|sector| sector[0]).collect::<Vec<_>>();
        let mut seen = Vec::new();
        while let Some(point) = replay.next_point().unwrap() {
            seen.push((point, held()));
        }
        let mark = Point::Mark("here".to_owned());
        let wanted = [
            (Point::Safe(1), vec![9, 1, 9]),
            (mark, vec![9, 1, 9]),
            (Point::Safe(3), vec![2, 2, 9]),
            (Point::Safe(5), vec![2, 0, 9]),
        ];
        assert_eq!(seen, wanted);
        assert_eq!(held(), [3, 0, 9], "what was never flushed comes last");
    }

    #[test]
    fn a_cut_keeps_what_was_safe_and_of_the_rest_what_is_chosen() {
        let dir = tempfile::tempdir().unwrap();
        let (path, target) = (dir.path().join("log"), dir.path().join("target"));
        let entries = [
            entry(0, 1, 0, &[1; 512]),
            entry(0, 0, FLUSH, &[]),
            entry(1, 1, FUA, &[2; 512]),
            entry(0, 0, MARK, b"here\0"),
            entry(2, 1, 0, &[3; 512]),
            entry(3, 1, 0, &[4; 512]),
            entry(0, 0, FLUSH, &[]),
        ];
        std::fs::write(&path, log(&entries)).unwrap();
        let held = |end: usize, keep: [bool; 2]| {
            std::fs::write(&target, vec![9; 2048]).unwrap();
            let mut keep = keep.into_iter();
            let mut log = WriteLog::open(&path, &target).unwrap();
            let replayed = log.replay_cut(end, || keep.next().unwrap()).unwrap();
            let held: Vec<u8> = std::fs::read(&target).unwrap().chunks(512).map(|part| part[0]).collect();
            (held, replayed.lost)
        };
        assert_eq!(held(6, [false, true]), (vec![1, 2, 9, 4], 1), "reordered");
        assert_eq!(held(6, [false, false]), (vec![1, 2, 9, 9], 2), "lost");
        assert_eq!(held(7, [false, false]), (vec![1, 2, 3, 4], 0), "the flush has ended");
        assert_eq!(held(2, [true, true]), (vec![1, 9, 9, 9], 0), "all else came later");
        let entries = WriteLog::open(&path, &target).unwrap().entries().unwrap();
        assert_eq!(entries[3], LogEntry::Mark("here".to_owned()));
        assert_eq!(entries[2], LogEntry::Write { safe: true });
    }

    #[test]
    fn what_is_no_log_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (path, target) = (dir.path().join("log"), dir.path().join("target"));
        std::fs::write(&target, []).unwrap();
        for bytes in
            [vec![0; 512], Vec::new(), log(&[entry(u64::MAX, 1, 0, &[])]), log(&[entry(0, 9, 0, &[])])]
        {
            std::fs::write(&path, bytes).unwrap();
            let replayed = WriteLog::open(&path, &target).and_then(|mut log| log.next_point());
            assert!(replayed.is_err(), "{replayed:?}");
        }
    }
}
