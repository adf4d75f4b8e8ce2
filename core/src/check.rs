//! Invariants over a view. Tests, self-checks and `kubectl berth` ask for the same ones.

use std::fmt;

use crate::budget::{Shortfall, Sums};
use crate::ids::{ObjectName, Uid, ledger_name};
use crate::ledger::{Behind, Holder, MAX_PROMISES};
use crate::view::{LedgerView, Placement, ReservationState, View};

/// Something that must not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// More is promised than may be.
    OverCapacity {
        /// The ledger.
        ledger: String,
        /// By how much.
        excess: Shortfall,
    },
    /// A ledger has more promises than one may.
    TooManyPromises {
        /// The ledger.
        ledger: String,
        /// How many.
        count: usize,
    },
    /// A ledger is not named after its pool and node.
    Misnamed {
        /// The ledger.
        ledger: String,
    },
    /// An assigned reservation has no promise where it is assigned, at its generation.
    Unpromised {
        /// The reservation.
        reservation: ObjectName,
        /// Where it is assigned.
        place: Placement,
    },
    /// An assigned reservation may be deleted without a release.
    Unguarded {
        /// The reservation.
        reservation: ObjectName,
    },
    /// A reservation is assigned although it was refused.
    RefusedAndAssigned {
        /// The reservation.
        reservation: ObjectName,
    },
    /// One holder has promises in two ledgers. Passes by itself while a race between operators is settled.
    TwoPromises {
        /// The holder.
        uid: Uid,
        /// The ledgers.
        ledgers: Vec<String>,
    },
    /// A promise whose holder does not exist. Passes by itself when the leader sweeps.
    Orphan {
        /// The holder.
        uid: Uid,
        /// The ledger.
        ledger: String,
    },
    /// A ledger is older than what its node has obeyed.
    LedgerBehind {
        /// The ledger.
        ledger: String,
        /// In which way.
        behind: Behind,
    },
}

impl Finding {
    /// True for what may be seen for a moment in a sound system: a race that is being settled, or a view that lags.
    pub const fn may_pass(&self) -> bool {
        matches!(self, Self::TwoPromises { .. } | Self::Orphan { .. } | Self::LedgerBehind { .. })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OverCapacity { ledger, excess } => {
                write!(f, "ledger {ledger} {excess} for what it has promised")
            }
            Self::TooManyPromises { ledger, count } => {
                write!(f, "ledger {ledger} holds {count} promises, at most {MAX_PROMISES} are allowed")
            }
            Self::Misnamed { ledger } => write!(f, "ledger {ledger} is not named after its pool and node"),
            Self::Unpromised { reservation, place } => {
                let Placement { pool, node, generation } = place;
                write!(
                    f,
                    "reservation {reservation} is assigned to pool {pool} on node {node}, generation {generation}, "
                )?;
                f.write_str("but its ledger does not promise that")
            }
            Self::Unguarded { reservation } => {
                write!(f, "reservation {reservation} is assigned without a finalizer")
            }
            Self::RefusedAndAssigned { reservation } => {
                write!(f, "reservation {reservation} is assigned although it was refused")
            }
            Self::TwoPromises { uid, ledgers } => {
                write!(f, "{uid} has promises in {}", ledgers.join(" and "))
            }
            Self::Orphan { uid, ledger } => {
                write!(f, "ledger {ledger} has a promise of {uid}, which does not exist")
            }
            Self::LedgerBehind { ledger, behind } => write!(f, "ledger {ledger} is behind: {behind}"),
        }
    }
}

/// Everything that is not as it must be, ledgers first.
pub fn check(view: &View) -> Vec<Finding> {
    let mut findings = Vec::new();
    for ledger in view.ledgers.values() {
        check_ledger(view, ledger, &mut findings);
    }
    check_reservations(view, &mut findings);
    findings
}

