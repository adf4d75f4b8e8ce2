//! Images that are shown before all of them is here: as a template, of which the rest is read from its image store.
//!
//! [`berth_core::hydration`] decides what comes next from what is seen; here it is looked at and carried out, one effect at a
//! time. What is fetched is written by the server of the image store, which is told so once the record says that it may be.
//!
//! An image has, named after its digest, a thin device for its content and one for the kernel's note of what is local, and
//! over them the template, from which volumes start. Its source is named after the pool and the digest, because another pool
//! may show the same image.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use berth_core::hydration::{
    Destination, Geometry, Metadata, Recorded, RegionSize, Seen, Shown, Source as SeenSource, Step, Wanted,
    next,
};
use berth_core::ids::{Digest, Sha256Sum, Uid};
use berth_core::ledger::Class;
use berth_core::thin::image_charge;
use berth_core::units::Bytes;
use berth_device::nbd::{AttachConfig, Attachment, BackendId, Nbd, NetlinkError};
use berth_device::thin::{
    self, CloneConfig, DeviceName, TemplateDevice, TemplateError, find_metadata, longest_request,
};
use berth_record::{ChangeError, ImageEntry, ImageState, LocalState, PoolRecord, ReadError, tables};

use super::super::error::AreaError;
use super::super::lazy::{Advanced, Lazy, Source};
use super::super::templates::{ANSWER_LIMIT, DEAD_CONNECTION};
use super::{Thin, image_uid};
use crate::supervisor::SOCKET;
use crate::supervisor::servers::ServeError;
use crate::supervisor::stores::HydrationOrder;
use crate::telemetry::chain;

/// More effects than any way to the end has.
const MOST_STEPS: usize = 32;

/// An image that nobody else works on.
struct Occupied<'a> {
    all: &'a Mutex<BTreeSet<Digest>>,
    digest: Digest,
}

impl<'a> Occupied<'a> {
    /// `None` while somebody else does.
    fn take(all: &'a Mutex<BTreeSet<Digest>>, digest: &Digest) -> Option<Self> {
        let new = all.lock().unwrap_or_else(PoisonError::into_inner).insert(*digest);
        new.then_some(Self { all, digest: *digest })
    }
}

impl Drop for Occupied<'_> {
    fn drop(&mut self) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.digest);
    }
}

/// What is seen of an image that is shown, and what it is divided into.
struct Look {
    seen: Seen,
    geometry: Geometry,
}

impl Lazy for Thin {
    fn missing(&self) -> Vec<String> {
        thin::load_for_templates();
        let mut missing = thin::missing_for_templates();
        let served = self.require_supervisor().and_then(|()| self.data_plane.servers().serves_stores());
        missing.extend(served.err().map(|error| chain(&error)));
        missing
    }

    fn charge(&self, data: Bytes, virtual_size: Bytes) -> Bytes {
        image_charge(data, virtual_size, self.group.block()).data
    }

    fn source_id(&self, digest: &Digest) -> Uid {
        self.source_of(&image_uid(digest))
    }

    fn begin(
        &self,
        record: &PoolRecord,
        digest: &Digest,
        source: &Source,
        chunk: Bytes,
    ) -> Result<bool, AreaError> {
        let _alone = self.occupy(digest)?;
        let size = entry(record, digest)?.virtual_size;
        self.remove_shown(record, digest)?;
        self.remove(record, &image_uid(digest))?;
        let content = self.make_content(record, digest, size)?;
        let source = self.attach_source(source)?;
        let longest = longest_request(&[&content, &source])?;
        match RegionSize::choose(self.group.block(), chunk, longest) {
            Ok(region) if region >= RegionSize::SMALLEST_SHOWN => {
                Geometry::new(size, region)?;
                record.begin_show(digest, region.bytes())?;
                Ok(true)
            }
            _ => {
                self.remove_shown(record, digest)?;
                Ok(false)
            }
        }
    }

