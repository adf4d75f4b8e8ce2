//! Why a served image cannot be opened or read.

use std::time::Duration;

use berth_core::ids::{ChunkId, Digest};
use berth_core::units::Bytes as Size;
use thiserror::Error;

use super::super::caibx::IndexError;
use super::super::frame::Damage;

/// Why an image cannot be served.
#[derive(Debug, Error)]
pub enum OpenRemoteError {
    /// There is no such image.
    #[error("image {digest} is not in the image store")]
    NotFound {
        /// Which.
        digest: Digest,
    },
    /// The index is not one, or not this image's.
    #[error("the index of image {digest} is not valid")]
    Index {
        /// Which.
        digest: Digest,
        /// What is wrong with it.
        source: IndexError,
    },
    /// The index has another sum than its name says.
    #[error("the index of image {digest} has the digest {found}")]
    WrongIndex {
        /// The image.
        digest: Digest,
        /// What was found.
        found: Digest,
    },
    /// The memory is too little for the size of the chunks.
    #[error("image {digest} cannot be served with {memory}: chunks of {chunk_size} need at least {least}")]
    Memory {
        /// The image.
        digest: Digest,
        /// What there is.
        memory: Size,
        /// The size of its chunks.
        chunk_size: Size,
        /// What it takes.
        least: Size,
    },
    /// The index is too long for the memory.
    #[error("the index of image {digest} has {items} items, too many to be served with {memory}")]
    Items {
        /// The image.
        digest: Digest,
        /// How many it has.
        items: u64,
        /// What there is.
        memory: Size,
    },
    /// It could not be read.
    #[error(transparent)]
    Read(#[from] RemoteError),
}

/// Why a part of a served image was not read. All who waited for the same are given the same.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RemoteError {
    /// It is not within the image, or too long.
    #[error(
        "{len} at offset {offset} of image {digest} cannot be read: it has {size}, and a read at most {longest}"
    )]
    Range {
        /// The image.
        digest: Digest,
        /// Where the read begins.
        offset: u64,
        /// Its length.
        len: Size,
        /// The size of the image.
        size: Size,
        /// The longest read.
        longest: Size,
    },
    /// The store was away, or refused, until the reader's patience ended.
    #[error("failed to read image {digest} within {} s: {said}", waited.as_secs_f32())]
    Unavailable {
        /// The image.
        digest: Digest,
        /// How long it was tried.
        waited: Duration,
        /// What the store said last.
        said: String,
    },
    /// The store will not give it however often it is asked.
    #[error("the store refuses to give a part of image {digest}: {said}")]
    Refused {
        /// The image.
        digest: Digest,
        /// The store's words.
        said: String,
    },
    /// A chunk that the read needs is gone.
    #[error("chunk {id} of image {digest} is not in the image store")]
    Missing {
        /// The image.
        digest: Digest,
        /// The chunk.
        id: ChunkId,
    },
    /// A chunk is not what its name says.
    #[error("chunk {id} of image {digest} is damaged: {damage}")]
    Damaged {
        /// The image.
        digest: Digest,
        /// The chunk.
        id: ChunkId,
        /// What is wrong with it.
        damage: Damage,
    },
    /// A part of the index is gone, or is not what it was when the image was opened.
    #[error("page {page} of the index of image {digest} is damaged")]
    IndexDamaged {
        /// The image.
        digest: Digest,
        /// Which page, from 0.
        page: usize,
    },
    /// The server ends.
    #[error("image {digest} is not served any more")]
    Stopped {
        /// The image.
        digest: Digest,
    },
}
