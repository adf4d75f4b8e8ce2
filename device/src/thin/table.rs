//! The tables of thin pools and thin devices, as `dmsetup` reads and prints them.
//!
//! Source: `Documentation/admin-guide/device-mapper/thin-provisioning.rst` of the kernel, sections *Constructor*.

use std::fmt;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A line that device mapper would not print.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{line}` is not a {what}")]
pub struct ParseError {
    /// What was expected.
    pub what: &'static str,
    /// What was found.
    pub line: String,
}

impl ParseError {
    pub(super) fn new(what: &'static str, line: &str) -> Self {
        Self { what, line: line.to_owned() }
    }
}

/// Major and minor number of a block device, as in tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceNumber {
    /// The driver's.
    pub major: u64,
    /// The device's.
    pub minor: u64,
}

impl DeviceNumber {
    /// That of the block device at `path`.
    pub fn of(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::metadata(path)?;
        if !metadata.file_type().is_block_device() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a block device"));
        }
        let number = metadata.rdev();
        Ok(Self { major: nix::sys::stat::major(number), minor: nix::sys::stat::minor(number) })
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for DeviceNumber {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let parse = || {
            let (major, minor) = text.split_once(':')?;
            Some(Self { major: number(major)?, minor: number(minor)? })
        };
        parse().ok_or_else(|| ParseError::new("device number", text))
    }
}

/// A number without sign, blanks or anything else around it.
pub(super) fn number<N: FromStr>(text: &str) -> Option<N> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

/// The optional arguments of a thin pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)] // each is a word of the kernel's own table
pub struct PoolFeatures {
    /// New blocks are not zeroed first.
    pub skip_block_zeroing: bool,
    /// Discards are refused.
    pub ignore_discard: bool,
    /// Discards free blocks and go no further down.
    pub no_discard_passdown: bool,
    /// Nothing changes the metadata.
    pub read_only: bool,
    /// Writes that find no space fail at once.
    pub error_if_no_space: bool,
}

impl PoolFeatures {
    fn words(self) -> impl Iterator<Item = &'static str> {
        [
            (self.skip_block_zeroing, "skip_block_zeroing"),
            (self.ignore_discard, "ignore_discard"),
            (self.no_discard_passdown, "no_discard_passdown"),
            (self.read_only, "read_only"),
            (self.error_if_no_space, "error_if_no_space"),
        ]
        .into_iter()
        .filter_map(|(is_set, word)| is_set.then_some(word))
    }

    fn set(&mut self, word: &str) -> Option<()> {
        let feature = match word {
            "skip_block_zeroing" => &mut self.skip_block_zeroing,
            "ignore_discard" => &mut self.ignore_discard,
            "no_discard_passdown" => &mut self.no_discard_passdown,
            "read_only" => &mut self.read_only,
            "error_if_no_space" => &mut self.error_if_no_space,
            _ => return None,
        };
        *feature = true;
        Some(())
    }
}

/// `0 <sectors> thin-pool <metadata> <data> <block sectors> <low water blocks> <features>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolTable {
    /// Its size, in sectors of 512 bytes.
    pub sectors: u64,
    /// The metadata device.
    pub metadata: DeviceNumber,
    /// The data device.
    pub data: DeviceNumber,
    /// The block size, in sectors.
    pub block_sectors: u64,
    /// An event is sent when fewer blocks than this are free.
    pub low_water_blocks: u64,
    /// The optional arguments.
    pub features: PoolFeatures,
}

impl fmt::Display for PoolTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sectors, metadata, data, block_sectors, low_water_blocks, features } = self;
        write!(f, "0 {sectors} thin-pool {metadata} {data} {block_sectors} {low_water_blocks}")?;
        write!(f, " {}", features.words().count())?;
        features.words().try_for_each(|word| write!(f, " {word}"))
    }
}

impl FromStr for PoolTable {
    type Err = ParseError;
    fn from_str(line: &str) -> Result<Self, ParseError> {
        parse_pool(line).ok_or_else(|| ParseError::new("thin-pool table", line))
    }
}

fn parse_pool(line: &str) -> Option<PoolTable> {
    let mut words = line.split_ascii_whitespace();
    let sectors = start(&mut words, "thin-pool")?;
    let (metadata, data) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let (block_sectors, low_water_blocks) = (number(words.next()?)?, number(words.next()?)?);
    let count: usize = words.next().map_or(Some(0), number)?;
    let mut features = PoolFeatures::default();
    let words: Vec<_> = words.collect();
    words.iter().try_for_each(|word| features.set(word))?;
    (words.len() == count).then_some(PoolTable {
        sectors,
        metadata,
        data,
        block_sectors,
        low_water_blocks,
        features,
    })
}

/// `0 <sectors> thin <pool> <id> [<external origin>]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThinTable {
    /// Its size, in sectors of 512 bytes.
    pub sectors: u64,
    /// The pool.
    pub pool: DeviceNumber,
    /// Its number in the pool.
    pub id: ThinId,
    /// What blocks that it does not have are read from; zeros if absent.
    pub origin: Option<DeviceNumber>,
}

