//! How an image that is being served is: what whoever runs the server is told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use berth_core::ids::ChunkId;
use berth_core::units::Timestamp;
use serde::Serialize;

/// How many bad chunks, and pages of the index, are remembered.
const MOST_BAD: usize = 256;

/// How an image is. Each state ends by itself when the same is read well again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "PascalCase", rename_all_fields = "camelCase")]
pub enum Health {
    /// What was read was right.
    Ok,
    /// The store does not answer, or answers with failures. Reads wait.
    Stalled {
        /// Since when, in milliseconds since 1970.
        since: Timestamp,
        /// What the store said last.
        said: String,
    },
    /// A chunk is not what its name says. Reads of it fail.
    Damaged {
        /// Its id.
        chunk: String,
    },
    /// A chunk is not in the store. Reads of it fail.
    Missing {
        /// Its id.
        chunk: String,
    },
    /// A part of the index is gone or is not what it was. Reads that need it fail.
    IndexDamaged,
}

/// What is wrong with a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bad {
    Damaged,
    Missing,
}

#[derive(Default)]
struct State {
    stalled: Option<(Timestamp, String)>,
    bad: BTreeMap<ChunkId, Bad>,
    pages: BTreeSet<usize>,
}

/// What is known of it.
#[derive(Default)]
pub(super) struct Observed(Mutex<State>);

impl Observed {
    /// The worst of what is known.
    pub(super) fn health(&self) -> Health {
        let state = self.lock();
        if !state.pages.is_empty() {
            return Health::IndexDamaged;
        }
        let named = |wanted| state.bad.iter().find(|(_, bad)| **bad == wanted).map(|(id, _)| id.to_string());
        if let Some(chunk) = named(Bad::Damaged) {
            return Health::Damaged { chunk };
        }
        if let Some(chunk) = named(Bad::Missing) {
            return Health::Missing { chunk };
        }
        match &state.stalled {
            Some((since, said)) => Health::Stalled { since: *since, said: said.clone() },
            None => Health::Ok,
        }
    }

    /// The store did what it was asked.
    pub(super) fn answered(&self) {
        self.lock().stalled = None;
    }

    /// The store did not.
    pub(super) fn stalled(&self, said: &str) {
        let mut state = self.lock();
        let since = state.stalled.take().map_or_else(now, |(since, _)| since);
        state.stalled = Some((since, said.to_owned()));
    }

    /// A chunk was read, well or not.
    pub(super) fn chunk(&self, id: ChunkId, bad: Option<Bad>) {
        let mut state = self.lock();
        match bad {
            None => {
                state.bad.remove(&id);
            }
            Some(bad) if state.bad.len() < MOST_BAD || state.bad.contains_key(&id) => {
                state.bad.insert(id, bad);
            }
            Some(_) => {}
        }
    }

    /// A page of the index was read, well or not.
    pub(super) fn page(&self, page: usize, damaged: bool) {
        let pages = &mut self.lock().pages;
        if damaged && pages.len() < MOST_BAD {
            pages.insert(page);
        } else if !damaged {
            pages.remove(&page);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_is_told_and_each_state_ends() {
        let (observed, id) = (Observed::default(), ChunkId::of(b"x"));
        observed.stalled("away");
        let Health::Stalled { since, .. } = observed.health() else { panic!("{:?}", observed.health()) };
        observed.stalled("still away");
        assert_eq!(observed.health(), Health::Stalled { since, said: "still away".to_owned() });
        observed.chunk(id, Some(Bad::Missing));
        assert_eq!(observed.health(), Health::Missing { chunk: id.to_string() });
        observed.chunk(ChunkId::of(b"y"), Some(Bad::Damaged));
        assert_eq!(observed.health(), Health::Damaged { chunk: ChunkId::of(b"y").to_string() });
        observed.page(1, true);
        assert_eq!(observed.health(), Health::IndexDamaged);
        observed.page(2, false);
        assert_eq!(observed.health(), Health::IndexDamaged);
        observed.page(1, false);
        observed.chunk(ChunkId::of(b"y"), None);
        observed.chunk(id, None);
        observed.answered();
        assert_eq!(observed.health(), Health::Ok);
        assert_eq!(serde_json::to_string(&Health::Ok).unwrap(), r#"{"state":"Ok"}"#);
    }
}
