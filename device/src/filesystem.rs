//! Whether a device holds anything, and making a file system on one that does not.

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_core::units::Bytes;
use thiserror::Error;

use crate::mounts::{FsType, MountInfo};
use crate::program::{self, RunError};

/// How much of each end of a device is looked at. Every signature below lies within it.
const WINDOW: usize = 256 << 10;
const MKFS_LIMIT: Duration = Duration::from_secs(600);
/// Growing writes metadata for what is new, which takes a second for a TiB.
const GROW_LIMIT: Duration = Duration::from_secs(300);

/// What a device holds, as far as its first and last 256 KiB tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Signature {
    /// ext2, ext3 or ext4.
    Ext,
    /// XFS.
    Xfs,
    /// btrfs.
    Btrfs,
    /// Swap space.
    Swap,
    /// An LVM physical volume.
    Lvm,
    /// LUKS, version 1 or 2.
    Luks,
    /// A GUID partition table, at the start or (its copy) at the end.
    Gpt,
    /// An MBR partition table or a boot sector (FAT and NTFS have one too).
    Mbr,
    /// A member of a Linux software RAID.
    Raid,
    /// `BlueStore` of Ceph.
    BlueStore,
    /// A device of bcache.
    Bcache,
    /// A squashfs.
    Squashfs,
    /// An ISO 9660 image.
    Iso9660,
    /// A disk image inside the device: qcow2, VMDK, VHDX or the like.
    DiskImage,
    /// Something that is not all zeros.
    UnknownData,
}

/// Each signature: whose it is, at which byte, and the bytes.
const MAGICS: &[(Signature, usize, &[u8])] = &[
    (Signature::Luks, 0, b"LUKS\xBA\xBE"),
    (Signature::Luks, 16384, b"SKUL\xBA\xBE"),
    (Signature::Xfs, 0, b"XFSB"),
    (Signature::Btrfs, 65600, b"_BHRfS_M"),
    (Signature::Ext, 1080, b"\x53\xEF"),
    (Signature::Lvm, 0, b"LABELONE"),
    (Signature::Lvm, 512, b"LABELONE"),
    (Signature::Lvm, 1024, b"LABELONE"),
    (Signature::Lvm, 1536, b"LABELONE"),
    (Signature::Swap, 4086, b"SWAPSPACE2"),
    (Signature::Swap, 4086, b"SWAP-SPACE"),
    (Signature::Swap, 65526, b"SWAPSPACE2"),
    (Signature::Raid, 0, b"\xFC\x4E\x2B\xA9"),
    (Signature::Raid, 4096, b"\xFC\x4E\x2B\xA9"),
    (Signature::Gpt, 512, b"EFI PART"),
    (Signature::Gpt, 4096, b"EFI PART"),
    (Signature::BlueStore, 0, b"bluestore block device"),
    (Signature::Bcache, 4120, b"\xC6\x85\x73\xF6\x4E\x1A\x45\xCA"),
    (Signature::Squashfs, 0, b"hsqs"),
    (Signature::Iso9660, 32769, b"CD001"),
    (Signature::DiskImage, 0, b"QFI\xFB"),
    (Signature::DiskImage, 0, b"KDMV"),
    (Signature::DiskImage, 0, b"vhdxfile"),
    (Signature::DiskImage, 0, b"conectix"),
    (Signature::Mbr, 510, b"\x55\xAA"),
];

