//! How far a template has become local on a node, and the only ways between.
//!
//! ```text
//! Remote ──▶ Hydrating ──▶ Local
//!    │          ▲ │          ▲
//!    │          │ ▼          │
//!    └──────▶ Stalled ───────┘
//! ```
//! Any of them becomes `Remote` again where what was local is lost.

use crate::states::{IllegalTransition, Machine};

/// How far a template has become local.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HydrationState {
    /// Everything is read from the source.
    Remote,
    /// Some of it is local.
    Hydrating,
    /// The kernel cannot record any more what is local. What it has recorded is read if its metadata can still be read; if
    /// not, every read fails.
    Stalled,
    /// All of it is local, durable and recorded. The source is not needed any more.
    Local,
}

/// What happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A part became local.
    Progress,
    /// All of it is local, and recorded.
    Complete,
    /// The kernel could not write its metadata.
    Stop,
    /// What was local is lost.
    Lose,
}

impl Machine for HydrationState {
    type Event = Event;
    const KIND: &'static str = "a template";
    const STATES: &'static [Self] = &[Self::Remote, Self::Hydrating, Self::Stalled, Self::Local];
    const EVENTS: &'static [Event] = &[Event::Progress, Event::Complete, Event::Stop, Event::Lose];

    fn after(self, event: Event) -> Result<Self, IllegalTransition<Self>> {
        match (self, event) {
            (Self::Remote | Self::Hydrating | Self::Stalled, Event::Progress) => Ok(Self::Hydrating),
            (_, Event::Complete) => Ok(Self::Local),
            (Self::Remote | Self::Hydrating | Self::Stalled, Event::Stop) => Ok(Self::Stalled),
            (_, Event::Lose) => Ok(Self::Remote),
            (Self::Local, Event::Progress | Event::Stop) => Err(IllegalTransition { state: self, event }),
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
| state | Progress | Complete | Stop | Lose |
|---|---|---|---|---|
| Remote | Hydrating | Local | Stalled | Remote |
| Hydrating | Hydrating | Local | Stalled | Remote |
| Stalled | Hydrating | Local | Stalled | Remote |
| Local | | Local | | Remote |
";
        assert_eq!(table::<HydrationState>(), expected);
        let error = HydrationState::Local.after(Event::Stop).expect_err("nothing is recorded any more");
        assert_eq!(error.to_string(), "a template that is Local does not take Stop");
    }
}
