//! Promises of space, the writes that change them, and when a ledger is too old to be trusted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::change::Change;
use crate::ids::{Lineage, ObjectName, Uid};
use crate::units::{Bytes, Generation};
use crate::view::{LedgerCapacity, LedgerView};

/// How many promises one ledger may hold.
pub const MAX_PROMISES: usize = 4096;

/// Bytes of data and of metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Charge {
    /// Of data.
    pub data: Bytes,
    /// Of metadata; zero where the backend keeps none of its own.
    pub metadata: Bytes,
}

/// What a promise counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Class {
    /// Staged images and work space.
    Images,
    /// Volumes and snapshots.
    Volumes,
}

/// Who holds a promise.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Holder {
    /// A `StagingReservation`.
    Reservation(ObjectName),
    /// A `StagedImage`, by name.
    Image(String),
}

/// One promise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promise {
    /// For whom.
    pub holder: Holder,
    /// What it counts as.
    pub class: Class,
    /// How much.
    pub charge: Charge,
    /// Of the holder's assignment.
    pub generation: Generation,
    /// The ledger's revision at which it was revoked, because its holder is gone: from then on no node obeys it. It counts
    /// until the node has recorded that revision and holds nothing under it.
    pub revoked: Option<u64>,
}

/// What a ledger was rebuilt from, after the API server had lost a part of its history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rebuilt {
    /// The lineage that the node obeyed then.
    pub lineage: Lineage,
    /// The revision that it had recorded then.
    pub revision: u64,
    /// Promises of the node's record whose holders were not found. They stay until a person strikes them from this set.
    pub recovered: BTreeSet<Uid>,
}

/// Why a ledger is older than what its node has obeyed, as after a restored etcd, or in a view that lags.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Behind {
    /// It is another ledger than the one that the node obeys.
    Lineage {
        /// Of the ledger.
        ledger: Lineage,
        /// Of the node's record.
        node: Lineage,
    },
    /// The node has recorded a later revision.
    Revision {
        /// Of the ledger.
        ledger: u64,
        /// Of the node's record.
        node: u64,
    },
    /// It lacks a promise that the node has obeyed and not released.
    Missing {
        /// The holder.
        uid: Uid,
        /// The promise's generation.
        generation: Generation,
    },
}

impl fmt::Display for Behind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lineage { ledger, node } => {
                write!(f, "the ledger's lineage is {ledger}, the node obeys {node}")
            }
            Self::Revision { ledger, node } => {
                write!(f, "the ledger is at revision {ledger}, the node at {node}")
            }
            Self::Missing { uid, generation } => {
                write!(
                    f,
                    "the ledger lacks the promise of {uid}, generation {generation}, that the node has obeyed"
                )
            }
        }
    }
}

/// What a node has recorded of the ledger that it obeys: as it knows it itself, or as it has reported it.
pub trait LedgerRecord {
    /// Of the ledger that is obeyed; `None` before the first.
    fn lineage(&self) -> Option<&Lineage>;
    /// The highest revision that is recorded.
    fn revision(&self) -> u64;
    /// Promises that were obeyed and whose bytes may still be there.
    fn held(&self) -> impl Iterator<Item = (&Uid, Generation)>;
}

/// Whether `ledger` is older than what its node has recorded. Then the operator writes nothing to it but a rebuilt form,
/// and the node obeys nothing of it. A promise of another generation is another promise.
///
/// A ledger of another lineage follows the record only if it was rebuilt from what the record says now, or said before it
/// recorded anything more; and like any other, only if it holds all that the record does.
pub fn is_behind(ledger: &LedgerView, record: &impl LedgerRecord) -> Option<Behind> {
    let other = record.lineage().filter(|lineage| **lineage != ledger.lineage);
    let follows = |lineage: &Lineage| {
        let from = ledger.rebuilt.as_ref();
        from.is_some_and(|from| from.lineage == *lineage && from.revision >= record.revision())
    };
    if let Some(lineage) = other.filter(|lineage| !follows(lineage)) {
        return Some(Behind::Lineage { ledger: ledger.lineage.clone(), node: lineage.clone() });
    }
    if ledger.revision < record.revision() {
        return Some(Behind::Revision { ledger: ledger.revision, node: record.revision() });
    }
    let mut held = record.held();
    let missing = held.find(|(uid, generation)| {
        ledger.promises.get(*uid).is_none_or(|promise| promise.generation != *generation)
    });
    missing.map(|(uid, generation)| Behind::Missing { uid: uid.clone(), generation })
}

