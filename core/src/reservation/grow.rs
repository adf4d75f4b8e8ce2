//! Volumes that are to become larger: more is promised first, to the same holder at the same generation.
//!
//! **Guarantees.** The ledger's entry becomes larger in one compared-and-swapped write, and only if all of it fits beside
//! what others are promised; a promise never becomes smaller. The node enlarges the volume by what it has obeyed and reported,
//! so what is there never outgrows what is promised.
//!
//! A growth has no place in line, because nothing tells since when it is asked for. It takes what is free, also before requests that
//! wait, but never before one that has waited so long that nobody overtakes it. Where it is short, images that nothing needs go, as
//! for a request. Otherwise it is told why not. It is tried again for as long as it is asked for, and keeps nobody waiting.

use crate::budget::{fits, fits_empty};
use crate::change::Change;
use crate::ids::Uid;
use crate::ledger::{Charge, Promise};
use crate::reason::Reason;
use crate::thin::volume_charge;
use crate::units::{Bytes, Timestamp};
use crate::view::{Access, LedgerView, Placement, PoolView, ReservationView, View};

use super::place::{stopped, stopped_or_full};
use super::queue::overdue;
use super::room;
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
        /// What makes room for it.
        removals: Vec<Change>,
    },
}

/// What is to be done now for a reservation at its place. `None` if it has what it asks for, or if that is not known.
pub(super) fn decide(
    view: &View,
    reservation: &ReservationView,
    place: &Placement,
    now: Timestamp,
) -> Option<Growth> {
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
    let new = [(reservation.uid.clone(), Promise { charge, ..held.clone() })];
    let Some((reason, why, shortfall)) = refusal(view, reservation, pool, ledger, &new)
        .or_else(|| short(view, ledger, &new))
        .or_else(|| behind_others(view, ledger, now))
    else {
        return Some(Growth::Promise(Box::new(ledger.with(&new))));
    };
    let message = format!("{} are promised, {} are asked for: {why}", held.charge.data, charge.data);
    let refused = Growth::Refused { reason, message, shortfall, removals: Vec::new() };
    Some(if is_about_room(reason) { make_room(view, ledger, &new, refused, now) } else { refused })
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
    new: &[(Uid, Promise)],
) -> Option<Why> {
    let at = at(ledger);
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
    if let Some(damaged) = stopped(report, new).filter(|stopped| !stopped.is_about_space()) {
        return Some((damaged.reason(), format!("{at} {damaged}"), None));
    }
    if let Err(shortfall) = fits_empty(&ledger.capacity, new) {
        let why = format!("{at} {shortfall} even when empty");
        return Some((Reason::LargerThanPool, why, Some(shortfall.bytes)));
    }
    limited(view, reservation, pool, ledger, new)
}

/// That others have the room that it needs.
fn short(view: &View, ledger: &LedgerView, new: &[(Uid, Promise)]) -> Option<Why> {
    let report = view.report_of(&ledger.pool, &ledger.node)?;
    if let Some(full) = stopped_or_full(report, ledger, new) {
        return Some((full.reason(), format!("{} {full}", at(ledger)), None));
    }
    let shortfall = fits(ledger, new).err()?;
    let why = format!("{} {shortfall}", at(ledger));
    Some((Reason::InsufficientCapacity, why, Some(shortfall.bytes)))
}

/// That nobody overtakes those that wait for that room any more.
fn behind_others(view: &View, ledger: &LedgerView, now: Timestamp) -> Option<Why> {
    let (count, bytes) = overdue(view, ledger, now);
    let why = format!("{} has room, for requests that have waited long: {count} of {bytes}", at(ledger));
    (count > 0).then_some((Reason::Queued, why, None))
}

/// With the removals that make room for it, if they are enough. What goes for those that nobody overtakes is theirs to decide.
fn make_room(
    view: &View,
    ledger: &LedgerView,
    new: &[(Uid, Promise)],
    refused: Growth,
    now: Timestamp,
) -> Growth {
    let room = room::in_ledger(view, ledger, new, now).filter(|_| overdue(view, ledger, now).0 == 0);
    match (room, refused) {
        (Some((message, removals)), Growth::Refused { shortfall, .. }) => {
            Growth::Refused { reason: Reason::Reclaiming, message, shortfall, removals }
        }
        (_, refused) => refused,
    }
}

const fn is_about_room(reason: Reason) -> bool {
    matches!(reason, Reason::InsufficientCapacity | Reason::DataAlmostFull | Reason::MetadataAlmostFull)
}

fn at(ledger: &LedgerView) -> String {
    format!("pool {} on node {}", ledger.pool, ledger.node)
}

