//! The device of a template: made as a clone, asked, made local, and let go.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_core::hydration::{CloneMode, Geometry, Metadata, Shown};
use berth_core::ids::Uid;
use berth_core::units::Bytes;

use super::error::TemplateError;
use super::metadata::{FoundMetadata, clear_metadata, find_metadata};
use super::table::{CloneStatus, CloneTable, LinearTable};
use super::writer::TemplateWriter;
use crate::program;
use crate::thin::dmsetup::{self, understood};
use crate::thin::names::DeviceName;
use crate::thin::suspender::{SuspendError, Suspender};
use crate::thin::table::DeviceNumber;

/// What templates that become local need besides thin provisioning and this node lacks, as one phrase each.
pub fn missing() -> Vec<String> {
    match dmsetup::targets() {
        Err(error) => vec![format!("device mapper does not answer: {error}")],
        Ok(targets) if !targets.iter().any(|target| target == "clone") => {
            vec!["the kernel has no target clone: load the module dm-clone".to_owned()]
        }
        Ok(_) => Vec::new(),
    }
}

/// Loads what the kernel needs for templates that become local, if it lacks that and can. What came of it is told by [`missing`].
pub fn load() {
    if !missing().is_empty()
        && let Err(error) = program::run("modprobe", ["dm-clone"], Duration::from_secs(10))
    {
        tracing::debug!(%error, "dm-clone is not loaded");
    }
}

/// The longest request that all of these devices take: what a region may be at most.
pub fn longest_request(devices: &[&Path]) -> Result<Bytes, TemplateError> {
    let of = |device: &Path| {
        let number = DeviceNumber::of(device)?;
        let kib: u64 = in_sysfs(number, "queue/max_sectors_kb")?;
        Ok(Bytes::kib(kib))
    };
    let mut longest = Bytes(u64::MAX);
    for device in devices {
        let examined =
            |source| TemplateError::Device { action: "examine", device: (*device).to_owned(), source };
        longest = longest.min(of(device).map_err(examined)?);
    }
    Ok(longest)
}

/// What a template is made of while not all of it is local.
#[derive(Clone, Copy, Debug)]
pub struct CloneConfig<'a> {
    /// The staging pool.
    pub pool: &'a Uid,
    /// Whose it is.
    pub holder: &'a Uid,
    /// Its size and its regions, the same for ever.
    pub geometry: Geometry,
    /// The thin device that the content comes to lie on. Blank at first, and nobody else's.
    pub destination: &'a Path,
    /// The device for the metadata: [`Geometry::metadata`] large at least.
    pub metadata: &'a Path,
    /// What is not local is read from here. It has the template's size.
    pub source: &'a Path,
    /// The metadata was never used, whatever lies there: it is cleared first.
    pub metadata_is_new: bool,
}

/// A template that is active. Dropping it leaves it so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateDevice {
    name: DeviceName,
    uuid: String,
}

impl TemplateDevice {
    /// Makes a template appear, as a clone. One that is active in the same way already is taken over, with its metadata as it
    /// is.
    ///
    /// # Errors
    /// [`TemplateError::Different`] if it is active in another way, also if it is local by now. What it is made of is looked
    /// at first: [`TemplateError::Missing`], [`TemplateError::OtherSize`], [`TemplateError::ForeignMetadata`].
    pub fn show_clone(config: &CloneConfig<'_>) -> Result<Self, TemplateError> {
        let device = Self::named(config.pool, config.holder)?;
        let size = config.geometry.size();
        let table = CloneTable {
            sectors: size.0 / 512,
            metadata: device.part("metadata", config.metadata, None)?,
            destination: device.part("destination", config.destination, Some(size))?,
            source: device.part("source", config.source, Some(size))?,
            region: config.geometry.region(),
        };
        if device.take_over(&table.to_string())? {
            return Ok(device);
        }
        device.prepare_metadata(config, table.metadata)?;
        dmsetup::create(&device.name, &table.to_string(), false)?;
        Ok(device)
    }

    /// Makes a template appear of which everything is local: its destination, read-only. One that is active so already is taken
    /// over.
    ///
    /// # Errors
    /// As [`Self::show_clone`].
    pub fn show_local(
        pool: &Uid,
        holder: &Uid,
        size: Bytes,
        destination: &Path,
    ) -> Result<Self, TemplateError> {
        let device = Self::named(pool, holder)?;
        let destination = device.part("destination", destination, Some(size))?;
        let table = LinearTable { sectors: size.0 / 512, device: destination };
        if !device.take_over(&table.to_string())? {
            dmsetup::create(&device.name, &table.to_string(), true)?;
        }
        Ok(device)
    }

