//! What an image store holds, and how much of it no image names.
//!
//! The chunks are gone through in passes of at most about 500,000 ids (20 MiB); each pass reads every index once.

use berth_core::ids::ChunkId;
use berth_core::units::Bytes as Size;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::read::{ImageReader, ReadError};
use super::store::ChunkStore;
use crate::layout::Key;
use crate::{ListPage, ObjectStore, StoreError};

/// How many ids a pass may hold.
const PASS: u64 = 500_000;

/// Why the use of an image store is not known.
#[derive(Debug, Error)]
pub enum UsageError {
    /// A listing failed.
    #[error("failed to list the image store")]
    List(#[from] StoreError),
    /// An index could not be read.
    #[error("failed to read the images of the image store")]
    Image(#[from] ReadError),
}

/// What an image store holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Usage {
    /// How many indexes.
    pub images: u64,
    /// All chunks, as stored.
    pub unique_bytes: Size,
    /// Chunks that no index names, as stored. Includes those of uploads that are under way.
    pub unreferenced_bytes: Size,
    /// How many chunks those are.
    pub unreferenced_chunks: u64,
}

/// Measures an image store.
///
/// An image that disappears meanwhile counts as if it had never been there.
pub async fn usage<S: ObjectStore>(chunks: &ChunkStore<S>) -> Result<Usage, UsageError> {
    measure(chunks, PASS).await
}

async fn measure<S: ObjectStore>(chunks: &ChunkStore<S>, per_pass: u64) -> Result<Usage, UsageError> {
    let mut usage = Usage::default();
    let mut counted = 0;
    each_chunk(chunks, "", |_, size| {
        counted += 1;
        usage.unique_bytes = usage.unique_bytes.saturating_add(size);
    })
    .await?;
    usage.images = each_image(chunks, async |_| Ok(())).await?;
    for part in prefixes(counted, per_pass) {
        let mut listed: Vec<(ChunkId, u32, bool)> = Vec::new();
        each_chunk(chunks, &part, |id, size| {
            listed.push((id, u32::try_from(size.0).unwrap_or(u32::MAX), false));
        })
        .await?;
        mark(chunks, &mut listed).await?;
        for (_, size, _) in listed.iter().filter(|(_, _, named)| !named) {
            usage.unreferenced_chunks += 1;
            usage.unreferenced_bytes = usage.unreferenced_bytes.saturating_add(Size(u64::from(*size)));
        }
    }
    Ok(usage)
}

/// Marks the listed chunks that an index names.
async fn mark<S: ObjectStore>(
    chunks: &ChunkStore<S>,
    listed: &mut [(ChunkId, u32, bool)],
) -> Result<(), UsageError> {
    each_image(chunks, async |reader: ImageReader<S>| {
        let mut items = reader.items_at(0).await?;
        while let Some(item) = items.next().await? {
            if let Ok(at) = listed.binary_search_by(|(id, _, _)| id.cmp(&item.id)) {
                listed[at].2 = true;
            }
        }
        Ok(())
    })
    .await?;
    Ok(())
}

/// The beginnings of ids that divide so many chunks into passes.
fn prefixes(chunks: u64, per_pass: u64) -> Vec<String> {
    let mut digits = 0;
    while digits < 4 && chunks >> (4 * digits) > per_pass {
        digits += 1;
    }
    let width = usize::try_from(digits).unwrap_or(0);
    (0..1_u32 << (4 * digits))
        .map(|part| if width == 0 { String::new() } else { format!("{part:0width$x}") })
        .collect()
}

async fn each_chunk<S: ObjectStore>(
    chunks: &ChunkStore<S>,
    part: &str,
    mut see: impl FnMut(ChunkId, Size),
) -> Result<(), StoreError> {
    let prefix = format!("{}{part}", chunks.layout().chunks());
    let mut listed = Listed::Nothing;
    while let Some(page) = next_page(chunks, &prefix, &mut listed).await? {
        for object in page.objects {
            if let Some(Key::Chunk(id)) = chunks.layout().parse(&object.key) {
                see(id, object.size);
            }
        }
    }
    Ok(())
}

/// Opens every image; how many there were.
async fn each_image<S: ObjectStore>(
    chunks: &ChunkStore<S>,
    mut see: impl AsyncFnMut(ImageReader<S>) -> Result<(), ReadError>,
) -> Result<u64, UsageError> {
    let prefix = chunks.layout().images();
    let (mut listed, mut images) = (Listed::Nothing, 0);
    while let Some(page) = next_page(chunks, &prefix, &mut listed).await? {
        for object in page.objects {
            let Some(Key::Image(digest)) = chunks.layout().parse(&object.key) else { continue };
            let seen = match ImageReader::open(chunks.clone(), digest).await {
                Ok(reader) => see(reader).await,
                Err(error) => Err(error),
            };
            match seen {
                Ok(()) => images += 1,
                Err(ReadError::NotFound { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(images)
}

/// How far a listing has come.
enum Listed {
    Nothing,
    UpTo(String),
    All,
}

/// The page after what is listed, which is moved on; nothing after the last page.
async fn next_page<S: ObjectStore>(
    chunks: &ChunkStore<S>,
    prefix: &str,
    listed: &mut Listed,
) -> Result<Option<ListPage>, StoreError> {
    let start = match listed {
        Listed::Nothing => None,
        Listed::UpTo(key) => Some(key.as_str()),
        Listed::All => return Ok(None),
    };
    let page = chunks.store().list(prefix, start).await?;
    let last = page.objects.last().map(|object| object.key.clone());
    *listed = last.filter(|_| page.more).map_or(Listed::All, Listed::UpTo);
    Ok(Some(page))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_cover_all_ids() {
        assert_eq!(prefixes(10, 10), [""]);
        assert_eq!(prefixes(11, 10).len(), 16);
        assert_eq!(prefixes(11, 10)[10], "a");
        assert_eq!(prefixes(176, 10).len(), 256);
        assert_eq!(prefixes(u64::MAX, 10).len(), 65536);
    }
}
