//! Decisions about many requests at once, so that those that get a place in the same ledger share one write of it.
//!
//! **Guarantees.** The requests are decided about one after the other in the order in which they wait, each as if those before
//! it had been carried out: bounds, limits of namespaces, turns and lengths of queues hold among them as they do one by one.
//! Nothing is decided about a request that may also go to pools which the view lacks: it keeps its turn, and has a round of its own.
//! Nothing is promised to a request whose finalizer, or whose image's object, has still to be written; its place is kept free
//! for it meanwhile.

use std::collections::{BTreeMap, BTreeSet};

use crate::change::{Change, ReservationReport};
use crate::ids::{NodeName, PoolName, Uid};
use crate::ledger::Promise;
use crate::units::Timestamp;
use crate::view::{AssignedImage, ImageView, LedgerView, Placement, ReservationState, View};

use super::decide::decide_among;
use super::queue::Backlog;

/// How often all requests are gone through: one that waits for others of the round may get its place after them.
const PASSES: usize = 3;
/// How many objects one request may need before it is promised anything: its finalizer, its image.
const STEPS: usize = 3;

/// What is to be done for many requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// What has to be written of single requests before anything is promised to them.
    pub first: Vec<(Uid, Change)>,
    /// Writes of ledgers, each with the assignments that follow it.
    pub commits: Vec<Commit>,
    /// What becomes of those requests that get no place now.
    pub others: Vec<(Uid, Vec<Change>)>,
    /// Requests that have to be decided about again, after what comes first.
    pub again: BTreeSet<Uid>,
}

/// One write of a ledger, and what may be written once it went through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The ledger.
    pub write: Change,
    /// Assignments in it, in the order of the decisions.
    pub assigned: Vec<(Uid, Change)>,
}

/// The next steps for the requests in `asked`, and for those that wait in the same pools, of which at most `most` are given
/// a place. `view` is used up: it becomes what the decisions make of it.
pub fn decide_all(view: View, asked: &BTreeSet<Uid>, most: usize, now: Timestamp) -> Round {
    let mut table = Table {
        backlog: Backlog::of(&view, now),
        before: view.ledgers.clone(),
        view,
        now,
        first: Vec::new(),
        granted: BTreeMap::new(),
        order: Vec::new(),
        held: BTreeSet::new(),
        others: BTreeMap::new(),
        remade: false,
    };
    let mut left = BTreeSet::new();
    for _ in 0..PASSES {
        let granted = table.order.len();
        left = table.pass(asked, most);
        if table.order.len() == granted || !left.is_empty() {
            break;
        }
    }
    table.finish(asked, left)
}

/// What a request was given.
struct Grant {
    place: (PoolName, NodeName),
    /// What was entered into the ledger for it.
    entries: Vec<(Uid, Promise)>,
    image: Option<AssignedImage>,
    assign: Change,
}

/// The view as the decisions so far have made it.
struct Table {
    view: View,
    before: BTreeMap<(PoolName, NodeName), LedgerView>,
    backlog: Backlog,
    now: Timestamp,
    first: Vec<(Uid, Change)>,
    granted: BTreeMap<Uid, Grant>,
    /// Those in `granted`, in the order of the decisions.
    order: Vec<Uid>,
    /// Those that something comes first for: a write of their own, or the promises of this round.
    held: BTreeSet<Uid>,
    others: BTreeMap<Uid, Vec<Change>>,
    /// True if the order is another one since it was last looked at.
    remade: bool,
}

impl Table {
    /// Goes through all that wait; returns those asked for that were not come to.
    fn pass(&mut self, asked: &BTreeSet<Uid>, most: usize) -> BTreeSet<Uid> {
        let mut left = BTreeSet::new();
        let mut seen = BTreeSet::new();
        let waiting: BTreeSet<Uid> = self.backlog.order().cloned().collect();
        let mut line: Vec<Uid> = asked.iter().filter(|uid| !waiting.contains(*uid)).cloned().collect();
        line.extend(self.backlog.order().cloned());
        while !line.is_empty() {
            self.remade = false;
            for uid in std::mem::take(&mut line) {
                if !seen.insert(uid.clone()) || self.is_settled(&uid) {
                    continue;
                }
                if self.granted.len() < most && !self.view.elsewhere.contains(&uid) {
                    self.visit(&uid);
                } else if asked.contains(&uid) {
                    left.insert(uid);
                }
                if self.remade {
                    line.extend(self.backlog.order().filter(|uid| !seen.contains(*uid)).cloned());
                    break;
                }
            }
        }
        left
    }

    /// True if it has its place, or was refused.
    fn is_settled(&self, uid: &Uid) -> bool {
        let known = self.view.reservations.get(uid).filter(|known| known.state != ReservationState::Refused);
        self.granted.contains_key(uid) || self.others.contains_key(uid) && known.is_none()
    }

    /// Decides about one, and enters into the view what that makes of it.
    fn visit(&mut self, uid: &Uid) {
        for _ in 0..STEPS {
            let changes = decide_among(&self.view, Some(&self.backlog), uid, self.now);
            let goes_on = match &changes[..] {
                [Change::WriteLedger { promises, .. }, assign @ Change::AssignReservation { .. }] => {
                    return self.grant(uid, promises, assign);
                }
                [Change::GuardReservation { .. }] => self.guard(uid),
                [create @ Change::CreateImage { .. }] => self.create(create),
                _ => false,
            };
            if !goes_on {
                return self.leave(uid, changes);
            }
            self.held.insert(uid.clone());
            self.first.extend(changes.into_iter().map(|change| (uid.clone(), change)));
        }
    }

