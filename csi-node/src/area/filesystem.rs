//! The area of a `filesystem` pool: files and directories in one XFS image, which shares blocks between them.

mod bounded;
mod maps;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_api::defaults;
use berth_core::ids::{Digest, Uid};
use berth_core::ledger::{Charge, Class};
use berth_core::units::Bytes;
use berth_device::files::{self, FileError};
use berth_device::loop_device::{self, LoopOptions};
use berth_device::mounts;
use berth_device::partition::Extent;
use berth_device::pool_area::{self, Advisory, PoolArea, PoolAreaConfig, PoolIdentity, is_claimed};
use berth_device::users::users;
use berth_record::{ChangeError, ImageState, PoolRecord, VolumeOrigin, VolumeState, tables};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::error::{AreaError, io_error};
use super::{
    Area, BoundedDir, Copy, DIRECTORIES, Place, Reading, has_directories, make_directories, template_device,
    volume_entry,
};
use crate::operation::{Finding, FindingKind};
use crate::telemetry::chain;

/// What is read at once where blocks cannot be shared.
const PIECE: usize = 1 << 20;
/// Percent of an empty area that may be promised; the rest is headroom.
const TOTAL_PERCENT: u64 = 100 - defaults::HEADROOM_PERCENT as u64;

/// An open area.
pub struct Filesystem {
    area: PoolArea,
}

impl Filesystem {
    /// Makes or opens the area in `dir`. Blocks, for as long as making a file system takes.
    pub fn open(place: &Place, dir: &Path, size: Bytes) -> Result<Self, AreaError> {
        if place.known && !is_claimed(dir) {
            return Err(AreaError::Gone { what: format!("the area in {}", dir.display()) });
        }
        let config = PoolAreaConfig {
            dir: dir.to_owned(),
            size,
            mount_point: place.mount_point.clone(),
            identity: identity(place),
            headroom_percent: defaults::HEADROOM_PERCENT,
        };
        Ok(Self { area: PoolArea::open_or_create(&config)? })
    }

    /// Makes the area in `dir` this node's.
    pub fn take_over(place: &Place, dir: &Path) -> Result<(), AreaError> {
        Ok(pool_area::take_over(dir, &identity(place), &place.mount_point)?)
    }

    /// Ends the deletion of the area in `dir`.
    pub fn destroy_rest(place: &Place, dir: &Path) -> Result<(), AreaError> {
        Ok(pool_area::destroy_rest(dir, &identity(place), &place.mount_point)?)
    }

    /// A file with what `source` has, zeros after it, never larger than `size`. Shares the source's blocks where the file
    /// system can; where it cannot, a source that somebody writes to is refused.
    fn copy(source: &Path, path: &Path, size: Bytes) -> Result<File, AreaError> {
        let found = length_of(source)?;
        if found > size {
            return Err(AreaError::ImageTooLarge { path: source.to_owned(), found, promised: size });
        }
        let file = match files::reflink(source, path) {
            Err(FileError::ReflinkUnsupported { .. }) => {
                if loop_device::find(source)?.iter().any(|device| !device.read_only) {
                    return Err(AreaError::NoInstantCopy { path: source.to_owned() });
                }
                copy_sparse(source, found, path)?
            }
            other => other?,
        };
        let length = file.metadata().map_err(io_error("examine", path))?.len();
        if length < size.0 {
            file.set_len(size.0).map_err(io_error("extend", path))?;
        }
        Ok(file)
    }

    /// Brings what is written to the devices of a volume into its file.
    fn settle(path: &Path) -> Result<(), AreaError> {
        let mounts = mounts::list()?;
        for device in loop_device::find(path)? {
            for mount in mounts.iter().filter(|mount| mount.source == device.path) {
                let settled = File::open(&mount.mount_point).and_then(|file| Ok(nix::unistd::syncfs(file)?));
                settled.map_err(io_error("write out", &mount.mount_point))?;
            }
            device.flush()?;
        }
        Ok(())
    }

