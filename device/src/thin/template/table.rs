//! The tables of a template, and what a clone says about itself.
//!
//! Sources: `Documentation/admin-guide/device-mapper/dm-clone.rst` and `linear.rst` of the kernel, `clone_status` in
//! `drivers/md/dm-clone-target.c` for the order of the words.

use std::fmt;
use std::str::FromStr;

use berth_core::hydration::{CloneMode, Progress, RegionSize};
use berth_core::units::Bytes;

use crate::thin::status::Blocks;
use crate::thin::table::{DeviceNumber, ParseError, number, start};

/// How every clone of ours is made: the kernel copies nothing by itself, and discards go no further.
const FEATURES: [&str; 2] = ["no_hydration", "no_discard_passdown"];

/// `0 <sectors> clone <metadata> <destination> <source> <region sectors> 2 no_hydration no_discard_passdown`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CloneTable {
    /// Its size, in sectors of 512 bytes.
    pub sectors: u64,
    /// The device with the metadata.
    pub metadata: DeviceNumber,
    /// What is local is read from here.
    pub destination: DeviceNumber,
    /// What is not, from here.
    pub source: DeviceNumber,
    /// The size of a region.
    pub region: RegionSize,
}

impl fmt::Display for CloneTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sectors, metadata, destination, source, region } = self;
        write!(f, "0 {sectors} clone {metadata} {destination} {source} {}", region.sectors())?;
        write!(f, " {}", FEATURES.len())?;
        FEATURES.iter().try_for_each(|word| write!(f, " {word}"))
    }
}

impl FromStr for CloneTable {
    type Err = ParseError;
    /// Only of a clone that behaves like ours.
    fn from_str(line: &str) -> Result<Self, ParseError> {
        parse_clone(line).ok_or_else(|| ParseError::new("clone table", line))
    }
}

fn parse_clone(line: &str) -> Option<CloneTable> {
    let mut words = line.split_ascii_whitespace();
    let sectors = start(&mut words, "clone")?;
    let mut device = || words.next()?.parse().ok();
    let (metadata, destination, source) = (device()?, device()?, device()?);
    let region = region(words.next()?)?;
    are_ours(&mut words)?;
    words.next().is_none().then_some(CloneTable { sectors, metadata, destination, source, region })
}

/// The number of features and the features, in any order.
fn are_ours<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<()> {
    let count: usize = number(words.next()?)?;
    let mut found: Vec<_> = words.take(count.min(FEATURES.len() + 1)).collect();
    found.sort_unstable_by_key(|word| *word != FEATURES[0]);
    (found == FEATURES && count == FEATURES.len()).then_some(())
}

fn region(sectors: &str) -> Option<RegionSize> {
    let bytes = number::<u64>(sectors)?.checked_mul(512)?;
    RegionSize::new(Bytes(bytes)).ok()
}

/// `0 <sectors> linear <device> 0`: the whole of another device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearTable {
    /// Its size, in sectors of 512 bytes.
    pub sectors: u64,
    /// The other device.
    pub device: DeviceNumber,
}

impl fmt::Display for LinearTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sectors, device } = self;
        write!(f, "0 {sectors} linear {device} 0")
    }
}

impl FromStr for LinearTable {
    type Err = ParseError;
    fn from_str(line: &str) -> Result<Self, ParseError> {
        parse_linear(line).ok_or_else(|| ParseError::new("linear table", line))
    }
}

fn parse_linear(line: &str) -> Option<LinearTable> {
    let mut words = line.split_ascii_whitespace();
    let sectors = start(&mut words, "linear")?;
    let device = words.next()?.parse().ok()?;
    let from_its_start = words.next()? == "0";
    (from_its_start && words.next().is_none()).then_some(LinearTable { sectors, device })
}

/// A clone's status line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloneStatus {
    /// It works, perhaps not fully.
    Working(WorkingClone),
    /// Its metadata has failed, or the kernel cannot tell. If it has failed, so does every read of the clone.
    Failed,
}

