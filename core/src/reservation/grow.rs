//! Volumes that are to become larger: more is promised first, to the same holder at the same generation.
//!
//! **Guarantees.** The ledger's entry becomes larger in one compared-and-swapped write, and only if all of it fits beside
//! what others are promised; a promise never becomes smaller. The node enlarges the volume by what it has obeyed and reported,
//! so what is there never outgrows what is promised. A growth does not stand in line: it takes what is free, or is told why
//! not and tried again.

use crate::budget::{fits, fits_empty};
use crate::change::Change;
use crate::ledger::{Charge, Promise};
use crate::reason::Reason;
use crate::thin::volume_charge;
use crate::units::Bytes;
use crate::view::{Access, LedgerView, Placement, PoolView, ReservationView, View};

use super::place::stopped_or_full;
use super::tenant::{self, Holdings};

/// What is done about a volume that is to become larger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Growth {
    /// The ledger's entry becomes larger.
    Promise(Box<Change>),
    /// It is for the operator that leads to say: it alone counts what the limits of a namespace bound.
    Leaders,
    /// Not now.
    Refused {
        /// Why.
        reason: Reason,
        /// For people, with numbers.
        message: String,
        /// How many bytes are missing, if it is bytes that are missing.
        shortfall: Option<Bytes>,
    },
}

/// What is to be done now for a reservation at its place. `None` if it has what it asks for, or if that is not known.
pub(super) fn decide(view: &View, reservation: &ReservationView, place: &Placement) -> Option<Growth> {
    if reservation.access != Access::Block || reservation.invalid.is_some() {
        return None;
    }
    let (pool, ledger) = (view.pools.get(&place.pool)?, view.ledger_at(place)?);
    let held = ledger.promises.get(&reservation.uid)?;
    if held.generation != place.generation || held.revoked.is_some() {
        return None;
    }
    let charge = asked(reservation, pool);
    if charge.data <= held.charge.data {
        return None;
    }
    if !view.leader && tenant::is_limited(view, pool, &reservation.claim_namespace) {
        return Some(Growth::Leaders);
    }
    let larger = Promise { charge, ..held.clone() };
    Some(match refusal(view, reservation, pool, ledger, &larger) {
        None => Growth::Promise(Box::new(ledger.with(&[(reservation.uid.clone(), larger)]))),
        Some((reason, why, shortfall)) => {
            let message = format!("{} are promised, {} are asked for: {why}", held.charge.data, charge.data);
            Growth::Refused { reason, message, shortfall }
        }
    })
}

/// What a volume costs at the size that is asked for now; never less than the image that it starts from.
fn asked(reservation: &ReservationView, pool: &PoolView) -> Charge {
    let image = reservation.assigned_image.as_ref().map(|image| image.virtual_size).unwrap_or_default();
    let data = reservation.max_size.max(image);
    pool.block.map_or(Charge { data, metadata: Bytes::ZERO }, |block| volume_charge(data, block))
}

type Why = (Reason, String, Option<Bytes>);

fn refusal(
    view: &View,
    reservation: &ReservationView,
    pool: &PoolView,
    ledger: &LedgerView,
    larger: &Promise,
) -> Option<Why> {
    let at = format!("pool {} on node {}", ledger.pool, ledger.node);
    let node = view.nodes.get(&ledger.node)?;
    if !node.live || !node.reported {
        return Some((Reason::NodeLost, format!("node {} does not report", ledger.node), None));
    }
    if let Some(behind) = view.behind(ledger) {
        return Some((Reason::LedgerBehind, format!("{at} is behind: {behind}"), None));
    }
    let report = node.pools.get(&ledger.pool).filter(|report| report.usable);
    let Some(report) = report else {
        return Some((Reason::PoolAreaFailed, format!("{at} cannot be used"), None));
    };
    let new = [(reservation.uid.clone(), larger.clone())];
    if let Some(stopped) = stopped_or_full(report, ledger, &new) {
        return Some((stopped.reason(), format!("{at} {stopped}"), None));
    }
    if let Err(shortfall) = fits_empty(&ledger.capacity, &new) {
        let why = format!("{at} {shortfall} even when empty");
        return Some((Reason::LargerThanPool, why, Some(shortfall.bytes)));
    }
    limited(view, reservation, pool, ledger, larger).or_else(|| {
        let shortfall = fits(ledger, &new).err()?;
        Some((Reason::InsufficientCapacity, format!("{at} {shortfall}"), Some(shortfall.bytes)))
    })
}

