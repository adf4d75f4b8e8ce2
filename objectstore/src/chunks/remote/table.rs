//! The index of an image that is being served: what is held of it, and how its pages are checked. Pure.
//!
//! All of the index is read once, to compare its sum with the image's digest. What stays is the sum and the start of each
//! page, so that a page that is read again later is known to be the same, and found without another read.

use std::ops::Range;

use berth_core::ids::{Digest, Sha256Sum};
use berth_core::units::Bytes as Size;
use sha2::{Digest as _, Sha256};

use super::super::caibx::{self, ChunkSize, HEAD, ITEM, IndexError};
use super::super::read::{Item, possible_item};
use super::super::zeros::zero_size;

/// Items of a page: 40 KiB of the index, 256 MiB of an image without zeros and with chunks of 256 KiB.
pub(super) const PAGE: u64 = PAGE_ITEMS as u64;
const PAGE_ITEMS: usize = 1024;
const PAGE_BYTES: usize = PAGE_ITEMS * ITEM;

/// A page of the index.
struct Page {
    /// Where its first item begins in the image.
    start: u64,
    /// The sum of its bytes.
    sum: Sha256Sum,
}

/// What is held of an index.
pub(super) struct Table {
    pages: Vec<Page>,
    items: u64,
    virtual_size: u64,
    data: u64,
}

/// Makes a [`Table`] of an index that is read from its begin to its end.
pub(super) struct Reading {
    chunk_size: ChunkSize,
    items: u64,
    hash: Sha256,
    table: Table,
}

impl Reading {
    /// Begins with the head of an index of so many items.
    pub(super) fn new(chunk_size: ChunkSize, items: u64, head: &[u8; HEAD]) -> Self {
        let table = Table { pages: Vec::new(), items: 0, virtual_size: 0, data: 0 };
        Self { chunk_size, items, hash: Sha256::new_with_prefix(head), table }
    }

    /// Takes whole pages; only the last one may be shorter.
    ///
    /// # Errors
    /// [`IndexError::Item`] for one that Berth does not write. Only the last chunk of data may be short, which bounds how
    /// many items a read can meet.
    pub(super) fn add(&mut self, bytes: &[u8]) -> Result<(), IndexError> {
        self.hash.update(bytes);
        for page in bytes.chunks(PAGE_BYTES) {
            let table = &mut self.table;
            table.pages.push(Page { start: table.virtual_size, sum: Sha256Sum::of(page) });
            for raw in page.as_chunks::<ITEM>().0 {
                let (number, start) = (table.items, table.virtual_size);
                let (end, id) = caibx::decode_item(raw);
                let item = possible_item(self.chunk_size, number, start, end, id)?;
                if !item.zero && item.len < self.chunk_size.size() && number + 1 != self.items {
                    return Err(IndexError::Item { item: number, start, end });
                }
                if !item.zero {
                    table.data += item.len.0;
                }
                (table.items, table.virtual_size) = (number + 1, end);
            }
        }
        Ok(())
    }

    /// Ends with the bytes after the last item. Returns the digest of all that was read beside the table.
    pub(super) fn finish(mut self, tail: &[u8]) -> (Table, Digest) {
        self.hash.update(tail);
        (self.table, Digest(Sha256Sum(self.hash.finalize().into())))
    }
}

impl Table {
    /// The size of the image.
    pub(super) const fn virtual_size(&self) -> Size {
        Size(self.virtual_size)
    }

    /// How much of the image is in chunks that are not zeros.
    pub(super) const fn data(&self) -> Size {
        Size(self.data)
    }

    /// How many items there are.
    pub(super) const fn items(&self) -> u64 {
        self.items
    }

    /// The pages that hold a part of the image which is not empty.
    pub(super) fn pages_of(&self, range: &Range<u64>) -> Range<usize> {
        let first = self.pages.partition_point(|page| page.start <= range.start).saturating_sub(1);
        first..self.pages.partition_point(|page| page.start < range.end)
    }

    /// Where a page lies in the index.
    pub(super) fn place(&self, page: usize) -> Range<u64> {
        let first = page as u64 * PAGE;
        let last = (first + PAGE).min(self.items);
        HEAD as u64 + first * ITEM as u64..HEAD as u64 + last * ITEM as u64
    }

    /// True if these are the bytes of that page.
    pub(super) fn is_page(&self, page: usize, bytes: &[u8]) -> bool {
        self.pages.get(page).is_some_and(|known| known.sum == Sha256Sum::of(bytes))
    }

