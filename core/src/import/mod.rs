//! Imports: placed to be probed, given a reservation, placed where that is, and ended.

mod decide;
mod state;

pub use decide::decide;
pub use state::Event;

use crate::units::Bytes;

/// Bounds of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The largest virtual size.
    pub virtual_size: Bytes,
    /// The most bytes that the source may have.
    pub bytes: Bytes,
    /// How long the source may send nothing, in seconds.
    pub stall_timeout: u64,
    /// How often a fault that passes is tried again.
    pub retries: u32,
}