/// Why a device was not probed or not formatted.
#[derive(Debug, Error)]
pub enum FilesystemError {
    /// It could not be read.
    #[error("failed to read {device}", device = device.display())]
    Read {
        /// The device.
        device: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It holds something, so it was left alone.
    #[error("{device} holds data ({signature:?}) and is not formatted", device = device.display())]
    NotBlank {
        /// The device.
        device: PathBuf,
        /// What it holds.
        signature: Signature,
    },
    /// The formatting program failed; what the device holds now is undefined.
    #[error("failed to make {fs_type} on {device}", device = device.display())]
    Make {
        /// The device.
        device: PathBuf,
        /// The file system.
        fs_type: FsType,
        /// Why.
        source: RunError,
    },
    /// The growing program failed. The file system is as it was, and in use.
    #[error("failed to make the file system at {mount} larger", mount = mount.display())]
    NotGrown {
        /// Where it is mounted.
        mount: PathBuf,
        /// Why.
        source: RunError,
    },
    /// A file system that no program makes larger while it is mounted.
    #[error("the file system at {mount} is {fs_type}, which is not made larger", mount = mount.display())]
    NoGrowth {
        /// Where it is mounted.
        mount: PathBuf,
        /// What it is.
        fs_type: String,
    },
}

/// What a device or file holds; `None` only if both its ends are all zeros. Reads 512 KiB and interprets nothing.
pub fn probe_signature(device: &Path) -> Result<Option<Signature>, FilesystemError> {
    probe(device).map_err(|source| FilesystemError::Read { device: device.to_owned(), source })
}

fn probe(device: &Path) -> io::Result<Option<Signature>> {
    let mut file = File::open(device)?;
    let size = file.seek(SeekFrom::End(0))?;
    let window = usize::try_from(size).unwrap_or(WINDOW).min(WINDOW);
    let mut buffer = vec![0; window];
    file.read_exact_at(&mut buffer, 0)?;
    let known =
        MAGICS.iter().find(|(_, at, magic)| buffer[..].get(*at..).is_some_and(|b| b.starts_with(magic)));
    if let Some((signature, _, _)) = known {
        return Ok(Some(*signature));
    }
    let any_data = |bytes: &[u8]| bytes.iter().any(|byte| *byte != 0);
    let start_has_data = any_data(&buffer);
    file.read_exact_at(&mut buffer, size - window as u64)?;
    Ok(match end_signature(&buffer) {
        Some(signature) => Some(signature),
        None if start_has_data || any_data(&buffer) => Some(Signature::UnknownData),
        None => None,
    })
}

/// What identifies itself at the end of a device.
fn end_signature(end: &[u8]) -> Option<Signature> {
    let has = |from_end: usize, magic: &[u8]| {
        end.len().checked_sub(from_end).is_some_and(|at| end[at..].starts_with(magic))
    };
    if has(512, b"EFI PART") || has(4096, b"EFI PART") {
        return Some(Signature::Gpt);
    }
    if has(512, b"conectix") {
        return Some(Signature::DiskImage);
    }
    // md 0.90 lies in the last 64 KiB-aligned block, md 1.0 at least 8 KiB before the end, 4 KiB-aligned.
    let raid = [65536, 131_072, 8192, 12288].iter().any(|at| has(*at, b"\xFC\x4E\x2B\xA9"));
    raid.then_some(Signature::Raid)
}

/// What may be formatted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consent {
    /// Only a device that holds nothing at all.
    OnlyIfBlank,
    /// Whatever is there, because the caller's record says that an earlier formatting of this very device began and
    /// never ended.
    ResumeInterrupted,
}

/// Makes a file system on `device`. Its blocks are not discarded first, so preallocated space stays.
///
/// # Errors
/// [`FilesystemError::NotBlank`] if the device holds anything and `consent` is not to resume.
pub fn mkfs(device: &Path, fs_type: FsType, consent: Consent) -> Result<(), FilesystemError> {
    if consent == Consent::OnlyIfBlank
        && let Some(signature) = probe_signature(device)?
    {
        return Err(FilesystemError::NotBlank { device: device.to_owned(), signature });
    }
    let (program, options): (_, &[&str]) = match fs_type {
        FsType::Ext4 => ("mkfs.ext4", &["-q", "-F", "-E", "nodiscard", "-m", "0"]),
        FsType::Xfs => ("mkfs.xfs", &["-q", "-f", "-K", "-m", "reflink=1"]),
    };
    let arguments = options.iter().map(AsRef::as_ref).chain([device.as_os_str()]);
    program::run(program, arguments, MKFS_LIMIT).map(drop).map_err(|source| FilesystemError::Make {
        device: device.to_owned(),
        fs_type,
        source,
    })
}

