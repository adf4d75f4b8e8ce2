//! What happened, over many histories, and what must have happened at least.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use berth_core::change::Change;
use berth_core::view::ReservationState::{self, Pending, Promised, Queued, Ready, Refused, Releasing};

/// Counts of what happened.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    /// Histories.
    pub histories: u64,
    /// Operations before everything settles, of all histories.
    pub operations: u64,
    /// The fewest operations of one history.
    pub least: Option<u64>,
    /// What was done, by kind.
    pub events: BTreeMap<&'static str, u64>,
    /// What operators wrote, by kind.
    pub writes: BTreeMap<&'static str, u64>,
    /// How the states of reservations followed each other.
    pub transitions: BTreeSet<(ReservationState, ReservationState)>,
}

/// How often each of these happens in a thousand histories at least.
const FLOORS: &[(&str, u64)] = &[
    ("attach", 200),
    ("ask", 3000),
    ("backup", 500),
    ("clock jump", 1000),
    ("conflict", 1000),
    ("consent to losing a file", 20),
    ("cordon or drain", 200),
    ("delete", 1000),
    ("delete a ledger", 100),
    ("delete a namespace", 50),
    ("delete a template", 100),
    ("detach", 60),
    ("enlarge", 100),
    ("grow or shrink", 500),
    ("import ready", 20),
    ("lost response", 200),
    ("node lost", 200),
    ("node returns", 100),
    ("node restarts", 300),
    ("node removes bytes", 1000),
    ("operator crash", 500),
    ("operator crash between two writes", 100),
    ("orphan swept", 1),
    ("refused by the API server", 200),
    ("renew", 30),
    ("round of several requests", 500),
    ("ledger write for several requests", 50),
    ("round of which something comes first", 500),
    ("round that ends before all had their turn", 20),
    ("restore", 100),
    ("slipped past a finalizer", 10),
    ("volume grown", 10),
    ("volumes promised more than is there", 50),
    ("write to a file", 50),
];

/// The same for writes of operators.
const WRITES: &[(&str, u64)] = &[
    ("AssignReservation", 1000),
    ("CreateImage", 500),
    ("CreateLedger", 1000),
    ("DeleteImage", 200),
    ("ExpireReservation", 10),
    ("GiveUpImage", 5),
    ("RebuildLedger", 100),
    ("UnguardImage", 200),
    ("UnguardReservation", 1000),
    ("WriteLedger", 3000),
];

/// Transitions that must be seen at all.
const TRANSITIONS: &[(ReservationState, ReservationState)] = &[
    (Pending, Queued),
    (Pending, Promised),
    (Pending, Refused),
    (Queued, Promised),
    (Queued, Refused),
    (Promised, Ready),
    (Promised, Releasing),
    (Queued, Releasing),
    (Ready, Releasing),
];

impl Coverage {
    /// Counts one event.
    pub fn note(&mut self, event: &'static str) {
        *self.events.entry(event).or_default() += 1;
    }

    /// Counts one write.
    pub fn wrote(&mut self, change: &Change) {
        *self.writes.entry(kind(change)).or_default() += 1;
    }

    /// Adds another part.
    pub fn add(&mut self, other: &Self) {
        self.histories += other.histories;
        self.operations += other.operations;
        self.least = [self.least, other.least].into_iter().flatten().min();
        for (sums, counts) in [(&mut self.events, &other.events), (&mut self.writes, &other.writes)] {
            for (name, count) in counts {
                *sums.entry(name).or_default() += count;
            }
        }
        self.transitions.extend(&other.transitions);
    }

    /// What was seen too rarely.
    pub fn shortfalls(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (floors, counts) in [(FLOORS, &self.events), (WRITES, &self.writes)] {
            for (name, floor) in floors {
                let (seen, least) =
                    (counts.get(name).copied().unwrap_or_default(), floor * self.histories / 1000);
                if seen < least {
                    found.push(format!("coverage: {name} only {seen} times, not {least}"));
                }
            }
        }
        if self.least.is_none_or(|least| least < super::LEAST_OPERATIONS) {
            found.push(format!("coverage: a history of {:?} operations", self.least));
        }
        let unseen = TRANSITIONS.iter().filter(|transition| !self.transitions.contains(transition));
        found.extend(unseen.map(|(from, to)| format!("coverage: {from:?} never became {to:?}")));
        found
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_history = self.operations / self.histories.max(1);
        writeln!(f, "operations: {} ({per_history} per history)", self.operations)?;
        for (name, count) in self.events.iter().chain(&self.writes) {
            writeln!(f, "  {name:<34} {count:>12}")?;
        }
        let transitions: Vec<String> =
            self.transitions.iter().map(|(from, to)| format!("{from:?}→{to:?}")).collect();
        writeln!(f, "states: {}", transitions.join(" "))
    }
}

/// The name of a kind of write.
fn kind(change: &Change) -> &'static str {
    match change {
        Change::AssignTransfer { .. } => "AssignTransfer",
        Change::AssignReservation { .. } => "AssignReservation",
        Change::CreateImage { .. } => "CreateImage",
        Change::CreateLedger { .. } => "CreateLedger",
        Change::CreateReservation { .. } => "CreateReservation",
        Change::DeleteImage { .. } => "DeleteImage",
        Change::DeleteReservation { .. } => "DeleteReservation",
        Change::ExpireReservation { .. } => "ExpireReservation",
        Change::GiveUpImage { .. } => "GiveUpImage",
        Change::DeleteTransfer { .. } => "DeleteTransfer",
        Change::GuardTransfer { .. } => "GuardTransfer",
        Change::GuardReservation { .. } => "GuardReservation",
        Change::RebuildLedger { .. } => "RebuildLedger",
        Change::ReportTransfer { .. } => "ReportTransfer",
        Change::ReportReservation { .. } => "ReportReservation",
        Change::UnguardImage { .. } => "UnguardImage",
        Change::UnguardTransfer { .. } => "UnguardTransfer",
        Change::UnguardReservation { .. } => "UnguardReservation",
        Change::WriteLedger { .. } => "WriteLedger",
        _ => "other",
    }
}
