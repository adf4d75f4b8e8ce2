//! What a thin device has blocks for, and where two of them differ.
//!
//! `thin_dump` and `thin_delta` read the metadata of a live pool from a metadata snapshot, of which the kernel keeps one at
//! a time: whoever reads one claims it. Their answers are read line by line and never held: a device of 1 TiB may have 16
//! million mappings.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::time::Duration;

use berth_core::thin::BlockSize;
use berth_core::units::Bytes;
use thiserror::Error;

use super::claim::Claim;
use super::dmsetup::{self, ENVIRONMENT};
use super::kernel_pool::{KernelPool, node_of};
use super::names::DeviceName;
use super::pool_error::KernelPoolError;
use super::table::{ParseError, ThinId, number};
use crate::partition::Extent;
use crate::program::{self, RunError};

/// Reading all metadata there can be takes minutes.
const LIMIT: Duration = Duration::from_secs(1800);

/// Why mappings could not be read.
#[derive(Debug, Error)]
pub enum MappingError {
    /// The tool failed.
    #[error("failed to read the mappings of {pool}")]
    Run {
        /// The pool.
        pool: DeviceName,
        /// Why.
        source: RunError,
    },
    /// The tool said something that is not understood.
    #[error("failed to understand the mappings of {pool}")]
    Answer {
        /// The pool.
        pool: DeviceName,
        /// What it was.
        source: ParseError,
    },
    /// The tool's answer breaks off.
    #[error("the mappings of {pool} break off")]
    Incomplete {
        /// The pool.
        pool: DeviceName,
    },
    /// There is no such thin device in the snapshot.
    #[error("the metadata snapshot of {pool} has no thin device {id}")]
    NoSuchId {
        /// The pool.
        pool: DeviceName,
        /// The number.
        id: ThinId,
    },
}

/// A thin device as its pool keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptThin {
    /// Its number.
    pub id: ThinId,
    /// What it has blocks for.
    pub mapped: Bytes,
}

/// How a range differs from one thin device to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// Both have the same blocks.
    Same,
    /// Both have blocks, and not the same.
    Changed,
    /// Only the second one has blocks.
    Added,
    /// Only the first one has blocks: in the second one this is back to the origin, or zeros.
    Removed,
}

/// A pool's metadata as it was at one moment. Released when dropped.
#[derive(Debug)]
#[must_use = "dropped, it is released"]
pub struct MetadataSnapshot<'a> {
    pool: &'a KernelPool,
    metadata: PathBuf,
    released: bool,
    _claim: Claim,
}

impl KernelPool {
    /// Keeps the metadata as it is now, for reading. Waits up to `patience` for another one of this process; one of a
    /// process that is gone is released.
    ///
    /// # Errors
    /// [`KernelPoolError::SnapshotHeld`] while there is another one.
    pub fn metadata_snapshot(&self, patience: Duration) -> Result<MetadataSnapshot<'_>, KernelPoolError> {
        let held = || KernelPoolError::SnapshotHeld { pool: self.name.clone() };
        let claim = Claim::take_metadata(&self.name, patience).ok_or_else(held)?;
        self.release_left_behind()?;
        let metadata = node_of(self.table()?.metadata)?;
        match dmsetup::message(&self.uuid, "reserve_metadata_snap") {
            Err(error) if error.says("Device or resource busy") => Err(held()),
            done => {
                done?;
                Ok(MetadataSnapshot { pool: self, metadata, released: false, _claim: claim })
            }
        }
    }

    /// Releases a metadata snapshot that a process which is gone has left behind. None is no error, and one that this
    /// process reads stays. For the start: one that is held keeps blocks from being used again.
    pub fn release_stale_snapshot(&self) -> Result<(), KernelPoolError> {
        match Claim::take_metadata(&self.name, Duration::ZERO) {
            Some(_claim) => self.release_left_behind(),
            None => Ok(()),
        }
    }

    /// Under the claim: nobody reads it then.
    fn release_left_behind(&self) -> Result<(), KernelPoolError> {
        if self.require_writable()?.held_root.is_none() {
            return Ok(());
        }
        tracing::warn!(pool = %self.name, "a metadata snapshot was left behind, and is released");
        Ok(dmsetup::message(&self.uuid, "release_metadata_snap")?)
    }
}

