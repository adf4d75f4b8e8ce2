//! What the operator's decisions may look at: the objects as the API server last showed them, already parsed.

mod claims;
mod index;
mod policy;
mod scope;
mod told;
mod transfer;
mod unreadable;

use std::collections::{BTreeMap, BTreeSet};

use crate::change::Change;
use crate::ids::{Digest, Lineage, NodeName, ObjectName, PoolName, Uid};
use crate::ledger::{Behind, Charge, Promise, Rebuilt, is_behind};
use crate::overcommit::{Overcommit, Percent};
use crate::reason::Reason;
use crate::reservation::Claim;
use crate::thin::{BlockSize, ThinState};
use crate::units::{Bytes, Generation, Timestamp};

pub use claims::Claims;
pub use index::Index;
pub use policy::{NodeLossPolicy, ReclaimPolicy, Service, Strategy, TenantLimit, WhenFull};
pub use transfer::{DurableImage, TransferState, TransferView, WorkError};
pub use unreadable::Unreadable;

/// The version of an object that a write replaces: the API server's `resourceVersion`, which only it understands.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectVersion(pub String);

/// Which pool, on which node, for the how-manieth time.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Placement {
    /// The pool.
    pub pool: PoolName,
    /// The node.
    pub node: NodeName,
    /// Rises with each new placement.
    pub generation: Generation,
}

/// A `StagingPool`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolView {
    /// Its name.
    pub name: PoolName,
    /// Its UID.
    pub uid: Uid,
    /// Its labels, for selectors.
    pub labels: BTreeMap<String, String>,
    /// Set if it is made of two kernel pools: the size of their blocks.
    pub block: Option<BlockSize>,
    /// At most this much is promised on each node.
    pub limit: Option<Bytes>,
    /// How far volumes may be promised beyond what is there; more than all only where `block` is set.
    pub overcommit: Percent,
    /// What happens to requests that do not fit and do not say.
    pub when_full: WhenFull,
    /// How long a request may wait, in milliseconds.
    pub max_queue_millis: u64,
    /// How many requests may wait.
    pub max_queued: u32,
    /// Which of several places a request gets.
    pub strategy: Strategy,
    /// What the reservations of one namespace may hold.
    pub tenant_limits: Vec<TenantLimit>,
    /// When unreferenced images go.
    pub reclaim: ReclaimPolicy,
    /// What becomes of promises on a node that is lost.
    pub node_loss: NodeLossPolicy,
    /// Whether it takes anything new.
    pub service: Service,
    /// Nodes on which it is [`Service::Draining`] in any case.
    pub drain_nodes: BTreeSet<NodeName>,
    /// True if it is being deleted: it takes nothing new.
    pub deleting: bool,
    /// True if it carries the pool finalizer.
    pub has_finalizer: bool,
    /// Set if a field's value cannot be used: the message.
    pub invalid: Option<String>,
}

/// A `StagingNode` and its Lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeState {
    /// Its name.
    pub name: NodeName,
    /// The version of its report.
    pub version: ObjectVersion,
    /// True if its Lease is fresh.
    pub live: bool,
    /// True if it has reported since this operator began to watch: before that, its ledgers admit nothing.
    pub reported: bool,
    /// True if this operator has listened for as long as its Lease lasts, and heard nothing: not merely not yet.
    pub silent: bool,
    /// The zone it is in, if it says.
    pub zone: Option<String>,
    /// The pools on it.
    pub pools: BTreeMap<PoolName, NodePoolState>,
}

/// What a node reports of one pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePoolState {
    /// True if the area can be used.
    pub usable: bool,
    /// Why.
    pub reason: Reason,
    /// For people.
    pub message: String,
    /// What may be promised.
    pub total: Bytes,
    /// What is written.
    pub used: Bytes,
    /// True if the bound is not enforced.
    pub advisory: bool,
    /// The two kernel pools, where it is made of them.
    pub thin: Option<ThinState>,
    /// The lineage that the node obeys.
    pub lineage: Option<Lineage>,
    /// The highest revision that the node has recorded.
    pub obeyed_revision: u64,
    /// Promises obeyed whose bytes are gone.
    pub released: BTreeMap<Uid, Generation>,
    /// Promises obeyed whose bytes are there.
    pub obeyed: BTreeMap<Uid, Generation>,
    /// What the node has recorded of those promises, as far as it tells: all that a ledger says of one.
    pub recorded: BTreeMap<Uid, Promise>,
    /// Reservations whose bytes something on the node uses now.
    pub in_use: BTreeSet<Uid>,
}

