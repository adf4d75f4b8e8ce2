//! What an image is, from its first and last bytes, without trusting any of them.

mod foreign;
mod qcow2;
mod ranged;
mod refusal;
mod source;
mod vhd;
mod vhdx;
mod vmdk;

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use berth_core::units::Bytes;
use thiserror::Error;

pub(crate) use qcow2::Qcow2Header;
pub(crate) use ranged::look_into;
pub use ranged::probe_at;
pub use refusal::Refusal;
pub use source::Sample;
pub(crate) use source::{Source, Stop};
pub(crate) use vhd::{VhdBlocks, VhdHeader};
pub(crate) use vhdx::VhdxHeader;
pub(crate) use vmdk::VmdkHeader;

/// As much of the head as [`probe()`] ever looks at, but for VHDX.
pub const HEAD_SAMPLE: Bytes = Bytes::mib(1);
/// As much of the tail as [`probe()`] ever looks at.
pub const FOOTER_SAMPLE: Bytes = Bytes(1536);

/// The unit in which disks are counted; a raw image of another length is padded with zeros to a multiple.
pub(crate) const SECTOR: Bytes = Bytes(512);

/// A format that can be imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageFormat {
    /// The disk's bytes, nothing else.
    Raw,
    /// QEMU's, versions 2 and 3.
    Qcow2,
    /// `VMware`'s, as one sparse or stream-optimised file.
    Vmdk,
    /// Virtual PC's and Azure's, fixed or dynamic.
    Vhd,
    /// Hyper-V's.
    Vhdx,
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhd => "vhd",
            Self::Vhdx => "vhdx",
        })
    }
}

/// Who can read the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// [`crate::open`] and [`crate::ImageReader`].
    Native,
    /// `qemu-img`, told the driver and never left to find out: `driver=…,file.driver=file,file.filename=…`.
    QemuImg {
        /// `vmdk` or `vhdx`.
        driver: &'static str,
    },
}

/// Something worth telling about an image that can be imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Note {
    /// Its length is not a multiple of 512; zeros are added.
    Padded,
    /// It holds internal snapshots; only its current state is read.
    SnapshotsIgnored,
    /// Its clusters are compressed with zstd.
    Zstd,
    /// It divides clusters into subclusters.
    ExtendedL2,
    /// Made for sending, not for random access.
    StreamOptimized,
    /// The size is what the head says; the end of the file must confirm it.
    SizeUnconfirmed,
}

/// What an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Its format.
    pub format: ImageFormat,
    /// The size that a machine sees, a multiple of 512. `None` only where it lies outside of the sample.
    pub virtual_size: Option<Bytes>,
    /// Who can read it.
    pub reader: Reader,
    /// What else there is to tell.
    pub notes: Vec<Note>,
}

/// Why a file could not be probed.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// It was, and cannot be imported.
    #[error("image {path} is refused")]
    Refused {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Refusal,
    },
    /// It cannot be read.
    #[error("failed to read image {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The file system's answer.
        source: std::io::Error,
    },
}

/// Finds the format of an image and checks it.
///
/// A raw disk can begin like any other format, if whoever wrote to it wished so: where the format is known, use
/// [`probe_as`].
///
/// # Errors
/// Everything that may not or cannot be imported, as a [`Refusal`].
pub fn probe(sample: &Sample<'_>) -> Result<Probe, Refusal> {
    settle(sample, probe_source(sample))
}

/// Checks an image whose format is known. A raw one is never looked into.
///
/// # Errors
/// [`Refusal::OtherFormat`] if it is not of that format, else as [`probe()`].
pub fn probe_as(format: ImageFormat, sample: &Sample<'_>) -> Result<Probe, Refusal> {
    settle(sample, probe_source_as(format, sample))
}

/// Finds the format of an image in a file and checks it. Reads wherever the format keeps what must be known, so the
/// answer is never unconfirmed: ask it before any other program sees the file.
///
/// # Errors
/// As [`probe()`], or that the file cannot be read.
pub fn probe_file(path: &Path) -> Result<Probe, ProbeError> {
    with_file(path, |file| probe_source(file))
}

