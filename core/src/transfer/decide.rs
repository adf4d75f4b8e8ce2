//! The next steps for one import.

use crate::budget::free;
use crate::change::Change;
use crate::ids::{NodeName, ObjectName, PoolName, import_reservation_name};
use crate::ledger::Class;
use crate::reason::Reason;
use crate::reclaim::templates_of;
use crate::states::Machine as _;
use crate::units::{Bytes, Generation, Timestamp};
use crate::view::{Access, ImportView, Placement, ReservationState, ReservationView, TransferState, View};

use super::state::Event;

/// The next steps for the import with this name. Time plays no part in them yet.
pub fn decide(view: &View, name: &ObjectName, _now: Timestamp) -> Vec<Change> {
    let Some(import) = view.imports.get(name) else { return Vec::new() };
    let reservation = view.reservation_named(&reservation_name(import));
    if import.deleting {
        return release(view, import, reservation);
    }
    if import.durable.is_some() {
        let told =
            report(import, Event::Finish, Reason::Ready, "durable in its image store".to_owned(), false);
        return [told].into_iter().chain(drop_reservation(reservation)).collect();
    }
    if import.state == TransferState::Done {
        return drop_reservation(reservation).into_iter().collect(); // whatever else is shown of it now: that was true
    }
    if let Some(message) = &import.invalid {
        let told = report(import, Event::Fail, Reason::InvalidSpec, message.clone(), false);
        return [told].into_iter().chain(drop_reservation(reservation)).collect();
    }
    let ended = import.error.as_ref().filter(|error| !error.retryable);
    if let Some(value) =
        import.retry.as_ref().filter(|_| ended.is_some() || import.state == TransferState::Failed)
    {
        return retry(view, import, reservation, value);
    }
    if let Some(error) = ended {
        let told = report(import, Event::Fail, error.reason, error.message.clone(), false);
        return [told].into_iter().chain(drop_reservation(reservation)).collect();
    }
    if import.state == TransferState::Failed {
        // Its reservation was refused; that is kept, holds nothing, and says why.
        let held = reservation.filter(|reservation| reservation.state != ReservationState::Refused);
        return drop_reservation(held).into_iter().collect();
    }
    if view.stores.get(&import.store).is_none_or(|store| store.deleting) {
        let message = format!("there is no ImageStore {}", import.store);
        return vec![report(import, Event::Wait, Reason::ImageStoreNotFound, message, false)];
    }
    if !import.has_finalizer {
        return vec![Change::GuardImport { name: import.name.clone(), uid: import.uid.clone() }];
    }
    match (&import.assignment, import.peak) {
        (Some(place), Some(peak)) => stage(import, place, peak, reservation),
        (place, None) => probe(view, import, place.as_ref()),
        (None, Some(_)) => probe(view, import, None),
    }
}

/// It begins again with an assignment of its own, to which nothing counts that an earlier one has come to, once what that
/// held is given back.
fn retry(view: &View, import: &ImportView, held: Option<&ReservationView>, value: &str) -> Vec<Change> {
    if held.is_some() {
        return drop_reservation(held).into_iter().collect();
    }
    let before = import.assignment.as_ref();
    let same = before
        .filter(|place| !view.is_lost(&place.node))
        .map(|place| (place.pool.clone(), place.node.clone()));
    let Some((pool, node)) = same.or_else(|| most_free(view, import)) else { return Vec::new() };
    let generation = before.map_or(Generation::FIRST, |place| place.generation.next());
    let placement = Placement { pool, node, generation };
    vec![Change::AssignImport {
        name: import.name.clone(),
        version: import.version.clone(),
        placement,
        retried: Some(value.to_owned()),
    }]
}

fn reservation_name(import: &ImportView) -> ObjectName {
    ObjectName::new(&import.name.namespace, import_reservation_name(&import.name.name, &import.uid))
}

