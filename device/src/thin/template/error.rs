//! Everything that can go wrong with a template's device.

use std::io;
use std::path::PathBuf;

use berth_core::hydration::{CloneMode, GeometryError, Progress, SpanError};
use berth_core::reason::Reason;
use berth_core::units::Bytes;
use thiserror::Error;

use crate::thin::dmsetup::DmError;
use crate::thin::names::{DeviceName, NameError};
use crate::thin::suspender::SuspendError;

/// Why a template could not be shown, written, made local or let go.
#[derive(Debug, Error)]
pub enum TemplateError {
    /// Nothing can be named after its holder.
    #[error("failed to name a template")]
    Name(#[from] NameError),
    /// Device mapper refused.
    #[error("failed to use device mapper")]
    Dm(#[from] DmError),
    /// What is on a device does not make regions.
    #[error("failed to understand the regions of {template}")]
    Geometry {
        /// The template.
        template: DeviceName,
        /// Why.
        source: GeometryError,
    },
    /// A device that it is made of is not there.
    #[error("the {part} of {template} is not there: {device}", device = device.display())]
    Missing {
        /// The template.
        template: DeviceName,
        /// What it is to the template.
        part: &'static str,
        /// The device.
        device: PathBuf,
    },
    /// A device that it is made of has another size: it belongs to something else.
    #[error("the {part} of {template}, {device}, has {found} and not {expected}", device = device.display())]
    OtherSize {
        /// The template.
        template: DeviceName,
        /// What it is to the template.
        part: &'static str,
        /// The device.
        device: PathBuf,
        /// What it has.
        found: Bytes,
        /// What it should have.
        expected: Bytes,
    },
    /// The device for the metadata cannot hold it.
    #[error("{device} has {found}, and the regions of {template} need {needed}", device = device.display())]
    MetadataTooSmall {
        /// The template.
        template: DeviceName,
        /// The device.
        device: PathBuf,
        /// What it has.
        found: Bytes,
        /// What is needed.
        needed: Bytes,
    },
    /// What is on the device for the metadata is of something else. Nothing was written.
    #[error("{device} holds something else than the regions of {template}", device = device.display())]
    ForeignMetadata {
        /// The template.
        template: DeviceName,
        /// The device.
        device: PathBuf,
    },
    /// The metadata is not cleared while something is made of it.
    #[error("the metadata {device} is in use: {by}", device = device.display())]
    MetadataInUse {
        /// The device.
        device: PathBuf,
        /// By what.
        by: String,
    },
    /// A device could not be examined, read or written.
    #[error("failed to {action} {device}", device = device.display())]
    Device {
        /// What was tried.
        action: &'static str,
        /// The device.
        device: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is active already, in another way than asked for, and was left alone.
    #[error("{template} is active already, as `{table}`")]
    Different {
        /// The template.
        template: DeviceName,
        /// Its table.
        table: String,
    },
    /// It is not active.
    #[error("{template} is not active")]
    NotActive {
        /// The template.
        template: DeviceName,
    },
    /// Others have it open.
    #[error("{template} is still open elsewhere")]
    InUse {
        /// The template.
        template: DeviceName,
    },
    /// Not whole regions.
    #[error("failed to take a part of {template}")]
    Span {
        /// The template.
        template: DeviceName,
        /// Why.
        source: SpanError,
    },
    /// A part could not be written, discarded or flushed. Nothing counts as local that was not written.
    #[error("failed to {action} {template} at {offset}")]
    Write {
        /// What was tried.
        action: &'static str,
        /// The template.
        template: DeviceName,
        /// Where.
        offset: Bytes,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel records no more what is local.
    #[error("{template} takes nothing more: its metadata {}", match mode {
        CloneMode::Failed => "cannot be read, and every read of it fails",
        CloneMode::ReadOnly | CloneMode::ReadWrite => "could not be written",
    })]
    Stopped {
        /// The template.
        template: DeviceName,
        /// What it can still do.
        mode: CloneMode,
    },
    /// Not all of it is local.
    #[error("of {template} {} regions of {} are local", progress.hydrated, progress.total)]
    Incomplete {
        /// The template.
        template: DeviceName,
        /// How far it is.
        progress: Progress,
    },
    /// What needs it suspended was not done.
    #[error("failed to do what needs {template} suspended")]
    Suspend {
        /// The template.
        template: DeviceName,
        /// Why.
        source: SuspendError,
    },
}

impl TemplateError {
    /// The machine-readable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Dm(source) => source.reason(),
            Self::Suspend { source, .. } => source.reason(),
            Self::Geometry { .. } | Self::MetadataTooSmall { .. } => Reason::InvalidSpec,
            Self::Different { .. } | Self::OtherSize { .. } | Self::ForeignMetadata { .. } => {
                Reason::AlreadyDifferent
            }
            Self::InUse { .. } | Self::MetadataInUse { .. } => Reason::InUse,
            Self::Stopped { .. } => Reason::NeedsCheck,
            Self::Incomplete { .. } => Reason::Progressing,
            Self::Name(_)
            | Self::Missing { .. }
            | Self::Device { .. }
            | Self::NotActive { .. }
            | Self::Span { .. }
            | Self::Write { .. } => Reason::PoolAreaFailed,
        }
    }
}
