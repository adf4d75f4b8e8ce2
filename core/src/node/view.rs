//! Everything that a node's decisions may look at: what the API asks of it, and what it has recorded and holds.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{Digest, Lineage, NodeName, ObjectName, PoolName, Uid};
use crate::ledger::{Class, LedgerRecord, Promise, is_behind};
use crate::transfer::TransferKind;
use crate::units::{Bytes, Generation, Timestamp};
use crate::view::{Access, LedgerView};

/// What one node knows at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeView {
    /// The node.
    pub node: NodeName,
    /// Pools that select this node, or whose area is open on it.
    pub pools: BTreeMap<PoolName, PoolOnNode>,
    /// Reservations that are assigned to this node.
    pub reservations: BTreeMap<Uid, NodeReservation>,
    /// Staged images of this node.
    pub images: BTreeMap<Uid, NodeImage>,
    /// Transfers that are assigned to this node, imports among them.
    pub transfers: BTreeMap<Uid, NodeTransfer>,
    /// Image stores that this node looks after.
    pub stores: BTreeMap<ObjectName, NodeStore>,
    /// Work that runs, or that waits to be tried again.
    pub jobs: BTreeSet<JobKey>,
}

/// A piece of long work. Two with the same key are the same work.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct JobKey {
    /// What is done.
    pub kind: JobKind,
    /// For which object.
    pub uid: Uid,
    /// At which of its placements.
    pub generation: Generation,
}

/// The kinds of long work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum JobKind {
    /// Reads the head of a source.
    Probe,
    /// Moves an image: a transfer or an import.
    Transfer,
    /// Fetches a staged image's chunks.
    Fill,
    /// Looks at an image store.
    Store,
    /// Fetches the object of a file reservation.
    Fetch,
    /// Sends a file that was changed to where its reservation wants it.
    Push,
}

/// One pool on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolOnNode {
    /// The pool's UID, if the pool exists and selects this node.
    pub wanted: Option<Uid>,
    /// What its area holds; `None` until it is open.
    pub area: Option<AreaView>,
    /// Its ledger, as last seen.
    pub ledger: Option<LedgerView>,
}

/// An open area, by its record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AreaView {
    /// The lineage of the ledger that is obeyed; `None` before the first.
    pub lineage: Option<Lineage>,
    /// The highest revision of it that is recorded.
    pub revision: u64,
    /// How large the kernel pool of volumes has to be made by that, where it is smaller.
    pub volumes_lack: Option<Bytes>,
    /// Promises that were obeyed, by holder.
    pub promises: BTreeMap<Uid, ObeyedPromise>,
    /// Staged images.
    pub images: BTreeMap<Digest, HeldImage>,
    /// Volumes, by reservation.
    pub volumes: BTreeMap<Uid, HeldVolume>,
    /// Work directories, by reservation.
    pub work_dirs: BTreeMap<Uid, HeldWorkDir>,
    /// Files for pods, by reservation. Each lies in the work directory of its reservation.
    pub files: BTreeMap<Uid, HeldFile>,
}

/// A recorded promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObeyedPromise {
    /// Of the holder's assignment.
    pub generation: Generation,
    /// How many bytes of data.
    pub data: Bytes,
    /// What it counts as.
    pub class: Class,
    /// True once its bytes are gone.
    pub released: bool,
    /// True once the API server knows that it is obeyed.
    pub reported: bool,
}

impl ObeyedPromise {
    /// A promise of a ledger, just obeyed.
    pub const fn new(promise: &Promise) -> Self {
        let (generation, data, class) = (promise.generation, promise.charge.data, promise.class);
        Self { generation, data, class, released: false, reported: false }
    }
}

/// A recorded image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldImage {
    /// The `StagedImage` that it was made for.
    pub holder: Uid,
    /// True if volumes can be made from it, whether all of it is there or not.
    pub usable: bool,
    /// True if all of it is there, verified.
    pub complete: bool,
    /// True if a volume reads what it has not written from it.
    pub in_use: bool,
    /// When it was last wanted.
    pub last_used: Timestamp,
}

/// A recorded volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldVolume {
    /// The generation that it was made for.
    pub generation: Generation,
    /// How large it is, as recorded.
    pub size: Bytes,
    /// True if it can be used.
    pub ready: bool,
    /// True if it could be used and its file is gone: what it held is lost, and nothing takes its place.
    pub lost: bool,
    /// True while it is staged for a workload.
    pub attached: bool,
}

/// A recorded work directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldWorkDir {
    /// The generation that it was made for.
    pub generation: Generation,
    /// True if the directory is really there.
    pub made: bool,
}