    fn advance(
        &self,
        record: &PoolRecord,
        digest: &Digest,
        source: Option<&Source>,
    ) -> Result<Advanced, AreaError> {
        let _alone = self.occupy(digest)?;
        for _ in 0..MOST_STEPS {
            let look = self.look(record, digest)?;
            let step = next(&look.seen);
            match (step, look.seen.shown) {
                (Step::Hydrate, Shown::Clone { progress: Some(progress), .. })
                    if look.geometry.lacks_only_short(progress) =>
                {
                    self.found_template(&image_uid(digest))?.writer()?.settle_short_region()?;
                }
                (Step::Hydrate, Shown::Clone { progress: Some(progress), .. }) => {
                    if let Some(source) = source {
                        self.order(digest, source.rate)?;
                    }
                    return Ok(Advanced::Hydrating(progress));
                }
                (Step::Rest, _) => return Ok(Advanced::Local),
                (Step::Stop(stop), _) => return Ok(Advanced::Stopped(stop)),
                (Step::AttachSource, shown) if source.is_none() => {
                    return Ok(match shown {
                        Shown::Clone { progress: Some(progress), .. } => Advanced::Hydrating(progress),
                        _ => Advanced::SourceNeeded,
                    });
                }
                (step, _) => {
                    tracing::debug!(image = %digest, ?step, "template");
                    self.carry_out(record, digest, &look, step, source)?;
                }
            }
        }
        Err(AreaError::Restless { digest: *digest })
    }

    fn is_shown(&self, digest: &Digest) -> bool {
        self.template(&image_uid(digest)).exists()
    }

    fn is_settled(&self, record: &PoolRecord, digest: &Digest) -> Result<bool, ReadError> {
        Ok(record.thin(&regions_uid(digest))?.is_none())
    }
}

