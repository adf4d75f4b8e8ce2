//! Sources of bytes that count, and that fail.
#![allow(dead_code, missing_docs)]

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use berth_core::units::Bytes;
use berth_image::{ExtentKind, ExtentReader, ReadAt, ReadError};
use bytes::Bytes as Buffer;
use thiserror::Error;

/// The source is away.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("away at request {0}")]
pub struct Away(pub usize);

/// An image in memory. Insists on what readers promise of their requests.
#[derive(Clone, Default)]
pub struct Memory {
    bytes: Buffer,
    /// The image has this length, though its bytes end before.
    size: Option<Bytes>,
    requests: Arc<Mutex<Vec<Range<u64>>>>,
    /// Requests that are still answered.
    left: Arc<AtomicUsize>,
}

impl Memory {
    pub fn new(bytes: impl Into<Buffer>) -> Self {
        Self { bytes: bytes.into(), left: Arc::new(AtomicUsize::new(usize::MAX)), ..Self::default() }
    }

    pub fn requests(&self) -> Vec<Range<u64>> {
        self.requests.lock().unwrap().clone()
    }

    /// Answers so many requests more.
    pub fn answer(&self, requests: usize) {
        self.left.store(requests, Ordering::SeqCst);
    }
}

impl ReadAt for Memory {
    type Error = Away;

    fn size(&self) -> Bytes {
        self.size.unwrap_or(Bytes(self.bytes.len() as u64))
    }

    fn name(&self) -> String {
        "memory".into()
    }

    async fn read_at(&self, at: Bytes, len: usize) -> Result<Buffer, Away> {
        assert!(len > 0 && len <= (4 << 20) + (512 << 10), "{len} bytes at once");
        assert!(at.0 + len as u64 <= self.size().0, "{at}+{len} is outside");
        let made = {
            let mut requests = self.requests.lock().unwrap();
            requests.push(at.0..at.0 + len as u64);
            requests.len()
        };
        tokio::task::yield_now().await;
        if self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_err() {
            return Err(Away(made));
        }
        let start = usize::try_from(at.0).unwrap();
        Ok(self.bytes.slice(start..start + len))
    }
}

/// Counts what is asked of another source.
pub struct Counted<S> {
    pub source: S,
    pub requests: Mutex<Vec<Range<u64>>>,
}

impl<S: ReadAt> ReadAt for Counted<S> {
    type Error = S::Error;

    fn size(&self) -> Bytes {
        self.source.size()
    }

    fn name(&self) -> String {
        self.source.name()
    }

    async fn read_at(&self, at: Bytes, len: usize) -> Result<Buffer, S::Error> {
        self.requests.lock().unwrap().push(at.0..at.0 + len as u64);
        self.source.read_at(at, len).await
    }
}

/// Reads front to back as a transfer does: holes of at least a unit are not read. Tells what is read.
pub async fn walk<R: ExtentReader>(
    reader: &mut R,
    unit: usize,
    mut seen: impl FnMut(Bytes, &[u8]),
) -> Result<(), ReadError> {
    let (mut at, mut data_until) = (Bytes(0), Bytes(0));
    let mut buffer = vec![0; unit];
    while at < reader.virtual_size() {
        if data_until <= at {
            let extent = reader.next_extent(at).await?.expect("there is more");
            assert!(extent.offset == at && extent.len > Bytes(0));
            let end = at.saturating_add(extent.len);
            if extent.kind == ExtentKind::Data {
                data_until = end;
            } else if extent.len.0 >= unit as u64 || end >= reader.virtual_size() {
                at = end;
                continue;
            }
        }
        let len = reader.virtual_size().saturating_sub(at).min(Bytes(unit as u64));
        let piece = &mut buffer[..usize::try_from(len.0).unwrap()];
        reader.read_at(at, piece).await?;
        seen(at, piece);
        at = at.saturating_add(len);
    }
    Ok(())
}
