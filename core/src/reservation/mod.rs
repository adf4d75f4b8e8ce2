//! Reservations: admitted, queued, refused, expired, released.

mod decide;
mod expiry;
mod fit;
mod need;
mod outcome;
mod place;
mod queue;
mod release;
mod room;
mod state;
mod tenant;

pub use decide::{decide, decide_among};
pub use fit::{Fit, fit};
pub(crate) use need::wants as wants_image;
pub use need::{ImageNeed, Need, Unmet};
pub use outcome::{Outcome, Told, outcome};
pub use place::{Candidate, Verdict, candidates, choose};
pub use queue::{Ahead, Backlog, is_waiting};
pub use state::{Event, IllegalTransition, next, transitions_table};
pub use tenant::{ExcessKind, TenantExcess};
