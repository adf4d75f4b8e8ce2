//! The record of one pool's area on one node.

use std::path::Path;

use berth_core::ids::{Digest, Lineage, NodeName, PoolName, Uid};
use berth_core::overcommit::Overcommit;
use berth_core::units::{Bytes, Generation, Timestamp};

use crate::entry::{
    Attachment, ImageEntry, ImageState, LocalState, PromiseEntry, StagingEntry, TemplateState, VolumeEntry,
    VolumeKind, VolumeOrigin, VolumeState,
};
use crate::error::{AdoptError, ChangeError, CreateError, OpenError, ReadError};
use crate::schema::{KEY_LEDGER, KEY_POOL, Owner, PoolIdentity, SavedPosition, tables};
use crate::store::{Change, Record};

/// Where in its ledger's history the node is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LedgerPosition {
    /// The lineage of the last ledger obeyed; `None` before the first.
    pub lineage: Option<Lineage>,
    /// The revision of the last ledger obeyed.
    pub obeyed_revision: u64,
    /// How far that one overcommits volumes.
    pub overcommit: Overcommit,
}

/// What one pool's area holds, and on whose promise.
pub struct PoolRecord {
    record: Record,
    identity: PoolIdentity,
}

impl PoolRecord {
    /// Makes the record of a new area.
    pub fn create(path: &Path, identity: PoolIdentity) -> Result<Self, CreateError> {
        let header = [(KEY_POOL, crate::store::to_json(&identity))];
        Ok(Self { record: Record::create(path, &identity.owner(), &header)?, identity })
    }

    /// Opens the record of an area. With `expected`, only if it is that pool's on that node; without, as recovery does.
    pub fn open(path: &Path, expected: Option<&Owner>) -> Result<Self, OpenError> {
        let record = Record::open(path, expected)?;
        let damaged = |reason| OpenError::Corrupt { path: path.to_owned(), reason };
        match record.header::<PoolIdentity>(KEY_POOL) {
            Ok(Some(identity)) => Ok(Self { record, identity }),
            Ok(None) => Err(damaged("it has no pool identity".into())),
            Err(e) => Err(damaged(e.to_string())),
        }
    }

    /// Opens the record of an area for another owner than it has: `new` is whose it is from now on. What it holds, and what
    /// the area is named after, stay as they are. May be repeated.
    pub fn adopt(
        path: &Path,
        pool_uid: &Uid,
        pool_name: &PoolName,
        node: &NodeName,
        made_of: Option<serde_json::Value>,
    ) -> Result<Self, AdoptError> {
        let mut found = Self::open(path, None)?;
        found.give_to(pool_uid, pool_name, node, made_of)?;
        Ok(found)
    }

    /// Makes it another owner's. On another node nothing is attached any more.
    pub fn give_to(
        &mut self,
        pool_uid: &Uid,
        pool_name: &PoolName,
        node: &NodeName,
        made_of: Option<serde_json::Value>,
    ) -> Result<(), ChangeError> {
        let area = self.identity.area().clone();
        let identity = PoolIdentity {
            pool_uid: pool_uid.clone(),
            pool_name: pool_name.clone(),
            node: node.clone(),
            pool_id: self.identity.pool_id.clone(),
            area: (area != *pool_uid).then_some(area),
            made_of: made_of.or(self.identity.made_of.clone()),
        };
        if identity == self.identity {
            return Ok(());
        }
        let moved = identity.node != self.identity.node;
        self.record.give_to(&identity.owner(), |change| {
            change.put_header(KEY_POOL, &identity)?;
            let attached = if moved { change.entries(tables::ATTACHMENTS)? } else { Vec::new() };
            attached.iter().try_for_each(|(uid, _)| change.remove(tables::ATTACHMENTS, uid).map(drop))
        })?;
        self.identity = identity;
        Ok(())
    }

    /// Whose the area at `path` is, without opening its record for use: a copy of it is read, which lies in `scratch` for
    /// that long.
    pub fn identity_at(path: &Path, scratch: &Path) -> Result<PoolIdentity, OpenError> {
        let copy = scratch.join(format!("berth-identity-{}", std::process::id()));
        let io = |source| OpenError::Io { path: path.to_owned(), source };
        std::fs::copy(path, &copy).map_err(io)?;
        let opened = Self::open(&copy, None).map(|record| record.identity);
        std::fs::remove_file(&copy).map_err(io)?;
        opened
    }

