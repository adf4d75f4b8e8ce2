//! How the memory of an image that is being served is divided. Pure.

use berth_core::units::Bytes as Size;

use super::super::caibx::ChunkSize;
use super::table::PAGE;

/// The least memory, whatever the chunks' size.
const LEAST: Size = Size::mib(64);
/// And the least in chunks: with fewer, a request could not hold what it reads.
const LEAST_CHUNKS: u64 = 32;
/// How much a chunk that is being fetched takes: its frame, which grows as it arrives, and its bytes.
const FETCH_CHUNKS: u64 = 4;
/// More fetches at once than this do not make a store faster.
const MOST_FETCHES: u64 = 32;
/// Background fetches beside these.
const MOST_BACKGROUND: u64 = 8;
/// What the NBD protocol lets a client ask for at once if nothing else is agreed.
const LONGEST_READ: u64 = 32 << 20;

/// What each part may take. The sum is the whole, and no part takes another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Sums and starts of the index's pages, and a bit for each of its items.
    pub table: Size,
    /// Pages of the index.
    pub pages: Size,
    /// Chunks that are kept.
    pub kept: Size,
    /// How many chunks guests' reads may fetch at once.
    pub fetches: usize,
    /// How many chunks may be fetched beside them in the background.
    pub background: usize,
    /// How many chunks answers may hold at once.
    pub held: usize,
    /// The longest read: a power of two.
    pub longest_read: Size,
}

/// The least memory that an image with such chunks can be served with.
pub(super) fn least(chunk_size: ChunkSize) -> Size {
    LEAST.max(Size(chunk_size.bytes() * LEAST_CHUNKS))
}

impl Plan {
    /// Divides `memory`; nothing if it is less than [`least`].
    pub(super) fn of(memory: Size, chunk_size: ChunkSize) -> Option<Self> {
        if memory < least(chunk_size) {
            return None;
        }
        let chunk = chunk_size.bytes();
        let quarter = memory.0 / 4;
        let slots = (quarter / (chunk * FETCH_CHUNKS)).max(2);
        let background = (slots / 4).clamp(1, MOST_BACKGROUND);
        let fetches = (slots - background).min(MOST_FETCHES);
        let held = quarter / chunk;
        let (table, pages) = (memory.0 / 8, memory.0 / 16);
        let taken = table + pages + (fetches + background) * chunk * FETCH_CHUNKS + held * chunk;
        // A read that begins within a chunk ends in one more.
        let longest = ((held - 1) * chunk).min(LONGEST_READ);
        Some(Self {
            table: Size(table),
            pages: Size(pages),
            kept: Size(memory.0 - taken),
            fetches: count(fetches),
            background: count(background),
            held: count(held),
            longest_read: Size(1 << longest.ilog2()),
        })
    }

    /// True if an index of so many items can be served: 48 bytes for each page, and a bit for each item.
    pub(super) fn holds(&self, items: u64) -> bool {
        items.div_ceil(PAGE) * 48 + items / 8 <= self.table.0
    }

    /// How far reads that follow each other are read ahead of.
    pub(super) fn ahead(&self, chunk_size: ChunkSize) -> Size {
        let window = self.fetches as u64 / 2 * chunk_size.bytes();
        Size(window.min(self.kept.0 / 4).max(chunk_size.bytes()))
    }
}

fn count(of: u64) -> usize {
    usize::try_from(of).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::super::caibx::ITEM;
    use super::*;

    #[test]
    fn the_parts_add_up_to_the_whole() {
        for kib in [64, 256, 1024, 4096] {
            let chunk = ChunkSize::new(Size::kib(kib)).unwrap();
            assert_eq!(Plan::of(Size(least(chunk).0 - 1), chunk), None);
            for memory in [least(chunk), Size::mib(200), Size::mib(256), Size::gib(4)] {
                let plan = Plan::of(memory, chunk).unwrap();
                let fetching = (plan.fetches + plan.background) as u64 * FETCH_CHUNKS * chunk.bytes();
                let held = plan.held as u64 * chunk.bytes();
                let sum = plan.table.0 + plan.pages.0 + plan.kept.0 + fetching + held;
                assert_eq!(sum, memory.0, "{plan:?}");
                assert!(plan.fetches > 0 && plan.background > 0 && plan.kept.0 >= memory.0 / 16, "{plan:?}");
                assert!(plan.longest_read.0 >= 4 << 20 && plan.pages.0 >= PAGE * ITEM as u64, "{plan:?}");
                assert!(plan.longest_read.0 / chunk.bytes() < plan.held as u64, "a read fits: {plan:?}");
            }
        }
    }

    #[test]
    fn a_tebibyte_fits_into_the_least_memory_and_a_senseless_index_does_not() {
        let plan = Plan::of(Size::mib(64), ChunkSize::DEFAULT).unwrap();
        assert!(plan.holds((1 << 40) / ChunkSize::DEFAULT.bytes()));
        assert!(!plan.holds(1 << 40));
    }
}
