//! Reservations: admitted, queued, refused, expired, released.

mod abandoned;
mod assigned;
mod batch;
mod decide;
mod expiry;
mod fit;
mod grow;
mod held;
mod need;
mod outcome;
mod place;
#[cfg(test)]
mod promise_tests;
mod queue;
mod release;
mod room;
mod state;
mod tenant;

pub use abandoned::{Claim, is_abandoned};
pub use assigned::promised;
pub use batch::{Commit, Round, decide_all};
pub use decide::{decide, decide_among};
pub use fit::{Fit, fit};
pub(crate) use held::was_given_back;
pub(crate) use need::wants as wants_image;
pub use need::{ImageNeed, Need, Unmet};
pub use outcome::Outcome;
pub(crate) use place::full;
pub use place::{Candidate, Verdict, candidates, choose};
pub use queue::{Ahead, Backlog, is_waiting};
pub use state::{Event, IllegalTransition, next};
pub use tenant::{ExcessKind, TenantExcess};