/// The state of a clone that answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkingClone {
    /// Blocks of 4 KiB of metadata.
    pub metadata: Blocks,
    /// The size of a region.
    pub region: RegionSize,
    /// How many regions are local. Not all of that may be durable.
    pub progress: Progress,
    /// Regions that are being written or copied at this moment.
    pub hydrating: u64,
    /// True if it can record what becomes local.
    pub writable: bool,
}

impl CloneStatus {
    /// As decisions see it.
    pub const fn mode(&self) -> CloneMode {
        match self {
            Self::Working(WorkingClone { writable: true, .. }) => CloneMode::ReadWrite,
            Self::Working(_) => CloneMode::ReadOnly,
            Self::Failed => CloneMode::Failed,
        }
    }

    /// How many regions are local; `None` if it has failed.
    pub const fn progress(&self) -> Option<Progress> {
        match self {
            Self::Working(clone) => Some(clone.progress),
            Self::Failed => None,
        }
    }
}

impl FromStr for CloneStatus {
    type Err = ParseError;
    fn from_str(line: &str) -> Result<Self, ParseError> {
        parse_status(line).ok_or_else(|| ParseError::new("clone status", line))
    }
}

fn parse_status(line: &str) -> Option<CloneStatus> {
    let mut words = line.split_ascii_whitespace();
    start(&mut words, "clone")?;
    let first = words.next()?;
    if matches!(first, "Fail" | "Error") {
        return words.next().is_none().then_some(CloneStatus::Failed);
    }
    // Sectors in a block of metadata.
    if first != "8" {
        return None;
    }
    let (used, total) = pair(words.next()?)?;
    let region = region(words.next()?)?;
    let (hydrated, regions) = pair(words.next()?)?;
    let hydrating = number(words.next()?)?;
    // Features and core arguments may be what they are; the last word counts.
    for _ in 0..2 {
        let count: u32 = number(words.next()?)?;
        for _ in 0..count {
            words.next()?;
        }
    }
    let writable = match words.next()? {
        "rw" => true,
        "ro" => false,
        _ => return None,
    };
    let progress = Progress { hydrated, total: regions };
    let is_possible = regions > 0 && hydrated <= regions && words.next().is_none();
    let metadata = Blocks { used, total };
    is_possible.then_some(CloneStatus::Working(WorkingClone {
        metadata,
        region,
        progress,
        hydrating,
        writable,
    }))
}

