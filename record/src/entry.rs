//! The saved forms of what a record holds. They are kept apart from live types, so that changing those cannot change the
//! format unnoticed; a change here that an older program would misread raises [`crate::FORMAT_VERSION`].

use std::collections::BTreeMap;
use std::path::PathBuf;

use berth_core::ids::{Digest, Uid};
use berth_core::units::{Bytes, Generation, Timestamp};
use serde::{Deserialize, Serialize};

/// Which share of a pool a promise is charged to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PromiseClass {
    /// Staged images, templates and scratch.
    Images,
    /// Writable volumes and snapshots.
    Volumes,
}

/// The object that a promise was made to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// `StagingReservation` or `StagedImage`, or [`Holder::LOCAL`].
    pub kind: String,
    /// Empty for a cluster-scoped kind.
    pub namespace: String,
    /// The object's name.
    pub name: String,
}

impl Holder {
    /// The kind of a holder that is no object of a cluster: the node made the promise itself, and takes it back with what it
    /// was made for.
    pub const LOCAL: &'static str = "Local";

    /// A holder of that kind.
    pub fn local(uid: &Uid) -> Self {
        Self { kind: Self::LOCAL.to_owned(), namespace: String::new(), name: uid.to_string() }
    }

    /// True if the node made the promise itself.
    pub fn is_local(&self) -> bool {
        self.kind == Self::LOCAL
    }
}

/// A promise of the ledger that this node has seen, keyed by its holder's UID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromiseEntry {
    /// The generation of the placement it belongs to.
    pub generation: Generation,
    /// The share it is charged to.
    pub class: PromiseClass,
    /// Data bytes promised.
    pub data: Bytes,
    /// Metadata bytes promised.
    pub metadata: Bytes,
    /// Whom it was made to.
    pub holder: Holder,
    /// The node may have used bytes under it, so a ledger without it is behind.
    pub obeyed: bool,
    /// The node has seen its bytes gone. Kept until the ledger has dropped the promise.
    pub released: bool,
}

/// How much of a staged image is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageState {
    /// Being filled; the first `offset` bytes are on stable storage.
    Filling {
        /// Bytes of the image, from its start, that need not be fetched again.
        offset: Bytes,
    },
    /// Complete and verified against the digest.
    Complete,
    /// Shown as a template, of which a part may be in its image store only.
    Shown {
        /// The size of a region of it, the same for ever.
        region: Bytes,
        /// How much of it is here.
        local: LocalState,
    },
}

impl ImageState {
    /// True if all of it is here, verified and durable.
    pub fn is_complete(self) -> bool {
        matches!(self, Self::Complete | Self::Shown { local: LocalState::Local, .. })
    }
}

/// How much of an image that is shown is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LocalState {
    /// What says which regions are here was never used, whatever lies in its place.
    New,
    /// It is used, and tells.
    Begun,
    /// All of it is here and durable.
    Local,
}

/// A staged image, keyed by its digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageEntry {
    /// The UID of the `StagedImage` that holds its promise.
    pub holder: Uid,
    /// How far it is.
    pub state: ImageState,
    /// The size a machine sees.
    pub virtual_size: Bytes,
    /// Bytes that it takes when complete.
    pub data: Bytes,
    /// When it was last wanted. Ranks what may be evicted, decides nothing else.
    pub last_used: Timestamp,
}

/// How far a volume's making or removal has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeState {
    /// The file or device may exist in part: make it again from the start.
    Creating,
    /// Usable.
    Ready,
    /// Must not be used again; its file or device may be gone already.
    Deleting,
}

/// What a volume reads where it has nothing of its own.
///
/// Saved as the digest alone, as format 1 had it, or as `{"template": UID}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum VolumeOrigin {
    /// A staged image.
    Image(Digest),
    /// The device of a template.
    Template {
        /// The template.
        template: Uid,
    },
}

/// What a volume is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeKind {
    /// To be written.
    #[default]
    Volume,
    /// To keep what another volume was at one moment. Never written.
    Snapshot,
}

/// A volume or snapshot, keyed by the UID of its reservation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeEntry {
    /// The generation of the placement it was made for.
    pub generation: Generation,
    /// Where it lies, relative to the pool's area.
    pub path: PathBuf,
    /// The size a machine sees.
    pub size: Bytes,
    /// What it started from, or what the volume that it is a copy of did.
    pub origin: Option<VolumeOrigin>,
    /// What it is for.
    #[serde(default)]
    pub kind: VolumeKind,
    /// The volume or snapshot that it was made from. It may be gone.
    #[serde(default)]
    pub source: Option<Uid>,
    /// How far it is.
    pub state: VolumeState,
    /// What people know it by: namespace and name of its claim and the like. Never decides anything.
    pub labels: BTreeMap<String, String>,
}

/// What a workload was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AttachmentMode {
    /// A block device.
    Block,
    /// A mounted file system.
    Filesystem,
    /// A device for whoever asked, without a workload of the cluster's.
    Device,
}

/// A volume made available on this node, keyed by the UID of its reservation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The loop device; `None` while it is being set up.
    pub loop_device: Option<PathBuf>,
    /// The file behind it.
    pub backing_file: PathBuf,
    /// Where it was staged for its workloads; empty for a device alone.
    pub staged_path: PathBuf,
    /// As what.
    pub mode: AttachmentMode,
}

/// Space given to a transfer, keyed by the UID of its reservation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagingEntry {
    /// The generation of the placement it belongs to.
    pub generation: Generation,
    /// The directory, relative to the pool's area.
    pub dir: PathBuf,
    /// The bound of what may lie in it.
    pub bytes: Bytes,
}

