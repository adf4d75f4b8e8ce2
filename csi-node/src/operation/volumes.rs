//! Volumes and snapshots: made, copied, made larger, deleted.

use std::collections::BTreeMap;

use berth_core::ids::Uid;
use berth_core::ledger::Class;
use berth_core::units::{Bytes, Generation};
use berth_record::{ImageState, PromiseEntry, VolumeEntry, VolumeKind, VolumeOrigin, VolumeState, tables};

use super::error::OperationError;
use super::listing::{kind_of, origin_name};
use super::{OriginName, Outcome, space};
use crate::agent::pools::OpenPool;
use crate::agent::volumes;

/// Makes a volume that is blank, or starts as an image or a template.
pub fn create(
    pool: &OpenPool,
    uid: &Uid,
    size: Bytes,
    origin: Option<&OriginName>,
    labels: &BTreeMap<String, String>,
) -> Result<Outcome, OperationError> {
    let origin = origin.map(|origin| match origin {
        OriginName::Image(digest) => VolumeOrigin::Image(*digest),
        OriginName::Template(template) => VolumeOrigin::Template { template: template.clone() },
    });
    let wanted = entry(pool, uid, size, origin, None, labels.clone());
    if recorded(pool, uid)?.is_none() {
        require_origin(pool, uid, &wanted)?;
    }
    make(pool, uid, &wanted)
}

/// Makes a volume that starts as another one, or a snapshot, is now.
pub fn copy(
    pool: &OpenPool,
    uid: &Uid,
    source: &Uid,
    size: Option<Bytes>,
) -> Result<Outcome, OperationError> {
    if let Some(again) = same_copy(pool, uid, source, VolumeKind::Volume, size)? {
        return make(pool, uid, &again);
    }
    let from = found(pool, source, "cloned as a volume")?;
    let size = size.unwrap_or(from.size);
    if size < from.size {
        let why = format!("{source}, which it is to start as, has {}", from.size);
        return Err(OperationError::Size { uid: uid.clone(), size, why });
    }
    make(pool, uid, &entry(pool, uid, size, from.origin, Some(source), from.labels))
}

/// Keeps a volume as it is now.
pub fn snapshot(pool: &OpenPool, uid: &Uid, source: &Uid) -> Result<Outcome, OperationError> {
    if let Some(again) = same_copy(pool, uid, source, VolumeKind::Snapshot, None)? {
        return make(pool, uid, &again);
    }
    let from = found(pool, source, "kept as a snapshot")?;
    let wanted = entry(pool, uid, from.size, from.origin, Some(source), from.labels);
    make(pool, uid, &VolumeEntry { kind: VolumeKind::Snapshot, ..wanted })
}

/// Makes a volume larger: what is recorded first.
pub fn resize(pool: &OpenPool, uid: &Uid, size: Bytes) -> Result<Outcome, OperationError> {
    let volume = found(pool, uid, "made larger")?;
    if volume.kind == VolumeKind::Snapshot {
        return Err(OperationError::IsSnapshot { uid: uid.clone(), action: "made larger" });
    }
    require_size(uid, size)?;
    if size < volume.size {
        let why = format!("it has {}, and no volume is made smaller", volume.size);
        return Err(OperationError::Size { uid: uid.clone(), size, why });
    }
    let is_copy = volume.source.is_some();
    pool.record.volume_resized_under(uid, size, |promises| permit(pool, uid, size, is_copy, promises))?;
    pool.area.resize_volume(&pool.record, uid, size)?;
    Ok(Outcome::Done)
}

