//! What a pool has of a volume group: the volume of its record, and two kernel pools that grow to what is promised.
//!
//! In a group of others, a volume that is never used holds the space that the kernel pools have not grown to yet.

use std::path::Path;

use berth_core::ids::Uid;
use berth_core::ledger::Class;
use berth_core::thin::{BlockSize, Layout, Part, layout};
use berth_core::units::Bytes;
use berth_device::filesystem::{self, Consent};
use berth_device::mounts::{self, FsType, MountOptions};
use berth_device::thin::{
    self, KernelPool, KernelPoolConfig, LogicalVolume, Scope, Suspender, VolumeGroup, VolumeGroupError,
    WhenFull, WipeConsent, own_volume_name, volume_name,
};

use super::super::error::AreaError;
use super::{ThinGroup, ThinSpec, flush};

/// Suffixes of the names of a pool's own volume group and volumes.
const GROUP: &str = "pool";
const RECORD: &str = "record";
const ROOM: &str = "room";

/// The volume group of a pool, with the sizes that everything in it has.
pub struct Group {
    pool: Uid,
    known: bool,
    lvm: VolumeGroup,
    block: BlockSize,
    extent: Bytes,
    layout: Layout,
    shared: bool,
}

/// The logical volumes that bear our tag and a name of the pool, against those that it should have.
pub struct Inventory {
    /// Of no use to the pool.
    pub stray: Vec<LogicalVolume>,
    /// Those that are not there, by name.
    pub lacking: Vec<String>,
}

/// The two kernel pools of a staging pool.
pub struct KernelPools {
    images: KernelPool,
    volumes: KernelPool,
}

impl KernelPools {
    /// That of a class.
    pub fn of(&self, class: Class) -> &KernelPool {
        match class {
            Class::Images => &self.images,
            Class::Volumes => &self.volumes,
        }
    }
}

impl Group {
    /// Opens the group, or makes it on devices of the pool's own. One that was there before is never made anew.
    pub fn open(pool: &Uid, spec: &ThinSpec, known: bool) -> Result<Self, AreaError> {
        let missing = thin::missing();
        if !missing.is_empty() {
            return Err(AreaError::Missing(missing.join("; ")));
        }
        let (group, space) = match &spec.group {
            ThinGroup::Exclusive { devices, wipe } => {
                let name = own_volume_name(pool, GROUP)?;
                let group = match VolumeGroup::open_own(&name, pool, devices) {
                    Err(VolumeGroupError::NoGroup { .. }) if !known => {
                        let consent = wipe.then(|| WipeConsent::for_devices(devices.iter().cloned()));
                        VolumeGroup::create(&name, pool, devices, consent.as_ref())?
                    }
                    opened => opened?,
                };
                let space = group.space()?;
                (group, space.size)
            }
            ThinGroup::Shared { name, size } => {
                (VolumeGroup::open_shared(name, &Scope::AllBut(Vec::new()))?, *size)
            }
        };
        let block = BlockSize::new(spec.block)?;
        let extent = group.space()?.extent;
        let shared = matches!(spec.group, ThinGroup::Shared { .. });
        Ok(Self {
            pool: pool.clone(),
            known,
            layout: layout(space, block, extent)?,
            lvm: group,
            block,
            extent,
            shared,
        })
    }

    /// How many bytes of data may be promised.
    pub fn total(&self) -> Bytes {
        self.layout.data
    }

    /// The unit in which the kernel pools hand out space.
    pub fn block(&self) -> BlockSize {
        self.block
    }

    /// Mounts the file system of the pool's record, making it first if nothing of the pool is there.
    pub fn mount_record(&self, mount_point: &Path) -> Result<(), AreaError> {
        let name = own_volume_name(&self.pool, RECORD)?;
        if self.lvm.find(&name)?.is_none() {
            for class in [Class::Images, Class::Volumes] {
                let data = volume_name(&self.pool, class, Part::Data)?;
                if self.lvm.find(&data)?.is_some() {
                    return Err(AreaError::RecordVolumeGone { volume: name });
                }
            }
            if self.known {
                return Err(AreaError::Gone { what: format!("the volume {name} with the pool's record") });
            }
            self.lvm.create_volume(&name, self.layout.record)?;
        }
        let volume = self.lvm.activate(&name)?;
        if volume.is_new() {
            // What it holds is left over from others, or from a formatting that was cut off.
            filesystem::mkfs(&volume.path, FsType::Ext4, Consent::ResumeInterrupted)?;
            flush(&volume.path)?;
            self.lvm.mark_used(&name)?;
        }
        let options = MountOptions { no_access_times: true, no_exec: true, ..MountOptions::default() };
        Ok(mounts::mount_device(&volume.path, mount_point, FsType::Ext4, options)?)
    }

