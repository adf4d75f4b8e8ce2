//! The `.caibx` index format of casync, and the canonical way of cutting an image into its items.
//!
//! Source: `src/caformat.h` and `src/caindex.c` of systemd/casync. All numbers are 64-bit little-endian.
//!
//! | offset | what |
//! |---|---|
//! | 0 | size of the header: 48 |
//! | 8 | type: `0x96824d9c7b129ff9` |
//! | 16 | feature flags: 0, which makes ids SHA-256 |
//! | 24 | smallest, average and largest chunk: chunk size / 4, chunk size, 64 MiB |
//! | 48 | size of the table: all ones, because it is written as it grows |
//! | 56 | type: `0xe75b9e112f17417d` |
//! | 64 | items of 40 bytes: offset at which the item ends, id |
//! | end - 40 | 0, 0, offset of the index (48), size of the table with its header and this tail, `0x4b4f050e5549ecd1` |

use berth_core::ids::{ChunkId, Sha256Sum};
use berth_core::units::Bytes as Size;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Bytes before the first item.
pub const HEAD: usize = 64;
/// Bytes of an item.
pub const ITEM: usize = 40;
/// Bytes after the last item.
pub const TAIL: usize = 40;
/// The longest item: a run of zeros. casync's own limit is 128 MiB.
pub const LONGEST: u64 = 64 << 20;

const INDEX_SIZE: u64 = 48;
const INDEX_TYPE: u64 = 0x9682_4d9c_7b12_9ff9;
const TABLE_TYPE: u64 = 0xe75b_9e11_2f17_417d;
const TAIL_MARK: u64 = 0x4b4f_050e_5549_ecd1;

/// Why bytes are not an index of ours.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum IndexError {
    /// Not a chunk size.
    #[error("chunk size {0} is not a power of two from 64 KiB to 4 MiB")]
    ChunkSize(Size),
    /// Another format.
    #[error("it is not a .caibx index: {field} is {found:#x}")]
    Format {
        /// Which field says so.
        field: &'static str,
        /// What it holds.
        found: u64,
    },
    /// Its length does not fit its table.
    #[error("its length of {0} is not that of a whole index")]
    Length(Size),
    /// An item ends before it begins, or is longer than its kind may be.
    #[error("item {item} ends at {end} and begins at {start}")]
    Item {
        /// Which, from 0.
        item: u64,
        /// Where it begins.
        start: u64,
        /// Where it says to end.
        end: u64,
    },
}

/// The size of an image store's chunks: a power of two from 64 KiB to 4 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Size", into = "Size")]
pub struct ChunkSize(u32);

impl ChunkSize {
    /// 256 KiB.
    pub const DEFAULT: Self = Self(256 << 10);

    /// Checks the size.
    ///
    /// # Errors
    /// [`IndexError::ChunkSize`]
    pub fn new(size: Size) -> Result<Self, IndexError> {
        match u32::try_from(size.0) {
            Ok(bytes) if bytes.is_power_of_two() && (64 << 10..=4 << 20).contains(&bytes) => Ok(Self(bytes)),
            _ => Err(IndexError::ChunkSize(size)),
        }
    }

    /// As a size.
    pub const fn size(self) -> Size {
        Size(self.0 as u64)
    }

    /// In bytes.
    pub const fn bytes(self) -> u64 {
        self.0 as u64
    }
}

impl Default for ChunkSize {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl TryFrom<Size> for ChunkSize {
    type Error = IndexError;
    fn try_from(size: Size) -> Result<Self, IndexError> {
        Self::new(size)
    }
}

impl From<ChunkSize> for Size {
    fn from(size: ChunkSize) -> Self {
        size.size()
    }
}

/// The bytes before the first item.
pub fn encode_head(chunk_size: ChunkSize) -> [u8; HEAD] {
    let size = chunk_size.bytes();
    words([INDEX_SIZE, INDEX_TYPE, 0, size / 4, size, LONGEST, u64::MAX, TABLE_TYPE])
}

/// Reads the bytes before the first item.
///
/// # Errors
/// [`IndexError::Format`] for anything that Berth does not write; [`IndexError::ChunkSize`].
pub fn decode_head(head: &[u8; HEAD]) -> Result<ChunkSize, IndexError> {
    let chunk_size = ChunkSize::new(Size(word(head, 4)))?;
    let fields =
        ["header size", "type", "feature flags", "minimum", "average", "maximum", "table size", "table type"];
    let expected = encode_head(chunk_size);
    for (at, field) in fields.into_iter().enumerate() {
        if word(head, at) != word(&expected, at) {
            return Err(IndexError::Format { field, found: word(head, at) });
        }
    }
    Ok(chunk_size)
}

/// An item: it ends at offset `end` of the image, and begins where the one before it ends.
pub fn encode_item(end: u64, id: &ChunkId) -> [u8; ITEM] {
    let mut item = [0; ITEM];
    item[..8].copy_from_slice(&end.to_le_bytes());
    item[8..].copy_from_slice(&id.0.0);
    item
}

/// Reads an item: where it ends, and its id.
pub fn decode_item(item: &[u8; ITEM]) -> (u64, ChunkId) {
    let mut id = [0; 32];
    id.copy_from_slice(&item[8..]);
    (word(item, 0), ChunkId(Sha256Sum(id)))
}

/// The bytes after the last of `items`.
pub fn encode_tail(items: u64) -> [u8; TAIL] {
    words([0, 0, INDEX_SIZE, table_size(items), TAIL_MARK])
}

/// Reads the bytes after the last item of an index of `size` bytes: the number of items.
///
/// # Errors
/// [`IndexError::Length`] or [`IndexError::Format`] unless everything fits.
pub fn decode_tail(tail: &[u8; TAIL], size: Size) -> Result<u64, IndexError> {
    let body = size.0.checked_sub((HEAD + TAIL) as u64).ok_or(IndexError::Length(size))?;
    let items = body / ITEM as u64;
    if body % ITEM as u64 != 0 {
        return Err(IndexError::Length(size));
    }
    let fields = ["tail", "tail", "index offset", "table size", "tail marker"];
    let expected = encode_tail(items);
    for (at, field) in fields.into_iter().enumerate() {
        if word(tail, at) != word(&expected, at) {
            return Err(IndexError::Format { field, found: word(tail, at) });
        }
    }
    Ok(items)
}

/// The size of an index of so many items.
pub const fn index_size(items: u64) -> Size {
    Size((HEAD + TAIL) as u64 + items * ITEM as u64)
}

fn table_size(items: u64) -> u64 {
    16 + items * ITEM as u64 + TAIL as u64
}

fn words<const N: usize, const W: usize>(values: [u64; W]) -> [u8; N] {
    let mut bytes = [0; N];
    for (slot, value) in bytes.chunks_exact_mut(8).zip(values) {
        slot.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at * 8..at * 8 + 8]);
    u64::from_le_bytes(value)
}

