//! Taking the index of an image to the local disk.

use std::path::{Path, PathBuf};

use berth_core::ids::{Digest, Sha256Sum};
use futures::StreamExt as _;
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt as _;

use super::index_file::hash_file;
use super::read::{ReadError, expect_digest, failed};
use super::store::ChunkStore;
use crate::ObjectStore;

/// The digest of a file, if it is there.
pub(super) async fn local_digest(path: &Path) -> Option<Digest> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || hash_file(&path).ok()).await.ok().flatten()
}

/// Streams the index to a file beside `path`, and moves it there when its digest is right.
pub(super) async fn take_index<S: ObjectStore>(
    chunks: &ChunkStore<S>,
    digest: Digest,
    path: &Path,
) -> Result<(), ReadError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    let part = PathBuf::from(name);
    let local = |source| ReadError::Local { digest, path: part.clone(), source };
    let mut object = chunks
        .store()
        .get(&chunks.layout().image(&digest), None, None)
        .await
        .map_err(|source| failed(digest, source))?;
    let mut file = tokio::fs::File::create(&part).await.map_err(local)?;
    let mut hash = Sha256::new();
    while let Some(piece) = object.body.next().await {
        let piece = piece.map_err(|source| failed(digest, source))?;
        hash.update(&piece);
        file.write_all(&piece).await.map_err(local)?;
    }
    file.flush().await.map_err(local)?;
    file.sync_data().await.map_err(local)?;
    expect_digest(digest, Digest(Sha256Sum(hash.finalize().into())))?;
    tokio::fs::rename(&part, path).await.map_err(local)
}