fn check_ledger(view: &View, ledger: &LedgerView, findings: &mut Vec<Finding>) {
    let name = || ledger.name.clone();
    if let Some(excess) = Sums::of(ledger.promises.values()).excess(&ledger.capacity) {
        findings.push(Finding::OverCapacity { ledger: name(), excess });
    }
    if ledger.promises.len() > MAX_PROMISES {
        findings.push(Finding::TooManyPromises { ledger: name(), count: ledger.promises.len() });
    }
    if ledger.name != ledger_name(&ledger.pool, &ledger.node) {
        findings.push(Finding::Misnamed { ledger: name() });
    }
    if let Some(behind) = view.behind(ledger) {
        findings.push(Finding::LedgerBehind { ledger: name(), behind });
    }
    for (uid, promise) in &ledger.promises {
        let there = match &promise.holder {
            Holder::Reservation(_) => view.reservations.contains_key(uid),
            Holder::Image(image) => view.images.get(image).is_some_and(|image| image.uid == *uid),
        };
        if !there {
            findings.push(Finding::Orphan { uid: uid.clone(), ledger: name() });
        }
        let all: Vec<&LedgerView> = view.ledgers_of(uid).collect();
        if all.len() > 1 && std::ptr::eq(all[0], ledger) {
            let ledgers = all.iter().map(|ledger| ledger.name.clone()).collect();
            findings.push(Finding::TwoPromises { uid: uid.clone(), ledgers });
        }
    }
}

fn check_reservations(view: &View, findings: &mut Vec<Finding>) {
    for reservation in view.reservations.values() {
        let Some(place) = &reservation.assignment else { continue };
        let name = || reservation.name.clone();
        let entry = view.ledger_at(place).and_then(|ledger| ledger.promises.get(&reservation.uid));
        // While it is deleted, the promise goes before the object does.
        if !reservation.deleting && entry.is_none_or(|entry| entry.generation != place.generation) {
            findings.push(Finding::Unpromised { reservation: name(), place: place.clone() });
        }
        if !reservation.has_finalizer && !reservation.deleting {
            findings.push(Finding::Unguarded { reservation: name() });
        }
        if reservation.state == ReservationState::Refused {
            findings.push(Finding::RefusedAndAssigned { reservation: name() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{add, at, hold, placed, reservation, view};
    use crate::ids::NodeName;
    use crate::ledger::Class;
    use crate::units::{Bytes, Generation};

    #[test]
    fn a_sound_view_has_no_findings_and_each_defect_has_its_own() {
        let mut view = view(&[("a", 100), ("b", 100)]);
        let mut request = reservation("r", 10, 0);
        request.assignment = Some(placed("p", "a", 1));
        add(&mut view, request);
        hold(&mut view, "a", "r", Class::Images, 10);
        assert_eq!(check(&view), []);

        let defect = |change: fn(&mut View)| {
            let mut broken = view.clone();
            change(&mut broken);
            let findings = check(&broken);
            assert_eq!(findings.len(), 1, "{findings:?}");
            assert!(!findings[0].to_string().is_empty());
            findings[0].clone()
        };
        let over = defect(|view| view.ledgers.values_mut().for_each(|l| l.capacity.total.data = Bytes(9)));
        assert!(matches!(over, Finding::OverCapacity { .. }));
        assert_eq!(
            over.to_string(),
            format!(
                "ledger {} lacks 1 bytes in all for what it has promised",
                view.ledgers[&at("p", "a")].name
            )
        );
        assert!(matches!(
            defect(|view| view.ledgers.values_mut().for_each(|l| l.promises.clear())),
            Finding::Unpromised { .. }
        ));
        assert!(matches!(
            defect(|view| view.reservations.values_mut().for_each(|r| r.has_finalizer = false)),
            Finding::Unguarded { .. }
        ));
        assert!(matches!(
            defect(|view| view.reservations.values_mut().for_each(|r| r.state = ReservationState::Refused)),
            Finding::RefusedAndAssigned { .. }
        ));
        let two = defect(|view| hold(view, "b", "r", Class::Images, 10));
        assert!(matches!(&two, Finding::TwoPromises { ledgers, .. } if ledgers.len() == 2) && two.may_pass());
        assert!(matches!(
            defect(|view| hold(view, "b", "nobody", Class::Images, 10)),
            Finding::Orphan { .. }
        ));
        let other = defect(|view| view.ledgers.get_mut(&at("p", "b")).expect("there").name = "x".to_owned());
        assert!(matches!(other, Finding::Misnamed { .. }));
        let behind = defect(|view| {
            let node = view.nodes.get_mut(&NodeName::from("b")).expect("there");
            node.pools.values_mut().for_each(|pool| {
                pool.obeyed.insert(Uid::from("lost"), Generation::FIRST);
            });
        });
        assert!(matches!(behind, Finding::LedgerBehind { .. }));
    }
}
