//! Transfers, imports among them: placed to be probed, given a reservation, placed where that is, and ended.

mod asked;
mod decide;
mod state;

pub use asked::{Compression, Limits, OutputFormat, SourceFormat, Staging, TransferKind};
pub use decide::decide;
pub use state::Event;
