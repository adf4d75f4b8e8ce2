//! What the formats have in common: each says, by its tables, where the bytes of the disk are.

use std::ops::Range;

use berth_core::units::Bytes;

use super::qcow2::Qcow2Layout;
use super::tables::Tables;
use super::unpack::Codec;
use super::vhd::VhdLayout;
use super::vhdx::VhdxLayout;
use super::vmdk::VmdkLayout;
use crate::probe::{ImageFormat, SECTOR, Source, Stop};

/// Why an image cannot be read, without its name.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Its structures contradict each other.
    Corrupt(String),
    /// It must have this many bytes, and has not.
    Truncated { expected: u64 },
}

impl Fault {
    pub fn corrupt(what: impl Into<String>) -> Self {
        Self::Corrupt(what.into())
    }
}

/// Bytes of the disk that are all in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Where they are.
    pub place: Place,
    /// How many. Not zero, and not beyond the end of the disk.
    pub len: u64,
}

/// Where bytes of the disk are. What is in the image lies within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Nowhere: they are zeros.
    Zero,
    /// In the image, from this offset on.
    Plain(u64),
    /// In something compressed.
    Packed(Packed),
}

/// A compressed cluster or grain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packed {
    /// Where it begins in the image, and how many bytes are fetched: all it has, but for a grain that tells another length.
    pub at: u64,
    pub len: u64,
    pub codec: Codec,
    /// Where it begins on the disk.
    pub start: u64,
    /// How much it must decompress to at least, and at most.
    pub least: usize,
    pub most: usize,
}

impl Packed {
    pub fn range(&self) -> Range<u64> {
        self.at..self.at + self.len
    }

    pub fn corrupt(&self, what: &str) -> Fault {
        Fault::Corrupt(format!("what is stored at byte {} {what}", self.at))
    }
}

/// A part of a table that must be fetched first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Missing {
    /// A byte of it, within the image.
    pub at: u64,
    /// What it describes mostly follows it.
    pub content_follows: bool,
}

pub(super) enum Answer {
    Run(Run),
    Missing(Missing),
}

impl Answer {
    pub fn missing(at: u64) -> Self {
        Self::Missing(Missing { at, content_follows: false })
    }

    pub fn zero(len: u64) -> Self {
        Self::Run(Run { place: Place::Zero, len })
    }
}

/// How an image is laid out.
pub(super) enum Layout {
    Flat(Flat),
    Qcow2(Qcow2Layout),
    Vmdk(VmdkLayout),
    Vhd(VhdLayout),
    Vhdx(VhdxLayout),
}

impl Layout {
    /// Reads the headers of an image that [`crate::probe()`] takes.
    pub fn read(format: ImageFormat, source: &dyn Source) -> Result<Self, Stop> {
        Ok(match format {
            ImageFormat::Raw => Self::Flat(Flat { content: source.size()? }),
            ImageFormat::Qcow2 => Self::Qcow2(Qcow2Layout::read(source)?),
            ImageFormat::Vmdk => Self::Vmdk(VmdkLayout::read(source)?),
            ImageFormat::Vhd => VhdLayout::read(source)?,
            ImageFormat::Vhdx => Self::Vhdx(VhdxLayout::read(source)?),
        })
    }

    /// The size that a machine sees, a multiple of 512.
    pub fn virtual_size(&self) -> Bytes {
        match self {
            Self::Flat(flat) => flat.content.round_up(SECTOR),
            Self::Qcow2(layout) => layout.virtual_size(),
            Self::Vmdk(layout) => layout.virtual_size(),
            Self::Vhd(layout) => layout.virtual_size(),
            Self::Vhdx(layout) => layout.virtual_size(),
        }
    }

    /// Where the byte at `at` of the disk is, which is below the virtual size, and those after it.
    pub fn locate(&self, tables: &mut Tables, at: u64) -> Result<Answer, Fault> {
        match self {
            Self::Flat(flat) => flat.locate(tables, at),
            Self::Qcow2(layout) => layout.locate(tables, at),
            Self::Vmdk(layout) => layout.locate(tables, at),
            Self::Vhd(layout) => layout.locate(tables, at),
            Self::Vhdx(layout) => layout.locate(tables, at),
        }
    }
}

/// The disk as it is: raw, or a fixed VHD.
pub(super) struct Flat {
    /// Its bytes; what is missing to a whole sector is zeros.
    pub content: Bytes,
}

impl Flat {
    fn locate(&self, tables: &Tables, at: u64) -> Result<Answer, Fault> {
        let end = self.content.0;
        if at >= end {
            return Ok(Answer::zero(self.content.round_up(SECTOR).0 - at));
        }
        inside(tables, at, end - at)?;
        Ok(Answer::Run(Run { place: Place::Plain(at), len: end - at }))
    }
}

/// Checks that a range lies within the image.
pub(super) fn inside(tables: &Tables, at: u64, len: u64) -> Result<(), Fault> {
    match at.checked_add(len) {
        Some(end) if end <= tables.length() => Ok(()),
        Some(expected) => Err(Fault::Truncated { expected }),
        None => Err(Fault::corrupt("an offset beyond any file")),
    }
}

/// How many of the units that follow the first one, which is at `first`, lie straight after it, or are zeros like it.
/// `place` says where each is, from number 1 on; `None` ends it.
pub(super) fn following(first: Place, unit: u64, mut place: impl FnMut(u64) -> Option<Place>) -> u64 {
    let mut count = 0;
    loop {
        let number = count + 1;
        let goes_on = match (first, place(number)) {
            (Place::Zero, Some(Place::Zero)) => true,
            (Place::Plain(first), Some(Place::Plain(next))) => first.checked_add(number * unit) == Some(next),
            _ => false,
        };
        if !goes_on {
            return count;
        }
        count = number;
    }
}
