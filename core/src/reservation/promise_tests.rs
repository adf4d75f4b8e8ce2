//! What a promise is worth: with what is pending, in small pools, beside pools that fail, and while images are on their way.

use super::place::Verdict;
use crate::change::Change;
use crate::fixture::{add, ask, at, hold, image, node_pool, placed, pool, reservation, template, told, view};
use crate::ids::{Digest, NodeName, ObjectName, PoolName, Sha256Sum, Uid, staged_image_name};
use crate::ledger::Class;
use crate::reason::Reason;
use crate::retire::retired;
use crate::units::{Bytes, Timestamp};
use crate::view::{
    Access, AssignedImage, ImageView, PoolChoice, ReservationState, ReservationView, View, WhenFull,
};

fn is_promised(changes: &[Change]) -> bool {
    matches!(changes, [Change::WriteLedger { .. }, Change::AssignReservation { .. }])
}

/// A request for a volume of 10 bytes that starts from this template.
fn clone_of(template: &str, name: &str) -> ReservationView {
    let mut request = reservation(name, 10, 0);
    request.access = Access::Block;
    request.template = Some(ObjectName::new("ns", template));
    request
}

#[test]
fn a43_what_is_promised_and_not_written_yet_counts_like_what_is_there() {
    let mut view = view(&[("a", 100)]);
    hold(&mut view, "a", "pending", Class::Images, 60);
    let used = view.nodes[&NodeName::from("a")].pools[&PoolName::from("p")].used;
    assert_eq!(used, Bytes::ZERO, "nothing is written");
    add(&mut view, reservation("r", 41, 0));
    let waits = told(&view, "r");
    assert_eq!((waits.reason, waits.shortfall), (Reason::InsufficientCapacity, Some(Bytes(1))));
    add(&mut view, reservation("r", 40, 0));
    assert!(is_promised(&ask(&view, "r")));
    let node = view.nodes.get_mut(&NodeName::from("a")).expect("there");
    node.pools.values_mut().for_each(|pool| pool.used = Bytes(100));
    assert!(is_promised(&ask(&view, "r")), "nor does what is written count twice");
}

/// Carries out what is decided of a request as an operator and a node that gives back at once would; how many images went.
fn settle(view: &mut View, name: &str) -> usize {
    let mut removed = 0;
    for _ in 0..20 {
        for change in ask(view, name) {
            let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
            match change {
                Change::CreateImage { name, image: wanted, .. } => {
                    let uid = Uid(format!("uid-{name}"));
                    let made = ImageView {
                        uid,
                        name: name.clone(),
                        digest: wanted.digest,
                        data_bytes: wanted.real_size,
                        virtual_size: wanted.virtual_size,
                        ..image("a", 0, 0)
                    };
                    view.images.insert(name, made);
                }
                Change::WriteLedger { promises, revision, .. } => {
                    (ledger.promises, ledger.revision) = (promises, revision);
                    // What it retires is given back by its node, and goes.
                    let retired = ledger.promises.extract_if(.., |_, promise| promise.revoked.is_some());
                    let gone: Vec<Uid> = retired.map(|(uid, _)| uid).collect();
                    view.images.retain(|_, image| !gone.contains(&image.uid));
                    removed += gone.len();
                }
                Change::AssignReservation { placement, .. } => {
                    let request = view.reservations.get_mut(&Uid::from(name)).expect("there");
                    request.assignment = Some(placement);
                    return removed;
                }
                _ => {}
            }
        }
    }
    panic!("{name} is not served: {:?}", ask(view, name));
}

#[test]
fn a45_a_small_pool_serves_a_store_of_any_size() {
    const IMAGES: u64 = 40;
    let mut view = view(&[("a", 100)]);
    let (mut stored, mut removed) = (0, 0);
    for n in 0..IMAGES {
        let mut import = template(10, 20 + n % 3 * 20);
        import.name = ObjectName::new("ns", format!("t{n}"));
        let durable = import.durable.as_mut().expect("done");
        durable.digest = Digest(Sha256Sum::of(&n.to_le_bytes()));
        stored += durable.real_size.0;
        view.imports.insert(import.name.clone(), import);
    }
    for n in 0..IMAGES {
        let name = format!("volume-{n}");
        let uid = add(&mut view, clone_of(&format!("t{n}"), &name));
        removed += settle(&mut view, &name);
        let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
        let promised: u64 = ledger.promises.values().map(|promise| promise.charge.data.0).sum();
        assert!(promised <= 100, "{promised} of 100 after {n}");
        // The volume goes; its image stays until its room is needed.
        ledger.promises.remove(&uid);
        view.reservations.remove(&uid);
    }
    assert!(stored > 10 * 100, "{stored} in the store");
    assert!(removed > 20, "{removed} made room");
}

