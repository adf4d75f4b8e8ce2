use berth_core::ids::ObjectName;
use berth_core::units::Timestamp;
use kube::ResourceExt as _;

use super::*;
use crate::fixture::{seen, seen_with_volume};
use crate::observe::Seen;
use crate::pods::PodsOfClaims;
use berth_api::defaults::OPERATOR_LEASE;

/// An hour after everything in the fixture happened.
const NOW: Timestamp = Timestamp(1_767_225_600_000 + 3_600_000);

fn told(seen: &Seen, name: &str) -> Explanation {
    let reservation = seen.reservations.iter().find(|found| found.name_any() == name).expect("there");
    let pods = PodsOfClaims::from([(ObjectName::new("team", "disk"), vec!["web-0".to_owned()])]);
    explain(seen, reservation, &pods, NOW)
}

/// With an operator that runs.
fn led(mut seen: Seen) -> Seen {
    seen.fresh_leases.insert(OPERATOR_LEASE.to_owned());
    seen
}

#[test]
fn what_waits_says_for_what_and_what_speaks_against_each_place() {
    let text = as_text(&told(&led(seen()), "waits"));
    let expected = "\
StagingReservation team/waits
  state      Queued, InsufficientSpace
  why        lacks 1 GiB in all
  asks for   8Gi as a directory, pool fast
  queue      next, 0 bytes ahead; has waited 1 h of at most 1 h
  held by    nobody that is known
  ends       1 h after it is ready and nothing uses it, or when it is deleted
  next       1 GiB must be given back in pool fast on node n1, or elsewhere. It
             is refused if that has not happened in 0 s.

POOL   NODE   VERDICT                SHORT OF
fast   n1     InsufficientCapacity   1 GiB
";
    assert_eq!(text, expected);
}

#[test]
fn a_volume_says_how_far_its_image_is_and_who_waits_for_it() {
    let text = as_text(&told(&led(seen_with_volume()), "csi-vol"));
    let expected = "\
StagingReservation berth-system/csi-vol
  state      Promised
  why        promised in pool fast on node n1
  asks for   2Gi as a volume, pool fast, from template images/debian
  promise    2 GiB of volumes in pool fast on node n1, generation 1, obeyed by
             the node; ledger LEDGER revision
  image      of template images/debian, Filling 40 % as debian-img, shared with
             no other reservation
  node       n1 is live, renewed its Lease 10 s ago
  held by    claim team/disk, pod team/web-0
  in use     no, says its node
  ends       only when it is deleted, by what it belongs to
  next       Node n1 fetches the image (40 % so far), and then makes the volume.
";
    let ledger = seen().ledgers[0].name_any();
    let expected = expected.replace("LEDGER revision", &ledger);
    assert_eq!(text, expected);
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
}

#[test]
fn what_is_ready_says_until_when_it_stays() {
    let mut seen = led(seen());
    let unseen = told(&seen, "ready");
    assert_eq!(
        unseen.ends,
        "1 h after an operator has first seen that nothing uses it, or when it is deleted"
    );
    let status = seen.reservations[0].status.as_mut().expect("it has one");
    status.expires_at = Some(berth_api::conditions::time(Timestamp(NOW.0 + 90_000)));
    let ready = told(&seen, "ready");
    assert_eq!(ready.ends, "in 1 min 30 s, unless something uses it until then or it is renewed");
    assert_eq!(ready.next, "Nothing: it is ready on node n1.");
    assert_eq!(ready.expires_at.as_deref(), Some("2026-01-01T01:01:30Z"));
    assert_eq!((ready.in_use, ready.candidates.len()), (Some(false), 0));
    let status = seen.nodes[0].status.as_mut().expect("it reports");
    status.pools[0].in_use.push("uid-ready".to_owned());
    let used = told(&seen, "ready");
    assert_eq!((used.in_use, used.expires_at), (Some(true), None));
    assert_eq!(used.ends, "1 h after it was last in use, or when it is deleted");
    seen.fresh_leases.clear();
    assert_eq!(told(&seen, "ready").in_use, None, "a lost node says nothing");
}

#[test]
fn what_has_a_place_says_why_it_was_that_one() {
    let mut seen = led(seen());
    let place = |pool: &str, chosen: bool, reason: &str, message: &str| {
        berth_api::staging_reservation::CandidatePlace {
            pool: pool.to_owned(),
            node: "n1".to_owned(),
            reason: reason.to_owned(),
            message: message.to_owned(),
            shortfall_bytes: (!chosen).then_some(5 << 30),
            chosen,
        }
    };
    seen.reservations[0].status.as_mut().expect("it has one").candidates = vec![
        place("fast", true, "Promised", "MostFree: pool fast on node n1 has 10 GiB left, the most"),
        place("slow", false, "InsufficientCapacity", "pool slow on node n1 lacks 5 GiB in all"),
    ];
    let text = as_text(&told(&seen, "ready"));
    let expected = "
POOL   NODE   VERDICT                SHORT OF
fast   n1     Chosen                 -
slow   n1     InsufficientCapacity   5 GiB
  MostFree: pool fast on node n1 has 10 GiB left, the most
";
    assert!(text.ends_with(expected), "{text}");
}

