//! Kernel thin pools: made, opened, grown, asked, and closed.
//!
//! New blocks that are not written whole at once are zeroed by the kernel first, or filled from the external origin: what
//! an earlier device had left in them is never seen (`skip_block_zeroing` shows it, tried on Linux 6.1).
//!
//! Metadata is made anew only on a logical volume that was never used ([`LogicalVolume::is_new`]), together with data that
//! was never used. Otherwise it must be there, and `thin_check` must be content with it; **nothing here repairs**, because a
//! repair that guesses wrong loses data that a person could have saved.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_core::ids::Uid;
use berth_core::ledger::Class;
use berth_core::thin::{self, BlockSize, Part, PoolState, StopReason};
use berth_core::units::Bytes;

use super::dmsetup::{self, ENVIRONMENT, understood};
use super::names::{DeviceName, volume_name};
use super::pool_error::KernelPoolError;
use super::status::{PoolStatus, WhenFull, WorkingPool};
use super::suspender::Suspender;
use super::table::{DeviceNumber, PoolFeatures, PoolTable, ThinTable};
use super::volume_group::{LogicalVolume, VolumeGroup};
use crate::program;
use crate::sys;

/// `THIN_SUPERBLOCK_MAGIC`, and where it stands (`struct thin_disk_superblock` in `drivers/md/dm-thin-metadata.c`).
const MAGIC: u64 = 27_022_010;
const MAGIC_AT: usize = 32;
/// A check reads all metadata: 16 GiB at 20 MiB/s.
const CHECK_LIMIT: Duration = Duration::from_secs(900);

/// Which kernel pool, and how it behaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelPoolConfig {
    /// The staging pool.
    pub pool: Uid,
    /// Which of its two.
    pub class: Class,
    /// The unit in which it hands out space. Fixed for ever by the first opening.
    pub block: BlockSize,
    /// What becomes of writes that find no space. [`WhenFull::Queue`] unless the pool can never grow: promises make sure
    /// that there is space, and a write that comes before the growth does waits for it instead of failing.
    pub when_full: WhenFull,
}

/// A kernel pool that is active. Dropping it leaves it so.
#[derive(Clone, Debug)]
pub struct KernelPool {
    pub(super) name: DeviceName,
    pub(super) uuid: String,
    pub(super) number: DeviceNumber,
    pub(super) block: BlockSize,
    pub(super) pool: Uid,
    pub(super) class: Class,
}

impl KernelPool {
    /// Makes the logical volumes of a pool, as far as they are not there. Nothing is active yet.
    pub fn provision(
        config: &KernelPoolConfig,
        group: &VolumeGroup,
        data: Bytes,
        metadata: Bytes,
    ) -> Result<(), KernelPoolError> {
        for (part, size) in [(Part::Data, data), (Part::Metadata, metadata)] {
            group.create_volume(&volume_name(&config.pool, config.class, part)?, size)?;
        }
        Ok(())
    }

    /// Opens a pool, formatting it if it was never used. One that is active already is taken over. Interrupted anywhere
    /// and called again, it goes on.
    ///
    /// The pool may come up unable to write, which its state tells.
    ///
    /// # Errors
    /// [`KernelPoolError::MetadataLost`] and [`KernelPoolError::Damaged`] need a person.
    pub fn open(config: &KernelPoolConfig, group: &VolumeGroup) -> Result<Self, KernelPoolError> {
        let activate = |part| -> Result<LogicalVolume, KernelPoolError> {
            Ok(group.activate(&volume_name(&config.pool, config.class, part)?)?)
        };
        let (metadata, data) = (activate(Part::Metadata)?, activate(Part::Data)?);
        let pool = if let Some(pool) = Self::find(&config.pool, config.class)? {
            pool.check_devices(&metadata.path, &data.path)?;
            pool
        } else {
            if metadata.is_new() && data.is_new() {
                format(&metadata.path)?;
            } else {
                check(&metadata.path)?;
            }
            Self::load(config, &metadata.path, &data.path)?
        };
        if pool.block != config.block {
            return Err(KernelPoolError::BlockSize {
                pool: pool.name,
                found: pool.block,
                wanted: config.block,
            });
        }
        // Metadata before data, whose mark alone allows no formatting.
        for volume in [&metadata, &data].into_iter().filter(|volume| volume.is_new()) {
            group.mark_used(&volume.name)?;
        }
        Ok(pool)
    }

    /// The kernel pool of `pool` for `class`, if it is active.
    pub fn find(pool: &Uid, class: Class) -> Result<Option<Self>, KernelPoolError> {
        let name = DeviceName::kernel_pool(pool, class)?;
        let uuid = name.uuid();
        let Some(info) = dmsetup::info(&uuid)? else { return Ok(None) };
        if !info.live {
            dmsetup::remove(&name)?; // its making was interrupted
            return Ok(None);
        }
        let table: PoolTable = understood(&uuid, dmsetup::table(&uuid)?.parse())?;
        let block = BlockSize::new(Bytes(table.block_sectors.saturating_mul(512)))?;
        Ok(Some(Self { name, uuid, number: info.number, block, pool: pool.clone(), class }))
    }

