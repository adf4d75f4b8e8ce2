//! Names and references in an image store: manifests, pins, and the index that makes an image visible.

use std::collections::BTreeMap;

use berth_core::ids::{Digest, ObjectName, Sha256Sum, Uid};
use berth_core::units::{Bytes as Size, Generation, Timestamp};
use futures::StreamExt as _;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use super::caibx::ChunkSize;
use super::store::ChunkStore;
use super::upload::FinishedIndex;
use crate::layout::LayoutError;
use crate::{Body, ETag, ObjectStore, PutCondition, StoreError, small};

/// How often a manifest that changes under our hands is tried.
const TRIES: usize = 4;

/// Why an image was not published, or a name not given up.
#[derive(Debug, Error)]
pub enum PublishError {
    /// Someone else has the name.
    #[error("the name {name} in the image store belongs to {found}, not to {expected}")]
    Conflict {
        /// The name.
        name: ObjectName,
        /// Who has it.
        found: Uid,
        /// Who was to have it.
        expected: Uid,
    },
    /// A later writer has published already.
    #[error("the name {name} in the image store was published by generation {found}, later than {ours}")]
    Superseded {
        /// The name.
        name: ObjectName,
        /// The later generation.
        found: Generation,
        /// Ours.
        ours: Generation,
    },
    /// Others keep changing the manifest.
    #[error("the manifest of {name} keeps changing")]
    Contended {
        /// The name.
        name: ObjectName,
    },
    /// The index in the store is not the one that was sent.
    #[error("the index {digest} read back from the store is damaged")]
    DamagedIndex {
        /// Which.
        digest: Digest,
    },
    /// A manifest or pin is not readable.
    #[error("{key} is not readable")]
    Corrupt {
        /// The object.
        key: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The name or uid cannot be a part of a key.
    #[error("the image cannot be named")]
    Name(#[from] LayoutError),
    /// The store.
    #[error("failed to write to the image store")]
    Store(#[from] StoreError),
}

impl PublishError {
    /// True if the same may succeed later without anyone doing anything.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Contended { .. }) || matches!(self, Self::Store(source) if source.is_transient())
    }
}

/// What a name in an image store means.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// 1.
    pub format_version: u32,
    /// The image.
    pub digest: Digest,
    /// Its size, in bytes.
    pub virtual_size: Size,
    /// Its chunk size, in bytes.
    pub chunk_size: ChunkSize,
    /// Its distinct chunks without those of zeros, uncompressed, in bytes.
    pub data_bytes: Size,
    /// The sum of the source's bytes as they were transferred.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_digest: Option<Digest>,
    /// The object that the name stands for.
    pub owner: Uid,
    /// The writer's generation.
    pub generation: Generation,
    /// When it was made, for people.
    pub created: Timestamp,
    /// What the owner wants to find it by.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// Who may have a name that is to be published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Nobody, or the owner itself.
    Absent,
    /// This one, which is known to be gone, nobody, or the owner itself.
    OwnedBy(Uid),
}

/// A holder's reference to an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pin {
    /// 1.
    pub format_version: u32,
    /// The image.
    pub digest: Digest,
}

impl<S: ObjectStore> ChunkStore<S> {
    /// Stores the index of a verified image under its digest. Idempotent.
    pub async fn put_index(&self, image: &FinishedIndex) -> Result<(), PublishError> {
        let key = self.layout().image(&image.digest);
        let body = Body::File { path: image.path.clone(), len: image.index_size };
        // The sum of an index's bytes is its digest: the store checks the identity itself.
        self.store().put(&key, body, PutCondition::Always, Some(image.digest.0)).await?;
        if self.capabilities().verifies_checksums {
            let info = self.store().head(&key).await?;
            return if info.size == image.index_size { Ok(()) } else { Err(damaged(&image.digest)) };
        }
        let mut object = self.store().get(&key, None, None).await?;
        let mut hash = Sha256::new();
        while let Some(piece) = object.body.next().await {
            hash.update(&piece?);
        }
        if Sha256Sum(hash.finalize().into()) == image.digest.0 { Ok(()) } else { Err(damaged(&image.digest)) }
    }