/// A `StagingLedger`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LedgerView {
    /// Its name.
    pub name: String,
    /// The version that a write replaces.
    pub version: ObjectVersion,
    /// The pool.
    pub pool: PoolName,
    /// The node.
    pub node: NodeName,
    /// New each time it is made or rebuilt.
    pub lineage: Lineage,
    /// Rises by one with every write.
    pub revision: u64,
    /// Set if it was rebuilt from its node's record: from what.
    pub rebuilt: Option<Rebuilt>,
    /// What may be promised.
    pub capacity: LedgerCapacity,
    /// By holder.
    pub promises: BTreeMap<Uid, Promise>,
}

/// What may be promised: per class, and in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LedgerCapacity {
    /// For staged images and work space.
    pub images: Charge,
    /// For volumes and snapshots.
    pub volumes: Charge,
    /// For both together.
    pub total: Charge,
    /// How far volumes are promised beyond that.
    pub overcommit: Overcommit,
}

/// Which pools a request may go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PoolChoice {
    /// This one.
    Named(PoolName),
    /// Any with these labels; none given means any at all.
    Labelled(BTreeMap<String, String>),
}

/// How reserved space is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing is written.
    Stream,
    /// A directory.
    File,
    /// A volume.
    Block,
}

/// A `StagingReservation`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReservationView {
    /// Its UID: the holder of its promise.
    pub uid: Uid,
    /// Its name.
    pub name: ObjectName,
    /// The version that a write replaces.
    pub version: ObjectVersion,
    /// When it was made.
    pub created: Timestamp,
    /// True if it is being deleted.
    pub deleting: bool,
    /// True if it carries the release finalizer.
    pub has_finalizer: bool,
    /// Which pools it may go to.
    pub pools: PoolChoice,
    /// This node only.
    pub node: Option<NodeName>,
    /// This zone only.
    pub zone: Option<String>,
    /// Higher ones come first among those that wait.
    pub priority: i32,
    /// How long it stays after nothing has used it any more, in milliseconds; `None` if only deletion ends it.
    pub ttl_millis: Option<u64>,
    /// When a person last said that it is still needed.
    pub renewed: Option<Timestamp>,
    /// When something last ceased to use it, by its node's clock.
    pub last_used: Option<Timestamp>,
    /// When it ends if nothing uses it until then, as its status says.
    pub expires: Option<Timestamp>,
    /// True if nothing is to be promised, only said.
    pub dry_run: bool,
    /// The most that will be written.
    pub max_size: Bytes,
    /// The template that it starts from.
    pub template: Option<ObjectName>,
    /// The namespace of the claim behind a CSI volume, for `allowedNamespaces`; its own otherwise.
    pub claim_namespace: String,
    /// The name of the claim behind a CSI volume.
    pub claim_name: Option<String>,
    /// That claim, if its UID is known.
    pub claim: Option<Claim>,
    /// How the space is used.
    pub access: Access,
    /// Overrides the pool's rule.
    pub when_full: Option<WhenFull>,
    /// Its recorded state.
    pub state: ReservationState,
    /// Where it is.
    pub assignment: Option<Placement>,
    /// The staged image recorded with the assignment.
    pub assigned_image: Option<AssignedImage>,
    /// The generation that the node has made ready.
    pub prepared: Option<Generation>,
    /// Since when it waits.
    pub queued_since: Option<Timestamp>,
    /// Since when the node has it ready.
    pub ready_since: Option<Timestamp>,
    /// What its node says of a file that is in no object store yet; `None` if there is none.
    pub only_copy: Option<String>,
    /// Set if a field's value cannot be used: the message.
    pub invalid: Option<String>,
}

/// The recorded state of a reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ReservationState {
    /// Nothing has looked at it yet.
    Pending,
    /// It waits for space.
    Queued,
    /// The space is promised.
    Promised,
    /// The node has made what was asked for.
    Ready,
    /// The node gives the bytes back.
    Releasing,
    /// It will not be met.
    Refused,
}

/// The image that an assigned reservation refers to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssignedImage {
    /// Its identity.
    pub digest: Digest,
    /// The name of its `StagedImage`.
    pub staged_image: String,
    /// Its virtual size.
    pub virtual_size: Bytes,
}

/// A `StagedImage`.
#[allow(clippy::struct_excessive_bools)] // what was seen of it, each on its own
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageView {
    /// Its UID: the holder of its promise.
    pub uid: Uid,
    /// Its name.
    pub name: String,
    /// When it was made.
    pub created: Timestamp,
    /// True if it is being deleted.
    pub deleting: bool,
    /// True if it carries the release finalizer.
    pub has_finalizer: bool,
    /// Its identity.
    pub digest: Digest,
    /// The pool.
    pub pool: PoolName,
    /// The node.
    pub node: NodeName,
    /// What it is charged.
    pub data_bytes: Bytes,
    /// Its virtual size.
    pub virtual_size: Bytes,
    /// True if all of it is there.
    pub ready: bool,
    /// When a volume was last made from it.
    pub last_used: Option<Timestamp>,
    /// True if its template was deleted, so that it may go although it may be the last copy.
    pub given_up: bool,
}

