//! Compressed clusters and grains. What they become is bounded before it is made.

use std::ops::Range;

use bytes::Bytes as Buffer;
use flate2::{Decompress, FlushDecompress, Status};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation as _, OutBuffer};

use super::layout::{Fault, Packed};

/// The largest window of a zstd frame, as log2: what level 19 asks for if it does not know how much comes. A frame of a
/// cluster needs no more than the cluster. It bounds what decoding takes.
const ZSTD_WINDOW: u32 = 23;

/// How something is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codec {
    /// A raw deflate stream (RFC 1951), and maybe something after it.
    Deflate,
    /// A zstd frame (RFC 8878), and maybe something after it.
    Zstd,
    /// A grain of vmdk: a marker that tells the length, and a zlib stream (RFC 1950).
    Grain,
}

/// Something to be decompressed, for the bytes from `from` of the disk on, which go into this range of the caller's.
pub(super) struct Job {
    pub packed: Packed,
    pub bytes: Buffer,
    pub from: u64,
    pub into: Range<usize>,
}

/// What was compressed as one: a cluster or a grain.
pub(super) struct Unit {
    /// Where it begins on the disk.
    start: u64,
    bytes: Vec<u8>,
}

impl Unit {
    /// Copies what it has from `at` of the disk on, as far as there is room. `None` if it has nothing there.
    pub fn copy(&self, at: u64, into: &mut [u8]) -> Option<usize> {
        let within = usize::try_from(at.checked_sub(self.start)?).ok()?;
        let found = self.bytes.get(within..).filter(|found| !found.is_empty())?;
        let len = found.len().min(into.len());
        into[..len].copy_from_slice(&found[..len]);
        Some(len)
    }
}

/// Does the jobs. Takes memory for what they give, and up to 8 MiB for a zstd frame.
pub(super) fn unpack(jobs: Vec<Job>) -> Result<Vec<(Unit, u64, Range<usize>)>, Fault> {
    let mut unpacker = Unpacker::default();
    let unpacked = jobs.into_iter().map(|job| {
        let unit = unpacker.unit(&job.packed, &job.bytes)?;
        Ok((unit, job.from, job.into))
    });
    unpacked.collect()
}

/// The decoders, which are made once for many units.
#[derive(Default)]
struct Unpacker {
    deflate: Option<Decompress>,
    zlib: Option<Decompress>,
    zstd: Option<Decoder<'static>>,
}

impl Unpacker {
    fn unit(&mut self, packed: &Packed, bytes: &[u8]) -> Result<Unit, Fault> {
        let mut out = vec![0; packed.most];
        let len = match packed.codec {
            Codec::Deflate => {
                inflate(self.deflate.get_or_insert_with(|| Decompress::new(false)), false, bytes, &mut out)
            }
            Codec::Grain => {
                let stream = packed.stream(bytes);
                inflate(self.zlib.get_or_insert_with(|| Decompress::new(true)), true, stream, &mut out)
            }
            Codec::Zstd => self.frame(bytes, &mut out),
        };
        match len {
            Some(len) if len >= packed.least => {
                out.truncate(len);
                Ok(Unit { start: packed.start, bytes: out })
            }
            Some(len) => Err(packed.corrupt(&format!("decompresses to {len} bytes"))),
            None => Err(packed.corrupt("does not decompress")),
        }
    }

    /// Decompresses a frame; `None` if it is none, or if there is more of it.
    fn frame(&mut self, bytes: &[u8], out: &mut [u8]) -> Option<usize> {
        let decoder = match &mut self.zstd {
            Some(decoder) => decoder,
            none => {
                let mut decoder = Decoder::new().ok()?;
                decoder.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW)).ok()?;
                none.insert(decoder)
            }
        };
        decoder.reinit().ok()?;
        let (mut input, mut output) = (InBuffer::around(bytes), OutBuffer::around(out));
        loop {
            let before = (input.pos(), output.pos());
            if decoder.run(&mut input, &mut output).ok()? == 0 {
                return Some(output.pos());
            }
            if (input.pos(), output.pos()) == before {
                return None;
            }
        }
    }
}

/// Decompresses a stream; `None` if it is none, or if there is more of it.
fn inflate(decoder: &mut Decompress, zlib_header: bool, bytes: &[u8], out: &mut [u8]) -> Option<usize> {
    decoder.reset(zlib_header);
    match decoder.decompress(bytes, out, FlushDecompress::Finish) {
        Ok(Status::StreamEnd) => usize::try_from(decoder.total_out()).ok(),
        _ => None,
    }
}