/// Deletes a volume or snapshot. One that is not there is deleted already.
pub fn destroy(pool: &OpenPool, uid: &Uid) -> Result<Outcome, OperationError> {
    require_no_template(pool, uid, "deleted")?;
    if recorded(pool, uid)?.is_none() {
        return Ok(Outcome::Done);
    }
    let promise = pool.promises()?.1.remove(uid);
    if let Some(PromiseEntry { holder, released: false, .. }) = promise
        && !holder.is_local()
    {
        // Its node would make it again, empty.
        let by = format!("{} {}/{}: delete that", holder.kind, holder.namespace, holder.name);
        return Err(OperationError::InUse { what: format!("volume {uid}"), by });
    }
    if let Some(attachment) = pool.record.record().get(tables::ATTACHMENTS, uid)? {
        let shown = attachment.loop_device.unwrap_or(attachment.backing_file);
        let by = format!("whoever attached it, as {}: detach it first", shown.display());
        return Err(OperationError::InUse { what: format!("volume {uid}"), by });
    }
    require_unused(pool, uid)?;
    volumes::remove(pool, uid)?;
    Ok(Outcome::Done)
}

/// Refuses while somebody has a device of the volume open.
pub fn require_unused(pool: &OpenPool, uid: &Uid) -> Result<(), OperationError> {
    let users = pool.area.users(uid)?;
    if users.is_empty() {
        return Ok(());
    }
    Err(OperationError::InUse { what: format!("volume {uid}"), by: users.join(", ") })
}

/// What is recorded of a volume, in whatever state.
pub fn recorded(pool: &OpenPool, uid: &Uid) -> Result<Option<VolumeEntry>, OperationError> {
    Ok(pool.record.record().get(tables::VOLUMES, uid)?)
}

/// Refuses what no template allows.
pub fn require_no_template(pool: &OpenPool, uid: &Uid, action: &'static str) -> Result<(), OperationError> {
    match pool.record.record().get(tables::TEMPLATES, uid)? {
        Some(_) => Err(OperationError::IsTemplate { uid: uid.clone(), action }),
        None => Ok(()),
    }
}

/// A volume or snapshot that can be used for what no template allows.
pub fn found(pool: &OpenPool, uid: &Uid, action: &'static str) -> Result<VolumeEntry, OperationError> {
    require_no_template(pool, uid, action)?;
    let Some(volume) = recorded(pool, uid)? else {
        return Err(OperationError::NoVolume { pool: pool.name.clone(), uid: uid.clone() });
    };
    let half = |half| OperationError::HalfDone { uid: uid.clone(), half };
    match volume.state {
        VolumeState::Creating => Err(half("made")),
        VolumeState::Deleting => Err(half("deleted")),
        VolumeState::Ready if !pool.area.has_volume(uid) => {
            Err(OperationError::Lost { uid: uid.clone(), path: pool.area.volume(uid) })
        }
        VolumeState::Ready => Ok(volume),
    }
}

fn entry(
    pool: &OpenPool,
    uid: &Uid,
    size: Bytes,
    origin: Option<VolumeOrigin>,
    source: Option<&Uid>,
    labels: BTreeMap<String, String>,
) -> VolumeEntry {
    VolumeEntry {
        generation: Generation::FIRST,
        path: pool.area.recorded_path(uid),
        size,
        origin,
        kind: VolumeKind::Volume,
        source: source.cloned(),
        state: VolumeState::Creating,
        labels,
    }
}

/// A copy of this name that is there already, or half made: its source may be gone by now, or have another size.
fn same_copy(
    pool: &OpenPool,
    uid: &Uid,
    source: &Uid,
    kind: VolumeKind,
    size: Option<Bytes>,
) -> Result<Option<VolumeEntry>, OperationError> {
    let Some(old) = recorded(pool, uid)? else { return Ok(None) };
    let same = old.source.as_ref() == Some(source) && old.kind == kind;
    if !same || size.is_some_and(|size| size != old.size) {
        return Err(different(uid, &old));
    }
    Ok(Some(old))
}

fn different(uid: &Uid, old: &VolumeEntry) -> OperationError {
    let origin = old.origin.as_ref().map(|origin| match origin_name(origin) {
        OriginName::Image(digest) => format!("image {digest}"),
        OriginName::Template(template) => format!("template {template}"),
    });
    let of = old.source.as_ref().map(ToString::to_string).or(origin);
    OperationError::Different { uid: uid.clone(), kind: kind_of(old.kind), size: old.size, of }
}