/// Checks an image in a file whose format is known.
///
/// # Errors
/// As [`probe_as`], or that the file cannot be read.
pub fn probe_file_as(format: ImageFormat, path: &Path) -> Result<Probe, ProbeError> {
    with_file(path, |file| probe_source_as(format, file))
}

fn with_file(path: &Path, look: impl FnOnce(&File) -> Result<Probe, Stop>) -> Result<Probe, ProbeError> {
    let io = |source| ProbeError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    look(&file).map_err(|stop| match stop {
        Stop::Refused(source) => ProbeError::Refused { path: path.to_owned(), source },
        Stop::Io(source) => io(source),
        Stop::NotSampled { end } => {
            let found = Source::size(&file).unwrap_or_default();
            ProbeError::Refused { path: path.to_owned(), source: Refusal::Truncated { expected: end, found } }
        }
    })
}

/// A sample that is too small for the format's header is a mistake of the caller that must not pass for a good image.
fn settle(sample: &Sample<'_>, answer: Result<Probe, Stop>) -> Result<Probe, Refusal> {
    answer.map_err(|stop| match stop {
        Stop::Refused(refusal) => refusal,
        Stop::NotSampled { end } => {
            Refusal::SampleTooSmall { needed: end, given: Bytes(sample.head.len() as u64) }
        }
        Stop::Io(_) => unreachable!("a sample is memory"),
    })
}

pub(crate) fn probe_source(source: &dyn Source) -> Result<Probe, Stop> {
    let size = source.size()?;
    let head = source.up_to(Bytes(0), Bytes(512))?;
    match detect(&head) {
        Some(format) => return probe_source_as(format, source),
        None => foreign::refuse(&head, source)?,
    }
    // A fixed VHD is a raw image with a footer.
    if size.0 > 512 && vhd::has_sound_footer(source)? {
        return probe_source_as(ImageFormat::Vhd, source);
    }
    probe_source_as(ImageFormat::Raw, source)
}

/// The format with this magic number.
fn detect(head: &[u8]) -> Option<ImageFormat> {
    let begins = |magic: &[u8]| head.starts_with(magic);
    if begins(b"QFI\xfb") && head.get(4..8) != Some(&[0, 0, 0, 1]) {
        Some(ImageFormat::Qcow2)
    } else if begins(b"KDMV") || begins(b"COWD") || begins(b"# Disk DescriptorFile") {
        Some(ImageFormat::Vmdk)
    } else if begins(b"vhdxfile") {
        Some(ImageFormat::Vhdx)
    } else if begins(b"conectix") {
        Some(ImageFormat::Vhd)
    } else {
        None
    }
}

pub(crate) fn probe_source_as(format: ImageFormat, source: &dyn Source) -> Result<Probe, Stop> {
    let head = source.up_to(Bytes(0), Bytes(512))?;
    match (format, detect(&head)) {
        (ImageFormat::Raw, _) => return probe_raw(source),
        (ImageFormat::Vhd, None) if vhd::has_sound_footer(source)? => {}
        (format, Some(found)) if format == found => {}
        (expected, found) => return Err(Refusal::OtherFormat { expected, found }.into()),
    }
    match format {
        ImageFormat::Raw => probe_raw(source),
        ImageFormat::Qcow2 => qcow2::probe(source),
        ImageFormat::Vmdk => vmdk::probe(source),
        ImageFormat::Vhd => vhd::probe(source),
        ImageFormat::Vhdx => vhdx::probe(source),
    }
}

fn probe_raw(source: &dyn Source) -> Result<Probe, Stop> {
    let size = source.size()?;
    let virtual_size = size.round_up(SECTOR);
    let notes = if virtual_size == size { Vec::new() } else { vec![Note::Padded] };
    Ok(Probe { format: ImageFormat::Raw, virtual_size: Some(virtual_size), reader: Reader::Native, notes })
}