    /// Which area it is.
    pub fn identity(&self) -> &PoolIdentity {
        &self.identity
    }

    /// Reading of every table, and transactions of several entries.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Where in its ledger's history the node is.
    pub fn ledger_position(&self) -> Result<LedgerPosition, ReadError> {
        let saved: SavedPosition = self.record.header(KEY_LEDGER)?.unwrap_or_default();
        let SavedPosition { lineage, revision, overcommit } = saved;
        Ok(LedgerPosition { lineage, obeyed_revision: revision, overcommit })
    }

    /// Records that the ledger with this lineage and revision is obeyed from now on, together with the promises taken
    /// from it: before anything is done under them. Refused with [`ChangeError::StaleGeneration`] for a promise that
    /// the record knows at a later generation.
    pub fn obey(
        &self,
        position: &LedgerPosition,
        promises: &[(Uid, PromiseEntry)],
    ) -> Result<(), ChangeError> {
        let LedgerPosition { lineage, obeyed_revision: revision, overcommit } = position.clone();
        let saved = SavedPosition { lineage, revision, overcommit };
        self.record.commit(|change| {
            change.put_header(KEY_LEDGER, &saved)?;
            for (uid, promise) in promises {
                if let Some(old) = change.get(tables::PROMISES, uid)? {
                    not_older(tables::PROMISES.name(), uid, old.generation, promise.generation)?;
                }
                change.put(tables::PROMISES, uid, &PromiseEntry { obeyed: true, ..promise.clone() })?;
            }
            Ok(())
        })
    }

    /// Records that the bytes of this promise are gone, after they are. The same again changes nothing. Refused while a
    /// volume, an attachment, a work directory or an image is recorded under it.
    pub fn promise_released(&self, uid: &Uid, generation: Generation) -> Result<(), ChangeError> {
        self.record.commit(|change| {
            let mut promise = change.require(tables::PROMISES, uid)?;
            not_older(tables::PROMISES.name(), uid, promise.generation, generation)?;
            if let Some(holds) = holding(change, uid)? {
                return Err(wrong_state(tables::PROMISES.name(), uid, holds, "released"));
            }
            promise.released = true;
            change.put(tables::PROMISES, uid, &promise)
        })
    }

    /// Forgets a promise whose ledger entry is gone. Only a released one, or one never obeyed, can be.
    pub fn forget_promise(&self, uid: &Uid) -> Result<(), ChangeError> {
        self.record.commit(|change| {
            if let Some(promise) = change.get(tables::PROMISES, uid)?
                && promise.obeyed
                && !promise.released
            {
                return Err(wrong_state(tables::PROMISES.name(), uid, "obeyed", "forgotten"));
            }
            change.remove(tables::PROMISES, uid).map(|_| ())
        })
    }

    /// Records the intent to fill an image, or resumes: an entry that is there already stays as it is, under `holder`
    /// from now on. Returns the entry. Refused once the holder's promise is released.
    pub fn begin_fill(
        &self,
        digest: &Digest,
        holder: &Uid,
        virtual_size: Bytes,
        data: Bytes,
        now: Timestamp,
    ) -> Result<ImageEntry, ChangeError> {
        self.record.commit(|change| {
            not_released(change, holder)?;
            let old = change.get(tables::IMAGES, digest)?;
            let state = old.map_or(ImageState::Filling { offset: Bytes::ZERO }, |old| old.state);
            let entry = ImageEntry { holder: holder.clone(), state, virtual_size, data, last_used: now };
            change.put(tables::IMAGES, digest, &entry)?;
            Ok(entry)
        })
    }

    /// Records that the first `offset` bytes of an image are on stable storage, after they are. Refused if the image is
    /// another holder's by now.
    pub fn fill_progress(&self, digest: &Digest, holder: &Uid, offset: Bytes) -> Result<(), ChangeError> {
        self.change_image(digest, "filling", |image| match image.state {
            _ if image.holder != *holder => Err("another holder's"),
            ImageState::Filling { .. } => {
                image.state = ImageState::Filling { offset };
                Ok(())
            }
            ImageState::Complete => Err("complete"),
            ImageState::Shown { .. } => Err("shown"),
        })
    }

    /// Records that an image is complete, after it was verified. The same again changes nothing. Refused if the image is
    /// another holder's by now.
    pub fn fill_complete(&self, digest: &Digest, holder: &Uid) -> Result<(), ChangeError> {
        self.change_image(digest, "complete", |image| {
            if image.holder != *holder {
                return Err("another holder's");
            }
            if matches!(image.state, ImageState::Shown { .. }) {
                return Err("shown");
            }
            image.state = ImageState::Complete;
            Ok(())
        })
    }

