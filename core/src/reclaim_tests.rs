use super::*;
use crate::fixture::{HOUR, add, at, hold, image, placed, reservation, store, template, thin_view, view};
use crate::ids::{NodeName, ObjectName, PoolName};
use crate::ledger::Class;
use crate::overcommit::Percent;
use crate::reason::Reason;
use crate::reservation::{self, fit};
use crate::retire::retired;
use crate::thin::{PoolMode, PoolState, ThinState, Usage};
use crate::transfer::TransferKind;
use crate::units::Generation;
use crate::view::{Access, AssignedImage, NodePoolState, ReservationState, StoreView, TenantLimit, WhenFull};

/// A pool of 100 on node `a` with copies of a durable image: name, bytes, last use.
fn staged(images: &[(&str, u64, u64)]) -> View {
    let mut view = view(&[("a", 100)]);
    let import = template(30, 20);
    view.imports.insert(import.name.clone(), import);
    for (name, bytes, used) in images {
        stage(&mut view, name, *bytes, *used);
    }
    view
}

fn stage(view: &mut View, name: &str, bytes: u64, used: u64) {
    let mut image = image("a", bytes, 0);
    (image.name, image.uid) = ((*name).to_owned(), Uid(format!("uid-{name}")));
    image.last_used = Some(Timestamp(used));
    let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
    let block = view.pools.values().next().and_then(|pool| pool.block);
    ledger.promises.insert(image.uid.clone(), image.promise(block));
    view.images.insert(image.name.clone(), image);
}

fn of_pool(view: &View, now: u64) -> Vec<Change> {
    crate::pool::decide(view, &PoolName::from("p"), Timestamp(now))
}

fn of_request(view: &View, now: u64) -> Vec<Change> {
    reservation::decide(view, &Uid::from("r"), Timestamp(now))
}

fn reason(changes: &[Change]) -> Option<(ReservationState, Reason)> {
    changes.iter().find_map(|change| match change {
        Change::ReportReservation { report, .. } => Some((report.state, report.reason)),
        _ => None,
    })
}

#[test]
fn above_the_high_watermark_the_longest_unused_go_down_to_the_low_one() {
    let mut view = staged(&[("new", 10, 30), ("old", 10, 10), ("older", 10, 5)]);
    for name in ["x", "y"] {
        let mut held = reservation(name, 1, 0);
        held.assignment = Some(placed("p", "a", 1));
        add(&mut view, held);
    }
    hold(&mut view, "a", "x", Class::Images, 55);
    assert_eq!(retired(&of_pool(&view, 100)), [""; 0], "85 % is not above it");
    hold(&mut view, "a", "y", Class::Images, 1);
    let changes = of_pool(&view, 100);
    assert_eq!(retired(&changes), ["old", "older"], "70 % is reached with 66");
    let told = changes.iter().find_map(|change| match change {
        Change::ReportReclaim { cause, images, bytes, .. } => Some((*cause, *images, *bytes)),
        _ => None,
    });
    assert_eq!(told, Some((Cause::HighWatermark, 2, Bytes(20))));
    view.images.get_mut("older").expect("there").deleting = true;
    assert_eq!(retired(&of_pool(&view, 100)), [""; 0], "76 once it is gone: not above the high one any more");
    view.leader = false;
    view.images.get_mut("older").expect("there").deleting = false;
    assert_eq!(retired(&of_pool(&view, 100)), [""; 0], "the leader does it");
}

#[test]
fn nothing_that_is_needed_warm_or_the_only_copy_goes() {
    let mut view = staged(&[("one", 90, 10)]);
    let full = view.clone();
    assert_eq!(retired(&of_pool(&view, 100)), ["one"]);
    view.pools.values_mut().for_each(|pool| pool.reclaim.keep_warm_millis = 91);
    assert_eq!(retired(&of_pool(&view, 100)), [""; 0], "warm");
    assert_eq!(retired(&of_pool(&view, 101)), ["one"]);
    view = full.clone();
    view.imports.clear();
    assert_eq!(retired(&of_pool(&view, 100)), [""; 0], "the only copy that is known");
    view.pools.values_mut().for_each(|pool| pool.service = Service::Draining);
    assert_eq!(retired(&of_pool(&view, 100)), [""; 0], "also where the pool drains");
    view = full.clone();
    let mut user = reservation("user", 1, 0);
    let digest = view.images["one"].digest;
    user.assignment = Some(placed("p", "a", 1));
    user.assigned_image =
        Some(AssignedImage { digest, staged_image: "one".to_owned(), virtual_size: Bytes(90) });
    add(&mut view, user);
    assert_eq!(retired(&of_pool(&view, 100)), [""; 0], "named");
    view = full;
    let mut waits = reservation("waits", 1, 0);
    (waits.access, waits.template) = (Access::Block, Some(ObjectName::new("ns", "template")));
    add(&mut view, waits);
    assert_eq!(retired(&of_pool(&view, 100)), [""; 0], "wanted by one that waits");
    view.pools.values_mut().for_each(|pool| {
        pool.drain_nodes.insert(NodeName::from("a"));
    });
    assert_eq!(retired(&of_pool(&view, 100)), ["one"], "which is not placed where the pool drains");
}