impl LedgerView {
    /// The write that adds these promises.
    pub fn with(&self, new: &[(Uid, Promise)]) -> Change {
        let mut promises = self.promises.clone();
        promises.extend(new.iter().cloned());
        self.replaced(self.capacity, promises)
    }

    /// The write that takes the promises of these holders away. Where what may be promised has become less, according to
    /// the report by which they go, that is said in the same write ([`View::without`](crate::view::View::without)).
    pub fn without(&self, gone: &[&Uid], reported: Option<LedgerCapacity>) -> Change {
        let mut promises = self.promises.clone();
        promises.retain(|uid, _| !gone.contains(&uid));
        let capacity = reported.map_or(self.capacity, |reported| self.capacity.lowered_to(&reported));
        self.replaced(capacity.covering(self.capacity.overcommit, promises.values()), promises)
    }

    /// The write that revokes the promises of these holders.
    pub fn revoking(&self, gone: &[&Uid]) -> Change {
        let mut promises = self.promises.clone();
        let revision = self.revision.saturating_add(1);
        for (_, promise) in promises.iter_mut().filter(|(uid, _)| gone.contains(uid)) {
            promise.revoked = Some(revision);
        }
        self.replaced(self.capacity, promises)
    }

    /// The write of another capacity.
    pub fn resized(&self, capacity: LedgerCapacity) -> Change {
        self.replaced(capacity, self.promises.clone())
    }

    fn replaced(&self, capacity: LedgerCapacity, promises: BTreeMap<Uid, Promise>) -> Change {
        Change::WriteLedger {
            name: self.name.clone(),
            version: self.version.clone(),
            revision: self.revision.saturating_add(1),
            capacity,
            promises,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{ledger, node_pool, promise};

    #[test]
    fn behind_in_each_of_the_three_ways_and_in_no_other() {
        let mut ledger = ledger("p", "n", 100);
        ledger.revision = 7;
        ledger.promises.insert(Uid::from("a"), promise("a", Class::Images, 1));
        let mut node = node_pool(100);
        assert_eq!(is_behind(&ledger, &node), None, "a node that has obeyed nothing yet");
        node.lineage = Some(ledger.lineage.clone());
        node.obeyed_revision = 7;
        node.obeyed.insert(Uid::from("a"), Generation::FIRST);
        assert_eq!(is_behind(&ledger, &node), None);
        node.obeyed_revision = 8;
        assert_eq!(is_behind(&ledger, &node), Some(Behind::Revision { ledger: 7, node: 8 }));
        ledger.revision = 9;
        node.obeyed.insert(Uid::from("b"), Generation::FIRST);
        assert!(matches!(is_behind(&ledger, &node), Some(Behind::Missing { .. })));
        node.released.insert(Uid::from("b"), Generation::FIRST);
        assert_eq!(is_behind(&ledger, &node), None, "its bytes are gone");
        node.obeyed.insert(Uid::from("a"), Generation(2));
        assert!(
            matches!(is_behind(&ledger, &node), Some(Behind::Missing { .. })),
            "an older generation does not count"
        );
        node.obeyed.insert(Uid::from("a"), Generation::FIRST);
        ledger.promises.get_mut(&Uid::from("a")).expect("it is promised").generation = Generation(2);
        assert!(
            matches!(is_behind(&ledger, &node), Some(Behind::Missing { .. })),
            "nor does a later one: what was obeyed has not been given back"
        );
        node.released.insert(Uid::from("a"), Generation::FIRST);
        assert_eq!(is_behind(&ledger, &node), None, "its bytes are gone, and it is promised anew");
        node.lineage = Some(Lineage::from("other"));
        assert!(matches!(is_behind(&ledger, &node), Some(Behind::Lineage { .. })));
    }

    #[test]
    fn every_write_raises_the_revision_by_one_and_names_the_version_seen() {
        let mut ledger = ledger("p", "n", 100);
        ledger.revision = 3;
        let Change::WriteLedger { revision, version, promises, .. } =
            ledger.with(&[(Uid::from("a"), promise("a", Class::Images, 1))])
        else {
            panic!("a ledger write");
        };
        assert_eq!((revision, &version, promises.len()), (4, &ledger.version, 1));
        ledger.promises = promises;
        let Change::WriteLedger { promises, .. } = ledger.without(&[&Uid::from("a")], None) else {
            panic!("a ledger write")
        };
        assert!(promises.is_empty());
    }
}