    fn load(config: &KernelPoolConfig, metadata: &Path, data: &Path) -> Result<Self, KernelPoolError> {
        let table = PoolTable {
            sectors: 0,
            metadata: number_of(metadata)?,
            data: number_of(data)?,
            block_sectors: config.block.sectors(),
            low_water_blocks: 0,
            features: PoolFeatures::default(),
        };
        let table = sized(table, config)?;
        let name = DeviceName::kernel_pool(&config.pool, config.class)?;
        dmsetup::create(&name, &table.to_string(), false)?;
        Self::find(&config.pool, config.class)?.ok_or(KernelPoolError::Vanished { pool: name })
    }

    fn check_devices(&self, metadata: &Path, data: &Path) -> Result<(), KernelPoolError> {
        let table = self.table()?;
        if (table.metadata, table.data) == (number_of(metadata)?, number_of(data)?) {
            return Ok(());
        }
        Err(KernelPoolError::OtherDevices { pool: self.name.clone() })
    }

    /// Its node and identity.
    pub fn name(&self) -> &DeviceName {
        &self.name
    }

    /// The unit in which it hands out space.
    pub fn block(&self) -> BlockSize {
        self.block
    }

    /// What the kernel says of it.
    pub fn status(&self) -> Result<PoolStatus, KernelPoolError> {
        Ok(understood(&self.uuid, dmsetup::status(&self.uuid)?.parse())?)
    }

    /// The same, as [`thin::decide`] sees it.
    pub fn state(&self) -> Result<PoolState, KernelPoolError> {
        Ok(self.status()?.state(self.block))
    }

    /// Its table.
    pub fn table(&self) -> Result<PoolTable, KernelPoolError> {
        Ok(understood(&self.uuid, dmsetup::table(&self.uuid)?.parse())?)
    }

    /// The thin devices of this pool that are active, by their dm names.
    pub fn active_devices(&self) -> Result<Vec<(String, ThinTable)>, KernelPoolError> {
        let mut active = Vec::new();
        for (name, line) in dmsetup::thin_tables()? {
            let table: ThinTable = understood(&name, line.parse())?;
            if table.pool == self.number {
                active.push((name, table));
            }
        }
        Ok(active)
    }

    /// Makes one of its logical volumes larger by `by`, and the pool with it. What was interrupted is taken up by the
    /// next call, or by [`Self::refresh`].
    pub fn grow(
        &self,
        config: &KernelPoolConfig,
        group: &VolumeGroup,
        part: Part,
        by: Bytes,
        suspender: &dyn Suspender,
    ) -> Result<(), KernelPoolError> {
        let volume = volume_name(&self.pool, self.class, part)?;
        let found = group.find(&volume)?.map(|found| found.size).unwrap_or_default();
        self.grow_to(config, group, part, found.saturating_add(by), suspender)
    }

    /// Makes one of its logical volumes at least `size` large, and the pool with it. May be repeated.
    pub fn grow_to(
        &self,
        config: &KernelPoolConfig,
        group: &VolumeGroup,
        part: Part,
        size: Bytes,
        suspender: &dyn Suspender,
    ) -> Result<(), KernelPoolError> {
        group.extend_to(&volume_name(&self.pool, self.class, part)?, size)?;
        self.refresh(config, suspender)
    }

    /// Makes the pool use all of its two devices, and behave as configured. Its thin devices wait meanwhile, for
    /// milliseconds, and go on whatever happens.
    ///
    /// # Errors
    /// [`KernelPoolError::NotWritable`] for a pool whose metadata has to be checked first.
    /// [`SuspendError::OriginSilent`](super::SuspendError::OriginSilent) while the external origin of one of its active
    /// devices does not answer.
    pub fn refresh(
        &self,
        config: &KernelPoolConfig,
        suspender: &dyn Suspender,
    ) -> Result<(), KernelPoolError> {
        if let Some(why @ (StopReason::Failed | StopReason::NeedsCheck)) = self.state()?.unwritable() {
            return Err(KernelPoolError::NotWritable { pool: self.name.clone(), why });
        }
        let old = self.table()?;
        let new = sized(old, config)?;
        if new.sectors < old.sectors {
            let (was, is) = (Bytes(old.sectors * 512), Bytes(new.sectors * 512));
            return Err(KernelPoolError::Shrunk { pool: self.name.clone(), was, is });
        }
        Ok(suspender.replace_table(&self.name, &new.to_string())?)
    }

