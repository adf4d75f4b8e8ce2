//! What an operator carries out: the changes of one decision, or of a round of admission about many requests, as
//! `operator/src/admission.rs` does. Lists of changes end with the first that is refused, and others go on.

use std::collections::BTreeSet;

use berth_core::change::Change;
use berth_core::ids::{PoolName, Uid};
use berth_core::reservation::{Commit, Round, decide_all};
use berth_core::units::Timestamp;
use berth_core::view::{ReservationState, ReservationView, View};

use super::coverage::Coverage;
use super::dice::Dice;
use super::sabotage::Sabotage;

/// How many requests a round gives a place at most, as in the operator.
const MOST: usize = 256;

/// What is still to be carried out. All that comes first is, then all ledger writes, then assignments and the rest.
#[derive(Clone, Debug, Default)]
pub struct Left {
    phases: [Vec<List>; 3],
    /// The one whose change was given out last.
    current: Option<(usize, List)>,
    /// What it is, to be counted when it begins.
    notes: Vec<&'static str>,
}

/// Changes in order, the last first, and those that may be made once all of these were.
#[derive(Clone, Debug, Default)]
struct List {
    changes: Vec<Change>,
    follow: Vec<Change>,
}

impl List {
    fn of(mut changes: Vec<Change>) -> Self {
        changes.reverse();
        Self { changes, follow: Vec::new() }
    }
}

impl Left {
    /// The changes of one decision.
    pub fn one(changes: Vec<Change>) -> Self {
        let ledgers = changes.iter().filter(|change| writes_ledger(change).is_some()).count();
        assert!(ledgers <= 1, "one ledger write in a pass: {changes:?}");
        Self { phases: [Vec::new(), Vec::new(), vec![List::of(changes)]], ..Self::default() }
    }

    /// The changes of a round.
    fn of(round: Round, notes: Vec<&'static str>) -> Self {
        let single = |(_, change)| List::of(vec![change]);
        let commit = |Commit { write, assigned }: Commit| {
            let follow = assigned.into_iter().map(|(_, change)| change).collect();
            List { changes: vec![write], follow }
        };
        let mut phases = [
            round.first.into_iter().map(single).collect::<Vec<_>>(),
            round.commits.into_iter().map(commit).collect(),
            round.others.into_iter().map(|(_, changes)| List::of(changes)).collect(),
        ];
        phases.iter_mut().for_each(|lists| lists.reverse());
        Self { phases, current: None, notes }
    }

    /// True if everything is done.
    pub fn is_empty(&self) -> bool {
        self.changes().next().is_none()
    }

    /// Everything that may still be written.
    pub fn changes(&self) -> impl Iterator<Item = &Change> {
        let current = self.current.iter().map(|(_, list)| list);
        let lists = self.phases.iter().flatten().chain(current);
        lists.flat_map(|list| list.changes.iter().rev().chain(&list.follow))
    }

    /// The next change. Whoever takes it says what came of it.
    pub fn next(&mut self, coverage: &mut Coverage) -> Option<Change> {
        self.notes.drain(..).for_each(|note| coverage.note(note));
        for (at, lists) in self.phases.iter_mut().enumerate() {
            while let Some(mut list) = lists.pop() {
                if let Some(change) = list.changes.pop() {
                    self.current = Some((at, list));
                    return Some(change);
                }
            }
        }
        None
    }

    /// The change that was given out is written.
    pub fn done(&mut self) {
        let Some((at, list)) = self.current.take() else { return };
        if list.changes.is_empty() {
            self.follow(list.follow);
        } else {
            self.phases[at].push(list);
        }
    }

    /// It is not, or nobody knows: what follows it is not carried out.
    pub fn failed(&mut self, sabotage: Sabotage) {
        let Some((_, list)) = self.current.take() else { return };
        if sabotage == Sabotage::AssignUnpromised {
            self.follow(list.follow);
        }
    }

    fn follow(&mut self, changes: Vec<Change>) {
        self.phases[2].extend(changes.into_iter().rev().map(|change| List::of(vec![change])));
    }
}

/// The name of the ledger that a change writes.
fn writes_ledger(change: &Change) -> Option<&str> {
    match change {
        Change::WriteLedger { name, .. } => Some(name),
        _ => None,
    }
}

/// What a round is about.
#[derive(Clone, Debug)]
pub struct Asked {
    pools: BTreeSet<PoolName>,
    uid: Uid,
}

/// The pools of a request that a round decides about, and not a decision of its own.
fn pools(view: &View, known: &ReservationView) -> Option<BTreeSet<PoolName>> {
    let waits = !known.deleting && !known.dry_run && known.assignment.is_none();
    let pools = view.pools_of(known);
    (waits && known.state != ReservationState::Refused && !pools.is_empty()).then_some(pools)
}

/// The round that this request is in, if a round decides about it.
pub fn asked(view: &View, uid: &Uid) -> Option<Asked> {
    let pools = pools(view, view.reservations.get(uid)?)?;
    Some(Asked { pools, uid: uid.clone() })
}

/// Decides about a request and others that may go nowhere else: all of them, or some of them by the dice.
pub fn round(view: &View, asked: Asked, mut dice: Option<&mut Dice>, now: Timestamp) -> Left {
    let Asked { pools: concerned, uid } = asked;
    let mut uids = BTreeSet::from([uid]);
    for other in view.reservations.values() {
        let nowhere_else = pools(view, other).is_some_and(|pools| pools.is_subset(&concerned));
        if nowhere_else && dice.as_mut().is_none_or(|dice| !dice.once_in(3)) {
            uids.insert(other.uid.clone());
        }
    }
    let few = dice.and_then(|dice| dice.once_in(4).then(|| 1 + dice.below(2)));
    let most = few.unwrap_or(MOST);
    let round = decide_all(view.part(&concerned), &uids, most, now);
    sound(&round, most);
    let mut notes = vec!["round of requests"];
    let several = round.commits.iter().any(|commit| commit.assigned.len() > 1);
    let seen = [
        (uids.len() > 1, "round of several requests"),
        (several, "ledger write for several requests"),
        (!round.first.is_empty(), "round of which something comes first"),
        (few.is_some() && !round.again.is_empty(), "round that ends before all had their turn"),
    ];
    notes.extend(seen.into_iter().filter(|(seen, _)| *seen).map(|(_, note)| note));
    Left::of(round, notes)
}

/// Each ledger is written once, for those that are assigned after it, and for nothing that does not exist yet.
fn sound(round: &Round, most: usize) {
    let mut ledgers = BTreeSet::new();
    let mut places = 0;
    for Commit { write, assigned } in &round.commits {
        let Change::WriteLedger { name, promises, .. } = write else { panic!("no ledger write: {write:?}") };
        assert!(ledgers.insert(name), "two writes of {name}: {round:?}");
        for (uid, change) in assigned {
            assert!(matches!(change, Change::AssignReservation { .. }), "no assignment: {change:?}");
            assert!(promises.contains_key(uid), "{uid} is assigned and not promised: {round:?}");
        }
        let made_up = promises.keys().find(|uid| uid.as_str().starts_with('~'));
        assert!(made_up.is_none(), "{made_up:?} is promised and does not exist: {round:?}");
        places += assigned.len();
    }
    assert!(places <= most, "{places} places, of {most}");
}
