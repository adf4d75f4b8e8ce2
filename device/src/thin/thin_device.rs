//! Thin devices in use: volumes, and images to start them from.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use berth_core::ids::Uid;
use berth_core::reason::Reason;
use berth_core::units::Bytes;
use thiserror::Error;

use super::dmsetup::{self, DmError, understood};
use super::kernel_pool::{KernelPool, number_of};
use super::names::{DeviceName, NameError};
use super::pool_error::KernelPoolError;
use super::status::ThinStatus;
use super::suspender::{SuspendError, Suspender};
use super::table::{DeviceNumber, ThinId, ThinTable};
use crate::partition::Extent;
use crate::sys;

/// Why a thin device could not be activated, changed or let go.
#[derive(Debug, Error)]
pub enum ThinDeviceError {
    /// Nothing can be named after its holder.
    #[error("failed to name a thin device")]
    Name(#[from] NameError),
    /// Device mapper refused.
    #[error("failed to use device mapper")]
    Dm(#[from] DmError),
    /// Its pool or its origin could not be examined.
    #[error("failed to examine what {device} lies on")]
    Below {
        /// The device.
        device: DeviceName,
        /// Why.
        source: Box<KernelPoolError>,
    },
    /// What needs it suspended was not done.
    #[error("failed to do what needs {device} suspended")]
    Suspend {
        /// The device.
        device: DeviceName,
        /// Why.
        source: SuspendError,
    },
    /// Its size is zero, or not a number of sectors.
    #[error("{device} cannot have {size}: not a positive multiple of 512 bytes")]
    Size {
        /// The device.
        device: DeviceName,
        /// What was asked for.
        size: Bytes,
    },
    /// It would become smaller, and lose what lies behind its new end.
    #[error("{device} has {is} and is not made smaller ({size})")]
    Smaller {
        /// The device.
        device: DeviceName,
        /// What it has.
        is: Bytes,
        /// What was asked for.
        size: Bytes,
    },
    /// It is active already, in another way than asked for, and was left alone.
    #[error("{device} is active already, as `{table}`")]
    Different {
        /// The device.
        device: DeviceName,
        /// Its table.
        table: String,
    },
    /// Its origin lies in its own kernel pool, where the pool's suspension and a copy from the origin wait for each other.
    #[error("the origin of {device} lies in the same kernel pool")]
    OriginInSamePool {
        /// The device.
        device: DeviceName,
    },
    /// Others have it open.
    #[error("{device} is still open elsewhere")]
    InUse {
        /// The device.
        device: DeviceName,
    },
    /// It is not active.
    #[error("{device} is not active")]
    NotActive {
        /// The device.
        device: DeviceName,
    },
    /// Its blocks could not be given back.
    #[error("failed to discard a part of {device}")]
    Discard {
        /// The device.
        device: DeviceName,
        /// What the system said.
        source: io::Error,
    },
}

impl ThinDeviceError {
    /// The machine-readable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Below { source, .. } => source.reason(),
            Self::Suspend { source, .. } => source.reason(),
            Self::Dm(source) => source.reason(),
            Self::Size { .. } | Self::Smaller { .. } => Reason::InvalidSpec,
            Self::Different { .. } => Reason::AlreadyDifferent,
            Self::InUse { .. } => Reason::InUse,
            Self::Name(_) | Self::OriginInSamePool { .. } | Self::NotActive { .. } | Self::Discard { .. } => {
                Reason::PoolAreaFailed
            }
        }
    }
}

/// How a thin device is used.
#[derive(Clone, Copy, Debug)]
pub struct ThinConfig<'a> {
    /// Whose it is.
    pub holder: &'a Uid,
    /// Its number in the pool.
    pub id: ThinId,
    /// Its size: a multiple of 512 bytes. The kernel keeps none.
    pub size: Bytes,
    /// What it reads where it has no blocks; zeros if absent, and behind the origin's end. Nobody may write to it. Never in
    /// the same kernel pool.
    pub origin: Option<&'a Path>,
    /// Writes are refused by the device.
    pub read_only: bool,
}

/// A thin device that is active. Dropping it leaves it so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThinDevice {
    name: DeviceName,
    uuid: String,
}

impl ThinDevice {
    /// Makes the device of a holder appear. One that is active in the same way already is taken over.
    ///
    /// # Errors
    /// [`ThinDeviceError::Different`] if it is active in another way.
    pub fn activate(pool: &KernelPool, config: &ThinConfig<'_>) -> Result<Self, ThinDeviceError> {
        let name = DeviceName::thin(&pool.pool, pool.class, config.holder)?;
        let below = |source| ThinDeviceError::Below { device: name.clone(), source: Box::new(source) };
        let origin = config.origin.map(number_of).transpose().map_err(below)?;
        if origin.is_some_and(|origin| lies_on(origin, pool.number)) {
            return Err(ThinDeviceError::OriginInSamePool { device: name });
        }
        let table =
            ThinTable { sectors: sectors(&name, config.size)?, pool: pool.number, id: config.id, origin };
        Self::activate_as(name, table, config.read_only)
    }

    /// Makes the device for the metadata of a holder's template appear, blank when it is new. `size` is a multiple of 512
    /// bytes.
    ///
    /// # Errors
    /// As [`Self::activate`].
    pub fn activate_clone_metadata(
        pool: &KernelPool,
        holder: &Uid,
        id: ThinId,
        size: Bytes,
    ) -> Result<Self, ThinDeviceError> {
        let name = DeviceName::clone_metadata(&pool.pool, holder)?;
        let table = ThinTable { sectors: sectors(&name, size)?, pool: pool.number, id, origin: None };
        Self::activate_as(name, table, false)
    }