/// Makes the file system of a directory of ours on a device or file of `size` that is new, whatever it holds: ext4 that takes
/// as little of it for itself as [`berth_core::thin::directory_device`] leaves to it. Where a journal would take most of it
/// there is none: after a power cut such a small one may have lost what was written last.
pub fn mkfs_directory(device: &Path, size: Bytes) -> Result<(), FilesystemError> {
    let journal: &[&str] = match size {
        size if size >= Bytes::mib(64) => &["-O", "^resize_inode", "-J", "size=16"],
        size if size >= Bytes::mib(16) => &["-O", "^resize_inode", "-J", "size=4"],
        _ => &["-O", "^resize_inode,^has_journal"],
    };
    let options = ["-q", "-F", "-b", "4096", "-i", "65536", "-m", "0", "-E", "nodiscard"];
    let options = options.into_iter().chain(journal.iter().copied());
    let arguments = options.map(AsRef::as_ref).chain([device.as_os_str()]);
    program::run("mkfs.ext4", arguments, MKFS_LIMIT).map(drop).map_err(|source| FilesystemError::Make {
        device: device.to_owned(),
        fs_type: FsType::Ext4,
        source,
    })
}

/// Makes a file system that is mounted as large as its device: one that is so large already stays. Others may use it meanwhile.
///
/// # Errors
/// [`FilesystemError::NotGrown`]; it can be used as before then.
pub fn grow(mount: &MountInfo) -> Result<(), FilesystemError> {
    let (program, target): (_, &Path) = match mount.fs_type.as_str() {
        "xfs" => ("xfs_growfs", &mount.mount_point),
        "ext4" => ("resize2fs", &mount.source),
        other => {
            return Err(FilesystemError::NoGrowth {
                mount: mount.mount_point.clone(),
                fs_type: other.to_owned(),
            });
        }
    };
    program::run(program, [target.as_os_str()], GROW_LIMIT)
        .map(drop)
        .map_err(|source| FilesystemError::NotGrown { mount: mount.mount_point.clone(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::create_sparse;

    fn image(dir: &Path, at: u64, bytes: &[u8]) -> PathBuf {
        let path = dir.join("image");
        let _ = std::fs::remove_file(&path);
        let file = create_sparse(&path, Bytes::mib(16)).unwrap();
        file.write_all_at(bytes, at).unwrap();
        path
    }

    #[test]
    fn every_known_signature_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        for (signature, at, magic) in MAGICS {
            let path = image(dir.path(), *at as u64, magic);
            assert_eq!(probe_signature(&path).unwrap(), Some(*signature), "{magic:?} at {at}");
        }
    }

    #[test]
    fn what_lies_at_the_end_counts() {
        let dir = tempfile::tempdir().unwrap();
        let end = 16 << 20;
        for (signature, from_end, bytes) in [
            (Signature::Gpt, 512, &b"EFI PART"[..]),
            (Signature::Raid, 8192, b"\xFC\x4E\x2B\xA9"),
            (Signature::Raid, 65536, b"\xFC\x4E\x2B\xA9"),
            (Signature::UnknownData, 1, b"x"),
        ] {
            let path = image(dir.path(), end - from_end, bytes);
            assert_eq!(probe_signature(&path).unwrap(), Some(signature));
        }
    }

    #[test]
    fn only_zeros_are_blank() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(probe_signature(&image(dir.path(), 0, &[0])).unwrap(), None);
        let unknown = image(dir.path(), 100_000, b"?");
        assert_eq!(probe_signature(&unknown).unwrap(), Some(Signature::UnknownData));
        for size in [0, 1, 100] {
            let tiny = dir.path().join("tiny");
            std::fs::write(&tiny, vec![0; size]).unwrap();
            assert_eq!(probe_signature(&tiny).unwrap(), None);
        }
    }

    #[test]
    fn made_file_systems_are_recognised_and_not_made_twice() {
        let dir = tempfile::tempdir().unwrap();
        if program::find_program("mkfs.ext4").is_none() {
            println!("SKIPPED: mkfs.ext4 is not installed");
            return;
        }
        let path = image(dir.path(), 0, &[0]);
        mkfs(&path, FsType::Ext4, Consent::OnlyIfBlank).unwrap();
        assert_eq!(probe_signature(&path).unwrap(), Some(Signature::Ext));
        let before = std::fs::read(&path).unwrap();
        let error = mkfs(&path, FsType::Xfs, Consent::OnlyIfBlank).unwrap_err();
        assert!(matches!(error, FilesystemError::NotBlank { signature: Signature::Ext, .. }), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), before, "nothing was written");
        mkfs(&path, FsType::Ext4, Consent::ResumeInterrupted).unwrap();
    }
}
