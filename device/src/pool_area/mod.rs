//! The bounded area of a `filesystem` pool: a preallocated XFS image with reflink, mounted through a loop device.
//!
//! In the pool's directory lie `berth-pool.json` (whose it is, and how far its making got), `berth-pool.lock`,
//! `berth-pool.xfs`, and, while it is made, `berth-pool.xfs.partial`. Where no image can be made, `area/` stands in
//! for it and nothing bounds it: the area is advisory.
//!
//! **Total.** `total = (free bytes of the file system when it was empty) × (100 − headroom) / 100`, rounded down to
//! 1 MiB. The free bytes are taken once, before anything is stored, and kept in the claim, so the total never moves.
//! They are net of XFS's own structures; the headroom pays for the inodes and extent maps of what is stored later.

mod claim;
mod error;
mod lock;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_core::units::Bytes;

pub use self::claim::PoolIdentity;
use self::claim::{Claim, Stage};
pub use self::error::ClaimError;
use self::lock::{LOCK, lock};
use crate::files::{self, FileError};
use crate::loop_device::{self, LoopDevice, LoopOptions};
use crate::mounts::{self, FsType, MountOptions};
use crate::preflight;
use crate::program;

const IMAGE: &str = "berth-pool.xfs";
const PARTIAL: &str = "berth-pool.xfs.partial";
const DIRECTORY: &str = "area";
const MKFS_LIMIT: Duration = Duration::from_secs(600);

/// XFS makes no smaller file system.
pub const MIN_SIZE: Bytes = Bytes::mib(300);

/// Which area, where, and how large.
#[derive(Clone, Debug)]
pub struct PoolAreaConfig {
    /// The directory that holds the image. Made if need be.
    pub dir: PathBuf,
    /// The size of the image. An area that exists keeps the size it has.
    pub size: Bytes,
    /// Where it is mounted. Made if need be.
    pub mount_point: PathBuf,
    /// Whose it is.
    pub identity: PoolIdentity,
    /// Percent of the empty area that is kept back for metadata of its file system.
    pub headroom_percent: u8,
}

/// Why nothing bounds an area.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Advisory {
    /// An image cannot be made here: these programs, kernel features or privileges are missing.
    Missing(Vec<String>),
    /// The directory's own file system does not hold preallocated space, so the image may meet ENOSPC.
    SpaceNotHeld {
        /// What it is, or that it cannot preallocate.
        host: String,
    },
}

impl std::fmt::Display for Advisory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missing(what) => write!(f, "no pool image can be made here: {}", what.join("; ")),
            Self::SpaceNotHeld { host } => write!(f, "preallocated space does not hold on {host}"),
        }
    }
}

/// An area that is open for use. Dropping it leaves it mounted.
#[derive(Debug)]
pub struct PoolArea {
    /// The directory to store in.
    pub root: PathBuf,
    /// How much may be promised in it; see the module's page for the formula. Never changes.
    pub total: Bytes,
    /// The size of the image itself.
    pub size: Bytes,
    /// Why nothing bounds it, if so.
    pub advisory: Option<Advisory>,
    dir: PathBuf,
    device: Option<LoopDevice>,
}

/// True if an area was made in this directory, or is being made.
pub fn is_claimed(dir: &Path) -> bool {
    Claim::path(dir).exists()
}

impl PoolArea {
    /// Opens the pool's area, making it first if there is none. Interrupted anywhere and called again, it goes on;
    /// what is mounted already is taken over.
    pub fn open_or_create(config: &PoolAreaConfig) -> Result<Self, ClaimError> {
        let dir = &config.dir;
        fs::create_dir_all(dir).map_err(|source| ClaimError::Directory { path: dir.clone(), source })?;
        let _lock = lock(dir)?;
        let mut claim = match Claim::read(dir)? {
            Some(claim) => claim,
            None => claim_directory(config)?,
        };
        claim.check(&config.identity, dir)?;
        let missing = preflight::missing_for_pool_image();
        if claim.stage == Stage::Creating {
            create(config, &mut claim, &missing)?;
        }
        if claim.stage == Stage::Directory {
            open_directory(config, &claim, missing)
        } else {
            open_image(config, claim, missing)
        }
    }

