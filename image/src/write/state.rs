//! The bytes of a state: a version, and a zstd frame with a checksum around numbers of variable length.

use berth_core::units::Bytes;

use super::length;
use super::output::{Compression, Output, OutputFormat, WriteError};

/// Also changes with every change of what is written, of lengths of heads and of parts: a state of one way of writing must
/// not be resumed by another.
const VERSION: u8 = 1;
/// What a state has in it at most. The largest are those of a qcow2 of 50,000 GiB, which has
/// 100,000 tables, and of a vmdk of 2000 GiB, which has 64,000: below 10 bytes each.
const LIMIT: usize = 2 << 20;

/// Writes a state.
pub(super) struct Save(Vec<u8>);

/// Reads a state. Every answer is checked against a limit of whoever asks.
pub(super) struct Load<'a>(&'a [u8]);

impl Save {
    pub fn new() -> Self {
        Self(Vec::new())
    }

    /// Seven bits a byte, the lowest first, the highest bit set in all but the last.
    pub fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push((value & 0x7F) as u8 | 0x80);
            value >>= 7;
        }
        self.0.push((value & 0x7F) as u8);
    }

    /// Offsets, multiples of `unit`, as differences: ascending, with zeros for what is not there.
    pub fn offsets(&mut self, offsets: &[u64], unit: u64) {
        let mut last = 0;
        for offset in offsets {
            let at = offset / unit;
            self.number(if at == 0 { 0 } else { at - last });
            last = last.max(at);
        }
    }

    /// As they are.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub fn output(&mut self, output: &Output) {
        let format = match output.format {
            OutputFormat::Raw => 0,
            OutputFormat::Qcow2 { compression: Compression::None } => 1,
            OutputFormat::Qcow2 { compression: Compression::Zlib } => 2,
            OutputFormat::Qcow2 { compression: Compression::Zstd } => 3,
            OutputFormat::Vmdk => 4,
            OutputFormat::Vhd => 5,
        };
        self.number(format);
        self.number(output.virtual_size.0);
        self.number(output.level.map_or(0, |level| u64::from(level) + 1));
        self.bytes(&output.id);
    }

    pub fn seal(self) -> Vec<u8> {
        let mut state = vec![VERSION];
        state.extend(
            compress(&self.0).expect("zstd fails at a known level only without memory, as any Vec does"),
        );
        state
    }
}

fn compress(content: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut compressor = zstd::bulk::Compressor::new(zstd::DEFAULT_COMPRESSION_LEVEL)?;
    compressor.include_checksum(true)?;
    compressor.compress(content)
}

/// Takes a state out of its frame, for [`Load::new`].
pub(super) fn open(state: &[u8]) -> Result<Vec<u8>, WriteError> {
    match state.split_first() {
        Some((&VERSION, frame)) => {
            zstd::bulk::decompress(frame, LIMIT).map_err(|_| WriteError::State { what: "it is damaged" })
        }
        Some((&found, _)) => Err(WriteError::StateVersion { found }),
        None => Err(WriteError::State { what: "it is empty" }),
    }
}

impl<'a> Load<'a> {
    pub fn new(content: &'a [u8]) -> Self {
        Self(content)
    }

    /// A number up to `limit`, which is included.
    pub fn number(&mut self, limit: u64) -> Result<u64, WriteError> {
        let mut value = 0_u64;
        for shift in (0..70).step_by(7) {
            let Some((&byte, rest)) = self.0.split_first() else { break };
            self.0 = rest;
            let bits = u64::from(byte & 0x7F);
            if (bits << shift.min(63)) >> shift.min(63) != bits || shift > 63 {
                break;
            }
            value |= bits << shift;
            if byte < 0x80 {
                return if value <= limit {
                    Ok(value)
                } else {
                    Err(WriteError::State { what: "number out of range" })
                };
            }
        }
        Err(WriteError::State { what: "number without an end" })
    }

    /// What [`Save::offsets`] wrote: `count` offsets from `from` on and below `below`.
    pub fn offsets(&mut self, count: u64, from: u64, below: u64, unit: u64) -> Result<Vec<u64>, WriteError> {
        let (mut offsets, mut last) = (Vec::new(), 0);
        for _ in 0..count {
            let gap = self.number(below / unit)?;
            let at = if gap == 0 { 0 } else { last + gap };
            if at != 0 && !(from..below).contains(&(at * unit)) {
                return Err(WriteError::State { what: "offset out of range" });
            }
            last = last.max(at);
            offsets.push(at * unit);
        }
        Ok(offsets)
    }

    pub fn output(&mut self) -> Result<Output, WriteError> {
        let format = match self.number(u64::MAX)? {
            0 => OutputFormat::Raw,
            1 => OutputFormat::Qcow2 { compression: Compression::None },
            2 => OutputFormat::Qcow2 { compression: Compression::Zlib },
            3 => OutputFormat::Qcow2 { compression: Compression::Zstd },
            4 => OutputFormat::Vmdk,
            5 => OutputFormat::Vhd,
            _ => return Err(WriteError::State { what: "unknown format" }),
        };
        let virtual_size = Bytes(self.number(u64::MAX)?);
        let level =
            self.number(u64::from(u8::MAX))?.checked_sub(1).and_then(|level| u8::try_from(level).ok());
        let mut id = [0; 16];
        id.copy_from_slice(self.bytes(16)?);
        Ok(Output { format, virtual_size, level, id })
    }

    /// A part of the state as it is.
    pub fn bytes(&mut self, len: u64) -> Result<&'a [u8], WriteError> {
        let what = "it ends too early";
        let (bytes, rest) = self.0.split_at_checked(length(len)).ok_or(WriteError::State { what })?;
        self.0 = rest;
        Ok(bytes)
    }

    /// Nothing may be left.
    pub fn end(self) -> Result<(), WriteError> {
        if self.0.is_empty() { Ok(()) } else { Err(WriteError::State { what: "it goes on" }) }
    }
}
