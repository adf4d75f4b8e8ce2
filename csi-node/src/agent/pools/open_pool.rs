//! A pool whose area is open.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use berth_core::ids::{PoolName, Uid};
use berth_core::units::Generation;
use berth_record::{ChangeError, LedgerPosition, PoolRecord, PromiseEntry, ReadError, tables};

use super::known::PoolSpec;
use crate::area::Area;
use crate::sabotage;

/// An open area.
pub struct OpenPool {
    /// The pool.
    pub name: PoolName,
    /// What it was opened by.
    pub spec: PoolSpec,
    /// The area.
    pub area: Box<dyn Area>,
    /// Its record.
    pub record: PoolRecord,
    /// What the defect `no-record` keeps from the record.
    unrecorded: Mutex<Unrecorded>,
    /// Held while its volumes are changed, so that no two changes of one volume meet.
    turn: Mutex<()>,
}

/// Promises that are obeyed without being recorded: a defect, chosen in test builds only.
#[derive(Default)]
struct Unrecorded {
    position: LedgerPosition,
    promises: BTreeMap<Uid, PromiseEntry>,
}

impl OpenPool {
    /// A pool whose area has been started.
    pub(super) fn new(name: PoolName, spec: PoolSpec, area: Box<dyn Area>, record: PoolRecord) -> Self {
        Self { name, spec, area, record, unrecorded: Mutex::default(), turn: Mutex::default() }
    }

    /// Waits until nobody else changes its volumes, and keeps it so.
    pub fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that the ledger at this position is obeyed, with these promises.
    pub fn obey(
        &self,
        position: &LedgerPosition,
        promises: &[(Uid, PromiseEntry)],
    ) -> Result<(), ChangeError> {
        if !sabotage::active(sabotage::NO_RECORD) {
            return self.record.obey(position, promises);
        }
        let mut kept = self.unrecorded();
        kept.position = position.clone();
        kept.promises.extend(promises.iter().cloned());
        Ok(())
    }

    /// Records that the bytes of a promise are gone.
    pub fn released(&self, holder: &Uid, generation: Generation) -> Result<(), ChangeError> {
        match self.unrecorded().promises.get_mut(holder) {
            Some(promise) => promise.released = true,
            None => self.record.promise_released(holder, generation)?,
        }
        Ok(())
    }

    /// Forgets a released promise.
    pub fn forget(&self, holder: &Uid) -> Result<(), ChangeError> {
        if self.unrecorded().promises.remove(holder).is_some() {
            return Ok(());
        }
        self.record.forget_promise(holder)
    }

    /// Where in its ledger's history the node is, and the promises that it knows.
    pub fn promises(&self) -> Result<(LedgerPosition, BTreeMap<Uid, PromiseEntry>), ReadError> {
        let mut position = self.record.ledger_position()?;
        let mut promises: BTreeMap<Uid, PromiseEntry> =
            self.record.record().entries(tables::PROMISES)?.into_iter().collect();
        let kept = self.unrecorded();
        if kept.position.lineage.is_some() {
            position = kept.position.clone();
            promises.extend(kept.promises.iter().map(|(uid, promise)| (uid.clone(), promise.clone())));
        }
        Ok((position, promises))
    }

    fn unrecorded(&self) -> MutexGuard<'_, Unrecorded> {
        self.unrecorded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
