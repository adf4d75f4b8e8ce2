//! Thin devices with their record: the intent, the message to the kernel pool, the transaction, the record again.

use std::path::{Path, PathBuf};
use std::sync::{MutexGuard, PoisonError};

use berth_core::ids::Uid;
use berth_core::ledger::Class;
use berth_core::units::Bytes;
use berth_device::thin::{
    KernelPool, KernelPoolError, PoolStatus, ThinConfig, ThinDevice, ThinDeviceError, ThinId,
};
use berth_record::{ChangeError, PoolRecord, PromiseClass, ThinEntry, ThinState, tables};

use super::super::error::AreaError;
use super::Thin;
use crate::sabotage;

pub(super) const fn recorded(class: Class) -> PromiseClass {
    match class {
        Class::Images => PromiseClass::Images,
        Class::Volumes => PromiseClass::Volumes,
    }
}

const fn class_of(class: PromiseClass) -> Class {
    match class {
        PromiseClass::Images => Class::Images,
        PromiseClass::Volumes => Class::Volumes,
    }
}

impl Thin {
    /// Makes an empty thin device, for which there is room in its kernel pool then. What may be there is removed first.
    /// It counts as half made until [`PoolRecord::thin_made`].
    pub(super) fn make(
        &self,
        record: &PoolRecord,
        uid: &Uid,
        class: Class,
        size: Bytes,
    ) -> Result<ThinEntry, AreaError> {
        self.make_exactly(record, uid, class, size.round_up(self.group.block().bytes()))
    }

    /// The same of exactly this size, which need not be whole blocks.
    pub(super) fn make_exactly(
        &self,
        record: &PoolRecord,
        uid: &Uid,
        class: Class,
        size: Bytes,
    ) -> Result<ThinEntry, AreaError> {
        if let Some(half_made) = trusted(record, uid)? {
            return Ok(half_made);
        }
        let _alone = self.make_room(record, uid, class)?;
        let pool = self.kernel()?.of(class);
        let early = sabotage::active(sabotage::NO_INTENT);
        if early {
            pool.create_thin(next_id(record, class)?)?;
            sabotage::linger(sabotage::NO_INTENT);
        }
        let entry = record.begin_thin(uid, recorded(class), size)?;
        sabotage::linger(sabotage::TRUST_HALF_MADE);
        if !early {
            self.made_or_not_ours(record, uid, class, pool.create_thin(thin_id(&entry)?))?;
        }
        self.reconcile(record, class)?;
        Ok(entry)
    }

