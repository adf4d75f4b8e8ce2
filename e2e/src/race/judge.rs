//! The properties of admission, checked over every version that the API server has made: a pure replay.
//!
//! All kinds lie in one etcd, so `resourceVersion`s order their changes in one sequence. After each change, everything
//! that a node or a user could rely on at that instant is looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// What a ledger promises to one holder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// `Images` or `Volumes`.
    pub class: String,
    /// Bytes of data.
    pub bytes: i64,
    /// Of the holder's assignment.
    pub generation: i64,
    /// The operator that wrote the entry, as the API server recorded it.
    pub writer: Option<String>,
    /// The revision from which on it may not be obeyed any more.
    pub revoked: Option<i64>,
}

/// Where a reservation is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The pool.
    pub pool: String,
    /// The node.
    pub node: String,
    /// The generation.
    pub generation: i64,
}

/// What one version of an object says.
#[derive(Debug, Clone)]
pub enum Fact {
    /// A ledger.
    Ledger {
        /// Its pool.
        pool: String,
        /// Its node.
        node: String,
        /// New when it is made anew.
        lineage: String,
        /// Rises by one with every write.
        revision: i64,
        /// Bytes: images, volumes, both.
        capacity: [i64; 3],
        /// By holder.
        promises: BTreeMap<String, Entry>,
        /// True if it was deleted.
        gone: bool,
    },
    /// A reservation.
    Reservation {
        /// Its UID.
        uid: String,
        /// Where it is.
        place: Option<Place>,
        /// True if it is being deleted.
        deleting: bool,
        /// True if it is gone.
        gone: bool,
        /// Which finalizers it has.
        finalizers: Vec<String>,
        /// Who wrote this version last, as the API server recorded it.
        writer: Option<String>,
    },
    /// What a node says of its pools.
    Report {
        /// The node.
        node: String,
        /// What it has given back: generations by UID.
        released: BTreeMap<String, i64>,
        /// The UIDs of what it has obeyed.
        obeyed: BTreeSet<String>,
        /// The revision that it has recorded of each pool's ledger.
        revisions: BTreeMap<String, i64>,
    },
}

/// A change, at its place in the sequence.
#[derive(Debug, Clone)]
pub struct Change {
    /// The `resourceVersion`.
    pub version: u64,
    /// What it says.
    pub fact: Fact,
}

/// What must hold at every instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Property {
    /// The promises of a ledger add up to its capacity at most, per class and in all.
    Bounded,
    /// Of the requests for more than half of a pool, one at most is held.
    OneAtATime,
    /// What is assigned and not given back is in the ledger, at the same generation.
    AssignedIsPromised,
    /// An assignment is made once, for an object that is not being deleted, and not changed.
    PlacementIsFinal,
    /// An object that was deleted goes only after its node has given its bytes back. The API server may carry out a deletion
    /// at once that it began before the object had a finalizer; then its promise has to stay as long.
    GivenBackBeforeGone,
    /// The revision of a ledger rises by one with every write.
    RevisionRises,
    /// In the end nothing is promised.
    NothingLeft,
}

impl fmt::Display for Property {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bounded => "bounded",
            Self::OneAtATime => "one-at-a-time",
            Self::AssignedIsPromised => "assigned-is-promised",
            Self::PlacementIsFinal => "placement-is-final",
            Self::GivenBackBeforeGone => "given-back-before-gone",
            Self::RevisionRises => "revision-rises",
            Self::NothingLeft => "nothing-left",
        })
    }
}

/// A property that did not hold.
#[derive(Debug, Clone)]
pub struct Violation {
    /// Which.
    pub property: Property,
    /// The instant.
    pub version: u64,
    /// What was seen.
    pub detail: String,
    /// The reservation concerned, by UID.
    pub subject: Option<String>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} violated at version {}: {}", self.property, self.version, self.detail)
    }
}

/// What the replay counted.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// Versions looked at.
    pub versions: u64,
    /// Assignments made.
    pub admissions: u64,
    /// Promises by the operator that wrote them.
    pub by_writer: BTreeMap<String, u64>,
    /// Objects given back by their node.
    pub releases: u64,
    /// Objects that went without having been marked as deleted, in spite of their finalizer.
    pub slipped: u64,
    /// What did not hold.
    pub violations: Vec<Violation>,
}