    /// What is recorded against the files that are there.
    fn findings(&self, record: &PoolRecord) -> Result<Vec<Finding>, AreaError> {
        let mut findings = Vec::new();
        let read = record.record();
        let mut known = BTreeSet::new();
        for (digest, image) in read.entries(tables::IMAGES).map_err(ChangeError::from)? {
            let path = self.image(&digest);
            let size = (image.state == ImageState::Complete).then_some(image.virtual_size);
            findings.extend(compared(&path, &format!("image {digest}"), size)?);
            known.insert(path);
        }
        for (uid, volume) in read.entries(tables::VOLUMES).map_err(ChangeError::from)? {
            let path = self.volume(&uid);
            let size = (volume.state == VolumeState::Ready).then_some(volume.size);
            findings.extend(compared(&path, &format!("volume {uid}"), size)?);
            known.extend([path, self.format_mark(&uid)]);
        }
        for (uid, _) in read.entries(tables::STAGING).map_err(ChangeError::from)? {
            known.insert(self.work_dir(&uid));
            known.extend(bounded::images(&self.area.root, &uid));
        }
        for dir in DIRECTORIES.below(&self.area.root) {
            for entry in fs::read_dir(&dir).map_err(io_error("list", &dir))? {
                let path = entry.map_err(io_error("list", &dir))?.path();
                if !known.contains(&path) {
                    let message = "nothing recorded needs it, and it takes space".to_owned();
                    let about = path.display().to_string();
                    findings.push(Finding { kind: FindingKind::Leaked, about, message });
                }
            }
        }
        Ok(findings)
    }

    /// Makes a volume as large as it is recorded: its file, then its devices.
    fn fit(path: &Path, size: Bytes) -> Result<(), AreaError> {
        if length_of(path)? < size {
            let file = OpenOptions::new().write(true).open(path).map_err(io_error("open", path))?;
            file.set_len(size.0).and_then(|()| file.sync_all()).map_err(io_error("extend", path))?;
        }
        for device in loop_device::find(path)? {
            device.refresh_size()?;
        }
        Ok(())
    }
}

/// How the file of something that is recorded differs, where it has to be there with this size.
fn compared(path: &Path, about: &str, size: Option<Bytes>) -> Result<Option<Finding>, AreaError> {
    let Some(size) = size else { return Ok(None) };
    let finding = |kind, message| Some(Finding { kind, about: about.to_owned(), message });
    if !path.exists() {
        return Ok(finding(FindingKind::Missing, format!("{} is gone", path.display())));
    }
    let found = length_of(path)?;
    let message = format!("{} has {found}, recorded are {size}", path.display());
    Ok(if found == size { None } else { finding(FindingKind::Different, message) })
}

fn identity(place: &Place) -> PoolIdentity {
    PoolIdentity { pool: place.area.clone(), name: place.name.clone(), node: place.node.clone() }
}

/// The length of a file, or of a block device.
fn length_of(path: &Path) -> Result<Bytes, AreaError> {
    let length = File::open(path).and_then(|mut file| file.seek(SeekFrom::End(0)));
    length.map(Bytes).map_err(io_error("measure", path))
}

fn copy_sparse(source_path: &Path, length: Bytes, path: &Path) -> Result<File, AreaError> {
    let source = File::open(source_path).map_err(io_error("open", source_path))?;
    let target = files::create_sparse(path, length)?;
    let mut buffer = vec![0; PIECE];
    let mut offset = 0;
    while offset < length.0 {
        let count = source.read_at(&mut buffer, offset).map_err(io_error("read", source_path))?;
        if count == 0 {
            break;
        }
        if buffer[..count].iter().any(|byte| *byte != 0) {
            target.write_all_at(&buffer[..count], offset).map_err(io_error("write", path))?;
        }
        offset += count as u64;
    }
    Ok(target)
}

impl Area for Filesystem {
    fn root(&self) -> &Path {
        &self.area.root
    }

    fn holds_data(&self) -> Result<bool, AreaError> {
        Ok(has_directories(&self.area.root))
    }

    /// Ends what was cut off: a volume that was to become larger.
    fn start(&self, record: &PoolRecord) -> Result<(), AreaError> {
        make_directories(&self.area.root)?;
        for (uid, _) in record.record().entries(tables::STAGING).map_err(ChangeError::from)? {
            // One that cannot be shown is not there, and is tried again for whoever needs it; the others are.
            if let Err(error) = bounded::show(&self.area.root, &uid) {
                tracing::warn!(reservation = %uid, error = chain(&error), "a directory is not shown");
            }
        }
        let volumes = record.record().entries(tables::VOLUMES).map_err(ChangeError::from)?;
        for (uid, volume) in volumes.into_iter().filter(|(_, volume)| volume.state == VolumeState::Ready) {
            if self.has_volume(&uid) {
                Self::fit(&self.volume(&uid), volume.size)?;
            }
        }
        Ok(())
    }

