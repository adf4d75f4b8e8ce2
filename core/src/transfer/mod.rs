//! Transfers, imports among them: placed to be probed, given a reservation, placed where that is, and ended.

mod asked;
mod decide;
mod place;
mod route;
mod state;
mod time;

pub use asked::{Compression, Limits, OutputFormat, SourceFormat, Staging, TransferId, TransferKind};
pub use decide::decide;
pub use route::{Chosen, Found, NoRoute, choose};
pub use state::Event;
