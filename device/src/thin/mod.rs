//! Thin provisioning: volume groups, kernel pools, thin devices, and what they map.
//!
//! The commands `dmsetup`, `lvm`, `thin_check`, `thin_dump` and `thin_delta` behind typed functions. Nothing here decides:
//! sizes, growth and block sizes are [`berth_core::thin`]'s. Everything may be called again after a crash: it looks at what
//! is there first, and what is there is told by names that the objects' UIDs give ([`DeviceName`]).
//!
//! A staging pool has **two** kernel pools, and no thin device has an external origin in its own: with both in one, the
//! suspension of the pool and a copy from the origin may wait for each other for ever.

mod claim;
mod dmsetup;
mod group_error;
mod guests;
mod kernel_pool;
mod lvm;
mod mappings;
mod names;
mod pool_error;
mod status;
mod survey;
mod suspender;
mod suspension;
mod table;
mod table_change;
mod template;
mod thin_device;
mod thin_ids;
mod users;
mod volume_group;

pub(crate) use self::dmsetup::ENVIRONMENT as LVM_ENVIRONMENT;
pub use self::dmsetup::{DeviceInfo, DmError, all_suspended_of_ours, list_ours, resume};
pub use self::group_error::VolumeGroupError;
pub use self::kernel_pool::{KernelPool, KernelPoolConfig};
pub use self::lvm::Scope;
pub use self::mappings::{Difference, KeptThin, MappingError, MetadataSnapshot};
pub use self::names::{DeviceName, NameError, UUID_PREFIX, own_volume_name, parse_volume_name, volume_name};
pub use self::pool_error::KernelPoolError;
pub use self::status::{Blocks, Discards, PoolStatus, ThinStatus, WhenFull, WorkingPool};
pub use self::survey::{FoundGroup, survey};
pub use self::suspender::{InProcess, LeftBehind, PoolMessage, SuspendError, Suspender, resume_left_behind};
pub use self::table::{DeviceNumber, ParseError, PoolFeatures, PoolTable, ThinId, ThinTable};
pub use self::template::{
    CloneConfig, CloneStatus, CloneTable, DirectBuffer, FoundMetadata, LinearTable, TemplateDevice,
    TemplateError, TemplateWriter, WorkingClone, clear_metadata, find_metadata, load as load_for_templates,
    longest_request, missing as missing_for_templates,
};
pub use self::thin_device::{ThinConfig, ThinDevice, ThinDeviceError};
pub use self::volume_group::{GroupSpace, LogicalVolume, TAG, VolumeGroup, WipeConsent};

use crate::program::find_program;

/// What thin provisioning needs and this node lacks, as one phrase each.
pub fn missing() -> Vec<String> {
    let packages = [
        ("dmsetup", "dmsetup"),
        ("lvm", "lvm2"),
        ("thin_check", "thin-provisioning-tools"),
        ("thin_dump", "thin-provisioning-tools"),
        ("thin_delta", "thin-provisioning-tools"),
    ];
    let lacking = packages.into_iter().filter(|(program, _)| find_program(program).is_none());
    let mut missing: Vec<_> = lacking
        .map(|(program, package)| format!("program {program} is not installed: install {package}"))
        .collect();
    if missing.is_empty() {
        missing.extend(missing_in_kernel());
    }
    missing
}

fn missing_in_kernel() -> Option<String> {
    let control = "/dev/mapper/control";
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open(control) {
        return Some(format!("{control} cannot be opened: {error}"));
    }
    match dmsetup::targets() {
        Err(error) => Some(format!("device mapper does not answer: {error}")),
        Ok(targets) if !targets.iter().any(|target| target == "thin-pool") => {
            Some("the kernel has no target thin-pool: load the module dm-thin-pool".to_owned())
        }
        Ok(_) => None,
    }
}