/// What the limits of its namespace have against it.
fn limited(
    view: &View,
    reservation: &ReservationView,
    pool: &PoolView,
    ledger: &LedgerView,
    larger: &Promise,
) -> Option<Why> {
    let namespace = &reservation.claim_namespace;
    if !tenant::is_limited(view, pool, namespace) {
        return None;
    }
    if let Some(hidden) = tenant::unjudged(view, pool, namespace) {
        return Some((Reason::ObjectUnreadable, hidden, None));
    }
    let held = ledger.promises.get(&reservation.uid).map(|held| held.charge.data).unwrap_or_default();
    let more = larger.charge.data.saturating_sub(held);
    let excess = Holdings::of(view, pool).excess(view, pool, reservation, more)?;
    Some((Reason::TenantLimit, format!("pool {} {excess}", pool.name), excess.shortfall()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::change::ReservationReport;
    use crate::fixture::{add, at, hold, placed, reservation, view};
    use crate::ids::{NodeName, PoolName, Uid};
    use crate::ledger::Class;
    use crate::overcommit::Percent;
    use crate::thin::{PoolMode, PoolState, ThinState, Usage};
    use crate::units::Timestamp;
    use crate::view::{ReservationState, TenantLimit};

    /// A ready volume of 40 bytes that is to have `size`, in a ledger of 100 where another one has 30.
    fn asked_for(size: u64) -> View {
        let mut view = view(&[("a", 100)]);
        let mut volume = reservation("v", size, 0);
        volume.access = Access::Block;
        volume.assignment = Some(placed("p", "a", 1));
        volume.prepared = volume.assignment.as_ref().map(|place| place.generation);
        volume.state = ReservationState::Ready;
        add(&mut view, volume);
        hold(&mut view, "a", "v", Class::Volumes, 40);
        hold(&mut view, "a", "other", Class::Volumes, 30);
        view
    }

    fn changes(view: &View) -> Vec<Change> {
        crate::reservation::decide(view, &Uid::from("v"), Timestamp(0))
    }

    fn told(view: &View) -> ReservationReport {
        match &changes(view)[..] {
            [Change::ReportReservation { report, .. }, ..] => report.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_fits_is_promised_to_the_same_holder_at_the_same_generation_and_once() {
        let mut view = asked_for(70);
        let all = changes(&view);
        let [Change::WriteLedger { promises, .. }] = &all[..] else { panic!("{all:?}") };
        let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
        let before = ledger.promises[&Uid::from("v")].clone();
        let after = &promises[&Uid::from("v")];
        assert_eq!(after.charge.data, Bytes(70));
        assert_eq!(*after, Promise { charge: after.charge, ..before });
        assert_eq!(promises[&Uid::from("other")].charge.data, Bytes(30));
        ledger.promises.clone_from(promises);
        let report = told(&view);
        assert_eq!((report.state, report.reason), (ReservationState::Ready, Reason::Ready));
    }

    #[test]
    fn what_does_not_fit_stays_ready_and_is_told_with_numbers_and_tried_again() {
        let view = asked_for(75);
        let report = told(&view);
        assert_eq!((report.state, report.reason), (ReservationState::Ready, Reason::InsufficientCapacity));
        assert_eq!(report.shortfall, Some(Bytes(5)));
        assert!(
            report.message.contains("40 bytes are promised, 75 bytes are asked for"),
            "{}",
            report.message
        );
        assert!(changes(&view).iter().any(|change| matches!(change, Change::RetryAfter { .. })));
        assert_eq!(told(&asked_for(101)).reason, Reason::LargerThanPool);
    }

    #[test]
    fn a_namespace_keeps_within_its_bytes_as_the_leader_counts_them() {
        let limited = |size| {
            let mut view = asked_for(size);
            let limit = TenantLimit {
                namespaces: BTreeMap::new(),
                bytes: Some(Bytes(80)),
                reservations: Some(1), // which it has
            };
            view.pools.get_mut(&PoolName::from("p")).expect("there").tenant_limits = vec![limit];
            view
        };
        assert!(matches!(&changes(&limited(50))[..], [Change::WriteLedger { .. }]));
        let report = told(&limited(51));
        assert_eq!((report.reason, report.shortfall), (Reason::TenantLimit, Some(Bytes(1))));
        let mut other = limited(50);
        other.leader = false;
        assert!(
            matches!(&changes(&other)[..], [Change::RetryAfter { .. }]),
            "nothing is said that the leader may deny"
        );
    }

    #[test]
    fn overcommitted_volumes_that_have_written_all_are_promised_no_more() {
        let mut view = asked_for(70);
        let usage = |used| Usage { used: Bytes(used), total: Bytes(1000) };
        let well =
            PoolState { mode: PoolMode::ReadWrite, needs_check: false, data: usage(0), metadata: usage(0) };
        let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
        ledger.capacity.overcommit.percent = Percent::new(150).expect("in range");
        let mut written = |used| {
            let node = view.nodes.get_mut(&NodeName::from("a")).expect("there");
            let volumes = PoolState { data: usage(used), ..well };
            node.pools.get_mut(&PoolName::from("p")).expect("there").thin =
                Some(ThinState { images: well, volumes });
            changes(&view)
        };
        assert!(matches!(&written(999)[..], [Change::WriteLedger { .. }]), "{:?}", written(999));
        let full = written(1000);
        let [Change::ReportReservation { report, .. }, ..] = &full[..] else { panic!("{full:?}") };
        assert_eq!(report.reason, Reason::DataAlmostFull);
    }

    #[test]
    fn nothing_is_promised_to_a_node_that_is_away_and_nothing_less_to_anybody() {
        let mut away = asked_for(70);
        away.nodes.get_mut(&NodeName::from("a")).expect("there").live = false;
        assert!(!changes(&away).iter().any(|change| matches!(change, Change::WriteLedger { .. })));
        assert!(!changes(&asked_for(10)).iter().any(|change| matches!(change, Change::WriteLedger { .. })));
        let mut revoked = asked_for(70);
        let ledger = revoked.ledgers.get_mut(&at("p", "a")).expect("there");
        ledger.promises.get_mut(&Uid::from("v")).expect("there").revoked = Some(1);
        assert!(!changes(&revoked).iter().any(|change| matches!(change, Change::WriteLedger { .. })));
    }
}