#[test]
fn an_image_whose_store_is_gone_or_goes_is_the_only_copy_that_can_be_reached() {
    let mut view = staged(&[("one", 90, 10)]);
    add(&mut view, reservation("r", 50, 0));
    assert_eq!((retired(&of_pool(&view, 100)), retired(&of_request(&view, 100))), (vec!["one"], vec!["one"]));
    view.stores.values_mut().for_each(|store| store.deleting = true);
    assert_eq!(
        (retired(&of_pool(&view, 100)), retired(&of_request(&view, 100))),
        (vec![], vec![]),
        "it goes"
    );
    view.stores.clear();
    assert_eq!((retired(&of_pool(&view, 100)), retired(&of_request(&view, 100))), (vec![], vec![]), "gone");
    let mut elsewhere = template(30, 20);
    (elsewhere.name, elsewhere.stores) =
        (ObjectName::new("ns", "other"), vec![ObjectName::new("ns", "second")]);
    view.imports.insert(elsewhere.name.clone(), elsewhere);
    assert_eq!(retired(&of_pool(&view, 100)), [""; 0], "of neither");
    let second = StoreView { name: ObjectName::new("ns", "second"), ..store() };
    view.stores.insert(second.name.clone(), second);
    assert_eq!(retired(&of_pool(&view, 100)), ["one"], "it is in another store as well");
}

#[test]
fn a51_what_nothing_needs_goes_before_a_request_waits_or_is_refused() {
    for when_full in [WhenFull::Queue, WhenFull::Reject] {
        let mut view = staged(&[("old", 30, 10), ("new", 40, 20)]);
        let mut request = reservation("r", 50, 0);
        request.when_full = Some(when_full);
        add(&mut view, request);
        let changes = of_request(&view, 100);
        assert_eq!(reason(&changes), Some((ReservationState::Queued, Reason::Reclaiming)));
        assert_eq!(retired(&changes), ["old"], "20 are missing; the older one has them");
        let tried = fit(&view, &view.reservations[&Uid::from("r")], Timestamp(100));
        assert_eq!((tried.reason, tried.reclaims), (Reason::Reclaiming, vec!["old".to_owned()]));
        let Change::ReportReservation { report, .. } = &changes[0] else { panic!("{changes:?}") };
        assert_eq!(
            report.message,
            "50 bytes asked for: 30 bytes of images that nothing refers to are removed first in pool p on node a: old"
        );
        view.images.get_mut("old").expect("there").deleting = true;
        let changes = of_request(&view, 100);
        assert_eq!(
            (reason(&changes), retired(&changes)),
            (Some((ReservationState::Queued, Reason::Reclaiming)), vec![])
        );
        view.images.remove("old");
        view.ledgers.values_mut().for_each(|ledger| drop(ledger.promises.remove(&Uid::from("uid-old"))));
        let changes = of_request(&view, 100);
        assert!(
            matches!(&changes[..], [Change::WriteLedger { .. }, Change::AssignReservation { .. }]),
            "{changes:?}"
        );
    }
}

#[test]
fn the_fewest_go_and_only_if_they_are_enough() {
    let mut view = staged(&[("small", 5, 10), ("large", 40, 20), ("newest", 40, 30)]);
    add(&mut view, reservation("r", 50, 0));
    assert_eq!(retired(&of_request(&view, 100)), ["large"], "35 are missing: the small one would not help");
    hold(&mut view, "a", "kept", Class::Images, 10);
    view.reservations.get_mut(&Uid::from("r")).expect("there").max_size = Bytes(95);
    let changes = of_request(&view, 100);
    assert_eq!(retired(&changes), [""; 0], "all of them would not be enough");
    assert_eq!(reason(&changes), Some((ReservationState::Queued, Reason::InsufficientCapacity)));
}