#[test]
fn a47_a_pool_that_fails_is_passed_over_and_where_none_is_left_a_request_waits() {
    let mut view = view(&[("a", 100), ("b", 100)]);
    view.pools.insert(PoolName::from("q"), pool("q"));
    let mut ledger = view.ledgers.remove(&at("p", "b")).expect("there");
    ledger.pool = PoolName::from("q");
    view.ledgers.insert(at("q", "b"), ledger);
    let node = view.nodes.get_mut(&NodeName::from("b")).expect("there");
    node.pools = [(PoolName::from("q"), node_pool(100))].into();
    let mut request = reservation("r", 10, 0);
    request.pools = PoolChoice::Labelled([].into());
    request.when_full = Some(WhenFull::Reject);
    add(&mut view, request);
    let placed_in = |view: &View| match &ask(view, "r")[..] {
        [_, Change::AssignReservation { placement, .. }] => placement.pool.to_string(),
        other => panic!("{other:?}"),
    };
    let fail = |view: &mut View, node: &str| {
        let node = view.nodes.get_mut(&NodeName::from(node)).expect("there");
        node.pools.values_mut().for_each(|pool| {
            (pool.usable, pool.reason) = (false, Reason::PoolAreaFailed);
        });
    };
    assert_eq!(placed_in(&view), "p");
    fail(&mut view, "a");
    assert_eq!(placed_in(&view), "q");
    fail(&mut view, "b");
    let waits = told(&view, "r");
    assert_eq!(waits.state, ReservationState::Queued, "it is no lack of space, so it is not refused either");
    assert_eq!(waits.reason, Reason::PoolAreaFailed);
    assert!(!Verdict::Unusable { reason: Reason::PoolAreaFailed, message: String::new() }.refuses());
}

#[test]
fn a52_a_request_joins_an_image_on_its_way_and_waits_for_one_that_is_leaving() {
    let mut view = view(&[("a", 100)]);
    let import = template(10, 40);
    view.imports.insert(import.name.clone(), import);
    add(&mut view, clone_of("template", "one"));
    settle(&mut view, "one");
    let staged = view.images.values().next().expect("made for it").clone();
    assert!(!staged.ready, "it is on its way");
    let name = |view: &mut View, uid: &str| {
        let request = view.reservations.get_mut(&Uid::from(uid)).expect("there");
        request.assignment = Some(placed("p", "a", 1));
        request.assigned_image = Some(AssignedImage {
            digest: staged.digest,
            staged_image: staged.name.clone(),
            virtual_size: staged.virtual_size,
        });
    };
    name(&mut view, "one");
    add(&mut view, clone_of("template", "two"));
    let changes = ask(&view, "two");
    let [Change::WriteLedger { promises, .. }, Change::AssignReservation { reused: true, .. }] = &changes[..]
    else {
        panic!("{changes:?}");
    };
    assert_eq!(promises.len(), 3, "two volumes, and the image once");
    view.ledgers.get_mut(&at("p", "a")).expect("there").promises.clone_from(promises);
    name(&mut view, "two");
    assert_eq!(told(&view, "two").state, ReservationState::Promised, "ready only once its node says so");
    view.reservations.get_mut(&Uid::from("one")).expect("there").deleting = true;
    let late = Timestamp(u64::MAX);
    assert_eq!(crate::image::decide(&view, &staged.name, late), [], "another is waiting for it");
    view.images.get_mut(&staged.name).expect("there").deleting = true;
    add(&mut view, clone_of("template", "three"));
    let waits = told(&view, "three");
    assert_eq!((waits.state, waits.reason), (ReservationState::Queued, Reason::Releasing));
    assert!(waits.message.contains("is removing its copy of the image"), "{}", waits.message);
}

#[test]
fn what_waits_for_an_image_that_cannot_be_made_again_says_so() {
    let mut view = view(&[("a", 100)]);
    let import = template(10, 40);
    view.imports.insert(import.name.clone(), import.clone());
    let staged = image("a", 10, 0);
    let mut request = clone_of("template", "r");
    request.assignment = Some(placed("p", "a", 1));
    request.state = ReservationState::Promised;
    request.assigned_image = Some(AssignedImage {
        digest: import.durable.as_ref().expect("durable").digest,
        staged_image: staged.name.clone(),
        virtual_size: staged.virtual_size,
    });
    add(&mut view, request);
    hold(&mut view, "a", "r", Class::Volumes, 40);
    assert!(matches!(&ask(&view, "r")[..], [Change::CreateImage { .. }]), "its template is there");
    view.images.insert(staged.name.clone(), staged.clone());
    hold(&mut view, "a", "other", Class::Images, 55);
    assert_eq!(told(&view, "r").reason, Reason::InsufficientCapacity, "others have taken its room");
    view.ledgers.get_mut(&at("p", "a")).expect("there").promises.remove(&Uid::from("other"));
    assert!(matches!(&ask(&view, "r")[..], [Change::WriteLedger { .. }]), "there is room again");
    view.images.clear();
    view.imports.clear();
    let told_of = told(&view, "r");
    assert_eq!((told_of.state, told_of.reason), (ReservationState::Promised, Reason::TemplateNotFound));
    assert!(told_of.message.contains("its image is not in pool p on node a"), "{}", told_of.message);
    let prepared = Some(crate::units::Generation::FIRST);
    view.reservations.values_mut().for_each(|found| found.prepared = prepared);
    assert_eq!(told(&view, "r").reason, Reason::Ready, "what is made needs no template");
    view.reservations.values_mut().for_each(|found| found.prepared = None);
    let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
    ledger.promises.insert(staged.uid.clone(), staged.promise(None));
    view.images.insert(staged.name.clone(), staged);
    assert_eq!(told(&view, "r").reason, Reason::Promised, "nor does an image that is on its way");
}