impl Thin {
    fn occupy(&self, digest: &Digest) -> Result<Occupied<'_>, AreaError> {
        Occupied::take(&self.occupied, digest).ok_or(AreaError::Occupied { digest: *digest })
    }

    /// The node of the template over what is named after an image.
    fn template(&self, uid: &Uid) -> PathBuf {
        let name = DeviceName::template(&self.pool, uid);
        name.map_or_else(|_| self.root.join("nothing"), |name| name.path())
    }

    /// The node of what volumes of an image start from.
    pub(super) fn shown_image(&self, record: &PoolRecord, digest: &Digest) -> Result<PathBuf, AreaError> {
        Ok(match entry(record, digest)?.state {
            ImageState::Shown { .. } => self.template(&image_uid(digest)),
            ImageState::Filling { .. } | ImageState::Complete => self.node(Class::Images, &image_uid(digest)),
        })
    }

    /// True if what of an image has blocks tells where it is not zeros.
    pub(super) fn tells_its_parts(record: &PoolRecord, digest: &Digest) -> Result<bool, AreaError> {
        Ok(entry(record, digest)?.state.is_complete())
    }

    /// Shows an image again, as far as that goes without its image store.
    pub(super) fn restore_shown(&self, record: &PoolRecord, digest: &Digest) -> Result<(), AreaError> {
        if self.is_shown(digest) {
            return Ok(()); // what is left to do is whoever's who makes it local
        }
        match Lazy::advance(self, record, digest, None) {
            // Whoever works on it shows it.
            Ok(Advanced::Hydrating(_) | Advanced::Local) | Err(AreaError::Occupied { .. }) => Ok(()),
            Ok(Advanced::SourceNeeded) => Err(AreaError::SourceNeeded { digest: *digest }),
            Ok(Advanced::Stopped(stop)) => Err(AreaError::Stopped { digest: *digest, stop }),
            Err(error) => Err(error),
        }
    }

    /// Takes away what an image has beside its content, whatever is recorded of it. Nothing there is no error.
    ///
    /// # Errors
    /// [`TemplateError::InUse`] while a volume lies on it.
    pub(super) fn remove_shown(&self, record: &PoolRecord, digest: &Digest) -> Result<(), AreaError> {
        let (uid, regions) = (image_uid(digest), regions_uid(digest));
        let made = |uid: &Uid| Ok::<_, AreaError>(record.thin(uid).map_err(ChangeError::from)?.is_some());
        if !made(&uid)? && !made(&regions)? {
            return Ok(());
        }
        self.hide_template(&uid)?;
        self.release_source(&uid, made(&regions)?)?;
        self.remove(record, &regions)
    }

    /// Makes the template of an image disappear, once nobody writes to it any more.
    pub(super) fn hide_template(&self, uid: &Uid) -> Result<(), AreaError> {
        TemplateDevice::remove_unfinished(&self.pool, uid)?;
        if let Some(template) = TemplateDevice::find(&self.pool, uid)? {
            if let Err(error) = self.data_plane.servers().order(&self.source_of(uid), None) {
                tracing::warn!(error = chain(&error), "a server is not told that its template goes");
            }
            template.hide()?;
        }
        Ok(())
    }

    /// Lets the source of an image go: its device, then its server. `served`: there has to be one.
    pub(super) fn release_source(&self, uid: &Uid, served: bool) -> Result<(), AreaError> {
        let source = self.source_of(uid);
        let mut found = None;
        if let Ok(mut nbd) = Nbd::open() {
            found = Attachment::find(&mut nbd, &backend(&source)?)?;
            if let Some(attached) = found.clone() {
                attached.detach(&mut nbd, &mut self.data_plane.slots())?;
            }
        }
        match self.data_plane.servers().stop(&source) {
            Err(ServeError::Unavailable { .. }) if !served && found.is_none() => Ok(()),
            stopped => Ok(stopped?),
        }
    }

    fn source_of(&self, uid: &Uid) -> Uid {
        named_after(&format!("source {} {uid}", self.pool))
    }

    fn look(&self, record: &PoolRecord, digest: &Digest) -> Result<Look, AreaError> {
        let image = entry(record, digest)?;
        let ImageState::Shown { region, local } = image.state else {
            return Err(AreaError::NotShown { digest: *digest });
        };
        let geometry = Geometry::new(image.virtual_size, RegionSize::new(region)?)?;
        let (uid, size) = (image_uid(digest), image.virtual_size);
        let destination = match Self::made(record, &uid)? {
            None => Destination::Missing,
            Some(entry) if entry.size != size => Destination::OtherSize,
            Some(entry) => self.show(&uid, &entry, None, false).map(|_| Destination::Ready)?,
        };
        let shown = TemplateDevice::shown(&self.pool, &uid, size, &self.node(Class::Images, &uid))?;
        let recorded = match local {
            LocalState::New => Recorded::New,
            LocalState::Begun => Recorded::Begun,
            LocalState::Local => Recorded::Local,
        };
        let metadata = self.look_at_regions(record, digest, &geometry, shown)?;
        let source = match self.source(&uid)? {
            None => SeenSource::Missing,
            Some(found) if found.size() != size => SeenSource::OtherSize,
            Some(_) => SeenSource::Attached,
        };
        let wanted = Wanted::Hydrated;
        Ok(Look { seen: Seen { wanted, recorded, destination, metadata, source, shown }, geometry })
    }

    /// What a clone has in use is not read beside it, and is its own.
    fn look_at_regions(
        &self,
        record: &PoolRecord,
        digest: &Digest,
        geometry: &Geometry,
        shown: Shown,
    ) -> Result<Metadata, AreaError> {
        let uid = regions_uid(digest);
        let Some(entry) = Self::made(record, &uid)? else { return Ok(Metadata::Missing) };
        let path = self.show(&uid, &entry, None, false)?;
        if matches!(shown, Shown::Clone { .. }) {
            return Ok(Metadata::OfThis);
        }
        Ok(find_metadata(&path)?.map_or(Metadata::Missing, |found| found.of(geometry)))
    }

    fn source(&self, uid: &Uid) -> Result<Option<Attachment>, AreaError> {
        match Nbd::open() {
            Err(NetlinkError::NoFamily) => Ok(None),
            opened => {
                let mut nbd = opened.map_err(berth_device::nbd::AttachError::from)?;
                Ok(Attachment::find(&mut nbd, &backend(&self.source_of(uid))?)?)
            }
        }
    }

    fn carry_out(
        &self,
        record: &PoolRecord,
        digest: &Digest,
        look: &Look,
        step: Step,
        source: Option<&Source>,
    ) -> Result<(), AreaError> {
        let (uid, size) = (image_uid(digest), look.geometry.size());
        let content = || self.node(Class::Images, &uid);
        match step {
            Step::MakeDestination => self.make_content(record, digest, size).map(drop),
            Step::MakeMetadata => {
                let regions = regions_uid(digest);
                self.make(record, &regions, Class::Images, look.geometry.metadata())?;
                Ok(record.thin_made(&regions)?)
            }
            Step::AttachSource => source.map_or(Ok(()), |source| self.attach_source(source).map(drop)),
            Step::RemoveUnfinished => Ok(TemplateDevice::remove_unfinished(&self.pool, &uid)?),
            Step::ShowClone { clear } => self.show_clone(digest, look.geometry, clear),
            Step::RecordNew => Ok(record.image_local(digest, LocalState::New)?),
            Step::RecordBegun => Ok(record.image_local(digest, LocalState::Begun)?),
            Step::RecordLocal => {
                self.found_template(&uid)?.confirm_local()?;
                Ok(record.image_local(digest, LocalState::Local)?)
            }
            Step::Swap => Ok(self.found_template(&uid)?.make_local(&*self.suspender)?),
            Step::ShowLocal => Ok(TemplateDevice::show_local(&self.pool, &uid, size, &content()).map(drop)?),
            Step::ReleaseSource => self.release_source(&uid, true),
            Step::RemoveMetadata => {
                self.release_source(&uid, true)?; // its server may be there without its device
                self.remove(record, &regions_uid(digest))
            }
            Step::Hide => self.hide_template(&uid),
            Step::Hydrate | Step::Rest | Step::Stop(_) => Ok(()),
        }
    }

    /// The thin device that the content comes to lie on: blank, and exactly as large as the image.
    fn make_content(&self, record: &PoolRecord, digest: &Digest, size: Bytes) -> Result<PathBuf, AreaError> {
        let uid = image_uid(digest);
        let entry = self.make_exactly(record, &uid, Class::Images, size)?;
        record.thin_made(&uid)?;
        self.show(&uid, &entry, None, false)
    }

    fn show_clone(&self, digest: &Digest, geometry: Geometry, clear: bool) -> Result<(), AreaError> {
        let uid = image_uid(digest);
        let source = self.source(&uid)?.ok_or(AreaError::SourceNeeded { digest: *digest })?;
        TemplateDevice::show_clone(&CloneConfig {
            pool: &self.pool,
            holder: &uid,
            geometry,
            destination: &self.node(Class::Images, &uid),
            metadata: &self.node(Class::Images, &regions_uid(digest)),
            source: &source.path(),
            metadata_is_new: clear,
        })?;
        Ok(())
    }

    fn found_template(&self, uid: &Uid) -> Result<TemplateDevice, AreaError> {
        let found = TemplateDevice::find(&self.pool, uid)?;
        found.ok_or_else(|| AreaError::Vanished { device: self.template(uid) })
    }

    fn order(&self, digest: &Digest, rate: Option<Bytes>) -> Result<(), AreaError> {
        let holder = image_uid(digest);
        let id = self.source_of(&holder);
        let order = HydrationOrder { pool: self.pool.clone(), holder, rate };
        Ok(self.data_plane.servers().order(&id, Some(&order))?)
    }

    /// Whoever else runs servers would keep the credentials on a disk, and end with them.
    fn require_supervisor(&self) -> Result<(), ServeError> {
        if self.data_plane.is_supervised() {
            return Ok(());
        }
        let (socket, why) = (PathBuf::from(SOCKET), "none runs".to_owned());
        Err(ServeError::Unavailable { socket, why })
    }

    /// The server, then the device.
    fn attach_source(&self, source: &Source) -> Result<PathBuf, AreaError> {
        self.require_supervisor()?;
        let socket = self.data_plane.servers().serve_store(&source.server)?;
        let mut slots = self.data_plane.slots();
        let mut nbd = Nbd::open().map_err(berth_device::nbd::AttachError::from)?;
        let config = AttachConfig {
            id: &backend(&source.server.id)?,
            socket: &socket,
            size: source.server.size,
            dead_connection: DEAD_CONNECTION,
            limit: ANSWER_LIMIT,
        };
        Ok(Attachment::attach(&mut nbd, &mut slots, &config)?.path())
    }
}