    /// The template of a holder, if it is active.
    pub fn find(pool: &Uid, holder: &Uid) -> Result<Option<Self>, TemplateError> {
        let device = Self::named(pool, holder)?;
        let live = dmsetup::info(&device.uuid)?.is_some_and(|info| info.live);
        Ok(live.then_some(device))
    }

    /// How the template of a holder is shown, as decisions see it. Changes nothing.
    pub fn shown(pool: &Uid, holder: &Uid, size: Bytes, destination: &Path) -> Result<Shown, TemplateError> {
        let device = Self::named(pool, holder)?;
        match dmsetup::info(&device.uuid)? {
            None => return Ok(Shown::Absent),
            Some(info) if !info.live => return Ok(Shown::Unfinished),
            Some(_) => {}
        }
        let line = dmsetup::table(&device.uuid)?;
        let Ok(destination) = DeviceNumber::of(destination) else { return Ok(Shown::Different) };
        if line.parse() == Ok(LinearTable { sectors: size.0 / 512, device: destination }) {
            return Ok(Shown::Linear);
        }
        match line.parse::<CloneTable>() {
            Ok(table) if (table.sectors * 512, table.destination) == (size.0, destination) => {
                let status = device.status()?;
                Ok(Shown::Clone { mode: status.mode(), progress: status.progress() })
            }
            _ => Ok(Shown::Different),
        }
    }

    /// Its identity.
    pub fn name(&self) -> &DeviceName {
        &self.name
    }

    /// Its node: the external origin of volumes.
    pub fn path(&self) -> PathBuf {
        self.name.path()
    }

    /// Its table as a clone; `None` if everything is local.
    pub fn clone_table(&self) -> Result<Option<CloneTable>, TemplateError> {
        let line = dmsetup::table(&self.uuid)?;
        if line.parse::<LinearTable>().is_ok() {
            return Ok(None);
        }
        Ok(Some(understood(&self.uuid, line.parse())?))
    }

    /// What the kernel says of a clone, without waiting for anything. Not all that is local may be durable.
    pub fn status(&self) -> Result<CloneStatus, TemplateError> {
        Ok(understood(&self.uuid, dmsetup::status(&self.uuid)?.parse())?)
    }

    /// For chunks and holes.
    ///
    /// # Errors
    /// [`TemplateError::NotActive`] if it is no clone, or none any more.
    pub fn writer(&self) -> Result<TemplateWriter, TemplateError> {
        let Some(table) = self.clone_table()? else {
            return Err(TemplateError::NotActive { template: self.name.clone() });
        };
        let geometry = Geometry::new(Bytes(table.sectors.saturating_mul(512)), table.region);
        let geometry =
            geometry.map_err(|source| TemplateError::Geometry { template: self.name.clone(), source })?;
        TemplateWriter::open(self.clone(), geometry)
    }

    /// Flushes it, and makes sure that all of it is local and durable.
    ///
    /// # Errors
    /// [`TemplateError::Incomplete`], [`TemplateError::Stopped`].
    pub fn confirm_local(&self) -> Result<(), TemplateError> {
        self.flush()?;
        if self.clone_table()?.is_none() {
            return Ok(());
        }
        let status: CloneStatus = understood(&self.uuid, dmsetup::committed_status(&self.uuid)?.parse())?;
        let template = || self.name.clone();
        match status.progress() {
            Some(progress) if progress.is_complete() => Ok(()),
            Some(progress) => Err(TemplateError::Incomplete { template: template(), progress }),
            None => Err(TemplateError::Stopped { template: template(), mode: CloneMode::Failed }),
        }
    }

    /// Makes it its destination alone, in use or not. It is suspended for milliseconds. Source and metadata are not used any
    /// more afterwards. One that is so already is left alone.
    ///
    /// # Errors
    /// [`TemplateError::Suspend`]: whoever suspends refuses while not all of it is local.
    pub fn make_local(&self, suspender: &dyn Suspender) -> Result<(), TemplateError> {
        let Some(table) = self.clone_table()? else { return Ok(()) };
        let local = LinearTable { sectors: table.sectors, device: table.destination };
        suspender.replace_table(&self.name, &local.to_string()).map_err(|error| match error {
            SuspendError::Dm(error) => error.into(),
            source => TemplateError::Suspend { template: self.name.clone(), source },
        })
    }

