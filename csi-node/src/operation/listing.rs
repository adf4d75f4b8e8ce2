//! What there is.

use berth_core::units::Bytes;
use berth_record::{VolumeOrigin, VolumeState, tables};

use super::error::OperationError;
use super::{OriginName, Outcome, PoolLine, PoolLineState, PoolSpace, VolumeKind, VolumeLine, found};
use crate::agent::pools::{OpenPool, Pools};
use crate::area::templates;

/// The pools of this node, and the areas that belong to none of them.
pub fn pools(pools: &Pools) -> Result<Outcome, OperationError> {
    let mut lines = Vec::new();
    for pool in pools.all() {
        lines.push(open_pool(&pool)?);
    }
    for pool in pools.closed()? {
        lines.push(PoolLine {
            area: pool.spec.area().clone(),
            pool: Some(pool.name),
            backend: Some(pool.spec.backend),
            state: PoolLineState::Failed,
            message: Some(pool.failure.map_or_else(
                || "nobody has tried to open it".to_owned(),
                |(reason, message)| format!("{reason}: {message}"),
            )),
            space: None,
        });
    }
    lines.sort_by(|one, other| one.pool.cmp(&other.pool));
    let known: Vec<_> = lines.iter().map(|line| line.area.clone()).collect();
    lines.extend(found::areas(pools, &known)?);
    Ok(Outcome::Pools(lines))
}

fn open_pool(pool: &OpenPool) -> Result<PoolLine, OperationError> {
    let promised: Bytes =
        pool.promises()?.1.values().filter(|promise| !promise.released).map(|promise| promise.data).sum();
    let space = PoolSpace { total: pool.area.total(), promised, used: pool.area.used() };
    Ok(PoolLine {
        pool: Some(pool.name.clone()),
        area: pool.spec.area().clone(),
        backend: Some(pool.spec.backend.clone()),
        state: PoolLineState::Open,
        message: pool.area.advisory().map(|advisory| format!("Advisory: {advisory}")),
        space: Some(space),
    })
}

/// The volumes, snapshots and templates of a pool.
pub fn volumes(pool: &OpenPool) -> Result<Outcome, OperationError> {
    let record = pool.record.record();
    let mut lines = Vec::new();
    for (uid, template) in record.entries(tables::TEMPLATES)? {
        lines.push(VolumeLine {
            kind: VolumeKind::Template,
            size: template.virtual_size,
            mapped: None,
            origin: None,
            device: templates::device(pool, &uid).ok().flatten(),
            labels: [("file".to_owned(), template.file.display().to_string())].into(),
            uid,
        });
    }
    for (uid, volume) in record.entries(tables::VOLUMES)? {
        if volume.state != VolumeState::Ready {
            continue; // half made or half deleted
        }
        let attachment = record.get(tables::ATTACHMENTS, &uid)?;
        lines.push(VolumeLine {
            kind: kind_of(volume.kind),
            size: volume.size,
            mapped: pool.area.occupied(&uid),
            origin: volume.origin.as_ref().map(origin_name),
            device: attachment.and_then(|attachment| attachment.loop_device),
            labels: volume.labels,
            uid,
        });
    }
    Ok(Outcome::Volumes(lines))
}

/// The same as the record has it.
pub const fn kind_of(kind: berth_record::VolumeKind) -> VolumeKind {
    match kind {
        berth_record::VolumeKind::Volume => VolumeKind::Volume,
        berth_record::VolumeKind::Snapshot => VolumeKind::Snapshot,
    }
}

/// The same as the record has it.
pub fn origin_name(origin: &VolumeOrigin) -> OriginName {
    match origin {
        VolumeOrigin::Image(digest) => OriginName::Image(*digest),
        VolumeOrigin::Template { template } => OriginName::Template(template.clone()),
    }
}
