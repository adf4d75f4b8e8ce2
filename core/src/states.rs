//! What may become of what: the states of a kind as one table, from which the documentation and the API server's own rules
//! are made.

use std::fmt::{self, Debug, Write as _};

/// The states of a kind, what happens to it, and the only ways between its states.
pub trait Machine: Copy + Debug + PartialEq + 'static {
    /// What happens to it.
    type Event: Copy + Debug + PartialEq + 'static;
    /// The kind, for people.
    const KIND: &'static str;
    /// Every state.
    const STATES: &'static [Self];
    /// Every event.
    const EVENTS: &'static [Self::Event];

    /// The state after an event. An event that has already had its effect changes nothing.
    ///
    /// # Errors
    /// [`IllegalTransition`] for every pair that is not in the table.
    fn after(self, event: Self::Event) -> Result<Self, IllegalTransition<Self>>;
}

/// An event that a state does not take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IllegalTransition<M: Machine> {
    /// The state.
    pub state: M,
    /// The event.
    pub event: M::Event,
}

impl<M: Machine> fmt::Display for IllegalTransition<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} that is {:?} does not take {:?}", M::KIND, self.state, self.event)
    }
}

impl<M: Machine> std::error::Error for IllegalTransition<M> {}

/// The table of all pairs, as Markdown for the documentation. An empty field is an event that the state does not take.
pub fn table<M: Machine>() -> String {
    table_named(|state: M| Some(format!("{state:?}")))
}

/// The same of a kind that has names of its own for the states. One without a name is left out, and so is an event that leads
/// nowhere else.
pub fn table_named<M: Machine>(name: impl Fn(M) -> Option<String>) -> String {
    let states: Vec<(M, String)> =
        M::STATES.iter().filter_map(|state| Some((*state, name(*state)?))).collect();
    let leads = |state: M, event: M::Event| state.after(event).ok().and_then(&name);
    let events: Vec<M::Event> = M::EVENTS
        .iter()
        .copied()
        .filter(|event| states.iter().any(|(state, _)| leads(*state, *event).is_some()))
        .collect();
    let mut table = String::from("| state |");
    for event in &events {
        let _ = write!(table, " {event:?} |"); // writing to a String cannot fail
    }
    table.push_str("\n|---|");
    table.push_str(&"---|".repeat(events.len()));
    for (state, called) in &states {
        let _ = write!(table, "\n| {called} |");
        for event in &events {
            match leads(*state, *event) {
                Some(after) => {
                    let _ = write!(table, " {after} |");
                }
                None => table.push_str(" |"),
            }
        }
    }
    table.push('\n');
    table
}

/// The states that one event makes of this one.
pub fn followers<M: Machine>(state: M) -> Vec<M> {
    let after =
        |next: &M| M::EVENTS.iter().any(|event| state.after(*event).is_ok_and(|after| after == *next));
    M::STATES.iter().copied().filter(after).collect()
}
