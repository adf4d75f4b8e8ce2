//! Runs of zeros: their ids, which never need to be fetched, and the one compressed chunk of each size.

use std::io::Write as _;
use std::sync::OnceLock;

use berth_core::ids::{ChunkId, Sha256Sum};
use berth_core::units::Bytes as Size;
use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::caibx::LONGEST;

/// The smallest size of a zero item: the smallest chunk size.
const SMALLEST: u64 = 64 << 10;
static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

/// The ids of zero chunks from 64 KiB to 64 MiB, smallest first; hashed once per process (64 MiB, some 50 ms).
fn table() -> &'static [(Size, ChunkId)] {
    static TABLE: OnceLock<Vec<(Size, ChunkId)>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut hash = Sha256::new();
        let mut hashed = 0;
        let mut ids = Vec::new();
        let mut size = SMALLEST;
        while size <= LONGEST {
            while hashed < size {
                let step = (size - hashed).min(ZEROS.len() as u64);
                hash.update(zeros(step));
                hashed += step;
            }
            ids.push((Size(size), ChunkId(Sha256Sum(hash.clone().finalize().into()))));
            size *= 2;
        }
        ids
    })
}

/// At most 1 MiB of zeros.
fn zeros(len: u64) -> &'static [u8] {
    &ZEROS[..usize::try_from(len).unwrap_or(usize::MAX).min(ZEROS.len())]
}

/// The id of a zero chunk of a power of two from 64 KiB to 64 MiB; nothing for other sizes.
pub fn zero_id(size: Size) -> Option<ChunkId> {
    table().iter().find(|(of, _)| *of == size).map(|(_, id)| *id)
}

/// The size of the zero chunk with this id, if it is one.
pub fn zero_size(id: &ChunkId) -> Option<Size> {
    table().iter().find(|(_, of)| of == id).map(|(size, _)| *size)
}

/// True if all bytes are zero.
pub fn is_zero(data: &[u8]) -> bool {
    data.chunks(ZEROS.len()).all(|part| part == &ZEROS[..part.len()])
}

/// A zero chunk as it is stored. Compresses in pieces: memory does not depend on `size`.
pub(super) fn compressed(size: Size, level: i32) -> std::io::Result<Bytes> {
    let mut frame = zstd::stream::write::Encoder::new(Vec::new(), level)?;
    frame.set_pledged_src_size(Some(size.0))?;
    let mut left = size.0;
    while left > 0 {
        let piece = zeros(left);
        frame.write_all(piece)?;
        left -= piece.len() as u64;
    }
    Ok(Bytes::from(frame.finish()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_of_zeros() {
        assert_eq!(zero_id(Size::kib(256)), Some(ChunkId::of(&vec![0; 256 << 10])));
        assert_eq!(zero_id(Size::mib(64)), Some(ChunkId::of(&vec![0; 64 << 20])));
        assert_eq!(zero_size(&ChunkId::of(&vec![0; 64 << 10])), Some(Size::kib(64)));
        assert_eq!(zero_id(Size::kib(96)), None);
        assert_eq!(zero_size(&ChunkId::of(b"x")), None);
    }

    #[test]
    fn zero_chunks_are_small_and_read_back() {
        let frame = compressed(Size::mib(64), 1).expect("memory is enough");
        assert!(frame.len() < 16 << 10, "{} bytes", frame.len());
        let back = zstd::stream::decode_all(&frame[..]).expect("a frame");
        assert!(back.len() == 64 << 20 && is_zero(&back));
    }

    #[test]
    fn one_bit_is_not_zero() {
        let mut data = vec![0; (1 << 20) + 3];
        assert!(is_zero(&data) && is_zero(&[]));
        *data.last_mut().expect("not empty") = 1;
        assert!(!is_zero(&data));
    }
}
