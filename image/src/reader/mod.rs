//! Images other than raw ones, read from anywhere by ranges.
//!
//! A [`Layout`] knows a format: given its tables it says where the bytes of the disk are, without doing any IO. What it asks
//! for and is not at hand is fetched by [`ImageReader`], which does the rest for all formats: it keeps tables, fetches
//! content, decompresses it, and turns offsets into extents.

mod layout;
mod qcow2;
mod tables;
mod unpack;
mod vhd;
mod vhdx;
mod vmdk;
mod window;

use std::io;
use std::ops::Range;

use berth_core::units::Bytes;
use bytes::Bytes as Buffer;
use tokio::task::spawn_blocking;

use crate::extents::{Extent, ExtentKind, ExtentReader, PIECE, ReadError, check_range};
use crate::probe::{Probe, Reader, SECTOR, look_into, probe_source_as};
use crate::read_at::ReadAt;
use layout::{Answer, Fault, Layout, Missing, Packed, Place, Run};
use tables::Tables;
use unpack::{Codec, Job, Unit, unpack};
use window::{AHEAD, GAP, Windows};

/// Runs looked at for one extent, or for one request ahead, so that a call stays short.
const STEPS: usize = 4096;
/// How many times as many bytes are fetched ahead as are used, but for the first ones.
const MOST_UNUSED: u64 = 4;

/// Reads a qcow2, vmdk, vhd or vhdx image, or a raw one, that stands for itself, from wherever its bytes are.
///
/// **Requests.** Each request to the source may go over a network, so whoever reads front to back causes few of them: up to
/// 4 MiB at once, ascending where the image is, one after the other. Front to back means that each call of
/// [`next_extent`](ExtentReader::next_extent) or [`read_at`](ExtentReader::read_at) begins where data or zeros ended
/// before; then what lies together in the file is fetched together, also over gaps of up to 256 KiB, and up to 2 MiB out of
/// order. Tables are fetched in
/// pages of 64 KiB: of a qcow2 with clusters of 64 KiB one for 512 MiB of the disk. An extent ends where the next page would
/// have to be fetched, so nothing is looked up long before it is read. Elsewhere only what was asked for is fetched, and so it
/// is where that fetched four times of what was used.
///
/// **Memory**, whatever the image: 8 MiB of tables; two windows of up to 6.5 MiB, as much again while one of them moves on,
/// and what is fetched; and what is decompressed at once: 1 MiB and two clusters. In sum, about 40 MiB.
///
/// **Guarantees:** nothing but the source is opened. What a table refers to beyond the end of the source is
/// [`ReadError::Truncated`], and decompressed data of another length than the format says [`ReadError::Corrupt`].
pub struct ImageReader<S> {
    source: S,
    layout: Layout,
    tables: Tables,
    windows: Windows,
    /// What was decompressed last: mostly, the next piece begins in it.
    unit: Option<Unit>,
    /// Where reading goes on if it goes front to back.
    expected: u64,
    /// Bytes that were fetched into windows, and bytes that were used of them.
    fetched: u64,
    used: u64,
}

impl<S: ReadAt> ImageReader<S> {
    /// Opens what was probed, and reads its headers.
    ///
    /// # Errors
    /// [`ReadError::Changed`] if the image is not what `probe` says, [`ReadError::NotNative`] if a tool must read it,
    /// [`ReadError::Refused`] as [`crate::probe_at`], and [`ReadError::Source`].
    pub async fn open(source: S, probe: &Probe) -> Result<Self, ReadError> {
        if let Reader::QemuImg { driver } = probe.reader {
            return Err(ReadError::NotNative { image: source.name(), driver });
        }
        let format = probe.format;
        let look = look_into(&source, move |source| {
            let now = probe_source_as(format, source)?;
            let layout = Layout::read(format, source)?;
            Ok((now, layout))
        });
        let (now, layout) = look.await?;
        if now != *probe {
            return Err(ReadError::Changed { image: source.name() });
        }
        let tables = Tables::new(source.size());
        Ok(Self {
            source,
            layout,
            tables,
            windows: Windows::default(),
            unit: None,
            expected: 0,
            fetched: 0,
            used: 0,
        })
    }

    /// Where the bytes come from.
    pub fn source(&self) -> &S {
        &self.source
    }
}

impl<S: ReadAt> ExtentReader for ImageReader<S> {
    fn virtual_size(&self) -> Bytes {
        self.layout.virtual_size()
    }

    async fn next_extent(&mut self, from: Bytes) -> Result<Option<Extent>, ReadError> {
        if from >= self.virtual_size() {
            return Ok(None);
        }
        let front_to_back = from.0 == self.expected;
        let ahead = front_to_back && self.pays();
        let first = self.locate(from.0, ahead).await?;
        let kind = kind_of(first.place);
        let mut at = from.0 + first.len;
        for _ in 0..STEPS {
            match self.look(at) {
                Some(run) if kind_of(run.place) == kind => at += run.len,
                _ => break,
            }
        }
        // The padding up to a whole sector belongs to what comes before it.
        let size = self.virtual_size().0;
        if !at.is_multiple_of(SECTOR.0) && size - at < SECTOR.0 {
            at = size;
        }
        if front_to_back && kind == ExtentKind::Zero {
            self.expected = at;
        }
        Ok(Some(Extent { offset: from, len: Bytes(at - from.0), kind }))
    }