fn pair(word: &str) -> Option<(u64, u64)> {
    let (used, total) = word.split_once('/')?;
    Some((number(used)?, number(total)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux 6.1 prints them.
    const CLONE: &str = "0 32808 clone 254:2 254:1 254:3 128 2 no_hydration no_discard_passdown";
    const LINEAR: &str = "0 32808 linear 254:1 0";
    const STATUS: &str = "0 32808 clone 8 6/1024 128 81/257 0 2 no_hydration no_discard_passdown 4 hydration_threshold 1 \
                          hydration_batch_size 1 rw";

    fn working(line: &str) -> WorkingClone {
        match line.parse().unwrap() {
            CloneStatus::Working(clone) => clone,
            CloneStatus::Failed => panic!("{line}"),
        }
    }

    #[test]
    fn tables_read_back() {
        let table: CloneTable = CLONE.parse().unwrap();
        assert_eq!(table.to_string(), CLONE);
        assert_eq!((table.region.bytes(), table.sectors), (Bytes::kib(64), 32808));
        assert_eq!(table.source, DeviceNumber { major: 254, minor: 3 });
        let turned = "0 32808 clone 254:2 254:1 254:3 128 2 no_discard_passdown no_hydration";
        assert_eq!(turned.parse(), Ok(table));
        let linear: LinearTable = LINEAR.parse().unwrap();
        assert_eq!((linear.to_string().as_str(), linear.device), (LINEAR, table.destination));
    }

    #[test]
    fn clones_that_behave_otherwise_are_not_ours() {
        for bad in [
            "0 32808 clone 254:2 254:1 254:3 128",
            "0 32808 clone 254:2 254:1 254:3 128 0",
            "0 32808 clone 254:2 254:1 254:3 128 1 no_hydration",
            "0 32808 clone 254:2 254:1 254:3 128 1 no_hydration no_discard_passdown",
            "0 32808 clone 254:2 254:1 254:3 128 2 no_hydration no_hydration",
            "0 32808 clone 254:2 254:1 254:3 128 3 no_hydration no_discard_passdown x",
            "0 32808 clone 254:2 254:1 254:3 127 2 no_hydration no_discard_passdown",
            "0 32808 clone 254:2 254:1 128 2 no_hydration no_discard_passdown",
            "0 32808 clone 254:2 254:1 254:3 128 2 no_hydration no_discard_passdown 2 hydration_threshold 9",
            LINEAR,
            "",
        ] {
            assert!(bad.parse::<CloneTable>().is_err(), "{bad}");
        }
        for bad in
            ["0 8 linear 254:1", "0 8 linear 254:1 8", "8 8 linear 254:1 0", "0 8 linear 254:1 0 0", CLONE]
        {
            assert!(bad.parse::<LinearTable>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_a_clone_says_is_understood() {
        let clone = working(STATUS);
        assert_eq!(clone.progress, Progress { hydrated: 81, total: 257 });
        assert_eq!(clone.metadata, Blocks { used: 6, total: 1024 });
        assert_eq!((clone.region.bytes(), clone.hydrating, clone.writable), (Bytes::kib(64), 0, true));
        let read_only: CloneStatus = STATUS.replace(" rw", " ro").parse().unwrap();
        assert_eq!((read_only.mode(), read_only.progress().unwrap().hydrated), (CloneMode::ReadOnly, 81));
        let failed: CloneStatus = "0 32808 clone Fail".parse().unwrap();
        assert_eq!((failed.mode(), failed.progress()), (CloneMode::Failed, None));
        assert_eq!("0 8 clone Error".parse(), Ok(CloneStatus::Failed));
        // As documented, with no features and no core arguments.
        assert!(working("0 8 clone 8 1/2 8 0/1 1 0 0 rw").writable);
    }

    #[test]
    fn more_regions_than_there_are_are_never_local() {
        for bad in [
            "0 32808 clone 8 6/1024 128 258/257 0 0 0 rw",
            "0 32808 clone 8 6/1024 128 0/0 0 0 0 rw",
            "0 32808 clone 8 6/1024 128 81/257 0 4294967295 rw",
            "0 32808 clone 8 6/1024 128 81/257 0 0 0 rw rw",
            "0 32808 clone 8 6/1024 128 81/257 0 0 0 Fail",
            "0 32808 clone Fail rw",
            "0 32808 clone 4096 6/1024 128 81/257 0 0 0 rw",
        ] {
            assert!(bad.parse::<CloneStatus>().is_err(), "{bad}");
        }
    }

    #[test]
    fn damaged_lines_never_panic_and_are_never_taken_for_others() {
        for line in [CLONE, LINEAR, STATUS] {
            for at in 0..line.len() {
                for damage in ["", " ", "x", "/", "-1", "é", "\0", "99999999999999999999"] {
                    let damaged = format!("{}{damage}{}", &line[..at], &line[at + 1..]);
                    if let Ok(table) = damaged.parse::<CloneTable>() {
                        assert_eq!(table.to_string().parse(), Ok(table), "{damaged}");
                    }
                    if let Ok(table) = damaged.parse::<LinearTable>() {
                        assert_eq!(table.to_string().parse(), Ok(table), "{damaged}");
                    }
                    if let Ok(CloneStatus::Working(clone)) = damaged.parse() {
                        assert!(damaged.contains(&clone.progress.total.to_string()), "{damaged}");
                    }
                }
                let _ = line[..at].parse::<CloneStatus>();
                let _ = line[at..].parse::<CloneTable>();
            }
        }
    }
}
