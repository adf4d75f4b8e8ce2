//! Image formats as streams of extents.
//!
//! An image is hostile input. [`probe()`] and [`probe_file`] look at it in memory-safe code, refuse every reference to
//! anything outside the file, and say who may read it: this crate ([`Reader::Native`]) or an unprivileged `qemu-img` with
//! an explicit driver. [`open`] gives a reader of the native formats: extents in ascending order, content by offset, and
//! a cut file is an error, never zeros. [`OnePassWriter`] and [`PartWriter`] write images front to back. Memory is bounded
//! whatever the image's size.

mod extents;
mod probe;
mod qcow2;
mod raw;
mod write;

pub use extents::{AnyReader, Extent, ExtentKind, ExtentReader, ReadError, open};
pub use probe::{
    FOOTER_SAMPLE, HEAD_SAMPLE, ImageFormat, Note, Probe, ProbeError, Reader, Refusal, Sample, probe,
    probe_as, probe_file, probe_file_as,
};
pub use qcow2::Qcow2Reader;
pub use raw::RawReader;
pub use write::{
    BLOCK, Compression, EncodedBlock, Encoder, OnePassWriter, Output, OutputFormat, Part, PartPlan,
    PartWriter, WriteError,
};
