use super::*;
use crate::fixture::{add, placed, reservation, template, unreadable, view};
use crate::ids::{NodeName, Uid, transfer_reservation_name};
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

fn import(view: &mut View) -> &mut TransferView {
    view.imports.values_mut().next().expect("one")
}

fn ask(view: &View) -> Vec<Change> {
    decide(view, TransferKind::Import, &ObjectName::new("ns", "template"), Timestamp(0))
}

fn told(view: &View) -> (TransferState, Reason) {
    match ask(view).iter().find(|change| matches!(change, Change::ReportTransfer { .. })) {
        Some(Change::ReportTransfer { state, reason, .. }) => (*state, *reason),
        _ => panic!("no report"),
    }
}

fn own_reservation(view: &mut View) -> Uid {
    let import = import(view);
    let name = transfer_reservation_name(import.kind, &import.name.name, &import.uid);
    let mut own = reservation("own", 30, 0);
    own.name = ObjectName::new("ns", name);
    add(view, own)
}

#[test]
fn it_goes_from_probe_to_reservation_to_its_node_to_ready() {
    let mut view = fresh();
    import(&mut view).has_finalizer = false;
    assert!(matches!(&ask(&view)[..], [Change::GuardTransfer { .. }]));
    import(&mut view).has_finalizer = true;
    let changes = ask(&view);
    assert!(
        matches!(&changes[..], [Change::AssignTransfer { placement, .. }] if *placement == placed("p", "b", 1))
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
        matches!(&changes[..], [Change::AssignTransfer { placement, .. }] if *placement == placed("p", "a", 2))
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
        [Change::ReportTransfer { state: TransferState::Done, .. }, Change::DeleteReservation { .. }]
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
        |change| matches!(change, Change::ReportTransfer { version, .. } if *version == ObjectVersion("7".to_owned()))
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
            Change::ReportTransfer { state: TransferState::Failed, reason: Reason::ChecksumMismatch, .. },
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
            Change::ReportTransfer { state: TransferState::Failed, reason: Reason::InvalidSpec, .. },
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
    assert_eq!(told(&view), (TransferState::Probing, Reason::Probing), "nothing is known of the node yet");
    view.nodes.get_mut(&NodeName::from("b")).expect("there").silent = true;
    let changes = ask(&view);
    assert!(
        matches!(&changes[..], [Change::AssignTransfer { placement, .. }] if *placement == placed("p", "a", 2))
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
    assert!(matches!(&ask(&view)[..], [Change::DeleteReservation { .. }, Change::UnguardTransfer { .. }]));
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
        !ask(&view).iter().any(|change| matches!(change, Change::AssignTransfer { .. })),
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
        let [Change::AssignTransfer { placement, retried: Some(value), .. }] = &ask(&view)[..] else {
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
    let [Change::AssignTransfer { placement, .. }] = &ask(&view)[..] else { panic!("{:?}", ask(&view)) };
    assert_eq!(*placement, placed("p", "b", 2));
}

/// A transfer that has no node yet, of `ns/disk`, beside an import that is done.
fn moving() -> View {
    let mut view = fresh();
    let mut transfer = view.imports.pop_first().expect("one").1;
    (transfer.kind, transfer.name) = (TransferKind::Transfer, ObjectName::new("ns", "disk"));
    transfer.uid = Uid::from("transfer");
    transfer.created = Timestamp(1_000);
    view.transfers.insert(transfer.name.clone(), transfer);
    let done = template(50, 20);
    view.imports.insert(done.name.clone(), done);
    view
}

fn moved(view: &mut View) -> &mut TransferView {
    view.transfers.values_mut().next().expect("one")
}

fn ask_at(view: &View, millis: u64) -> Vec<Change> {
    decide(view, TransferKind::Transfer, &ObjectName::new("ns", "disk"), Timestamp(millis))
}

fn said(changes: &[Change]) -> Option<(TransferState, Reason, bool)> {
    changes.iter().find_map(|change| match change {
        Change::ReportTransfer { state, reason, reserved, .. } => Some((*state, *reason, *reserved)),
        _ => None,
    })
}

/// Its reservation number `number`, ready on node `a`.
fn reserved(view: &mut View, number: usize, access: Access) -> Uid {
    let id = moved(view).id();
    let mut names = transfer_reservation_names(id.kind, &id.name.name, &id.uid);
    let name = names.nth(number).expect("there are as many");
    let mut own = reservation(&format!("own-{number}"), 30, 0);
    own.name = ObjectName::new("ns", name);
    (own.access, own.assignment, own.prepared) = (access, Some(placed("p", "a", 1)), Some(Generation::FIRST));
    add(view, own)
}

fn lose(view: &mut View, node: &str) {
    let lost = view.nodes.get_mut(&NodeName::from(node)).expect("there");
    (lost.live, lost.silent) = (false, true);
}

#[test]
fn a_transfer_goes_the_way_of_an_import_and_is_no_template() {
    let mut view = moving();
    assert!(
        matches!(&ask_at(&view, 0)[..], [Change::AssignTransfer { id, .. }] if *id == moved(&mut view).id())
    );
    moved(&mut view).assignment = Some(placed("p", "a", 1));
    assert_eq!(said(&ask_at(&view, 0)), Some((TransferState::Probing, Reason::Probing, false)));
    moved(&mut view).peak = Some(Bytes(30));
    let changes = ask_at(&view, 0);
    assert!(matches!(
        &changes[..],
        [Change::CreateReservation { owner, access: Access::File, .. }, _] if owner.kind == TransferKind::Transfer
    ));
    reserved(&mut view, 0, Access::File);
    assert_eq!(said(&ask_at(&view, 0)), Some((TransferState::Working, Reason::Progressing, true)));
    moved(&mut view).done = true;
    let changes = ask_at(&view, 0);
    assert!(matches!(&changes[..], [Change::ReportTransfer { .. }, Change::DeleteReservation { .. }]));
    assert_eq!(said(&changes), Some((TransferState::Done, Reason::Succeeded, false)));
    let image = template(50, 20).durable.expect("durable").digest;
    assert_eq!(templates_of(&view, &image).count(), 1, "the import alone");
}

#[test]
fn every_store_that_it_needs_must_be_there() {
    let mut view = moving();
    moved(&mut view).stores.push(ObjectName::new("ns", "other"));
    let changes = ask_at(&view, 0);
    let [Change::ReportTransfer { reason, message, .. }] = &changes[..] else { panic!("{changes:?}") };
    assert_eq!((*reason, message.as_str()), (Reason::ImageStoreNotFound, "there is no ImageStore ns/other"));
    moved(&mut view).stores.clear();
    assert!(matches!(&ask_at(&view, 0)[..], [Change::AssignTransfer { .. }]), "from elsewhere to elsewhere");
}

#[test]
fn b23_one_that_pauses_keeps_its_place_and_its_space_and_goes_on_there() {
    let mut view = moving();
    moved(&mut view).suspended = true;
    assert_eq!(
        said(&ask_at(&view, 0)),
        Some((TransferState::Suspended, Reason::Suspended, false)),
        "nothing has begun"
    );
    assert_eq!(ask_at(&view, 0).len(), 1, "and nothing begins");
    moved(&mut view).assignment = Some(placed("p", "a", 1));
    assert_eq!(ask_at(&view, 0).len(), 1, "nor is it probed");
    moved(&mut view).peak = Some(Bytes(30));
    let own = reserved(&mut view, 0, Access::File);
    let changes = ask_at(&view, 0);
    assert_eq!(said(&changes), Some((TransferState::Suspended, Reason::Suspended, true)));
    assert_eq!(changes.len(), 1, "nothing is given back");
    lose(&mut view, "a");
    view.reservations.get_mut(&own).expect("there").assignment = Some(placed("p", "b", 2));
    assert_eq!(ask_at(&view, 0).len(), 1, "nor is it placed anew");
    (moved(&mut view).state, moved(&mut view).suspended) = (TransferState::Suspended, false);
    view.reservations.get_mut(&own).expect("there").assignment = Some(placed("p", "a", 1));
    assert_eq!(said(&ask_at(&view, 0)), Some((TransferState::Working, Reason::Progressing, true)));
    moved(&mut view).suspended = true;
    moved(&mut view).done = true;
    assert_eq!(said(&ask_at(&view, 0)).map(|said| said.0), Some(TransferState::Done), "that was over before");
}

#[test]
fn one_that_has_failed_and_pauses_is_tried_again_once_it_goes_on() {
    let mut view = moving();
    moved(&mut view).assignment = Some(placed("p", "a", 1));
    moved(&mut view).state = TransferState::Failed;
    (moved(&mut view).retry, moved(&mut view).suspended) = (Some("1".to_owned()), true);
    assert_eq!(ask_at(&view, 0), []);
    moved(&mut view).suspended = false;
    assert!(matches!(&ask_at(&view, 0)[..], [Change::AssignTransfer { retried: Some(_), .. }]));
}

#[test]
fn a63_one_that_takes_longer_than_its_deadline_fails_and_gives_its_space_back() {
    let mut view = moving();
    moved(&mut view).assignment = Some(placed("p", "a", 1));
    moved(&mut view).peak = Some(Bytes(30));
    moved(&mut view).deadline = Some(60);
    reserved(&mut view, 0, Access::File);
    let due = 1_000 + 60_000;
    let early = ask_at(&view, due - 1);
    assert_eq!(said(&early).map(|said| said.0), Some(TransferState::Working));
    assert_eq!(early.last(), Some(&Change::RetryAfter { millis: 1 }), "it is looked at again in time");
    for suspended in [false, true] {
        moved(&mut view).suspended = suspended;
        let late = ask_at(&view, due);
        assert_eq!(said(&late), Some((TransferState::Failed, Reason::DeadlineExceeded, false)));
        assert!(matches!(&late[..], [_, Change::DeleteReservation { .. }]), "{late:?}");
    }
    moved(&mut view).suspended = false;
    moved(&mut view).done = true;
    assert_eq!(said(&ask_at(&view, due)).map(|said| said.0), Some(TransferState::Done), "it came in time");
    moved(&mut view).done = false;
    moved(&mut view).state = TransferState::Failed;
    view.reservations.clear();
    assert_eq!(ask_at(&view, due), [], "that is told once");
    moved(&mut view).retry = Some("1".to_owned());
    assert!(matches!(&ask_at(&view, due)[..], [Change::AssignTransfer { .. }]));
    (moved(&mut view).retry, moved(&mut view).state) = (None, TransferState::Pending);
    assert_eq!(
        said(&ask_at(&view, due)).map(|said| said.1),
        Some(Reason::DeadlineExceeded),
        "as before, if the deadline is what it was"
    );
    moved(&mut view).deadline = Some(120);
    assert_eq!(said(&ask_at(&view, due)).map(|said| said.0), Some(TransferState::Queued));
}

#[test]
fn a_terminal_error_is_told_rather_than_the_deadline() {
    let mut view = moving();
    moved(&mut view).deadline = Some(1);
    let (reason, message) = (Reason::ChecksumMismatch, String::new());
    moved(&mut view).error = Some(WorkError { reason, message, retryable: false });
    assert_eq!(said(&ask_at(&view, 10_000)).map(|said| said.1), Some(Reason::ChecksumMismatch));
}

#[test]
fn the_leader_deletes_what_ended_as_long_ago_as_it_says_unless_it_is_to_be_tried_again() {
    let mut view = moving();
    moved(&mut view).ttl_after_finished = Some(60);
    for state in [TransferState::Done, TransferState::Failed] {
        (moved(&mut view).state, moved(&mut view).finished) = (state, None);
        view.leader = true;
        assert_eq!(ask_at(&view, 900_000), [], "when it ended is not told yet");
        moved(&mut view).finished = Some(Timestamp(5_000));
        assert_eq!(ask_at(&view, 64_999), [Change::RetryAfter { millis: 1 }]);
        let delete =
            Change::DeleteTransfer { id: moved(&mut view).id(), version: moved(&mut view).version.clone() };
        assert_eq!(ask_at(&view, 65_000), [delete]);
        view.leader = false;
        assert!(matches!(&ask_at(&view, 65_000)[..], [Change::RetryAfter { .. }]), "another one does");
    }
    view.leader = true;
    moved(&mut view).retry = Some("1".to_owned());
    assert!(matches!(&ask_at(&view, 65_000)[..], [Change::AssignTransfer { .. }]));
    (moved(&mut view).retry, moved(&mut view).state) = (None, TransferState::Working);
    assert!(!ask_at(&view, 65_000).iter().any(|change| matches!(change, Change::DeleteTransfer { .. })));
    (moved(&mut view).deleting, moved(&mut view).state) = (true, TransferState::Done);
    assert!(!ask_at(&view, 65_000).iter().any(|change| matches!(change, Change::DeleteTransfer { .. })));
}

#[test]
fn what_needs_no_space_is_placed_anew_at_once_where_its_node_is_lost() {
    let mut view = moving();
    moved(&mut view).assignment = Some(placed("p", "a", 1));
    moved(&mut view).peak = Some(Bytes::ZERO);
    assert!(matches!(&ask_at(&view, 0)[..], [Change::CreateReservation { access: Access::Stream, .. }, _]));
    let first = reserved(&mut view, 0, Access::Stream);
    assert_eq!(said(&ask_at(&view, 0)).map(|said| said.0), Some(TransferState::Working));
    lose(&mut view, "a");
    let changes = ask_at(&view, 0);
    assert!(
        matches!(&changes[..], [Change::DeleteReservation { uid, .. }, _] if *uid == first),
        "{changes:?}"
    );
    view.reservations.get_mut(&first).expect("there").deleting = true;
    let changes = ask_at(&view, 0);
    let [Change::CreateReservation { name, .. }, _] = &changes[..] else { panic!("{changes:?}") };
    assert_ne!(*name, view.reservations[&first].name, "the lost node may give that one back much later");
    let second = reserved(&mut view, 1, Access::Stream);
    assert_eq!(view.reservations[&second].name, *name);
    view.reservations.get_mut(&second).expect("there").assignment = Some(placed("p", "b", 1));
    let changes = ask_at(&view, 0);
    assert!(
        matches!(&changes[..], [Change::AssignTransfer { placement, .. }] if *placement == placed("p", "b", 2))
    );
    view.reservations.remove(&first);
    moved(&mut view).assignment = Some(placed("p", "b", 2));
    assert_eq!(
        said(&ask_at(&view, 0)).map(|said| said.0),
        Some(TransferState::Working),
        "that the first one is gone changes nothing"
    );
    moved(&mut view).done = true;
    assert!(matches!(&ask_at(&view, 0)[..], [_, Change::DeleteReservation { uid, .. }] if *uid == second));
}

#[test]
fn what_holds_bytes_waits_until_its_lost_node_gives_them_back() {
    let mut view = moving();
    moved(&mut view).assignment = Some(placed("p", "a", 1));
    moved(&mut view).peak = Some(Bytes(30));
    let own = reserved(&mut view, 0, Access::File);
    lose(&mut view, "a");
    let gives_back =
        |view: &View| ask_at(view, 0).iter().any(|c| matches!(c, Change::DeleteReservation { .. }));
    assert!(!gives_back(&view));
    view.reservations.get_mut(&own).expect("there").deleting = true;
    assert_eq!(ask_at(&view, 0).len(), 1, "and no other one is made meanwhile");
}
