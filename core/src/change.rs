//! The closed set of writes that the operator may make. Applying one decides nothing.

use std::collections::BTreeMap;

use crate::ids::{NodeName, ObjectName, PoolName, Uid};
use crate::ledger::{Holder, Promise, Rebuilt};
use crate::reason::Reason;
use crate::reclaim::Cause;
use crate::reservation::Claim;
use crate::transfer::TransferId;
use crate::units::{Bytes, Generation, Timestamp};
use crate::view::{
    Access, AssignedImage, DurableImage, LedgerCapacity, ObjectVersion, Placement, ReservationState,
    TransferState,
};

/// One write, or a wish to be asked again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Make the ledger of a pool on a node, empty, with a new lineage and revision 1.
    CreateLedger {
        /// The pool.
        pool: PoolName,
        /// The node.
        node: NodeName,
        /// What may be promised.
        capacity: LedgerCapacity,
    },
    /// Replace a ledger's capacity and promises, if it is still at this version. The next change of the list is made
    /// only if this one went through.
    WriteLedger {
        /// Its name.
        name: String,
        /// The version that is replaced.
        version: ObjectVersion,
        /// The revision to write: one above the one seen.
        revision: u64,
        /// What may be promised.
        capacity: LedgerCapacity,
        /// All promises.
        promises: BTreeMap<Uid, Promise>,
    },
    /// Replace a ledger that is behind by one that holds what its node has recorded, with a new lineage, if ledger and report
    /// are still at these versions.
    RebuildLedger {
        /// Its name.
        name: String,
        /// The version that is replaced.
        version: ObjectVersion,
        /// The node whose report it is made from.
        node: NodeName,
        /// The version of that report.
        report: ObjectVersion,
        /// The revision to write: above the ledger's and the node's.
        revision: u64,
        /// What may be promised.
        capacity: LedgerCapacity,
        /// All promises.
        promises: BTreeMap<Uid, Promise>,
        /// What it is made from.
        rebuilt: Rebuilt,
    },
    /// Delete the ledger of a pool that is being deleted, if it is still at this version: empty.
    DeleteLedger {
        /// Its name.
        name: String,
        /// The version that is deleted.
        version: ObjectVersion,
    },
    /// Put the pool finalizer on, before the pool has ledgers.
    GuardPool {
        /// Which.
        name: PoolName,
        /// Its UID.
        uid: Uid,
    },
    /// Take it off.
    UnguardPool {
        /// Which.
        name: PoolName,
        /// Its UID.
        uid: Uid,
    },
    /// Put the release finalizer on a reservation, before anything is promised to it.
    GuardReservation {
        /// Which.
        name: ObjectName,
        /// Its UID.
        uid: Uid,
    },
    /// Take the release finalizer off.
    UnguardReservation {
        /// Which.
        name: ObjectName,
        /// Its UID.
        uid: Uid,
    },
    /// Fix a reservation's placement, if it is still at this version.
    AssignReservation {
        /// Which.
        name: ObjectName,
        /// The version that is replaced.
        version: ObjectVersion,
        /// Where.
        placement: Placement,
        /// What it starts from.
        image: Option<AssignedImage>,
        /// True if that was promised before.
        reused: bool,
        /// The places that were looked at, this one among them.
        considered: Vec<Considered>,
    },
    /// Delete a reservation that nothing has used for as long as it may stay unused, if it is still at this version: one
    /// that was renewed meanwhile stays.
    ExpireReservation {
        /// Which.
        name: ObjectName,
        /// Its UID.
        uid: Uid,
        /// The version that was decided about.
        version: ObjectVersion,
        /// Where it is.
        pool: PoolName,
        /// For people, with numbers.
        message: String,
    },
    /// Go on with the next change only if the API server confirms that a volume's claim will not ask for it again, and that the
    /// `PersistentVolume` which would be called like it names another volume, if there is one.
    ConfirmAbandoned {
        /// The volume's reservation.
        reservation: Uid,
        /// Its claim.
        claim: Claim,
        /// The node that it was asked for on.
        node: NodeName,
    },
    /// Note on a reservation that a `PersistentVolume` names its volume.
    NotePersistent {
        /// Which.
        name: ObjectName,
        /// Its UID.
        uid: Uid,
        /// The `PersistentVolume`.
        volume: String,
    },
    /// Delete the reservation of a volume that nobody will ask for again.
    AbandonReservation {
        /// Which.
        name: ObjectName,
        /// Its UID.
        uid: Uid,
        /// For people.
        message: String,
    },
    /// Say what became of a reservation, if it is still at this version: `Refused` is for ever, so that its promises may
    /// go, and an operator that saw an older version must not take it back. (By server-side apply this is
    /// `metadata.resourceVersion` in the patch.) Written only where it differs.
    ReportReservation {
        /// Which.
        name: ObjectName,
        /// Its UID.
        uid: Uid,
        /// The version that is replaced.
        version: ObjectVersion,
        /// Its state and why.
        report: ReservationReport,
    },
    /// Make the reservation that a transfer needs, owned by it.
    CreateReservation {
        /// Its name.
        name: ObjectName,
        /// The transfer.
        owner: TransferId,
        /// The transfer's pools.
        pools: crate::view::PoolChoice,
        /// The most that the work occupies.
        size: Bytes,
        /// How it is used.
        access: Access,
    },
    /// Delete a reservation.
    DeleteReservation {
        /// Which.
        name: ObjectName,
        /// Its UID.
        uid: Uid,
    },
    /// Make a staged image, guarded by the release finalizer; nothing is promised to it yet.
    CreateImage {
        /// Its name.
        name: String,
        /// What and where.
        image: DurableImage,
        /// The pool.
        pool: PoolName,
        /// The node.
        node: NodeName,
        /// The image store that has it.
        store: ObjectName,
    },
    /// Delete a staged image that its ledger has retired ([`crate::retire`]), or that has no ledger.
    DeleteImage {
        /// Its name.
        name: String,
        /// Its UID.
        uid: Uid,
    },
    /// Mark a staged image whose template is being deleted: it may go although no other copy is known.
    GiveUpImage {
        /// Its name.
        name: String,
        /// Its UID.
        uid: Uid,
    },
    /// Say why images are retired by the ledger write before it in the list.
    ReportReclaim {
        /// The pool.
        pool: PoolName,
        /// Why they go.
        cause: Cause,
        /// How many.
        images: u32,
        /// What is promised to them.
        bytes: Bytes,
    },
    /// Take the release finalizer off a staged image.
    UnguardImage {
        /// Its name.
        name: String,
        /// Its UID.
        uid: Uid,
    },
    /// Put the finalizer of its kind on a transfer.
    GuardTransfer {
        /// Which.
        id: TransferId,
    },
    /// Take it off.
    UnguardTransfer {
        /// Which.
        id: TransferId,
    },
    /// Fix a transfer's placement, if it is still at this version.
    AssignTransfer {
        /// Which.
        id: TransferId,
        /// The version that is replaced.
        version: ObjectVersion,
        /// Where.
        placement: Placement,
        /// What asked for it to be tried again, if something did: recorded with it.
        retried: Option<String>,
    },
    /// Say what became of a transfer, if it is still at this version: what ended must not be taken back by an operator
    /// that saw an older one. Written only where it differs.
    ReportTransfer {
        /// Which.
        id: TransferId,
        /// The version that is replaced.
        version: ObjectVersion,
        /// Its state.
        state: TransferState,
        /// Why.
        reason: Reason,
        /// For people, with numbers.
        message: String,
        /// Whether its reservation is there.
        reserved: bool,
    },
    /// Delete a transfer that ended as long ago as it says, if it is still at this version: one that is to be tried again stays.
    DeleteTransfer {
        /// Which.
        id: TransferId,
        /// The version that was decided about.
        version: ObjectVersion,
    },
    /// Fix the node that looks after an image store, if it is still at this version.
    AssignStore {
        /// Which.
        name: ObjectName,
        /// The version that is replaced.
        version: ObjectVersion,
        /// The node.
        node: NodeName,
        /// Rises with each new node.
        generation: Generation,
    },
    /// Say what a pool holds. Written only where it differs.
    ReportPool {
        /// Which.
        name: PoolName,
        /// What it holds.
        report: PoolReport,
    },
    /// Not a write: asks the API server itself, not what was watched, whether the holder of a promise is gone (no object
    /// of this name, or one with another UID). What follows in the list is made only if it is. A UID never comes back, so
    /// the answer stays true.
    ConfirmGone {
        /// Whose promise it is.
        holder: Holder,
        /// Its UID.
        uid: Uid,
    },
    /// Ask again after this many milliseconds, whatever happens until then.
    RetryAfter {
        /// How long.
        millis: u64,
    },
}