#[test]
fn a_request_behind_another_one_removes_nothing_and_others_leave_it_to_the_leader() {
    let mut view = staged(&[("old", 60, 10)]);
    hold(&mut view, "a", "kept", Class::Images, 20);
    add(&mut view, reservation("first", 90, 0));
    add(&mut view, reservation("r", 30, 5));
    assert_eq!(retired(&of_request(&view, 100)), [""; 0], "the earlier one waits for the same place");
    view.reservations.remove(&Uid::from("first"));
    assert_eq!(retired(&of_request(&view, 100)), ["old"]);
    view.leader = false;
    let changes = of_request(&view, 100);
    assert_eq!((reason(&changes).map(|told| told.1), retired(&changes)), (Some(Reason::Reclaiming), vec![]));
    view.leader = true;
    view.nodes.values_mut().for_each(|node| {
        node.pools.values_mut().for_each(|pool| {
            pool.obeyed.insert(Uid::from("unknown"), Generation::FIRST);
        });
    });
    assert_eq!(
        retired(&of_request(&view, 100)),
        [""; 0],
        "nothing can be given back in a ledger that is behind"
    );
}

#[test]
fn a_request_that_waits_for_removals_waits_no_longer_than_its_pool_allows() {
    let mut view = staged(&[("old", 60, 10)]);
    view.images.values_mut().for_each(|image| image.deleting = true);
    let mut request = reservation("r", 50, 0);
    (request.state, request.queued_since) = (ReservationState::Queued, Some(Timestamp(0)));
    add(&mut view, request);
    assert_eq!(reason(&of_request(&view, HOUR - 1)).map(|told| told.1), Some(Reason::Reclaiming));
    assert_eq!(reason(&of_request(&view, HOUR)), Some((ReservationState::Refused, Reason::QueueTimeout)));
}

#[test]
fn what_a_kernel_pool_has_grown_to_for_an_image_is_no_room_for_a_volume() {
    let mut view = thin_view(&["a"], Bytes::gib(10));
    let import = template(30, 20);
    view.imports.insert(import.name.clone(), import);
    stage(&mut view, "old", 4 << 30, 10);
    let node = view.nodes.get_mut(&NodeName::from("a")).expect("there");
    let report = node.pools.values_mut().next().expect("one");
    report.thin.as_mut().expect("thin").images.data.total = Bytes::gib(4);
    let mut request = reservation("r", 8 << 30, 0);
    request.access = Access::Block;
    add(&mut view, request);
    assert_eq!(retired(&of_request(&view, 100)), [""; 0]);
}

/// A pool of kernel pools on node `a` with a copy of 4 GiB, which is there, and a request of 1 GiB.
fn thin(access: Access) -> View {
    let mut view = thin_view(&["a"], Bytes::gib(10));
    let import = template(30, 20);
    view.imports.insert(import.name.clone(), import);
    for (name, used) in [("old", 10), ("older", 5)] {
        stage(&mut view, name, 4 << 30, used);
        let lineage = view.ledgers[&at("p", "a")].lineage.clone();
        let report = report(&mut view);
        report.lineage = Some(lineage);
        report.obeyed.insert(Uid(format!("uid-{name}")), Generation::FIRST);
    }
    let mut request = reservation("r", 1 << 30, 0);
    request.access = access;
    add(&mut view, request);
    view
}

fn report(view: &mut View) -> &mut NodePoolState {
    let node = view.nodes.get_mut(&NodeName::from("a")).expect("there");
    node.pools.values_mut().next().expect("one")
}

fn kernel_pools(view: &mut View) -> &mut ThinState {
    report(view).thin.as_mut().expect("thin")
}

#[test]
fn a51_images_go_where_their_kernel_pool_is_full_and_none_where_that_would_not_help() {
    let mut view = thin(Access::File);
    kernel_pools(&mut view).images.metadata.used = Bytes::mib(46); // of 64
    let changes = of_request(&view, 100);
    assert_eq!(
        (reason(&changes).map(|told| told.1), retired(&changes)),
        (Some(Reason::Reclaiming), vec!["older"])
    );
    kernel_pools(&mut view).images.metadata.used = Bytes::mib(48);
    assert_eq!(retired(&of_request(&view, 100)), ["old", "older"]);
    let limit = TenantLimit { namespaces: [].into(), bytes: Some(Bytes(1)), reservations: None };
    view.pools.values_mut().for_each(|pool| pool.tenant_limits = vec![limit.clone()]);
    let changes = of_request(&view, 100);
    assert_eq!((reason(&changes).map(|told| told.1), retired(&changes)), (Some(Reason::TenantLimit), vec![]));
    view.pools.values_mut().for_each(|pool| pool.tenant_limits.clear());
    kernel_pools(&mut view).images.metadata.used = Bytes::mib(60);
    let changes = of_request(&view, 100);
    assert_eq!(
        (reason(&changes).map(|told| told.1), retired(&changes)),
        (Some(Reason::MetadataAlmostFull), vec![])
    );
    let images = &mut kernel_pools(&mut view).images;
    (images.metadata.used, images.mode) = (Bytes::ZERO, PoolMode::OutOfDataSpace);
    assert_eq!(retired(&of_request(&view, 100)), ["older"], "one leaves blocks to it");
    report(&mut view).obeyed.clear();
    assert_eq!(retired(&of_request(&view, 100)), [""; 0], "nothing of them is there");
    for spoil in [
        (|images: &mut PoolState| images.needs_check = true) as fn(&mut PoolState),
        |images| images.mode = PoolMode::ReadOnly,
        |images| images.mode = PoolMode::Failed,
    ] {
        let mut view = thin(Access::File);
        spoil(&mut kernel_pools(&mut view).images);
        assert_eq!(retired(&of_request(&view, 100)), [""; 0], "a person has to see to it");
    }
    let mut view = thin(Access::Block);
    kernel_pools(&mut view).volumes.metadata.used = Bytes::mib(46);
    assert_eq!(retired(&of_request(&view, 100)), [""; 0], "no image maps anything there");
}