impl MetadataSnapshot<'_> {
    /// Gives every range that the device has blocks for to `each`, ascending and disjoint. Unit: bytes, multiples of the
    /// pool's block size; the last one may reach beyond the device's end.
    pub fn mapped(&self, id: ThinId, mut each: impl FnMut(Extent)) -> Result<(), MappingError> {
        let id_text = id.to_string();
        let mut found = false;
        self.read(
            "thin_dump",
            &["-m", "--dev-id", &id_text],
            |line| {
                found |= line.starts_with("<device ");
                mapping(line, self.pool.block)
            },
            &mut each,
        )?;
        if found { Ok(()) } else { Err(MappingError::NoSuchId { pool: self.pool.name.clone(), id }) }
    }

    /// Every thin device of the pool, active or not.
    pub fn devices(&self) -> Result<Vec<KeptThin>, MappingError> {
        let mut found = Vec::new();
        self.read(
            "thin_dump",
            &["-m", "--skip-mappings"],
            |line| kept(line, self.pool.block),
            &mut |thin| {
                found.push(thin);
            },
        )?;
        Ok(found)
    }

    /// Gives every range for which `from` or `to` has blocks to `each`, ascending and disjoint, in the same unit, with how
    /// `to` differs there.
    pub fn changed(
        &self,
        from: ThinId,
        to: ThinId,
        mut each: impl FnMut((Extent, Difference)),
    ) -> Result<(), MappingError> {
        let (from, to) = (from.to_string(), to.to_string());
        let arguments = ["-m", "--snap1", &from, "--snap2", &to];
        self.read("thin_delta", &arguments, |line| difference(line, self.pool.block), &mut each)
    }

    /// Releases it.
    pub fn release(mut self) -> Result<(), KernelPoolError> {
        self.released = true;
        Ok(dmsetup::message(&self.pool.uuid, "release_metadata_snap")?)
    }

    fn read<T>(
        &self,
        tool: &str,
        arguments: &[&str],
        mut parse: impl FnMut(&str) -> Result<Option<T>, ParseError>,
        each: &mut impl FnMut(T),
    ) -> Result<(), MappingError> {
        let pool = || self.pool.name.clone();
        let mut words: Vec<_> = arguments.iter().map(OsStr::new).collect();
        words.push(self.metadata.as_os_str());
        let (mut bad, mut complete) = (None, false);
        let done = program::run_lines(tool, &words, ENVIRONMENT, LIMIT, |line| {
            let line = line.trim();
            complete |= line == "</superblock>";
            if bad.is_none() {
                match parse(line) {
                    Ok(found) => found.into_iter().for_each(&mut *each),
                    Err(error) => bad = Some(error),
                }
            }
        });
        done.map_err(|source| MappingError::Run { pool: pool(), source })?;
        match bad {
            Some(source) => Err(MappingError::Answer { pool: pool(), source }),
            None if !complete => Err(MappingError::Incomplete { pool: pool() }),
            None => Ok(()),
        }
    }
}

impl Drop for MetadataSnapshot<'_> {
    fn drop(&mut self) {
        if !self.released
            && let Err(error) = dmsetup::message(&self.pool.uuid, "release_metadata_snap")
        {
            tracing::warn!(pool = %self.pool.name, %error, "a metadata snapshot is left behind");
        }
    }
}

/// A line of `thin_dump`; `None` if it is not about a mapping.
fn mapping(line: &str, block: BlockSize) -> Result<Option<Extent>, ParseError> {
    let found = if line.starts_with("<range_mapping ") {
        extent(line, "origin_begin", Some("length"), block)
    } else if line.starts_with("<single_mapping ") {
        extent(line, "origin_block", None, block)
    } else {
        return Ok(None);
    };
    found.map(Some).ok_or_else(|| ParseError::new("mapping", line))
}

/// A line of `thin_dump` about a device; `None` if it is about something else.
fn kept(line: &str, block: BlockSize) -> Result<Option<KeptThin>, ParseError> {
    if !line.starts_with("<device ") {
        return Ok(None);
    }
    let parse = || {
        let id = ThinId::new(u32::try_from(attribute(line, "dev_id")?).ok()?)?;
        let blocks = attribute(line, "mapped_blocks")?;
        Some(KeptThin { id, mapped: Bytes(blocks.checked_mul(block.bytes().0)?) })
    };
    parse().map(Some).ok_or_else(|| ParseError::new("thin device", line))
}