    /// Records that an image is to be shown as a template with regions of this size, before it is: nothing of it is here. One that
    /// is recorded so already stays as it is. Refused unless it is empty.
    pub fn begin_show(&self, digest: &Digest, region: Bytes) -> Result<(), ChangeError> {
        self.change_image(digest, "shown", |image| match image.state {
            ImageState::Filling { offset: Bytes::ZERO } => {
                image.state = ImageState::Shown { region, local: LocalState::New };
                Ok(())
            }
            ImageState::Shown { region: recorded, .. } if recorded == region => Ok(()),
            ImageState::Shown { .. } => Err("shown with other regions"),
            ImageState::Filling { .. } => Err("filled in part"),
            ImageState::Complete => Err("complete"),
        })
    }

    /// Records how much of an image is here that is shown: [`LocalState::Begun`] before anything is written to it,
    /// [`LocalState::Local`] once all of it is durable.
    pub fn image_local(&self, digest: &Digest, now: LocalState) -> Result<(), ChangeError> {
        self.change_image(digest, "local", |image| match &mut image.state {
            ImageState::Shown { local, .. } => {
                *local = now;
                Ok(())
            }
            ImageState::Complete | ImageState::Filling { .. } => Err("not shown"),
        })
    }

    /// Records that an image was wanted. An earlier time than the recorded one changes nothing.
    pub fn image_used(&self, digest: &Digest, now: Timestamp) -> Result<(), ChangeError> {
        self.change_image(digest, "used", |image| {
            image.last_used = image.last_used.max(now);
            Ok(())
        })
    }

    /// Records the intent to remove a complete or half-filled image: it counts as empty from now on.
    pub fn begin_evict(&self, digest: &Digest) -> Result<(), ChangeError> {
        self.change_image(digest, "evicted", |image| {
            image.state = ImageState::Filling { offset: Bytes::ZERO };
            Ok(())
        })
    }

    /// Forgets an image, after its bytes are gone. Refused for one that is complete or shown: evict first.
    pub fn forget_image(&self, digest: &Digest) -> Result<(), ChangeError> {
        self.record.commit(|change| {
            let old = change.get(tables::IMAGES, digest)?;
            if old.is_some_and(|image| !matches!(image.state, ImageState::Filling { .. })) {
                return Err(wrong_state(tables::IMAGES.name(), digest, "complete or shown", "forgotten"));
            }
            change.remove(tables::IMAGES, digest).map(|_| ())
        })
    }

    /// Records the intent to make a volume, in state [`VolumeState::Creating`] whatever `volume` says. One that is
    /// there already is returned as it is, so that a repeated request can be answered from it; a later generation takes
    /// over what an earlier one had begun. Refused once the volume's promise is released.
    pub fn begin_volume(&self, uid: &Uid, volume: &VolumeEntry) -> Result<VolumeEntry, ChangeError> {
        self.record.commit(|change| begin_volume(change, uid, volume))
    }

    /// The same, with the promise that it is made under where `rule` gives one, which sees all promises of that moment: both
    /// are recorded, or neither is.
    pub fn begin_volume_under<E: From<ChangeError>>(
        &self,
        uid: &Uid,
        volume: &VolumeEntry,
        rule: impl FnOnce(Vec<(Uid, PromiseEntry)>) -> Result<Option<PromiseEntry>, E>,
    ) -> Result<VolumeEntry, E> {
        self.record.commit(|change| {
            if let Some(promise) = rule(change.entries(tables::PROMISES)?)? {
                change.put(tables::PROMISES, uid, &promise)?;
            }
            Ok(begin_volume(change, uid, volume)?)
        })
    }

    /// Records that a volume is usable, after it is. The same again changes nothing.
    pub fn volume_ready(&self, uid: &Uid, generation: Generation) -> Result<(), ChangeError> {
        self.record.commit(|change| {
            let mut volume = change.require(tables::VOLUMES, uid)?;
            not_older(tables::VOLUMES.name(), uid, volume.generation, generation)?;
            if volume.state == VolumeState::Deleting {
                return Err(wrong_state(tables::VOLUMES.name(), uid, "being deleted", "ready"));
            }
            volume.state = VolumeState::Ready;
            change.put(tables::VOLUMES, uid, &volume)
        })
    }

