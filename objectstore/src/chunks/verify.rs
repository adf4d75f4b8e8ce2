//! Every chunk that an index names is in the store, with the size it was stored with.
//!
//! Done after the last write and before anything is published. Chunks are compared in order of their ids with a listing
//! that skips what no one asks for; a large image takes several passes, so that memory stays below 65,536 ids or so.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use berth_core::ids::{ChunkId, Sha256Sum};
use berth_core::units::Bytes as Size;
use futures::{StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use super::index_file::{IndexFileError, entries};
use super::store::ChunkStore;
use super::upload::FinishedIndex;
use super::zeros::zero_size;
use crate::{ListPage, ObjectStore, StoreError};

/// How many ids a pass may hold.
const PASS: u64 = 65_536;
/// How many chunks are read back at the same time.
const READERS: usize = 8;

/// Why an image is not verified.
#[derive(Debug, Error)]
pub enum VerifyError {
    /// A chunk is not in the store: it must be sent again.
    #[error("chunk {id} is not in the store")]
    Missing {
        /// Which.
        id: ChunkId,
    },
    /// A chunk has another size than was stored.
    #[error("chunk {id} has {found} in the store instead of {expected}")]
    Size {
        /// Which.
        id: ChunkId,
        /// What was stored.
        expected: Size,
        /// What is listed.
        found: Size,
    },
    /// A chunk was read back and is something else.
    #[error("chunk {id} read back from the store is damaged")]
    Damaged {
        /// Which.
        id: ChunkId,
    },
    /// The store.
    #[error("failed to list or read the chunks of the image")]
    Store(#[from] StoreError),
    /// The local index.
    #[error("failed to read the index of the image")]
    Index(#[from] IndexFileError),
    /// The worker is gone: the runtime is shutting down, or it panicked.
    #[error("the verification's worker is gone")]
    Worker(#[source] tokio::task::JoinError),
}

impl VerifyError {
    /// True if the same verification may succeed later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Store(source) if source.is_transient())
    }
}

/// The distinct chunks of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Tally {
    /// How many, zero chunks included.
    pub chunks: u64,
    /// Their bytes, uncompressed, without zero chunks: what a staged copy of the image occupies at least.
    pub data_bytes: Size,
    /// Their bytes as they are stored.
    pub stored_bytes: Size,
    /// Bytes of the whole image that are no holes, each time they occur: what a staged copy of it occupies at most.
    pub real_bytes: Size,
}

/// What a verification has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Distinct chunks that were listed with their size.
    pub chunks: u64,
    /// How many of them were read back.
    pub read_back: u64,
    /// How many listings that took.
    pub listings: u64,
}

#[derive(Clone, Copy)]
struct Expected {
    len: u64,
    stored: u32,
}

/// How many passes an index of so many items needs: by no, one, two or three hexadecimal digits of the ids.
fn passes(items: u64) -> u64 {
    [1, 16, 256].into_iter().find(|passes| items <= passes * PASS).unwrap_or(4096)
}

fn pass_of(id: &ChunkId, passes: u64) -> u64 {
    let first = u64::from(u16::from_be_bytes([id.0.0[0], id.0.0[1]]));
    (first * passes) >> 16
}

/// The distinct chunks of one pass. Blocking.
fn distinct(path: &Path, items: u64, pass: u64) -> Result<BTreeMap<ChunkId, Expected>, IndexFileError> {
    let passes = passes(items);
    let mut found = BTreeMap::new();
    let mut start = 0;
    for entry in entries(path, 0, items)? {
        let entry = entry?;
        if pass_of(&entry.id, passes) == pass {
            found.insert(entry.id, Expected { len: entry.end.saturating_sub(start), stored: entry.stored });
        }
        start = entry.end;
    }
    Ok(found)
}

/// Counts the distinct chunks of the first `items` of a local index. Blocking.
pub(super) fn tally(path: &Path, chunk: Size, items: u64) -> Result<Tally, IndexFileError> {
    let mut tally = Tally { real_bytes: real_bytes(path, chunk, items)?, ..Tally::default() };
    for pass in 0..passes(items) {
        for (id, chunk) in distinct(path, items, pass)? {
            tally.chunks += 1;
            tally.stored_bytes = tally.stored_bytes.saturating_add(Size(u64::from(chunk.stored)));
            if zero_size(&id).is_none() {
                tally.data_bytes = tally.data_bytes.saturating_add(Size(chunk.len));
            }
        }
    }
    Ok(tally)
}

/// All items but whole zero chunks.
fn real_bytes(path: &Path, chunk: Size, items: u64) -> Result<Size, IndexFileError> {
    let (mut real, mut start) = (Size::ZERO, 0);
    for entry in entries(path, 0, items)? {
        let entry = entry?;
        let len = Size(entry.end.saturating_sub(start));
        start = entry.end;
        if len < chunk || zero_size(&entry.id) != Some(len) {
            real = real.saturating_add(len);
        }
    }
    Ok(real)
}

/// Verifies an image that was just uploaded. `progress` is told the number of distinct chunks verified so far.
///
/// # Errors
/// [`VerifyError::Missing`], [`VerifyError::Size`] and [`VerifyError::Damaged`] name the first chunk that is wrong.
pub async fn verify<S: ObjectStore>(
    chunks: &ChunkStore<S>,
    image: &FinishedIndex,
    mut progress: impl FnMut(u64) + Send,
) -> Result<Verified, VerifyError> {
    let mut verified = Verified::default();
    for pass in 0..passes(image.items) {
        let (path, items): (PathBuf, u64) = (image.path.clone(), image.items);
        let expected = tokio::task::spawn_blocking(move || distinct(&path, items, pass))
            .await
            .map_err(VerifyError::Worker)??;
        let before = verified.chunks;
        verified.listings += compare(chunks, &expected, |done| progress(before + done)).await?;
        verified.chunks += expected.len() as u64;
        if !chunks.capabilities().verifies_checksums {
            verified.read_back += read_back(chunks, &expected).await?;
        }
    }
    Ok(verified)
}

/// Compares sorted chunks with the listing. Each listing starts right at the next chunk that is wanted, so a small
/// image in a large store takes at most one listing per chunk, and a large one no more than there are pages.
async fn compare<S: ObjectStore>(
    chunks: &ChunkStore<S>,
    expected: &BTreeMap<ChunkId, Expected>,
    mut progress: impl FnMut(u64),
) -> Result<u64, VerifyError> {
    let prefix = chunks.layout().chunks();
    let mut wanted = expected.iter().peekable();
    let (mut done, mut listings) = (0, 0);
    while let Some((first, _)) = wanted.peek() {
        let key = chunks.layout().chunk(first);
        // The listing starts after a key: the longest one before the first that is wanted.
        let page = chunks.store().list(&prefix, Some(&key[..key.len() - 1])).await?;
        listings += 1;
        let last = page.objects.last().map(|object| object.key.clone());
        let mut listed = Page::new(page);
        while let Some((id, chunk)) = wanted.peek() {
            let key = chunks.layout().chunk(id);
            if listed.more && last.as_ref().is_some_and(|last| key > *last) {
                break;
            }
            let (expected, found) = (Size(u64::from(chunk.stored)), listed.size_of(&key));
            match found {
                Some(found) if found == expected => {}
                Some(found) => return Err(VerifyError::Size { id: **id, expected, found }),
                None => return Err(VerifyError::Missing { id: **id }),
            }
            done += 1;
            wanted.next();
        }
        progress(done);
    }
    Ok(listings)
}

/// A page that is walked along once.
struct Page {
    objects: std::iter::Peekable<std::vec::IntoIter<crate::Listed>>,
    more: bool,
}

impl Page {
    fn new(page: ListPage) -> Self {
        // An empty page that claims to go on would be listed for ever.
        let more = page.more && !page.objects.is_empty();
        Self { objects: page.objects.into_iter().peekable(), more }
    }

    fn size_of(&mut self, key: &str) -> Option<Size> {
        while self.objects.next_if(|object| object.key.as_str() < key).is_some() {}
        self.objects.next_if(|object| object.key == key).map(|object| object.size)
    }
}

async fn read_back<S: ObjectStore>(
    chunks: &ChunkStore<S>,
    expected: &BTreeMap<ChunkId, Expected>,
) -> Result<u64, VerifyError> {
    let all: Vec<(ChunkId, u64)> = expected.iter().map(|(id, chunk)| (*id, chunk.len)).collect();
    futures::stream::iter(all)
        .map(|(id, len)| async move {
            let frame = chunks.get_frame(&id, Size(len)).await.map_err(|source| match source {
                StoreError::NotFound { .. } => VerifyError::Missing { id },
                StoreError::TooLarge { .. } => VerifyError::Damaged { id },
                source => source.into(),
            })?;
            let sound = tokio::task::spawn_blocking(move || is_sound(&frame, len, &id))
                .await
                .map_err(VerifyError::Worker)?;
            if sound { Ok(1) } else { Err(VerifyError::Damaged { id }) }
        })
        .buffer_unordered(READERS)
        .try_fold(0, |sum, one| async move { Ok(sum + one) })
        .await
}

/// True if a frame holds exactly the chunk. Decompresses in pieces: a zero chunk of 64 MiB needs no memory.
fn is_sound(frame: &[u8], len: u64, id: &ChunkId) -> bool {
    let Ok(decoder) = zstd::stream::read::Decoder::new(frame) else { return false };
    let mut decoder = decoder.take(len.saturating_add(1));
    let mut hash = Sha256::new();
    let mut total = 0;
    let mut piece = vec![0; 64 << 10];
    loop {
        match decoder.read(&mut piece) {
            Ok(0) => break total == len && Sha256Sum(hash.finalize().into()) == id.0,
            Ok(read) => {
                hash.update(&piece[..read]);
                total += read as u64;
            }
            Err(_) => break false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_divide_the_ids() {
        assert_eq!(
            [passes(0), passes(PASS), passes(PASS + 1), passes(1 << 21), passes(1 << 30)],
            [1, 1, 16, 256, 4096]
        );
        for passes in [1, 16, 256, 4096] {
            let all: Vec<u64> = (0..=255_u8).map(|b| pass_of(&ChunkId(Sha256Sum([b; 32])), passes)).collect();
            assert!(all.is_sorted() && all[0] == 0 && all[255] == passes - 1);
        }
    }

    #[test]
    fn sound_frames_are_exactly_the_chunk() {
        let data = vec![7; 1000];
        let frame = super::super::frame::compress(&data).unwrap();
        let id = ChunkId::of(&data);
        assert!(is_sound(&frame, 1000, &id));
        assert!(!is_sound(&frame, 999, &id) && !is_sound(&frame, 1001, &id));
        assert!(!is_sound(&frame, 1000, &ChunkId::of(b"x")) && !is_sound(b"rubbish", 1000, &id));
    }
}
