//! The tables of an image, as far as they are at hand.

use std::num::NonZeroUsize;
use std::ops::Range;

use berth_core::units::Bytes;
use bytes::Bytes as Buffer;
use lru::LruCache;

use super::layout::Fault;

/// Tables are fetched and kept in pages of the image of this size: an L2 table of a qcow2 with clusters of 64 KiB.
pub(super) const PAGE: u64 = 64 << 10;
/// So many are kept, of which those go first that were used least recently: 8 MiB.
const PAGES: NonZeroUsize = NonZeroUsize::new(128).expect("not zero");

pub(super) struct Tables {
    pages: LruCache<u64, Buffer>,
    /// Of the image.
    length: u64,
}

impl Tables {
    pub fn new(length: Bytes) -> Self {
        Self { pages: LruCache::new(PAGES), length: length.0 }
    }

    /// The length of the image.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// What the table has at `at`, up to its `end` or the page's; `None` if that is not at hand. At least one entry of up to
    /// 16 bytes, if `at` is a multiple of its size.
    ///
    /// # Errors
    /// [`Fault::Truncated`] if the table does not lie within the image.
    pub fn get(&mut self, at: u64, end: u64) -> Result<Option<Buffer>, Fault> {
        if end > self.length || at >= end {
            return Err(Fault::Truncated { expected: end.max(at.saturating_add(1)) });
        }
        let page = self.page(at);
        let Some(bytes) = self.pages.get(&(at / PAGE)) else { return Ok(None) };
        let within = |at: u64| usize::try_from(at - page.start).unwrap_or(usize::MAX);
        Ok(Some(bytes.slice(within(at)..within(end.min(page.end)))))
    }

    /// The page that holds `at`, which lies within the image.
    pub fn page(&self, at: u64) -> Range<u64> {
        let start = at / PAGE * PAGE;
        start..(start + PAGE).min(self.length)
    }

    /// Keeps the [`page`](Self::page) that holds `at`. Copies it, so that nothing larger is kept with it.
    pub fn insert(&mut self, at: u64, bytes: &[u8]) {
        self.pages.put(at / PAGE, Buffer::copy_from_slice(bytes));
    }
}