    /// Records the new size of a volume: before it grows.
    pub fn volume_resized(&self, uid: &Uid, size: Bytes) -> Result<(), ChangeError> {
        self.volume_resized_under(uid, size, |_| Ok(None))
    }

    /// The same, with the promise that it needs then where `rule` gives one, as [`Self::begin_volume_under`] does. Refused for
    /// a snapshot.
    pub fn volume_resized_under<E: From<ChangeError>>(
        &self,
        uid: &Uid,
        size: Bytes,
        rule: impl FnOnce(Vec<(Uid, PromiseEntry)>) -> Result<Option<PromiseEntry>, E>,
    ) -> Result<(), E> {
        self.record.commit(|change| {
            let mut volume = change.require(tables::VOLUMES, uid)?;
            let refused = match (volume.state, volume.kind) {
                (VolumeState::Ready, VolumeKind::Volume) if size >= volume.size => None,
                (VolumeState::Ready, VolumeKind::Volume) => Some("larger"),
                (VolumeState::Ready, VolumeKind::Snapshot) => Some("a snapshot"),
                _ => Some("not ready"),
            };
            if let Some(state) = refused {
                return Err(wrong_state(tables::VOLUMES.name(), uid, state, "resized").into());
            }
            if let Some(promise) = rule(change.entries(tables::PROMISES)?)? {
                change.put(tables::PROMISES, uid, &promise)?;
            }
            volume.size = size;
            Ok(change.put(tables::VOLUMES, uid, &volume)?)
        })
    }

    /// Records the intent to remove a volume: nothing can use it from now on. False if there is none. Refused while it
    /// is attached, and while another one is being made from it.
    pub fn begin_delete_volume(&self, uid: &Uid) -> Result<bool, ChangeError> {
        self.record.commit(|change| {
            let Some(mut volume) = change.get(tables::VOLUMES, uid)? else { return Ok(false) };
            if change.get(tables::ATTACHMENTS, uid)?.is_some() {
                return Err(wrong_state(tables::VOLUMES.name(), uid, "attached", "deleted"));
            }
            let of_this = |other: &VolumeEntry| {
                other.state == VolumeState::Creating && other.source.as_ref() == Some(uid)
            };
            if change.any(tables::VOLUMES, of_this)? {
                return Err(wrong_state(tables::VOLUMES.name(), uid, "being copied", "deleted"));
            }
            volume.state = VolumeState::Deleting;
            change.put(tables::VOLUMES, uid, &volume)?;
            Ok(true)
        })
    }

    /// Forgets a volume, after its file or device is gone, with a promise that the node made for it itself. Only one that is
    /// being deleted can be.
    pub fn forget_volume(&self, uid: &Uid) -> Result<(), ChangeError> {
        self.record.commit(|change| {
            if let Some(volume) = change.get(tables::VOLUMES, uid)?
                && volume.state != VolumeState::Deleting
            {
                return Err(wrong_state(tables::VOLUMES.name(), uid, "not being deleted", "forgotten"));
            }
            if change.get(tables::PROMISES, uid)?.is_some_and(|promise| promise.holder.is_local()) {
                change.remove(tables::PROMISES, uid)?;
            }
            change.remove(tables::LAST_USED, uid)?;
            change.remove(tables::VOLUMES, uid).map(|_| ())
        })
    }

    /// Records an attachment: the intent before the device is set up, again with its name once it is. Only a volume
    /// that is ready can be attached.
    pub fn attach(&self, uid: &Uid, attachment: &Attachment) -> Result<(), ChangeError> {
        self.record.commit(|change| {
            let volume = change.require(tables::VOLUMES, uid)?;
            if volume.state != VolumeState::Ready {
                return Err(wrong_state(tables::VOLUMES.name(), uid, "not ready", "attached"));
            }
            change.put(tables::ATTACHMENTS, uid, attachment)
        })
    }

    /// Forgets an attachment, after its device is gone, and records when that was. False if there was none.
    pub fn detached(&self, uid: &Uid, now: Timestamp) -> Result<bool, ChangeError> {
        self.record.commit(|change| {
            let was = change.remove(tables::ATTACHMENTS, uid)?;
            if was {
                change.put(tables::LAST_USED, uid, &now)?;
            }
            Ok(was)
        })
    }

    /// When something last ceased to use what a reservation has; `None` if nothing has.
    pub fn last_used(&self, uid: &Uid) -> Result<Option<Timestamp>, ReadError> {
        self.record.get(tables::LAST_USED, uid)
    }

