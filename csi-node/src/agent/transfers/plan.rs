//! What will be done, known from the head of the source before anything is; and the source as the work then reads it.

use std::sync::Arc;
use std::time::Duration;

use berth_api::fields::{PlannedStaging, TransferPlan};
use berth_api::parse::{Asked, AskedDestination, AskedSource};
use berth_core::ids::{Digest, ObjectName};
use berth_core::stages::{Route, Shape};
use berth_core::transfer::{Chosen, Found, SourceFormat, Staging, TransferKind, choose};
use berth_core::units::Bytes;
use berth_image::{ImageFormat, Output};
use berth_objectstore::chunks::store::{ChunkStore, OpenError};
use berth_objectstore::s3::S3Store;

use super::super::sources;
use super::super::stores::{self, AccessError};
use super::{Subject, WorkError, limits};
use crate::node::Node;
use crate::transfer::{self, Direct, Origin, Source, TransferError, TransferJob, probe_source};

/// Reads the head of the source, and says what will be done.
pub(super) async fn plan(node: &Arc<Node>, subject: &Subject) -> Result<TransferPlan, WorkError> {
    let asked = subject.asked()?;
    let namespace = subject.name().namespace;
    let chunk_size = chunk_size(node, &asked.destination)?;
    let (format, found, shape) = match &asked.source {
        AskedSource::StoreImage { store, image } => stored(node, store, image, chunk_size).await?,
        file => {
            let limits = limits(&asked);
            let source = sources::open(node, &namespace, file, limits.stall).await?;
            let probed = probe_source(&source, &limits, asked.source_format.map(image_format)).await?;
            // An import tells the sum of its source.
            let summed = asked.checksum.is_some() || subject.kind() == TransferKind::Import;
            (format!("{:?}", probed.format), probed.found(summed), probed.shape(chunk_size))
        }
    };
    let limit = asked.limits.virtual_size;
    if shape.virtual_size > limit {
        return Err(TransferError::VirtualSize { found: shape.virtual_size, limit }.into());
    }
    if let AskedDestination::Object { format, .. } = &asked.destination {
        let output = Output { format: *format, virtual_size: shape.virtual_size, level: None, id: [0; 16] };
        output.plan().map_err(TransferError::from)?;
    }
    let chosen = choose(wanted(asked.staging, node.config.default_staging, found), found)?;
    Ok(told(format, chosen, Shape { in_place: chosen.route == Route::Direct, ..shape }))
}

/// What is wished: by the object itself, or by default, which asks nothing of an image of an image store.
fn wanted(asked: Option<Staging>, default: Staging, found: Found) -> Staging {
    asked.unwrap_or(if found == Found::Stored { Staging::Auto } else { default })
}

fn told(format: String, chosen: Chosen, shape: Shape) -> TransferPlan {
    TransferPlan {
        format,
        source_bytes: shape.source_bytes.as_i64(),
        virtual_size: shape.virtual_size.as_i64(),
        peak_bytes: shape.peak_bytes().as_i64(),
        steps: shape.stages().iter().map(|stage| stage.as_str().to_owned()).collect(),
        why: chosen.why.to_owned(),
        staging: Some(match chosen.route {
            Route::Direct => PlannedStaging::Direct,
            Route::Staged => PlannedStaging::Staged,
        }),
    }
}

/// The chunk size of the image store that it goes into, if it goes into one.
fn chunk_size(node: &Node, destination: &AskedDestination) -> Result<Option<Bytes>, WorkError> {
    let AskedDestination::StoreImage { store, .. } = destination else { return Ok(None) };
    let object = stores::find(node, store)?;
    Ok(Some(stores::chunk_size(object.spec.chunk_size.as_ref())?))
}

async fn stored(
    node: &Node,
    store: &ObjectName,
    image: &ObjectName,
    chunk_size: Option<Bytes>,
) -> Result<(String, Found, Shape), WorkError> {
    let chunks = stores::open(node, store).await?;
    let manifest = chunks.manifest(image).await.map_err(TransferError::from)?;
    let (manifest, _) = manifest.ok_or_else(|| no_image(store, image))?;
    let shape = Shape {
        source_bytes: manifest.data_bytes,
        virtual_size: manifest.virtual_size,
        converted: false,
        in_place: true,
        chunk_size,
    };
    Ok(("Chunked".to_owned(), Found::Stored, shape))
}

fn no_image(store: &ObjectName, image: &ObjectName) -> WorkError {
    WorkError::NoImage { store: store.clone(), image: image.clone() }
}

async fn find_image(
    node: &Node,
    store: &ObjectName,
    image: &ObjectName,
) -> Result<(ChunkStore<S3Store>, Digest), WorkError> {
    let chunks = stores::open(node, store).await?;
    let manifest = chunks.manifest(image).await.map_err(TransferError::from)?;
    let (manifest, _) = manifest.ok_or_else(|| no_image(store, image))?;
    Ok((chunks, manifest.digest))
}

/// The source as it was planned to be read.
pub(super) async fn source(
    node: &Node,
    namespace: &str,
    asked: &Asked,
    planned: Option<PlannedStaging>,
) -> Result<Source, WorkError> {
    if let AskedSource::StoreImage { store, image } = &asked.source {
        let (chunks, digest) = find_image(node, store, image).await?;
        return Ok(Source::Direct(Direct::Stored { chunks, digest }));
    }
    let stall = Duration::from_secs(asked.limits.stall_timeout);
    let source = sources::open(node, namespace, &asked.source, stall).await?;
    Ok(match planned {
        Some(PlannedStaging::Direct) => Source::Direct(Direct::Ranged(source)),
        Some(PlannedStaging::Staged) | None => Source::Staged(Origin::Remote(source)),
    })
}

/// Tells the image store of a source, if it is one, that this reads it no more. One that is gone need not be told.
pub(super) async fn let_go(node: &Node, source: &AskedSource, job: &TransferJob) -> Result<(), WorkError> {
    let AskedSource::StoreImage { store, .. } = source else { return Ok(()) };
    match stores::open(node, store).await {
        Ok(chunks) => Ok(transfer::unpin(job, &chunks).await?),
        Err(AccessError::Missing(_) | AccessError::Open { source: OpenError::Absent { .. }, .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The format that is given, as the engine calls it.
pub(super) fn image_format(given: SourceFormat) -> ImageFormat {
    match given {
        SourceFormat::Raw => ImageFormat::Raw,
        SourceFormat::Qcow2 => ImageFormat::Qcow2,
        SourceFormat::Vmdk => ImageFormat::Vmdk,
        SourceFormat::Vhd => ImageFormat::Vhd,
        SourceFormat::Vhdx => ImageFormat::Vhdx,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a18_the_default_of_the_cluster_holds_where_an_object_says_nothing() {
        let file =
            Found::File { raw: true, converted: false, rereadable: true, whole_sectors: true, summed: false };
        for default in [Staging::Auto, Staging::Never, Staging::Required] {
            assert_eq!(wanted(None, default, file), default);
            assert_eq!(wanted(Some(Staging::Auto), default, file), Staging::Auto, "it says so itself");
            assert_eq!(wanted(None, default, Found::Stored), Staging::Auto, "there is nothing to stage");
            assert_eq!(wanted(Some(Staging::Required), default, Found::Stored), Staging::Required);
        }
    }
}