    /// The items of a page, whose bytes were checked, that have something of `range`.
    pub(super) fn items_in<'a>(
        &'a self,
        page: usize,
        bytes: &'a [u8],
        range: &Range<u64>,
    ) -> impl Iterator<Item = Item> + use<'a> {
        let raw = bytes.as_chunks::<ITEM>().0;
        let end_of = |at: usize| caibx::decode_item(&raw[at]).0;
        let first = raw.partition_point(|item| caibx::decode_item(item).0 <= range.start);
        let mut start = if first == 0 { self.pages[page].start } else { end_of(first - 1) };
        let (number, until) = (page as u64 * PAGE, range.end);
        raw.iter().enumerate().skip(first).map_while(move |(at, raw)| {
            let (end, id) = caibx::decode_item(raw);
            let from = std::mem::replace(&mut start, end);
            let zero = zero_size(&id).is_some();
            let len = Size(end - from);
            (from < until).then_some(Item { number: number + at as u64, start: from, len, id, zero })
        })
    }
}

#[cfg(test)]
mod tests {
    use berth_core::ids::ChunkId;

    use super::super::super::zeros::zero_id;
    use super::*;

    const C: u64 = 256 << 10;

    /// Items of one chunk of data, or of 64 MiB of zeros at each third; all of the index, and its table.
    fn index(items: u64, last: u64) -> (Vec<u8>, Result<Table, IndexError>) {
        let (mut raw, mut at) = (Vec::new(), 0);
        for number in 0..items {
            let (len, id) = match number % 3 {
                2 => (64 << 20, zero_id(Size::mib(64)).unwrap()),
                _ if number + 1 == items => (last, ChunkId::of(b"last")),
                _ => (C, ChunkId::of(&number.to_le_bytes())),
            };
            at += len;
            raw.extend(caibx::encode_item(at, &id));
        }
        let head = caibx::encode_head(ChunkSize::DEFAULT);
        let mut reading = Reading::new(ChunkSize::DEFAULT, items, &head);
        let added = raw.chunks(2 * PAGE_BYTES).try_for_each(|part| reading.add(part));
        let tail = caibx::encode_tail(items);
        let (table, digest) = reading.finish(&tail);
        let whole = [&head[..], &raw, &tail].concat();
        assert!(added.is_err() || digest == Digest(Sha256Sum::of(&whole)));
        (raw, added.map(|()| table))
    }

    #[test]
    fn every_byte_is_found_in_its_page() {
        let (raw, table) = index(PAGE * 2 + 2, 77);
        let table = table.unwrap();
        assert_eq!(table.pages.len(), 3);
        let page = |at: usize| &raw[at * PAGE_BYTES..raw.len().min((at + 1) * PAGE_BYTES)];
        let (mut at, mut number) = (0, 0);
        while at < table.virtual_size {
            let pages = table.pages_of(&(at..at + 1));
            assert_eq!(pages.len(), 1);
            let bytes = page(pages.start);
            assert!(table.is_page(pages.start, bytes));
            let items: Vec<Item> = table.items_in(pages.start, bytes, &(at..at + 1)).collect();
            assert_eq!((items.len(), items[0].number, items[0].start), (1, number, at));
            (at, number) = (items[0].end(), number + 1);
        }
        assert_eq!(number, table.items);
        let all = 0..table.virtual_size;
        let met: usize = table.pages_of(&all).map(|at| table.items_in(at, page(at), &all).count()).sum();
        assert_eq!(met as u64, table.items);
        assert_eq!(table.place(2).end - table.place(2).start, 2 * ITEM as u64);
    }

    #[test]
    fn another_page_is_not_taken_for_it() {
        let (raw, table) = index(PAGE + 3, 5);
        let table = table.unwrap();
        let mut other = raw[..PAGE_BYTES].to_vec();
        other[9] ^= 1;
        assert!(
            !table.is_page(0, &other) && !table.is_page(1, &raw[..PAGE_BYTES]) && !table.is_page(9, &raw)
        );
    }

    #[test]
    fn only_the_last_chunk_may_be_short() {
        assert!(index(2, 1).1.is_ok());
        let short =
            [caibx::encode_item(1, &ChunkId::of(b"a")), caibx::encode_item(2, &ChunkId::of(b"b"))].concat();
        let mut reading = Reading::new(ChunkSize::DEFAULT, 2, &caibx::encode_head(ChunkSize::DEFAULT));
        assert_eq!(reading.add(&short), Err(IndexError::Item { item: 0, start: 0, end: 1 }));
    }
}