fn entry(record: &PoolRecord, digest: &Digest) -> Result<ImageEntry, AreaError> {
    let found = record.record().get(tables::IMAGES, digest).map_err(ChangeError::from)?;
    found.ok_or(AreaError::NotShown { digest: *digest })
}

/// What the kernel's note of what is local of an image is named after.
fn regions_uid(digest: &Digest) -> Uid {
    named_after(&format!("regions {digest}"))
}

/// A UUID of the first 128 bits of a text's SHA-256.
fn named_after(text: &str) -> Uid {
    image_uid(&Digest(Sha256Sum::of(text.as_bytes())))
}

fn backend(uid: &Uid) -> Result<BackendId, AreaError> {
    BackendId::new(uid).map_err(|_| AreaError::NoTemplate { template: uid.clone() })
}

impl From<TemplateError> for AreaError {
    fn from(error: TemplateError) -> Self {
        Self::Template(Box::new(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_works_on_an_image() {
        let (all, one) = (Mutex::default(), Digest(Sha256Sum::of(b"one")));
        let first = Occupied::take(&all, &one);
        assert!(first.is_some() && Occupied::take(&all, &one).is_none());
        assert!(Occupied::take(&all, &Digest(Sha256Sum::of(b"other"))).is_some());
        drop(first);
        assert!(Occupied::take(&all, &one).is_some());
    }

    #[test]
    fn what_belongs_to_an_image_has_names_of_its_own() {
        let digest: Digest = format!("sha256:{}", "0123456789abcdef".repeat(4)).parse().expect("a digest");
        let (image, regions) = (image_uid(&digest), regions_uid(&digest));
        assert_ne!(image, regions);
        assert_eq!(regions, regions_uid(&digest), "the same each time");
        assert!(backend(&regions).is_ok() && DeviceName::template(&image, &regions).is_ok());
    }
}
