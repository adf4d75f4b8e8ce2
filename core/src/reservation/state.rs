//! The states of a reservation, and the only ways between them.
//!
//! ```text
//! Pending ──▶ Queued ──▶ Promised ──▶ Ready
//!    │  └────────│──────────▲           │
//!    ▼           ▼                      │
//! Refused ◀──────┘        every state ──┴──▶ Releasing
//! ```
//! `Refused` ends only with deletion: promises of a refused reservation may be taken away, and nothing places it again.

use crate::states::{self, Machine};
use crate::view::ReservationState::{self, Pending, Promised, Queued, Ready, Refused, Releasing};

/// What happens to a reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// It has to wait.
    Wait,
    /// It was assigned.
    Assign,
    /// The node has made it ready.
    Prepare,
    /// It will not be met.
    Refuse,
    /// It is being deleted.
    Delete,
}

impl Machine for ReservationState {
    type Event = Event;
    const KIND: &'static str = "a reservation";
    const STATES: &'static [Self] = &[Pending, Queued, Promised, Ready, Releasing, Refused];
    const EVENTS: &'static [Event] =
        &[Event::Wait, Event::Assign, Event::Prepare, Event::Refuse, Event::Delete];

    fn after(self, event: Event) -> Result<Self, IllegalTransition> {
        next(self, event)
    }
}

/// An event that a state does not take.
pub type IllegalTransition = states::IllegalTransition<ReservationState>;

/// The state after an event. An event that has already had its effect changes nothing.
///
/// # Errors
/// [`IllegalTransition`] for every pair that is not in the table.
pub const fn next(state: ReservationState, event: Event) -> Result<ReservationState, IllegalTransition> {
    match (state, event) {
        (Pending | Queued, Event::Wait) => Ok(Queued),
        (Pending | Queued | Promised, Event::Assign) => Ok(Promised),
        (Promised | Ready, Event::Prepare) | (Ready, Event::Assign) => Ok(Ready),
        (Pending | Queued | Refused, Event::Refuse) => Ok(Refused),
        (_, Event::Delete) => Ok(Releasing),
        _ => Err(states::IllegalTransition { state, event }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::states::table;

    #[test]
    fn every_pair_is_as_documented() {
        let expected = "\
| state | Wait | Assign | Prepare | Refuse | Delete |
|---|---|---|---|---|---|
| Pending | Queued | Promised | | Refused | Releasing |
| Queued | Queued | Promised | | Refused | Releasing |
| Promised | | Promised | Ready | | Releasing |
| Ready | | Ready | Ready | | Releasing |
| Releasing | | | | | Releasing |
| Refused | | | | Refused | Releasing |
";
        assert_eq!(table::<ReservationState>(), expected);
    }

    #[test]
    fn an_illegal_pair_says_which() {
        let error = next(Refused, Event::Assign).expect_err("refused is for ever");
        assert_eq!(error.to_string(), "a reservation that is Refused does not take Assign");
    }
}
