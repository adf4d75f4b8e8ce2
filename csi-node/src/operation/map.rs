//! What a volume holds itself, and what it reads from elsewhere.

use berth_core::ids::Uid;
use berth_core::units::Bytes;
use berth_device::partition::Extent;
use berth_record::{VolumeEntry, VolumeOrigin, tables};

use super::error::OperationError;
use super::volumes::found;
use super::{MapFrom, MapLine, Outcome};
use crate::agent::pools::OpenPool;

/// The whole of a volume or snapshot, part by part.
pub fn map(pool: &OpenPool, uid: &Uid) -> Result<Outcome, OperationError> {
    let volume = found(pool, uid, "mapped as a volume")?;
    let own = pool.area.own_parts(&pool.record, uid)?;
    let origin = if pool.area.reads_origin() { origin_size(pool, &volume)? } else { Bytes::ZERO };
    Ok(Outcome::Map(compose(volume.size, origin, &own)))
}

fn origin_size(pool: &OpenPool, volume: &VolumeEntry) -> Result<Bytes, OperationError> {
    let record = pool.record.record();
    Ok(match &volume.origin {
        None => Bytes::ZERO,
        Some(VolumeOrigin::Image(digest)) => {
            record.get(tables::IMAGES, digest)?.map(|image| image.virtual_size).unwrap_or_default()
        }
        Some(VolumeOrigin::Template { template }) => {
            record.get(tables::TEMPLATES, template)?.map(|found| found.virtual_size).unwrap_or_default()
        }
    })
}

/// The map of a volume of `size` over an origin of `origin` bytes, from the parts that it has itself, which are ascending
/// and disjoint. Neighbours are told as one.
fn compose(size: Bytes, origin: Bytes, own: &[Extent]) -> Vec<MapLine> {
    let mut lines: Vec<MapLine> = Vec::new();
    let mut add = |start: u64, end: u64, from| {
        let (start, end) = (start.min(size.0), end.min(size.0));
        if start >= end {
            return;
        }
        if let Some(last) = lines.last_mut().filter(|last| last.from == from) {
            last.length = Bytes(end - last.offset.0);
            return;
        }
        lines.push(MapLine { offset: Bytes(start), length: Bytes(end - start), from });
    };
    let mut at = 0;
    let whole = Extent { offset: size, length: Bytes::ZERO };
    for part in own.iter().chain([&whole]) {
        add(at, part.offset.0.min(origin.0), MapFrom::Origin);
        add(at.max(origin.0), part.offset.0, MapFrom::Zero);
        at = part.offset.0.saturating_add(part.length.0);
        add(part.offset.0, at, MapFrom::Own);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(size: u64, origin: u64, own: &[(u64, u64)]) -> String {
        let own: Vec<_> =
            own.iter().map(|(at, length)| Extent { offset: Bytes(*at), length: Bytes(*length) }).collect();
        let lines = compose(Bytes(size), Bytes(origin), &own);
        let mut end = 0;
        let mut text = String::new();
        for line in lines {
            assert_eq!(line.offset.0, end, "complete and ascending");
            assert!(line.length > Bytes::ZERO);
            end += line.length.0;
            let letter = match line.from {
                MapFrom::Own => "o",
                MapFrom::Origin => "i",
                MapFrom::Zero => "z",
            };
            text.push_str(&letter.repeat(usize::try_from(line.length.0).unwrap()));
            text.push('|');
        }
        assert_eq!(end, size);
        text
    }

    #[test]
    fn every_byte_is_told_once() {
        assert_eq!(shown(4, 0, &[]), "zzzz|");
        assert_eq!(shown(4, 9, &[]), "iiii|");
        assert_eq!(shown(6, 3, &[]), "iii|zzz|");
        assert_eq!(shown(6, 3, &[(1, 1)]), "i|o|i|zzz|");
        assert_eq!(shown(6, 3, &[(2, 2)]), "ii|oo|zz|");
        assert_eq!(shown(6, 3, &[(0, 6)]), "oooooo|");
        assert_eq!(
            shown(6, 3, &[(0, 1), (1, 1), (4, 9)]),
            "oo|i|z|oo|",
            "neighbours, and what reaches beyond the end"
        );
        assert_eq!(shown(6, 6, &[(6, 3)]), "iiiiii|");
    }
}
