//! What a volume holds itself, what it reads from elsewhere, and where it differs from an older one.

use berth_core::ids::Uid;
use berth_core::units::Bytes;

use super::error::OperationError;
use super::volumes::found;
use super::{MapLine, Outcome};
use crate::agent::pools::OpenPool;

/// The most parts that one answer has: 6 MiB of memory, 25 MiB of JSON. A shorter one tells all that is left.
pub const MOST_PARTS: usize = 1 << 18;

/// Tells `each` what every part of a volume or snapshot reads: ascending, and together the whole volume. Streams; blocks for
/// minutes where there are millions of parts. Others may change the volume meanwhile.
///
/// # Errors
/// What was told before an error is worth nothing.
pub fn read_map(pool: &OpenPool, uid: &Uid, each: &mut dyn FnMut(MapLine)) -> Result<(), OperationError> {
    let turn = pool.turn();
    found(pool, uid, "mapped as a volume")?;
    let reading = pool.area.map(&pool.record, uid)?;
    drop(turn);
    Ok(reading(each)?)
}

/// The same of `uid`, with [`MapFrom::Same`](super::MapFrom::Same) where it does not differ from `old`.
///
/// # Errors
/// As [`read_map`]; and where the two have nothing in common, or `old` may change meanwhile and cannot be kept.
pub fn read_delta(
    pool: &OpenPool,
    old: &Uid,
    uid: &Uid,
    each: &mut dyn FnMut(MapLine),
) -> Result<(), OperationError> {
    let turn = pool.turn();
    found(pool, old, "compared with")?;
    found(pool, uid, "compared")?;
    let reading = pool.area.delta(&pool.record, old, uid)?;
    drop(turn);
    Ok(reading(each)?)
}

/// The parts of a volume from `offset` on.
pub fn map(pool: &OpenPool, uid: &Uid, offset: Bytes) -> Result<Outcome, OperationError> {
    page(pool, uid, offset, MOST_PARTS, |each| read_map(pool, uid, each))
}

/// The parts of a volume from `offset` on, compared with `old`.
pub fn delta(pool: &OpenPool, old: &Uid, uid: &Uid, offset: Bytes) -> Result<Outcome, OperationError> {
    page(pool, uid, offset, MOST_PARTS, |each| read_delta(pool, old, uid, each))
}

/// As many parts as one answer may have, from `offset` on.
fn page(
    pool: &OpenPool,
    uid: &Uid,
    offset: Bytes,
    most: usize,
    read: impl FnOnce(&mut dyn FnMut(MapLine)) -> Result<(), OperationError>,
) -> Result<Outcome, OperationError> {
    let size = found(pool, uid, "mapped as a volume")?.size;
    let mut page = Page { offset, most, lines: Vec::new() };
    if offset < size {
        read(&mut |line| page.take(line))?; // behind its end there is nothing to be read
    }
    Ok(Outcome::Map(page.lines))
}

/// The parts that one answer has.
struct Page {
    offset: Bytes,
    most: usize,
    lines: Vec<MapLine>,
}

impl Page {
    fn take(&mut self, line: MapLine) {
        if line.end() <= self.offset || self.lines.len() >= self.most {
            return;
        }
        let offset = line.offset.max(self.offset);
        self.lines.push(MapLine { offset, length: line.end().saturating_sub(offset), ..line });
    }
}

#[cfg(test)]
mod tests {
    use berth_core::extents::MapFrom;

    use super::*;

    #[test]
    fn pages_together_are_the_whole() {
        let kinds = [MapFrom::Own, MapFrom::Origin, MapFrom::Zero, MapFrom::Same];
        let lines: Vec<_> = (0..10_u64)
            .map(|n| MapLine { offset: Bytes(3 * n), length: Bytes(3), from: kinds[usize::from(n % 4 == 1)] })
            .collect();
        let (mut at, mut read, mut pages) = (Bytes::ZERO, Vec::new(), 0);
        loop {
            let mut page = Page { offset: at, most: 4, lines: Vec::new() };
            for line in &lines {
                page.take(*line);
            }
            let Some(last) = page.lines.last() else { break };
            at = last.end();
            pages += 1;
            read.extend(page.lines);
        }
        assert_eq!((read, pages), (lines.clone(), 3));
        let mut page = Page { offset: Bytes(4), most: 1, lines: Vec::new() };
        for line in &lines {
            page.take(*line);
        }
        let cut = MapLine { offset: Bytes(4), length: Bytes(2), ..lines[1] };
        assert_eq!(page.lines, [cut], "it may begin within a part");
    }
}
