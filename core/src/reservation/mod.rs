//! Reservations: admitted, queued, refused, released.

mod decide;
mod need;
mod place;
mod queue;
mod release;
mod room;
mod state;

pub use decide::decide;
pub(crate) use need::wants as wants_image;
pub use need::{ImageNeed, Need, Unmet};
pub use place::{Candidate, Verdict, candidates, choose};
pub use queue::{Ahead, is_waiting};
pub use state::{Event, IllegalTransition, next, transitions_table};