/// A line of `thin_delta`; `None` if it says nothing of a range.
fn difference(line: &str, block: BlockSize) -> Result<Option<(Extent, Difference)>, ParseError> {
    let difference = match line.split_ascii_whitespace().next() {
        Some("<same") => Difference::Same,
        Some("<different") => Difference::Changed,
        Some("<right_only") => Difference::Added,
        Some("<left_only") => Difference::Removed,
        _ => return Ok(None),
    };
    let extent = extent(line, "begin", Some("length"), block);
    extent.map(|extent| Some((extent, difference))).ok_or_else(|| ParseError::new("difference", line))
}

fn extent(line: &str, begin: &str, length: Option<&str>, block: BlockSize) -> Option<Extent> {
    let bytes = |blocks: u64| blocks.checked_mul(block.bytes().0).map(Bytes);
    let length = length.map_or(Some(1), |name| attribute(line, name))?;
    let (offset, length) = (bytes(attribute(line, begin)?)?, bytes(length)?);
    offset.checked_add(length)?;
    Some(Extent { offset, length })
}

/// The number in `name="number"`.
fn attribute(line: &str, name: &str) -> Option<u64> {
    line.split_ascii_whitespace().find_map(|word| {
        let value =
            word.trim_end_matches("/>").trim_end_matches('>').strip_prefix(name)?.strip_prefix("=\"")?;
        number(value.strip_suffix('"')?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(first: u64, count: u64) -> Extent {
        Extent { offset: Bytes::kib(64 * first), length: Bytes::kib(64 * count) }
    }

    #[test]
    fn dumps_are_understood() {
        let parse = |line| mapping(line, BlockSize::DEFAULT);
        let range = r#"<range_mapping origin_begin="7" data_begin="0" length="3" time="1"/>"#;
        assert_eq!(parse(range), Ok(Some(blocks(7, 3))));
        assert_eq!(
            parse(r#"<single_mapping origin_block="9" data_block="1" time="0"/>"#),
            Ok(Some(blocks(9, 1)))
        );
        assert_eq!(parse(r#"<device dev_id="0" mapped_blocks="3" transaction="0">"#), Ok(None));
        assert_eq!(parse("</superblock>"), Ok(None));
        for bad in [
            r#"<range_mapping origin_begin="7" data_begin="0"/>"#,
            r#"<range_mapping origin_begin="-7" length="1"/>"#,
            r#"<range_mapping origin_begin="18446744073709551615" length="1"/>"#,
            "<single_mapping >",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn devices_are_understood() {
        let parse = |line| kept(line, BlockSize::DEFAULT);
        let line = r#"<device dev_id="7" mapped_blocks="3" transaction="0" creation_time="0" snap_time="1">"#;
        let thin = KeptThin { id: ThinId::new(7).unwrap(), mapped: Bytes::kib(192) };
        assert_eq!(parse(line), Ok(Some(thin)));
        assert_eq!(parse(r#"<superblock uuid="" time="1" transaction="6">"#), Ok(None));
        for bad in [r#"<device dev_id="16777216" mapped_blocks="3">"#, r#"<device dev_id="7">"#] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn deltas_are_understood() {
        let parse = |line| difference(line, BlockSize::DEFAULT);
        assert_eq!(
            parse(r#"<right_only begin="0" length="3"/>"#),
            Ok(Some((blocks(0, 3), Difference::Added)))
        );
        assert_eq!(
            parse(r#"<left_only begin="1" length="1"/>"#),
            Ok(Some((blocks(1, 1), Difference::Removed)))
        );
        assert_eq!(
            parse(r#"<different begin="5" length="2"/>"#),
            Ok(Some((blocks(5, 2), Difference::Changed)))
        );
        assert_eq!(parse(r#"<same begin="5" length="2"/>"#), Ok(Some((blocks(5, 2), Difference::Same))));
        assert_eq!(parse(r#"<diff left="1" right="0">"#), Ok(None));
        assert!(parse("<different begin=5 length=2/>").is_err());
    }
}
