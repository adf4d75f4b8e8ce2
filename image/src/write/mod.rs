//! Images written front to back, in one pass: straight into the parts of an upload, with nothing staged.
//!
//! An [`Output`] says what is to be written. Its content is taken in blocks of [`BLOCK`] bytes, in three steps:
//!
//! 1. [`Encoder::encode`] looks for zeros in one block and compresses the rest. It is pure, so that many threads can do it.
//! 2. [`OnePassWriter::append`] takes the encoded blocks in order and gives the bytes of the object's *body*. What is not
//!    appended but passed over by [`OnePassWriter::zeros`] is not stored, where the format has a way not to.
//! 3. [`OnePassWriter::finish`] gives the rest of the body, and the *head*: the first bytes of the object, of a length that is
//!    known from the beginning, and with a content that is known only at the end. Raw and vmdk have none.
//!
//! [`PartWriter`] does the same and cuts the bytes into the parts of a multipart upload, each with a state from which
//! another process goes on. Nothing here does any IO.

mod encode;
mod output;
mod parts;
mod qcow2;
mod state;
mod vhd;
mod vmdk;
mod writer;

pub use encode::{EncodedBlock, Encoder};
pub use output::{Compression, Output, OutputFormat, PartPlan, WriteError};
pub use parts::{Part, PartWriter};
pub use writer::OnePassWriter;

use berth_core::units::Bytes;

/// The unit in which content is taken: blocks begin at its multiples, and only the last one of an image may be shorter.
/// The block of a dynamic VHD; 32 clusters of qcow2 or grains of vmdk.
pub const BLOCK: Bytes = Bytes::mib(2);

/// A cluster of qcow2 and a grain of vmdk, in bytes: what is compressed by itself. The default of both formats.
const CLUSTER: u64 = 64 << 10;

/// As a length in memory. Lengths of pieces are far below the limit; one that is not finds no memory.
fn length(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// Appends zeros up to the next multiple of `unit` bytes of `at`, an offset in the object. Returns that multiple.
fn pad_to(at: u64, unit: u64, out: &mut Vec<u8>) -> u64 {
    let end = at.next_multiple_of(unit);
    out.resize(out.len() + length(end - at), 0);
    end
}
