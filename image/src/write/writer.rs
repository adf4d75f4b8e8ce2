//! The writer of any format: what is the same for all of them.

use berth_core::units::Bytes;

use super::encode::{EncodedBlock, Encoder};
use super::output::{Output, OutputFormat, PartPlan, WriteError};
use super::qcow2::Qcow2Writer;
use super::state::{self, Load, Save};
use super::vhd::VhdWriter;
use super::vmdk::VmdkWriter;
use super::{BLOCK, length};

/// Puts encoded blocks into an object, in ascending order.
///
/// **Guarantees:** the bytes depend on output and content alone, whether zeros are appended or passed over; memory is that of
/// the format's tables, not of the content (qcow2: 8 bytes for each 512 MiB of the disk, and 300 KiB; vmdk: 8 bytes for each
/// 32 MiB; VHD: 1 byte for each 2 MiB).
///
/// A writer that was resumed goes on with the very bytes that the former one would have given.
#[derive(Clone, Debug)]
pub struct OnePassWriter {
    output: Output,
    plan: PartPlan,
    position: Bytes,
    format: FormatWriter,
}

#[derive(Clone, Debug)]
enum FormatWriter {
    Raw,
    Qcow2(Box<Qcow2Writer>),
    Vmdk(Box<VmdkWriter>),
    Vhd(Box<VhdWriter>),
}

impl OnePassWriter {
    /// More than one call of [`append`](Self::append), [`zeros`](Self::zeros) or [`finish`](Self::finish) gives: a block, what
    /// grows by compression or fills up a cluster, and tables.
    pub const MOST_PER_CALL: Bytes = Bytes(BLOCK.0 + (1 << 20));

    /// At the beginning.
    ///
    /// # Errors
    /// As [`Output::plan`].
    pub fn new(output: Output) -> Result<Self, WriteError> {
        let plan = output.plan()?;
        let format = match output.format {
            OutputFormat::Raw => FormatWriter::Raw,
            OutputFormat::Qcow2 { .. } => FormatWriter::Qcow2(Box::new(Qcow2Writer::new(&output, &plan))),
            OutputFormat::Vmdk => FormatWriter::Vmdk(Box::new(VmdkWriter::new(&output))),
            OutputFormat::Vhd => FormatWriter::Vhd(Box::new(VhdWriter::new(&output, &plan))),
        };
        Ok(Self { output, plan, position: Bytes::ZERO, format })
    }

    /// What is being written.
    pub fn output(&self) -> &Output {
        &self.output
    }

    /// How the object is divided.
    pub fn plan(&self) -> &PartPlan {
        &self.plan
    }

    /// What makes blocks for this writer.
    pub fn encoder(&self) -> Encoder {
        Encoder::of(self.output)
    }

    /// Where the content goes on: a multiple of [`BLOCK`], or the virtual size at the end.
    pub fn position(&self) -> Bytes {
        self.position
    }

    /// How long the body is so far.
    pub fn body_len(&self) -> Bytes {
        let end = match &self.format {
            FormatWriter::Raw => self.position.0,
            FormatWriter::Qcow2(writer) => writer.end(),
            FormatWriter::Vmdk(writer) => writer.end(),
            FormatWriter::Vhd(writer) => writer.end(),
        };
        Bytes(end).saturating_sub(self.plan.head_len)
    }

    /// Appends the block at [`position`](Self::position); what it adds to the body goes to `out`.
    ///
    /// # Errors
    /// [`WriteError::OutOfOrder`], [`WriteError::OtherOutput`]. Nothing has changed then.
    pub fn append(&mut self, block: &EncodedBlock, out: &mut Vec<u8>) -> Result<(), WriteError> {
        if block.output != self.output {
            return Err(WriteError::OtherOutput);
        }
        if block.at != self.position || self.position >= self.output.virtual_size {
            return Err(WriteError::OutOfOrder { expected: self.position, found: block.at });
        }
        match &mut self.format {
            FormatWriter::Raw => block.pieces().for_each(|(_, bytes)| out.extend_from_slice(bytes)),
            FormatWriter::Qcow2(writer) => writer.append(block, out),
            FormatWriter::Vmdk(writer) => writer.append(block, out),
            FormatWriter::Vhd(writer) => writer.append(block, out),
        }
        self.position = self.position.saturating_add(Bytes(self.output.block_len(block.at) as u64));
        Ok(())
    }

