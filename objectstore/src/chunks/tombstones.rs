//! The chunks that are candidates for removal.

use std::collections::HashSet;

use berth_core::ids::ChunkId;
use bytes::Buf as _;

use super::store::ChunkStore;
use crate::layout::Key;
use crate::{ObjectStore, StoreError};

/// Which chunks may be removed soon. Holds 8 bytes of each id: one that is taken for a candidate by mistake is sent once more,
/// nothing worse.
#[derive(Debug, Default)]
pub struct Tombstones(HashSet<u64>);

impl Tombstones {
    /// Those that are there now.
    pub(super) async fn list<S: ObjectStore>(chunks: &ChunkStore<S>) -> Result<Self, StoreError> {
        let (store, layout) = (chunks.store(), chunks.layout());
        let prefix = layout.tombstones();
        let mut found = HashSet::new();
        let mut after: Option<String> = None;
        loop {
            let page = store.list(&prefix, after.as_deref()).await?;
            let ids = page.objects.iter().filter_map(|object| match layout.parse(&object.key) {
                Some(Key::Tombstone(id)) => Some(short(&id)),
                _ => None,
            });
            found.extend(ids);
            match page.objects.last() {
                Some(last) if page.more => after = Some(last.key.clone()),
                _ => return Ok(Self(found)),
            }
        }
    }

    /// True if the chunk may be removed soon.
    pub fn contains(&self, id: &ChunkId) -> bool {
        self.0.contains(&short(id))
    }
}

fn short(id: &ChunkId) -> u64 {
    (&id.0.0[..]).get_u64()
}
