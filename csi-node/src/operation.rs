//! What a person or a script may ask of a node's pools: the same whether a command opens them itself or the agent that has
//! them open is asked through its socket. Nothing here needs a cluster.
//!
//! An operation and its answer are one line of JSON each: of `berth-node batch`, and of the agent's socket.
//!
//! Every operation may be repeated: what it names is told by a UID or a name, never by what happened to be free.

mod attachments;
mod carry_out;
mod check;
mod error;
mod found;
pub mod lines;
mod listing;
mod map;
mod pool_life;
mod space;
mod subjects;
mod volumes;

use std::collections::BTreeMap;
use std::path::PathBuf;

use berth_core::ids::{Digest, PoolName, Uid};
use berth_core::ledger::Class;
use berth_core::reason::Reason;
use berth_core::units::Bytes;
use serde::{Deserialize, Serialize};

pub use berth_core::extents::{MapFrom, MapLine};

pub use self::carry_out::carry_out;
pub use self::error::OperationError;
pub use self::map::{MOST_PARTS, read_delta, read_map};
use crate::area::Backend;

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum Operation {
    /// Makes a pool, and its area on this node.
    PoolCreate {
        /// Its name here.
        pool: PoolName,
        /// Its UID, which names everything that is made for it.
        uid: Uid,
        /// What it is made of.
        backend: Backend,
    },
    /// Takes over an area that is there already: of a pool that was forgotten, of another machine, or of an API server that
    /// was lost. What it holds stays as it is.
    PoolIntroduce {
        /// Its name here.
        pool: PoolName,
        /// Which area it is: the UID of the pool that it was made for.
        area: Uid,
        /// The UID of the pool that it is from now on; its own if absent.
        uid: Option<Uid>,
        /// Where it lies.
        backend: Backend,
    },
    /// Lets a pool go that nobody uses. What lies on its disk stays, and may be introduced again.
    PoolForget {
        /// Which.
        pool: PoolName,
    },
    /// Deletes a pool that nobody uses, with all it holds.
    PoolDestroy {
        /// Which.
        pool: PoolName,
        /// Without this, one that holds images or volumes is refused.
        with_contents: bool,
    },
    /// Makes a kernel pool at least so large, ahead of what is promised in it.
    PoolGrow {
        /// Which.
        pool: PoolName,
        /// Which of its kernel pools.
        class: Class,
        /// How large.
        size: Bytes,
    },
    /// Compares what is recorded with what the kernel has.
    PoolCheck {
        /// Which.
        pool: PoolName,
    },
    /// The pools of this node, and the areas on its disks that belong to none of them.
    PoolList {},
    /// Gives an image file a read-only block device, as an origin for volumes of this pool.
    TemplateAttach {
        /// The pool.
        pool: PoolName,
        /// What the template is called from now on.
        template: Uid,
        /// The image.
        file: PathBuf,
        /// Its format, as `qemu-img` names it; found from its head if absent.
        format: Option<String>,
    },
    /// Takes the device away. Refused while a volume reads from it.
    TemplateDetach {
        /// The pool.
        pool: PoolName,
        /// Which.
        template: Uid,
    },
    /// Makes a volume.
    VolumeCreate {
        /// The pool.
        pool: PoolName,
        /// What the volume is called from now on.
        volume: Uid,
        /// Its size; at least that of what it starts from.
        size: Bytes,
        /// What it starts from; zeros if absent.
        origin: Option<OriginName>,
        /// What people know it by.
        #[serde(default)]
        labels: BTreeMap<String, String>,
    },
    /// Makes a volume that starts as another volume or snapshot is now.
    VolumeClone {
        /// The pool.
        pool: PoolName,
        /// What the new volume is called.
        volume: Uid,
        /// What it starts from.
        source: Uid,
        /// Its size; that of the source if absent.
        size: Option<Bytes>,
    },
    /// Keeps a volume as it is now, read-only.
    VolumeSnapshot {
        /// The pool.
        pool: PoolName,
        /// What the snapshot is called.
        snapshot: Uid,
        /// The volume.
        source: Uid,
    },
    /// Makes a block device of a volume or snapshot appear.
    VolumeAttach {
        /// The pool.
        pool: PoolName,
        /// Which.
        volume: Uid,
        /// Refuse writes. A snapshot is always read-only.
        read_only: bool,
    },
    /// Takes that device away. Refused while somebody has it open.
    VolumeDetach {
        /// The pool.
        pool: PoolName,
        /// Which.
        volume: Uid,
    },
    /// Makes a volume larger, attached or not.
    VolumeResize {
        /// The pool.
        pool: PoolName,
        /// Which.
        volume: Uid,
        /// Its new size.
        size: Bytes,
    },
    /// Deletes a volume or snapshot that is not attached, and gives its space back.
    VolumeDestroy {
        /// The pool.
        pool: PoolName,
        /// Which.
        volume: Uid,
    },
    /// What a volume holds itself, and what it reads from elsewhere.
    VolumeMap {
        /// The pool.
        pool: PoolName,
        /// Which.
        volume: Uid,
        /// From where on. An answer of [`MOST_PARTS`] may end before the volume does: ask again from its end.
        #[serde(default)]
        offset: Bytes,
    },
    /// Where a volume differs from an older one, and what it reads there.
    VolumeDelta {
        /// The pool.
        pool: PoolName,
        /// What it is compared with.
        old: Uid,
        /// Which.
        volume: Uid,
        /// From where on, as of a map.
        #[serde(default)]
        offset: Bytes,
    },
    /// The volumes, snapshots and templates of a pool.
    VolumeList {
        /// The pool.
        pool: PoolName,
    },
}