    /// Unmounts it.
    pub fn unmount_record(&self, mount_point: &Path) -> Result<(), AreaError> {
        mounts::unmount(mount_point)?;
        let name = own_volume_name(&self.pool, RECORD)?;
        if self.lvm.find(&name)?.is_some() {
            self.lvm.deactivate(&name)?;
        }
        Ok(())
    }

    /// Opens both kernel pools, making what is not there yet.
    pub fn open_kernel_pools(&self) -> Result<KernelPools, AreaError> {
        for class in [Class::Images, Class::Volumes] {
            let least = self.extent.max(self.block.bytes());
            KernelPool::provision(&self.config(class), &self.lvm, least, self.layout.metadata)?;
        }
        if self.shared {
            let room = own_volume_name(&self.pool, ROOM)?;
            let size = self.room(self.data_of(Class::Images)?.saturating_add(self.data_of(Class::Volumes)?));
            if size > Bytes::ZERO {
                self.lvm.create_volume(&room, size)?;
                self.lvm.extend_to(&room, size)?; // a growth that was cut off had made it smaller
            }
        }
        let open = |class| KernelPool::open(&self.config(class), &self.lvm);
        Ok(KernelPools { images: open(Class::Images)?, volumes: open(Class::Volumes)? })
    }

    /// What is there of the pool, and what is not.
    pub fn inventory(&self) -> Result<Inventory, AreaError> {
        let mut names = vec![own_volume_name(&self.pool, RECORD)?];
        for class in [Class::Images, Class::Volumes] {
            for part in [Part::Data, Part::Metadata] {
                names.push(volume_name(&self.pool, class, part)?);
            }
        }
        let room = own_volume_name(&self.pool, ROOM)?;
        let prefix = own_volume_name(&self.pool, "")?;
        let (mut found, mut stray) = (Vec::new(), Vec::new());
        for volume in self.lvm.volumes()?.into_iter().filter(LogicalVolume::is_ours) {
            if volume.name.starts_with(&prefix) {
                if names.contains(&volume.name) || (self.shared && volume.name == room) {
                    found.push(volume.name);
                } else {
                    stray.push(volume);
                }
            }
        }
        names.retain(|name| !found.contains(name));
        Ok(Inventory { stray, lacking: names })
    }

    /// Makes a kernel pool large enough for what is promised in it. May be repeated.
    pub fn grow(
        &self,
        kernel: &KernelPools,
        class: Class,
        promised: Bytes,
        suspender: &dyn Suspender,
    ) -> Result<(), AreaError> {
        let pool = kernel.of(class);
        if pool.state()?.data.total >= promised {
            return Ok(());
        }
        let to = promised.round_up(self.block.bytes()).round_up(self.extent);
        let other = match class {
            Class::Images => Class::Volumes,
            Class::Volumes => Class::Images,
        };
        let both = to.saturating_add(self.data_of(other)?);
        let most = self.most_data();
        if both > most {
            return Err(AreaError::Bound { pool: pool.name().clone(), needed: to, both, most });
        }
        let room = own_volume_name(&self.pool, ROOM)?;
        if self.shared && self.lvm.find(&room)?.is_some() {
            match self.room(both) {
                Bytes::ZERO => self.lvm.remove_volume(&room)?,
                size => self.lvm.shrink_to(&room, size)?,
            }
        }
        Ok(pool.grow_to(&self.config(class), &self.lvm, Part::Data, to, suspender)?)
    }

    /// Closes the kernel pools that are open, whoever opened them.
    pub fn close_kernel_pools(&self) -> Result<(), AreaError> {
        for class in [Class::Volumes, Class::Images] {
            if let Some(pool) = KernelPool::find(&self.pool, class)? {
                pool.close(&self.lvm)?;
            }
        }
        Ok(())
    }

    /// Deletes every volume of the pool, all closed, and the group if it was made for it.
    pub fn destroy(self) -> Result<(), AreaError> {
        for class in [Class::Volumes, Class::Images] {
            KernelPool::destroy(&self.config(class), &self.lvm)?;
        }
        for what in [ROOM, RECORD] {
            self.lvm.remove_volume(&own_volume_name(&self.pool, what)?)?;
        }
        if !self.shared {
            self.lvm.remove()?;
        }
        Ok(())
    }

    /// What data volumes may come to in all: each kernel pool has whole extents.
    fn most_data(&self) -> Bytes {
        self.layout.data.saturating_add(self.extent).saturating_add(self.extent)
    }

    /// What is held back while data volumes have `both` in all.
    fn room(&self, both: Bytes) -> Bytes {
        self.most_data().saturating_add(self.layout.spare).saturating_sub(both)
    }

    fn data_of(&self, class: Class) -> Result<Bytes, AreaError> {
        let found = self.lvm.find(&volume_name(&self.pool, class, Part::Data)?)?;
        Ok(found.map(|volume| volume.size).unwrap_or_default())
    }

    fn config(&self, class: Class) -> KernelPoolConfig {
        KernelPoolConfig { pool: self.pool.clone(), class, block: self.block, when_full: WhenFull::Queue }
    }
}
