//! Where probing reads from: a sample in memory or a file. Every read is bounded and checked against the size.

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;

use berth_core::units::Bytes;

use super::Refusal;

/// The most that one read of probing may take.
const READ_LIMIT: u64 = 1 << 20;

/// The parts of an image that are at hand before it is.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// The first bytes; [`super::HEAD_SAMPLE`] or the whole image is always enough, but for VHDX.
    pub head: &'a [u8],
    /// The length of the whole image.
    pub size: Bytes,
    /// The last bytes, if at hand; [`super::FOOTER_SAMPLE`] or the whole image is enough.
    pub tail: Option<&'a [u8]>,
}

/// Why probing ended without an answer.
#[derive(Debug)]
pub(crate) enum Stop {
    Refused(Refusal),
    /// The bytes before `end` exist and are not in the sample.
    NotSampled {
        end: Bytes,
    },
    Io(io::Error),
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

pub(crate) trait Source {
    fn size(&self) -> Result<Bytes, Stop>;

    /// Reads a range that lies inside of the image.
    fn fetch(&self, at: Bytes, len: usize) -> Result<Vec<u8>, Stop>;

    /// Exactly `len` bytes from `at`. [`Refusal::Truncated`] if the image has fewer.
    fn exactly(&self, at: Bytes, len: u64) -> Result<Vec<u8>, Stop> {
        let end =
            at.checked_add(Bytes(len)).ok_or_else(|| Refusal::corrupt("an offset is beyond any disk"))?;
        let found = self.size()?;
        if end > found {
            return Err(Refusal::Truncated { expected: end, found }.into());
        }
        match usize::try_from(len) {
            Ok(bytes) if len <= READ_LIMIT => self.fetch(at, bytes),
            _ => Err(Refusal::corrupt("a header structure is larger than 1 MiB").into()),
        }
    }

    /// `len` bytes from `at`, or as many as the image has.
    fn up_to(&self, at: Bytes, len: Bytes) -> Result<Vec<u8>, Stop> {
        let available = self.size()?.saturating_sub(at).min(len);
        if available == Bytes::ZERO { Ok(Vec::new()) } else { self.exactly(at, available.0) }
    }
}

impl Source for Sample<'_> {
    fn size(&self) -> Result<Bytes, Stop> {
        Ok(self.size)
    }

    fn fetch(&self, at: Bytes, len: usize) -> Result<Vec<u8>, Stop> {
        let end = at.saturating_add(Bytes(len as u64));
        let part = |bytes: &[u8], base: u64| {
            let from = usize::try_from(at.0.checked_sub(base)?).ok()?;
            bytes.get(from..from.checked_add(len)?).map(<[u8]>::to_vec)
        };
        let in_tail = || {
            let tail = self.tail?;
            part(tail, self.size.0.checked_sub(tail.len() as u64)?)
        };
        part(self.head, 0).or_else(in_tail).ok_or(Stop::NotSampled { end })
    }
}

impl Source for File {
    /// By seeking, as metadata has no length for block devices.
    fn size(&self) -> Result<Bytes, Stop> {
        let mut file = self;
        file.seek(SeekFrom::End(0)).map(Bytes).map_err(Stop::Io)
    }

    fn fetch(&self, at: Bytes, len: usize) -> Result<Vec<u8>, Stop> {
        let mut bytes = vec![0; len];
        self.read_exact_at(&mut bytes, at.0).map_err(Stop::Io)?;
        Ok(bytes)
    }
}

/// The `N` bytes at `at`, or [`Refusal::Corrupt`] if the structure is too short for them.
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], Refusal> {
    let part = at.checked_add(N).and_then(|end| bytes.get(at..end));
    part.and_then(|part| part.try_into().ok())
        .ok_or_else(|| Refusal::corrupt("a header structure is too short"))
}

pub(crate) fn be_u32(bytes: &[u8], at: usize) -> Result<u32, Refusal> {
    array(bytes, at).map(u32::from_be_bytes)
}

pub(crate) fn be_u64(bytes: &[u8], at: usize) -> Result<u64, Refusal> {
    array(bytes, at).map(u64::from_be_bytes)
}

pub(crate) fn le_u16(bytes: &[u8], at: usize) -> Result<u16, Refusal> {
    array(bytes, at).map(u16::from_le_bytes)
}

pub(crate) fn le_u32(bytes: &[u8], at: usize) -> Result<u32, Refusal> {
    array(bytes, at).map(u32::from_le_bytes)
}

pub(crate) fn le_u64(bytes: &[u8], at: usize) -> Result<u64, Refusal> {
    array(bytes, at).map(u64::from_le_bytes)
}
