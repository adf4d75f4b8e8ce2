//! What staging and publishing do on the machine: loop devices, file systems and mounts. Blocks.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::sync::Arc;

use berth_core::ids::{PoolName, Uid};
use berth_device::files;
use berth_device::filesystem::{self, Consent, Signature};
use berth_device::mounts::{self, FsType, MountOptions};
use berth_device::partition::partition_of;
use berth_record::{Attachment, AttachmentMode, VolumeEntry, VolumeState, tables};

use super::request::Use;
use super::shown;
use super::status::RpcError;
use crate::agent::pools::{OpenPool, Pools};
use crate::node::now;

/// A volume on this node.
pub struct FoundVolume {
    /// Its handle, for messages.
    pub id: String,
    /// Its reservation.
    pub uid: Uid,
    /// Where it lies.
    pub pool: Arc<OpenPool>,
    /// What is recorded of it.
    pub entry: VolumeEntry,
}

/// How imported content may be mounted.
#[derive(Clone, Copy, Debug, Default)]
pub struct ImportedContent {
    /// Whether at all.
    pub host_mount: bool,
    /// Which partition; the whole device if absent.
    pub partition: Option<u32>,
}

/// How a volume is published.
#[derive(Clone, Copy, Debug)]
pub struct Publication {
    /// Whether its workload may not write.
    pub read_only: bool,
    /// Whether it may be at one place only, for one workload.
    pub alone: bool,
}

/// The volume of this reservation, if it is usable here. There is none only once every pool is open that was before or is
/// `wanted`.
pub fn find(
    pools: &Pools,
    wanted: impl IntoIterator<Item = PoolName>,
    id: &str,
    uid: &Uid,
) -> Result<FoundVolume, RpcError> {
    let mut found = recorded(pools, uid)?;
    if found.is_none() {
        if let Some(pool) = pools.unopened(wanted)?.pop_first() {
            return Err(not_open(pools, pool, id));
        }
        found = recorded(pools, uid)?; // the last pool may have been opened since the first look
    }
    match found {
        Some((pool, entry)) if entry.state == VolumeState::Ready => {
            if !pool.area.has_volume(uid) {
                return Err(RpcError::Lost { volume: id.to_owned(), pool: pool.name.clone() });
            }
            Ok(FoundVolume { id: id.to_owned(), uid: uid.clone(), pool, entry })
        }
        _ => Err(RpcError::NoVolume(id.to_owned())),
    }
}

/// The volume of this reservation as an open pool records it, in whatever state.
pub fn recorded(pools: &Pools, uid: &Uid) -> Result<Option<(Arc<OpenPool>, VolumeEntry)>, RpcError> {
    for pool in pools.all() {
        let entry = pool.record.record().get(tables::VOLUMES, uid);
        let entry = entry.map_err(|source| RpcError::Record { pool: pool.name.clone(), source })?;
        if let Some(entry) = entry {
            return Ok(Some((pool, entry)));
        }
    }
    Ok(None)
}

/// The answer while a pool is not open that may hold the volume.
pub fn not_open(pools: &Pools, pool: PoolName, volume: &str) -> RpcError {
    let failure = pools.failure(&pool).map(|(_, message)| message);
    let why = failure.unwrap_or_else(|| "it is being opened".to_owned());
    RpcError::NotOpen { volume: volume.to_owned(), pool, why }
}

impl FoundVolume {
    pub(super) fn attachment(&self) -> Result<Option<Attachment>, RpcError> {
        let found = self.pool.record.record().get(tables::ATTACHMENTS, &self.uid);
        found.map_err(|source| RpcError::Record { pool: self.pool.name.clone(), source })
    }

    pub(super) fn not_staged(&self, path: &Path) -> RpcError {
        RpcError::NotStaged { volume: self.id.clone(), path: path.display().to_string() }
    }

    /// Makes the volume available at `path`: a loop device, and for a file system its mount there.
    pub fn stage(&self, path: &Path, wanted: Use, content: ImportedContent) -> Result<(), RpcError> {
        let mode = match wanted {
            Use::Block => AttachmentMode::Block,
            Use::Filesystem(_) => AttachmentMode::Filesystem,
        };
        if mode == AttachmentMode::Filesystem && self.entry.origin.is_some() && !content.host_mount {
            return Err(RpcError::HostMount(self.id.clone()));
        }
        let old = self.attachment()?;
        let device = old.as_ref().and_then(|old| old.loop_device.clone());
        // Whoever unstages knows of nothing but a staging that once went well.
        let never_staged = device.is_none();
        if let Some(old) = old {
            if old.mode != mode {
                return Err(RpcError::Different { volume: self.id.clone(), what: "use" });
            }
            if old.staged_path != path {
                return Err(RpcError::InUse(self.id.clone()));
            }
        }
        let attachment = Attachment {
            loop_device: device,
            backing_file: self.pool.area.volume(&self.uid),
            staged_path: path.to_owned(),
            mode,
        };
        let shown = self.show(attachment, wanted, content);
        let unused = match mode {
            AttachmentMode::Filesystem => shown.is_err() && mounts::is_mounted(path)?.is_none(),
            _ => shown.is_err() && never_staged,
        };
        if unused {
            self.take_back();
        }
        shown
    }

