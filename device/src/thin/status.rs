//! What thin pools and thin devices say about themselves.
//!
//! Source: `Documentation/admin-guide/device-mapper/thin-provisioning.rst` of the kernel, sections *Status*, and
//! `pool_status` in `drivers/md/dm-thin.c` for the order of the words.

use std::str::FromStr;

use berth_core::thin::{BlockSize, METADATA_BLOCK, PoolMode, PoolState, Usage};
use berth_core::units::Bytes;

use super::table::{ParseError, number, start};

/// A number of blocks in use, and of all blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// In use.
    pub used: u64,
    /// In all.
    pub total: u64,
}

impl Blocks {
    fn usage(self, block: Bytes) -> Usage {
        let bytes = |count: u64| Bytes(count.saturating_mul(block.0));
        Usage { used: bytes(self.used), total: bytes(self.total) }
    }
}

/// What becomes of discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discards {
    /// They are refused.
    Ignored,
    /// They free blocks, and go on to the data device.
    PassedDown,
    /// They free blocks.
    Kept,
}

/// What becomes of writes that find no space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// They wait for the pool to grow, 60 s (`no_space_timeout` of the module), and then fail. For pools that can grow.
    Queue,
    /// They fail at once with `ENOSPC`. For pools that have the size they will ever have, where waiting only hides it.
    Error,
}

/// A thin pool's status line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PoolStatus {
    /// It works, perhaps not fully.
    Working(WorkingPool),
    /// The kernel has given it up, or cannot tell.
    Failed,
}

/// The state of a thin pool that answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingPool {
    /// Ours to set: which of our own transactions it has seen.
    pub transaction_id: u64,
    /// Blocks of 4 KiB of metadata.
    pub metadata: Blocks,
    /// Blocks of data.
    pub data: Blocks,
    /// Where the metadata snapshot begins, if there is one.
    pub held_root: Option<u64>,
    /// What it can do. Never [`PoolMode::Failed`].
    pub mode: PoolMode,
    /// What becomes of discards.
    pub discards: Discards,
    /// What becomes of writes that find no space.
    pub when_full: WhenFull,
    /// True if its metadata has to be checked offline before it is written again.
    pub needs_check: bool,
    /// Blocks of metadata below which the kernel sends an event, where it says so.
    pub metadata_low_water: Option<u64>,
}

impl PoolStatus {
    /// As decisions see it.
    pub fn state(&self, block: BlockSize) -> PoolState {
        match self {
            Self::Working(pool) => PoolState {
                mode: pool.mode,
                needs_check: pool.needs_check,
                data: pool.data.usage(block.bytes()),
                metadata: pool.metadata.usage(METADATA_BLOCK),
            },
            Self::Failed => PoolState {
                mode: PoolMode::Failed,
                needs_check: true,
                data: Usage::default(),
                metadata: Usage::default(),
            },
        }
    }
}

impl FromStr for PoolStatus {
    type Err = ParseError;
    fn from_str(line: &str) -> Result<Self, ParseError> {
        parse_pool(line).ok_or_else(|| ParseError::new("thin-pool status", line))
    }
}

fn parse_pool(line: &str) -> Option<PoolStatus> {
    let mut words = line.split_ascii_whitespace();
    start(&mut words, "thin-pool")?;
    let first = words.next()?;
    if is_failure(first) {
        return words.next().is_none().then_some(PoolStatus::Failed);
    }
    let transaction_id = number(first)?;
    let (metadata, data) = (blocks(words.next()?)?, blocks(words.next()?)?);
    let held_root = match words.next()? {
        "-" => None,
        root => Some(number(root)?),
    };
    let mode = match words.next()? {
        "rw" => PoolMode::ReadWrite,
        "ro" => PoolMode::ReadOnly,
        "out_of_data_space" => PoolMode::OutOfDataSpace,
        _ => return None,
    };
    let discards = match words.next()? {
        "ignore_discard" => Discards::Ignored,
        "discard_passdown" => Discards::PassedDown,
        "no_discard_passdown" => Discards::Kept,
        _ => return None,
    };
    let when_full = match words.next()? {
        "error_if_no_space" => WhenFull::Error,
        "queue_if_no_space" => WhenFull::Queue,
        _ => return None,
    };
    let needs_check = match words.next() {
        Some("needs_check") => true,
        Some("-") | None => false,
        _ => return None,
    };
    let metadata_low_water = words.next().map_or(Some(None), |word| number(word).map(Some))?;
    words.next().is_none().then_some(PoolStatus::Working(WorkingPool {
        transaction_id,
        metadata,
        data,
        held_root,
        mode,
        discards,
        when_full,
        needs_check,
        metadata_low_water,
    }))
}

/// A thin device's status line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThinStatus {
    /// It works.
    Working {
        /// Sectors of 512 bytes that it has blocks for.
        mapped_sectors: u64,
        /// The last of them.
        highest: Option<u64>,
    },
    /// Its pool has failed.
    Failed,
}

