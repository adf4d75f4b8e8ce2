//! Devices of volumes, for whoever asks.

use std::path::{Path, PathBuf};

use berth_core::ids::Uid;
use berth_device::thin::DeviceNumber;
use berth_record::{Attachment, AttachmentMode, VolumeKind, tables};

use super::Outcome;
use super::error::OperationError;
use super::volumes::{found, recorded, require_no_template, require_unused};
use crate::agent::pools::OpenPool;
use crate::area::templates;
use crate::node::now;
use crate::sabotage;

/// Makes a block device of a volume, a snapshot or a template appear.
pub fn attach(pool: &OpenPool, uid: &Uid, read_only: bool) -> Result<Outcome, OperationError> {
    if read_only && let Some(device) = templates::device(pool, uid)? {
        return Ok(Outcome::Device(device));
    }
    let volume = found(pool, uid, "attached for writing")?;
    if volume.kind == VolumeKind::Snapshot && !read_only {
        return Err(OperationError::IsSnapshot { uid: uid.clone(), action: "attached for writing" });
    }
    let file = pool.area.volume(uid);
    if let Some(old) = pool.record.record().get(tables::ATTACHMENTS, uid)? {
        if old.mode != AttachmentMode::Device {
            let by = format!("a workload, staged at {}", old.staged_path.display());
            return Err(OperationError::InUse { what: format!("volume {uid}"), by });
        }
        if let Some(shown) = old.loop_device
            && pool.area.attached(uid)?.contains(&shown)
            && refuses_writes(&shown) != read_only
        {
            let how = if read_only { "for writing" } else { "read-only" };
            let by = format!("whoever attached it {how}, as {}", shown.display());
            return Err(OperationError::InUse { what: format!("volume {uid}"), by });
        }
    }
    let mut attachment = Attachment {
        loop_device: None,
        backing_file: file,
        staged_path: PathBuf::new(),
        mode: AttachmentMode::Device,
    };
    if sabotage::active(sabotage::ATTACH_UNRECORDED) {
        return Ok(Outcome::Device(pool.area.attach(uid, None, read_only)?));
    }
    pool.record.attach(uid, &attachment)?;
    let device = pool.area.attach(uid, None, read_only)?;
    attachment.loop_device = Some(device.clone());
    pool.record.attach(uid, &attachment)?;
    Ok(Outcome::Device(device))
}

/// Takes that device away. A volume that is not attached is detached already.
pub fn detach(pool: &OpenPool, uid: &Uid) -> Result<Outcome, OperationError> {
    require_no_template(pool, uid, "detached as a volume")?;
    if recorded(pool, uid)?.is_none() {
        return Err(OperationError::NoVolume { pool: pool.name.clone(), uid: uid.clone() });
    }
    let Some(attachment) = pool.record.record().get(tables::ATTACHMENTS, uid)? else {
        return Ok(Outcome::Done);
    };
    if attachment.mode != AttachmentMode::Device {
        let by = format!("a workload, staged at {}", attachment.staged_path.display());
        return Err(OperationError::InUse { what: format!("volume {uid}"), by });
    }
    require_unused(pool, uid)?;
    pool.area.detach(uid)?;
    pool.record.detached(uid, now())?;
    Ok(Outcome::Done)
}

/// True if the kernel refuses writes to a device.
fn refuses_writes(device: &Path) -> bool {
    // By its number: without udev a device mapper's node is no link to the name that the kernel has for it.
    let Ok(number) = DeviceNumber::of(device) else { return false };
    let flag = format!("/sys/dev/block/{number}/ro");
    std::fs::read_to_string(flag).is_ok_and(|text| text.trim() == "1")
}