/// The head of the source is read by any live node; by another one if that is lost, which nothing depends on.
fn probe(view: &View, import: &ImportView, place: Option<&Placement>) -> Vec<Change> {
    let best = most_free(view, import);
    match (place, best) {
        (Some(place), None) => {
            let message = format!("node {} reads the head of the source", place.node);
            vec![report(import, Event::Probe, Reason::Probing, message, false)]
        }
        (Some(place), Some(_)) if !view.is_lost(&place.node) => {
            let message = format!("node {} reads the head of the source", place.node);
            vec![report(import, Event::Probe, Reason::Probing, message, false)]
        }
        (_, Some((pool, node))) => {
            let generation = place.map_or(Generation::FIRST, |place| place.generation.next());
            vec![assign(import, Placement { pool, node, generation })]
        }
        (None, None) if !view.pools.values().any(|pool| import.pools.allows(pool)) => {
            let message = "no pool has these labels".to_owned();
            vec![report(import, Event::Wait, Reason::NoMatchingPool, message, false)]
        }
        (None, None) => {
            let message = "no live node carries a pool that may be used".to_owned();
            vec![report(import, Event::Wait, Reason::NoMatchingNode, message, false)]
        }
    }
}

/// The live node with most left in a usable pool that the import allows; ties go to the first by pool and node.
fn most_free(view: &View, import: &ImportView) -> Option<(PoolName, NodeName)> {
    let mut best: Option<(Bytes, (PoolName, NodeName))> = None;
    let allowed = view
        .pools
        .values()
        .filter(|pool| !pool.deleting && pool.invalid.is_none() && import.pools.allows(pool));
    for pool in allowed {
        for (name, node) in view.nodes.iter().filter(|(_, node)| node.live) {
            if !node.pools.get(&pool.name).is_some_and(|report| report.usable) {
                continue;
            }
            let place = (pool.name.clone(), name.clone());
            let left = view.ledgers.get(&place).map_or(Bytes::ZERO, |ledger| free(ledger, Class::Images));
            if best.as_ref().is_none_or(|(most, _)| left > *most) {
                best = Some((left, place));
            }
        }
    }
    best.map(|(_, place)| place)
}

/// What is needed is known: it is reserved, and the work goes where the reservation is.
fn stage(
    import: &ImportView,
    place: &Placement,
    peak: Bytes,
    reservation: Option<&ReservationView>,
) -> Vec<Change> {
    let Some(reservation) = reservation else {
        let create = Change::CreateReservation {
            name: reservation_name(import),
            owner: import.name.clone(),
            owner_uid: import.uid.clone(),
            pools: import.pools.clone(),
            size: peak,
            access: Access::File,
        };
        let message = format!("needs {peak} in a pool");
        return vec![create, report(import, Event::Reserve, Reason::WaitingForReservation, message, false)];
    };
    if reservation.state == ReservationState::Refused && !reservation.deleting {
        let message = format!("StagingReservation {} of {peak} was refused; it says why", reservation.name);
        return vec![report(import, Event::Fail, Reason::CapacityRefused, message, false)];
    }
    let Some(reserved) = reservation.assignment.as_ref().filter(|_| !reservation.deleting) else {
        let message = format!("StagingReservation {} of {peak} is {:?}", reservation.name, reservation.state);
        return vec![report(import, Event::Reserve, Reason::WaitingForReservation, message, false)];
    };
    if (&reserved.pool, &reserved.node) != (&place.pool, &place.node) {
        let generation = place.generation.next();
        let placement = Placement { pool: reserved.pool.clone(), node: reserved.node.clone(), generation };
        return vec![assign(import, placement)];
    }
    if reservation.prepared != Some(reserved.generation) {
        let message = format!("node {} makes room in pool {}", reserved.node, reserved.pool);
        return vec![report(import, Event::Reserve, Reason::WaitingForReservation, message, true)];
    }
    let (reason, message) = match &import.error {
        Some(error) if error.reason == Reason::ObjectStoreUnavailable => {
            (error.reason, error.message.clone())
        }
        Some(error) => (Reason::Retrying, format!("{}: {}", error.reason, error.message)),
        None => (Reason::Progressing, format!("node {} imports in pool {}", reserved.node, reserved.pool)),
    };
    vec![report(import, Event::Work, reason, message, true)]
}

/// The node ends the work and removes its traces; then the reservation goes, then the finalizer.
fn release(view: &View, import: &ImportView, reservation: Option<&ReservationView>) -> Vec<Change> {
    let gone = match &import.assignment {
        None => true,
        Some(place) => {
            // A report that cannot be read is not gone.
            !view.nodes.contains_key(&place.node) && !view.hides_reports()
                || import.released.is_some_and(|released| released >= place.generation)
        }
    };
    if !gone {
        return Vec::new();
    }
    let given_up = give_up_copies(view, import);
    if !given_up.is_empty() {
        return given_up;
    }
    let unguard = || Change::UnguardImport { name: import.name.clone(), uid: import.uid.clone() };
    drop_reservation(reservation).into_iter().chain(import.has_finalizer.then(unguard)).collect()
}