#[derive(Debug, Default)]
struct LedgerState {
    lineage: String,
    revision: i64,
    promises: BTreeMap<String, Entry>,
}

#[derive(Debug, Default)]
struct State {
    ledgers: BTreeMap<(String, String), LedgerState>,
    /// Those that are assigned and there, or went in spite of their finalizer.
    placed: BTreeMap<String, Place>,
    /// Those that were marked as deleted.
    deleted: BTreeSet<String>,
    /// Those that went in spite of their finalizer.
    slipped: BTreeSet<String>,
    given_back: BTreeMap<String, i64>,
    tally: Tally,
}

/// Replays `changes` (in any order) of whole histories from their beginning.
pub fn judge(mut changes: Vec<Change>) -> Tally {
    changes.sort_by_key(|change| change.version);
    let mut state = State::default();
    for Change { version, fact } in changes {
        state.tally.versions += 1;
        match fact {
            Fact::Ledger { pool, node, lineage, revision, capacity, promises, gone } => {
                let key = (pool, node);
                if gone {
                    state.ledgers.remove(&key);
                    continue;
                }
                state.ledger(version, &key, LedgerState { lineage, revision, promises }, capacity);
                state.check(version, &key.0);
            }
            Fact::Reservation { uid, place, deleting, gone, .. } => {
                let pool = state.reservation(version, &uid, place, deleting, gone);
                if let Some(pool) = pool {
                    state.check(version, &pool);
                }
            }
            Fact::Report { node, released, obeyed, revisions } => {
                state.report(released);
                state.fenced(&node, &obeyed, &revisions);
            }
        }
    }
    state.check_end();
    state.tally
}

impl State {
    fn violated(&mut self, property: Property, version: u64, subject: Option<&str>, detail: String) {
        let subject = subject.map(str::to_owned);
        self.tally.violations.push(Violation { property, version, detail, subject });
    }

    fn ledger(&mut self, version: u64, key: &(String, String), new: LedgerState, capacity: [i64; 3]) {
        let sum = |class: &str| -> i64 {
            new.promises.values().filter(|e| class.is_empty() || e.class == class).map(|e| e.bytes).sum()
        };
        for (class, limit) in ["Images", "Volumes", ""].into_iter().zip(capacity) {
            if sum(class) > limit {
                let what = if class.is_empty() { "in all" } else { class };
                let detail =
                    format!("pool {} on {}: {} of {limit} bytes promised {what}", key.0, key.1, sum(class));
                self.violated(Property::Bounded, version, None, detail);
            }
        }
        let old = self.ledgers.remove(key);
        if let Some(old) = old.as_ref().filter(|old| old.lineage == new.lineage)
            && new.revision != old.revision + 1
        {
            let detail = format!("pool {} on {}: {} after {}", key.0, key.1, new.revision, old.revision);
            self.violated(Property::RevisionRises, version, None, detail);
        }
        let old = old.unwrap_or_default();
        for (_, entry) in new.promises.iter().filter(|(uid, _)| !old.promises.contains_key(*uid)) {
            let writer = entry.writer.clone().unwrap_or_else(|| "unknown".to_owned());
            *self.tally.by_writer.entry(writer).or_default() += 1;
        }
        self.ledgers.insert(key.clone(), new);
    }

    fn report(&mut self, released: BTreeMap<String, i64>) {
        for (uid, generation) in released {
            if self.given_back.insert(uid, generation).is_none() {
                self.tally.releases += 1;
            }
        }
    }

    /// What has slipped away, was revoked, and was not obeyed by the node when it recorded the revocation never will be.
    fn fenced(&mut self, node: &str, obeyed: &BTreeSet<String>, revisions: &BTreeMap<String, i64>) {
        for uid in self.slipped.iter().filter(|uid| !obeyed.contains(*uid)) {
            let Some(place) = self.placed.get(uid).filter(|place| place.node == node) else { continue };
            let ledger = self.ledgers.get(&(place.pool.clone(), place.node.clone()));
            let revoked = ledger.and_then(|ledger| ledger.promises.get(uid)?.revoked);
            if revoked.is_some_and(|at| revisions.get(&place.pool).is_some_and(|known| *known >= at)) {
                self.given_back.insert(uid.clone(), place.generation);
            }
        }
    }