    /// Gives an image a name, and reads it back. Idempotent for one owner; a later generation of it replaces.
    ///
    /// # Errors
    /// [`PublishError::Conflict`] if someone else than `expected` has the name: nothing was changed.
    pub async fn publish(
        &self,
        name: &ObjectName,
        manifest: &Manifest,
        expected: &Expected,
    ) -> Result<(), PublishError> {
        let key = self.layout().manifest(name)?;
        let corrupt = |source| PublishError::Corrupt { key: key.clone(), source };
        let text = serde_json::to_vec_pretty(manifest).map_err(corrupt)?;
        let sum = Sha256Sum::of(&text);
        for _ in 0..TRIES {
            let condition = match self.manifest(name).await? {
                None => PutCondition::IfAbsent,
                Some((found, _)) if found == *manifest => return Ok(()),
                Some((found, etag)) => {
                    may_replace(name, &found, manifest, expected)?;
                    etag.map_or(PutCondition::Always, PutCondition::IfMatch)
                }
            };
            let put = self.store().put(&key, Body::Bytes(text.clone().into()), condition, Some(sum)).await;
            match put {
                Ok(_) | Err(StoreError::PreconditionFailed { .. } | StoreError::NotFound { .. }) => {}
                Err(source) => return Err(source.into()),
            }
            // The next round, or this, sees what is really there: also where the store has no conditional writes.
            if self.manifest(name).await?.is_some_and(|(found, _)| found == *manifest) {
                return Ok(());
            }
        }
        Err(PublishError::Contended { name: name.clone() })
    }

    /// What a name means, with the version of its manifest.
    pub async fn manifest(
        &self,
        name: &ObjectName,
    ) -> Result<Option<(Manifest, Option<ETag>)>, PublishError> {
        let key = self.layout().manifest(name)?;
        match small(self.store(), &key).await {
            Ok((bytes, etag)) => {
                let manifest =
                    serde_json::from_slice(&bytes).map_err(|source| PublishError::Corrupt { key, source })?;
                Ok(Some((manifest, etag)))
            }
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(source) => Err(source.into()),
        }
    }

