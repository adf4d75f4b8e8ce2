//! Thin devices as a kernel pool keeps them: by number, active or not.
//!
//! The numbers are given out by the caller, who records what it is about to do first; each function here may be repeated.

use std::ffi::OsStr;
use std::time::Duration;

use super::dmsetup::{self, Quiesce};
use super::kernel_pool::{KernelPool, node_of};
use super::pool_error::KernelPoolError;
use super::status::PoolStatus;
use super::suspension::Suspended;
use super::table::{DeviceNumber, ThinId};
use crate::program;

/// How long an external origin may take to answer before it counts as silent.
const ORIGIN_LIMIT: Duration = Duration::from_secs(5);

impl KernelPool {
    /// Makes an empty thin device.
    ///
    /// # Errors
    /// [`KernelPoolError::IdTaken`], [`KernelPoolError::NotWritable`].
    pub fn create_thin(&self, id: ThinId) -> Result<(), KernelPoolError> {
        self.require_writable()?;
        self.make(id, &format!("create_thin {id}"))
    }

    /// Makes a snapshot of a thin device, which shares its blocks. If the device is active, a file system on it is frozen
    /// and it is suspended meanwhile, and it goes on whatever happens. Descendants of a device with an external origin need
    /// the same origin.
    ///
    /// # Errors
    /// [`KernelPoolError::OriginSilent`] before anything is suspended, because the device could not come to rest.
    pub fn create_snap(&self, id: ThinId, of: ThinId) -> Result<(), KernelPoolError> {
        self.require_writable()?;
        let text = format!("create_snap {id} {of}");
        let active = self.active_devices()?.into_iter().find(|(_, table)| table.id == of);
        let Some((name, table)) = active else { return self.make(id, &text) };
        let ours = dmsetup::list_ours()?.into_iter().find(|info| info.name == name);
        let foreign = || KernelPoolError::ForeignDevice { pool: self.name.clone(), id: of, name };
        let info = ours.ok_or_else(foreign)?;
        if let Some(origin) = table.origin {
            require_answer(origin)?;
        }
        let suspended = Suspended::new(&info.uuid, Quiesce::Freeze)?;
        let made = self.make(id, &text);
        suspended.resume()?;
        made
    }

    /// Deletes a thin device and gives its blocks back. One that is not there is no error.
    ///
    /// # Errors
    /// [`KernelPoolError::InUse`] while it is active.
    pub fn delete(&self, id: ThinId) -> Result<(), KernelPoolError> {
        if let Some((name, _)) = self.active_devices()?.into_iter().find(|(_, table)| table.id == id) {
            return Err(KernelPoolError::InUse { pool: self.name.clone(), devices: name });
        }
        match dmsetup::message(&self.uuid, &format!("delete {id}")) {
            Err(error) if error.says("No data available") => Ok(()),
            done => Ok(done?),
        }
    }

    /// Tells the pool that it has seen our transaction `new`, if the last one was `expected`. Repeating it is no error.
    pub fn set_transaction_id(&self, expected: u64, new: u64) -> Result<(), KernelPoolError> {
        let Err(error) = dmsetup::message(&self.uuid, &format!("set_transaction_id {expected} {new}")) else {
            return Ok(());
        };
        match self.status()? {
            PoolStatus::Working(pool) if pool.transaction_id == new => Ok(()),
            PoolStatus::Working(pool) if pool.transaction_id != expected => {
                Err(KernelPoolError::TransactionId {
                    pool: self.name.clone(),
                    expected,
                    found: pool.transaction_id,
                })
            }
            _ => Err(error.into()),
        }
    }

    fn make(&self, id: ThinId, text: &str) -> Result<(), KernelPoolError> {
        match dmsetup::message(&self.uuid, text) {
            Err(error) if error.says("File exists") => {
                Err(KernelPoolError::IdTaken { pool: self.name.clone(), id })
            }
            Err(error) if error.says("No data available") => {
                Err(KernelPoolError::NoSuchId { pool: self.name.clone(), id })
            }
            done => Ok(done?),
        }
    }
}

/// Refuses an external origin that does not answer: a suspension would wait for it.
///
/// Reads one block past memory. A child does it, because a read of a device that is silent cannot be given up.
pub(super) fn require_answer(origin: DeviceNumber) -> Result<(), KernelPoolError> {
    let origin = node_of(origin)?;
    let input = format!("if={}", origin.display());
    let words = [&input, "of=/dev/null", "bs=4096", "count=1", "iflag=direct", "status=none"];
    program::run("dd", words.map(OsStr::new), ORIGIN_LIMIT)
        .map(drop)
        .map_err(|source| KernelPoolError::OriginSilent { origin, source })
}