/// What became of a reservation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReservationReport {
    /// Its state.
    pub state: ReservationState,
    /// Why.
    pub reason: Reason,
    /// For people, with numbers.
    pub message: String,
    /// Its place in the queue: position from 1, and the bytes ahead of it.
    pub queue: Option<(u32, Bytes)>,
    /// How many bytes were missing.
    pub shortfall: Option<Bytes>,
    /// The places that were looked at, while it has none. Where it was given one, they are told with the assignment.
    pub considered: Vec<Considered>,
    /// When it ends, if nothing uses it until then.
    pub expires: Option<Timestamp>,
    /// What would happen, where that is all that was asked for.
    pub dry_run: Option<DryRun>,
}

impl ReservationReport {
    /// A state and why, and nothing else.
    pub const fn new(state: ReservationState, reason: Reason, message: String) -> Self {
        Self {
            state,
            reason,
            message,
            queue: None,
            shortfall: None,
            considered: Vec::new(),
            expires: None,
            dry_run: None,
        }
    }
}

/// A place that was looked at for a reservation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Considered {
    /// The pool.
    pub pool: PoolName,
    /// The node.
    pub node: NodeName,
    /// Why it was chosen, or why not.
    pub reason: Reason,
    /// For people, with numbers.
    pub message: String,
    /// How many bytes are missing there, if it is bytes that are missing.
    pub shortfall: Option<Bytes>,
    /// True for the place that the reservation was given.
    pub chosen: bool,
}

/// What would happen to a reservation that is only tried.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DryRun {
    /// True if it would be promised now.
    pub fits: bool,
    /// Where.
    pub place: Option<(PoolName, NodeName)>,
    /// Its position among those that wait, from 1, if it would have to wait.
    pub position: Option<u32>,
    /// The most that would be promised for it, the image that it starts from included.
    pub peak: Bytes,
    /// How many bytes are missing where least are.
    pub shortfall: Option<Bytes>,
    /// Names of the staged images that would have to go first.
    pub reclaims: Vec<String>,
}

/// What a pool holds, over all nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolReport {
    /// True if at least one node carries it and all that do can use it.
    pub ready: bool,
    /// Why.
    pub reason: Reason,
    /// For people.
    pub message: String,
    /// How many nodes carry it.
    pub nodes: u32,
    /// What may be promised in all.
    pub total: Bytes,
    /// What promises count for.
    pub promised: Bytes,
    /// What is promised to volumes, in full.
    pub volumes: Bytes,
    /// What is written.
    pub used: Bytes,
    /// What is promised to images that nothing refers to.
    pub unreferenced: Bytes,
    /// Requests that wait.
    pub queued: u32,
    /// What is not as strong as usual.
    pub constraints: Vec<Reason>,
}
