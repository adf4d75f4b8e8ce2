use super::*;
use crate::fixture::{seen, seen_with_volume};
use crate::pods::PodsOfClaims;
use berth_core::ids::ObjectName;

fn held(seen: &Seen, nodes: &[&str]) -> Vec<Holder> {
    let pods = PodsOfClaims::from([(ObjectName::new("team", "disk"), vec!["web-0".to_owned()])]);
    let nodes = nodes.iter().map(|node| NodeName::from(*node)).collect();
    holders(seen, &PoolName::from("fast"), &nodes, &pods)
}

fn pool(service: Option<Service>, drained: &[&str]) -> StagingPool {
    let mut pool = seen().pools.remove(0);
    pool.spec.service = service;
    pool.spec.drain_nodes = drained.iter().map(|node| (*node).to_owned()).collect();
    pool
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn each_holder_is_named_with_who_keeps_it_and_what_makes_it_go() {
    let text = as_text(&held(&seen_with_volume(), &[]));
    let expected = "\
NODE   KIND        SIZE    IN USE   NAME
n1     Volume      2 GiB   -        berth-system/csi-vol
n1     Directory   3 GiB   -        team/ready
n1     Image       1 GiB   -        debian-img

berth-system/csi-vol goes with claim team/disk; held by claim team/disk, pod
team/web-0
team/ready goes when it is deleted, or unused for its ttl
debian-img goes after 1 reservation; held by reservation berth-system/csi-vol
1 volume and 2 other holders left, 6 GiB
";
    assert_eq!(text, expected);
    assert_eq!(held(&seen_with_volume(), &["other"]), []);
    assert_eq!(as_text(&[]), "nothing holds it\n");
}

#[test]
fn draining_is_over_when_only_volumes_and_their_images_are_left() {
    let mut seen = seen_with_volume();
    assert!(!Left::is_drained(&held(&seen, &[])), "a directory is left");
    seen.ledgers[0].spec.promises.remove("uid-ready");
    assert!(Left::is_drained(&held(&seen, &[])), "a volume keeps its image");
    seen.reservations.retain(|reservation| reservation.name_any() != "csi-vol");
    let left = held(&seen, &[]);
    assert_eq!(left[1].goes, "by itself: nothing refers to it");
    assert!(!Left::is_drained(&left), "an image that nothing refers to goes");
    assert_eq!(left[0].goes, "once its object is known to be gone");
    assert!(Left::is_drained(&[]));
}

#[test]
fn a_service_is_written_only_where_it_changes_and_says_what_it_was() {
    let wanted = Wanted::Service(Service::Draining);
    let (spec, done) = patch("fast", &pool(None, &[]), &wanted).expect("possible");
    assert_eq!(
        (spec, done.as_str()),
        (Some(json!({"service": "Draining"})), "pool fast is Draining (was Open)")
    );
    let (spec, done) = patch("fast", &pool(Some(Service::Draining), &[]), &wanted).expect("possible");
    assert_eq!((spec, done.as_str()), (None, "pool fast is Draining (already)"));
    let open = Wanted::Service(Service::Open);
    let (_, done) = patch("fast", &pool(Some(Service::Cordoned), &["b"]), &open).expect("possible");
    assert_eq!(done, "pool fast is Open (was Cordoned); still drained on node b");
}

#[test]
fn nodes_are_added_and_taken_back_beside_those_of_others() {
    let (spec, done) = patch("fast", &pool(None, &["a"]), &Wanted::DrainOn(set(&["b"]))).expect("possible");
    assert_eq!(
        (spec, done.as_str()),
        (Some(json!({"drainNodes": ["a", "b"]})), "pool fast is Draining on node b")
    );
    let back = Wanted::NoLongerOn(set(&["b"]));
    let (spec, done) = patch("fast", &pool(None, &["a", "b"]), &back).expect("possible");
    assert_eq!(
        (spec, done.as_str()),
        (Some(json!({"drainNodes": ["a"]})), "pool fast is Open again on node b")
    );
    let error =
        patch("fast", &pool(Some(Service::Draining), &["a"]), &back).expect_err("refused").to_string();
    assert!(error.starts_with("pool fast is not being drained on node b alone"), "{error}");
    let (spec, _) = patch("fast", &pool(None, &["b"]), &Wanted::DrainOn(set(&["b"]))).expect("possible");
    assert_eq!(spec, None);
}

#[test]
fn programs_get_bytes_and_what_is_left() {
    let left = held(&seen_with_volume(), &[]);
    let json = as_json("fast", "pool fast is Draining (was Open)", &left, Left::is_drained(&left));
    assert_eq!(json["left"], json!({"volumes": 1, "others": 2, "bytes": 6_u64 << 30}));
    assert_eq!((&json["holders"][0]["kind"], &json["drained"]), (&json!("Volume"), &json!(false)));
    assert_eq!(json["holders"][0]["heldBy"], json!(["claim team/disk", "pod team/web-0"]));
}
