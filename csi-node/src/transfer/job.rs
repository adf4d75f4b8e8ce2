//! What a transfer is given, and what it hands back. Nothing here knows Kubernetes.

use std::path::PathBuf;
use std::time::Duration;

use berth_core::ids::{Digest, NodeName, ObjectName, Sha256Sum, Uid};
use berth_core::stages::{Shape, Stage};
use berth_core::transfer::Found;
use berth_core::units::{Bytes, Generation};
use berth_image::ImageFormat;
use serde::{Deserialize, Serialize};

use super::error::TransferError;

/// Bounds of one transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The largest virtual size.
    pub virtual_size: Bytes,
    /// The most bytes that the source may have.
    pub bytes: Bytes,
    /// How long the source, or a tool, may stand still.
    pub stall: Duration,
    /// How often a fault that passes is tried again.
    pub retries: u32,
    /// How much of a disk a tool converts at most before that is recorded: a multiple of 1 MiB.
    pub conversion_window: Bytes,
}

/// What [`Limits::conversion_window`] is in a cluster: some seconds of work, beside which the start of a tool is nothing.
pub const CONVERSION_WINDOW: Bytes = Bytes::mib(512);

/// One transfer.
#[derive(Clone, Debug)]
pub struct TransferJob {
    /// The object's UID: owner of session and manifest.
    pub uid: Uid,
    /// Of its assignment.
    pub generation: Generation,
    /// Its name, under which the image is published.
    pub name: ObjectName,
    /// The node that works on it.
    pub node: NodeName,
    /// Bounds.
    pub limits: Limits,
    /// The source's format; `None` if its head tells it.
    pub format: Option<ImageFormat>,
    /// What the source's bytes must add up to.
    pub checksum: Option<Sha256Sum>,
    /// The directory of its reservation.
    pub dir: PathBuf,
    /// What may be written there.
    pub promised: Bytes,
}

impl TransferJob {
    /// The fetched source.
    pub fn source_file(&self) -> PathBuf {
        self.dir.join("source")
    }

    /// The converted image.
    pub fn raw_file(&self) -> PathBuf {
        self.dir.join("raw")
    }

    /// The index that grows during the upload.
    pub fn index_file(&self) -> PathBuf {
        self.dir.join("index.caibx")
    }

    /// Everything that may lie in the directory.
    pub fn files(&self) -> [PathBuf; 4] {
        [self.source_file(), self.raw_file(), self.index_file(), self.dir.join("index.caibx.sizes")]
    }

    /// Refuses what needs more than is promised.
    pub(crate) fn check_promise(&self, needed: Bytes) -> Result<(), TransferError> {
        if needed > self.promised {
            return Err(TransferError::Promise { needed, promised: self.promised });
        }
        Ok(())
    }
}

/// What the head of a source told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probed {
    /// Its format.
    pub format: ImageFormat,
    /// Its bytes.
    pub source_bytes: Bytes,
    /// The size of the disk.
    pub virtual_size: Bytes,
    /// True if a tool must convert it.
    pub converted: bool,
    /// True if it can be read from the middle, and says which version it is.
    pub rereadable: bool,
}

impl Probed {
    /// What decides which way it takes, where the sum of its bytes is asked for or not.
    pub fn found(&self, summed: bool) -> Found {
        Found::File {
            raw: self.format == ImageFormat::Raw,
            converted: self.converted,
            rereadable: self.rereadable,
            whole_sectors: self.source_bytes.0.is_multiple_of(512),
            summed,
        }
    }

    /// What a transfer of it that fetches the source occupies and does; into an image store with chunks of this size, or
    /// into an object.
    pub fn shape(&self, chunk_size: Option<Bytes>) -> Shape {
        Shape {
            source_bytes: self.source_bytes,
            virtual_size: self.virtual_size,
            converted: self.converted,
            in_place: false,
            chunk_size,
        }
    }
}

/// The image as it lies in its store, verified.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Durable {
    /// Its identity.
    pub digest: Digest,
    /// The sum of the source's bytes, where all of them were read.
    pub source_digest: Option<Digest>,
    /// Bytes of its distinct chunks as they are stored.
    pub stored_bytes: Bytes,
    /// The size of the disk.
    pub virtual_size: Bytes,
    /// Bytes that are not holes: what a staged copy is charged.
    pub real_size: Bytes,
    /// How many distinct chunks it names.
    pub chunks: u64,
}

/// An object that an image has become, verified.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SentObject {
    /// Its size.
    pub size: Bytes,
    /// The size of the disk.
    pub virtual_size: Bytes,
    /// The sum of the source's bytes, where all of them were read.
    pub source_digest: Option<Digest>,
    /// What the store calls this version of it, where it says so.
    pub etag: Option<String>,
    /// The id of its version, in a bucket that keeps versions.
    pub version: Option<String>,
}

/// How far an attempt is, as it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The stage.
    pub stage: Stage,
    /// Bytes of the stage that are done.
    pub done: Bytes,
    /// Bytes of the stage.
    pub total: Bytes,
    /// Bytes that did not have to be moved.
    pub skipped: Bytes,
    /// Bytes that crossed the network.
    pub on_wire: Bytes,
}

/// Where a transfer tells how far it is. Called often; must not block.
pub trait Reporter: Send + Sync {
    /// Takes note.
    fn progress(&self, shape: &Shape, now: Snapshot);

    /// Takes note of what another node needs to go on. Said after it is recorded here.
    fn resume(&self, _text: String) {}
}