    async fn read_at(&mut self, offset: Bytes, buf: &mut [u8]) -> Result<(), ReadError> {
        check_range(|| self.source.name(), self.virtual_size(), offset, buf.len())?;
        let mut at = offset.0;
        for piece in buf.chunks_mut(PIECE) {
            let ahead = at == self.expected && self.pays();
            self.read_piece(at, piece, ahead).await?;
            at += piece.len() as u64;
            self.expected = at;
        }
        Ok(())
    }
}

fn kind_of(place: Place) -> ExtentKind {
    if matches!(place, Place::Zero) { ExtentKind::Zero } else { ExtentKind::Data }
}

impl<S: ReadAt> ImageReader<S> {
    /// Whether fetching ahead brings what is used. It does not where what follows on the disk is scattered over the file.
    fn pays(&self) -> bool {
        self.fetched <= self.used.saturating_mul(MOST_UNUSED).saturating_add(4 * AHEAD)
    }

    /// The run at `at`, if it is known without fetching anything, and if there is one.
    fn look(&mut self, at: u64) -> Option<Run> {
        if at >= self.virtual_size().0 {
            return None;
        }
        match self.layout.locate(&mut self.tables, at) {
            Ok(Answer::Run(run)) => Some(run),
            _ => None,
        }
    }

    /// The run at `at`, which is below the virtual size. If `ahead`, content that follows a table is fetched with it.
    async fn locate(&mut self, at: u64, ahead: bool) -> Result<Run, ReadError> {
        loop {
            match self.layout.locate(&mut self.tables, at) {
                Ok(Answer::Run(run)) => return Ok(run),
                Ok(Answer::Missing(missing)) => self.fetch_page(missing, ahead).await?,
                Err(fault) => return Err(self.failed(fault)),
            }
        }
    }

    async fn fetch_page(&mut self, missing: Missing, ahead: bool) -> Result<(), ReadError> {
        let page = self.tables.page(missing.at);
        let bytes = if self.windows.holds(&page) {
            self.windows.get(&page)
        } else if missing.content_follows && ahead {
            let end = (page.start + AHEAD).min(self.source.size().0).max(page.end);
            self.fetch(page.start..end).await?;
            self.windows.get(&page)
        } else {
            self.request(page.clone()).await?
        };
        self.tables.insert(missing.at, &bytes);
        Ok(())
    }

    /// Fetches these bytes of the image, which lie within it.
    async fn request(&self, range: Range<u64>) -> Result<Buffer, ReadError> {
        let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        let bytes = self
            .source
            .read_at(Bytes(range.start), len)
            .await
            .map_err(|error| ReadError::Source { image: self.source.name(), source: Box::new(error) })?;
        if bytes.len() == len {
            return Ok(bytes);
        }
        let found = Bytes(range.start.saturating_add(bytes.len() as u64));
        Err(ReadError::Truncated { image: self.source.name(), expected: Bytes(range.end), found })
    }

    /// Reads at most [`PIECE`] bytes.
    async fn read_piece(&mut self, at: u64, buf: &mut [u8], ahead: bool) -> Result<(), ReadError> {
        let (mut done, mut jobs) = (0, Vec::new());
        while done < buf.len() {
            let (pos, rest) = (at + done as u64, &mut buf[done..]);
            if let Some(len) = self.unit.as_ref().and_then(|unit| unit.copy(pos, rest)) {
                done += len;
                continue;
            }
            let run = self.locate(pos, ahead).await?;
            let len = usize::try_from(run.len).unwrap_or(usize::MAX).min(rest.len());
            match run.place {
                Place::Zero => rest[..len].fill(0),
                Place::Plain(place) => self.copy(place, pos, &mut rest[..len], ahead).await?,
                Place::Packed(packed) => {
                    if !self.windows.holds(&packed.range()) {
                        // So that what is not decompressed yet does not hold one window after the other.
                        self.unpack(std::mem::take(&mut jobs), buf).await?;
                    }
                    let bytes = self.packed_bytes(&packed, pos, ahead).await?;
                    jobs.push(Job { packed, bytes, from: pos, into: done..done + len });
                }
            }
            done += len;
        }
        self.unpack(jobs, buf).await
    }

    /// Copies what is stored as it is at `place`, and belongs at `pos` of the disk.
    async fn copy(&mut self, place: u64, pos: u64, buf: &mut [u8], ahead: bool) -> Result<(), ReadError> {
        let mut done = 0;
        while done < buf.len() {
            let (from, left) = (place + done as u64, buf.len() - done);
            let held = self.windows.from(from);
            if held.is_empty() {
                self.fill(from..from + left as u64, pos + done as u64, ahead).await?;
                continue;
            }
            let len = held.len().min(left);
            buf[done..done + len].copy_from_slice(&held[..len]);
            self.used = self.used.saturating_add(len as u64);
            done += len;
        }
        Ok(())
    }