/// A recorded file for pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldFile {
    /// The generation that it was begun for.
    pub generation: Generation,
    /// True if all of its object is there, or it has none.
    pub fetched: bool,
    /// True if its directory was there and is gone: what it held is lost, and nothing takes its place.
    pub lost: bool,
    /// Who sees it.
    pub shown: Shown,
    /// True if a pod may have changed it since it was last known to be in an object store: these are the only bytes.
    pub only_copy: bool,
}

/// Whether pods of this node see a file. By the record; a node that was booted again shows nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shown {
    /// None does.
    #[default]
    ToNone,
    /// To any number of them, which only read.
    ToReaders,
    /// To one, which may write.
    ToWriter,
}

/// What a reservation wants of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeFile {
    /// True if it begins as an object.
    pub fetches: bool,
    /// True if fetching has ended without success: it is not tried again.
    pub failed: bool,
    /// True if somebody consents to losing the only copy.
    pub discards: bool,
}

/// A reservation that is assigned to this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeReservation {
    /// Its name.
    pub name: ObjectName,
    /// True if it is being deleted.
    pub deleting: bool,
    /// The pool that it is assigned to.
    pub pool: PoolName,
    /// The generation of the assignment.
    pub generation: Generation,
    /// How the space is used.
    pub access: Access,
    /// What its volume starts from.
    pub image: Option<Digest>,
    /// The file that its directory is for, if it is for one that pods see.
    pub file: Option<NodeFile>,
    /// The transfer that works in it, if it was made for one.
    pub transfer: Option<Uid>,
    /// What people know its volume by.
    pub labels: BTreeMap<String, String>,
}

/// A `StagedImage` of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeImage {
    /// Its name.
    pub name: String,
    /// True if it is being deleted.
    pub deleting: bool,
    /// The pool.
    pub pool: PoolName,
    /// Its identity.
    pub digest: Digest,
    /// Bytes that are not holes.
    pub data: Bytes,
    /// The size of the disk.
    pub virtual_size: Bytes,
}

/// A transfer or an import that is assigned to this node.
#[allow(clippy::struct_excessive_bools)] // what was seen of it, each on its own
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeTransfer {
    /// Which of the two.
    pub kind: TransferKind,
    /// Its name.
    pub name: ObjectName,
    /// True if it is being deleted.
    pub deleting: bool,
    /// The generation of the assignment.
    pub generation: Generation,
    /// The reservation that it stages in, by name.
    pub reservation: ObjectName,
    /// True if a person has it pause: what it has done stays, and nothing is done.
    pub suspended: bool,
    /// True if its plan is known.
    pub planned: bool,
    /// True if all of it is at its destination, or if it has ended without success, by its node's word or by the operator's.
    pub ended: bool,
    /// The generation whose traces are gone.
    pub released: Option<Generation>,
}

/// An image store that this node looks after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeStore {
    /// Its UID.
    pub uid: Uid,
    /// The generation of the assignment.
    pub generation: Generation,
    /// When it is to be looked at again.
    pub due: Timestamp,
}

impl AreaView {
    /// True if nothing is promised in it and nothing lies in it.
    pub fn is_idle(&self) -> bool {
        self.promises.values().all(|promise| promise.released)
            && self.images.is_empty()
            && self.volumes.is_empty()
            && self.work_dirs.is_empty()
    }
}

impl AreaView {
    /// The reservations whose bytes something on the node uses now: as long as one is among them, its reference does not
    /// expire.
    pub fn in_use(&self) -> impl Iterator<Item = &Uid> {
        let attached = self.volumes.iter().filter(|(_, volume)| volume.attached).map(|(uid, _)| uid);
        attached.chain(self.files.iter().filter(|(_, file)| file.is_in_use()).map(|(uid, _)| uid))
    }
}

impl HeldFile {
    /// True while pods see it, while it is fetched, and while it is the only copy.
    pub fn is_in_use(&self) -> bool {
        self.shown != Shown::ToNone || self.only_copy || !(self.fetched || self.lost)
    }
}

impl LedgerRecord for AreaView {
    fn lineage(&self) -> Option<&Lineage> {
        self.lineage.as_ref()
    }

    fn revision(&self) -> u64 {
        self.revision
    }

    fn held(&self) -> impl Iterator<Item = (&Uid, Generation)> {
        let kept = self.promises.iter().filter(|(_, promise)| !promise.released);
        kept.map(|(uid, promise)| (uid, promise.generation))
    }
}

impl PoolOnNode {
    /// The promise to `holder` in the ledger, if the ledger may be obeyed.
    pub fn promise(&self, holder: &Uid) -> Option<&Promise> {
        let ledger = self.ledger.as_ref()?;
        let area = self.area.as_ref()?;
        if is_behind(ledger, area).is_some() {
            return None;
        }
        ledger.promises.get(holder)
    }
}