#[test]
fn a51_images_go_where_overcommitted_volumes_can_attain_more_without_them() {
    let mut view = thin(Access::Block);
    let volumes = &mut kernel_pools(&mut view).volumes;
    volumes.data = Usage { used: Bytes::gib(2), total: Bytes::gib(2) };
    view.pools.values_mut().for_each(|pool| pool.overcommit = Percent::from(200));
    let pool = view.pools[&PoolName::from("p")].clone();
    let capacity = |view: &mut View| {
        let capacity = pool.capacity(report(view));
        view.ledgers.values_mut().for_each(|ledger| ledger.capacity = capacity.expect("of one backend"));
    };
    capacity(&mut view);
    let changes = of_request(&view, 100);
    assert_eq!(
        (reason(&changes).map(|told| told.1), retired(&changes)),
        (Some(Reason::Reclaiming), vec!["older"])
    );
    kernel_pools(&mut view).images.data.total = Bytes::gib(8);
    capacity(&mut view);
    let changes = of_request(&view, 100);
    assert_eq!(
        (reason(&changes).map(|told| told.1), retired(&changes)),
        (Some(Reason::DataAlmostFull), vec![]),
        "the kernel pool of images has grown for them, and keeps that"
    );
}

#[test]
fn a_pool_that_drains_or_is_deleted_gives_up_unneeded_images_at_once() {
    for drain in [
        (|view: &mut View| view.pools.values_mut().for_each(|pool| pool.deleting = true)) as fn(&mut View),
        |view| view.pools.values_mut().for_each(|pool| pool.service = Service::Draining),
        |view| {
            view.pools.values_mut().for_each(|pool| {
                pool.drain_nodes.insert(NodeName::from("a"));
            });
        },
    ] {
        let mut view = staged(&[("one", 10, 99)]);
        view.pools.values_mut().for_each(|pool| pool.reclaim.keep_warm_millis = HOUR);
        assert_eq!(retired(&of_pool(&view, 100)), [""; 0]);
        drain(&mut view);
        let changes = of_pool(&view, 100);
        assert_eq!(retired(&changes), ["one"]);
        assert!(changes.iter().any(|c| matches!(c, Change::ReportReclaim { cause: Cause::Draining, .. })));
    }
}

#[test]
fn deleting_a_template_gives_its_last_copies_up() {
    let mut view = staged(&[("one", 10, 1)]);
    let name = ObjectName::new("ns", "template");
    let import = view.imports.get_mut(&name).expect("there");
    (import.deleting, import.released) = (true, Some(Generation::FIRST));
    let ask = |view: &View| crate::transfer::decide(view, TransferKind::Import, &name, Timestamp(0));
    assert!(matches!(&ask(&view)[..], [Change::GiveUpImage { name, .. }] if name == "one"));
    view.images.values_mut().for_each(|image| image.given_up = true);
    assert!(matches!(&ask(&view)[..], [Change::UnguardTransfer { .. }]));
    view.images.values_mut().for_each(|image| image.given_up = false);
    let mut other = template(30, 20);
    other.name = ObjectName::new("ns", "other");
    view.imports.insert(other.name.clone(), other);
    assert!(
        matches!(&ask(&view)[..], [Change::UnguardTransfer { .. }]),
        "another template has the same image"
    );
    view.stores.clear();
    assert!(
        matches!(&ask(&view)[..], [Change::UnguardTransfer { .. }]),
        "and has nothing else where its store is gone"
    );
}