    /// The loop device behind it; `None` for a plain directory.
    pub fn device(&self) -> Option<&LoopDevice> {
        self.device.as_ref()
    }

    /// What is free in it at this moment.
    pub fn free(&self) -> Result<Bytes, ClaimError> {
        free_bytes(&self.root)
    }

    /// Unmounts it and lets the loop device go. Its content stays.
    ///
    /// # Errors
    /// [`crate::mounts::MountError::Busy`] while anything in it is in use; it then stays as it is.
    pub fn unmount_and_detach(&self) -> Result<(), ClaimError> {
        if let Some(device) = &self.device {
            let _lock = lock(&self.dir)?;
            mounts::unmount(&self.root)?;
            loop_device::detach(device)?;
        }
        Ok(())
    }

    /// Unmounts it and deletes it with all it holds, and the claim last.
    pub fn destroy(self) -> Result<(), ClaimError> {
        self.unmount_and_detach()?;
        let is_directory = self.device.is_none();
        self.delete(is_directory)
    }

    fn delete(self, is_directory: bool) -> Result<(), ClaimError> {
        let _lock = lock(&self.dir)?;
        if is_directory {
            match fs::remove_dir_all(&self.root) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(ClaimError::Directory { path: self.root, source });
                }
                _ => {}
            }
        }
        files::remove_if_there(&self.dir.join(PARTIAL))?;
        files::remove_if_there(&self.dir.join(IMAGE))?;
        files::sync_parent(&self.dir.join(IMAGE))?;
        files::remove_if_there(&Claim::path(&self.dir))?;
        files::sync_parent(&Claim::path(&self.dir))?;
        Ok(files::remove_if_there(&self.dir.join(LOCK))?)
    }
}

/// Makes an area that was made for this pool another node's, under another name, so that it can be opened there. What it
/// holds stays. The same again changes nothing.
///
/// # Errors
/// [`ClaimError::InUseByNode`] while it is mounted elsewhere than at `mount_point` by another node on this kernel.
/// [`ClaimError::NoArea`] if there is none.
pub fn take_over(dir: &Path, identity: &PoolIdentity, mount_point: &Path) -> Result<(), ClaimError> {
    let _lock = lock(dir)?;
    let mut claim = Claim::read(dir)?.ok_or_else(|| ClaimError::NoArea { dir: dir.to_owned() })?;
    if claim.identity.pool != identity.pool {
        return claim.check(identity, dir);
    }
    if claim.identity == *identity {
        return Ok(());
    }
    let mounts = mounts::list()?;
    for device in loop_device::find(&dir.join(IMAGE))? {
        if mounts.iter().any(|mount| mount.source == device.path && mount.mount_point != mount_point) {
            return Err(ClaimError::InUseByNode { dir: dir.to_owned(), node: claim.identity.node });
        }
    }
    claim.identity = identity.clone();
    claim.write(dir)
}

/// Which pool the area in `dir` was made for, and whose it is; `None` if there is none.
pub fn identity_in(dir: &Path) -> Result<Option<(PoolIdentity, Bytes)>, ClaimError> {
    Ok(Claim::read(dir)?.map(|claim| (claim.identity, claim.size)))
}

/// Ends a [`PoolArea::destroy`] that was cut off. No area, no error.
pub fn destroy_rest(dir: &Path, identity: &PoolIdentity, mount_point: &Path) -> Result<(), ClaimError> {
    let Some(claim) = Claim::read(dir)? else { return Ok(()) };
    claim.check(identity, dir)?;
    mounts::unmount(mount_point)?;
    for device in loop_device::find(&dir.join(IMAGE))? {
        loop_device::detach(&device)?;
    }
    let root = match claim.stage {
        Stage::Directory => dir.join(DIRECTORY),
        Stage::Creating | Stage::Image => mount_point.to_owned(),
    };
    let area = PoolArea {
        root,
        total: Bytes::ZERO,
        size: claim.size,
        advisory: None,
        dir: dir.to_owned(),
        device: None,
    };
    area.delete(claim.stage == Stage::Directory)
}