    /// Removes the template of a holder if its making was interrupted. One that is active is left alone.
    pub fn remove_unfinished(pool: &Uid, holder: &Uid) -> Result<(), TemplateError> {
        let device = Self::named(pool, holder)?;
        match dmsetup::info(&device.uuid)? {
            Some(info) if !info.live => Ok(dmsetup::remove(&device.name)?),
            _ => Ok(()),
        }
    }

    /// Makes it disappear. What is local stays so, what was written since the last flush too. One that is not active is no
    /// error.
    ///
    /// # Errors
    /// [`TemplateError::InUse`] if volumes lie on it, or others have it open for longer than a few seconds.
    pub fn hide(self) -> Result<(), TemplateError> {
        match dmsetup::remove(&self.name) {
            Err(error) if error.says("Device or resource busy") => {
                Err(TemplateError::InUse { template: self.name })
            }
            done => Ok(done?),
        }
    }

    fn named(pool: &Uid, holder: &Uid) -> Result<Self, TemplateError> {
        let name = DeviceName::template(pool, holder)?;
        Ok(Self { uuid: name.uuid(), name })
    }

    /// The number of a device that it is made of, which has this size.
    fn part(
        &self,
        part: &'static str,
        device: &Path,
        size: Option<Bytes>,
    ) -> Result<DeviceNumber, TemplateError> {
        let examined = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => {
                TemplateError::Missing { template: self.name.clone(), part, device: device.to_owned() }
            }
            _ => TemplateError::Device { action: "examine", device: device.to_owned(), source },
        };
        let number = DeviceNumber::of(device).map_err(examined)?;
        let found = size_of(number).map_err(examined)?;
        match size {
            Some(expected) if expected != found => Err(TemplateError::OtherSize {
                template: self.name.clone(),
                part,
                device: device.to_owned(),
                found,
                expected,
            }),
            _ => Ok(number),
        }
    }

    /// True if it is active with this table. One whose making was interrupted is removed.
    fn take_over(&self, table: &str) -> Result<bool, TemplateError> {
        match dmsetup::info(&self.uuid)? {
            None => Ok(false),
            Some(info) if !info.live => {
                dmsetup::remove(&self.name)?;
                Ok(false)
            }
            Some(_) => {
                let found = dmsetup::table(&self.uuid)?;
                let found = found.trim();
                if found == table {
                    return Ok(true);
                }
                Err(TemplateError::Different { template: self.name.clone(), table: found.to_owned() })
            }
        }
    }

    fn prepare_metadata(&self, config: &CloneConfig<'_>, number: DeviceNumber) -> Result<(), TemplateError> {
        let (device, needed) = (config.metadata.to_owned(), config.geometry.metadata());
        let found = size_of(number).map_err(|source| TemplateError::Device {
            action: "examine",
            device: device.clone(),
            source,
        })?;
        if found < needed {
            let template = self.name.clone();
            return Err(TemplateError::MetadataTooSmall { template, device, found, needed });
        }
        if config.metadata_is_new {
            return clear_metadata(config.metadata);
        }
        match find_metadata(config.metadata)?.unwrap_or(FoundMetadata::Other).of(&config.geometry) {
            Metadata::Blank | Metadata::OfThis => Ok(()),
            Metadata::Missing | Metadata::OfOther => {
                Err(TemplateError::ForeignMetadata { template: self.name.clone(), device })
            }
        }
    }

    fn flush(&self) -> Result<(), TemplateError> {
        let flush = || OpenOptions::new().read(true).open(self.path())?.sync_all();
        flush().map_err(|source| {
            let template = self.name.clone();
            match self.status().map(|status| status.mode()) {
                Ok(mode @ (CloneMode::ReadOnly | CloneMode::Failed)) => {
                    TemplateError::Stopped { template, mode }
                }
                _ => TemplateError::Write { action: "flush", template, offset: Bytes::ZERO, source },
            }
        })
    }
}

fn size_of(device: DeviceNumber) -> io::Result<Bytes> {
    let sectors: u64 = in_sysfs(device, "size")?;
    Ok(Bytes(sectors.saturating_mul(512)))
}

/// A number that sysfs shows of a block device.
fn in_sysfs(device: DeviceNumber, file: &str) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/sys/dev/block/{device}/{file}"))?;
    text.trim().parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "not a number"))
}
