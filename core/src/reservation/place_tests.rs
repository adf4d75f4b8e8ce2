use super::*;
use crate::fixture::{at, hold, image, promise, reservation, template, thin_view, view};
use crate::ids::ObjectName;
use crate::ledger::Class;
use crate::units::Timestamp;
use crate::view::{Access, PoolChoice};

fn look(view: &View, request: &ReservationView) -> Vec<Candidate> {
    candidates(view, request, &Need::of(view, request, Timestamp(0)).expect("plain"))
}

fn chosen(all: &[Candidate]) -> NodeName {
    all[choose(all, |_| true).expect("one fits")].node.clone()
}

#[test]
fn the_place_with_most_left_wins_and_ties_go_to_the_first() {
    let mut view = view(&[("a", 100), ("b", 100), ("c", 100)]);
    let request = reservation("r", 40, 0);
    assert_eq!(chosen(&look(&view, &request)), NodeName::from("a"));
    hold(&mut view, "a", "x", Class::Images, 10);
    assert_eq!(chosen(&look(&view, &request)), NodeName::from("b"));
    assert!(choose(&look(&view, &request), |at| at == 0).is_some());
}

#[test]
fn a_place_that_has_the_image_is_preferred_and_charged_for_the_volume_only() {
    let mut view = view(&[("a", 100), ("b", 100)]);
    let import = template(30, 60);
    view.imports.insert(import.name.clone(), import);
    let staged = image("b", 60, 0);
    hold(&mut view, "b", staged.uid.as_str(), Class::Images, 60);
    view.images.insert(staged.name.clone(), staged);
    let mut request = reservation("r", 30, 0);
    request.access = Access::Block;
    request.template = Some(ObjectName::new("ns", "template"));
    let all = look(&view, &request);
    assert!(all.iter().all(|candidate| matches!(candidate.verdict, Verdict::Fits { .. })), "{all:?}");
    assert_eq!(chosen(&all), NodeName::from("b"));
    view.images.values_mut().for_each(|image| image.deleting = true);
    assert_eq!(look(&view, &request)[1].verdict, Verdict::ImageLeaving);
}

#[test]
fn every_obstacle_is_explained() {
    let mut view = view(&[("a", 100), ("b", 30), ("c", 100), ("d", 100), ("e", 100), ("f", 100), ("g", 100)]);
    hold(&mut view, "a", "x", Class::Volumes, 70);
    view.nodes.get_mut(&NodeName::from("c")).expect("there").live = false;
    view.nodes.get_mut(&NodeName::from("d")).expect("there").reported = false;
    view.ledgers.remove(&at("p", "e"));
    let report = |view: &mut View, node: &str, change: fn(&mut NodePoolState)| {
        let node = view.nodes.get_mut(&NodeName::from(node)).expect("there");
        change(node.pools.values_mut().next().expect("one"));
    };
    report(&mut view, "f", |pool| pool.obeyed_revision = 9);
    report(&mut view, "g", |pool| {
        pool.usable = false;
        pool.reason = Reason::PoolAreaFailed;
        pool.message = "no such directory".to_owned();
    });
    view.nodes.get_mut(&NodeName::from("d")).expect("there").live = false;
    let all = look(&view, &reservation("r", 40, 0));
    let texts: Vec<String> = all.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            "pool p on node a lacks 10 bytes in all",
            "pool p on node b lacks 10 bytes for images even when empty",
            "pool p on node c is lost: the node no longer renews its Lease",
            "pool p on node d has not reported yet",
            "pool p on node e has no ledger yet",
            "pool p on node f is behind: the ledger is at revision 1, the node at 9",
            "pool p on node g cannot be used: PoolAreaFailed: no such directory",
        ]
    );
    assert!(explain(&all).ends_with("; and 2 more"));
    assert_eq!(least_shortfall(&all), Some(Bytes(10)));
    assert_eq!(choose(&all, |_| true), None);
}

