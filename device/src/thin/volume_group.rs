//! Volume groups: one of our own on given devices, or a part of somebody else's.
//!
//! Every logical volume of ours bears the tag [`TAG`], and nothing without it is changed, in either kind of group.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use berth_core::ids::Uid;
use berth_core::units::Bytes;
use nix::libc;
use serde::Deserialize;

use super::group_error::VolumeGroupError;
use super::lvm::{self, Scope};
use super::users::users;
use crate::filesystem;
use crate::sys;

/// On every logical volume of ours, and on every group that we made.
pub const TAG: &str = "berth";
/// On a logical volume that was made and never used: what it holds is left over from others.
const TAG_NEW: &str = "berth.new";
/// Followed by the UID of the pool that a group was made for.
pub(super) const TAG_POOL: &str = "berth.pool=";
/// How much of each end of a device is zeroed when it is wiped: every signature that is looked for lies within.
const WIPED: usize = 1 << 20;

/// A person's consent to lose whatever is on these devices. Nothing in Berth makes one up.
#[derive(Clone, Debug)]
pub struct WipeConsent {
    devices: Vec<PathBuf>,
}

impl WipeConsent {
    /// For exactly these, by the names under which they are used.
    pub fn for_devices(devices: impl IntoIterator<Item = PathBuf>) -> Self {
        Self { devices: devices.into_iter().collect() }
    }

    fn covers(&self, device: &Path) -> bool {
        self.devices.iter().any(|named| named == device)
    }
}

/// A volume group that is there with all its devices.
#[derive(Clone, Debug)]
pub struct VolumeGroup {
    name: String,
    devices: Vec<PathBuf>,
    exclusive: bool,
}

/// What a group has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupSpace {
    /// In all.
    pub size: Bytes,
    /// In no volume.
    pub free: Bytes,
    /// The unit in which it gives.
    pub extent: Bytes,
}

/// A logical volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogicalVolume {
    /// Its name.
    pub name: String,
    /// LVM's UUID of it.
    pub uuid: String,
    /// Its size.
    pub size: Bytes,
    /// True if its node is there.
    pub active: bool,
    /// Its node, which is there while it is active.
    pub path: PathBuf,
    /// Its tags.
    pub tags: Vec<String>,
}

impl LogicalVolume {
    /// True if it is Berth's.
    pub fn is_ours(&self) -> bool {
        self.tags.iter().any(|tag| tag == TAG)
    }

    /// True if it is ours and was never used: what it holds is left over from others.
    pub fn is_new(&self) -> bool {
        self.is_ours() && self.tags.iter().any(|tag| tag == TAG_NEW)
    }
}

#[derive(Deserialize)]
struct GroupRow {
    #[serde(rename = "vg_size", deserialize_with = "lvm::bytes")]
    size: u64,
    #[serde(rename = "vg_free", deserialize_with = "lvm::bytes")]
    free: u64,
    #[serde(rename = "vg_extent_size", deserialize_with = "lvm::bytes")]
    extent_size: u64,
    #[serde(rename = "vg_missing_pv_count", deserialize_with = "lvm::bytes")]
    missing_pv_count: u64,
    #[serde(rename = "vg_tags")]
    tags: String,
}

#[derive(Deserialize)]
struct VolumeRow {
    #[serde(rename = "lv_name")]
    name: String,
    #[serde(rename = "lv_uuid")]
    uuid: String,
    #[serde(rename = "lv_size", deserialize_with = "lvm::bytes")]
    size: u64,
    #[serde(rename = "lv_tags")]
    tags: String,
    #[serde(rename = "lv_active")]
    active: String,
    #[serde(rename = "lv_path")]
    path: String,
}

#[derive(Deserialize)]
struct DeviceRow {
    pv_name: PathBuf,
}