/// Who deletes a template gives up its image: staged copies that no other template has need not be kept as the last ones.
/// Another template keeps them also where its store is gone: then they are all that it has.
fn give_up_copies(view: &View, import: &ImportView) -> Vec<Change> {
    let Some(durable) = import.durable.as_ref().filter(|_| import.has_finalizer) else { return Vec::new() };
    if templates_of(view, &durable.digest).next().is_some() {
        return Vec::new();
    }
    let copies = view
        .images
        .values()
        .filter(|image| image.digest == durable.digest && !image.deleting && !image.given_up);
    copies.map(|image| Change::GiveUpImage { name: image.name.clone(), uid: image.uid.clone() }).collect()
}

fn drop_reservation(reservation: Option<&ReservationView>) -> Option<Change> {
    let reservation = reservation.filter(|reservation| !reservation.deleting)?;
    Some(Change::DeleteReservation { name: reservation.name.clone(), uid: reservation.uid.clone() })
}

fn assign(import: &ImportView, placement: Placement) -> Change {
    Change::AssignImport {
        name: import.name.clone(),
        version: import.version.clone(),
        placement,
        retried: None,
    }
}

/// What it takes no more changes nothing of its state.
fn report(import: &ImportView, event: Event, reason: Reason, message: String, reserved: bool) -> Change {
    Change::ReportImport {
        name: import.name.clone(),
        uid: import.uid.clone(),
        version: import.version.clone(),
        state: import.state.after(event).unwrap_or(import.state),
        reason,
        message,
        reserved,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{add, placed, reservation, template, unreadable, view};
    use crate::ids::Uid;
    use crate::view::{ObjectVersion, WorkError};

    fn fresh() -> View {
        let mut view = view(&[("a", 100), ("b", 200)]);
        let mut import = template(50, 20);
        import.state = TransferState::Pending;
        import.assignment = None;
        import.peak = None;
        import.durable = None;
        view.imports.insert(import.name.clone(), import);
        view
    }

    fn import(view: &mut View) -> &mut ImportView {
        view.imports.values_mut().next().expect("one")
    }

    fn ask(view: &View) -> Vec<Change> {
        decide(view, &ObjectName::new("ns", "template"), Timestamp(0))
    }

    fn told(view: &View) -> (TransferState, Reason) {
        match ask(view).iter().find(|change| matches!(change, Change::ReportImport { .. })) {
            Some(Change::ReportImport { state, reason, .. }) => (*state, *reason),
            _ => panic!("no report"),
        }
    }

    fn own_reservation(view: &mut View) -> Uid {
        let name = reservation_name(import(view));
        let mut own = reservation("own", 30, 0);
        own.name = name;
        add(view, own)
    }

    #[test]
    fn it_goes_from_probe_to_reservation_to_its_node_to_ready() {
        let mut view = fresh();
        import(&mut view).has_finalizer = false;
        assert!(matches!(&ask(&view)[..], [Change::GuardImport { .. }]));
        import(&mut view).has_finalizer = true;
        let changes = ask(&view);
        assert!(
            matches!(&changes[..], [Change::AssignImport { placement, .. }] if *placement == placed("p", "b", 1))
        );
        import(&mut view).assignment = Some(placed("p", "b", 1));
        assert_eq!(told(&view), (TransferState::Probing, Reason::Probing));
        import(&mut view).peak = Some(Bytes(30));
        assert!(matches!(
            &ask(&view)[..],
            [Change::CreateReservation { size: Bytes(30), access: Access::File, .. }, _]
        ));
        let own = own_reservation(&mut view);
        assert_eq!(told(&view), (TransferState::Queued, Reason::WaitingForReservation));
        view.reservations.get_mut(&own).expect("there").assignment = Some(placed("p", "a", 1));
        let changes = ask(&view);
        assert!(
            matches!(&changes[..], [Change::AssignImport { placement, .. }] if *placement == placed("p", "a", 2))
        );
        import(&mut view).assignment = Some(placed("p", "a", 2));
        assert_eq!(told(&view).0, TransferState::Queued, "the room is not made yet");
        view.reservations.get_mut(&own).expect("there").prepared = Some(Generation::FIRST);
        assert_eq!(told(&view), (TransferState::Working, Reason::Progressing));
        let (reason, message) = (Reason::SourceStalled, "nothing for 60 s".to_owned());
        import(&mut view).error = Some(WorkError { reason, message, retryable: true });
        assert_eq!(told(&view), (TransferState::Working, Reason::Retrying));
        let (reason, message) = (Reason::ObjectStoreUnavailable, "connection refused".to_owned());
        import(&mut view).error = Some(WorkError { reason, message, retryable: true });
        assert_eq!(told(&view), (TransferState::Working, Reason::ObjectStoreUnavailable));
        import(&mut view).durable = template(50, 20).durable;
        assert!(matches!(
            &ask(&view)[..],
            [Change::ReportImport { state: TransferState::Done, .. }, Change::DeleteReservation { .. }]
        ));
        view.reservations.clear();
        assert_eq!(ask(&view).len(), 1, "and nothing is made again");
    }

    #[test]
    fn what_ended_does_not_begin_again_and_is_reported_at_the_version_that_was_seen() {
        let mut view = fresh();
        import(&mut view).assignment = Some(placed("p", "a", 1));
        import(&mut view).peak = Some(Bytes(30));
        import(&mut view).version = ObjectVersion("7".to_owned());
        let changes = ask(&view);
        assert!(changes.iter().any(
            |change| matches!(change, Change::ReportImport { version, .. } if *version == ObjectVersion("7".to_owned()))
        ));
        for ended in [TransferState::Done, TransferState::Failed] {
            import(&mut view).state = ended;
            assert_eq!(ask(&view), []);
            let (reason, message) = (Reason::SourceStalled, String::new());
            import(&mut view).error = Some(WorkError { reason, message, retryable: true });
            assert_eq!(ask(&view), []);
        }
        import(&mut view).state = TransferState::Done;
        import(&mut view).invalid = Some("spec".to_owned());
        assert_eq!(ask(&view), []);
    }

    #[test]
    fn a_terminal_error_ends_it_and_gives_the_space_back() {
        let mut view = fresh();
        import(&mut view).assignment = Some(placed("p", "a", 1));
        own_reservation(&mut view);
        let (reason, message) = (Reason::ChecksumMismatch, "expected x".to_owned());
        import(&mut view).error = Some(WorkError { reason, message, retryable: false });
        assert!(matches!(
            &ask(&view)[..],
            [
                Change::ReportImport { state: TransferState::Failed, reason: Reason::ChecksumMismatch, .. },
                Change::DeleteReservation { .. }
            ]
        ));
    }

    #[test]
    fn what_is_not_valid_any_more_fails_and_gives_the_space_back() {
        let mut view = fresh();
        import(&mut view).assignment = Some(placed("p", "a", 1));
        import(&mut view).peak = Some(Bytes(30));
        own_reservation(&mut view);
        import(&mut view).invalid = Some("spec.limits.bytes: `0` must be more than 0".to_owned());
        assert!(matches!(
            &ask(&view)[..],
            [
                Change::ReportImport { state: TransferState::Failed, reason: Reason::InvalidSpec, .. },
                Change::DeleteReservation { .. }
            ]
        ));
    }

    #[test]
    fn a_refused_reservation_fails_it_once_and_is_not_made_again() {
        let mut view = fresh();
        import(&mut view).assignment = Some(placed("p", "a", 1));
        import(&mut view).peak = Some(Bytes(30));
        let own = own_reservation(&mut view);
        view.reservations.get_mut(&own).expect("there").state = ReservationState::Refused;
        assert_eq!(told(&view), (TransferState::Failed, Reason::CapacityRefused));
        import(&mut view).state = TransferState::Failed;
        assert_eq!(ask(&view), []);
        view.reservations.clear();
        assert_eq!(ask(&view), []);
    }

    #[test]
    fn a_probe_moves_away_from_a_lost_node_and_waits_where_there_is_no_other() {
        let mut view = fresh();
        import(&mut view).assignment = Some(placed("p", "b", 1));
        let state = view.nodes.get_mut(&NodeName::from("b")).expect("there");
        (state.live, state.reported) = (false, false);
        assert_eq!(
            told(&view),
            (TransferState::Probing, Reason::Probing),
            "nothing is known of the node yet"
        );
        view.nodes.get_mut(&NodeName::from("b")).expect("there").silent = true;
        let changes = ask(&view);
        assert!(
            matches!(&changes[..], [Change::AssignImport { placement, .. }] if *placement == placed("p", "a", 2))
        );
        view.nodes.values_mut().for_each(|node| node.live = false);
        assert_eq!(told(&view).0, TransferState::Probing);
        import(&mut view).assignment = None;
        assert_eq!(told(&view), (TransferState::Pending, Reason::NoMatchingNode));
        view.stores.clear();
        assert_eq!(told(&view), (TransferState::Pending, Reason::ImageStoreNotFound));
    }

    #[test]
    fn deletion_waits_for_the_node_then_gives_everything_back() {
        let mut view = fresh();
        own_reservation(&mut view);
        import(&mut view).deleting = true;
        import(&mut view).assignment = Some(placed("p", "a", 2));
        assert_eq!(ask(&view), []);
        import(&mut view).released = Some(Generation(1));
        assert_eq!(ask(&view), [], "an older generation's end is not this one's");
        import(&mut view).released = Some(Generation(2));
        assert!(matches!(&ask(&view)[..], [Change::DeleteReservation { .. }, Change::UnguardImport { .. }]));
        import(&mut view).released = None;
        view.nodes.clear();
        view.unreadable.push(unreadable("StagingNode", ObjectName::new("", "a"), "node"));
        assert_eq!(ask(&view), [], "its report may be the one that cannot be read");
        view.unreadable.clear();
        assert_eq!(ask(&view).len(), 2, "the node is gone for good");
    }

    #[test]
    fn a54_one_that_failed_is_tried_again_once_for_each_value() {
        let mut view = fresh();
        import(&mut view).assignment = Some(placed("p", "a", 3));
        import(&mut view).has_finalizer = true;
        import(&mut view).peak = Some(Bytes(30));
        import(&mut view).retry = Some("1".to_owned());
        assert!(
            !ask(&view).iter().any(|change| matches!(change, Change::AssignImport { .. })),
            "it works still"
        );
        import(&mut view).state = TransferState::Failed;
        let refused = own_reservation(&mut view);
        view.reservations.get_mut(&refused).expect("there").state = ReservationState::Refused;
        assert!(matches!(&ask(&view)[..], [Change::DeleteReservation { uid, .. }] if *uid == refused));
        view.reservations.get_mut(&refused).expect("there").deleting = true;
        assert_eq!(ask(&view), [], "what it held is being given back");
        view.reservations.clear();
        let error = WorkError { reason: Reason::SourceChanged, message: "m".to_owned(), retryable: false };
        for error in [None, Some(error)] {
            import(&mut view).error = error;
            let [Change::AssignImport { placement, retried: Some(value), .. }] = &ask(&view)[..] else {
                panic!("{:?}", ask(&view))
            };
            assert_eq!((placement, &**value), (&placed("p", "a", 4), "1"));
        }
        // As the write leaves it: it goes on as any other does.
        import(&mut view).assignment = Some(placed("p", "a", 4));
        (import(&mut view).retry, import(&mut view).error) = (None, None);
        import(&mut view).state = TransferState::Pending;
        assert_eq!(told(&view), (TransferState::Queued, Reason::WaitingForReservation));
        import(&mut view).state = TransferState::Failed;
        assert_eq!(ask(&view), [], "the same value does nothing more");
        import(&mut view).retry = Some("2".to_owned());
        import(&mut view).durable = template(50, 20).durable;
        assert_eq!(told(&view).0, TransferState::Done, "nothing is done again that is done");
    }

    #[test]
    fn a54_one_whose_node_is_lost_is_tried_again_on_another() {
        let mut view = fresh();
        import(&mut view).assignment = Some(placed("p", "a", 1));
        import(&mut view).state = TransferState::Failed;
        import(&mut view).retry = Some("1".to_owned());
        let lost = view.nodes.get_mut(&"a".into()).expect("there");
        (lost.live, lost.silent) = (false, true);
        assert!(view.is_lost(&"a".into()), "{:?}", view.nodes);
        let [Change::AssignImport { placement, .. }] = &ask(&view)[..] else { panic!("{:?}", ask(&view)) };
        assert_eq!(*placement, placed("p", "b", 2));
    }
}
