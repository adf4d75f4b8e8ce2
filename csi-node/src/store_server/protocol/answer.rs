//! Answers to requests: their heads as bytes, the data as pieces that are never copied.

use berth_core::units::Bytes as Size;
use berth_objectstore::chunks::remote::{Extent, Piece};
use bytes::Bytes;

use super::negotiation::ALLOCATION_ID;
use super::{Agreed, Errno};

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
/// `NBD_REPLY_FLAG_DONE`: the last chunk of an answer.
const DONE: u16 = 1;
/// `NBD_STATE_HOLE` and `NBD_STATE_ZERO`: what is known to be zeros is not stored.
const HOLE_AND_ZERO: u32 = 3;
/// Extents in one answer.
pub const MOST_EXTENTS: usize = 1024;

/// `NBD_REPLY_TYPE_*`.
#[derive(Clone, Copy)]
#[repr(u16)]
enum Kind {
    OffsetData = 1,
    OffsetHole = 2,
    BlockStatus = 5,
    Error = (1 << 15) | 1,
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// These bytes.
    Bytes(Bytes),
    /// So many zeros.
    Zeros(Size),
}

impl From<Piece> for Part {
    fn from(piece: Piece) -> Self {
        match piece {
            Piece::Data(bytes) => Self::Bytes(bytes),
            Piece::Zero(len) => Self::Zeros(len),
        }
    }
}

/// Success or failure without data.
pub fn simple(cookie: u64, errno: Option<Errno>) -> Vec<Part> {
    let errno = errno.map_or(0, Errno::number);
    let head = [&SIMPLE_MAGIC.to_be_bytes()[..], &errno.to_be_bytes(), &cookie.to_be_bytes()].concat();
    vec![Part::Bytes(head.into())]
}

/// A failed read or question for extents, in the form that was agreed on.
pub fn failure(cookie: u64, errno: Errno, agreed: Agreed) -> Vec<Part> {
    if !agreed.structured {
        return simple(cookie, Some(errno));
    }
    let data = [&errno.number().to_be_bytes()[..], &0_u16.to_be_bytes()].concat();
    let head = chunk(cookie, DONE, Kind::Error, Size(data.len() as u64));
    vec![Part::Bytes([head, data].concat().into())]
}

/// What was read from `offset` on. `pieces` must not be empty. With `whole`, and agreed on chunks, it is one chunk.
pub fn data(cookie: u64, offset: u64, pieces: Vec<Piece>, whole: bool, agreed: Agreed) -> Vec<Part> {
    if !agreed.structured {
        return simple(cookie, None).into_iter().chain(pieces.into_iter().map(Part::from)).collect();
    }
    let len = Size(pieces.iter().map(|piece| piece.len().0).sum());
    if whole && pieces.len() > 1 {
        let head = chunk(cookie, DONE, Kind::OffsetData, Size(8 + len.0));
        let head = [&head[..], &offset.to_be_bytes()].concat();
        return std::iter::once(Part::Bytes(head.into())).chain(pieces.into_iter().map(Part::from)).collect();
    }
    let mut parts = Vec::with_capacity(pieces.len() * 2);
    let (mut at, end) = (offset, offset + len.0);
    for piece in pieces {
        let len = piece.len();
        let flags = if at + len.0 == end { DONE } else { 0 };
        match piece {
            Piece::Data(bytes) => {
                let head = chunk(cookie, flags, Kind::OffsetData, Size(8 + len.0));
                parts.push(Part::Bytes([&head[..], &at.to_be_bytes()].concat().into()));
                parts.push(Part::Bytes(bytes));
            }
            Piece::Zero(_) => {
                let head = chunk(cookie, flags, Kind::OffsetHole, Size(12));
                let zeros = word(len);
                parts.push(Part::Bytes([&head[..], &at.to_be_bytes(), &zeros].concat().into()));
            }
        }
        at += len.0;
    }
    parts
}

/// What is data and what is zeros. `extents` must not be empty.
pub fn status(cookie: u64, extents: &[Extent]) -> Vec<Part> {
    let head = chunk(cookie, DONE, Kind::BlockStatus, Size(4 + 8 * extents.len() as u64));
    let mut bytes = [&head[..], &ALLOCATION_ID.to_be_bytes()].concat();
    for extent in extents {
        let flags = if extent.zero { HOLE_AND_ZERO } else { 0 };
        bytes.extend(word(extent.len));
        bytes.extend(flags.to_be_bytes());
    }
    vec![Part::Bytes(bytes.into())]
}

/// The head of a chunk of so many bytes.
fn chunk(cookie: u64, flags: u16, kind: Kind, len: Size) -> Vec<u8> {
    [
        &CHUNK_MAGIC.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &(kind as u16).to_be_bytes(),
        &cookie.to_be_bytes(),
        &word(len),
    ]
    .concat()
}

/// Lengths are at most those of a request, which has 32 bits, and a few bytes.
fn word(len: Size) -> [u8; 4] {
    u32::try_from(len.0).unwrap_or(u32::MAX).to_be_bytes()
}
