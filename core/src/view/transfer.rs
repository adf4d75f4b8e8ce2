//! Transfers as decisions see them, imports among them.

use crate::ids::{Digest, ObjectName, Uid};
use crate::reason::Reason;
use crate::transfer::{TransferId, TransferKind};
use crate::units::{Bytes, Generation, Timestamp};

use super::{ObjectVersion, Placement, PoolChoice, View};

/// A `TemplateImport` or an `ImageTransfer`.
#[allow(clippy::struct_excessive_bools)] // what was seen of it, each on its own
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransferView {
    /// Which of the two.
    pub kind: TransferKind,
    /// Its UID.
    pub uid: Uid,
    /// Its name.
    pub name: ObjectName,
    /// The version that a write replaces.
    pub version: ObjectVersion,
    /// When it was made.
    pub created: Timestamp,
    /// True if it is being deleted.
    pub deleting: bool,
    /// True if it carries the finalizer of its kind.
    pub has_finalizer: bool,
    /// Which pools may stage what it needs.
    pub pools: PoolChoice,
    /// The image stores that it needs: its source's, then its destination's. An import has exactly one.
    pub stores: Vec<ObjectName>,
    /// Namespaces that may use an import's template; `*` is all.
    pub allowed_namespaces: Vec<String>,
    /// True if a person has it pause. An import never does.
    pub suspended: bool,
    /// How long after it was made it may take, in seconds; `None` if for ever.
    pub deadline: Option<u64>,
    /// How long after its end it is deleted, in seconds; `None` if never.
    pub ttl_after_finished: Option<u64>,
    /// When it ended, if it has and that was told.
    pub finished: Option<Timestamp>,
    /// Its recorded state.
    pub state: TransferState,
    /// The node that works on it.
    pub assignment: Option<Placement>,
    /// The most that the work occupies at once, once a node has found out.
    pub peak: Option<Bytes>,
    /// An import's image, once it is durable.
    pub durable: Option<DurableImage>,
    /// True once all that a transfer moves is at its destination. An import says so by [`Self::durable`].
    pub done: bool,
    /// The error that ended it or interrupts it.
    pub error: Option<WorkError>,
    /// Set if a person asks for it to be tried again: what that is recorded as, so that it is done once.
    pub retry: Option<String>,
    /// The generation whose traces are gone.
    pub released: Option<Generation>,
    /// Set if a field's value cannot be used: the message.
    pub invalid: Option<String>,
}

/// The recorded state of a transfer. The API has names of its own for some: [`crate::transfer::TransferKind::name_of`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TransferState {
    /// Nothing has looked at it yet, or no node can.
    Pending,
    /// A node reads the head of the source.
    Probing,
    /// It waits for its reservation.
    Queued,
    /// A node works on it.
    Working,
    /// A person has it pause.
    Suspended,
    /// All of it is at its destination.
    Done,
    /// It has ended without success.
    Failed,
}

/// An image in its store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DurableImage {
    /// Its identity.
    pub digest: Digest,
    /// The size of the disk.
    pub virtual_size: Bytes,
    /// Bytes that are not holes: what a staged copy is charged.
    pub real_size: Bytes,
}

/// What went wrong with a piece of work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkError {
    /// Why.
    pub reason: Reason,
    /// For people.
    pub message: String,
    /// Whether it is tried again by itself.
    pub retryable: bool,
}

impl TransferView {
    /// Which object it is.
    pub fn id(&self) -> TransferId {
        TransferId { kind: self.kind, name: self.name.clone(), uid: self.uid.clone() }
    }

    /// True if all of it is at its destination, whatever its state says yet.
    pub const fn is_done(&self) -> bool {
        self.done || self.durable.is_some()
    }

    /// True if its state says that nothing goes on any more.
    pub const fn has_ended(&self) -> bool {
        matches!(self.state, TransferState::Done | TransferState::Failed)
    }
}

impl View {
    /// The object of this kind and name.
    pub fn transfer(&self, kind: TransferKind, name: &ObjectName) -> Option<&TransferView> {
        match kind {
            TransferKind::Import => self.imports.get(name),
            TransferKind::Transfer => self.transfers.get(name),
        }
    }
}