impl VolumeGroup {
    /// Makes a group of `pool`'s own on these devices.
    ///
    /// # Errors
    /// [`VolumeGroupError::NotBlank`] if any of them holds anything and `consent` does not name it; nothing was written
    /// then. [`VolumeGroupError::DeviceInUse`] if one is mounted or in use in another way, with consent or without.
    pub fn create(
        name: &str,
        pool: &Uid,
        devices: &[PathBuf],
        consent: Option<&WipeConsent>,
    ) -> Result<Self, VolumeGroupError> {
        check_name(name)?;
        check_name(pool.as_str())?;
        // Held, with the right to be the only user, until all have been looked at and wiped.
        let held: Result<Vec<_>, _> = devices.iter().map(|device| hold(device)).collect();
        let held = held?;
        let mut found = Vec::new();
        for device in devices {
            if let Some(signature) = filesystem::probe_signature(device)? {
                found.push((device.clone(), signature));
            }
        }
        let unconsented = |device: &Path| !consent.is_some_and(|consent| consent.covers(device));
        if found.iter().any(|(device, _)| unconsented(device)) {
            found.retain(|(device, _)| unconsented(device));
            return Err(VolumeGroupError::NotBlank { found });
        }
        for (device, file) in devices.iter().zip(&held) {
            if found.iter().any(|(dirty, _)| dirty == device) {
                wipe(device, file)?;
            }
        }
        drop(held);
        let tag = format!("{TAG_POOL}{pool}");
        let mut arguments = vec!["--yes", "--addtag", TAG, "--addtag", &tag, name];
        arguments.extend(devices.iter().filter_map(|device| device.to_str()));
        lvm::run(name, &Scope::Only(devices.to_vec()), "vgcreate", &arguments)?;
        Self::open_own(name, pool, devices)
    }

    /// Opens the group that was made for `pool` on these devices.
    ///
    /// # Errors
    /// [`VolumeGroupError::NoGroup`], [`VolumeGroupError::NotOurs`], [`VolumeGroupError::Incomplete`].
    pub fn open_own(name: &str, pool: &Uid, devices: &[PathBuf]) -> Result<Self, VolumeGroupError> {
        let group = Self::open(name, &Scope::Only(devices.to_vec()), true)?;
        let tags = group.row()?.tags;
        let own = format!("{TAG_POOL}{pool}");
        if !tags.split(',').any(|tag| tag == own) {
            return Err(VolumeGroupError::NotOurs { group: name.to_owned(), tags });
        }
        Ok(group)
    }

    /// Opens somebody else's group, to use what is free in it.
    pub fn open_shared(name: &str, scope: &Scope) -> Result<Self, VolumeGroupError> {
        Self::open(name, scope, false)
    }

