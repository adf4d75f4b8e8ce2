//! The states of a reservation, and the only ways between them.
//!
//! ```text
//! Pending ──▶ Queued ──▶ Promised ──▶ Ready
//!    │  └────────│──────────▲           │
//!    ▼           ▼                      │
//! Refused ◀──────┘        every state ──┴──▶ Releasing
//! ```
//! `Refused` ends only with deletion: promises of a refused reservation may be taken away, and nothing places it again.

use std::fmt::Write as _;

use thiserror::Error;

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

impl Event {
    /// Every event.
    pub const ALL: &'static [Self] = &[Self::Wait, Self::Assign, Self::Prepare, Self::Refuse, Self::Delete];
}

impl ReservationState {
    /// Every state.
    pub const ALL: &'static [Self] = &[Pending, Queued, Promised, Ready, Releasing, Refused];
}

/// An event that a state does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("a reservation that is {state:?} does not take {event:?}")]
pub struct IllegalTransition {
    /// The state.
    pub state: ReservationState,
    /// The event.
    pub event: Event,
}

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
        _ => Err(IllegalTransition { state, event }),
    }
}

/// The table of all pairs, as Markdown for the documentation.
pub fn transitions_table() -> String {
    let mut table = String::from("| state |");
    for event in Event::ALL {
        let _ = write!(table, " {event:?} |");
    }
    table.push_str("\n|---|");
    table.push_str(&"---|".repeat(Event::ALL.len()));
    for state in ReservationState::ALL {
        let _ = write!(table, "\n| {state:?} |");
        for event in Event::ALL {
            match next(*state, *event) {
                Ok(after) => {
                    let _ = write!(table, " {after:?} |");
                }
                Err(_) => table.push_str(" |"),
            }
        }
    }
    table.push('\n');
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_is_as_documented() {
        let table = "\
| state | Wait | Assign | Prepare | Refuse | Delete |
|---|---|---|---|---|---|
| Pending | Queued | Promised | | Refused | Releasing |
| Queued | Queued | Promised | | Refused | Releasing |
| Promised | | Promised | Ready | | Releasing |
| Ready | | Ready | Ready | | Releasing |
| Releasing | | | | | Releasing |
| Refused | | | | Refused | Releasing |
";
        assert_eq!(transitions_table(), table);
    }

    #[test]
    fn an_illegal_pair_says_which() {
        let error = next(Refused, Event::Assign).expect_err("refused is for ever");
        assert_eq!(error.to_string(), "a reservation that is Refused does not take Assign");
    }
}