    /// Passes over zeros, at most up to `until`: a multiple of [`BLOCK`], or the virtual size. A raw image stores them, so it
    /// goes on by one block only: call it until [`position`](Self::position) is `until`.
    ///
    /// # Errors
    /// [`WriteError::OutOfOrder`] if no content can end there. Nothing has changed then.
    pub fn zeros(&mut self, until: Bytes, out: &mut Vec<u8>) -> Result<(), WriteError> {
        let size = self.output.virtual_size;
        if until < self.position || until > size || (until != size && !until.0.is_multiple_of(BLOCK.0)) {
            return Err(WriteError::OutOfOrder { expected: self.position, found: until });
        }
        match &mut self.format {
            FormatWriter::Raw => {
                let step = until.saturating_sub(self.position).min(BLOCK);
                out.resize(out.len() + length(step.0), 0);
                self.position = self.position.saturating_add(step);
                return Ok(());
            }
            FormatWriter::Qcow2(writer) => writer.zeros(until, out),
            FormatWriter::Vmdk(writer) => writer.zeros(until, out),
            FormatWriter::Vhd(writer) => writer.zeros(until),
        }
        self.position = until;
        Ok(())
    }

    /// Appends the rest of the body to `out` and returns the head, [`PartPlan::head_len`] bytes.
    ///
    /// # Errors
    /// [`WriteError::Incomplete`] if content is missing.
    pub fn finish(self, out: &mut Vec<u8>) -> Result<Vec<u8>, WriteError> {
        if self.position != self.output.virtual_size {
            return Err(WriteError::Incomplete { position: self.position, size: self.output.virtual_size });
        }
        Ok(match self.format {
            FormatWriter::Raw => Vec::new(),
            FormatWriter::Qcow2(writer) => writer.finish(out),
            FormatWriter::Vmdk(writer) => {
                writer.finish(out);
                Vec::new()
            }
            FormatWriter::Vhd(writer) => writer.finish(out),
        })
    }

    /// What is needed to go on from here in another process, at any moment between two calls. A checksum protects it against
    /// damage. Below 64 KiB for a disk of 256 GiB; mostly a few KiB.
    pub fn state(&self) -> Vec<u8> {
        let mut save = Save::new();
        save.output(&self.output);
        save.number(self.position.0);
        match &self.format {
            FormatWriter::Raw => {}
            FormatWriter::Qcow2(writer) => writer.save(&mut save),
            FormatWriter::Vmdk(writer) => writer.save(&mut save),
            FormatWriter::Vhd(writer) => writer.save(&mut save),
        }
        save.seal()
    }

    /// Goes on from a state: with the content from [`position`](Self::position) on, the bytes of the body from
    /// [`body_len`](Self::body_len) on.
    ///
    /// # Errors
    /// [`WriteError::State`] and [`WriteError::StateVersion`]; as [`Output::plan`] for an output that can never have been.
    pub fn resume(state: &[u8]) -> Result<Self, WriteError> {
        let content = state::open(state)?;
        let mut load = Load::new(&content);
        let output = load.output()?;
        let plan = output.plan()?;
        let position = Bytes(load.number(output.virtual_size.0)?);
        if position != output.virtual_size && !position.0.is_multiple_of(BLOCK.0) {
            return Err(WriteError::State { what: "position within a block" });
        }
        let format = match output.format {
            OutputFormat::Raw => FormatWriter::Raw,
            OutputFormat::Qcow2 { .. } => {
                FormatWriter::Qcow2(Box::new(Qcow2Writer::load(&output, &plan, position, &mut load)?))
            }
            OutputFormat::Vmdk => {
                FormatWriter::Vmdk(Box::new(VmdkWriter::load(&output, position, &mut load)?))
            }
            OutputFormat::Vhd => {
                FormatWriter::Vhd(Box::new(VhdWriter::load(&output, &plan, position, &mut load)?))
            }
        };
        load.end()?;
        Ok(Self { output, plan, position, format })
    }
}
