//! The pieces of an image as the parts of an object: compressed by many threads, put in order by one.

use std::collections::VecDeque;

use berth_core::ids::Digest;
use berth_core::units::Bytes;
use berth_image::{EncodedBlock, Encoder, Output, Part, PartWriter, WriteError};
use bytes::Bytes as Buffer;
use futures::stream::{BoxStream, StreamExt as _, TryStreamExt as _};

use super::super::content::{Piece, Pieces};
use super::super::direct::{Counting, SavedSum, SourceSum};
use super::super::error::TransferError;
use super::AT_ONCE;

/// What comes next in an image, ready to be put in order.
pub(super) enum Block {
    /// Zeros up to here.
    Zeros(Bytes),
    /// Content, and what the format makes of it.
    Data(Buffer, EncodedBlock),
}

/// A part to be sent.
pub(super) struct Assembled {
    /// Its number in the upload.
    pub number: u32,
    /// Its bytes.
    pub bytes: Buffer,
    /// From where the next process goes on once it is there, with those before it; `None` at the end.
    pub resume: Option<Moment>,
}

/// A moment between two blocks, from which an image is gone on with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Moment {
    /// The writer's state.
    pub state: Vec<u8>,
    /// The sum of the source's bytes, if it is counted.
    pub sum: Option<SavedSum>,
}

/// The pieces of an image from `from` on, compressed.
pub(super) fn encoded(
    pieces: Pieces,
    encoder: Encoder,
    from: Bytes,
) -> BoxStream<'static, Result<Block, TransferError>> {
    let mut at = from;
    let encode = move |piece| {
        let begins = at;
        at = at.saturating_add(match &piece {
            Piece::Zeros(len) => *len,
            Piece::Data(data) => Bytes(data.len() as u64),
        });
        let ends = at;
        async move {
            match piece {
                Piece::Zeros(_) => Ok(Block::Zeros(ends)),
                Piece::Data(data) => {
                    let work = move || encoder.encode(begins, &data).map(|block| Block::Data(data, block));
                    Ok(tokio::task::spawn_blocking(work).await??)
                }
            }
        }
    };
    pieces.map_ok(encode).try_buffered(AT_ONCE).boxed()
}

/// Puts blocks in order, adds up the sum of the source, and cuts what comes of it into parts.
pub(super) struct Assembler {
    writer: PartWriter,
    counting: Counting,
    /// The states of the sum since the last part, with where the image goes on from there.
    marks: VecDeque<(Bytes, SavedSum)>,
}

impl Assembler {
    /// At the start of the image.
    pub fn new(output: Output, sum: SourceSum) -> Result<Self, TransferError> {
        Ok(Self { writer: PartWriter::new(output)?, counting: Counting::new(sum), marks: VecDeque::new() })
    }

    /// Where it was.
    pub fn resume(moment: &Moment, sum: SourceSum) -> Result<Self, TransferError> {
        let writer = PartWriter::resume(&moment.state)?;
        let counting = Counting::go_on(sum, moment.sum.as_ref());
        let counting = counting.filter(|counting| counting.reaches(writer.position().0));
        let counting = counting.ok_or(WriteError::State { what: "the sum of the source is missing" })?;
        Ok(Self { writer, counting, marks: VecDeque::new() })
    }

    /// Where the image goes on.
    pub fn position(&self) -> Bytes {
        self.writer.position()
    }

    /// True if this is what it writes.
    pub fn is_of(&self, output: &Output) -> bool {
        self.writer.output() == output
    }

    /// The number of the first part that is not the head.
    pub fn first_part(&self) -> u32 {
        if self.writer.plan().head_len > Bytes::ZERO { 2 } else { 1 }
    }

    /// How many parts without the head are complete.
    pub fn parts_done(&self) -> u64 {
        self.writer.parts_done()
    }

    /// What compresses for it.
    pub fn encoder(&self) -> Encoder {
        self.writer.encoder()
    }

    /// Takes what comes next, on a thread of its own, and gives the parts that are complete with it.
    pub async fn add(mut self, block: Block) -> Result<(Self, Vec<Assembled>), TransferError> {
        let work = move || {
            let parts = self.add_here(block)?;
            Ok((self, parts))
        };
        tokio::task::spawn_blocking(work).await?
    }

    fn add_here(&mut self, block: Block) -> Result<Vec<Assembled>, TransferError> {
        self.mark();
        let mut parts = Vec::new();
        match block {
            Block::Zeros(until) => {
                while self.position() < until {
                    let part = self.writer.zeros(until)?;
                    parts.extend(part.map(|part| self.assembled(part)).transpose()?);
                }
            }
            Block::Data(data, block) => {
                self.counting.add(self.writer.position().0, &data);
                let part = self.writer.append(&block)?;
                // A part that ends with the block goes on from behind it.
                self.mark();
                parts.extend(part.map(|part| self.assembled(part)).transpose()?);
            }
        }
        Ok(parts)
    }

    fn mark(&mut self) {
        if let Some(sum) = self.counting.saved() {
            self.marks.push_back((self.writer.position(), sum));
        }
    }

    fn assembled(&mut self, part: Part) -> Result<Assembled, TransferError> {
        let resume = part.resume.map(|state| self.moment(state)).transpose()?;
        Ok(Assembled { number: part.number, bytes: part.bytes.into(), resume })
    }

    /// The sum as it was where the writer's state goes on.
    fn moment(&mut self, state: Vec<u8>) -> Result<Moment, TransferError> {
        let position = PartWriter::resume(&state)?.position();
        while self.marks.front().is_some_and(|(at, _)| *at < position) {
            self.marks.pop_front();
        }
        let sum = self.marks.front().filter(|(at, _)| *at == position).map(|(_, sum)| sum.clone());
        Ok(Moment { state, sum })
    }

    /// The parts that are left, and the sum of the source, where it is known.
    pub async fn finish(self) -> Result<(Vec<Assembled>, Option<Digest>), TransferError> {
        let work = move || {
            let sum = self.counting.finish()?;
            let last = |part: Part| Assembled { number: part.number, bytes: part.bytes.into(), resume: None };
            Ok((self.writer.finish()?.into_iter().map(last).collect(), sum))
        };
        tokio::task::spawn_blocking(work).await?
    }
}
