//! Every machine-readable reason that a condition, an event, a metric or the CLI may carry. Names only get added.

use std::fmt::{self, Write as _};

use serde::{Deserialize, Serialize};

/// Whether trying again without a change by a person can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReasonClass {
    /// It is as it should be, or on its way there.
    Normal,
    /// Tried again by itself.
    Transient,
    /// Over until the object, the source or the store changes.
    Terminal,
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident => $class:ident,)*) => {
        /// Why something is as it is. The variant's name is what users see.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum Reason {
            $($(#[doc = $doc])+ $name,)*
        }

        impl Reason {
            /// Every reason, in the order of the documentation.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The name, as in conditions and events.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// Whether trying again can help.
            pub const fn class(self) -> ReasonClass {
                match self { $(Self::$name => ReasonClass::$class,)* }
            }

            /// What it means, one sentence.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+).trim_ascii(),)* }
            }

            /// The reason with this name.
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|reason| reason.as_str() == name)
            }
        }
    };
}

reasons! {
    /// Nothing has looked at the object yet.
    Pending => Normal,
    /// Everything is in place.
    Ready => Normal,
    /// Work is under way.
    Progressing => Normal,
    /// A node reads the head of the source to learn its format and size.
    Probing => Normal,
    /// The space is promised.
    Promised => Normal,
    /// Waits until space is free.
    Queued => Normal,
    /// Waits for its reservation.
    WaitingForReservation => Normal,
    /// Its bytes are being given back.
    Releasing => Normal,
    /// It takes nothing new, and images that nothing refers to go.
    Draining => Normal,
    /// Images that nothing referred to were removed.
    Reclaimed => Normal,
    /// Waits while images that nothing refers to are removed to make room.
    Reclaiming => Transient,
    /// A ledger that was behind was rebuilt from its node's record.
    LedgerRebuilt => Normal,
    /// No other copy of this is known, so it is kept until there is one.
    OnlyCopy => Transient,
    /// The image is in its store, verified.
    Durable => Normal,
    /// Tried again after a fault that passes.
    Retrying => Transient,
    /// No pool matches the selector or the name.
    NoMatchingPool => Transient,
    /// No live node carries a matching pool.
    NoMatchingNode => Transient,
    /// Not enough unpromised bytes, and the request is to be queued.
    InsufficientCapacity => Transient,
    /// Not enough unpromised bytes, and the request is not to be queued.
    CapacityRefused => Terminal,
    /// The request is larger than the pool is when empty.
    LargerThanPool => Terminal,
    /// It waited as long as the pool allows.
    QueueTimeout => Terminal,
    /// As many requests wait as the pool allows.
    QueueFull => Terminal,
    /// The ledger holds as many promises as one may.
    LedgerFull => Transient,
    /// The ledger is older than what its node has obeyed.
    LedgerBehind => Transient,
    /// The node has not reported for longer than it may.
    NodeLost => Transient,
    /// The template is not Ready, so nothing can start from it yet.
    TemplateNotReady => Transient,
    /// There is no template with this name.
    TemplateNotFound => Terminal,
    /// The template does not allow this namespace.
    NamespaceNotAllowed => Terminal,
    /// The directory, device or volume group belongs to another pool.
    InUseByPool => Terminal,
    /// The pool's area could not be prepared on the node.
    PoolAreaFailed => Transient,
    /// The bound of this pool is not ours to enforce.
    Advisory => Normal,
    /// A program, kernel feature or right is missing on the node.
    PreflightFailed => Transient,
    /// A field's value cannot be used.
    InvalidSpec => Terminal,
    /// The Secret does not exist or lacks a key.
    CredentialsMissing => Transient,
    /// The credentials that the node held are gone.
    CredentialsLost => Transient,
    /// The image store object does not exist.
    ImageStoreNotFound => Transient,
    /// The object store does not answer, or answers with an error of its own.
    ObjectStoreUnavailable => Transient,
    /// The object store refuses the credentials or the operation.
    ObjectStoreDenied => Terminal,
    /// The object store has no room left, or the quota of the bucket or its owner is used up.
    ObjectStoreFull => Terminal,
    /// The bucket does not exist.
    BucketNotFound => Terminal,
    /// The store was made with another chunk size or by a newer version.
    ImageStoreIncompatible => Terminal,
    /// Another object's image is published under this name.
    NameTaken => Terminal,
    /// A newer generation of this work exists; this one stops.
    Superseded => Transient,
    /// The source does not exist.
    SourceNotFound => Terminal,
    /// The source refuses the credentials, or demands some.
    SourceForbidden => Terminal,
    /// The source does not answer, or answers with an error of its own.
    SourceUnavailable => Transient,
    /// The source sent nothing for longer than the stall timeout.
    SourceStalled => Transient,
    /// The source changed while it was read.
    SourceChanged => Terminal,
    /// The source's address is not one that may be read from.
    SourceAddressRefused => Terminal,
    /// The source answers something else than was asked for, or does not say how long it is.
    SourceUnusable => Terminal,
    /// The source has more bytes than its limit.
    SourceTooLarge => Terminal,
    /// The image's virtual size is above its limit.
    VirtualSizeTooLarge => Terminal,
    /// The source's bytes do not have the expected checksum.
    ChecksumMismatch => Terminal,
    /// The image ends before it should.
    ImageTruncated => Terminal,
    /// The image's structures contradict each other.
    ImageCorrupt => Terminal,
    /// The image refers to a backing file.
    ImageHasBackingFile => Terminal,
    /// The image keeps its data in another file.
    ImageHasDataFile => Terminal,
    /// The image is encrypted.
    ImageEncrypted => Terminal,
    /// The image's format, or a feature of it, is not supported.
    ImageFormatUnsupported => Terminal,
    /// The conversion tool failed.
    ConversionFailed => Terminal,
    /// A chunk that should be in the store is missing or damaged.
    VerificationFailed => Transient,
    /// Retried as often as allowed.
    RetriesExhausted => Terminal,
    /// A promise was exceeded or ran out of space: a defect of Berth.
    PromiseBroken => Terminal,
    /// A promise held, and yet there was no space to write what it covers: a defect of Berth, told with numbers.
    SpacePromiseBroken => Terminal,
    /// The operation is not allowed on a template.
    IsTemplate => Terminal,
    /// Mounting an imported file system on the host was not allowed by the storage class.
    HostMountNotAllowed => Terminal,
    /// This version does not carry out objects of this kind.
    NotImplemented => Terminal,
    /// The volume's file is gone from the pool.
    VolumeLost => Terminal,
    /// A kernel pool has used nearly all the data that it can attain.
    DataAlmostFull => Transient,
    /// It works, and what is not here yet is read from its image store.
    Hydrating => Normal,
    /// A chunk is not in its image store: reads of it fail, and everything else goes on.
    ChunkMissing => Transient,
    /// A chunk in the image store is not what its name says: reads of it fail, and everything else goes on.
    ChunkDamaged => Transient,
    /// The index of an image in its store is gone, or is not what its digest says.
    IndexDamaged => Transient,
    /// Volumes are promised more than is there, as the pool's policy allows: that all of it can be written is not promised.
    VolumesOvercommitted => Transient,
    /// A kernel pool uses more than 70 % of its metadata, so nothing more is promised in it.
    MetadataAlmostFull => Transient,
    /// The metadata of a kernel pool must be checked offline before anything more is promised in it.
    NeedsCheck => Terminal,
    /// A kernel pool is read-only, so nothing more is promised in it.
    ReadOnly => Terminal,
    /// There is no pool of this name on the node.
    PoolNotFound => Terminal,
    /// There is no volume, snapshot or template with this UID in the pool.
    VolumeNotFound => Terminal,
    /// It is attached, mounted or open, or something else still reads from it.
    InUse => Transient,
    /// The operation is not allowed on a snapshot, which is never written.
    IsSnapshot => Terminal,
    /// The pool's ledger has promised no space for it.
    NotPromised => Transient,
    /// It is there already, in another way than asked for.
    AlreadyDifferent => Terminal,
    /// The device holds something, and nobody consented to losing it.
    NotBlank => Terminal,
    /// The device is mounted, or part of something else.
    DeviceInUse => Terminal,
    /// The volume group holds something of this name that is not ours.
    ForeignVolume => Terminal,
    /// What the pool was made of is gone from its devices, or they are not there.
    PoolAreaGone => Transient,
    /// Every NBD device of the node is taken.
    SlotsExhausted => Transient,
    /// What a device reads from does not answer.
    OriginSilent => Transient,
    /// The process that suspends and resumes devices does not answer.
    SupervisorUnavailable => Transient,
    /// A device of Berth is suspended, so everything that uses it waits.
    DeviceSuspended => Transient,
    /// Devices of guests are not kept from being scanned by the host.
    HostScansGuestDisks => Transient,
    /// The object is being fetched, or is to be.
    Fetching => Normal,
    /// All of the object is in its file.
    Staged => Normal,
    /// The file that is to be sent is not in its directory, or is no regular file.
    FileMissing => Transient,
    /// The directory of the file is gone from the pool, with all that was in it.
    FileLost => Terminal,
    /// The reservations of its namespace hold as much of the pool as they may.
    TenantLimit => Transient,
    /// The pool takes nothing new on this node.
    Cordoned => Transient,
    /// Only what would happen is said; nothing is promised.
    DryRun => Normal,
    /// Nothing has used it for as long as it may stay unused.
    Expired => Normal,
    /// Nobody will ask for this volume again: its claim is gone, or has selected another node.
    Abandoned => Normal,
    /// The two volumes did not start from the same thing, so where neither has blocks says nothing.
    NotRelated => Terminal,
    /// An object cannot be read: it is of a newer version, or a field of it was changed to what no version knows.
    ObjectUnreadable => Transient,
    /// It was finished: all of it is at its destination.
    Succeeded => Normal,
    /// It pauses because its specification says so, and goes on where it was once that says otherwise.
    Suspended => Normal,
    /// It had not ended when the time that it is allowed was over.
    DeadlineExceeded => Terminal,
    /// The work needs space in a pool, and `spec.staging` does not allow it.
    StagingNotAllowed => Terminal,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The table of `docs/reasons.md`.
pub fn docs_table() -> String {
    let mut text = String::from(
        "# Reasons\n\n*Generated by `cargo xtask codegen` from `core/src/reason.rs`; do not edit.*\n\nEvery reason that a \
         condition, an event, a metric or the CLI may carry. *Transient* ones are tried again without anyone doing \
         anything; *terminal* ones end the work until the object, the source or the store changes. Names only get \
         added.\n\n| reason | class | meaning |\n|---|---|---|\n",
    );
    for reason in Reason::ALL {
        let class = match reason.class() {
            ReasonClass::Normal => "normal",
            ReasonClass::Transient => "transient",
            ReasonClass::Terminal => "terminal",
        };
        let _ = writeln!(text, "| `{reason}` | {class} | {} |", reason.meaning());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a56_names_are_unique_read_back_and_explained() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(Reason::from_name(reason.as_str()), Some(*reason));
            assert!(reason.meaning().ends_with('.'), "{reason}");
            assert!(!Reason::ALL[..index].contains(reason));
        }
        assert_eq!(Reason::from_name("Nope"), None);
    }

    #[test]
    fn the_table_has_a_line_for_each() {
        let table = docs_table();
        assert_eq!(table.lines().filter(|line| line.starts_with("| `")).count(), Reason::ALL.len());
        let line = "| `QueueFull` | terminal | As many requests wait as the pool allows. |";
        assert!(table.lines().any(|other| other == line), "{table}");
    }
}