/// The items into which a maximal run of whole zero chunks is cut: 64 MiB each, then descending powers of two.
///
/// `run` is in bytes and a multiple of the chunk size. Cutting off 64 MiB items while a run still grows gives the same.
pub fn zero_items(run: u64) -> impl Iterator<Item = u64> {
    let mut left = run;
    std::iter::from_fn(move || {
        let item = if left >= LONGEST { LONGEST } else { (left != 0).then(|| 1 << left.ilog2())? };
        left -= item;
        Some(item)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_bytes() {
        let head = encode_head(ChunkSize::DEFAULT);
        let expected = [
            "3000000000000000f99f127b9c4d8296",
            "00000000000000000000010000000000",
            "00000400000000000000000400000000",
            "ffffffffffffffff7d41172f119e5be7",
        ]
        .concat();
        assert_eq!(hex(&head), expected);
        assert_eq!(hex(&encode_item(0x40000, &ChunkId::of(b""))[..12]), "0000040000000000e3b0c442");
        let tail = "00000000000000000000000000000000300000000000000060000000000000\
                    00d1ec49550e054f4b";
        assert_eq!(hex(&encode_tail(1)), tail);
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn everything_reads_back() {
        for kib in [64, 256, 4096] {
            let size = ChunkSize::new(Size::kib(kib)).expect("a chunk size");
            assert_eq!(decode_head(&encode_head(size)), Ok(size));
        }
        let id = ChunkId::of(b"x");
        assert_eq!(decode_item(&encode_item(7, &id)), (7, id));
        assert_eq!(decode_tail(&encode_tail(9), index_size(9)), Ok(9));
    }

    #[test]
    fn other_formats_are_refused() {
        let mut head = encode_head(ChunkSize::DEFAULT);
        head[16] = 1;
        assert!(matches!(decode_head(&head), Err(IndexError::Format { field: "feature flags", found: 1 })));
        assert!(matches!(decode_head(&[0; HEAD]), Err(IndexError::ChunkSize(_))));
        assert!(matches!(decode_tail(&encode_tail(9), index_size(8)), Err(IndexError::Format { .. })));
        assert!(matches!(
            decode_tail(&encode_tail(9), Size(index_size(9).0 + 1)),
            Err(IndexError::Length(_))
        ));
        assert!(matches!(decode_tail(&encode_tail(0), Size(3)), Err(IndexError::Length(_))));
        for bad in [0, 32 << 10, 8 << 20, (64 << 10) + 1] {
            assert!(ChunkSize::new(Size(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_empty_tebibyte_is_small() {
        assert_eq!(index_size(zero_items(1 << 40).count() as u64), Size(655_464));
    }

    proptest! {
        #[test]
        fn zero_items_are_greedy_and_add_up(chunks in 1_u64..5000) {
            let run = chunks * (64 << 10);
            let items: Vec<u64> = zero_items(run).collect();
            prop_assert_eq!(items.iter().sum::<u64>(), run);
            prop_assert!(items.windows(2).all(|pair| pair[0] > pair[1] || pair == [LONGEST, LONGEST]));
            prop_assert!(items.iter().all(|item| item.is_power_of_two() && *item <= LONGEST));
        }

        #[test]
        fn cutting_while_a_run_grows_changes_nothing(pieces in proptest::collection::vec(1_u64..3000, 1..8)) {
            let mut pending = 0;
            let mut items = Vec::new();
            for piece in &pieces {
                pending += piece * (64 << 10);
                items.extend(zero_items(pending / LONGEST * LONGEST));
                pending %= LONGEST;
            }
            items.extend(zero_items(pending));
            let whole: Vec<u64> = zero_items(pieces.iter().sum::<u64>() * (64 << 10)).collect();
            prop_assert_eq!(items, whole);
        }
    }
}
