//! The closed set of things that a node may be asked to do. Each can be done again after it was done, or half done.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{Digest, Lineage, ObjectName, PoolName, Uid};
use crate::ledger::Promise;
use crate::overcommit::Overcommit;
use crate::units::{Bytes, Generation};

/// What a volume starts as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// All zeros.
    Blank,
    /// A copy of a staged image, zeros after its end.
    Image(Digest),
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make or open the area of a pool.
    PreparePool {
        /// Which.
        pool: PoolName,
    },
    /// Unmount the area of a pool that is gone from this node. What lies on its disk stays.
    ClosePool {
        /// Which.
        pool: PoolName,
    },
    /// Record that the ledger at this revision is obeyed, with these promises: before anything is done under them.
    Obey {
        /// The pool.
        pool: PoolName,
        /// The ledger's lineage.
        lineage: Lineage,
        /// Its revision.
        revision: u64,
        /// How far it overcommits volumes.
        overcommit: Overcommit,
        /// What is obeyed from now on.
        promises: Vec<(Uid, Promise)>,
    },
    /// Make the kernel pool of volumes so large: its promises have come to count for more, or volumes have written nearly all
    /// that it had. What is obeyed allows it.
    GrowVolumes {
        /// The pool.
        pool: PoolName,
        /// How large.
        size: Bytes,
    },
    /// Make the directory of a reservation.
    MakeWorkDir {
        /// The pool.
        pool: PoolName,
        /// The reservation.
        reservation: Uid,
        /// Its generation.
        generation: Generation,
        /// How many bytes it may hold.
        bytes: Bytes,
        /// True if the directory itself has to hold everybody to that, its file system included; false for an import, which
        /// checks what it writes.
        bounded: bool,
    },
    /// Make the directory of a file for pods, which nothing in it can outgrow, and record that it is for one.
    BeginFile {
        /// The pool.
        pool: PoolName,
        /// The reservation.
        reservation: Uid,
        /// Its generation.
        generation: Generation,
        /// How many bytes the directory may take, its file system included.
        bytes: Bytes,
    },
    /// Start to fetch the object that a file begins as, or go on.
    FetchFile {
        /// The pool.
        pool: PoolName,
        /// The reservation.
        reservation: Uid,
        /// Its generation.
        generation: Generation,
    },
    /// Start to send a file that was changed to its object store, or go on.
    PushFile {
        /// The pool.
        pool: PoolName,
        /// The reservation.
        reservation: Uid,
        /// The generation of its promise.
        generation: Generation,
    },
    /// Remove a file that pods do not see, with its directory.
    RemoveFile {
        /// The pool.
        pool: PoolName,
        /// The reservation.
        reservation: Uid,
        /// True if it may go though it is the only copy: somebody consents.
        only_copy: bool,
    },
    /// Make a volume.
    MakeVolume {
        /// The pool.
        pool: PoolName,
        /// The reservation.
        reservation: Uid,
        /// Its generation.
        generation: Generation,
        /// Its size.
        size: Bytes,
        /// What it starts as.
        origin: Origin,
        /// What people know it by.
        labels: BTreeMap<String, String>,
    },
    /// Make a volume larger, in use or not: more has been promised to it.
    GrowVolume {
        /// The pool.
        pool: PoolName,
        /// The reservation.
        reservation: Uid,
        /// Its new size.
        size: Bytes,
    },
    /// Start to fetch a staged image, or go on.
    FillImage {
        /// The pool.
        pool: PoolName,
        /// The `StagedImage`.
        image: Uid,
        /// Its generation.
        generation: Generation,
    },
    /// Remove a work directory.
    RemoveWorkDir {
        /// The pool.
        pool: PoolName,
        /// The reservation.
        reservation: Uid,
    },
    /// Remove a volume.
    RemoveVolume {
        /// The pool.
        pool: PoolName,
        /// The reservation.
        reservation: Uid,
    },
    /// Remove a staged image's bytes, unless another has taken them over, and the pin that its store keeps for it.
    RemoveImage {
        /// The pool.
        pool: PoolName,
        /// The `StagedImage`.
        image: Uid,
        /// Its identity.
        digest: Digest,
    },
    /// Record that the bytes of a promise are gone.
    Released {
        /// The pool.
        pool: PoolName,
        /// The holder.
        holder: Uid,
        /// The promise's generation.
        generation: Generation,
    },
    /// Forget promises that were released and have left the ledger, and whose holders are gone.
    Forget {
        /// The pool.
        pool: PoolName,
        /// Their holders.
        holders: Vec<Uid>,
    },
    /// Start to read the head of a transfer's source.
    StartProbe {
        /// The transfer.
        transfer: Uid,
        /// Its generation.
        generation: Generation,
    },
    /// Start a transfer, or go on.
    StartTransfer {
        /// The transfer.
        transfer: Uid,
        /// Its generation.
        generation: Generation,
        /// Where it may work.
        pool: PoolName,
        /// In which reservation's directory.
        reservation: Uid,
        /// How many bytes that may hold.
        promised: Bytes,
    },
    /// Remove every trace of a transfer that is being deleted from this node and from its stores.
    AbandonTransfer {
        /// The transfer.
        transfer: Uid,
        /// Its generation.
        generation: Generation,
    },
    /// Stop work that nothing asks for any more, without touching what it has made.
    StopJob {
        /// Which.
        job: super::view::JobKey,
    },
    /// Start to look at an image store.
    ProbeStore {
        /// Which.
        store: ObjectName,
        /// The generation of its assignment.
        generation: Generation,
    },
}

impl Step {
    /// The object that it is done for, if it is done for one.
    pub fn subject(&self) -> Option<&Uid> {
        match self {
            Self::MakeWorkDir { reservation, .. }
            | Self::BeginFile { reservation, .. }
            | Self::FetchFile { reservation, .. }
            | Self::PushFile { reservation, .. }
            | Self::RemoveFile { reservation, .. }
            | Self::MakeVolume { reservation, .. }
            | Self::GrowVolume { reservation, .. }
            | Self::RemoveWorkDir { reservation, .. }
            | Self::RemoveVolume { reservation, .. } => Some(reservation),
            Self::FillImage { image, .. } | Self::RemoveImage { image, .. } => Some(image),
            Self::Released { holder, .. } => Some(holder),
            Self::StartProbe { transfer, .. }
            | Self::StartTransfer { transfer, .. }
            | Self::AbandonTransfer { transfer, .. } => Some(transfer),
            Self::StopJob { job } => Some(&job.uid),
            Self::PreparePool { .. }
            | Self::ClosePool { .. }
            | Self::Obey { .. }
            | Self::GrowVolumes { .. }
            | Self::Forget { .. }
            | Self::ProbeStore { .. } => None,
        }
    }
}

/// Whose steps are not gone on with in one run of a plan: a step relies on those before it for the same object.
#[derive(Clone, Debug, Default)]
pub struct Halted(BTreeSet<Uid>);

impl Halted {
    /// True if a step for the same object was not carried out.
    pub fn bars(&self, step: &Step) -> bool {
        step.subject().is_some_and(|uid| self.0.contains(uid))
    }

    /// Takes note that a step was not carried out.
    pub fn note(&mut self, step: &Step) {
        self.0.extend(step.subject().cloned());
    }
}