    /// From then on, LVM sees only the devices of the group.
    fn open(name: &str, scope: &Scope, exclusive: bool) -> Result<Self, VolumeGroupError> {
        check_name(name)?;
        let select = format!("vg_name={name}");
        let rows: Vec<DeviceRow> = lvm::report(name, scope, "pvs", "pv_name", &["-S", &select])?;
        let devices: Vec<_> = rows.into_iter().map(|row| row.pv_name).collect();
        let missing = devices.iter().filter(|device| !device.starts_with("/dev")).count();
        if devices.is_empty() {
            return Err(VolumeGroupError::NoGroup { group: name.to_owned() });
        }
        let incomplete = |missing| VolumeGroupError::Incomplete { group: name.to_owned(), missing };
        if missing > 0 {
            return Err(incomplete(missing as u64));
        }
        let group = Self { name: name.to_owned(), devices, exclusive };
        match group.row()?.missing_pv_count {
            0 => Ok(group),
            missing => Err(incomplete(missing)),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The devices it lies on.
    pub fn devices(&self) -> &[PathBuf] {
        &self.devices
    }

    /// What it has.
    pub fn space(&self) -> Result<GroupSpace, VolumeGroupError> {
        let row = self.row()?;
        Ok(GroupSpace { size: Bytes(row.size), free: Bytes(row.free), extent: Bytes(row.extent_size) })
    }

    /// Every volume in it, ours or not.
    pub fn volumes(&self) -> Result<Vec<LogicalVolume>, VolumeGroupError> {
        let fields = "lv_name,lv_uuid,lv_size,lv_tags,lv_active,lv_path";
        let rows: Vec<VolumeRow> = match lvm::report(&self.name, &self.scope(), "lvs", fields, &[&self.name])
        {
            Err(error) if lvm::is_missing(&error) => return Err(self.gone()),
            rows => rows?,
        };
        let volume = |row: VolumeRow| LogicalVolume {
            name: row.name,
            uuid: row.uuid,
            size: Bytes(row.size),
            active: row.active == "active",
            path: PathBuf::from(row.path),
            tags: row.tags.split(',').filter(|tag| !tag.is_empty()).map(str::to_owned).collect(),
        };
        Ok(rows.into_iter().map(volume).collect())
    }

    /// The volume of this name, if there is one and it is ours.
    ///
    /// # Errors
    /// [`VolumeGroupError::Foreign`] if it is somebody else's.
    pub fn find(&self, volume: &str) -> Result<Option<LogicalVolume>, VolumeGroupError> {
        check_name(volume)?;
        let found = self.volumes()?.into_iter().find(|found| found.name == volume);
        match found {
            Some(found) if !found.is_ours() => Err(self.foreign(volume)),
            found => Ok(found),
        }
    }

    /// Makes a volume of at least `size`, inactive, not zeroed, and marked as new. One of ours that has the name already
    /// is taken as it is.
    pub fn create_volume(&self, volume: &str, size: Bytes) -> Result<LogicalVolume, VolumeGroupError> {
        if let Some(found) = self.find(volume)? {
            return Ok(found);
        }
        self.need(size)?;
        let bytes = format!("{}b", size.0);
        let new =
            ["--yes", "-Wn", "-Zn", "-an", "--addtag", TAG, "--addtag", TAG_NEW, "-n", volume, "-L", &bytes];
        lvm::run(&self.name, &self.scope(), "lvcreate", &[&new[..], &[&self.name]].concat())?;
        self.ours(volume)
    }

    /// Says that a volume is in use from now on: see [`LogicalVolume::is_new`].
    pub fn mark_used(&self, volume: &str) -> Result<(), VolumeGroupError> {
        if self.ours(volume)?.is_new() {
            self.change(volume, "lvchange", &["--deltag", TAG_NEW])?;
        }
        Ok(())
    }

    /// Makes a volume of ours at least `size` large. What is that large already stays.
    pub fn extend_to(&self, volume: &str, size: Bytes) -> Result<LogicalVolume, VolumeGroupError> {
        let found = self.ours(volume)?;
        if found.size >= size {
            return Ok(found);
        }
        self.need(size.saturating_sub(found.size))?;
        self.change(volume, "lvextend", &["--yes", "-L", &format!("{}b", size.0)])?;
        self.ours(volume)
    }

    /// Makes a volume of ours that holds nothing at most `size` large. What is that small already stays.
    ///
    /// # Errors
    /// [`VolumeGroupError::InUse`] if it was ever used.
    pub fn shrink_to(&self, volume: &str, size: Bytes) -> Result<(), VolumeGroupError> {
        let found = self.ours(volume)?;
        if !found.is_new() || found.active {
            return Err(VolumeGroupError::InUse { group: self.name.clone(), volume: volume.to_owned() });
        }
        if found.size <= size {
            return Ok(());
        }
        let bytes = format!("{}b", size.0);
        if self.change(volume, "lvreduce", &["--yes", "--force", "-L", &bytes]).is_err() {
            // From 2.03.17 on, LVM refuses where it sees a file system, and what is left over from others may look like one.
            self.remove_volume(volume)?;
            self.create_volume(volume, size)?;
        }
        Ok(())
    }

    /// Makes the node of a volume of ours appear.
    pub fn activate(&self, volume: &str) -> Result<LogicalVolume, VolumeGroupError> {
        let found = self.ours(volume)?;
        if !found.active {
            self.change(volume, "lvchange", &["-ay"])?;
        }
        Ok(LogicalVolume { active: true, ..found })
    }

    /// Makes the node of a volume of ours go.
    pub fn deactivate(&self, volume: &str) -> Result<(), VolumeGroupError> {
        if self.ours(volume)?.active {
            self.change(volume, "lvchange", &["-an"])?;
        }
        Ok(())
    }

    /// Deletes a volume of ours; one that is not there is no error. LVM refuses while it is in use.
    pub fn remove_volume(&self, volume: &str) -> Result<(), VolumeGroupError> {
        if self.find(volume)?.is_some() {
            self.change(volume, "lvremove", &["--yes", "-S", "lv_tags=berth"])?;
        }
        Ok(())
    }

    /// Deletes a group of our own that holds nothing any more, and gives its devices back.
    ///
    /// # Errors
    /// [`VolumeGroupError::NotEmpty`] while anybody has a volume in it; [`VolumeGroupError::NotOurs`] for a shared one.
    pub fn remove(self) -> Result<(), VolumeGroupError> {
        if !self.exclusive {
            return Err(VolumeGroupError::NotOurs { group: self.name.clone(), tags: self.row()?.tags });
        }
        let volumes: Vec<_> = self.volumes()?.into_iter().map(|volume| volume.name).collect();
        if !volumes.is_empty() {
            return Err(VolumeGroupError::NotEmpty { group: self.name, volumes: volumes.join(", ") });
        }
        // Without --yes: LVM asks before it removes volumes, and gets no answer.
        lvm::run(&self.name, &self.scope(), "vgremove", &[&self.name])?;
        let devices: Vec<_> = self.devices.iter().filter_map(|device| device.to_str()).collect();
        lvm::run(&self.name, &self.scope(), "pvremove", &devices).map(drop)
    }

    fn scope(&self) -> Scope {
        Scope::Only(self.devices.clone())
    }

    fn row(&self) -> Result<GroupRow, VolumeGroupError> {
        let fields = "vg_size,vg_free,vg_extent_size,vg_missing_pv_count,vg_tags";
        match lvm::report(&self.name, &self.scope(), "vgs", fields, &[&self.name]) {
            Err(error) if lvm::is_missing(&error) => Err(self.gone()),
            rows => rows?.pop().ok_or_else(|| self.gone()),
        }
    }

    fn gone(&self) -> VolumeGroupError {
        VolumeGroupError::NoGroup { group: self.name.clone() }
    }

    fn ours(&self, volume: &str) -> Result<LogicalVolume, VolumeGroupError> {
        self.find(volume)?
            .ok_or_else(|| VolumeGroupError::NoVolume { group: self.name.clone(), volume: volume.to_owned() })
    }

    fn foreign(&self, volume: &str) -> VolumeGroupError {
        VolumeGroupError::Foreign { group: self.name.clone(), volume: volume.to_owned() }
    }

    /// Only after the volume was found to be ours.
    fn change(&self, volume: &str, command: &'static str, options: &[&str]) -> Result<(), VolumeGroupError> {
        let path = format!("{}/{volume}", self.name);
        lvm::run(&self.name, &self.scope(), command, &[options, &[&path]].concat()).map(drop)
    }

    fn need(&self, size: Bytes) -> Result<(), VolumeGroupError> {
        let space = self.space()?;
        let needed = size.round_up(space.extent);
        if needed > space.free {
            return Err(VolumeGroupError::NoSpace { group: self.name.clone(), needed, free: space.free });
        }
        Ok(())
    }
}

/// Letters, digits and `_.+-`, not beginning with `-` or `.`: what LVM takes as a name, and nothing else.
fn check_name(name: &str) -> Result<(), VolumeGroupError> {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"_.+-".contains(&b);
    if name.is_empty() || name.len() > 100 || name.starts_with(['-', '.']) || !name.bytes().all(good) {
        return Err(VolumeGroupError::BadName { name: name.to_owned() });
    }
    Ok(())
}

/// Opens a device that nobody else uses; the kernel lets nobody mount it while it is held.
fn hold(device: &Path) -> Result<File, VolumeGroupError> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(device).map_err(|source| {
        match source.raw_os_error() {
            Some(libc::EBUSY) => {
                VolumeGroupError::DeviceInUse { device: device.to_owned(), by: users(device) }
            }
            _ => device_error("take", device, source),
        }
    })
}

fn wipe(device: &Path, file: &File) -> Result<(), VolumeGroupError> {
    let zero = || {
        let size = sys::block_device_bytes(file)?;
        let zeros = vec![0; usize::try_from(size).unwrap_or(WIPED).min(WIPED)];
        file.write_all_at(&zeros, 0)?;
        file.write_all_at(&zeros, size - zeros.len() as u64)?;
        file.sync_all()
    };
    zero().map_err(|source| device_error("wipe", device, source))
}

fn device_error(action: &'static str, device: &Path, source: io::Error) -> VolumeGroupError {
    VolumeGroupError::Device { action, device: device.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_mean_something_else_to_lvm_are_refused() {
        for good in ["vg0", "berth-0f3c9a1e-images-data", "a.b_c+d"] {
            check_name(good).unwrap();
        }
        for bad in ["", "-y", ".", "a/b", "a b", "@tag", "a\"b", &"x".repeat(101)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn consent_is_for_named_devices_only() {
        let consent = WipeConsent::for_devices([PathBuf::from("/dev/sdb")]);
        assert!(consent.covers(Path::new("/dev/sdb")) && !consent.covers(Path::new("/dev/sdb1")));
    }

    #[test]
    fn ours_is_what_bears_the_tag_itself() {
        let with = |tags: &[&str]| LogicalVolume {
            name: "x".to_owned(),
            uuid: String::new(),
            size: Bytes::ZERO,
            active: false,
            path: PathBuf::new(),
            tags: tags.iter().map(ToString::to_string).collect(),
        };
        assert!(with(&["x", "berth"]).is_ours() && !with(&["x", "berth"]).is_new());
        assert!(with(&["berth", "berth.new"]).is_new());
        assert!(!with(&["berth.new"]).is_new() && !with(&["berthed"]).is_ours() && !with(&[]).is_ours());
    }
}
