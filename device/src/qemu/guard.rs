//! What must be known of an image before `qemu-img` may open it: that it is one file, alone and not encrypted.
//!
//! Sources: `docs/interop/qcow2.txt` of QEMU; "Virtual Disk Format 5.0" (VMDK); MS-VHDX; "Virtual Hard Disk Image
//! Format Specification" (VHD). These checks are a second line: whoever reads the image first checks more.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use thiserror::Error;

/// A format that `qemu-img` converts from. Nothing else is ever given to it as a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceDriver {
    /// qcow2, QEMU's own.
    Qcow2,
    /// VMDK of one file (`monolithicSparse`, `streamOptimized`).
    Vmdk,
    /// VHD, called `vpc` by QEMU.
    Vpc,
    /// VHDX.
    Vhdx,
}

impl SourceDriver {
    /// QEMU's name of it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vpc => "vpc",
            Self::Vhdx => "vhdx",
        }
    }
}

impl fmt::Display for SourceDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A name that is no driver images are converted with.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{0}` is not a format that is converted with qemu-img")]
pub struct UnknownDriver(pub String);

impl FromStr for SourceDriver {
    type Err = UnknownDriver;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [Self::Qcow2, Self::Vmdk, Self::Vpc, Self::Vhdx]
            .into_iter()
            .find(|driver| driver.as_str() == text)
            .ok_or_else(|| UnknownDriver(text.to_owned()))
    }
}

/// Why an image is not given to `qemu-img`.
#[derive(Debug, Error)]
pub enum GuardError {
    /// It could not be read.
    #[error("failed to read image {path}", path = path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is not of the format it was said to be.
    #[error("image {path} is not {driver}", path = path.display())]
    NotThisFormat {
        /// The image.
        path: PathBuf,
        /// The format.
        driver: SourceDriver,
    },
    /// It is not a whole image in itself.
    #[error("image {path} is refused: {reason}", path = path.display())]
    Refused {
        /// The image.
        path: PathBuf,
        /// What it has that is not allowed.
        reason: &'static str,
    },
}

/// Refuses an image that refers to another file, is encrypted, or is not of this format.
pub fn guard(path: &Path, driver: SourceDriver) -> Result<(), GuardError> {
    let file = File::open(path).map_err(|source| GuardError::Read { path: path.to_owned(), source })?;
    guard_file(&file, path, driver)
}

/// The same for an open image; `path` is for messages.
pub(crate) fn guard_file(file: &File, path: &Path, driver: SourceDriver) -> Result<(), GuardError> {
    let read = |source| GuardError::Read { path: path.to_owned(), source };
    let length = file.metadata().map_err(read)?.len();
    let mut header = [0; 512];
    let available = usize::try_from(length).unwrap_or(512).min(512);
    file.read_exact_at(&mut header[..available], 0).map_err(read)?;
    let verdict = match driver {
        SourceDriver::Qcow2 => qcow2(&header),
        SourceDriver::Vmdk => vmdk(&header),
        SourceDriver::Vhdx => header.starts_with(b"vhdxfile").then_some(Ok(())),
        SourceDriver::Vpc => {
            let mut footer = [0; 512];
            if length >= 512 {
                file.read_exact_at(&mut footer, length - 512).map_err(read)?;
            }
            vpc(if header.starts_with(b"conectix") { &header } else { &footer })
        }
    };
    match verdict {
        Some(Ok(())) => Ok(()),
        Some(Err(reason)) => Err(GuardError::Refused { path: path.to_owned(), reason }),
        None => Err(GuardError::NotThisFormat { path: path.to_owned(), driver }),
    }
}

/// `None`: not of this format.
type Verdict = Option<Result<(), &'static str>>;

fn qcow2(header: &[u8; 512]) -> Verdict {
    if !header.starts_with(b"QFI\xFB") {
        return None;
    }
    let word = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let version = word(4);
    let names_backing_file = word(8) != 0 || word(12) != 0 || word(16) != 0;
    let external_data = version >= 3 && header[79] & 0b100 != 0;
    Some(if !(2..=3).contains(&version) {
        Err("its version is neither 2 nor 3")
    } else if names_backing_file {
        Err("it has a backing file")
    } else if word(32) != 0 {
        Err("it is encrypted")
    } else if external_data {
        Err("its data lies in another file")
    } else {
        Ok(())
    })
}

fn vmdk(header: &[u8; 512]) -> Verdict {
    if header.starts_with(b"# Disk Des") {
        return Some(Err("it is a descriptor that refers to other files"));
    }
    if !header.starts_with(b"KDMV") {
        return None;
    }
    // With a capacity of zero, QEMU reads the descriptor inside as one that may name other files.
    let capacity_is_zero = header[12..20] == [0; 8];
    Some(if capacity_is_zero { Err("it refers to other files") } else { Ok(()) })
}

fn vpc(footer: &[u8; 512]) -> Verdict {
    let kind = u32::from_be_bytes([footer[60], footer[61], footer[62], footer[63]]);
    footer.starts_with(b"conectix").then_some(match kind {
        2 | 3 => Ok(()),
        4 => Err("it is a difference to another image"),
        _ => Err("its type is unknown"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(driver: SourceDriver, edit: impl FnOnce(&mut Vec<u8>)) -> Result<(), GuardError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let mut image = vec![0; 4096];
        edit(&mut image);
        std::fs::write(&path, image).unwrap();
        guard(&path, driver)
    }

    fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
        image[at..at + bytes.len()].copy_from_slice(bytes);
    }

    #[test]
    fn only_four_names_are_drivers() {
        for hostile in
            ["", "raw", "nbd", "host_device", "qcow2,file.filename=/etc/shadow", "QCOW2", "json:{}"]
        {
            assert_eq!(hostile.parse::<SourceDriver>(), Err(UnknownDriver(hostile.to_owned())));
        }
        assert_eq!("vpc".parse(), Ok(SourceDriver::Vpc));
    }

    #[test]
    fn qcow2_that_reaches_outside_is_refused() {
        let base = |image: &mut Vec<u8>| put(image, 0, b"QFI\xFB\0\0\0\x03");
        verdict(SourceDriver::Qcow2, base).unwrap();
        for (at, byte, why) in
            [(15, 8, "backing"), (19, 8, "backing"), (35, 1, "encrypted"), (79, 4, "another file")]
        {
            let error = verdict(SourceDriver::Qcow2, |image| {
                base(image);
                image[at] = byte;
            })
            .unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
        }
    }

    #[test]
    fn vmdk_that_names_other_files_is_refused() {
        let sparse = |image: &mut Vec<u8>| put(image, 0, b"KDMV\x01\0\0\0\x03\0\0\0\x08");
        verdict(SourceDriver::Vmdk, sparse).unwrap();
        let empty = verdict(SourceDriver::Vmdk, |image| put(image, 0, b"KDMV\x01")).unwrap_err();
        assert!(matches!(empty, GuardError::Refused { .. }), "{empty}");
        let text = b"# Disk DescriptorFile\nRW 1 FLAT \"/etc/passwd\" 0\n";
        let text = verdict(SourceDriver::Vmdk, |image| put(image, 0, text)).unwrap_err();
        assert!(matches!(text, GuardError::Refused { .. }), "{text}");
    }

    #[test]
    fn vhd_differences_are_refused_and_other_files_are_not_vhd() {
        let footer = |kind| {
            move |image: &mut Vec<u8>| {
                put(image, 3584, b"conectix");
                image[3584 + 63] = kind;
            }
        };
        verdict(SourceDriver::Vpc, footer(2)).unwrap();
        assert!(matches!(verdict(SourceDriver::Vpc, footer(4)), Err(GuardError::Refused { .. })));
        for driver in [SourceDriver::Qcow2, SourceDriver::Vmdk, SourceDriver::Vpc, SourceDriver::Vhdx] {
            assert!(matches!(verdict(driver, |_| ()), Err(GuardError::NotThisFormat { .. })));
            assert!(matches!(verdict(driver, Vec::clear), Err(GuardError::NotThisFormat { .. })));
        }
    }
}
