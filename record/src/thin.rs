//! Thin devices of a pool's area: the intent before each message to a kernel pool, with a number that no other has.
//!
//! Each message is a transaction: its number is recorded here before it is sent and told to the kernel pool after it, so
//! a kernel pool that is at another number than the last or the one before is not the one that this record speaks of.

use berth_core::ids::Uid;
use berth_core::units::Bytes;

use crate::entry::{PromiseClass, ThinCounters, ThinEntry, ThinState};
use crate::error::{ChangeError, ReadError};
use crate::pool::{PoolRecord, wrong_state};
use crate::schema::tables;
use crate::store::Change;

/// The kernel's numbers of thin devices have 24 bits.
const IDS: u32 = 1 << 24;

impl PoolRecord {
    /// What the kernel pool of this class was last asked for.
    pub fn thin_counters(&self, class: PromiseClass) -> Result<ThinCounters, ReadError> {
        Ok(self.record().get(tables::THIN_COUNTERS, &class)?.unwrap_or_default())
    }

    /// The thin device that is named after this UID.
    pub fn thin(&self, uid: &Uid) -> Result<Option<ThinEntry>, ReadError> {
        self.record().get(tables::THIN, uid)
    }

    /// Records the intent to make a thin device: a number that none has, and a new transaction. Refused if there is one
    /// of this name already.
    pub fn begin_thin(&self, uid: &Uid, class: PromiseClass, size: Bytes) -> Result<ThinEntry, ChangeError> {
        self.record().commit(|change| begin(change, uid, class, size, None))
    }

    /// Records the intent to make a snapshot of a thin device, in the same way. Returns the snapshot's entry and its source's,
    /// which cannot be removed until the snapshot is made or removed. Refused unless the source is there and no larger.
    pub fn begin_thin_snapshot(
        &self,
        uid: &Uid,
        source: &Uid,
        size: Bytes,
    ) -> Result<(ThinEntry, ThinEntry), ChangeError> {
        self.record().commit(|change| {
            let found = change.require(tables::THIN, source)?;
            if found.state != ThinState::Made {
                return Err(wrong_state(tables::THIN.name(), source, "not made", "kept"));
            }
            if found.size > size {
                return Err(wrong_state(tables::THIN.name(), source, "larger than its snapshot", "kept"));
            }
            Ok((begin(change, uid, found.class, size, Some(source.clone()))?, found))
        })
    }

    /// Records the new size of a thin device: before it grows.
    pub fn thin_resized(&self, uid: &Uid, size: Bytes) -> Result<ThinEntry, ChangeError> {
        self.record().commit(|change| {
            let mut thin = change.require(tables::THIN, uid)?;
            if thin.state != ThinState::Made || size < thin.size {
                let state = if size < thin.size { "larger" } else { "not made" };
                return Err(wrong_state(tables::THIN.name(), uid, state, "resized"));
            }
            thin.size = size;
            change.put(tables::THIN, uid, &thin)?;
            Ok(thin)
        })
    }

    /// Records that a thin device is there, after it is.
    pub fn thin_made(&self, uid: &Uid) -> Result<(), ChangeError> {
        self.record().commit(|change| {
            let mut thin = change.require(tables::THIN, uid)?;
            if thin.state == ThinState::Removing {
                return Err(wrong_state(tables::THIN.name(), uid, "being removed", "used"));
            }
            thin.state = ThinState::Made;
            change.put(tables::THIN, uid, &thin)
        })
    }

    /// Records the intent to remove a thin device, with a new transaction: nothing can use it from now on. `None` if
    /// there is none. Refused while a snapshot of it is being made.
    pub fn begin_remove_thin(&self, uid: &Uid) -> Result<Option<ThinEntry>, ChangeError> {
        self.record().commit(|change| {
            let Some(mut thin) = change.get(tables::THIN, uid)? else { return Ok(None) };
            let of_this =
                |other: &ThinEntry| other.state == ThinState::Making && other.source.as_ref() == Some(uid);
            if change.any(tables::THIN, of_this)? {
                return Err(wrong_state(tables::THIN.name(), uid, "being kept as a snapshot", "removed"));
            }
            thin.state = ThinState::Removing;
            change.put(tables::THIN, uid, &thin)?;
            change.put(tables::THIN_COUNTERS, &thin.class, &next(change, thin.class)?)?;
            Ok(Some(thin))
        })
    }

    /// Forgets a thin device, after it is gone. Only one that is being removed can be.
    pub fn forget_thin(&self, uid: &Uid) -> Result<(), ChangeError> {
        self.record().commit(|change| {
            if let Some(thin) = change.get(tables::THIN, uid)?
                && thin.state != ThinState::Removing
            {
                return Err(wrong_state(tables::THIN.name(), uid, "not being removed", "forgotten"));
            }
            change.remove(tables::THIN, uid).map(|_| ())
        })
    }
}

/// An entry with a number that no other has, under a new transaction.
fn begin(
    change: &Change<'_>,
    uid: &Uid,
    class: PromiseClass,
    size: Bytes,
    source: Option<Uid>,
) -> Result<ThinEntry, ChangeError> {
    if change.get(tables::THIN, uid)?.is_some() {
        return Err(wrong_state(tables::THIN.name(), uid, "there already", "made"));
    }
    let mut counters = next(change, class)?;
    loop {
        counters.last_id = (counters.last_id + 1) % IDS;
        let id = counters.last_id;
        if !change.any(tables::THIN, |thin| thin.class == class && thin.id == id)? {
            break;
        }
    }
    change.put(tables::THIN_COUNTERS, &class, &counters)?;
    let entry = ThinEntry { class, id: counters.last_id, size, state: ThinState::Making, source };
    change.put(tables::THIN, uid, &entry)?;
    Ok(entry)
}

/// The counters with a new transaction.
fn next(change: &Change<'_>, class: PromiseClass) -> Result<ThinCounters, ChangeError> {
    let counters = change.get(tables::THIN_COUNTERS, &class)?.unwrap_or_default();
    Ok(ThinCounters { transaction: counters.transaction + 1, ..counters })
}
