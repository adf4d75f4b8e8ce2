//! Everything that can go wrong with a volume group.

use std::io;
use std::path::PathBuf;

use berth_core::reason::Reason;
use berth_core::units::Bytes;
use nix::libc;
use thiserror::Error;

use super::volume_group::TAG;
use crate::filesystem::{FilesystemError, Signature};
use crate::program::RunError;

/// Why a volume group, or a volume in one, could not be made, found or changed.
#[derive(Debug, Error)]
pub enum VolumeGroupError {
    /// An LVM command failed.
    #[error("failed to run {command} on volume group {group}")]
    Run {
        /// The command.
        command: &'static str,
        /// The group.
        group: String,
        /// Why.
        source: RunError,
    },
    /// An LVM command said something that is not understood.
    #[error("failed to understand {command} about volume group {group}")]
    Answer {
        /// The command.
        command: &'static str,
        /// The group.
        group: String,
        /// How.
        source: serde_json::Error,
    },
    /// There is no such group.
    #[error("there is no volume group {group} on the devices that were looked at")]
    NoGroup {
        /// Its name.
        group: String,
    },
    /// Some of its devices are away.
    #[error("volume group {group} lacks {missing} of its devices")]
    Incomplete {
        /// Its name.
        group: String,
        /// How many.
        missing: u64,
    },
    /// The group was not made by us, or for another pool; it has these tags.
    #[error("volume group {group} is not this pool's own (tags: `{tags}`)")]
    NotOurs {
        /// Its name.
        group: String,
        /// Its tags.
        tags: String,
    },
    /// These devices hold something, and nobody has consented to wiping them.
    #[error("devices that are not blank: {}", list(found))]
    NotBlank {
        /// What was found on which.
        found: Vec<(PathBuf, Signature)>,
    },
    /// A device cannot be examined.
    #[error("failed to examine a device")]
    Examine(#[from] FilesystemError),
    /// Somebody uses a device.
    #[error("{device} is in use: {}", by.join(", "), device = device.display())]
    DeviceInUse {
        /// The device.
        device: PathBuf,
        /// Who, one phrase each; perhaps only that somebody has it open.
        by: Vec<String>,
    },
    /// A device is missing, or not readable or writable.
    #[error("failed to {action} {device}", device = device.display())]
    Device {
        /// What was tried.
        action: &'static str,
        /// The device.
        device: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A volume that is not there.
    #[error("there is no logical volume {group}/{volume}")]
    NoVolume {
        /// The group.
        group: String,
        /// The volume.
        volume: String,
    },
    /// A volume that is not ours and was left alone.
    #[error("logical volume {group}/{volume} does not bear the tag `{TAG}` and was left alone")]
    Foreign {
        /// The group.
        group: String,
        /// The volume.
        volume: String,
    },
    /// A volume that holds something, so that it cannot be made smaller.
    #[error("logical volume {group}/{volume} is in use and is not made smaller")]
    InUse {
        /// The group.
        group: String,
        /// The volume.
        volume: String,
    },
    /// More is asked for than is free.
    #[error("volume group {group} has {free} free, and {needed} are needed")]
    NoSpace {
        /// The group.
        group: String,
        /// What is needed.
        needed: Bytes,
        /// What is free.
        free: Bytes,
    },
    /// The group still holds volumes.
    #[error("volume group {group} still holds {volumes}")]
    NotEmpty {
        /// The group.
        group: String,
        /// Their names.
        volumes: String,
    },
    /// A name that LVM would not take, or that would mean something else to it.
    #[error("`{name}` cannot name a device or a volume")]
    BadName {
        /// The name.
        name: String,
    },
}

fn list(found: &[(PathBuf, Signature)]) -> String {
    let each = found.iter().map(|(device, signature)| format!("{} ({signature:?})", device.display()));
    each.collect::<Vec<_>>().join(", ")
}

impl VolumeGroupError {
    /// The machine-readable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::NoGroup { .. } | Self::Incomplete { .. } | Self::NoVolume { .. } => Reason::PoolAreaGone,
            Self::Device { source, .. } if is_absence(source) => Reason::PoolAreaGone,
            Self::NotOurs { .. } => Reason::InUseByPool,
            Self::NotBlank { .. } => Reason::NotBlank,
            Self::DeviceInUse { .. } => Reason::DeviceInUse,
            Self::Foreign { .. } => Reason::ForeignVolume,
            Self::InUse { .. } | Self::NotEmpty { .. } => Reason::InUse,
            Self::BadName { .. } => Reason::InvalidSpec,
            Self::Run { .. }
            | Self::Answer { .. }
            | Self::Examine(_)
            | Self::Device { .. }
            | Self::NoSpace { .. } => Reason::PoolAreaFailed,
        }
    }
}

/// True if there is no such device, or none any more.
pub(super) fn is_absence(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO))
}