/// An `ImageStore`, as far as placement goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreView {
    /// Its name.
    pub name: ObjectName,
    /// The version that a write replaces.
    pub version: ObjectVersion,
    /// The node that looks after it, and the generation.
    pub assignment: Option<(NodeName, Generation)>,
    /// True if it is being deleted.
    pub deleting: bool,
}

/// Everything that a decision may look at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Pools by name.
    pub pools: BTreeMap<PoolName, PoolView>,
    /// Nodes by name.
    pub nodes: BTreeMap<NodeName, NodeState>,
    /// Ledgers by pool and node.
    pub ledgers: BTreeMap<(PoolName, NodeName), LedgerView>,
    /// Reservations by UID.
    pub reservations: BTreeMap<Uid, ReservationView>,
    /// Imports by name.
    pub imports: BTreeMap<ObjectName, TransferView>,
    /// Transfers by name, without imports.
    pub transfers: BTreeMap<ObjectName, TransferView>,
    /// Staged images by name.
    pub images: BTreeMap<String, ImageView>,
    /// Image stores by name.
    pub stores: BTreeMap<ObjectName, StoreView>,
    /// Labels of namespaces, by name.
    pub namespaces: BTreeMap<String, BTreeMap<String, String>>,
    /// The claims and `PersistentVolumes` that Kubernetes has; `None` while that is not known.
    pub claims: Option<Claims>,
    /// The nodes that Kubernetes has; `None` while that is not known for long enough to tell that one is gone.
    pub kube_nodes: Option<BTreeSet<NodeName>>,
    /// True if this operator holds the Lease, which gates limits of namespaces, and with [`View::sweeps`] what is taken away.
    pub leader: bool,
    /// True while a node has not been heard since this operator began to watch, or since the API server went back in time, and is not
    /// known to be lost: it may hold what a reservation that has no place was promised before.
    pub unheard: bool,
    /// In a part of a view: the requests that may also go to pools which the part lacks. They stand in line, and nothing is decided
    /// about them by what the part shows.
    pub elsewhere: BTreeSet<Uid>,
    /// Other keys of reservations and ledgers; `None` in a view that is made by hand.
    pub index: Option<Index>,
    /// The objects that cannot be read. Of one that could be once, the last readable form is shown.
    pub unreadable: Vec<Unreadable>,
}

impl NodeState {
    /// True if it was there and fell silent, or was never heard for as long as its Lease lasts. One that an operator which
    /// has only just begun to watch has not heard yet is not lost.
    pub fn is_lost(&self) -> bool {
        !self.live && (self.reported || self.silent)
    }
}

impl View {
    /// True if nothing is to be expected of this node: it is lost, or its report is gone.
    pub fn is_lost(&self, node: &NodeName) -> bool {
        self.nodes.get(node).is_none_or(NodeState::is_lost)
    }

    /// The ledger of a placement.
    pub fn ledger_at(&self, place: &Placement) -> Option<&LedgerView> {
        self.ledgers.get(&(place.pool.clone(), place.node.clone()))
    }

    /// What a node reports of a pool.
    pub fn report_of(&self, pool: &PoolName, node: &NodeName) -> Option<&NodePoolState> {
        self.nodes.get(node)?.pools.get(pool)
    }

    /// The size of the blocks in a pool that is made of kernel pools.
    pub fn block_of(&self, pool: &PoolName) -> Option<BlockSize> {
        self.pools.get(pool)?.block
    }

    /// The write that takes the promises of these holders away. Their node may have grown a kernel pool for them, which
    /// leaves less to the other class: the report that says that they are gone says that too.
    pub fn without(&self, ledger: &LedgerView, gone: &[&Uid]) -> Change {
        let report = self.report_of(&ledger.pool, &ledger.node).filter(|report| report.usable);
        let reported = self.pools.get(&ledger.pool).zip(report);
        ledger.without(gone, reported.and_then(|(pool, report)| pool.capacity(report)))
    }

    /// Why a ledger may not be written to: its node has recorded more than it shows.
    pub fn behind(&self, ledger: &LedgerView) -> Option<Behind> {
        is_behind(ledger, self.report_of(&ledger.pool, &ledger.node)?)
    }
}
