//! The states of a transfer, and the only ways between them. An import is a transfer whose destination is a template.
//!
//! ```text
//!    ┌───────────┬───────────┬──────── Suspended ─────────┐
//!    ▼           ▼           ▼             ▲              ▼
//! Pending ──▶ Probing ──▶ Queued ──▶ Working ──▶ Done ◀── Failed
//!    ▲           │           │          │                   ▲
//!    └───────────┴───────────┴──────────┴───────────────────┘
//! ```
//! Until it has ended, any of them may follow any other: what a node has found out may be lost with it. `Done` is for ever.
//! `Failed` ends if a person has it tried again, or if its node had finished all the same. An import is never `Suspended`.

use super::TransferKind;
use crate::states::{IllegalTransition, Machine, table_named};
use crate::view::TransferState::{self, Done, Failed, Pending, Probing, Queued, Suspended, Working};

/// What happens to a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// There is nobody who could work on it, or no image store.
    Wait,
    /// A node reads the head of the source.
    Probe,
    /// It waits for its space.
    Reserve,
    /// A node works on it.
    Work,
    /// A person has it pause.
    Suspend,
    /// All of it is at its destination.
    Finish,
    /// It cannot succeed.
    Fail,
    /// A person has it tried again.
    Retry,
}

impl Machine for TransferState {
    type Event = Event;
    const KIND: &'static str = "a transfer";
    const STATES: &'static [Self] = &[Pending, Probing, Queued, Working, Suspended, Done, Failed];
    const EVENTS: &'static [Event] = &[
        Event::Wait,
        Event::Probe,
        Event::Reserve,
        Event::Work,
        Event::Suspend,
        Event::Finish,
        Event::Fail,
        Event::Retry,
    ];

    fn after(self, event: Event) -> Result<Self, IllegalTransition<Self>> {
        match (self, event) {
            (_, Event::Finish) => Ok(Done),
            (Failed, Event::Retry) => Ok(Pending),
            (Failed, Event::Fail) => Ok(Failed),
            (Done | Failed, _) | (_, Event::Retry) => Err(IllegalTransition { state: self, event }),
            (_, Event::Wait) => Ok(Pending),
            (_, Event::Probe) => Ok(Probing),
            (_, Event::Reserve) => Ok(Queued),
            (_, Event::Work) => Ok(Working),
            (_, Event::Suspend) => Ok(Suspended),
            (_, Event::Fail) => Ok(Failed),
        }
    }
}

impl TransferKind {
    /// The name of a state in the API; `None` of one that objects of this kind are never in.
    pub const fn name_of(self, state: TransferState) -> Option<&'static str> {
        Some(match (self, state) {
            (_, Pending) => "Pending",
            (_, Probing) => "Probing",
            (_, Queued) => "Queued",
            (Self::Import, Working) => "Importing",
            (Self::Transfer, Working) => "Transferring",
            (Self::Import, Suspended) => return None,
            (Self::Transfer, Suspended) => "Suspended",
            (Self::Import, Done) => "Ready",
            (Self::Transfer, Done) => "Succeeded",
            (_, Failed) => "Failed",
        })
    }

    /// The table of all pairs as objects of this kind show it, as Markdown for the documentation.
    pub fn table(self) -> String {
        table_named(|state| self.name_of(state).map(str::to_owned))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_is_as_documented() {
        let expected = "\
| state | Wait | Probe | Reserve | Work | Suspend | Finish | Fail | Retry |
|---|---|---|---|---|---|---|---|---|
| Pending | Pending | Probing | Queued | Transferring | Suspended | Succeeded | Failed | |
| Probing | Pending | Probing | Queued | Transferring | Suspended | Succeeded | Failed | |
| Queued | Pending | Probing | Queued | Transferring | Suspended | Succeeded | Failed | |
| Transferring | Pending | Probing | Queued | Transferring | Suspended | Succeeded | Failed | |
| Suspended | Pending | Probing | Queued | Transferring | Suspended | Succeeded | Failed | |
| Succeeded | | | | | | Succeeded | | |
| Failed | | | | | | Succeeded | Failed | Pending |
";
        assert_eq!(TransferKind::Transfer.table(), expected);
        let error = Done.after(Event::Fail).expect_err("done is for ever");
        assert_eq!(error.to_string(), "a transfer that is Done does not take Fail");
    }

    #[test]
    fn every_pair_of_an_import_is_as_documented() {
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
        assert_eq!(TransferKind::Import.table(), expected);
    }
}