/// What a volume may start from beside another volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum OriginName {
    /// A staged image.
    Image(Digest),
    /// A template that is attached.
    Template(Uid),
}

/// What an operation has to say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Outcome {
    /// It is done.
    Done,
    /// A device that appeared.
    Device(PathBuf),
    /// Pools, and areas that belong to none.
    Pools(Vec<PoolLine>),
    /// What was found; nothing if record and kernel agree.
    Findings(Vec<Finding>),
    /// Volumes, snapshots and templates.
    Volumes(Vec<VolumeLine>),
    /// Ascending, without gaps or overlaps, and together the whole volume, or as much of it as an answer may tell.
    Map(Vec<MapLine>),
}

/// A pool, or an area that belongs to none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolLine {
    /// Its name here; none for an area that is only found.
    pub pool: Option<PoolName>,
    /// Which area it is: the UID of the pool that it was made for.
    pub area: Uid,
    /// Where it lies.
    pub backend: Option<Backend>,
    /// `Open`, `Failed`, or `Found` for an area that may be introduced.
    pub state: PoolLineState,
    /// Why it is not open.
    pub message: Option<String>,
    /// Bytes: what may be promised, is promised, is used.
    pub space: Option<PoolSpace>,
}

/// How a pool is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PoolLineState {
    /// Open.
    Open,
    /// It cannot be opened.
    Failed,
    /// On a disk of this node, and not a pool of it.
    Found,
}

/// The space of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolSpace {
    /// What may be promised.
    pub total: Bytes,
    /// What is.
    pub promised: Bytes,
    /// What is in use.
    pub used: Bytes,
}

/// Something about which record and kernel do not agree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// What kind.
    pub kind: FindingKind,
    /// About what.
    pub about: String,
    /// One sentence.
    pub message: String,
}

/// Kinds of findings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum FindingKind {
    /// The kernel has a thin device or a logical volume of ours that nothing recorded needs: its space is lost.
    Leaked,
    /// Something recorded as there is not.
    Missing,
    /// It is there in another way than recorded: another size, transaction or origin.
    Different,
    /// A device of ours is suspended.
    Suspended,
    /// The metadata of a kernel pool is damaged.
    Damaged,
}

/// A volume, snapshot or template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeLine {
    /// Which.
    pub uid: Uid,
    /// What it is.
    pub kind: VolumeKind,
    /// The size a machine sees.
    pub size: Bytes,
    /// What it has of its own.
    pub mapped: Option<Bytes>,
    /// What it started from.
    pub origin: Option<OriginName>,
    /// Its device, while it is attached.
    pub device: Option<PathBuf>,
    /// What people know it by.
    pub labels: BTreeMap<String, String>,
}

/// What can be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeKind {
    /// A writable volume.
    Volume,
    /// A volume as it was once.
    Snapshot,
    /// An image that is only read.
    Template,
}

/// Why an operation was not done. Nothing is half done: repeated, it goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "camelCase")]
#[error("{reason}: {message}")]
pub struct Refusal {
    /// The machine-readable reason.
    pub reason: Reason,
    /// With the object, and numbers.
    pub message: String,
}

/// One line of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Answer {
    /// It was done, and is on stable storage.
    Done(Outcome),
    /// It was not.
    Refused(Refusal),
}
