//! One block of content, made ready to be appended: the work that can be done by many threads.

use std::borrow::Cow;

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
    /// Compressed to this many bytes, or more than before in a format that knows nothing else.
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
                let mut packer = Packer::of_clusters(compression, self.output.level);
                content.chunks(length(CLUSTER)).for_each(|cluster| block.push_cluster(cluster, &mut packer));
            }
            OutputFormat::Vmdk => {
                let mut packer = Packer::of_grains(self.output.level);
                content.chunks(length(CLUSTER)).for_each(|grain| block.push_grain(grain, &mut packer));
            }
            OutputFormat::Vhd if is_zero(content) => block.pieces.push(Piece::Zero),
            OutputFormat::Vhd => block.push_plain(content, length(BLOCK.0)),
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

    /// Stores a cluster of qcow2 in the smallest way.
    fn push_cluster(&mut self, content: &[u8], packer: &mut Packer) {
        if is_zero(content) {
            return self.pieces.push(Piece::Zero);
        }
        let cluster = filled(content);
        match packer.pack(&cluster) {
            Some(packed) => self.push_packed(packed),
            None => self.push_plain(&cluster, cluster.len()),
        }
    }

    /// Stores a grain of vmdk, always as a zlib stream.
    fn push_grain(&mut self, content: &[u8], packer: &mut Packer) {
        if is_zero(content) {
            return self.pieces.push(Piece::Zero);
        }
        let grain = filled(content);
        match packer.pack(&grain) {
            Some(packed) => self.push_packed(packed),
            None => self.push_packed(&stored_stream(&grain)),
        }
    }

    fn push_packed(&mut self, packed: &[u8]) {
        self.bytes.extend_from_slice(packed);
        self.pieces.push(Piece::Packed(packed.len()));
    }
}

/// The last cluster or grain of a disk, filled up with zeros; all others as they are.
fn filled(content: &[u8]) -> Cow<'_, [u8]> {
    if content.len() == length(CLUSTER) {
        return Cow::Borrowed(content);
    }
    let mut filled = content.to_vec();
    filled.resize(length(CLUSTER), 0);
    Cow::Owned(filled)
}

/// The longest that a compressed cluster of qcow2 may be: shorter than a plain one, and a byte less, so that two bytes of a
/// state can tell all lengths and the plain ones.
pub(super) const LONGEST_PACKED: usize = (64 << 10) - 2;

/// The longest that the stream of a grain may be: that of one that is only wrapped, in two pieces.
pub(super) const LONGEST_GRAIN: usize = (64 << 10) + 16;

/// Compresses clusters or grains, one independent of the other.
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
    fn of_clusters(compression: Compression, level: Option<u8>) -> Self {
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

    fn of_grains(level: Option<u8>) -> Self {
        let deflate = Compress::new_with_window_bits(deflate_level(level), true, 15);
        Self { kind: Kind::Deflate(deflate), buffer: vec![0; LONGEST_GRAIN] }
    }

    /// The compressed content, or `None` if that is not shorter than the buffer. A failure of the library counts as that.
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

/// A zlib stream of content that compression only makes longer. Sources: RFC 1950, and RFC 1951 section 3.2.4.
fn stored_stream(content: &[u8]) -> Vec<u8> {
    // Deflate, no dictionary, made in haste.
    let mut stream = vec![0x78, 0x01];
    let mut pieces = content.chunks(usize::from(u16::MAX)).peekable();
    while let Some(piece) = pieces.next() {
        let len = u16::try_from(piece.len()).unwrap_or(u16::MAX);
        stream.push(u8::from(pieces.peek().is_none()));
        stream.extend(len.to_le_bytes());
        stream.extend((!len).to_le_bytes());
        stream.extend_from_slice(piece);
    }
    // Adler-32: two sums modulo the greatest prime below 2^16, the second one of the first one's values.
    let (low, high) = content.iter().fold((1, 0), |(low, high), byte| {
        let low = (low + u32::from(*byte)) % 65521;
        (low, (high + low) % 65521)
    });
    stream.extend((high << 16 | low).to_be_bytes());
    stream
}

fn is_zero(content: &[u8]) -> bool {
    // Without a branch for each byte, the compiler takes many bytes at a time.
    content.chunks(4096).all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    /// Content that looks random, from the digits of a generator.
    fn noise(len: usize) -> Vec<u8> {
        let mut number = 1_u64;
        let mut next = || {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            number.to_be_bytes()[0]
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn a_stored_stream_is_one() {
        for len in [1, 65535, 65536] {
            let content = noise(len);
            let stream = stored_stream(&content);
            assert!(stream.len() <= LONGEST_GRAIN);
            let mut read = Vec::new();
            flate2::read::ZlibDecoder::new(stream.as_slice()).read_to_end(&mut read).unwrap();
            assert!(read == content);
        }
    }

    /// What lies 8 KiB back is out of reach for a decoder that keeps 4 KiB, as QEMU's may.
    #[test]
    fn clusters_of_qcow2_refer_back_by_4_kib_at_most() {
        let far = noise(8 << 10).repeat(8);
        let near = noise(2 << 10).repeat(32);
        let mut clusters = Packer::of_clusters(Compression::Zlib, None);
        assert_eq!(clusters.pack(&far), None);
        assert!(clusters.pack(&near).unwrap().len() < 16 << 10);
        assert!(Packer::of_grains(None).pack(&far).unwrap().len() < 10 << 10);
        assert!(Packer::of_clusters(Compression::Zstd, None).pack(&far).unwrap().len() < 10 << 10);
    }

    #[test]
    fn zeros_are_found_wherever_they_end() {
        for len in [512, 4096, 5000, 65536] {
            let mut content = vec![0; len];
            assert!(is_zero(&content));
            for at in [0, len / 2, len - 1] {
                content[at] = 1;
                assert!(!is_zero(&content), "{len}, {at}");
                content[at] = 0;
            }
        }
    }
}