    /// Removes what may have this name, and makes the kernel pool as large as what is promised in it. Nothing else is told to
    /// the kernel pools until the guard goes.
    fn make_room(
        &self,
        record: &PoolRecord,
        uid: &Uid,
        class: Class,
    ) -> Result<MutexGuard<'_, ()>, AreaError> {
        self.remove(record, uid)?;
        let alone = self.alone.lock().unwrap_or_else(PoisonError::into_inner);
        self.grow_to_promises(record, class)?;
        self.reconcile(record, class)?;
        Ok(alone)
    }

    fn grow_to_promises(&self, record: &PoolRecord, class: Class) -> Result<(), AreaError> {
        self.group.grow(self.kernel()?, class, promised(record, class)?, &*self.suspender)
    }

    /// A number that the kernel pool has and nobody recorded is somebody else's: it is left alone, and the next attempt
    /// takes another one.
    fn made_or_not_ours(
        &self,
        record: &PoolRecord,
        uid: &Uid,
        class: Class,
        made: Result<(), KernelPoolError>,
    ) -> Result<(), AreaError> {
        if matches!(made, Err(KernelPoolError::IdTaken { .. })) {
            self.reconcile(record, class)?;
            record.begin_remove_thin(uid)?;
            self.reconcile(record, class)?;
            record.forget_thin(uid)?;
        }
        Ok(made?)
    }

    /// Makes a snapshot of a thin device, with room for its size as in [`Self::make`]. The device may be in use.
    pub(super) fn snapshot(
        &self,
        record: &PoolRecord,
        uid: &Uid,
        source: &Uid,
        size: Bytes,
    ) -> Result<ThinEntry, AreaError> {
        if let Some(half_made) = trusted(record, uid)? {
            return Ok(half_made);
        }
        let _alone = self.make_room(record, uid, Class::Volumes)?;
        let pool = self.kernel()?.of(Class::Volumes);
        let size = size.round_up(self.group.block().bytes());
        let (entry, of) = record.begin_thin_snapshot(uid, source, size)?;
        sabotage::linger(sabotage::TRUST_HALF_MADE);
        let made = pool.create_snap(thin_id(&entry)?, thin_id(&of)?, &*self.suspender);
        self.made_or_not_ours(record, uid, Class::Volumes, made)?;
        self.reconcile(record, Class::Volumes)?;
        Ok(entry)
    }

    /// Makes a thin device of a volume larger: room for it first, then what is recorded, then the device.
    pub(super) fn resize(&self, record: &PoolRecord, uid: &Uid, size: Bytes) -> Result<ThinEntry, AreaError> {
        let _alone = self.alone.lock().unwrap_or_else(PoisonError::into_inner);
        self.grow_to_promises(record, Class::Volumes)?;
        let entry = record.thin_resized(uid, size.round_up(self.group.block().bytes()))?;
        self.fit(uid, &entry)?;
        Ok(entry)
    }

    /// Makes a device that is shown as large as it is recorded.
    fn fit(&self, uid: &Uid, entry: &ThinEntry) -> Result<(), AreaError> {
        if let Some(device) = ThinDevice::find(self.kernel()?.of(class_of(entry.class)), uid)?
            && device.size()? < entry.size
        {
            device.resize(entry.size, &*self.suspender)?;
        }
        Ok(())
    }

    /// Removes a thin device and gives its blocks back; one that is not there is no error.
    ///
    /// # Errors
    /// While anybody has it open; nothing has changed then.
    pub(super) fn remove(&self, record: &PoolRecord, uid: &Uid) -> Result<(), AreaError> {
        let Some(entry) = record.thin(uid).map_err(ChangeError::from)? else { return Ok(()) };
        let _alone = self.alone.lock().unwrap_or_else(PoisonError::into_inner);
        let class = class_of(entry.class);
        let pool = self.kernel()?.of(class);
        if let Some(device) = ThinDevice::find(pool, uid)? {
            device.deactivate()?;
        }
        self.reconcile(record, class)?;
        record.begin_remove_thin(uid)?;
        if sabotage::active(sabotage::FORGET_BEFORE_DELETE) {
            record.forget_thin(uid)?;
            sabotage::linger(sabotage::FORGET_BEFORE_DELETE);
        }
        pool.delete(thin_id(&entry)?)?;
        self.reconcile(record, class)?;
        Ok(record.forget_thin(uid)?)
    }

    /// Makes the node of a thin device appear.
    pub(super) fn show(
        &self,
        uid: &Uid,
        entry: &ThinEntry,
        origin: Option<&Path>,
        read_only: bool,
    ) -> Result<PathBuf, AreaError> {
        let pool = self.kernel()?.of(class_of(entry.class));
        let config = ThinConfig { holder: uid, id: thin_id(entry)?, size: entry.size, origin, read_only };
        match ThinDevice::activate(pool, &config) {
            Err(ThinDeviceError::Different { .. }) => {
                self.fit(uid, entry)?; // it was to become larger when that was cut off
                Ok(ThinDevice::activate(pool, &config)?.path())
            }
            shown => Ok(shown?.path()),
        }
    }

    /// Makes the node of a thin device go.
    pub(super) fn hide(&self, class: Class, uid: &Uid) -> Result<(), AreaError> {
        if let Some(device) = ThinDevice::find(self.kernel()?.of(class), uid)? {
            device.deactivate()?;
        }
        Ok(())
    }

    /// The thin device of this name, if it is all there.
    pub(super) fn made(record: &PoolRecord, uid: &Uid) -> Result<Option<ThinEntry>, AreaError> {
        let entry = record.thin(uid).map_err(ChangeError::from)?;
        Ok(entry.filter(|entry| entry.state == ThinState::Made))
    }

    /// Tells a kernel pool of the transaction that was begun last. Whether its message had arrived is not known where it
    /// was cut off; every message may be repeated.
    ///
    /// # Errors
    /// [`AreaError::Transaction`] if the kernel pool is not the one, or not as new or old, as the record says.
    pub(super) fn reconcile(&self, record: &PoolRecord, class: Class) -> Result<(), AreaError> {
        if sabotage::active(sabotage::SKIP_TRANSACTION) {
            return Ok(());
        }
        let pool = self.kernel()?.of(class);
        let wanted = record.thin_counters(recorded(class)).map_err(ChangeError::from)?.transaction;
        match at_transaction(pool)? {
            found if found == wanted => Ok(()),
            found if found.checked_add(1) == Some(wanted) => Ok(pool.set_transaction_id(found, wanted)?),
            found => Err(AreaError::Transaction { pool: pool.name().clone(), recorded: wanted, found }),
        }
    }
}

/// A thin device that may be half made, and is taken as it is: a defect, chosen in test builds only.
fn trusted(record: &PoolRecord, uid: &Uid) -> Result<Option<ThinEntry>, AreaError> {
    let active = sabotage::active(sabotage::TRUST_HALF_MADE);
    Ok(if active { record.thin(uid).map_err(ChangeError::from)? } else { None })
}

/// The number that the next thin device gets, mostly: for a defect that does not wait for it.
fn next_id(record: &PoolRecord, class: Class) -> Result<ThinId, AreaError> {
    let id = record.thin_counters(recorded(class)).map_err(ChangeError::from)?.last_id + 1;
    ThinId::new(id).ok_or(AreaError::ThinId { id })
}

fn at_transaction(pool: &KernelPool) -> Result<u64, AreaError> {
    match pool.status()? {
        PoolStatus::Working(working) => Ok(working.transaction_id),
        PoolStatus::Failed => Err(AreaError::PoolFailed { pool: pool.name().clone() }),
    }
}

pub(super) fn thin_id(entry: &ThinEntry) -> Result<ThinId, AreaError> {
    ThinId::new(entry.id).ok_or(AreaError::ThinId { id: entry.id })
}

/// What is promised to a class and not given back: its kernel pool must have as much, or what that counts for where volumes
/// are overcommitted.
fn promised(record: &PoolRecord, class: Class) -> Result<Bytes, AreaError> {
    let promises = record.record().entries(tables::PROMISES).map_err(ChangeError::from)?;
    let held = promises.into_iter().map(|(_, promise)| promise);
    let held = held.filter(|promise| promise.obeyed && !promise.released && promise.class == recorded(class));
    let promised: Bytes = held.map(|promise| promise.data).sum();
    match class {
        Class::Images => Ok(promised),
        Class::Volumes => {
            let position = record.ledger_position().map_err(ChangeError::from)?;
            Ok(position.overcommit.target(promised))
        }
    }
}
