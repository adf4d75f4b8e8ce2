//! The states of an import, and the only ways between them.
//!
//! ```text
//! Pending ──▶ Probing ──▶ Queued ──▶ Importing ──▶ Ready ◀── Failed
//!    ▲           │           │           │                     ▲
//!    └───────────┴───────────┴───────────┴─────────────────────┘
//! ```
//! Until it has ended, any of them may follow any other: what a node has found out may be lost with it. `Ready` is for ever.
//! `Failed` ends if a person has it tried again, or if its node had published the image all the same.

use crate::states::{IllegalTransition, Machine};
use crate::view::ImportState::{self, Failed, Importing, Pending, Probing, Queued, Ready};

/// What happens to an import.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// There is nobody who could work on it, or no image store.
    Wait,
    /// A node reads the head of the source.
    Probe,
    /// It waits for its space.
    Reserve,
    /// A node imports it.
    Work,
    /// It is durable.
    Finish,
    /// It cannot succeed.
    Fail,
    /// A person has it tried again.
    Retry,
}

impl Machine for ImportState {
    type Event = Event;
    const KIND: &'static str = "an import";
    const STATES: &'static [Self] = &[Pending, Probing, Queued, Importing, Ready, Failed];
    const EVENTS: &'static [Event] =
        &[Event::Wait, Event::Probe, Event::Reserve, Event::Work, Event::Finish, Event::Fail, Event::Retry];

    fn after(self, event: Event) -> Result<Self, IllegalTransition<Self>> {
        match (self, event) {
            (Pending | Probing | Queued | Importing, Event::Wait) | (Failed, Event::Retry) => Ok(Pending),
            (Pending | Probing | Queued | Importing, Event::Probe) => Ok(Probing),
            (Pending | Probing | Queued | Importing, Event::Reserve) => Ok(Queued),
            (Pending | Probing | Queued | Importing, Event::Work) => Ok(Importing),
            (_, Event::Finish) => Ok(Ready),
            (Pending | Probing | Queued | Importing | Failed, Event::Fail) => Ok(Failed),
            _ => Err(IllegalTransition { state: self, event }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::states::table;

    #[test]
    fn every_pair_is_as_documented() {
        let expected = "\
| state | Wait | Probe | Reserve | Work | Finish | Fail | Retry |
|---|---|---|---|---|---|---|---|
| Pending | Pending | Probing | Queued | Importing | Ready | Failed | |
| Probing | Pending | Probing | Queued | Importing | Ready | Failed | |
| Queued | Pending | Probing | Queued | Importing | Ready | Failed | |
| Importing | Pending | Probing | Queued | Importing | Ready | Failed | |
| Ready | | | | | Ready | | |
| Failed | | | | | Ready | Failed | Pending |
";
        assert_eq!(table::<ImportState>(), expected);
        let error = Ready.after(Event::Fail).expect_err("ready is for ever");
        assert_eq!(error.to_string(), "an import that is Ready does not take Fail");
    }
}