    /// Removes the pool from the kernel, and its logical volumes' nodes. What it holds stays.
    ///
    /// # Errors
    /// [`KernelPoolError::InUse`] while a thin device of it is active.
    pub fn close(self, group: &VolumeGroup) -> Result<(), KernelPoolError> {
        let active: Vec<_> = self.active_devices()?.into_iter().map(|(name, _)| name).collect();
        if !active.is_empty() {
            return Err(KernelPoolError::InUse { pool: self.name, devices: active.join(", ") });
        }
        dmsetup::remove(&self.name)?;
        for part in [Part::Data, Part::Metadata] {
            group.deactivate(&volume_name(&self.pool, self.class, part)?)?;
        }
        Ok(())
    }

    /// Deletes the logical volumes of a pool that is closed, with all they hold.
    ///
    /// # Errors
    /// [`KernelPoolError::InUse`] if it is open.
    pub fn destroy(config: &KernelPoolConfig, group: &VolumeGroup) -> Result<(), KernelPoolError> {
        if let Some(open) = Self::find(&config.pool, config.class)? {
            return Err(KernelPoolError::InUse { pool: open.name, devices: "itself".to_owned() });
        }
        // Metadata first: data without it is known to be lost, metadata without data is not.
        for part in [Part::Metadata, Part::Data] {
            group.remove_volume(&volume_name(&config.pool, config.class, part)?)?;
        }
        Ok(())
    }

    /// True if it takes new blocks and new devices.
    pub(super) fn require_writable(&self) -> Result<WorkingPool, KernelPoolError> {
        let status = self.status()?;
        match (status.state(self.block).unwritable(), status) {
            (None, PoolStatus::Working(pool)) => Ok(pool),
            (why, _) => {
                let why = why.unwrap_or(StopReason::Failed);
                Err(KernelPoolError::NotWritable { pool: self.name.clone(), why })
            }
        }
    }
}

/// The table for the present size of its devices.
fn sized(table: PoolTable, config: &KernelPoolConfig) -> Result<PoolTable, KernelPoolError> {
    let sectors = sectors_of(table.data)?;
    let sectors = sectors - sectors % table.block_sectors.max(1);
    let low_water = thin::low_water(Bytes(sectors.saturating_mul(512)));
    let features = PoolFeatures { error_if_no_space: config.when_full == WhenFull::Error, ..table.features };
    let low_water_blocks = low_water.0 / config.block.bytes().0;
    Ok(PoolTable { sectors, low_water_blocks, features, ..table })
}

/// Marks a metadata device as empty: the kernel makes its first superblock where the first block is zeros.
fn format(metadata: &Path) -> Result<(), KernelPoolError> {
    let zero = || {
        let file = OpenOptions::new().write(true).open(metadata)?;
        file.write_all_at(&[0; 4096], 0)?;
        file.sync_all()?;
        Ok(sys::flush_buffers(&file)?)
    };
    zero().map_err(|source| device_error("format", metadata, source))
}

/// Refuses metadata that is not there or not consistent.
fn check(metadata: &Path) -> Result<(), KernelPoolError> {
    let read = || {
        let file = File::open(metadata)?;
        sys::flush_buffers(&file)?; // the kernel pool wrote past what is held in memory of the device
        let mut block = [0; 4096];
        file.read_exact_at(&mut block, 0)?;
        Ok(block)
    };
    let block: [u8; 4096] = read().map_err(|source| device_error("read", metadata, source))?;
    if block[MAGIC_AT..MAGIC_AT + 8] != MAGIC.to_le_bytes() {
        return Err(KernelPoolError::MetadataLost { device: metadata.to_owned() });
    }
    program::run_whole(
        "thin_check",
        &[OsStr::new("-q"), metadata.as_os_str()],
        ENVIRONMENT,
        1 << 20,
        CHECK_LIMIT,
    )
    .map(drop)
    .map_err(|source| KernelPoolError::Damaged { device: metadata.to_owned(), source })
}

pub(super) fn number_of(device: &Path) -> Result<DeviceNumber, KernelPoolError> {
    DeviceNumber::of(device).map_err(|source| device_error("examine", device, source))
}

/// The size of a block device in sectors, from sysfs.
fn sectors_of(device: DeviceNumber) -> Result<u64, KernelPoolError> {
    let path = PathBuf::from(format!("/sys/dev/block/{device}/size"));
    let read = || {
        let text = fs::read_to_string(&path)?;
        text.trim().parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "not a number"))
    };
    read().map_err(|source| device_error("measure", &path, source))
}

/// The node of a block device: its name in sysfs is its name below `/dev`.
pub(super) fn node_of(device: DeviceNumber) -> Result<PathBuf, KernelPoolError> {
    let path = PathBuf::from(format!("/sys/dev/block/{device}"));
    let target = fs::read_link(&path).map_err(|source| device_error("find", &path, source))?;
    let name = target.file_name().unwrap_or_default().to_string_lossy().replace('!', "/");
    Ok(Path::new("/dev").join(name))
}

pub(super) fn device_error(action: &'static str, device: &Path, source: io::Error) -> KernelPoolError {
    KernelPoolError::Device { action, device: device.to_owned(), source }
}
