//! Thin devices as a kernel pool keeps them: by number, active or not.
//!
//! The numbers are given out by the caller, who records what it is about to do first; each function here may be repeated.

use super::dmsetup;
use super::kernel_pool::KernelPool;
use super::pool_error::KernelPoolError;
use super::status::PoolStatus;
use super::suspender::{PoolMessage, SuspendError, Suspender};
use super::table::ThinId;

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
    /// [`SuspendError::OriginSilent`] before anything is suspended, because the device could not come to rest.
    pub fn create_snap(
        &self,
        id: ThinId,
        of: ThinId,
        suspender: &dyn Suspender,
    ) -> Result<(), KernelPoolError> {
        let transaction = self.require_writable()?.transaction_id;
        let message = PoolMessage::CreateSnap { id, of, transaction };
        let active = self.active_devices()?.into_iter().find(|(_, table)| table.id == of);
        let Some((name, _)) = active else { return self.make(id, &message.to_string()) };
        let ours = dmsetup::list_ours()?.into_iter().find(|info| info.name == name);
        let foreign = || KernelPoolError::ForeignDevice { pool: self.name.clone(), id: of, name };
        let device = ours.and_then(|info| info.device()).ok_or_else(foreign)?;
        suspender.message_while_frozen(&device, message).map_err(|error| match error {
            SuspendError::IdTaken => KernelPoolError::IdTaken { pool: self.name.clone(), id },
            SuspendError::NoSuchId => KernelPoolError::NoSuchId { pool: self.name.clone(), id },
            error => error.into(),
        })
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