    fn guard(&mut self, uid: &Uid) -> bool {
        let guarded = self.view.reservations.get_mut(uid);
        guarded.map(|reservation| reservation.has_finalizer = true).is_some()
    }

    /// The image as it will be, but for its UID, under which nothing is written.
    fn create(&mut self, change: &Change) -> bool {
        let Change::CreateImage { name, image, pool, node, .. } = change else { return false };
        let image = ImageView {
            uid: Uid(format!("~{name}")),
            name: name.clone(),
            created: self.now,
            deleting: false,
            has_finalizer: true,
            digest: image.digest,
            pool: pool.clone(),
            node: node.clone(),
            data_bytes: image.real_size,
            virtual_size: image.virtual_size,
            ready: false,
            last_used: None,
            given_up: false,
        };
        self.view.images.insert(name.clone(), image).is_none()
    }

    fn grant(&mut self, uid: &Uid, promises: &BTreeMap<Uid, Promise>, assign: &Change) {
        let Change::AssignReservation { placement, image, .. } = assign else { return };
        let place = (placement.pool.clone(), placement.node.clone());
        let Some(ledger) = self.view.ledgers.get(&place) else { return };
        let new = promises.iter().filter(|(holder, _)| !ledger.promises.contains_key(*holder));
        let entries: Vec<(Uid, Promise)> = new.map(|(uid, promise)| (uid.clone(), promise.clone())).collect();
        // Version and revision stay: all of the round is one write.
        let ledger = LedgerView { promises: promises.clone(), ..ledger.clone() };
        self.view.enter_ledger(ledger);
        self.place(uid, placement.clone(), image.clone());
        self.others.remove(uid);
        self.order.push(uid.clone());
        let (image, assign) = (image.clone(), assign.clone());
        self.granted.insert(uid.clone(), Grant { place, entries, image, assign });
        if !self.backlog.advance(&self.view, uid) {
            self.remake();
        }
    }

    fn remake(&mut self) {
        self.backlog = Backlog::of(&self.view, self.now);
        self.remade = true;
    }

    fn place(&mut self, uid: &Uid, placement: Placement, image: Option<AssignedImage>) {
        let Some(mut reservation) = self.view.remove_reservation(uid) else { return };
        reservation.assignment = Some(placement);
        reservation.assigned_image = image;
        reservation.state = ReservationState::Promised;
        self.view.enter_reservation(reservation);
    }

    /// It gets no place now: what is said of it counts for those after it.
    fn leave(&mut self, uid: &Uid, changes: Vec<Change>) {
        let told = changes.iter().find_map(|change| match change {
            Change::ReportReservation { report: ReservationReport { state, .. }, .. } => Some(*state),
            _ => None,
        });
        // Such a write would carry the promises of this round, those that are held back as well.
        if changes.iter().any(|change| self.is_entered(change)) {
            self.held.insert(uid.clone());
        }
        self.others.insert(uid.clone(), changes);
        let Some(state) = told else { return };
        if let Some(mut reservation) = self.view.remove_reservation(uid) {
            reservation.state = state;
            self.view.enter_reservation(reservation);
        }
        match state {
            ReservationState::Queued => self.backlog.waits(uid),
            _ => self.remake(),
        }
    }

    /// True if this writes a ledger in which the round has given a place.
    fn is_entered(&self, change: &Change) -> bool {
        let Change::WriteLedger { name, .. } = change else { return false };
        self.granted.values().any(|grant| self.before.get(&grant.place).is_some_and(|l| l.name == *name))
    }

    /// Leaves out of the writes what something has to come first for, and what depends on that.
    fn finish(mut self, asked: &BTreeSet<Uid>, left: BTreeSet<Uid>) -> Round {
        let mut entered: BTreeSet<Uid> = BTreeSet::new();
        let mut commits: BTreeMap<(PoolName, NodeName), Vec<Uid>> = BTreeMap::new();
        for uid in &self.order {
            let Some(grant) = self.granted.get(uid).filter(|_| !self.held.contains(uid)) else { continue };
            let known = |image: &AssignedImage| {
                let image = self.view.images.get(&image.staged_image).map(|image| &image.uid);
                let promised =
                    |uid: &Uid| self.before.get(&grant.place).is_some_and(|l| l.promises.contains_key(uid));
                image.is_some_and(|image| {
                    promised(image)
                        || entered.contains(image)
                        || grant.entries.iter().any(|(uid, _)| uid == image)
                })
            };
            if grant.image.as_ref().is_none_or(known) {
                entered.extend(grant.entries.iter().map(|(uid, _)| uid.clone()));
                commits.entry(grant.place.clone()).or_default().push(uid.clone());
            }
        }
        let mut again = left;
        again.extend(self.order.iter().filter(|uid| !entered.contains(*uid)).cloned());
        again.extend(self.held.iter().cloned());
        let commits = commits.into_iter().filter_map(|(place, uids)| {
            let grants: Vec<(Uid, Grant)> =
                uids.into_iter().filter_map(|uid| self.granted.remove_entry(&uid)).collect();
            let new: Vec<_> = grants.iter().flat_map(|(_, grant)| grant.entries.iter().cloned()).collect();
            let write = self.before.get(&place)?.with(&new);
            Some(Commit {
                write,
                assigned: grants.into_iter().map(|(uid, grant)| (uid, grant.assign)).collect(),
            })
        });
        let commits = commits.collect();
        let others = self.others.into_iter().filter(|(uid, _)| asked.contains(uid) && !again.contains(uid));
        Round { first: self.first, commits, others: others.collect(), again }
    }
}

#[cfg(test)]
#[path = "batch_tests.rs"]
mod tests;