/// How much of the object that a file begins as is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileFetch {
    /// Nothing that counts.
    Waiting,
    /// Its first bytes, on stable storage.
    Fetching {
        /// The version that is read, as the store named it.
        version: String,
        /// The size of the object.
        size: Bytes,
        /// How much is there.
        offset: Bytes,
    },
    /// All of it, or the file does not begin as an object.
    Complete,
}

/// What is known of the bytes of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileContent {
    /// Nobody has changed them since they were last known to be in an object store.
    Unchanged,
    /// A pod may have changed them: nothing else holds what they are now.
    OnlyCopy,
    /// The same, and they are on their way to an object store. Nobody writes.
    Sending(Sending),
    /// The file is to go; it may be gone already.
    Removing,
}

/// How far the sending of a file is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sending {
    /// The upload, as the store named it; empty before there is one.
    pub upload: String,
    /// The size of the file.
    pub size: Bytes,
    /// When it was last changed, in nanoseconds since 1970, by the file system's clock.
    pub modified: i64,
    /// The size of each part but the last.
    pub part: Bytes,
    /// Parts that are there, from the first on.
    pub parts: Vec<SentPart>,
    /// The state of the running SHA-256 over them.
    pub hash: Vec<u8>,
}

/// A part that an object store has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SentPart {
    /// What the store calls it.
    pub etag: String,
    /// SHA-256 of its bytes.
    pub sha256: Digest,
}

/// Where the changes of a file go: all that is needed to send them when nobody can be asked any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileTarget {
    /// The namespace of the reservation, in which the Secret is.
    pub namespace: String,
    /// The Secret with the credentials; without one the node's own identity is used.
    pub secret: Option<String>,
    /// Scheme, host and port of the store.
    pub endpoint: String,
    /// The region that signatures name.
    pub region: String,
    /// The bucket.
    pub bucket: String,
    /// The key.
    pub key: String,
    /// True if the bucket is a part of the host's name.
    pub virtual_host: bool,
    /// PEM certificates to trust.
    pub ca_bundle: Option<String>,
}

/// A file as an object store has it, verified.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SentFile {
    /// The version, as the store named it.
    pub etag: Option<String>,
    /// The version's id in a bucket that keeps versions.
    pub version: Option<String>,
    /// SHA-256 of its bytes.
    pub sha256: Digest,
    /// Its size.
    pub size: Bytes,
}

/// A place where a pod sees a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePublication {
    /// The place.
    pub target: PathBuf,
    /// Whether the pod may write.
    pub writer: bool,
    /// The boot of the machine in which it was shown: a later one shows nothing of it.
    pub boot: String,
}

/// A file for pods, keyed by the UID of its reservation, whose work directory it lies in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// The generation of the placement it was begun for.
    pub generation: Generation,
    /// Its name in the directory.
    pub name: String,
    /// True once its directory was there: one that is gone after that is lost, and no blank one takes its place.
    #[serde(default)]
    pub made: bool,
    /// How much of its object is there.
    pub fetch: FileFetch,
    /// What is known of its bytes.
    pub content: FileContent,
    /// Where changes go; nowhere without one.
    pub target: Option<FileTarget>,
    /// Where pods see it, by the handles of their volumes.
    #[serde(default)]
    pub published: BTreeMap<String, FilePublication>,
    /// What was sent last.
    #[serde(default)]
    pub sent: Option<SentFile>,
}

impl FileEntry {
    /// True if nothing else holds its bytes.
    pub fn is_only_copy(&self) -> bool {
        matches!(self.content, FileContent::OnlyCopy | FileContent::Sending(_))
    }

    /// Where pods see it in this boot of the machine.
    pub fn shown<'a>(&'a self, boot: &'a str) -> impl Iterator<Item = (&'a String, &'a FilePublication)> {
        self.published.iter().filter(move |(_, publication)| publication.boot == boot)
    }
}

/// How far a thin device's making or removal has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ThinState {
    /// The kernel may have it, in part: make it again from the start.
    Making,
    /// It is there.
    Made,
    /// Must not be used again; it may be gone already.
    Removing,
}

/// A thin device, keyed by the UID that it is named after.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThinEntry {
    /// In which of the pool's two kernel pools it lies.
    pub class: PromiseClass,
    /// Its number there.
    pub id: u32,
    /// Its size, which the kernel does not keep.
    pub size: Bytes,
    /// How far it is.
    pub state: ThinState,
    /// The thin device that it is a snapshot of, which stays while this one is being made. It may be gone later.
    #[serde(default)]
    pub source: Option<Uid>,
}

/// How far the attaching or detaching of a template has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TemplateState {
    /// It may have a server or a device already: attach it again.
    Attaching,
    /// It has a device.
    Attached,
    /// Nothing may start from it any more; its device may be gone already.
    Detaching,
}

/// An image file that volumes of a pool may start from, keyed by the UID that its device carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateEntry {
    /// The image.
    pub file: PathBuf,
    /// Its format: `raw`, `qcow2`, `vmdk`, `vhd` or `vhdx`.
    pub format: String,
    /// The size a machine sees.
    pub virtual_size: Bytes,
    /// How far it is.
    pub state: TemplateState,
}

/// What a kernel pool was last asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThinCounters {
    /// The transaction that was begun last; the kernel pool has seen it, or the one before.
    pub transaction: u64,
    /// The number that was given to a thin device last.
    pub last_id: u32,
}

/// Work under way, keyed by the UID of the object that asks for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobEntry {
    /// The generation of the assignment; a lower one can change nothing.
    pub generation: Generation,
    /// The kind of the object that asks for it.
    pub kind: String,
    /// The stage it is in.
    pub stage: String,
    /// The stage's checkpoint, in the agent's own form.
    pub payload: serde_json::Value,
    /// When it last changed.
    pub updated: Timestamp,
}