    fn activate_as(name: DeviceName, table: ThinTable, read_only: bool) -> Result<Self, ThinDeviceError> {
        let device = Self { uuid: name.uuid(), name };
        match dmsetup::info(&device.uuid)? {
            Some(info) if info.live => {
                let found = device.table()?;
                if found != table || info.read_only != read_only {
                    return Err(ThinDeviceError::Different { device: device.name, table: found.to_string() });
                }
                return Ok(device);
            }
            Some(_) => dmsetup::remove(&device.name)?, // its making was interrupted
            None => {}
        }
        dmsetup::create(&device.name, &table.to_string(), read_only)?;
        Ok(device)
    }

    /// The device of a holder, if it is active.
    pub fn find(pool: &KernelPool, holder: &Uid) -> Result<Option<Self>, ThinDeviceError> {
        Self::find_as(DeviceName::thin(&pool.pool, pool.class, holder)?)
    }

    /// The device for the metadata of a holder's template, if it is active.
    pub fn find_clone_metadata(pool: &KernelPool, holder: &Uid) -> Result<Option<Self>, ThinDeviceError> {
        Self::find_as(DeviceName::clone_metadata(&pool.pool, holder)?)
    }

    fn find_as(name: DeviceName) -> Result<Option<Self>, ThinDeviceError> {
        let uuid = name.uuid();
        let live = dmsetup::info(&uuid)?.is_some_and(|info| info.live);
        Ok(live.then_some(Self { name, uuid }))
    }

    /// Its identity.
    pub fn name(&self) -> &DeviceName {
        &self.name
    }

    /// Its node.
    pub fn path(&self) -> PathBuf {
        self.name.path()
    }

    /// Its table.
    pub fn table(&self) -> Result<ThinTable, ThinDeviceError> {
        Ok(understood(&self.uuid, dmsetup::table(&self.uuid)?.parse())?)
    }

    /// Its size.
    pub fn size(&self) -> Result<Bytes, ThinDeviceError> {
        Ok(Bytes(self.table()?.sectors.saturating_mul(512)))
    }

    /// How much of it has blocks; `None` if its pool has failed.
    pub fn mapped(&self) -> Result<Option<Bytes>, ThinDeviceError> {
        match understood(&self.uuid, dmsetup::status(&self.uuid)?.parse())? {
            ThinStatus::Working { mapped_sectors, .. } => Ok(Some(Bytes(mapped_sectors.saturating_mul(512)))),
            ThinStatus::Failed => Ok(None),
        }
    }

    /// Makes it larger, in use or not. It is suspended for milliseconds, and goes on whatever happens.
    ///
    /// # Errors
    /// [`ThinDeviceError::Smaller`]; [`ThinDeviceError::Suspend`], also while its external origin does not answer.
    pub fn resize(&self, size: Bytes, suspender: &dyn Suspender) -> Result<(), ThinDeviceError> {
        let old = self.table()?;
        let new = ThinTable { sectors: sectors(&self.name, size)?, ..old };
        if new.sectors < old.sectors {
            let is = Bytes(old.sectors.saturating_mul(512));
            return Err(ThinDeviceError::Smaller { device: self.name.clone(), is, size });
        }
        if new == old {
            return Ok(());
        }
        suspender.replace_table(&self.name, &new.to_string()).map_err(|error| match error {
            SuspendError::Dm(error) => error.into(),
            source => ThinDeviceError::Suspend { device: self.name.clone(), source },
        })
    }

    /// Gives back the blocks that lie wholly in `range`; it reads its origin there again, or zeros. Unit: bytes, multiples
    /// of 512.
    pub fn discard(&self, range: Extent) -> Result<(), ThinDeviceError> {
        let discard = || {
            let file = fs::OpenOptions::new().write(true).open(self.path())?;
            Ok(sys::discard(&file, range.offset.0, range.length.0)?)
        };
        discard().map_err(|source| ThinDeviceError::Discard { device: self.name.clone(), source })
    }

    /// Makes it disappear. Its blocks stay. One that is not active is no error.
    ///
    /// # Errors
    /// [`ThinDeviceError::InUse`] if others have it open for longer than a few seconds.
    pub fn deactivate(self) -> Result<(), ThinDeviceError> {
        match dmsetup::remove(&self.name) {
            Err(error) if error.says("Device or resource busy") => {
                Err(ThinDeviceError::InUse { device: self.name })
            }
            done => Ok(done?),
        }
    }
}

fn sectors(device: &DeviceName, size: Bytes) -> Result<u64, ThinDeviceError> {
    if size == Bytes::ZERO || !size.0.is_multiple_of(512) {
        return Err(ThinDeviceError::Size { device: device.clone(), size });
    }
    Ok(size.0 / 512)
}

/// True if `device` is made of `pool`, directly or through other devices. From sysfs, where each device names those below
/// it; what cannot be read there has none.
fn lies_on(device: DeviceNumber, pool: DeviceNumber) -> bool {
    let mut seen = BTreeSet::new();
    let mut next = vec![device];
    while let Some(device) = next.pop() {
        if device == pool {
            return true;
        }
        if !seen.insert(device) {
            continue;
        }
        let below = fs::read_dir(format!("/sys/dev/block/{device}/slaves")).into_iter().flatten().flatten();
        let numbers = below.filter_map(|entry| fs::read_to_string(entry.path().join("dev")).ok());
        next.extend(numbers.filter_map(|text| text.trim().parse::<DeviceNumber>().ok()));
    }
    false
}
