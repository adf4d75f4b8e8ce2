//! The bytes of an object as the parts of a multipart upload.

use berth_core::units::Bytes;
use sha2::{Digest as _, Sha256};

use super::encode::{EncodedBlock, Encoder};
use super::length;
use super::output::{Output, PartPlan, WriteError};
use super::writer::OnePassWriter;

/// The length of the digest before a writer's state.
const DIGEST: usize = 32;

/// One part of the object, to be uploaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its number in the upload, from 1. Part 1 is the head if there is one, and comes last then.
    pub number: u32,
    /// Its content.
    pub bytes: Vec<u8>,
    /// Once this part and those that came before it are uploaded, what [`PartWriter::resume`] goes on from. `None` for the
    /// parts that [`PartWriter::finish`] gives: until the upload is complete, the state before them stays the one to keep.
    pub resume: Option<Vec<u8>>,
}

/// A [`OnePassWriter`] whose bytes are cut into parts.
///
/// A part ends within a cluster, mostly, and a state is of a moment between two blocks: the last one before the part's end.
/// What was uploaded after that moment is made once more and left out, at most a block, and a digest tells whether it is the
/// same: if the content or a library has changed meanwhile, the upload must begin anew, because its parts would not fit.
///
/// **Guarantees:** memory for one part and two blocks, besides that of the writer. At most one part is given at a time, so
/// that whoever uploads them bounds how many there are.
#[derive(Clone, Debug)]
pub struct PartWriter {
    writer: OnePassWriter,
    /// What belongs to the next part and follows.
    buffer: Vec<u8>,
    /// Parts of the body that were given, or uploaded before a resume.
    done: u64,
    /// What was uploaded after the state that this one was resumed from, and comes again.
    again: Option<Again>,
}

#[derive(Clone, Debug)]
struct Again {
    /// How many bytes are left to come.
    left: u64,
    /// Of those that came.
    hash: Sha256,
    expected: [u8; DIGEST],
}

impl PartWriter {
    /// At the beginning.
    ///
    /// # Errors
    /// As [`Output::plan`].
    pub fn new(output: Output) -> Result<Self, WriteError> {
        Ok(Self { writer: OnePassWriter::new(output)?, buffer: Vec::new(), done: 0, again: None })
    }

    /// Goes on from the state of a [`Part`]. That part and those before it, but for the head, must be uploaded.
    ///
    /// # Errors
    /// As [`OnePassWriter::resume`].
    pub fn resume(state: &[u8]) -> Result<Self, WriteError> {
        let what = "it is too short";
        let (expected, state) = state.split_first_chunk::<DIGEST>().ok_or(WriteError::State { what })?;
        let writer = OnePassWriter::resume(state)?;
        if writer.plan().whole {
            return Err(WriteError::State { what: "its object has one part only" });
        }
        // A state is less than a part before the end of its part.
        let (len, part) = (writer.body_len().0, writer.plan().part_size.0);
        let done = len.div_ceil(part);
        let again = Again { left: done * part - len, hash: Sha256::new(), expected: *expected };
        Ok(Self { writer, buffer: Vec::new(), done, again: Some(again) })
    }

    /// What is being written.
    pub fn output(&self) -> &Output {
        self.writer.output()
    }

    /// How the object is divided.
    pub fn plan(&self) -> &PartPlan {
        self.writer.plan()
    }

    /// What makes blocks for this writer.
    pub fn encoder(&self) -> Encoder {
        self.writer.encoder()
    }

    /// How many parts of the body are complete.
    pub fn parts_done(&self) -> u64 {
        self.done
    }

    /// Where the content goes on: a multiple of [`BLOCK`](crate::BLOCK), or the virtual size at the end.
    pub fn position(&self) -> Bytes {
        self.writer.position()
    }

    /// Appends the block at [`position`](Self::position).
    ///
    /// # Errors
    /// As [`OnePassWriter::append`], and [`WriteError::Diverged`].
    pub fn append(&mut self, block: &EncodedBlock) -> Result<Option<Part>, WriteError> {
        self.write(|writer, out| writer.append(block, out))
    }

