//! What is to be written, whether it can be, and into parts of which size.

pub use berth_core::transfer::{Compression, OutputFormat};
use berth_core::units::Bytes;
use thiserror::Error;

use super::{qcow2, vhd, vmdk};
use crate::probe::SECTOR;

/// Parts of an upload must have at least 5 MiB, but for the last one (S3: "Multipart upload limits").
const SMALLEST_PART: Bytes = Bytes::mib(5);
/// And at most 5 GiB (the same).
const LARGEST_PART: Bytes = Bytes::gib(5);
/// Their highest number (the same).
const PARTS: u64 = 10_000;
/// Fewer requests are no faster from here on; an object that cannot become larger goes as a whole.
const USUAL_PART: Bytes = Bytes::mib(16);

/// What is to be written. The same output and the same content give the same bytes, as long as the libraries that compress
/// stay the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Output {
    /// In which format.
    pub format: OutputFormat,
    /// The size of the disk: a multiple of 512, not zero.
    pub virtual_size: Bytes,
    /// How much work is put into compression: 1 to 9 for deflate (6 if none is given), 1 to 19 for zstd (3).
    pub level: Option<u8>,
    /// What tells the image from others: the unique id of a VHD, and its first 4 bytes the content id of a vmdk. The other
    /// formats have no place for it.
    pub id: [u8; 16],
}

/// How an object is divided, known before its content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartPlan {
    /// The length of the head. Zero, or large enough to be part 1, unless the whole object is one part.
    pub head_len: Bytes,
    /// The length of every part of the body but the last: 16 MiB, or more where 10,000 parts would not suffice.
    pub part_size: Bytes,
    /// The most that the object can become.
    pub worst_case: Bytes,
    /// The object is one part, and so may go in one request: it cannot become larger than 16 MiB.
    pub whole: bool,
}

/// Why an image cannot be written, or not go on.
#[derive(Debug, Error)]
pub enum WriteError {
    /// There is nothing to write.
    #[error("an image of no bytes cannot be written")]
    Empty,
    /// Disks are counted in sectors.
    #[error("virtual size of {} bytes is not a multiple of 512", size.0)]
    Unaligned {
        /// What was asked for.
        size: Bytes,
    },
    /// The format, or the object store, cannot hold it.
    #[error("{format} of {size} is too large: {limit}")]
    TooLarge {
        /// Which.
        format: OutputFormat,
        /// The virtual size that was asked for.
        size: Bytes,
        /// The limit, and where it comes from.
        limit: &'static str,
    },
    /// The level is none of the format's.
    #[error("{format} has no compression level {level}")]
    Level {
        /// Which.
        format: OutputFormat,
        /// What was asked for.
        level: u8,
    },
    /// Content must come in blocks and in order.
    #[error("content at byte {} where it goes on at byte {}", found.0, expected.0)]
    OutOfOrder {
        /// Where it goes on.
        expected: Bytes,
        /// What came, or up to where zeros were to go.
        found: Bytes,
    },
    /// A block is not as long as it must be.
    #[error("block at byte {} has {found} bytes instead of {expected}", at.0)]
    BlockLength {
        /// Where it begins.
        at: Bytes,
        /// How long it must be.
        expected: usize,
        /// How long it is.
        found: usize,
    },
    /// The block was encoded for another output.
    #[error("block was encoded for another image")]
    OtherOutput,
    /// The image is not complete yet.
    #[error("image ends at byte {} of {}", position.0, size.0)]
    Incomplete {
        /// Up to where there is content.
        position: Bytes,
        /// The virtual size.
        size: Bytes,
    },
    /// The state is of another version of Berth, which may write differently: begin anew.
    #[error("state of version {found} cannot be resumed")]
    StateVersion {
        /// Which.
        found: u8,
    },
    /// The state is damaged, or was never a state: begin anew.
    #[error("state cannot be resumed: {what}")]
    State {
        /// What is wrong with it.
        what: &'static str,
    },
    /// What was written before the state does not come again: the content has changed, or the compression. Begin anew.
    #[error("content differs from what was uploaded before")]
    Diverged,
}

impl Output {
    /// How the object is divided.
    ///
    /// # Errors
    /// [`WriteError::Empty`], [`WriteError::Unaligned`], [`WriteError::TooLarge`] and [`WriteError::Level`]: everything
    /// that speaks against this output.
    pub fn plan(&self) -> Result<PartPlan, WriteError> {
        self.check()?;
        let (least_head, worst_body) = match self.format {
            OutputFormat::Raw => (Bytes::ZERO, self.virtual_size),
            OutputFormat::Qcow2 { .. } => qcow2::bounds(self.virtual_size),
            OutputFormat::Vmdk => (Bytes::ZERO, vmdk::bound(self.virtual_size)),
            OutputFormat::Vhd => vhd::bounds(self.virtual_size),
        };
        let least = least_head.saturating_add(worst_body);
        let whole = least <= USUAL_PART;
        let head_len =
            if whole || least_head == Bytes::ZERO { least_head } else { least_head.max(SMALLEST_PART) };
        let body_parts = if head_len == Bytes::ZERO { PARTS } else { PARTS - 1 };
        let part_size = Bytes(worst_body.0.div_ceil(body_parts)).round_up(Bytes::mib(1)).max(USUAL_PART);
        if part_size > LARGEST_PART {
            return Err(self.too_large("an object has at most 10000 parts of 5 GiB"));
        }
        Ok(PartPlan { head_len, part_size, worst_case: head_len.saturating_add(worst_body), whole })
    }

    fn check(&self) -> Result<(), WriteError> {
        if self.virtual_size == Bytes::ZERO {
            return Err(WriteError::Empty);
        }
        if !self.virtual_size.0.is_multiple_of(SECTOR.0) {
            return Err(WriteError::Unaligned { size: self.virtual_size });
        }
        let (levels, limit) = match self.format {
            OutputFormat::Raw | OutputFormat::Qcow2 { compression: Compression::None } => (0..=0, None),
            OutputFormat::Qcow2 { compression: Compression::Zlib } => (1..=9, None),
            OutputFormat::Qcow2 { compression: Compression::Zstd } => (1..=19, None),
            OutputFormat::Vmdk => {
                (1..=9, Some((vmdk::LIMIT, "its sectors have 32-bit numbers, enough for 2000 GiB")))
            }
            OutputFormat::Vhd => (0..=0, Some((vhd::LIMIT, "its readers take 2040 GiB at most"))),
        };
        if let Some(level) = self.level.filter(|level| !levels.contains(level)) {
            return Err(WriteError::Level { format: self.format, level });
        }
        match limit.into_iter().chain([STORE_LIMIT]).find(|(size, _)| self.virtual_size > *size) {
            Some((_, limit)) => Err(self.too_large(limit)),
            None => Ok(()),
        }
    }

    fn too_large(&self, limit: &'static str) -> WriteError {
        WriteError::TooLarge { format: self.format, size: self.virtual_size, limit }
    }
}

/// Beyond this no object holds it in any format, and numbers of all formats have room for it.
const STORE_LIMIT: (Bytes, &str) = (Bytes::gib(50_000), "an object has at most 10000 parts of 5 GiB");
