//! The area of a `filesystem` pool: files and directories in one XFS image, which shares blocks between them.

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_api::defaults;
use berth_core::ids::{Digest, Uid};
use berth_core::units::Bytes;
use berth_device::files::{self, FileError};
use berth_device::loop_device::{self, LoopOptions};
use berth_device::partition::Extent;
use berth_device::pool_area::{PoolArea, PoolAreaConfig, PoolIdentity, is_claimed};
use berth_record::PoolRecord;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::error::{AreaError, io_error};
use super::{Area, DIRECTORIES, Place, has_directories, make_directories};

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
        let (pool, name, node) = (place.pool.clone(), place.name.clone(), place.node.clone());
        let config = PoolAreaConfig {
            dir: dir.to_owned(),
            size,
            mount_point: place.mount_point.clone(),
            identity: PoolIdentity { pool, name, node },
            headroom_percent: defaults::HEADROOM_PERCENT,
        };
        Ok(Self { area: PoolArea::open_or_create(&config)? })
    }

    /// A file with the image's content, zeros after it, never larger than `size`. Shares the image's blocks where the
    /// file system can.
    fn clone_image(&self, digest: &Digest, path: &Path, size: Bytes) -> Result<File, AreaError> {
        let image = self.image(digest);
        let found = Bytes(fs::metadata(&image).map_err(io_error("examine", &image))?.len());
        if found > size {
            return Err(AreaError::ImageTooLarge { path: image, found, promised: size });
        }
        let file = match files::reflink(&image, path) {
            Err(FileError::ReflinkUnsupported { .. }) => copy_sparse(&image, path)?,
            other => other?,
        };
        let length = file.metadata().map_err(io_error("examine", path))?.len();
        if length < size.0 {
            file.set_len(size.0).map_err(io_error("extend", path))?;
        }
        Ok(file)
    }
}

fn copy_sparse(image: &Path, path: &Path) -> Result<File, AreaError> {
    let source = File::open(image).map_err(io_error("open", image))?;
    let length = source.metadata().map_err(io_error("examine", image))?.len();
    let target = files::create_sparse(path, Bytes(length))?;
    let mut buffer = vec![0; PIECE];
    let mut offset = 0;
    while offset < length {
        let count = source.read_at(&mut buffer, offset).map_err(io_error("read", image))?;
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

    fn start(&self, _: &PoolRecord) -> Result<(), AreaError> {
        make_directories(&self.area.root)
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

    fn has_work_dir(&self, reservation: &Uid) -> bool {
        self.work_dir(reservation).is_dir()
    }

    fn make_work_dir(&self, _: &PoolRecord, reservation: &Uid, _: Bytes) -> Result<(), AreaError> {
        let path = self.work_dir(reservation);
        fs::create_dir_all(&path).map_err(io_error("make", &path))?;
        Ok(files::sync_parent(&path)?)
    }

    fn remove_work_dir(&self, _: &PoolRecord, reservation: &Uid) -> Result<(), AreaError> {
        let path = self.work_dir(reservation);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            other => other.map_err(io_error("remove", &path))?,
        }
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
        origin: Option<&Digest>,
    ) -> Result<(), AreaError> {
        let path = self.volume(reservation);
        files::remove_if_there(&path)?;
        let file = match origin {
            None => files::create_sparse(&path, size)?,
            Some(digest) => self.clone_image(digest, &path, size)?,
        };
        Ok(files::sync_file_and_parent(&file, &path)?)
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

    fn close(&self) -> Result<(), AreaError> {
        Ok(self.area.unmount_and_detach()?)
    }

    fn destroy(self: Box<Self>) -> Result<(), AreaError> {
        Ok(self.area.destroy()?)
    }
}
