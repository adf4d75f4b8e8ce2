//! Why an image is not imported.

use berth_core::reason::Reason;
use berth_core::units::Bytes;
use thiserror::Error;

use super::ImageFormat;

/// Why an image is not imported. Names found inside of it are cut to 200 characters and printed escaped.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// Its unwritten parts come from another file.
    #[error("image refers to backing file {name:?}")]
    BackingFile {
        /// The file's name, as far as it can be read.
        name: String,
    },
    /// Its data lie in another file.
    #[error("image keeps its data in another file, {name:?}")]
    DataFile {
        /// The file's name, as far as it can be read.
        name: String,
    },
    /// It is encrypted.
    #[error("image is encrypted")]
    Encrypted,
    /// Its structures contradict each other.
    #[error("image is corrupt: {what}")]
    Corrupt {
        /// Which, and how.
        what: String,
    },
    /// It ends too early.
    #[error("image is truncated: {found} where there must be {expected}")]
    Truncated {
        /// The least length that it must have.
        expected: Bytes,
        /// The length that it has.
        found: Bytes,
    },
    /// Nobody here can read it.
    #[error("image needs {feature}, which is not supported")]
    UnsupportedFeature {
        /// What it needs.
        feature: String,
    },
    /// It is something else than a disk image that can be imported.
    #[error("content is {name}, which is not a supported image format")]
    UnsupportedFormat {
        /// What it is.
        name: &'static str,
    },
    /// It is not of the format that it was said to be.
    #[error("image is not {expected}{}", found.map(|f| format!(" but {f}")).unwrap_or_default())]
    OtherFormat {
        /// What it was said to be.
        expected: ImageFormat,
        /// What it begins like, if like anything.
        found: Option<ImageFormat>,
    },
    /// Too little of it was looked at to tell.
    #[error("sample of {given} is too small, {needed} are needed")]
    SampleTooSmall {
        /// How much of its head must be given.
        needed: Bytes,
        /// How much was.
        given: Bytes,
    },
}

impl Refusal {
    /// The machine-readable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::BackingFile { .. } => Reason::ImageHasBackingFile,
            Self::DataFile { .. } => Reason::ImageHasDataFile,
            Self::Encrypted => Reason::ImageEncrypted,
            Self::Corrupt { .. } => Reason::ImageCorrupt,
            Self::Truncated { .. } | Self::SampleTooSmall { .. } => Reason::ImageTruncated,
            Self::UnsupportedFeature { .. } | Self::UnsupportedFormat { .. } | Self::OtherFormat { .. } => {
                Reason::ImageFormatUnsupported
            }
        }
    }

    pub(crate) fn corrupt(what: impl Into<String>) -> Self {
        Self::Corrupt { what: what.into() }
    }

    pub(crate) fn unsupported(feature: impl Into<String>) -> Self {
        Self::UnsupportedFeature { feature: feature.into() }
    }

    pub(crate) fn backing_file(name: &[u8]) -> Self {
        Self::BackingFile { name: shown(name) }
    }

    pub(crate) fn data_file(name: &[u8]) -> Self {
        Self::DataFile { name: shown(name) }
    }
}

fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).trim_end_matches('\0').chars().take(200).collect()
}