#[test]
fn what_is_being_deleted_says_who_still_has_to_let_go() {
    let mut seen = led(seen());
    seen.reservations[0].metadata.deletion_timestamp = seen.reservations[0].status.as_ref().map(|status| {
        k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(status.conditions[0].last_transition_time.0)
    });
    let next = |seen: &Seen| told(seen, "ready").next;
    assert_eq!(next(&seen), "Node n1 removes the bytes in pool fast and says so; then the promise goes.");
    let pool = |seen: &mut Seen| seen.nodes[0].status.as_mut().expect("it reports").pools.remove(0);
    let mut report = pool(&mut seen);
    report.in_use.push("uid-ready".to_owned());
    seen.nodes[0].status.as_mut().expect("it reports").pools.push(report);
    assert_eq!(next(&seen), "Something on node n1 still uses it: end that, and the node removes the bytes.");
    seen.fresh_leases.clear();
    let lost = next(&seen);
    assert!(lost.starts_with("Node n1 has to come back: it alone can say"), "{lost}");
    assert!(lost.ends_with("No operator renews the Lease berth-operator: start one."), "{lost}");
}

#[test]
fn what_is_promised_waits_for_its_node_whatever_keeps_that_back() {
    let mut seen = led(seen_with_volume());
    let next = |seen: &Seen| told(seen, "csi-vol").next;
    seen.images[0].status = None;
    assert_eq!(next(&seen), "Node n1 fetches the image, and then makes the volume.");
    seen.ledgers[0].spec.lineage = "another".to_owned();
    assert!(
        next(&seen).starts_with("The ledger of pool fast on node n1 has to be put right first: "),
        "{}",
        next(&seen)
    );
    seen.ledgers[0].spec.lineage = "l".to_owned();
    seen.nodes[0].status.as_mut().expect("it reports").pools[0].obeyed.retain(|held| held.uid != "uid-vol");
    assert_eq!(next(&seen), "Node n1 records the promise, and then makes what is asked for.");
    seen.fresh_leases.remove(&berth_core::ids::node_lease_name(&"n1".into()));
    assert_eq!(next(&seen), "Node n1 has to come back; the space in pool fast stays promised.");
}

#[test]
fn what_cannot_go_anywhere_says_what_has_to_be_made() {
    let mut seen = led(seen());
    seen.reservations[1].spec.pool_name = Some("slow".to_owned());
    assert!(
        told(&seen, "waits").next.starts_with("A pool of this name, or with these labels, has to be made.")
    );
    seen.reservations[1].spec.pool_name = Some("fast".to_owned());
    seen.reservations[1].spec.node_name = Some("n9".to_owned());
    assert!(told(&seen, "waits").next.starts_with("A node that it may go to has to carry the pool."));
    seen.reservations[1].status.as_mut().expect("it has one").state =
        Some(berth_api::staging_reservation::ReservationState::Refused);
    assert_eq!(
        told(&seen, "waits").next,
        "Nothing more happens. Delete it, and make another that can be met."
    );
}

#[test]
fn programs_get_bytes_seconds_and_no_empty_fields() {
    let json = serde_json::to_value(told(&led(seen_with_volume()), "csi-vol")).expect("plain data");
    assert_eq!(json["promises"][0]["dataBytes"], 2_u64 << 30);
    assert_eq!(json["image"]["percent"], 40);
    assert_eq!(json["heldBy"], serde_json::json!(["claim team/disk", "pod team/web-0"]));
    assert_eq!((&json["inUse"], &json["node"]["renewedSecondsAgo"]), (&false.into(), &10.into()));
    assert!(json.get("queue").is_none() && json.get("candidates").is_none());
    let json = serde_json::to_value(told(&led(seen()), "waits")).expect("plain data");
    assert_eq!(json["candidates"][0]["shortfallBytes"], 1_u64 << 30);
    assert_eq!(
        json["queue"],
        serde_json::json!({"position": 1, "bytesAhead": 0, "waitedSeconds": 3600, "atMostSeconds": 3600})
    );
}

#[test]
fn d46_a_volume_that_is_overcommitted_says_so() {
    let mut seen = led(seen_with_volume());
    let over = serde_json::from_str(r#"{"percent": 300, "attainBytes": 0}"#).expect("readable");
    seen.ledgers[0].spec.capacity.volume_overcommit = Some(over);
    let volume = told(&seen, "csi-vol");
    assert_eq!(volume.promises[0].overcommitted_percent, Some(300));
    let text = as_text(&volume).split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(text.contains("overcommitted to 300 %: that all of it can be written is not promised"), "{text}");
    assert_eq!(told(&seen, "ready").promises[0].overcommitted_percent, None, "staging never is");
}