    /// The stored bytes of something compressed, of which `pos` of the disk is a part.
    async fn packed_bytes(&mut self, packed: &Packed, pos: u64, ahead: bool) -> Result<Buffer, ReadError> {
        let range = packed.range();
        if !self.windows.holds(&range) {
            self.fill(range.clone(), pos, ahead).await?;
        }
        let bytes = self.windows.get(&range);
        self.used = self.used.saturating_add(bytes.len() as u64);
        if packed.codec != Codec::Grain {
            return Ok(bytes);
        }
        let range = packed.marked(&bytes).map_err(|fault| self.failed(fault))?;
        if range.end > self.source.size().0 {
            return Err(self.failed(Fault::Truncated { expected: range.end }));
        }
        if self.windows.holds(&range) {
            return Ok(self.windows.get(&range));
        }
        // Longer than the next one allows: rare, and by itself, so that what waits to be decompressed holds no further window.
        self.request(range).await
    }

    /// Fetches at least this range of the image, which lies within it and holds what is at `pos` of the disk.
    async fn fill(&mut self, range: Range<u64>, pos: u64, ahead: bool) -> Result<(), ReadError> {
        let range = if ahead { self.widened(range, pos) } else { range };
        self.fetch(range).await
    }

    /// Fetches what the window does not have of this range of the image, which lies within it.
    async fn fetch(&mut self, range: Range<u64>) -> Result<(), ReadError> {
        let missing = self.windows.missing(&range);
        let bytes = self.request(missing).await?;
        self.fetched = self.fetched.saturating_add(bytes.len() as u64);
        self.windows.put(&range, bytes);
        Ok(())
    }

    /// The range with what comes next on the disk, as far as it lies near. Writers with several threads do not keep the
    /// order of the disk to the cluster, so some of it may lie before.
    fn widened(&mut self, range: Range<u64>, pos: u64) -> Range<u64> {
        let (near, open) = self.near_ranges(&range, pos);
        let mut wide = range.clone();
        for before in near.iter().rev().filter(|near| near.start < range.start) {
            if before.end.saturating_add(GAP) < wide.start || range.end - before.start > AHEAD {
                break;
            }
            wide.start = wide.start.min(before.start);
        }
        let limit = wide.start.saturating_add(AHEAD);
        for after in near.iter().filter(|near| near.end > range.end) {
            if after.start > wide.end.saturating_add(GAP) {
                break;
            }
            wide.end = wide.end.max(after.end.min(limit));
        }
        if open && near.last().is_none_or(|last| last.start <= wide.end) {
            // Most probably the next table lies near, and what it describes.
            wide.end = wide.end.max(limit);
        }
        wide.end = wide.end.min(self.source.size().0).max(range.end);
        wide
    }

    /// Where the content from `pos` of the disk on is that lies near the range and is not held, ascending; and whether a table
    /// that is not at hand would tell more.
    fn near_ranges(&mut self, range: &Range<u64>, pos: u64) -> (Vec<Range<u64>>, bool) {
        let reach = range.start.saturating_sub(AHEAD / 2)..range.start.saturating_add(AHEAD);
        let (mut near, mut sum, mut at, mut open) = (Vec::new(), 0, pos, false);
        for _ in 0..STEPS {
            if sum >= AHEAD || at >= self.virtual_size().0 {
                break;
            }
            let run = match self.layout.locate(&mut self.tables, at) {
                Ok(Answer::Run(run)) => run,
                Ok(Answer::Missing(_)) => {
                    open = true;
                    break;
                }
                Err(_) => break,
            };
            let next = match run.place {
                Place::Zero => 0..0,
                Place::Plain(place) => place..place.saturating_add(run.len.min(AHEAD)),
                Place::Packed(packed) => packed.range(),
            };
            if !next.is_empty() && reach.contains(&next.start) && !self.windows.holds(&next) {
                sum += next.end - next.start;
                near.push(next);
            }
            at += run.len;
        }
        near.sort_unstable_by_key(|range| range.start);
        (near, open)
    }

    /// Decompresses on a blocking thread, and copies to where it belongs.
    async fn unpack(&mut self, jobs: Vec<Job>, buf: &mut [u8]) -> Result<(), ReadError> {
        if jobs.is_empty() {
            return Ok(());
        }
        let unpacked = spawn_blocking(move || unpack(jobs)).await;
        let stopped =
            |error| ReadError::Source { image: self.source.name(), source: io::Error::other(error).into() };
        for (unit, from, into) in unpacked.map_err(stopped)?.map_err(|fault| self.failed(fault))? {
            // Its length was checked to reach as far as the disk does.
            unit.copy(from, &mut buf[into]);
            self.unit = Some(unit);
        }
        Ok(())
    }

    fn failed(&self, fault: Fault) -> ReadError {
        let image = self.source.name();
        match fault {
            Fault::Corrupt(what) => ReadError::Corrupt { image, what },
            Fault::Truncated { expected } => {
                ReadError::Truncated { image, expected: Bytes(expected), found: self.source.size() }
            }
        }
    }
}
