//! What a person names as the source of a transfer.

use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_api::defaults::STALL_TIMEOUT_SECONDS;
use berth_core::ids::ObjectName;
use berth_core::stages::{Route, Shape};
use berth_core::transfer::{Found, Staging, choose};
use berth_core::units::Bytes;
use berth_image::{ImageFormat, probe_file, probe_file_as};
use berth_objectstore::chunks::store::ChunkStore;
use berth_objectstore::layout::StoreLayout;
use berth_objectstore::s3::S3Store;
use berth_objectstore::source::address::AddressPolicy;
use berth_objectstore::source::{HttpConfig, HttpSource, RangedSource};

use super::TransferCommandError;
use crate::commands::template::import::object_name;
use crate::transfer::probe::checked;
use crate::transfer::{Direct, Limits, Origin, Source, probe_source};

/// How a source is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceArg {
    /// `store:NAMESPACE/NAME`: an image of the image store.
    Stored(ObjectName),
    /// `http://…`, `https://…`.
    Url(String),
    /// A path.
    File(PathBuf),
}

/// Reads a source as it is written.
pub fn source_arg(text: &str) -> Result<SourceArg, String> {
    if let Some(name) = text.strip_prefix("store:") {
        return object_name(name).map(SourceArg::Stored);
    }
    if text.starts_with("http://") || text.starts_with("https://") {
        return Ok(SourceArg::Url(text.to_owned()));
    }
    if text.contains("://") {
        return Err("a path, an http or https address, or `store:NAMESPACE/NAME`".to_owned());
    }
    Ok(SourceArg::File(text.into()))
}

/// A source that was looked at.
pub(super) struct Looked {
    /// How it is read.
    pub source: Source,
    /// What is known of it.
    pub shape: Shape,
    /// What makes it this one and no other.
    pub identity: String,
}

/// Looks at a file on this machine.
pub(super) fn file(
    path: &Path,
    format: Option<ImageFormat>,
    limits: &Limits,
) -> Result<Looked, TransferCommandError> {
    use std::os::unix::fs::MetadataExt as _;
    let path = path.canonicalize().map_err(TransferCommandError::io("find", path))?;
    let meta = path.metadata().map_err(TransferCommandError::io("look at", &path))?;
    let probe = format.map_or_else(|| probe_file(&path), |format| probe_file_as(format, &path))?;
    let probed = checked(&probe, Bytes(meta.len()), limits)?;
    let shape = Shape { in_place: true, ..probed.shape(None) };
    let identity =
        format!("{} {} {} {}.{}", path.display(), meta.dev(), meta.size(), meta.mtime(), meta.mtime_nsec());
    Ok(Looked { source: Source::Staged(Origin::Local(path)), shape, identity })
}

/// Looks at the head of a file behind an address, and chooses the way that it takes, with the sum of its bytes asked for or not.
pub(super) async fn url(
    url: &str,
    format: Option<ImageFormat>,
    limits: &Limits,
    (staging, summed): (Staging, bool),
) -> Result<Looked, TransferCommandError> {
    let config = HttpConfig {
        url: url.to_owned(),
        headers: Vec::new(),
        ca_bundle: None,
        addresses: AddressPolicy::default(),
        stall: Duration::from_secs(STALL_TIMEOUT_SECONDS),
    };
    let source: RangedSource = HttpSource::new(config).map_err(crate::transfer::TransferError::from)?.into();
    let probed = probe_source(&source, limits, format).await?;
    let direct = choose(staging, probed.found(summed))?.route == Route::Direct;
    let shape = Shape { in_place: direct, ..probed.shape(None) };
    let source =
        if direct { Source::Direct(Direct::Ranged(source)) } else { Source::Staged(Origin::Remote(source)) };
    Ok(Looked { source, shape, identity: url.to_owned() })
}

/// Looks an image up in its image store.
pub(super) async fn stored(
    store: S3Store,
    prefix: &str,
    name: &ObjectName,
    staging: Staging,
) -> Result<Looked, TransferCommandError> {
    choose(staging, Found::Stored)?;
    let chunks = ChunkStore::open(store, StoreLayout::new(prefix)?).await?;
    let manifest = chunks.manifest(name).await.map_err(crate::transfer::TransferError::from)?;
    let (manifest, _) = manifest.ok_or_else(|| TransferCommandError::NoImage(name.clone()))?;
    let shape = Shape {
        source_bytes: manifest.data_bytes,
        virtual_size: manifest.virtual_size,
        converted: false,
        in_place: true,
        chunk_size: None,
    };
    let identity = manifest.digest.to_string();
    Ok(Looked { source: Source::Direct(Direct::Stored { chunks, digest: manifest.digest }), shape, identity })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_told_apart_by_how_they_are_written() {
        let stored = SourceArg::Stored(ObjectName::new("images", "debian"));
        assert_eq!(source_arg("store:images/debian"), Ok(stored));
        let url = "https://example.org/a.qcow2";
        assert_eq!(source_arg(url), Ok(SourceArg::Url(url.to_owned())));
        assert_eq!(source_arg("a/b.raw"), Ok(SourceArg::File("a/b.raw".into())));
        for wrong in ["store:debian", "ftp://example.org/a", "store:"] {
            assert!(source_arg(wrong).is_err(), "{wrong}");
        }
    }
}
