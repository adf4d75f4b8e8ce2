//! Image formats as streams of extents.
//!
//! An image is hostile input. [`probe()`] and [`probe_file`] look at it in memory-safe code, refuse every reference to
//! anything outside the file, and say who may read it: this crate ([`Reader::Native`]) or an unprivileged `qemu-img` with
//! an explicit driver. [`open`] gives a reader of an image in a file, and [`ImageReader::open`] one of an image that is read
//! by ranges from anywhere ([`ReadAt`]), which [`probe_at`] probes: extents in ascending order, content by offset, and a cut
//! image is an error, never zeros. [`OnePassWriter`] and [`PartWriter`] write images front to back. Memory is bounded
//! whatever the image's size.

mod extents;
mod probe;
mod raw;
mod read_at;
mod reader;
mod write;

pub use extents::{AnyReader, Extent, ExtentKind, ExtentReader, ReadError, SourceError, open};
pub use probe::{
    FOOTER_SAMPLE, HEAD_SAMPLE, ImageFormat, Note, Probe, ProbeError, Reader, Refusal, Sample, probe,
    probe_as, probe_at, probe_file, probe_file_as,
};
pub use raw::RawReader;
pub use read_at::{LocalFile, ReadAt};
pub use reader::ImageReader;
pub use write::{
    BLOCK, Compression, EncodedBlock, Encoder, OnePassWriter, Output, OutputFormat, Part, PartPlan,
    PartWriter, WriteError,
};