impl FromStr for ThinStatus {
    type Err = ParseError;
    fn from_str(line: &str) -> Result<Self, ParseError> {
        parse_thin(line).ok_or_else(|| ParseError::new("thin status", line))
    }
}

fn parse_thin(line: &str) -> Option<ThinStatus> {
    let mut words = line.split_ascii_whitespace();
    start(&mut words, "thin")?;
    let first = words.next()?;
    let status = if is_failure(first) {
        ThinStatus::Failed
    } else {
        let highest = match words.next()? {
            "-" => None,
            sector => Some(number(sector)?),
        };
        ThinStatus::Working { mapped_sectors: number(first)?, highest }
    };
    words.next().is_none().then_some(status)
}

/// `Fail`: given up. `Error`: the kernel could not even ask.
fn is_failure(word: &str) -> bool {
    matches!(word, "Fail" | "Error")
}

fn blocks(word: &str) -> Option<Blocks> {
    let (used, total) = word.split_once('/')?;
    Some(Blocks { used: number(used)?, total: number(total)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux 6.1 prints them; the second and third with each word of the documentation.
    const POOLS: &[&str] = &[
        "0 409600 thin-pool 0 111/1024 0/3200 - rw no_discard_passdown queue_if_no_space - 256 ",
        "0 409600 thin-pool 18446744073709551615 114/1024 3/3200 29 out_of_data_space discard_passdown error_if_no_space needs_check 256",
        "0 409600 thin-pool 7 1/2 3/4 - ro ignore_discard queue_if_no_space -",
        "0 409600 thin-pool Fail",
        "0 409600 thin-pool Error",
    ];

    fn working(line: &str) -> WorkingPool {
        match line.parse().unwrap() {
            PoolStatus::Working(pool) => pool,
            PoolStatus::Failed => panic!("{line}"),
        }
    }

    #[test]
    fn pools_are_understood() {
        let fresh = working(POOLS[0]);
        assert_eq!((fresh.transaction_id, fresh.held_root, fresh.needs_check), (0, None, false));
        assert_eq!(
            (fresh.metadata, fresh.data),
            (Blocks { used: 111, total: 1024 }, Blocks { used: 0, total: 3200 })
        );
        assert_eq!((fresh.mode, fresh.when_full), (PoolMode::ReadWrite, WhenFull::Queue));
        let full = working(POOLS[1]);
        assert_eq!((full.transaction_id, full.held_root, full.needs_check), (u64::MAX, Some(29), true));
        assert_eq!((full.mode, full.when_full), (PoolMode::OutOfDataSpace, WhenFull::Error));
        let old = working(POOLS[2]);
        assert_eq!(
            (old.mode, old.discards, old.metadata_low_water),
            (PoolMode::ReadOnly, Discards::Ignored, None)
        );
        assert_eq!((POOLS[3].parse(), POOLS[4].parse()), (Ok(PoolStatus::Failed), Ok(PoolStatus::Failed)));
    }

    #[test]
    fn blocks_become_bytes() {
        let state = POOLS[1].parse::<PoolStatus>().unwrap().state(BlockSize::DEFAULT);
        assert_eq!(state.data, Usage { used: Bytes::kib(192), total: Bytes::mib(200) });
        assert_eq!(state.metadata, Usage { used: Bytes::kib(456), total: Bytes::mib(4) });
        assert_eq!(PoolStatus::Failed.state(BlockSize::DEFAULT).mode, PoolMode::Failed);
    }

    #[test]
    fn thin_devices_are_understood() {
        let parse = |line: &str| line.parse::<ThinStatus>().ok();
        assert_eq!(
            parse("0 204800 thin 0 -"),
            Some(ThinStatus::Working { mapped_sectors: 0, highest: None })
        );
        assert_eq!(
            parse("0 204800 thin 384 383"),
            Some(ThinStatus::Working { mapped_sectors: 384, highest: Some(383) })
        );
        assert_eq!(parse("0 204800 thin Fail"), Some(ThinStatus::Failed));
        for bad in ["", "0 8 thin", "0 8 thin 1", "0 8 thin 1 2 3", "0 8 thin Fail 1", "0 8 thin-pool 1 2"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn damaged_lines_never_panic_and_are_never_taken_for_a_working_pool_of_other_numbers() {
        for line in POOLS {
            for at in 0..line.len() {
                let _ = line[..at].parse::<PoolStatus>();
                let _ = line[at..].parse::<ThinStatus>();
                for damage in ["", " ", "x", "/", "-1", "é", "\0", "99999999999999999999"] {
                    let damaged = format!("{}{damage}{}", &line[..at], &line[at + 1..]);
                    if let Ok(PoolStatus::Working(pool)) = damaged.parse() {
                        let block = BlockSize::DEFAULT;
                        let state = PoolStatus::Working(pool.clone()).state(block);
                        assert!(state.mode != PoolMode::Failed, "{damaged}");
                        let says = |count: u64| damaged.contains(&count.to_string());
                        assert!(says(pool.data.used) && says(pool.metadata.total), "{damaged}");
                    }
                }
            }
        }
    }
}
