use super::*;
use crate::args::{Args, ClusterCommand, Command};
use crate::fixture::{seen, seen_with_volume};
use clap::Parser as _;
use serde_json::json;

/// An hour after everything in the fixture happened.
const NOW: Timestamp = Timestamp(1_767_225_600_000 + 3_600_000);

fn ask(view: &View, flags: &[&str]) -> Answer {
    let words = ["kubectl-berth", "fit"].iter().chain(flags);
    let Command::Cluster(ClusterCommand::Fit(args)) = Args::try_parse_from(words).expect("valid").command
    else {
        panic!("another command")
    };
    answer(view, &reservation_view(&request(&args, "team").expect("a request")), NOW)
}

/// Without the one that waits.
fn idle() -> View {
    let mut seen = seen();
    seen.reservations.retain(|reservation| kube::ResourceExt::name_any(reservation) == "ready");
    seen.view()
}

#[test]
fn what_fits_says_where_and_why_there() {
    let text = as_text(&ask(&idle(), &["--size", "5Gi"]));
    let expected = "\
fits now: pool fast on node n1
  why        Promised: 5 GiB fit: PreferPresent: pool fast on node n1 has 7 GiB
             left, the most
  peak       5 GiB

POOL   NODE   VERDICT   SHORT OF
fast   n1     Chosen    -
  PreferPresent: pool fast on node n1 has 7 GiB left, the most
";
    assert_eq!(text, expected);
}

#[test]
fn what_would_wait_says_behind_whom_and_for_what() {
    let answer = ask(&seen().view(), &["--size", "5Gi"]);
    assert_eq!(
        (answer.result, answer.reason.as_str()),
        (Verdict::Waits, "Queued"),
        "the space is there: {answer:?}"
    );
    assert_eq!((answer.position, answer.bytes_ahead), (Some(2), Bytes::gib(8)));
    let text = as_text(&ask(&idle(), &["--size", "9Gi"]));
    let expected = "\
would wait
  why        InsufficientCapacity: 9 GiB asked for: pool fast on node n1 lacks 2
             GiB for images
  peak       9 GiB
  queue      no. 1, 0 bytes ahead
  short of   2 GiB

POOL   NODE   VERDICT                SHORT OF
fast   n1     InsufficientCapacity   2 GiB
  pool fast on node n1 lacks 2 GiB for images
";
    assert_eq!(text, expected);
}

#[test]
fn what_would_be_refused_says_why() {
    let refused = |flags: &[&str], reason: &str| {
        let answer = ask(&idle(), flags);
        assert_eq!((answer.result, answer.reason.as_str()), (Verdict::Refused, reason), "{answer:?}");
        assert!(as_text(&answer).starts_with("would be refused\n"));
    };
    refused(&["--size", "11Gi"], "LargerThanPool");
    refused(&["--size", "much"], "InvalidSpec");
    refused(&["--size", "1Gi", "--template", "images/none"], "TemplateNotFound");
    refused(&["--size", "1Gi", "--template", "images/debian"], "NamespaceNotAllowed");
}

#[test]
fn what_has_nowhere_to_go_would_wait_for_a_place() {
    let waits = |flags: &[&str], reason: &str| {
        let answer = ask(&idle(), flags);
        assert_eq!((answer.result, answer.reason.as_str()), (Verdict::Waits, reason), "{answer:?}");
    };
    waits(&["--size", "1Gi", "--pool", "slow"], "NoMatchingPool");
    waits(&["--size", "1Gi", "-l", "tier=fast"], "NoMatchingPool");
    waits(&["--size", "1Gi", "--node", "n9"], "NoMatchingNode");
    waits(&["--size", "1Gi", "--zone", "z"], "NoMatchingNode");
}

#[test]
fn a_cordoned_pool_takes_nothing_and_says_so() {
    let mut seen = seen();
    seen.pools[0].spec.service = Some(berth_api::staging_pool::Service::Cordoned);
    let answer = ask(&seen.view(), &["--size", "1Gi"]);
    assert_eq!((answer.result, answer.reason.as_str()), (Verdict::Waits, "Cordoned"), "{answer:?}");
}

#[test]
fn an_image_that_is_not_there_yet_counts() {
    let mut seen = seen_with_volume();
    seen.reservations.clear();
    let durable = json!({"digest": format!("sha256:{}", "cd".repeat(32)), "sourceDigest": "sha256:x", "size": 1,
        "virtualSize": 2_u64 << 30, "realSize": 1_u64 << 30, "chunks": 1});
    let status = seen.imports[0].status.as_mut().expect("it has one");
    status.durable = Some(serde_json::from_value(durable).expect("an image"));
    seen.imports[0].spec.allowed_namespaces = vec!["team".to_owned()];
    let answer = ask(&seen.view(), &["--template", "images/debian"]);
    assert_eq!(
        (answer.result, answer.peak_bytes),
        (Verdict::Fits, Bytes::gib(3)),
        "volume and image: {answer:?}"
    );
}

#[test]
fn programs_get_bytes_and_every_place() {
    let json = serde_json::to_value(ask(&idle(), &["--size", "9Gi"])).expect("plain data");
    assert_eq!((&json["result"], &json["position"]), (&json!("Waits"), &json!(1)));
    assert_eq!((&json["shortfallBytes"], &json["peakBytes"]), (&json!(2_u64 << 30), &json!(9_u64 << 30)));
    assert_eq!(json["candidates"][0]["reason"], "InsufficientCapacity");
    assert!(json.get("pool").is_none() && json.get("reclaims").is_none());
}