#[test]
fn a_kernel_pool_that_takes_nothing_more_is_explained_with_numbers_and_stops_its_class_only() {
    let mut view = thin_view(&["a", "b"], Bytes::gib(10));
    let pool = view.nodes.get_mut(&NodeName::from("a")).expect("there").pools.values_mut().next();
    let images = &mut pool.expect("one").thin.as_mut().expect("thin").images;
    images.metadata.used = Bytes::mib(46);
    let mut request = reservation("r", 1 << 30, 0);
    let all = look(&view, &request);
    assert_eq!(
        all[0].to_string(),
        "pool p on node a promises nothing more for images: the kernel pool uses 46 MiB of 64 MiB of metadata, 72 %, more \
         than 70 %"
    );
    assert_eq!((all[0].verdict.reason(), all[0].verdict.refuses()), (Reason::MetadataAlmostFull, true));
    assert_eq!(chosen(&all), NodeName::from("b"));
    request.access = Access::Block;
    assert!(matches!(look(&view, &request)[0].verdict, Verdict::Fits { .. }), "volumes are well");
    request.access = Access::Stream;
    assert!(matches!(look(&view, &request)[0].verdict, Verdict::Fits { .. }), "nothing is written");
    let pool = view.nodes.get_mut(&NodeName::from("a")).expect("there").pools.values_mut().next();
    let volumes = &mut pool.expect("one").thin.as_mut().expect("thin").volumes;
    (volumes.needs_check, volumes.metadata.total) = (true, Bytes::ZERO);
    request.access = Access::Block;
    let all = look(&view, &request);
    assert_eq!((all[0].verdict.reason(), all[0].verdict.refuses()), (Reason::NeedsCheck, false));
}

#[test]
fn metadata_is_promised_and_runs_out_like_data() {
    let mut view = thin_view(&["a"], Bytes::gib(1024));
    let mut request = reservation("r", 1 << 30, 0);
    request.access = Access::Block;
    assert!(matches!(look(&view, &request)[0].verdict, Verdict::Fits { .. }));
    let left = view.ledgers[&at("p", "a")].capacity.volumes.metadata;
    let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
    let mut other = promise("other", Class::Volumes, 1 << 30);
    other.charge.metadata = left;
    ledger.promises.insert(Uid::from("other"), other);
    let short = look(&view, &request)[0].to_string();
    assert!(short.ends_with("of metadata for volumes"), "{short}");
    request.max_size = Bytes::gib(512);
    let large = look(&view, &request)[0].to_string();
    assert!(large.ends_with("of metadata for volumes even when empty"), "{large}");
}

#[test]
fn selectors_and_pinned_nodes_narrow_the_choice() {
    let mut view = view(&[("a", 100), ("b", 100)]);
    let mut request = reservation("r", 1, 0);
    request.node = Some(NodeName::from("b"));
    assert_eq!(look(&view, &request).len(), 1);
    request.pools = PoolChoice::Labelled([("tier".to_owned(), "fast".to_owned())].into());
    assert!(look(&view, &request).is_empty());
    let pool = view.pools.values_mut().next().expect("one");
    pool.labels.insert("tier".to_owned(), "fast".to_owned());
    assert_eq!(look(&view, &request).len(), 1);
    view.pools.values_mut().next().expect("one").deleting = true;
    assert!(look(&view, &request).is_empty(), "a pool that is being deleted takes nothing new");
}

