//! One block of content, made ready to be appended: the work that can be done by many threads.

use berth_core::units::Bytes;
use flate2::{Compress, FlushCompress, Status};

use super::output::{Compression, Output, OutputFormat, WriteError};
use super::{BLOCK, CLUSTER, length};

/// Looks for zeros in blocks and compresses the rest. Holds nothing but what the output says: any number of threads may use
/// it, or have one each.
#[derive(Clone, Copy, Debug)]
pub struct Encoder {
    output: Output,
}

/// A block as the format stores it, without its place.
#[derive(Clone, Debug)]
pub struct EncodedBlock {
    pub(super) output: Output,
    pub(super) at: Bytes,
    /// One for each cluster or grain; one for the whole block where the format knows no smaller unit.
    pub(super) pieces: Vec<Piece>,
    /// What the pieces store, one after the other.
    bytes: Vec<u8>,
}

/// How a piece is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// Not at all: it is all zeros.
    Zero,
    /// As it is, in this many bytes.
    Plain(usize),
    /// Compressed to this many bytes.
    Packed(usize),
}

impl Piece {
    pub fn len(self) -> usize {
        match self {
            Self::Zero => 0,
            Self::Plain(len) | Self::Packed(len) => len,
        }
    }
}

impl EncodedBlock {
    /// Where its content begins on the disk.
    pub fn at(&self) -> Bytes {
        self.at
    }

    /// The bytes that its content takes, without the format's tables. Zero if all of it is zeros.
    pub fn stored(&self) -> Bytes {
        Bytes(self.bytes.len() as u64)
    }

    /// Each piece with its bytes.
    pub(super) fn pieces(&self) -> impl Iterator<Item = (Piece, &[u8])> {
        let mut rest = self.bytes.as_slice();
        self.pieces.iter().map(move |piece| {
            let (bytes, after) = rest.split_at(piece.len());
            rest = after;
            (*piece, bytes)
        })
    }
}

impl Encoder {
    /// For this output.
    ///
    /// # Errors
    /// As [`Output::plan`].
    pub fn new(output: Output) -> Result<Self, WriteError> {
        output.plan()?;
        Ok(Self { output })
    }

    /// For an output that has a plan.
    pub(super) fn of(output: Output) -> Self {
        Self { output }
    }

    /// Encodes the block at `at`, a multiple of [`BLOCK`]. Its content is as long as a block, or goes to the end of the disk.
    /// Takes memory for the block and about 1 MiB besides.
    ///
    /// # Errors
    /// [`WriteError::BlockLength`]; 0 bytes are expected where no block begins.
    pub fn encode(&self, at: Bytes, content: &[u8]) -> Result<EncodedBlock, WriteError> {
        let expected = self.output.block_len(at);
        if content.len() != expected || expected == 0 {
            return Err(WriteError::BlockLength { at, expected, found: content.len() });
        }
        let mut block = EncodedBlock { output: self.output, at, pieces: Vec::new(), bytes: Vec::new() };
        match self.output.format {
            OutputFormat::Raw => block.push_plain(content, content.len()),
            OutputFormat::Qcow2 { compression } => {
                let mut packer = Packer::new(compression, self.output.level);
                for cluster in content.chunks(length(CLUSTER)) {
                    block.push_cluster(cluster, &mut packer);
                }
            }
        }
        Ok(block)
    }
}

impl Output {
    /// How long the block at `at` is; zero if none begins there.
    pub(super) fn block_len(&self, at: Bytes) -> usize {
        if !at.0.is_multiple_of(BLOCK.0) {
            return 0;
        }
        length(self.virtual_size.saturating_sub(at).min(BLOCK).0)
    }
}

impl EncodedBlock {
    /// Stores it as it is, with zeros up to `len`.
    fn push_plain(&mut self, content: &[u8], len: usize) {
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len() + len - content.len(), 0);
        self.pieces.push(Piece::Plain(len));
    }

    /// Stores a cluster of qcow2 in the smallest way. The last one of the disk is filled up with zeros.
    fn push_cluster(&mut self, content: &[u8], packer: &mut Packer) {
        if is_zero(content) {
            self.pieces.push(Piece::Zero);
            return;
        }
        let cluster = length(CLUSTER);
        let mut filled = Vec::new();
        let whole = if content.len() == cluster {
            content
        } else {
            filled.extend_from_slice(content);
            filled.resize(cluster, 0);
            &filled
        };
        match packer.pack(whole) {
            Some(packed) => {
                self.bytes.extend_from_slice(packed);
                self.pieces.push(Piece::Packed(packed.len()));
            }
            None => self.push_plain(whole, cluster),
        }
    }
}

/// The longest that a compressed cluster of qcow2 may be: shorter than a plain one, and a byte less, so that two bytes of a
/// state can tell all lengths and the plain ones.
pub(super) const LONGEST_PACKED: usize = (64 << 10) - 2;

/// Compresses clusters, one independent of the other.
struct Packer {
    kind: Kind,
    buffer: Vec<u8>,
}

enum Kind {
    Store,
    Deflate(Compress),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Packer {
    fn new(compression: Compression, level: Option<u8>) -> Self {
        let kind = match compression {
            Compression::None => Kind::Store,
            // QEMU's own clusters are raw deflate streams with a window of 2^12 bytes, and its decoder asks for no more.
            Compression::Zlib => {
                Kind::Deflate(Compress::new_with_window_bits(deflate_level(level), false, 12))
            }
            Compression::Zstd => {
                let level = level.map_or(zstd::DEFAULT_COMPRESSION_LEVEL, i32::from);
                let compressor = zstd::bulk::Compressor::new(level);
                Kind::Zstd(
                    compressor.expect("zstd fails at a known level only without memory, as any Vec does"),
                )
            }
        };
        Self { kind, buffer: vec![0; LONGEST_PACKED] }
    }

    /// The compressed cluster, or `None` if that is not shorter. A failure of the library counts as that.
    fn pack(&mut self, content: &[u8]) -> Option<&[u8]> {
        let len = match &mut self.kind {
            Kind::Store => None,
            Kind::Deflate(deflate) => pack_deflate(deflate, content, &mut self.buffer),
            Kind::Zstd(compressor) => compressor.compress_to_buffer(content, &mut self.buffer[..]).ok(),
        };
        len.map(|len| &self.buffer[..len])
    }
}

fn deflate_level(level: Option<u8>) -> flate2::Compression {
    level.map_or(flate2::Compression::default(), |level| flate2::Compression::new(u32::from(level)))
}

/// Compresses all of `content` into one stream; `None` if `buffer` is too short.
fn pack_deflate(deflate: &mut Compress, content: &[u8], buffer: &mut [u8]) -> Option<usize> {
    deflate.reset();
    match deflate.compress(content, buffer, FlushCompress::Finish) {
        Ok(Status::StreamEnd) => usize::try_from(deflate.total_out()).ok(),
        _ => None,
    }
}

fn is_zero(content: &[u8]) -> bool {
    // Without a branch for each byte, the compiler takes many bytes at a time.
    content.chunks(4096).all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
}