    /// Records the space of a transfer, before its directory is made. Refused once its promise is released.
    pub fn begin_staging(&self, uid: &Uid, staging: &StagingEntry) -> Result<(), ChangeError> {
        self.record.commit(|change| {
            not_released(change, uid)?;
            if let Some(old) = change.get(tables::STAGING, uid)? {
                not_older(tables::STAGING.name(), uid, old.generation, staging.generation)?;
            }
            change.put(tables::STAGING, uid, staging)
        })
    }

    /// Forgets the space of a transfer, after its directory is gone. False if there was none. Refused for that of a file
    /// that was not to be removed.
    pub fn forget_staging(&self, uid: &Uid) -> Result<bool, ChangeError> {
        self.record.commit(|change| {
            crate::file::forget(change, uid)?;
            change.remove(tables::STAGING, uid)
        })
    }

    fn change_image(
        &self,
        digest: &Digest,
        wanted: &'static str,
        edit: impl FnOnce(&mut ImageEntry) -> Result<(), &'static str>,
    ) -> Result<(), ChangeError> {
        self.record.commit(|change: &Change<'_>| {
            let mut image = change.require(tables::IMAGES, digest)?;
            edit(&mut image).map_err(|state| wrong_state(tables::IMAGES.name(), digest, state, wanted))?;
            change.put(tables::IMAGES, digest, &image)
        })
    }
}

fn begin_volume(change: &Change<'_>, uid: &Uid, volume: &VolumeEntry) -> Result<VolumeEntry, ChangeError> {
    not_released(change, uid)?;
    if let Some(mut old) = change.get(tables::VOLUMES, uid)? {
        not_older(tables::VOLUMES.name(), uid, old.generation, volume.generation)?;
        if old.state == VolumeState::Deleting {
            return Err(wrong_state(tables::VOLUMES.name(), uid, "being deleted", "created"));
        }
        old.generation = volume.generation;
        change.put(tables::VOLUMES, uid, &old)?;
        return Ok(old);
    }
    if let Some(source) = &volume.source
        && change.require(tables::VOLUMES, source)?.state != VolumeState::Ready
    {
        return Err(wrong_state(tables::VOLUMES.name(), source, "not ready", "copied"));
    }
    if let Some(VolumeOrigin::Template { template }) = &volume.origin
        && change.require(tables::TEMPLATES, template)?.state != TemplateState::Attached
    {
        return Err(wrong_state(tables::TEMPLATES.name(), template, "not attached", "started from"));
    }
    let entry = VolumeEntry { state: VolumeState::Creating, ..volume.clone() };
    change.put(tables::VOLUMES, uid, &entry)?;
    Ok(entry)
}

pub(crate) fn not_older(
    table: &'static str,
    uid: &Uid,
    recorded: Generation,
    given: Generation,
) -> Result<(), ChangeError> {
    if given >= recorded {
        return Ok(());
    }
    Err(ChangeError::StaleGeneration { table, key: uid.to_string(), recorded, given })
}

/// What is recorded under a promise, if anything is.
fn holding(change: &Change<'_>, holder: &Uid) -> Result<Option<&'static str>, ChangeError> {
    Ok(if change.get(tables::ATTACHMENTS, holder)?.is_some() {
        Some("that of an attached volume")
    } else if change.get(tables::VOLUMES, holder)?.is_some() {
        Some("that of a volume")
    } else if change.get(tables::FILES, holder)?.is_some() {
        Some("that of a file")
    } else if change.get(tables::STAGING, holder)?.is_some() {
        Some("that of a work directory")
    } else if change.any(tables::IMAGES, |image| image.holder == *holder)? {
        Some("that of an image")
    } else {
        None
    })
}

/// Nothing is begun under a promise that has been given back.
pub(crate) fn not_released(change: &Change<'_>, holder: &Uid) -> Result<(), ChangeError> {
    let promise = change.get(tables::PROMISES, holder)?;
    if promise.is_some_and(|promise| promise.released) {
        return Err(wrong_state(tables::PROMISES.name(), holder, "released", "used"));
    }
    Ok(())
}

pub(crate) fn wrong_state(
    table: &'static str,
    key: &impl ToString,
    state: &str,
    wanted: &'static str,
) -> ChangeError {
    ChangeError::State { table, key: key.to_string(), state: state.to_owned(), wanted }
}
