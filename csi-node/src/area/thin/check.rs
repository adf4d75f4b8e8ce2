//! A pool's record against its kernel pools, its shown devices and its logical volumes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::PoisonError;
use std::time::Duration;

use berth_core::ids::Uid;
use berth_core::ledger::Class;
use berth_core::thin::PoolMode;
use berth_core::units::Bytes;
use berth_device::thin::{
    DeviceInfo, DeviceName, DeviceNumber, KernelPool, PoolStatus, ThinDevice, ThinDeviceError, list_ours,
};
use berth_record::{
    ChangeError, ImageState, PoolRecord, ThinEntry, ThinState, VolumeEntry, VolumeState, tables,
};

use super::super::error::AreaError;
use super::super::lazy::Lazy as _;
use super::devices::recorded;
use super::group::Inventory;
use super::{Thin, image_uid};
use crate::operation::{Finding, FindingKind};
use crate::telemetry::chain;

/// How long whoever reads a map is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

fn finding(kind: FindingKind, about: &impl ToString, message: impl Into<String>) -> Finding {
    Finding { kind, about: about.to_string(), message: message.into() }
}

impl Thin {
    /// Everything about which they do not agree. Nothing is made or removed meanwhile.
    pub(super) fn findings(&self, record: &PoolRecord) -> Result<Vec<Finding>, AreaError> {
        let _alone = self.alone.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = self.check_volumes()?;
        let thin = record.record().entries(tables::THIN).map_err(ChangeError::from)?;
        let shown = list_ours().map_err(ThinDeviceError::from)?;
        for class in [Class::Images, Class::Volumes] {
            let ours: BTreeMap<&Uid, &ThinEntry> =
                thin.iter().filter(|(_, e)| e.class == recorded(class)).map(|(uid, e)| (uid, e)).collect();
            found.extend(self.check_kernel_pool(record, class, &ours)?);
            found.extend(self.check_shown(class, &ours, &shown));
        }
        found.extend(self.check_entries(record, &shown)?);
        Ok(found)
    }

    /// Logical volumes of this pool's name: those that are of no use, and those that are not there.
    fn check_volumes(&self) -> Result<Vec<Finding>, AreaError> {
        let Inventory { stray, lacking } = self.group.inventory()?;
        let leaked = stray.into_iter().map(|volume| {
            let message = format!("a logical volume of {} that the pool has no use for", volume.size);
            finding(FindingKind::Leaked, &volume.name, message)
        });
        let missing = lacking
            .into_iter()
            .map(|name| finding(FindingKind::Missing, &name, "the pool's logical volume is not there"));
        Ok(leaked.chain(missing).collect())
    }

    /// Numbers, transaction and state of a kernel pool.
    fn check_kernel_pool(
        &self,
        record: &PoolRecord,
        class: Class,
        ours: &BTreeMap<&Uid, &ThinEntry>,
    ) -> Result<Vec<Finding>, AreaError> {
        let pool = self.kernel()?.of(class);
        let name = pool.name();
        let working = match pool.status()? {
            PoolStatus::Working(working) => working,
            PoolStatus::Failed => {
                return Ok(vec![finding(FindingKind::Damaged, name, "the kernel has given it up")]);
            }
        };
        let mut found = Vec::new();
        let transaction = record.thin_counters(recorded(class)).map_err(ChangeError::from)?.transaction;
        if working.transaction_id != transaction {
            let message =
                format!("it is at transaction {}, the record at {transaction}", working.transaction_id);
            found.push(finding(FindingKind::Different, name, message));
        }
        if working.needs_check || working.mode != PoolMode::ReadWrite {
            let message =
                if working.needs_check { "its metadata has to be checked" } else { "it takes no writes" };
            found.push(finding(FindingKind::Damaged, name, message));
            return Ok(found); // nothing more can be read of it while it is in use
        }
        let kept = match kept(pool) {
            Ok(kept) => kept,
            Err(error) => {
                found.push(finding(FindingKind::Damaged, name, chain(&error)));
                return Ok(found);
            }
        };
        let known: BTreeSet<u32> = ours.values().map(|entry| entry.id).collect();
        for (id, mapped) in kept.iter().filter(|(id, _)| !known.contains(id)) {
            let message = format!("thin device {id} of {mapped} that nothing recorded needs");
            found.push(finding(FindingKind::Leaked, &format!("{name}:{id}"), message));
        }
        for (uid, entry) in ours {
            if entry.state == ThinState::Made && !kept.contains_key(&entry.id) {
                let message = format!("thin device {} is not in {name}", entry.id);
                found.push(finding(FindingKind::Missing, uid, message));
            }
        }
        Ok(found)
    }