fn claim_directory(config: &PoolAreaConfig) -> Result<Claim, ClaimError> {
    if config.size < MIN_SIZE {
        return Err(ClaimError::TooSmall { size: config.size });
    }
    if config.dir.starts_with(&config.mount_point) {
        let (path, mount_point) = (config.dir.clone(), config.mount_point.clone());
        return Err(ClaimError::MountedOver { path, mount_point });
    }
    let image = config.dir.join(IMAGE);
    if image.exists() {
        return Err(ClaimError::ForeignImage { path: image }); // never adopt what nobody claimed
    }
    let claim = Claim::new(config.identity.clone(), config.size);
    claim.write(&config.dir)?;
    Ok(claim)
}

/// Makes the image under a temporary name, gives it its name, and only then says in the claim that it exists.
fn create(config: &PoolAreaConfig, claim: &mut Claim, missing: &[String]) -> Result<(), ClaimError> {
    let (image, partial) = (config.dir.join(IMAGE), config.dir.join(PARTIAL));
    if image.exists() {
        claim.stage = Stage::Image;
        return claim.write(&config.dir);
    }
    files::remove_if_there(&partial)?;
    if !missing.is_empty() {
        let root = config.dir.join(DIRECTORY);
        fs::create_dir_all(&root).map_err(|source| ClaimError::Directory { path: root.clone(), source })?;
        claim.empty_free = Some(free_bytes(&root)?.min(claim.size));
        claim.stage = Stage::Directory;
        return claim.write(&config.dir);
    }
    if let Err(error) = make_image(&partial, claim) {
        files::remove_if_there(&partial)?;
        return Err(error);
    }
    files::rename_durably(&partial, &image)?;
    claim.stage = Stage::Image;
    claim.write(&config.dir)
}

fn make_image(partial: &Path, claim: &Claim) -> Result<(), ClaimError> {
    let file = files::create_sparse(partial, claim.size)?;
    match files::preallocate(&file, partial, claim.size) {
        Ok(()) | Err(FileError::Unsupported { .. }) => {} // reported as advisory when it is opened
        Err(error) => return Err(error.into()),
    }
    let uuid = format!("uuid={}", hyphenated(claim.identity.filesystem_uuid()));
    let arguments = ["-q", "-K", "-L", "berth-pool", "-m", "reflink=1", "-m", &uuid];
    let arguments = arguments.iter().map(AsRef::as_ref).chain([partial.as_os_str()]);
    program::run("mkfs.xfs", arguments, MKFS_LIMIT)
        .map(drop)
        .map_err(|source| ClaimError::Make { path: partial.to_owned(), source })
}

