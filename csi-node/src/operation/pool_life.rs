//! Pools as a whole.

use berth_core::ids::{PoolName, Uid};
use berth_core::ledger::Class;
use berth_core::local;
use berth_core::units::Bytes;

use super::error::OperationError;
use super::{Outcome, space};
use crate::agent::pools::{OpenPool, PoolSpec, Pools};
use crate::area::Backend;

/// Makes a pool.
pub fn create(
    pools: &Pools,
    name: &PoolName,
    uid: &Uid,
    backend: &Backend,
) -> Result<Outcome, OperationError> {
    pools.create(name, &PoolSpec::new(uid.clone(), backend.clone()))?;
    Ok(Outcome::Done)
}

/// Takes an area over.
pub fn introduce(
    pools: &Pools,
    name: &PoolName,
    area: &Uid,
    uid: Option<&Uid>,
    backend: &Backend,
) -> Result<Outcome, OperationError> {
    pools.introduce(name, area, uid, backend)?;
    Ok(Outcome::Done)
}

/// Lets a pool go.
pub fn forget(pools: &Pools, name: &PoolName) -> Result<Outcome, OperationError> {
    pools.forget(name)?;
    Ok(Outcome::Done)
}

/// Deletes a pool.
pub fn destroy(pools: &Pools, name: &PoolName, with_contents: bool) -> Result<Outcome, OperationError> {
    pools.destroy(name, with_contents)?;
    Ok(Outcome::Done)
}

/// Makes a kernel pool larger, as far as nobody else was promised the space.
pub fn grow(pool: &OpenPool, class: Class, size: Bytes) -> Result<Outcome, OperationError> {
    let held = space::held(pool.promises()?.1);
    let books = space::books(pool, class, &held)?;
    let most = local::most_ahead(&books, class);
    if size > most && pool.area.kernel_pools().is_some() {
        let class = match class {
            Class::Images => "images",
            Class::Volumes => "volumes",
        };
        let (pool, has_ledger) = (pool.name.clone(), books.has_ledger);
        return Err(OperationError::Ahead { pool, class, size, most, has_ledger });
    }
    pool.area.grow(class, size)?;
    Ok(Outcome::Done)
}
