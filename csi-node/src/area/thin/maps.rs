//! What a volume's thin device maps, and where two of them differ, composed with what their origin maps.
//!
//! Read from metadata snapshots, of which a kernel pool keeps one at a time: whoever reads one has claimed it. What is read is
//! as it was when it was kept, whatever is written, made or deleted meanwhile.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use berth_core::extents::{Composer, Disorder, Extent, Held, MapLine};
use berth_core::ids::Uid;
use berth_core::ledger::Class;
use berth_core::units::Bytes;
use berth_device::thin::{Difference, KernelPoolError, MappingError, MetadataSnapshot, ThinId};
use berth_record::{ChangeError, PoolRecord, VolumeEntry, VolumeOrigin, tables};

use super::super::error::AreaError;
use super::super::{Reading, volume_entry};
use super::devices::thin_id;
use super::{Thin, image_uid};

/// How long another reader of the same kernel pool is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// How many parts of an origin are read ahead.
const AHEAD: usize = 1024;

/// What lies below a volume.
enum Below<'a> {
    /// Nothing, or something whose parts are not known: as far as it reaches.
    Whole(Bytes),
    /// The thin device of an image, of this size.
    Image { metadata: MetadataSnapshot<'a>, id: ThinId, size: Bytes },
}

impl Thin {
    /// Releases what a process that is gone has left behind: it keeps blocks from being used again.
    pub(super) fn release_left_behind(&self) {
        let Ok(kernel) = self.kernel() else { return };
        for class in [Class::Images, Class::Volumes] {
            if let Err(error) = kernel.of(class).release_stale_snapshot() {
                tracing::warn!(error = crate::telemetry::chain(&error), "metadata is not looked at");
            }
        }
    }

    /// Keeps what a volume maps.
    pub(super) fn keep_map(&self, record: &PoolRecord, uid: &Uid) -> Result<Reading<'_>, AreaError> {
        let volume = volume_entry(record, uid)?;
        let id = self.made_id(record, uid)?;
        let below = self.below(record, &volume)?;
        let metadata = self.metadata(Class::Volumes)?;
        Ok(Box::new(move |each| {
            compose(below, each, |origin, each| {
                let composer = Composer::map(volume.size, origin.into_iter(), each);
                read(metadata, composer, |metadata, part| {
                    metadata.mapped(id, |extent| part(extent, Held::Own))
                })
            })
        }))
    }

    /// Keeps what two volumes map.
    pub(super) fn keep_delta(
        &self,
        record: &PoolRecord,
        old: &Uid,
        new: &Uid,
    ) -> Result<Reading<'_>, AreaError> {
        let (before, now) = (volume_entry(record, old)?, volume_entry(record, new)?);
        if before.origin != now.origin {
            return Err(AreaError::NotRelated { old: old.clone(), new: new.clone() });
        }
        let (from, to) = (self.made_id(record, old)?, self.made_id(record, new)?);
        let below = self.below(record, &now)?;
        let metadata = self.metadata(Class::Volumes)?;
        Ok(Box::new(move |each| {
            compose(below, each, |origin, each| {
                let composer = Composer::comparison(now.size, before.size, origin.into_iter(), each);
                read(metadata, composer, |metadata, part| {
                    metadata.changed(from, to, |(extent, difference)| part(extent, held(difference)))
                })
            })
        }))
    }

    fn made_id(&self, record: &PoolRecord, uid: &Uid) -> Result<ThinId, AreaError> {
        let device = self.node(Class::Volumes, uid);
        thin_id(&Self::made(record, uid)?.ok_or(AreaError::Vanished { device })?)
    }

    fn metadata(&self, class: Class) -> Result<MetadataSnapshot<'_>, AreaError> {
        let pool = self.kernel()?.of(class);
        let kept: Result<_, KernelPoolError> = pool.metadata_snapshot(PATIENCE);
        Ok(kept?)
    }

    /// What lies below a volume. Taken before the volume's own metadata: an image is not changed.
    fn below(&self, record: &PoolRecord, volume: &VolumeEntry) -> Result<Below<'_>, AreaError> {
        let read = record.record();
        Ok(match &volume.origin {
            None => Below::Whole(Bytes::ZERO),
            Some(VolumeOrigin::Template { template }) => {
                let found = read.get(tables::TEMPLATES, template).map_err(ChangeError::from)?;
                Below::Whole(found.map(|found| found.virtual_size).unwrap_or_default())
            }
            Some(VolumeOrigin::Image(digest)) => {
                let size = read.get(tables::IMAGES, digest).map_err(ChangeError::from)?;
                let size = size.map(|image| image.virtual_size).unwrap_or_default();
                let tells = Self::tells_its_parts(record, digest)?;
                match Self::made(record, &image_uid(digest))?.filter(|_| tells) {
                    None => Below::Whole(size), // not known, or not all here: it may be data everywhere
                    Some(entry) => {
                        Below::Image { metadata: self.metadata(Class::Images)?, id: thin_id(&entry)?, size }
                    }
                }
            }
        })
    }
}

const fn held(difference: Difference) -> Held {
    match difference {
        Difference::Same => Held::Shared,
        Difference::Changed | Difference::Added => Held::Own,
        Difference::Removed => Held::Back,
    }
}

/// Composes with what lies below, which is read beside it, a few parts ahead.
fn compose(
    below: Below<'_>,
    each: &mut dyn FnMut(MapLine),
    work: impl FnOnce(Receiver<Extent>, &mut dyn FnMut(MapLine)) -> Result<(), AreaError>,
) -> Result<(), AreaError> {
    let (sender, parts) = sync_channel(AHEAD);
    thread::scope(|scope| {
        let reader = scope.spawn(move || read_below(below, &sender));
        let worked = work(parts, each);
        let below = reader.join().map_err(|_| AreaError::ReaderGone)?;
        // What lies below is told wrong where it could not be read.
        below.and(worked)
    })
}

/// What nobody takes any more is not needed.
fn read_below(below: Below<'_>, parts: &SyncSender<Extent>) -> Result<(), AreaError> {
    let send = |extent: Extent| {
        let _ = parts.send(extent);
    };
    match below {
        Below::Whole(length) => send(Extent { offset: Bytes::ZERO, length }),
        Below::Image { metadata, id, size } => {
            // Its last block may reach beyond its end, where a volume of it is zeros.
            metadata.mapped(id, |part| {
                let length = part.end().min(size).saturating_sub(part.offset);
                send(Extent { length, ..part });
            })?;
            metadata.release()?;
        }
    }
    Ok(())
}

/// Feeds what `from` tells to a composer, up to the first part that is out of order.
fn read<O: Iterator<Item = Extent>, E: FnMut(MapLine)>(
    metadata: MetadataSnapshot<'_>,
    mut composer: Composer<O, E>,
    from: impl FnOnce(&MetadataSnapshot<'_>, &mut dyn FnMut(Extent, Held)) -> Result<(), MappingError>,
) -> Result<(), AreaError> {
    let mut disorder: Option<Disorder> = None;
    from(&metadata, &mut |extent, held| {
        if disorder.is_none() {
            disorder = composer.part(extent, held).err();
        }
    })?;
    metadata.release()?;
    if let Some(disorder) = disorder {
        return Err(disorder.into());
    }
    composer.finish();
    Ok(())
}
