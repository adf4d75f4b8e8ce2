//! Objects that are there and cannot be read: made by a newer version, or changed in a way that no version knows.
//!
//! What is wrong is that object's problem. Nothing is decided about it, sweeps and reclaim rest, because they need the whole
//! truth, and everything else goes on.

use std::fmt;

use crate::ids::{ObjectName, PoolName, Uid, ledger_name};
use crate::view::View;

/// The kind of ledgers, as the API names it.
const LEDGER: &str = "StagingLedger";
/// The kind of nodes' reports.
const REPORT: &str = "StagingNode";

/// An object that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Its kind.
    pub kind: String,
    /// Its name.
    pub name: ObjectName,
    /// Its UID.
    pub uid: Uid,
    /// The namespace that what it holds counts for.
    pub claim_namespace: String,
    /// Which field, and what is wrong with it.
    pub problem: String,
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.to_string();
        // Without a namespace, nothing stands before the slash.
        write!(f, "{} {} cannot be read: {}", self.kind, name.trim_start_matches('/'), self.problem)
    }
}

impl View {
    /// True if this operator may take away what nothing seems to need: it holds the Lease, and nothing is hidden from it.
    pub fn sweeps(&self) -> bool {
        self.leader && self.unreadable.is_empty()
    }

    /// The object with this UID, if it cannot be read.
    pub fn unreadable_object(&self, uid: &Uid) -> Option<&Unreadable> {
        self.unreadable.iter().find(|one| one.uid == *uid)
    }

    /// True if the report of some node cannot be read.
    pub fn hides_reports(&self) -> bool {
        self.unreadable.iter().any(|one| one.kind == REPORT)
    }

    /// A ledger that cannot be read and that is the pool's, or whose pool cannot be told.
    pub fn unreadable_ledger(&self, pool: &PoolName) -> Option<&Unreadable> {
        let is_of =
            |name: &str, pool: &PoolName| self.nodes.keys().any(|node| ledger_name(pool, node) == name);
        self.unreadable.iter().filter(|one| one.kind == LEDGER).find(|one| {
            let name = &one.name.name;
            is_of(name, pool) || !self.pools.keys().any(|other| is_of(name, other))
        })
    }
}