/// What the limits of its namespace have against it.
fn limited(
    view: &View,
    reservation: &ReservationView,
    pool: &PoolView,
    ledger: &LedgerView,
    new: &[(Uid, Promise)],
) -> Option<Why> {
    let namespace = &reservation.claim_namespace;
    if !tenant::is_limited(view, pool, namespace) {
        return None;
    }
    if let Some(hidden) = tenant::unjudged(view, pool, namespace) {
        return Some((Reason::ObjectUnreadable, hidden, None));
    }
    let held = ledger.promises.get(&reservation.uid).map(|held| held.charge.data).unwrap_or_default();
    let asked: Bytes = new.iter().map(|(_, larger)| larger.charge.data).sum();
    let more = asked.saturating_sub(held);
    let excess = Holdings::of(view, pool).excess(view, pool, reservation, more)?;
    Some((Reason::TenantLimit, format!("pool {} {excess}", pool.name), excess.shortfall()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::change::ReservationReport;
    use crate::fixture::{HOUR, add, at, hold, image, placed, reservation, template, thin_view, view};
    use crate::ids::{NodeName, PoolName};
    use crate::ledger::Class;
    use crate::overcommit::Percent;
    use crate::retire::retired;
    use crate::thin::Usage;
    use crate::units::Generation;
    use crate::view::{ReservationState, Service, TenantLimit};

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
        changes_at(view, Timestamp(0))
    }

    fn changes_at(view: &View, now: Timestamp) -> Vec<Change> {
        crate::reservation::decide(view, &Uid::from("v"), now)
    }

    /// This, with an image of 25 bytes that nothing needs.
    fn with_idle_image(mut view: View) -> View {
        let import = template(30, 20);
        view.imports.insert(import.name.clone(), import);
        let idle = image("a", 25, 0);
        let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
        ledger.promises.insert(idle.uid.clone(), idle.promise(None));
        view.images.insert(idle.name.clone(), idle);
        view
    }

    /// A request for 60 bytes that waits since the beginning.
    fn with_waiting(mut view: View, access: Access) -> View {
        let mut waits = reservation("waits", 60, 0);
        (waits.access, waits.state, waits.queued_since) =
            (access, ReservationState::Queued, Some(Timestamp(0)));
        add(&mut view, waits);
        view
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

    #[test]
    fn a51_what_nothing_needs_goes_before_a_growth_is_refused() {
        let mut view = with_idle_image(asked_for(70));
        view.reservations
            .values_mut()
            .for_each(|volume| (volume.ttl_millis, volume.ready_since) = (Some(HOUR), Some(Timestamp(0))));
        let all = changes(&view);
        let report = told(&view);
        assert_eq!((report.state, report.reason), (ReservationState::Ready, Reason::Reclaiming));
        assert_eq!((report.shortfall, retired(&all)), (Some(Bytes(25)), vec![&*image("a", 25, 0).name]));
        let soon =
            |change: &Change| matches!(change, Change::RetryAfter { millis } if *millis <= room::LOOK_MILLIS);
        assert!(all.iter().any(soon), "and not when it expires: {all:?}");
        view.leader = false;
        assert_eq!(
            (told(&view).reason, retired(&changes(&view))),
            (Reason::Reclaiming, vec![]),
            "the leader does it"
        );
        view.leader = true;
        let too_large = with_idle_image(asked_for(71));
        assert_eq!(
            (told(&too_large).reason, retired(&changes(&too_large))),
            (Reason::InsufficientCapacity, vec![])
        );
        let long = Timestamp(HOUR / 4);
        let behind = with_waiting(with_idle_image(asked_for(70)), Access::File);
        assert_eq!(retired(&changes_at(&behind, long)), [""; 0], "a request that waits long may need it");
        view.images.clear();
        view.ledgers.values_mut().for_each(|ledger| drop(ledger.promises.remove(&image("a", 25, 0).uid)));
        assert!(matches!(&changes(&view)[..], [Change::WriteLedger { .. }]));
    }

    #[test]
    fn a_growth_goes_before_those_who_wait_but_not_before_those_whom_nobody_overtakes() {
        let grows =
            |view: &View, now| matches!(&changes_at(view, Timestamp(now))[..], [Change::WriteLedger { .. }]);
        let mut view = with_waiting(asked_for(70), Access::File);
        assert!(grows(&view, HOUR / 4 - 1));
        assert!(!grows(&view, HOUR / 4));
        let all = changes_at(&view, Timestamp(HOUR / 4));
        let [Change::ReportReservation { report, .. }, Change::RetryAfter { .. }] = &all[..] else {
            panic!("{all:?}")
        };
        assert_eq!((report.state, report.reason), (ReservationState::Ready, Reason::Queued));
        assert_eq!(
            report.message,
            "40 bytes are promised, 70 bytes are asked for: pool p on node a has room, for requests that have waited long: 1 of \
             60 bytes"
        );
        assert!(grows(&with_waiting(asked_for(70), Access::Stream), HOUR / 4), "it needs no room");
        view.pools.values_mut().for_each(|pool| pool.service = Service::Cordoned);
        assert!(grows(&view, HOUR / 4), "it gets no place there");
    }

    #[test]
    fn an_overcommitted_volume_does_not_grow_where_volumes_have_written_all() {
        let mut view = thin_view(&["a"], Bytes::gib(10));
        let mut volume = reservation("v", 2 << 30, 0);
        (volume.access, volume.state) = (Access::Block, ReservationState::Ready);
        (volume.assignment, volume.prepared) = (Some(placed("p", "a", 1)), Some(Generation::FIRST));
        add(&mut view, volume);
        hold(&mut view, "a", "v", Class::Volumes, 1 << 30);
        let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
        ledger.capacity.overcommit.percent = Percent::from(200);
        assert!(matches!(&changes(&view)[..], [Change::WriteLedger { .. }]));
        let report = view.nodes.values_mut().next().and_then(|node| node.pools.values_mut().next());
        let thin = report.expect("one").thin.as_mut().expect("thin");
        thin.volumes.data = Usage { used: Bytes::gib(10), total: Bytes::gib(10) };
        assert_eq!(told(&view).reason, Reason::DataAlmostFull);
    }
}