    fn advisory(&self) -> Option<String> {
        self.area.advisory.as_ref().map(ToString::to_string)
    }

    fn total(&self) -> Bytes {
        self.area.total
    }

    fn used(&self) -> Bytes {
        let empty = Bytes(self.area.total.0.saturating_mul(100) / TOTAL_PERCENT);
        empty.saturating_sub(self.area.free().unwrap_or_default())
    }

    /// One with a file system of its own is there only once that is mounted.
    fn has_work_dir(&self, reservation: &Uid) -> bool {
        self.work_dir(reservation).is_dir() && bounded::is_shown(&self.area.root, reservation)
    }

    fn make_bounded_dir(
        &self,
        record: &PoolRecord,
        reservation: &Uid,
        bytes: Bytes,
    ) -> Result<(), AreaError> {
        if matches!(self.area.advisory, Some(Advisory::Missing(_))) {
            return self.make_work_dir(record, reservation, bytes); // nothing bounds anything here
        }
        bounded::make(&self.area.root, reservation, bytes)
    }

    fn bounded_dir(&self, _: &PoolRecord, reservation: &Uid) -> Result<BoundedDir, AreaError> {
        let state = bounded::state(&self.area.root, reservation)?;
        let unbounded = matches!(self.area.advisory, Some(Advisory::Missing(_)));
        let plain = unbounded && self.work_dir(reservation).is_dir();
        Ok(if state == BoundedDir::Gone && plain { BoundedDir::Shown } else { state })
    }

    fn make_work_dir(&self, _: &PoolRecord, reservation: &Uid, _: Bytes) -> Result<(), AreaError> {
        let path = self.work_dir(reservation);
        fs::create_dir_all(&path).map_err(io_error("make", &path))?;
        Ok(files::sync_parent(&path)?)
    }

