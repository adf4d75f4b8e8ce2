//! What is recorded against what is there.

use super::Outcome;
use super::error::OperationError;
use crate::agent::pools::OpenPool;

/// Everything about which record and kernel do not agree.
pub fn check(pool: &OpenPool) -> Result<Outcome, OperationError> {
    Ok(Outcome::Findings(pool.area.check(&pool.record)?))
}