    fn reservation(
        &mut self,
        version: u64,
        uid: &str,
        place: Option<Place>,
        deleting: bool,
        gone: bool,
    ) -> Option<String> {
        if deleting {
            self.deleted.insert(uid.to_owned());
        }
        if gone && !self.deleted.contains(uid) {
            let before = self.placed.get(uid)?;
            self.slipped.insert(uid.to_owned());
            self.tally.slipped += 1;
            return Some(before.pool.clone());
        }
        if gone {
            let before = self.placed.remove(uid)?;
            if !self.is_given_back(uid, before.generation) {
                let detail = format!("reservation {uid} is gone, {} has not given it back", before.node);
                self.violated(Property::GivenBackBeforeGone, version, Some(uid), detail);
            }
            return Some(before.pool);
        }
        let before = self.placed.get(uid).cloned();
        match (&before, &place) {
            (Some(before), after) if after.as_ref() != Some(before) => {
                let detail = format!("reservation {uid}: {before:?} became {after:?}");
                self.violated(Property::PlacementIsFinal, version, Some(uid), detail);
            }
            (None, Some(after)) => {
                self.tally.admissions += 1;
                if deleting {
                    let detail =
                        format!("reservation {uid} was assigned to {} while being deleted", after.node);
                    self.violated(Property::PlacementIsFinal, version, Some(uid), detail);
                }
            }
            _ => {}
        }
        let pool = place.as_ref().map(|place| place.pool.clone());
        if let Some(place) = place {
            self.placed.insert(uid.to_owned(), place);
        }
        pool
    }

    fn is_given_back(&self, uid: &str, generation: i64) -> bool {
        self.given_back.get(uid).is_some_and(|released| *released >= generation)
    }

    /// Looks at everything of one pool, as it is at this instant.
    fn check(&mut self, version: u64, pool: &str) {
        let mut held: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for ((_, node), ledger) in self.ledgers.iter().filter(|((p, _), _)| p == pool) {
            held.entry(node.clone()).or_default().extend(ledger.promises.keys().cloned());
        }
        let mut violations = Vec::new();
        for (uid, place) in self.placed.iter().filter(|(_, place)| place.pool == pool) {
            if self.is_given_back(uid, place.generation) {
                continue;
            }
            held.entry(place.node.clone()).or_default().insert(uid.clone());
            let ledger = self.ledgers.get(&(pool.to_owned(), place.node.clone()));
            let promised = ledger.and_then(|ledger| ledger.promises.get(uid));
            if promised.is_none_or(|entry| entry.generation != place.generation) {
                violations.push((
                    Property::AssignedIsPromised,
                    Some(uid.clone()),
                    format!("reservation {uid} is assigned to {place:?} and not given back; the ledger has {promised:?}"),
                ));
            }
        }
        for (node, holders) in held.into_iter().filter(|(_, holders)| holders.len() > 1) {
            let one = holders.first().cloned();
            violations.push((
                Property::OneAtATime,
                one,
                format!("pool {pool} on {node} is held by {holders:?}"),
            ));
        }
        for (property, subject, detail) in violations {
            self.violated(property, version, subject.as_deref(), detail);
        }
    }

    fn check_end(&mut self) {
        let left: Vec<_> = self
            .ledgers
            .iter()
            .filter(|(_, ledger)| !ledger.promises.is_empty())
            .map(|((pool, node), ledger)| format!("pool {pool} on {node}: {:?}", ledger.promises.keys()))
            .chain(
                self.placed
                    .iter()
                    .filter(|(uid, place)| !self.is_given_back(uid, place.generation))
                    .map(|(uid, _)| format!("reservation {uid}")),
            )
            .collect();
        if !left.is_empty() {
            self.violated(Property::NothingLeft, 0, None, left.join(", "));
        }
    }
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
