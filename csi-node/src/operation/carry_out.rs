//! One operation, one call.

use std::sync::Arc;

use berth_core::ids::PoolName;
use berth_core::reason::Reason;

use super::error::OperationError;
use super::{Operation, Outcome, Refusal, attachments, check, listing, map, pool_life, volumes};
use crate::agent::pools::{OpenPool, Pools};
use crate::area::templates;

/// Carries out one operation. Blocks, for as long as making a file system or copying an image takes.
///
/// # Errors
/// Nothing is half done for the caller: the same operation, repeated, goes on.
pub fn carry_out(pools: &Pools, operation: &Operation) -> Result<Outcome, Refusal> {
    Ok(attempt(pools, operation)?)
}

fn attempt(pools: &Pools, operation: &Operation) -> Result<Outcome, OperationError> {
    match operation {
        Operation::PoolCreate { pool, uid, backend } => pool_life::create(pools, pool, uid, backend),
        Operation::PoolIntroduce { pool, area, uid, backend } => {
            pool_life::introduce(pools, pool, area, uid.as_ref(), backend)
        }
        Operation::PoolForget { pool } => pool_life::forget(pools, pool),
        Operation::PoolDestroy { pool, with_contents } => pool_life::destroy(pools, pool, *with_contents),
        Operation::PoolGrow { pool, class, size } => {
            changing(pools, pool, |pool| pool_life::grow(pool, *class, *size))
        }
        Operation::PoolCheck { pool } => changing(pools, pool, check::check),
        Operation::PoolList {} => listing::pools(pools),
        Operation::TemplateAttach { pool, template, file, format } => changing(pools, pool, |pool| {
            let device = templates::attach(pool, pools.data_plane(), template, file, format.as_deref())?;
            Ok(Outcome::Device(device))
        }),
        Operation::TemplateDetach { pool, template } => changing(pools, pool, |pool| {
            templates::detach(pool, pools.data_plane(), template)?;
            Ok(Outcome::Done)
        }),
        Operation::VolumeCreate { pool, volume, size, origin, labels } => {
            changing(pools, pool, |pool| volumes::create(pool, volume, *size, origin.as_ref(), labels))
        }
        Operation::VolumeClone { pool, volume, source, size } => {
            changing(pools, pool, |pool| volumes::copy(pool, volume, source, *size))
        }
        Operation::VolumeSnapshot { pool, snapshot, source } => {
            changing(pools, pool, |pool| volumes::snapshot(pool, snapshot, source))
        }
        Operation::VolumeAttach { pool, volume, read_only } => {
            changing(pools, pool, |pool| attachments::attach(pool, volume, *read_only))
        }
        Operation::VolumeDetach { pool, volume } => {
            changing(pools, pool, |pool| attachments::detach(pool, volume))
        }
        Operation::VolumeResize { pool, volume, size } => {
            changing(pools, pool, |pool| volumes::resize(pool, volume, *size))
        }
        Operation::VolumeDestroy { pool, volume } => {
            changing(pools, pool, |pool| volumes::destroy(pool, volume))
        }
        Operation::VolumeMap { pool, volume, offset } => map::map(&*open(pools, pool)?, volume, *offset),
        Operation::VolumeDelta { pool, old, volume, offset } => {
            map::delta(&*open(pools, pool)?, old, volume, *offset)
        }
        Operation::VolumeList { pool } => listing::volumes(&*open(pools, pool)?),
    }
}

/// The open pool of this name.
fn open(pools: &Pools, name: &PoolName) -> Result<Arc<OpenPool>, OperationError> {
    if let Some(pool) = pools.get(name) {
        return Ok(pool);
    }
    if pools.unopened([])?.contains(name) {
        let failure = pools.failure(name);
        let (reason, message) =
            failure.unwrap_or((Reason::PoolAreaFailed, "nobody has tried to open it".to_owned()));
        return Err(OperationError::NotOpen { pool: name.clone(), reason, message });
    }
    Err(OperationError::NoPool(name.clone()))
}

/// Works in an open pool, alone.
fn changing(
    pools: &Pools,
    name: &PoolName,
    work: impl FnOnce(&OpenPool) -> Result<Outcome, OperationError>,
) -> Result<Outcome, OperationError> {
    let pool = open(pools, name)?;
    let _turn = pool.turn();
    work(&pool)
}