impl fmt::Display for ThinTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sectors, pool, id, origin } = self;
        write!(f, "0 {sectors} thin {pool} {id}")?;
        origin.iter().try_for_each(|origin| write!(f, " {origin}"))
    }
}

impl FromStr for ThinTable {
    type Err = ParseError;
    fn from_str(line: &str) -> Result<Self, ParseError> {
        parse_thin(line).ok_or_else(|| ParseError::new("thin table", line))
    }
}

fn parse_thin(line: &str) -> Option<ThinTable> {
    let mut words = line.split_ascii_whitespace();
    let sectors = start(&mut words, "thin")?;
    let pool = words.next()?.parse().ok()?;
    let id = ThinId::new(number(words.next()?)?)?;
    let origin = words.next().map(str::parse).transpose().ok()?;
    words.next().is_none().then_some(ThinTable { sectors, pool, id, origin })
}

/// The beginning of every line of ours: `0 <sectors> <target>`. Berth's devices have one target each.
pub(super) fn start<'a>(words: &mut impl Iterator<Item = &'a str>, target: &str) -> Option<u64> {
    let begins_at_zero = words.next()? == "0";
    let sectors = number(words.next()?)?;
    (begins_at_zero && words.next()? == target).then_some(sectors)
}

/// The number of a thin device in its kernel pool: 24 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct ThinId(u32);

impl ThinId {
    /// `None` if it has more than 24 bits.
    pub const fn new(id: u32) -> Option<Self> {
        if id < 1 << 24 { Some(Self(id)) } else { None }
    }

    /// As a number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl From<ThinId> for u32 {
    fn from(id: ThinId) -> Self {
        id.0
    }
}

impl TryFrom<u32> for ThinId {
    type Error = ParseError;
    fn try_from(id: u32) -> Result<Self, ParseError> {
        Self::new(id).ok_or_else(|| ParseError::new("number of a thin device", &id.to_string()))
    }
}

impl fmt::Display for ThinId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux 6.1 prints them, and as the kernel's documentation writes them with numbers for paths.
    const POOLS: &[&str] = &[
        "0 409600 thin-pool 254:1 254:0 128 0 1 skip_block_zeroing ",
        "0 20971520 thin-pool 8:1 8:2 2097152 32768 0 ",
        "0 20971520 thin-pool 8:1 8:2 128 32768",
        "0 8 thin-pool 8:1 8:2 128 1 5 skip_block_zeroing ignore_discard no_discard_passdown read_only error_if_no_space",
    ];
    const THINS: &[&str] = &["0 204800 thin 254:2 0", "0 2097152 thin 254:2 16777215 43:0"];

    #[test]
    fn tables_read_back() {
        for line in POOLS {
            let table: PoolTable = line.parse().unwrap();
            assert_eq!(table.to_string().parse(), Ok(table), "{line}");
            assert!(line.split_whitespace().all(|word| table.to_string().contains(word)), "{line}");
        }
        for line in THINS {
            let table: ThinTable = line.parse().unwrap();
            assert_eq!(table.to_string(), *line);
        }
        let all: PoolTable = POOLS[3].parse().unwrap();
        assert!(all.features.error_if_no_space && all.features.read_only && all.low_water_blocks == 1);
    }

    #[test]
    fn what_device_mapper_would_not_print_is_refused() {
        for bad in [
            "",
            "0 8 thin-pool",
            "8 8 thin-pool 8:1 8:2 128 1 0",
            "0 8 thin-pool 8:1 8:2 128 1 2 read_only",
            "0 8 thin-pool 8:1 8:2 128 1 1 other",
            "0 8 thin-pool /dev/a 8:2 128 1 0",
            "0 8 thin-pool 8:1 8:2 128 -1 0",
            "0 99999999999999999999 thin-pool 8:1 8:2 128 1 0",
            "0 8 linear 8:1 0",
        ] {
            assert!(bad.parse::<PoolTable>().is_err(), "{bad}");
        }
        for bad in [
            "0 8 thin 8:1",
            "0 8 thin 8:1 16777216",
            "0 8 thin 8:1 1 8:2 x",
            "0 8 thin 8:1 +1",
            "0 8 thin 8: 1",
        ] {
            assert!(bad.parse::<ThinTable>().is_err(), "{bad}");
        }
    }

    #[test]
    fn damaged_lines_never_panic_and_never_grow() {
        for line in POOLS.iter().chain(THINS) {
            for at in 0..line.len() {
                for damage in ["", " ", "0", "-", ":", "é", "\n", "thin"] {
                    let damaged = format!("{}{damage}{}", &line[..at], &line[at + 1..]);
                    if let Ok(table) = damaged.parse::<PoolTable>() {
                        assert_eq!(table.to_string().parse(), Ok(table));
                    }
                    if let Ok(table) = damaged.parse::<ThinTable>() {
                        assert_eq!(table.to_string().parse(), Ok(table));
                    }
                }
                let _ = line[..at].parse::<PoolTable>();
                let _ = line[at..].parse::<ThinTable>();
            }
        }
    }
}