fn hyphenated(uuid: [u8; 16]) -> String {
    let hex = format!("{:032x}", u128::from_be_bytes(uuid));
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

fn open_directory(
    config: &PoolAreaConfig,
    claim: &Claim,
    missing: Vec<String>,
) -> Result<PoolArea, ClaimError> {
    let root = config.dir.join(DIRECTORY);
    fs::create_dir_all(&root).map_err(|source| ClaimError::Directory { path: root.clone(), source })?;
    let missing =
        if missing.is_empty() { vec!["it was made when that was not possible".to_owned()] } else { missing };
    Ok(PoolArea {
        root,
        total: total(claim.empty_free.unwrap_or(Bytes::ZERO), config.headroom_percent),
        size: claim.size,
        advisory: Some(Advisory::Missing(missing)),
        dir: config.dir.clone(),
        device: None,
    })
}

fn open_image(
    config: &PoolAreaConfig,
    mut claim: Claim,
    missing: Vec<String>,
) -> Result<PoolArea, ClaimError> {
    let image = config.dir.join(IMAGE);
    if !image.exists() {
        return Err(ClaimError::ImageLost { path: image });
    }
    if !missing.is_empty() {
        return Err(ClaimError::Unmountable { path: image, missing });
    }
    check_superblock(&image, &claim.identity)?;
    hold_space(&image, claim.size)?;
    let (device, attached_now) = attach(&image)?;
    let mounted = mount_verified(&device, &config.mount_point);
    if let Err(error) = mounted {
        if attached_now {
            loop_device::detach(&device)?;
        }
        return Err(error);
    }
    let empty_free = if let Some(bytes) = claim.empty_free {
        bytes
    } else {
        let bytes = free_bytes(&config.mount_point)?; // nobody was told of the area yet: it is empty
        claim.empty_free = Some(bytes);
        claim.write(&config.dir)?;
        bytes
    };
    Ok(PoolArea {
        root: config.mount_point.clone(),
        total: total(empty_free, config.headroom_percent),
        size: claim.size,
        advisory: unheld_space(&image, claim.size)?,
        dir: config.dir.clone(),
        device: Some(device),
    })
}

/// The device of the image, and whether it had to be attached for this.
fn attach(image: &Path) -> Result<(LoopDevice, bool), ClaimError> {
    let known = loop_device::find(image)?;
    let options = LoopOptions { direct_io: true, keep_space: true, ..LoopOptions::default() };
    let device = loop_device::attach(image, options)?;
    let attached_now = !known.contains(&device);
    Ok((device, attached_now))
}

fn mount_verified(device: &LoopDevice, mount_point: &Path) -> Result<(), ClaimError> {
    // The superblock was checked by us. The kernel's own check of the UUID would refuse a second node of the same pool on
    // one kernel, as nodes in containers are.
    let options = MountOptions { no_access_times: true, duplicate_uuid: true, ..MountOptions::default() };
    Ok(mounts::mount_device(&device.path, mount_point, FsType::Xfs, options)?)
}

/// Looks at the superblock, so that no other file system is ever mounted as the pool's.
fn check_superblock(image: &Path, identity: &PoolIdentity) -> Result<(), ClaimError> {
    let mut superblock = [0; 512];
    let read = File::open(image).and_then(|file| file.read_exact_at(&mut superblock, 0));
    read.map_err(|source| ClaimError::Directory { path: image.to_owned(), source })?;
    if &superblock[..4] == b"XFSB" && superblock[32..48] == identity.filesystem_uuid() {
        Ok(())
    } else {
        Err(ClaimError::ForeignImage { path: image.to_owned() })
    }
}

/// Gives the image back what space it may have lost to a discard by someone else. Its content stays.
fn hold_space(image: &Path, size: Bytes) -> Result<(), ClaimError> {
    let file = File::options().write(true).open(image);
    let file = file.map_err(|source| ClaimError::Directory { path: image.to_owned(), source })?;
    match files::preallocate(&file, image, size) {
        Ok(()) => Ok(()),
        Err(error @ (FileError::Unsupported { .. } | FileError::NoSpace { .. })) => {
            tracing::warn!(%error, "the pool's space does not hold");
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// The image's space is not certain if it is not allocated, or if its host copies on write.
fn unheld_space(image: &Path, size: Bytes) -> Result<Option<Advisory>, ClaimError> {
    let copies_on_write = [(0x9123_683E, "btrfs"), (0xCA45_1A4E, "bcachefs"), (0x2FC1_2FC1, "zfs")];
    let stat = nix::sys::statfs::statfs(image)
        .map_err(|errno| ClaimError::Directory { path: image.to_owned(), source: errno.into() })?;
    let host = copies_on_write.iter().find(|(magic, _)| stat.filesystem_type().0 == *magic);
    if let Some((_, name)) = host {
        return Ok(Some(Advisory::SpaceNotHeld { host: (*name).to_owned() }));
    }
    let held = files::allocated_bytes(image)?;
    Ok((held < size).then(|| Advisory::SpaceNotHeld {
        host: format!("the file system of the pool directory ({held} of {size} allocated)"),
    }))
}

fn free_bytes(place: &Path) -> Result<Bytes, ClaimError> {
    let stat = nix::sys::statvfs::statvfs(place)
        .map_err(|errno| ClaimError::Directory { path: place.to_owned(), source: errno.into() })?;
    Ok(Bytes(stat.blocks_available().saturating_mul(stat.fragment_size())))
}

fn total(empty_free: Bytes, headroom_percent: u8) -> Bytes {
    let kept = empty_free.percent(100_u64.saturating_sub(headroom_percent.into()));
    Bytes(kept.0 & !(Bytes::mib(1).0 - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_leaves_headroom_and_is_whole_mebibytes() {
        assert_eq!(total(Bytes::mib(1000), 5), Bytes::mib(950));
        assert_eq!(total(Bytes(Bytes::mib(3).0 - 1), 0), Bytes::mib(2));
        assert_eq!(total(Bytes::gib(1), 200), Bytes::ZERO);
    }

    #[test]
    fn uuids_are_written_with_hyphens() {
        let uuid = core::array::from_fn(|i| u8::try_from(i).unwrap());
        assert_eq!(hyphenated(uuid), "00010203-0405-0607-0809-0a0b0c0d0e0f");
    }

    #[test]
    fn an_unclaimed_image_is_not_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(IMAGE), b"someone's").unwrap();
        let config = config(dir.path());
        let error = PoolArea::open_or_create(&config).unwrap_err();
        assert!(matches!(error, ClaimError::ForeignImage { .. }), "{error}");
        assert_eq!(fs::read(dir.path().join(IMAGE)).unwrap(), b"someone's");
    }

    #[test]
    fn a_lost_image_is_not_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let mut claim = Claim::new(config.identity.clone(), config.size);
        claim.stage = Stage::Image;
        claim.write(dir.path()).unwrap();
        assert!(matches!(PoolArea::open_or_create(&config), Err(ClaimError::ImageLost { .. })));
    }

    #[test]
    fn too_small_pools_leave_no_claim() {
        let dir = tempfile::tempdir().unwrap();
        let config = PoolAreaConfig { size: Bytes::mib(10), ..config(dir.path()) };
        assert!(matches!(PoolArea::open_or_create(&config), Err(ClaimError::TooSmall { .. })));
        assert_eq!(Claim::read(dir.path()).unwrap(), None);
    }

    #[test]
    fn a_pool_is_not_mounted_over_its_own_directory() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().join("fast"), dir.path().join("fast/area")] {
            let config = PoolAreaConfig { mount_point: dir.path().join("fast"), ..config(&path) };
            let error = PoolArea::open_or_create(&config).unwrap_err();
            assert!(matches!(error, ClaimError::MountedOver { .. }), "{error}");
            assert_eq!(Claim::read(&path).unwrap(), None);
        }
    }

    #[test]
    fn without_what_an_image_needs_there_is_a_directory_that_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let mut claim = claim_directory(&config).unwrap();
        let missing = vec!["mkfs.xfs is not installed".to_owned()];
        create(&config, &mut claim, &missing).unwrap();
        let area = PoolArea::open_or_create(&config).unwrap();
        assert_eq!((claim.stage, area.device()), (Stage::Directory, None));
        assert!(matches!(area.advisory, Some(Advisory::Missing(_))));
        assert!(area.total > Bytes::ZERO && area.total <= Bytes::mib(300));
        fs::write(area.root.join("data"), b"x").unwrap();
        area.destroy().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    fn config(dir: &Path) -> PoolAreaConfig {
        let identity = PoolIdentity { pool: "u1".into(), name: "fast".into(), node: "n1".into() };
        PoolAreaConfig {
            dir: dir.to_owned(),
            size: MIN_SIZE,
            mount_point: dir.join("mnt"),
            identity,
            headroom_percent: 5,
        }
    }
}