#[test]
fn a_lost_promise_is_made_again_by_the_image_that_was_assigned_whatever_the_template_has_become() {
    let mut view = view(&[("a", 100)]);
    let mut request = clone_of("gone", "r");
    request.assignment = Some(placed("p", "a", 1));
    request.state = ReservationState::Promised;
    let uid = add(&mut view, request);
    let lost = told(&view, "r");
    assert_eq!(lost.reason, Reason::TemplateNotFound, "how large its image was, nobody knows");
    assert!(lost.message.starts_with("its promise was lost with the ledger of pool p on node a: "));
    let image = AssignedImage {
        digest: Digest(Sha256Sum::of(b"image")),
        staged_image: "staged".to_owned(),
        virtual_size: Bytes(50),
    };
    view.reservations.get_mut(&uid).expect("there").assigned_image = Some(image);
    let changes = ask(&view, "r");
    let [Change::WriteLedger { promises, .. }] = &changes[..] else { panic!("{changes:?}") };
    assert_eq!((promises[&uid].class, promises[&uid].charge.data), (Class::Volumes, Bytes(50)));
}

/// Node `a` with 100, of which an image that nothing needs has 60, and a volume of 50 that starts from another one.
fn crowded() -> View {
    let mut view = view(&[("a", 100)]);
    for (name, size) in [("idle", 60), ("t", 10)] {
        let mut import = template(10, size);
        import.name = ObjectName::new("ns", name);
        import.durable.as_mut().expect("done").digest = Digest(Sha256Sum::of(name.as_bytes()));
        view.imports.insert(import.name.clone(), import);
    }
    let mut volume = clone_of("t", "v");
    (volume.max_size, volume.assignment) = (Bytes(50), Some(placed("p", "a", 1)));
    volume.state = ReservationState::Promised;
    let digest = Digest(Sha256Sum::of(b"t"));
    let staged_image = staged_image_name(&digest, &PoolName::from("p"), &NodeName::from("a"));
    volume.assigned_image =
        Some(AssignedImage { digest, staged_image: staged_image.clone(), virtual_size: Bytes(10) });
    add(&mut view, volume);
    let idle = Digest(Sha256Sum::of(b"idle"));
    let idle =
        ImageView { digest: idle, uid: Uid::from("idle"), name: "idle".to_owned(), ..image("a", 60, 0) };
    let own = ImageView { digest, uid: Uid::from("own"), name: staged_image, ..image("a", 10, 0) };
    let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
    ledger.promises.insert(idle.uid.clone(), idle.promise(None));
    view.images.extend([idle, own].map(|image| (image.name.clone(), image)));
    view
}

#[test]
fn a51_what_was_lost_with_a_ledger_gets_the_room_of_images_that_nothing_needs() {
    let makes_room = |view: &View| {
        let changes = ask(view, "v");
        let again = changes.iter().any(|change| matches!(change, Change::RetryAfter { .. }));
        assert!(again, "{changes:?}");
        let report = told(view, "v");
        assert_eq!(report.state, ReservationState::Promised);
        (report.reason, retired(&changes).join(" "))
    };
    let mut view = crowded();
    assert_eq!(makes_room(&view), (Reason::Reclaiming, "idle".to_owned()), "for its own promise");
    let gone = view.images.remove("idle").expect("there");
    let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
    let entry = ledger.promises.remove(&gone.uid).expect("there");
    hold(&mut view, "a", "v", Class::Volumes, 35);
    view.images.insert(gone.name.clone(), gone.clone());
    view.ledgers
        .values_mut()
        .for_each(|ledger| drop(ledger.promises.insert(gone.uid.clone(), entry.clone())));
    assert_eq!(makes_room(&view), (Reason::Reclaiming, "idle".to_owned()), "for its image's");
    view.leader = false;
    assert_eq!(makes_room(&view), (Reason::Reclaiming, String::new()), "the leader does it");
    view.leader = true;
    view.imports.remove(&ObjectName::new("ns", "idle"));
    assert_eq!(makes_room(&view), (Reason::InsufficientCapacity, String::new()), "it is the only copy");
}
