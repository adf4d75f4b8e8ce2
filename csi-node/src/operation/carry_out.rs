//! A stand-in with the agreed signature, to be replaced as a whole by the library at the merge.

use berth_core::reason::Reason;

use super::{Operation, Outcome, PoolLine, PoolLineState, PoolSpace, Refusal};
use crate::agent::pools::Pools;

/// Lists the open pools, and refuses everything else.
///
/// # Errors
/// [`Reason::NotImplemented`].
pub fn carry_out(pools: &Pools, operation: &Operation) -> Result<Outcome, Refusal> {
    if !matches!(operation, Operation::PoolList {}) {
        let message = format!("{} is not carried out yet", operation.name());
        return Err(Refusal { reason: Reason::NotImplemented, message });
    }
    let line = |pool: std::sync::Arc<crate::agent::pools::OpenPool>| PoolLine {
        pool: Some(pool.name.clone()),
        area: pool.spec.uid.clone(),
        backend: Some(pool.spec.backend.clone()),
        state: PoolLineState::Open,
        message: None,
        space: Some(PoolSpace {
            total: pool.area.total(),
            promised: berth_core::units::Bytes::ZERO,
            used: pool.area.used(),
        }),
    };
    Ok(Outcome::Pools(pools.all().into_iter().map(line).collect()))
}
