//! A chunk as it is stored: one zstd frame.

use std::cell::RefCell;
use std::io;

use berth_core::ids::ChunkId;
use berth_core::units::Bytes as Size;
use bytes::Bytes;

/// zstd's level. Over the chunks of 256 KiB of a Debian `/usr`, level 3 stores 7 % less and takes 1.7 times as long
/// (168 instead of 286 MB/s and core); two cores would no longer fill a link of 3 Gbit/s.
pub(super) const LEVEL: i32 = 1;

thread_local! {
    /// A compressor's tables cost more to make than a chunk costs to compress.
    static COMPRESSOR: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Compresses a chunk.
pub(super) fn compress(data: &[u8]) -> io::Result<Bytes> {
    COMPRESSOR.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = Some(zstd::bulk::Compressor::new(LEVEL)?);
        }
        let compressor = slot.as_mut().expect("filled above");
        compressor.compress(data).map(Bytes::from)
    })
}

/// The most bytes that the frame of a chunk of `size` may have.
pub(super) fn bound(size: Size) -> Size {
    let size = usize::try_from(size.0).unwrap_or(usize::MAX);
    Size(zstd::zstd_safe::compress_bound(size) as u64)
}

/// What is wrong with a stored chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// No zstd frame, a broken one, or one of more bytes than the item has.
    #[error("it does not decompress to at most the item's size")]
    Frame,
    /// Another number of bytes.
    #[error("it holds {0}")]
    Size(Size),
    /// Other bytes.
    #[error("its content has another sha-256")]
    Content,
}

/// Decompresses a chunk of exactly `size` bytes and checks its content. Never makes more than `size` bytes.
pub(super) fn decompress(frame: &[u8], size: Size, id: &ChunkId) -> Result<Vec<u8>, Damage> {
    let capacity = usize::try_from(size.0).map_err(|_| Damage::Frame)?;
    let data = DECOMPRESSOR
        .with_borrow_mut(|slot| {
            if slot.is_none() {
                *slot = Some(zstd::bulk::Decompressor::new()?);
            }
            slot.as_mut().expect("filled above").decompress(frame, capacity)
        })
        .map_err(|_: io::Error| Damage::Frame)?;
    if data.len() != capacity {
        return Err(Damage::Size(Size(data.len() as u64)));
    }
    if ChunkId::of(&data) != *id {
        return Err(Damage::Content);
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_read_back() {
        let data: Vec<u8> = (0..65536_u32).map(|i| (i * i).to_le_bytes()[1]).collect();
        let frame = compress(&data).expect("memory is enough");
        assert!(Size(frame.len() as u64) <= bound(Size::kib(64)));
        assert_eq!(decompress(&frame, Size::kib(64), &ChunkId::of(&data)), Ok(data));
    }

    #[test]
    fn bombs_short_chunks_and_other_content_are_refused() {
        let bomb = compress(&vec![0; 4 << 20]).expect("memory is enough");
        let id = ChunkId::of(&vec![0; 65536]);
        assert_eq!(decompress(&bomb, Size::kib(64), &id), Err(Damage::Frame));
        let short = compress(&[0; 100]).expect("memory is enough");
        assert_eq!(decompress(&short, Size::kib(64), &id), Err(Damage::Size(Size(100))));
        let other = compress(&vec![1; 65536]).expect("memory is enough");
        assert_eq!(decompress(&other, Size::kib(64), &id), Err(Damage::Content));
        assert_eq!(decompress(b"rubbish", Size::kib(64), &id), Err(Damage::Frame));
    }
}