    /// Passes over zeros, until [`position`](Self::position) is `until` or there is a part: call it until the former.
    ///
    /// # Errors
    /// As [`OnePassWriter::zeros`], and [`WriteError::Diverged`].
    pub fn zeros(&mut self, until: Bytes) -> Result<Option<Part>, WriteError> {
        loop {
            let part = self.write(|writer, out| writer.zeros(until, out))?;
            if part.is_some() || self.position() == until {
                return Ok(part);
            }
        }
    }

    /// The parts that are left, in the order in which they may be uploaded: the head is the last.
    ///
    /// # Errors
    /// [`WriteError::Incomplete`] if content is missing, [`WriteError::Diverged`].
    pub fn finish(mut self) -> Result<Vec<Part>, WriteError> {
        let (plan, mut rest) = (*self.plan(), Vec::new());
        let head = self.writer.clone().finish(&mut rest)?;
        self.take(rest)?;
        if self.again.is_some() {
            return Err(WriteError::Diverged);
        }
        if plan.whole {
            let bytes = [head, self.buffer].concat();
            return Ok(vec![Part { number: 1, bytes, resume: None }]);
        }
        let mut parts = Vec::new();
        for bytes in self.buffer.chunks(length(plan.part_size.0)) {
            self.done += 1;
            parts.push(Part { number: number(&plan, self.done), bytes: bytes.to_vec(), resume: None });
        }
        if !head.is_empty() {
            parts.push(Part { number: 1, bytes: head, resume: None });
        }
        Ok(parts)
    }

    fn write(
        &mut self,
        step: impl FnOnce(&mut OnePassWriter, &mut Vec<u8>) -> Result<(), WriteError>,
    ) -> Result<Option<Part>, WriteError> {
        let plan = *self.plan();
        let ends = (self.done + 1) * plan.part_size.0;
        let near =
            !plan.whole && self.writer.body_len().saturating_add(OnePassWriter::MOST_PER_CALL).0 >= ends;
        let before = near.then(|| self.writer.clone());
        let mut out = Vec::new();
        step(&mut self.writer, &mut out)?;
        self.take(out)?;
        match before {
            Some(before) if self.writer.body_len().0 >= ends => Ok(Some(self.part(&before, &plan))),
            _ => Ok(None),
        }
    }

    /// Takes what the writer gave, but for what is uploaded already.
    fn take(&mut self, mut out: Vec<u8>) -> Result<(), WriteError> {
        if let Some(again) = &mut self.again {
            let known = out.len().min(length(again.left));
            again.hash.update(&out[..known]);
            again.left -= known as u64;
            out.drain(..known);
            if again.left == 0 {
                if again.hash.clone().finalize()[..] != again.expected {
                    return Err(WriteError::Diverged);
                }
                self.again = None;
            }
        }
        self.buffer.append(&mut out);
        Ok(())
    }

    /// The part that has just become complete, by the step after `before`.
    fn part(&mut self, before: &OnePassWriter, plan: &PartPlan) -> Part {
        let part_size = length(plan.part_size.0);
        let rest = self.buffer.split_off(part_size);
        let bytes = std::mem::replace(&mut self.buffer, rest);
        self.done += 1;
        // At the part's very end the state is the one after the step.
        let ended = self.buffer.is_empty();
        let from = if ended { &self.writer } else { before };
        let again = (self.done * plan.part_size.0).saturating_sub(from.body_len().0);
        let digest = Sha256::digest(&bytes[part_size - length(again)..]);
        let resume = [&digest[..], &from.state()].concat();
        Part { number: number(plan, self.done), bytes, resume: Some(resume) }
    }
}

/// The number of a part of the body. Not above 10,000, which the part size sees to.
fn number(plan: &PartPlan, nth: u64) -> u32 {
    let before = u64::from(plan.head_len > Bytes::ZERO);
    u32::try_from(nth + before).unwrap_or(u32::MAX)
}