    fn remove_work_dir(&self, _: &PoolRecord, reservation: &Uid) -> Result<(), AreaError> {
        bounded::hide(&self.area.root, reservation)?;
        let path = self.work_dir(reservation);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            other => other.map_err(io_error("remove", &path))?,
        }
        bounded::remove(&self.area.root, reservation)?;
        Ok(files::sync_parent(&path)?)
    }

    fn image(&self, digest: &Digest) -> PathBuf {
        self.area.root.join("images").join(format!("{}.raw", digest.hex()))
    }

    fn reopen_image(&self, _: &PoolRecord, digest: &Digest, size: Bytes) -> Result<Option<File>, AreaError> {
        let path = self.image(digest);
        if !path.exists() {
            return Ok(None);
        }
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(io_error("open", &path))?;
        let length = file.metadata().map_err(io_error("examine", &path))?.len();
        Ok((length == size.0).then_some(file))
    }

    fn new_image(&self, _: &PoolRecord, digest: &Digest, size: Bytes) -> Result<File, AreaError> {
        let path = self.image(digest);
        files::remove_if_there(&path)?;
        Ok(files::create_sparse(&path, size)?)
    }

    fn seal_image(&self, _: &PoolRecord, digest: &Digest, file: Arc<File>) -> Result<(), AreaError> {
        let path = self.image(digest);
        files::sync_file_and_parent(&file, &path)?;
        // Advice only: where it is not taken, the kernel keeps the pages until it needs them.
        let _ = posix_fadvise(&*file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        fs::set_permissions(&path, Permissions::from_mode(0o400)).map_err(io_error("protect", &path))
    }

    /// A volume keeps the blocks that it shares with an image that is gone.
    fn require_unused(&self, _: &PoolRecord, _: &Digest) -> Result<(), AreaError> {
        Ok(())
    }

    fn remove_image(&self, _: &PoolRecord, digest: &Digest) -> Result<(), AreaError> {
        let path = self.image(digest);
        files::remove_if_there(&path)?;
        Ok(files::sync_parent(&path)?)
    }

    fn volume(&self, reservation: &Uid) -> PathBuf {
        self.area.root.join(self.recorded_path(reservation))
    }

    fn recorded_path(&self, reservation: &Uid) -> PathBuf {
        Path::new(DIRECTORIES.volumes).join(format!("{reservation}.raw"))
    }

    fn make_volume(
        &self,
        _: &PoolRecord,
        reservation: &Uid,
        size: Bytes,
        origin: Option<&VolumeOrigin>,
    ) -> Result<(), AreaError> {
        let path = self.volume(reservation);
        files::remove_if_there(&path)?;
        let file = match origin {
            None => files::create_sparse(&path, size)?,
            Some(VolumeOrigin::Image(digest)) => Self::copy(&self.image(digest), &path, size)?,
            Some(VolumeOrigin::Template { template }) => {
                Self::copy(&template_device(template)?, &path, size)?
            }
        };
        Ok(files::sync_file_and_parent(&file, &path)?)
    }

    fn volume_charge(&self, size: Bytes) -> Charge {
        Charge { data: size, metadata: Bytes::ZERO }
    }

    fn copy_volume(&self, _: &PoolRecord, source: &Uid, copy: &Copy<'_>) -> Result<(), AreaError> {
        let (from, path) = (self.volume(source), self.volume(copy.uid));
        files::remove_if_there(&path)?;
        Self::settle(&from)?;
        let file = Self::copy(&from, &path, copy.size)?;
        if copy.read_only {
            fs::set_permissions(&path, Permissions::from_mode(0o400)).map_err(io_error("protect", &path))?;
        }
        Ok(files::sync_file_and_parent(&file, &path)?)
    }

    fn resize_volume(&self, _: &PoolRecord, reservation: &Uid, size: Bytes) -> Result<(), AreaError> {
        Self::fit(&self.volume(reservation), size)
    }

    fn map(&self, record: &PoolRecord, reservation: &Uid) -> Result<Reading<'_>, AreaError> {
        maps::map(&self.volume(reservation), volume_entry(record, reservation)?.size)
    }

    fn delta(&self, record: &PoolRecord, old: &Uid, new: &Uid) -> Result<Reading<'_>, AreaError> {
        let before = (self.volume(old), volume_entry(record, old)?.size);
        let now = (self.volume(new), volume_entry(record, new)?.size);
        if loop_device::find(&before.0)?.iter().any(|device| !device.read_only) {
            return Err(AreaError::Changing { volume: old.clone() });
        }
        maps::delta(before, now)
    }

    fn occupied(&self, reservation: &Uid) -> Option<Bytes> {
        files::allocated_bytes(&self.volume(reservation)).ok()
    }

    fn users(&self, reservation: &Uid) -> Result<Vec<String>, AreaError> {
        let mut found = Vec::new();
        for device in loop_device::find(&self.volume(reservation))? {
            found.extend(users(&device.path)?);
        }
        Ok(found)
    }

    fn grow(&self, _: Class, _: Bytes) -> Result<(), AreaError> {
        Err(AreaError::NoKernelPools { root: self.area.root.clone() })
    }

    fn leave(&self, _: Option<&BTreeSet<Uid>>) -> Result<(), AreaError> {
        self.close()
    }

    fn remove_volume(&self, _: &PoolRecord, reservation: &Uid) -> Result<(), AreaError> {
        let path = self.volume(reservation);
        files::remove_if_there(&path)?;
        files::remove_if_there(&self.format_mark(reservation))?;
        Ok(files::sync_parent(&path)?)
    }

    fn attach(
        &self,
        reservation: &Uid,
        extent: Option<Extent>,
        read_only: bool,
    ) -> Result<PathBuf, AreaError> {
        let options = LoopOptions { direct_io: true, extent, read_only, ..LoopOptions::default() };
        Ok(loop_device::attach(&self.volume(reservation), options)?.path)
    }

    fn attached(&self, reservation: &Uid) -> Result<Vec<PathBuf>, AreaError> {
        Ok(loop_device::find(&self.volume(reservation))?.into_iter().map(|device| device.path).collect())
    }

    fn detach(&self, reservation: &Uid) -> Result<(), AreaError> {
        for device in loop_device::find(&self.volume(reservation))? {
            loop_device::detach(&device)?;
        }
        Ok(())
    }

    fn check(&self, record: &PoolRecord) -> Result<Vec<Finding>, AreaError> {
        self.findings(record)
    }

    fn close(&self) -> Result<(), AreaError> {
        bounded::hide_all(&self.area.root)?;
        Ok(self.area.unmount_and_detach()?)
    }

    fn destroy(self: Box<Self>) -> Result<(), AreaError> {
        bounded::hide_all(&self.area.root)?;
        Ok(self.area.destroy()?)
    }
}