#[test]
fn each_strategy_chooses_in_its_own_way_and_says_so() {
    let mut view = view(&[("a", 100), ("b", 200), ("c", 150)]);
    let import = template(30, 60);
    view.imports.insert(import.name.clone(), import);
    let staged = image("c", 60, 0);
    hold(&mut view, "c", staged.uid.as_str(), Class::Images, 60);
    view.images.insert(staged.name.clone(), staged);
    let mut request = reservation("r", 30, 0);
    request.access = Access::Block;
    request.template = Some(ObjectName::new("ns", "template"));
    for (strategy, node, why) in [
        (Strategy::FirstFit, "a", "FirstFit: pool p on node a is the first by name"),
        (Strategy::MostFree, "b", "MostFree: pool p on node b has 200 bytes left, the most"),
        (Strategy::PreferPresent, "c", "PreferPresent: pool p on node c has the image"),
    ] {
        view.pools.values_mut().for_each(|pool| pool.strategy = strategy);
        let all = look(&view, &request);
        assert_eq!(chosen(&all).as_str(), node);
        let told = consider(&all, choose(&all, |_| true));
        assert_eq!((told[0].message.as_str(), told[0].chosen, told.len()), (why, true, 3));
        assert!(told[1..].iter().all(|place| !place.chosen && place.reason == Reason::Queued));
    }
}

#[test]
fn the_strategy_of_the_first_pool_that_fits_decides_between_pools() {
    let mut view = view(&[("a", 100)]);
    let mut other = crate::fixture::pool("q");
    other.strategy = Strategy::FirstFit;
    view.pools.values_mut().for_each(|pool| pool.strategy = Strategy::MostFree);
    view.pools.insert(other.name.clone(), other);
    let node = view.nodes.get_mut(&NodeName::from("a")).expect("there");
    node.pools.insert(PoolName::from("q"), crate::fixture::node_pool(300));
    view.ledgers.insert(at("q", "a"), crate::fixture::ledger("q", "a", 300));
    let mut request = reservation("r", 10, 0);
    request.pools = PoolChoice::Labelled(std::collections::BTreeMap::new());
    let all = look(&view, &request);
    assert_eq!(all[choose(&all, |_| true).expect("fits")].pool, PoolName::from("q"), "p looks for the most");
    view.pools.values_mut().for_each(|pool| pool.strategy = Strategy::FirstFit);
    let all = look(&view, &request);
    assert_eq!(all[choose(&all, |_| true).expect("fits")].pool, PoolName::from("p"));
    hold(&mut view, "a", "x", Class::Images, 95);
    let all = look(&view, &request);
    assert_eq!(all[choose(&all, |_| true).expect("fits")].pool, PoolName::from("q"));
}

#[test]
fn zones_cordons_and_limits_of_namespaces_narrow_the_choice() {
    let mut view = view(&[("a", 100), ("b", 100)]);
    view.nodes.get_mut(&NodeName::from("b")).expect("there").zone = Some("west".to_owned());
    let mut request = reservation("r", 30, 0);
    request.zone = Some("west".to_owned());
    assert_eq!(look(&view, &request).into_iter().map(|c| c.node.0).collect::<Vec<_>>(), ["b"]);
    request.zone = Some("east".to_owned());
    assert!(look(&view, &request).is_empty());
    request.zone = None;
    let pool = view.pools.values_mut().next().expect("one");
    pool.drain_nodes.insert(NodeName::from("a"));
    assert_eq!(look(&view, &request)[0].to_string(), "pool p on node a takes nothing new: it is Draining");
    assert_eq!(chosen(&look(&view, &request)).as_str(), "b");
    let pool = view.pools.values_mut().next().expect("one");
    pool.tenant_limits = vec![crate::view::TenantLimit {
        namespaces: std::collections::BTreeMap::new(),
        bytes: Some(Bytes(50)),
        reservations: None,
    }];
    hold(&mut view, "a", "held", Class::Images, 40);
    let all = look(&view, &request);
    assert_eq!(
        all[1].to_string(),
        "pool p on node b allows namespace ns 50 bytes in all: 40 bytes are held, 30 bytes more are asked for"
    );
    assert_eq!((all[1].verdict.reason(), all[1].verdict.shortfall()), (Reason::TenantLimit, Some(Bytes(20))));
    assert!(all.iter().all(|candidate| candidate.verdict.refuses()));
    request.claim_namespace = "other".to_owned();
    assert_eq!(chosen(&look(&view, &request)).as_str(), "b");
}
