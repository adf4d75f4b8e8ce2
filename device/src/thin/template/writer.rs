//! How chunks and holes of a template become local: through its device, whole regions at a time.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};

use berth_core::hydration::{CloneMode, Geometry, LARGEST_WRITE, Span};
use berth_core::units::Bytes;
use nix::libc;

use super::device::TemplateDevice;
use super::error::TemplateError;
use crate::sys;

/// Where direct writes have to begin in memory. With any less, a write of 256 pages would take 257.
const ALIGNMENT: usize = 4096;

/// Memory that is written from without a copy. As large as it was made, for as long as it lives.
#[derive(Debug)]
pub struct DirectBuffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl DirectBuffer {
    /// Zeros. `length` is in bytes.
    pub fn new(length: usize) -> Self {
        let memory = vec![0; length + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { memory, start, length }
    }
}

impl Deref for DirectBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }
}

impl DerefMut for DirectBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

/// Writes to a template that is a clone. Several threads may use one at once, for different chunks. Holds no content.
#[derive(Debug)]
pub struct TemplateWriter {
    device: TemplateDevice,
    file: File,
    geometry: Geometry,
}

impl TemplateWriter {
    pub(super) fn open(device: TemplateDevice, geometry: Geometry) -> Result<Self, TemplateError> {
        let flags = libc::O_DIRECT | libc::O_CLOEXEC;
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(device.path());
        let file =
            file.map_err(|source| TemplateError::Device { action: "open", device: device.path(), source })?;
        Ok(Self { device, file, geometry })
    }

    /// The regions of the template.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Writes the first `length` bytes of `data` to `offset`, which makes the regions there local. Nothing of the source is
    /// read, except for the last region if that is shorter than the others. May be repeated.
    ///
    /// # Errors
    /// [`TemplateError::Span`] if these are not whole regions: the rest of one would have to come from the source, which is
    /// what the chunk was fetched to avoid. [`TemplateError::Stopped`] if the kernel records nothing more.
    ///
    /// # Panics
    /// If `data` is shorter than `length`.
    pub fn write(&self, offset: Bytes, data: &DirectBuffer, length: usize) -> Result<(), TemplateError> {
        let span = Span { offset, length: Bytes(length as u64) };
        self.geometry.check(span).map_err(|source| self.refused(source))?;
        let mut at = offset.0;
        for piece in data[..length].chunks(LARGEST_PIECE) {
            self.file.write_all_at(piece, at).map_err(|source| self.failed("write", Bytes(at), source))?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Makes a hole local: it reads as zeros, as the destination does where it was never written. Takes no space, except for
    /// the last region if that is shorter than the others. May be repeated.
    ///
    /// # Errors
    /// As [`Self::write`], but a kernel that records nothing more does not say so here.
    pub fn discard(&self, span: Span) -> Result<(), TemplateError> {
        let hole = self.geometry.hole(span).map_err(|source| self.refused(source))?;
        if let Some(Span { offset, length }) = hole.discarded {
            sys::discard(&self.file, offset.0, length.0)
                .map_err(|errno| self.failed("discard a part of", offset, errno.into()))?;
        }
        if let Some(Span { offset, length }) = hole.written {
            let length = usize::try_from(length.0).unwrap_or(usize::MAX);
            self.write(offset, &DirectBuffer::new(length), length)?;
        }
        Ok(())
    }

    /// Makes the last region local if it is shorter than the others, from what is read there. Waits for the source.
    ///
    /// Never from the process that serves the source: killed while it waits for itself, it would neither end nor answer.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn settle_short_region(&self) -> Result<(), TemplateError> {
        let Some(Span { offset, length }) = self.geometry.short_region() else { return Ok(()) };
        let length = usize::try_from(length.0).unwrap_or(usize::MAX);
        let mut buffer = DirectBuffer::new(length);
        let read = self.file.read_exact_at(&mut buffer, offset.0);
        read.map_err(|source| self.failed("read", offset, source))?;
        self.write(offset, &buffer, length)
    }

    /// Waits until everything that was written or discarded is durable.
    ///
    /// # Errors
    /// [`TemplateError::Stopped`] if the kernel could not record it.
    pub fn flush(&self) -> Result<(), TemplateError> {
        self.file.sync_all().map_err(|source| self.failed("flush", Bytes::ZERO, source))
    }

    fn refused(&self, source: berth_core::hydration::SpanError) -> TemplateError {
        TemplateError::Span { template: self.device.name().clone(), source }
    }

    /// Tells a clone that takes nothing more from one write that failed.
    fn failed(&self, action: &'static str, offset: Bytes, source: io::Error) -> TemplateError {
        let template = self.device.name().clone();
        match self.device.status().map(|status| status.mode()) {
            Ok(mode @ (CloneMode::ReadOnly | CloneMode::Failed)) => TemplateError::Stopped { template, mode },
            _ => TemplateError::Write { action, template, offset, source },
        }
    }
}

#[allow(clippy::cast_possible_truncation)] // 1 MiB
const LARGEST_PIECE: usize = LARGEST_WRITE.0 as usize;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn direct_memory_begins_at_a_page() {
        for length in [0, 1, 512, 4096, 1 << 20] {
            let mut buffer = DirectBuffer::new(length);
            assert!(buffer.len() == length && buffer.iter().all(|byte| *byte == 0));
            assert!(buffer.as_ptr().addr().is_multiple_of(ALIGNMENT));
            buffer.fill(7);
            assert!(buffer.iter().all(|byte| *byte == 7));
        }
    }
}