    /// Devices that are shown: as recorded, and not suspended.
    fn check_shown(
        &self,
        class: Class,
        ours: &BTreeMap<&Uid, &ThinEntry>,
        shown: &[DeviceInfo],
    ) -> Vec<Finding> {
        let mut found = Vec::new();
        for info in shown {
            let holder = match info.device() {
                Some(DeviceName::Thin { pool, class: its, holder }) if pool == self.pool && its == class => {
                    Some(holder)
                }
                Some(DeviceName::KernelPool { pool, class: its }) if pool == self.pool && its == class => {
                    None
                }
                _ => continue,
            };
            if info.suspended {
                let message = "it is suspended: everything that uses it waits";
                found.push(finding(FindingKind::Suspended, &info.name, message));
                continue;
            }
            let Some(holder) = holder else { continue };
            match ours.get(&holder) {
                None => {
                    let message = "a device that nothing recorded needs";
                    found.push(finding(FindingKind::Leaked, &info.name, message));
                }
                Some(entry) => found.extend(self.check_table(class, &holder, entry)),
            }
        }
        found
    }

    fn check_table(&self, class: Class, uid: &Uid, entry: &ThinEntry) -> Option<Finding> {
        let pool = self.kernel().ok()?.of(class);
        let table = ThinDevice::find(pool, uid).ok()??.table().ok()?;
        let size = Bytes(table.sectors.saturating_mul(512));
        if table.id.get() != entry.id {
            let message = format!("it shows thin device {}, recorded is {}", table.id, entry.id);
            return Some(finding(FindingKind::Different, uid, message));
        }
        let message = format!("its device has {size}, recorded are {}", entry.size);
        (size != entry.size).then(|| finding(FindingKind::Different, uid, message))
    }

    /// Images and volumes that are recorded as there.
    fn check_entries(&self, record: &PoolRecord, shown: &[DeviceInfo]) -> Result<Vec<Finding>, AreaError> {
        let mut found = Vec::new();
        let read = record.record();
        for (digest, image) in read.entries(tables::IMAGES).map_err(ChangeError::from)? {
            let (uid, about) = (image_uid(&digest), format!("image {digest}"));
            match image.state {
                ImageState::Filling { .. } => continue,
                ImageState::Complete => {}
                ImageState::Shown { .. } if self.is_shown(&digest) => {}
                ImageState::Shown { .. } => {
                    found.push(finding(FindingKind::Missing, &about, "it is not shown to its volumes"));
                }
            }
            found.extend(self.check_entry(record, Class::Images, &uid, &about)?);
        }
        for (uid, volume) in read.entries(tables::VOLUMES).map_err(ChangeError::from)? {
            if volume.state == VolumeState::Ready {
                found.extend(self.check_entry(record, Class::Volumes, &uid, &format!("volume {uid}"))?);
                found.extend(self.check_volume(record, &uid, &volume, shown)?);
            }
        }
        Ok(found)
    }

    fn check_entry(
        &self,
        record: &PoolRecord,
        class: Class,
        uid: &Uid,
        about: &str,
    ) -> Result<Option<Finding>, AreaError> {
        let node = self.node(class, uid);
        Ok(match Self::made(record, uid)? {
            None => Some(finding(FindingKind::Missing, &about, "no thin device is recorded for it")),
            Some(_) if !node.exists() => {
                Some(finding(FindingKind::Missing, &about, format!("{} is not there", node.display())))
            }
            Some(_) => None,
        })
    }

    /// Size and origin of a volume's device.
    fn check_volume(
        &self,
        record: &PoolRecord,
        uid: &Uid,
        volume: &VolumeEntry,
        shown: &[DeviceInfo],
    ) -> Result<Vec<Finding>, AreaError> {
        let mut found = Vec::new();
        let Some(entry) = Self::made(record, uid)? else { return Ok(found) };
        let size = volume.size.round_up(self.group.block().bytes());
        if entry.size != size {
            let message = format!("its thin device is recorded with {}, it has {size}", entry.size);
            found.push(finding(FindingKind::Different, uid, message));
        }
        let path = self.node(Class::Volumes, uid);
        let is_suspended =
            shown.iter().any(|info| info.suspended && info.device().is_some_and(|name| name.path() == path));
        if is_suspended {
            return Ok(found);
        }
        let Some(device) = ThinDevice::find(self.kernel()?.of(Class::Volumes), uid)? else {
            return Ok(found);
        };
        let origin = volume.origin.as_ref().and_then(|origin| self.origin(record, origin).ok());
        let wanted = origin.as_deref().map(Path::new).and_then(|path| DeviceNumber::of(path).ok());
        if device.table()?.origin != wanted {
            found.push(finding(FindingKind::Different, uid, "it does not read from what it started from"));
        }
        Ok(found)
    }
}

/// What a kernel pool keeps: number and mapped bytes of each thin device.
fn kept(pool: &KernelPool) -> Result<BTreeMap<u32, Bytes>, AreaError> {
    let snapshot = pool.metadata_snapshot(PATIENCE)?;
    let devices = snapshot.devices()?;
    snapshot.release()?;
    Ok(devices.into_iter().map(|thin| (thin.id.get(), thin.mapped)).collect())
}