    /// Nobody unstages what was refused: left recorded, it could never be deleted.
    fn take_back(&self) {
        let taken = self.pool.area.detach(&self.uid).map_err(RpcError::from);
        if let Err(error) = taken.and_then(|()| Ok(self.pool.record.detached(&self.uid, now())?)) {
            tracing::warn!(volume = %self.id, error = crate::telemetry::chain(&error), "could not take a failed staging back");
        }
    }

    /// Shows it again where it is shown already: what is recorded of that stays meanwhile.
    fn show(
        &self,
        mut attachment: Attachment,
        wanted: Use,
        content: ImportedContent,
    ) -> Result<(), RpcError> {
        self.pool.record.attach(&self.uid, &attachment)?;
        let extent = match (wanted, content.partition) {
            (Use::Filesystem(_), Some(number)) if self.entry.origin.is_some() => {
                Some(partition_of(&attachment.backing_file, number)?)
            }
            _ => None,
        };
        let device = self.pool.area.attach(&self.uid, extent, false)?;
        attachment.loop_device = Some(device.clone());
        self.pool.record.attach(&self.uid, &attachment)?;
        match wanted {
            // From now on what is there is the workload's, half a file system as well.
            Use::Block => self.formatting_is_over(),
            Use::Filesystem(asked) => self.mount(&device, &attachment.staged_path, asked),
        }
    }

    fn mount(&self, device: &Path, path: &Path, asked: FsType) -> Result<(), RpcError> {
        let fs_type = if self.entry.origin.is_none() {
            self.format_if_blank(device, asked)?
        } else {
            self.mountable(filesystem::probe_signature(device)?)?
        };
        // Every clone of an image has the file system UUID of the image.
        let options = MountOptions { duplicate_uuid: true, ..MountOptions::default() };
        Ok(mounts::mount_device(device, path, fs_type, options)?)
    }

    /// Makes a file system where there is nothing of any kind. That it begins is noted first, so that a formatting that
    /// was cut off is not taken for somebody's data.
    fn format_if_blank(&self, device: &Path, asked: FsType) -> Result<FsType, RpcError> {
        let mark = self.pool.area.format_mark(&self.uid);
        let interrupted = mark.exists();
        match filesystem::probe_signature(device)? {
            Some(found) if !interrupted => return self.mountable(Some(found)),
            _ => {}
        }
        let consent = if interrupted { Consent::ResumeInterrupted } else { Consent::OnlyIfBlank };
        files::write_durably(&mark, b"")?;
        filesystem::mkfs(device, asked, consent)?;
        flush(device)?;
        self.formatting_is_over()?;
        Ok(asked)
    }

    fn formatting_is_over(&self) -> Result<(), RpcError> {
        let mark = self.pool.area.format_mark(&self.uid);
        files::remove_if_there(&mark)?;
        Ok(files::sync_parent(&mark)?)
    }

    fn mountable(&self, found: Option<Signature>) -> Result<FsType, RpcError> {
        let advice = match found {
            Some(Signature::Ext) => return Ok(FsType::Ext4),
            Some(Signature::Xfs) => return Ok(FsType::Xfs),
            Some(Signature::Gpt | Signature::Mbr) => "set `partition` in the StorageClass",
            _ => "only ext4 and XFS are; use the volume as a block device",
        };
        Err(RpcError::NotMountable { volume: self.id.clone(), found, advice })
    }