    /// Gives up a name. One that `owner` does not have is left alone; false says so.
    pub async fn forget(&self, name: &ObjectName, owner: &Uid) -> Result<bool, PublishError> {
        match self.manifest(name).await {
            Ok(Some((found, _))) if found.owner == *owner => {
                self.store().delete(&self.layout().manifest(name)?).await?;
                Ok(true)
            }
            Ok(Some(_)) => Ok(false),
            Ok(None) => Ok(true),
            Err(PublishError::Corrupt { key, source }) => {
                tracing::warn!(key, error = %source, "a damaged manifest is left alone: nobody can be told to own it");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Refers to an image, so that collection leaves it. To be done before the image is relied on.
    pub async fn pin(&self, holder: &Uid, digest: &Digest) -> Result<(), PublishError> {
        let key = self.layout().pin(holder)?;
        let text = serde_json::to_vec(&Pin { format_version: 1, digest: *digest })
            .map_err(|source| PublishError::Corrupt { key: key.clone(), source })?;
        let sum = Sha256Sum::of(&text);
        self.store().put(&key, Body::Bytes(text.into()), PutCondition::Always, Some(sum)).await?;
        Ok(())
    }

    /// The image that a holder refers to.
    pub async fn pinned(&self, holder: &Uid) -> Result<Option<Digest>, PublishError> {
        let key = self.layout().pin(holder)?;
        match small(self.store(), &key).await {
            Ok((bytes, _)) => serde_json::from_slice::<Pin>(&bytes)
                .map(|pin| Some(pin.digest))
                .map_err(|source| PublishError::Corrupt { key, source }),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(source) => Err(source.into()),
        }
    }

    /// Refers to nothing any more. Idempotent.
    pub async fn unpin(&self, holder: &Uid) -> Result<(), PublishError> {
        Ok(self.store().delete(&self.layout().pin(holder)?).await?)
    }
}

fn damaged(digest: &Digest) -> PublishError {
    PublishError::DamagedIndex { digest: *digest }
}

fn may_replace(
    name: &ObjectName,
    found: &Manifest,
    new: &Manifest,
    expected: &Expected,
) -> Result<(), PublishError> {
    if found.owner == new.owner {
        if found.generation > new.generation {
            let (found, ours) = (found.generation, new.generation);
            return Err(PublishError::Superseded { name: name.clone(), found, ours });
        }
        return Ok(());
    }
    match expected {
        Expected::OwnedBy(uid) if found.owner == *uid => Ok(()),
        _ => Err(PublishError::Conflict {
            name: name.clone(),
            found: found.owner.clone(),
            expected: new.owner.clone(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::StoreLayout;
    use crate::memory::{Fault, MemoryStore};

    async fn chunks(store: &MemoryStore) -> ChunkStore<MemoryStore> {
        let layout = StoreLayout::new("p").unwrap();
        ChunkStore::open_or_create(store.clone(), layout, ChunkSize::DEFAULT).await.unwrap()
    }

    fn manifest(owner: &str, generation: u64) -> Manifest {
        Manifest {
            format_version: 1,
            digest: Digest(Sha256Sum::of(owner.as_bytes())),
            virtual_size: Size::gib(1),
            chunk_size: ChunkSize::DEFAULT,
            data_bytes: Size::mib(5),
            source_digest: None,
            owner: Uid::from(owner),
            generation: Generation(generation),
            created: Timestamp(1),
            labels: BTreeMap::new(),
        }
    }

    #[tokio::test]
    async fn names_belong_to_one_owner() {
        let store = MemoryStore::new();
        let chunks = chunks(&store).await;
        let name = ObjectName::new("ns", "debian");
        chunks.publish(&name, &manifest("a", 2), &Expected::Absent).await.unwrap();
        chunks.publish(&name, &manifest("a", 2), &Expected::Absent).await.unwrap();
        let error = chunks.publish(&name, &manifest("b", 1), &Expected::Absent).await.unwrap_err();
        assert_eq!(error.to_string(), "the name ns/debian in the image store belongs to a, not to b");
        assert!(matches!(
            chunks.publish(&name, &manifest("a", 1), &Expected::Absent).await,
            Err(PublishError::Superseded { found: Generation(2), ours: Generation(1), .. })
        ));
        assert!(!chunks.forget(&name, &Uid::from("b")).await.unwrap());
        chunks.publish(&name, &manifest("b", 1), &Expected::OwnedBy(Uid::from("a"))).await.unwrap();
        assert_eq!(chunks.manifest(&name).await.unwrap().unwrap().0, manifest("b", 1));
        assert!(chunks.forget(&name, &Uid::from("b")).await.unwrap());
        assert!(chunks.forget(&name, &Uid::from("b")).await.unwrap());
        assert!(chunks.manifest(&name).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn of_many_at_once_one_wins() {
        let store = MemoryStore::new();
        let chunks = chunks(&store).await;
        store.delay(std::time::Duration::from_millis(1));
        let name = ObjectName::new("ns", "debian");
        let all: Vec<Manifest> = (0..8).map(|i| manifest(&format!("owner-{i}"), 1)).collect();
        let tries = all.iter().map(|manifest| chunks.publish(&name, manifest, &Expected::Absent));
        let results = futures::future::join_all(tries).await;
        let won: Vec<usize> = (0..8).filter(|i| results[*i].is_ok()).collect();
        assert_eq!(won.len(), 1);
        assert_eq!(chunks.manifest(&name).await.unwrap().unwrap().0, all[won[0]]);
    }

    #[tokio::test]
    async fn a_lost_answer_is_no_conflict() {
        let store = MemoryStore::new();
        let chunks = chunks(&store).await;
        let name = ObjectName::new("ns", "debian");
        store.break_next("put", "manifests", Fault::LoseAnswer);
        let first = chunks.publish(&name, &manifest("a", 1), &Expected::Absent).await;
        assert!(first.unwrap_err().is_transient());
        chunks.publish(&name, &manifest("a", 1), &Expected::Absent).await.unwrap();
    }

    #[tokio::test]
    async fn pins_come_and_go() {
        let store = MemoryStore::new();
        let chunks = chunks(&store).await;
        let (holder, digest) = (Uid::from("h"), Digest(Sha256Sum::of(b"i")));
        chunks.pin(&holder, &digest).await.unwrap();
        assert_eq!(chunks.pinned(&holder).await.unwrap(), Some(digest));
        chunks.unpin(&holder).await.unwrap();
        chunks.unpin(&holder).await.unwrap();
        assert_eq!(chunks.pinned(&holder).await.unwrap(), None);
    }
}