/// Records what is to be made, with its promise, and makes it.
fn make(pool: &OpenPool, uid: &Uid, wanted: &VolumeEntry) -> Result<Outcome, OperationError> {
    require_name(uid)?;
    require_size(uid, wanted.size)?;
    require_no_template(pool, uid, "made again as a volume")?;
    let generation = pool.promises()?.1.get(uid).map_or(Generation::FIRST, |promise| promise.generation);
    let wanted = VolumeEntry { generation, ..wanted.clone() };
    if let Some(old) = recorded(pool, uid)? {
        let shape =
            |volume: &VolumeEntry| (volume.size, volume.kind, volume.origin.clone(), volume.source.clone());
        if shape(&old) != shape(&wanted) {
            return Err(different(uid, &old));
        }
        if old.state == VolumeState::Deleting {
            return Err(OperationError::HalfDone { uid: uid.clone(), half: "deleted" });
        }
    }
    let begun = pool.record.begin_volume_under(uid, &wanted, |promises| {
        permit(pool, uid, wanted.size, wanted.source.is_some(), promises)
    })?;
    volumes::finish(pool, uid, &begun)?;
    Ok(Outcome::Done)
}

/// The promise that a volume of this size is made under, if it needs a new one.
fn permit(
    pool: &OpenPool,
    uid: &Uid,
    size: Bytes,
    is_copy: bool,
    promises: Vec<(Uid, PromiseEntry)>,
) -> Result<Option<PromiseEntry>, OperationError> {
    let held = space::held(promises);
    let books = space::books(pool, Class::Volumes, &held)?;
    let mut charge = pool.area.volume_charge(size);
    if is_copy && !books.has_ledger {
        charge.metadata = charge.metadata.saturating_add(pool.area.copy_metadata(size));
    }
    space::promise(&books, uid, charge)
}

/// Refuses a name that no device could have.
fn require_name(uid: &Uid) -> Result<(), OperationError> {
    let groups = uid.as_str().split('-').map(str::len);
    let hex = |byte: u8| byte == b'-' || byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if groups.eq([8, 4, 4, 4, 12]) && uid.as_str().bytes().all(hex) {
        return Ok(());
    }
    Err(OperationError::Name(uid.clone()))
}

fn require_size(uid: &Uid, size: Bytes) -> Result<(), OperationError> {
    if size == Bytes::ZERO || !size.0.is_multiple_of(512) {
        let why = "not a positive multiple of 512 bytes".to_owned();
        return Err(OperationError::Size { uid: uid.clone(), size, why });
    }
    Ok(())
}

/// What the volume is to start from is there, and not larger.
fn require_origin(pool: &OpenPool, uid: &Uid, wanted: &VolumeEntry) -> Result<(), OperationError> {
    let record = pool.record.record();
    let (of, has) = match &wanted.origin {
        None => return Ok(()),
        Some(VolumeOrigin::Image(digest)) => {
            let image = record.get(tables::IMAGES, digest)?;
            let image = image.filter(|image| match (image.state, pool.area.lazy()) {
                (ImageState::Complete, _) => pool.area.has_image(digest),
                (ImageState::Shown { .. }, Some(lazy)) => lazy.is_shown(digest),
                _ => false,
            });
            let missing = || OperationError::NoImage { pool: pool.name.clone(), digest: *digest };
            (format!("image {digest}"), image.ok_or_else(missing)?.virtual_size)
        }
        Some(VolumeOrigin::Template { template }) => {
            let found = record.get(tables::TEMPLATES, template)?;
            let found = found.filter(|found| found.state == berth_record::TemplateState::Attached);
            let missing = || OperationError::NoVolume { pool: pool.name.clone(), uid: template.clone() };
            (format!("template {template}"), found.ok_or_else(missing)?.virtual_size)
        }
    };
    if has <= wanted.size {
        return Ok(());
    }
    let why = format!("{of}, which it is to start from, has {has}");
    Err(OperationError::Size { uid: uid.clone(), size: wanted.size, why })
}
