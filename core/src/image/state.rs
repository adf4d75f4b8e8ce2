//! The states of a staged image, as its node tells them, and the only ways between them.
//!
//! ```text
//! New ──▶ Filling ◀──▶ Failed
//!             ▲ │         │
//!             │ ▼         │
//!            Usable ◀─────┤
//!             ▲ │         │
//!             │ ▼         │
//!            Ready ◀──────┘
//! ```
//! One that can be shown before all of it is there is `Usable` at first; others are `Ready` at once.
//! An image that was all there and is not any more, because its pool's disk is another one, is filled anew: it does not fail.

use crate::states::{IllegalTransition, Machine};

/// The state of a staged image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StagedState {
    /// Its node has said nothing of it yet.
    New,
    /// Its chunks are being fetched.
    Filling,
    /// Volumes start from it, and read from its store what is not there yet.
    Usable,
    /// All of it is there, verified.
    Ready,
    /// It could not be fetched; that is tried again.
    Failed,
}

/// What happens to a staged image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Its chunks are being fetched.
    Fill,
    /// It is shown, with what is there of it.
    Show,
    /// All of it is there, verified.
    Complete,
    /// It could not be fetched.
    Fail,
}

impl Machine for StagedState {
    type Event = Event;
    const KIND: &'static str = "a staged image";
    const STATES: &'static [Self] = &[Self::New, Self::Filling, Self::Usable, Self::Ready, Self::Failed];
    const EVENTS: &'static [Event] = &[Event::Fill, Event::Show, Event::Complete, Event::Fail];

    fn after(self, event: Event) -> Result<Self, IllegalTransition<Self>> {
        match (self, event) {
            (_, Event::Fill) => Ok(Self::Filling),
            (_, Event::Show) => Ok(Self::Usable),
            (_, Event::Complete) => Ok(Self::Ready),
            (Self::New | Self::Filling | Self::Failed, Event::Fail) => Ok(Self::Failed),
            (Self::Usable | Self::Ready, Event::Fail) => Err(IllegalTransition { state: self, event }),
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
| state | Fill | Show | Complete | Fail |
|---|---|---|---|---|
| New | Filling | Usable | Ready | Failed |
| Filling | Filling | Usable | Ready | Failed |
| Usable | Filling | Usable | Ready | |
| Ready | Filling | Usable | Ready | |
| Failed | Filling | Usable | Ready | Failed |
";
        assert_eq!(table::<StagedState>(), expected);
        let error = StagedState::Ready.after(Event::Fail).expect_err("it is filled anew first");
        assert_eq!(error.to_string(), "a staged image that is Ready does not take Fail");
    }
}
