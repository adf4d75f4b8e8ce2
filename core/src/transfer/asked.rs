//! What is asked of a transfer, as far as it is the same for every source and destination.

use std::fmt;

use crate::ids::{ObjectName, Uid};
use crate::units::Bytes;

/// Which of the two kinds of object asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TransferKind {
    /// A `TemplateImport`: its destination is a name in an image store, its result a template.
    Import,
    /// An `ImageTransfer`.
    Transfer,
}

impl TransferKind {
    /// The kind of object.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Import => "TemplateImport",
            Self::Transfer => "ImageTransfer",
        }
    }

    /// What people call one, in running text.
    pub const fn noun(self) -> &'static str {
        match self {
            Self::Import => "import",
            Self::Transfer => "transfer",
        }
    }
}

impl fmt::Display for TransferKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One object of either kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TransferId {
    /// Its kind.
    pub kind: TransferKind,
    /// Its name.
    pub name: ObjectName,
    /// Its UID.
    pub uid: Uid,
}

impl fmt::Display for TransferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// Bounds of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The largest virtual size.
    pub virtual_size: Bytes,
    /// The most bytes that the source may have.
    pub bytes: Bytes,
    /// How long the source may send nothing, in seconds.
    pub stall_timeout: u64,
    /// How often a fault that passes is tried again.
    pub retries: u32,
}

/// Whether the source comes into a pool first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Staging {
    /// Only if it has to.
    #[default]
    Auto,
    /// It must not: what would need that is refused.
    Never,
    /// It must.
    Required,
}

/// What the source is, where it is not to be found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SourceFormat {
    /// The disk's bytes, nothing else.
    Raw,
    /// QEMU's.
    Qcow2,
    /// `VMware`'s.
    Vmdk,
    /// Virtual PC's and Azure's.
    Vhd,
    /// Hyper-V's.
    Vhdx,
}

/// How the clusters of a qcow2 object are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Compression {
    /// Not at all.
    None,
    /// Deflate: every reader of qcow2 knows it.
    Zlib,
    /// Faster and smaller; readers need QEMU 5.1 or newer.
    Zstd,
}

/// What is written where the destination is one object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OutputFormat {
    /// The disk's bytes, holes as zeros.
    Raw,
    /// QEMU's.
    Qcow2 {
        /// Of its clusters.
        compression: Compression,
    },
    /// `VMware`'s stream-optimised form, which is always compressed with deflate.
    Vmdk,
    /// Virtual PC's and Azure's.
    Vhd,
}

impl fmt::Display for OutputFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 { .. } => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhd => "vhd",
        })
    }
}