    /// Shows the staged volume at `target`.
    pub fn publish(
        &self,
        staged: &Path,
        target: &Path,
        wanted: Use,
        how: Publication,
    ) -> Result<(), RpcError> {
        let attachment = self.attachment()?.filter(|found| found.staged_path == staged);
        let attachment = attachment.ok_or_else(|| self.not_staged(staged))?;
        let node = attachment.loop_device.clone().ok_or_else(|| self.not_staged(staged))?;
        let devices = self.pool.area.attached(&self.uid)?;
        let device = devices.iter().find(|device| **device == node);
        let device = device.ok_or_else(|| self.not_staged(staged))?; // recorded, but the kernel has it no more
        if how.alone
            && let Some(path) = shown::elsewhere(&devices, staged, target)?
        {
            return Err(RpcError::Elsewhere { volume: self.id.clone(), path: path.display().to_string() });
        }
        match (wanted, attachment.mode) {
            (Use::Block, AttachmentMode::Block) if how.read_only => {
                // A read-only mount of a device node would not keep anyone from writing to the device.
                let device = self.pool.area.attach(&self.uid, None, true)?;
                Ok(mounts::bind_mount(&device, target, false)?)
            }
            (Use::Block, AttachmentMode::Block) => Ok(mounts::bind_mount(device, target, false)?),
            (Use::Filesystem(_), AttachmentMode::Filesystem) => {
                let mounted = mounts::is_mounted(staged)?.filter(|mount| mount.source == *device);
                mounted.ok_or_else(|| self.not_staged(staged))?;
                Ok(mounts::bind_mount(staged, target, how.read_only)?)
            }
            _ => Err(RpcError::Different { volume: self.id.clone(), what: "use" }),
        }
    }
}

/// Waits until what was written to a device is on stable storage.
fn flush(device: &Path) -> Result<(), RpcError> {
    File::open(device).and_then(|file| file.sync_all()).map_err(|source| RpcError::Io {
        action: "flush",
        path: device.display().to_string(),
        source,
    })
}

/// Takes away what is shown at `target`, and the place itself.
pub fn unpublish(target: &Path) -> Result<(), RpcError> {
    mounts::unmount(target)?;
    let removed = match fs::symlink_metadata(target) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir(target),
        Ok(_) => fs::remove_file(target),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(RpcError::Io { action: "remove", path: target.display().to_string(), source: error })
        }
        _ => Ok(()),
    }
}

/// Takes a volume back from `staged`: mount, loop devices, record, in this order. Nothing there: nothing to do, once
/// every pool is open that was before or is `wanted`.
pub fn unstage(
    pools: &Pools,
    wanted: impl IntoIterator<Item = PoolName>,
    uid: &Uid,
    staged: &Path,
) -> Result<(), RpcError> {
    if mounts::is_mounted(staged)?.is_some() {
        mounts::unmount(staged)?;
    }
    // Before the look at the open ones: one that is opened meanwhile may have been missed there.
    let unopened = pools.unopened(wanted);
    for pool in pools.all() {
        let attached = pool.record.record().get(tables::ATTACHMENTS, uid);
        let attached = attached.map_err(|source| RpcError::Record { pool: pool.name.clone(), source })?;
        if attached.is_some_and(|attachment| attachment.mode == AttachmentMode::Device) {
            continue; // somebody else's, who has not staged it
        }
        pool.area.detach(uid)?;
        if pool.record.detached(uid, now())? {
            tracing::info!(volume = %uid, "detached");
        }
    }
    if recorded(pools, uid)?.is_some() {
        return Ok(());
    }
    match unopened?.pop_first() {
        Some(pool) => Err(not_open(pools, pool, uid.as_str())),
        None => Ok(()),
    }
}

/// Total, used and free bytes of the file system at a path, then inodes; or the size of the device there alone.
pub struct Stats {
    /// Bytes: total, used, available.
    pub bytes: (u64, Option<(u64, u64)>),
    /// Inodes: total, used, available.
    pub inodes: Option<(u64, u64, u64)>,
}

/// Looks at a published volume.
pub fn stats(volume: &FoundVolume, path: &Path) -> Result<Stats, RpcError> {
    let nothing = || RpcError::NoPath { volume: volume.id.clone(), path: path.display().to_string() };
    let metadata = fs::metadata(path).map_err(|_| nothing())?;
    if mounts::is_mounted(path)?.is_none() {
        return Err(nothing());
    }
    if metadata.file_type().is_block_device() {
        return Ok(Stats { bytes: (volume.entry.size.0, None), inodes: None });
    }
    measure(path)
}

/// Looks at the directory of a reservation that a pod sees.
pub fn stats_of_directory(volume: &str, path: &Path) -> Result<Stats, RpcError> {
    if mounts::is_mounted(path)?.is_none() {
        return Err(RpcError::NoPath { volume: volume.to_owned(), path: path.display().to_string() });
    }
    measure(path)
}

fn measure(path: &Path) -> Result<Stats, RpcError> {
    let stat = nix::sys::statvfs::statvfs(path).map_err(|errno| RpcError::Io {
        action: "examine",
        path: path.display().to_string(),
        source: errno.into(),
    })?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.fragment_size());
    let used = stat.blocks().saturating_sub(stat.blocks_free());
    Ok(Stats {
        bytes: (bytes(stat.blocks()), Some((bytes(used), bytes(stat.blocks_available())))),
        inodes: Some((stat.files(), stat.files().saturating_sub(stat.files_free()), stat.files_available())),
    })
}
