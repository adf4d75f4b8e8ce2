use k8s_openapi::api::core::v1::Namespace;
use serde_json::json;

use super::*;
use crate::fixture::{lease, operator_lease, seen, store, written};
use crate::server::Answer;
use berth_core::units::Timestamp;

/// 2026-01-01T01:00:00Z.
const NOW: Timestamp = Timestamp(1_767_229_200_000);

fn namespace(level: &str) -> Namespace {
    let labels = json!({"pod-security.kubernetes.io/enforce": level});
    serde_json::from_value(json!({"metadata": {"name": "berth-system", "labels": labels}}))
        .expect("a namespace")
}

/// A cluster in order.
fn sound() -> Examined {
    let mut seen = seen();
    seen.leases = vec![
        operator_lease("2026-01-01T00:59:58Z"),
        written(lease("n1", "2026-01-01T00:59:50Z"), "2026-01-01T00:59:50Z"),
    ];
    seen.stores = vec![store("True", "Ready", "")];
    let established = |mut known: k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition| {
        known.status = Some(serde_json::from_value(json!({"conditions": [{"type": "Established", "status": "True"}]})).expect("a status"));
        known
    };
    Examined {
        system_namespace: "berth-system".to_owned(),
        server: Answer { now: NOW, here: NOW, millis: 4 },
        version: Ok("v1.33.2".to_owned()),
        definitions: berth_api::definitions()
            .into_iter()
            .map(|known| (known.clone(), Ok(Some(established(known)))))
            .collect(),
        namespace: Ok(Some(namespace("privileged"))),
        seen: Ok(seen),
    }
}

/// What is not in order after a change.
fn bad(change: impl FnOnce(&mut Examined)) -> Vec<Finding> {
    let mut examined = sound();
    change(&mut examined);
    judge(&examined, None).into_iter().filter(|finding| finding.level > Level::Ok).collect()
}

fn objects(examined: &mut Examined) -> &mut Seen {
    examined.seen.as_mut().expect("it was read")
}

/// The only finding: its level, check and text.
fn only(change: impl FnOnce(&mut Examined)) -> (Level, &'static str, String) {
    let found = bad(change);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(!found[0].means.is_empty() && !found[0].fix.is_empty(), "{found:?}");
    (found[0].level, found[0].check, found[0].found.clone())
}

#[test]
fn a_sound_cluster_is_in_order() {
    let findings = judge(&sound(), None);
    assert_eq!(as_text(&findings, false), "10 checks in order, 0 warnings, 0 broken\n");
    let expected = "\
ok   api-server   v1.33.2, answers in 4 ms
ok   clock        this machine: agrees with the API server's
ok   definitions  8 definitions, each as this program knows it
ok   pod-security namespace berth-system: its pods may be privileged
ok   operator     Lease berth-operator: held by operator-1, renewed 2 s ago
ok   node         node n1: live, renewed its Lease 10 s ago
ok   clock        node n1: agrees with the API server's
ok   pool         pool fast on node n1: usable, 1 GiB of 10 GiB written
ok   ledger       StagingLedger LEDGER: revision 3, not behind its node
ok   store        ImageStore images/s: node n1 reaches https://s3.example.org since
                  2026-01-01T00:00:00Z
10 checks in order, 0 warnings, 0 broken
";
    let ledger = kube::ResourceExt::name_any(&seen().ledgers[0]);
    let lines = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let text = as_text(&findings, true);
    assert_eq!(lines(&text), lines(&expected.replace("LEDGER", &ledger)));
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    assert_eq!(as_json(&findings)["ok"], true);
}

#[test]
fn clocks_are_told_apart_from_late_nodes() {
    let (level, check, found) = only(|examined| {
        objects(examined).leases[1] = written(lease("n1", "2026-01-01T00:58:50Z"), "2026-01-01T00:59:50Z");
    });
    assert_eq!(
        (level, check, found.as_str()),
        (Level::Warn, "clock", "its clock is 59 s behind the API server's")
    );
    let (level, _, found) = only(|examined| {
        objects(examined).leases[1] = written(lease("n1", "2026-01-01T01:09:50Z"), "2026-01-01T00:59:50Z");
    });
    assert_eq!((level, found.as_str()), (Level::Fail, "its clock is 9 min 59 s ahead of the API server's"));
    let (level, check, found) = only(|examined| {
        objects(examined).leases[1] = written(lease("n1", "2026-01-01T00:50:00Z"), "2026-01-01T00:50:00Z");
    });
    assert_eq!(
        (level, check, found.as_str()),
        (Level::Fail, "node", "it has not renewed its Lease for 10 min")
    );
    let (level, check, found) = only(|examined| examined.server.here = Timestamp(NOW.0 + 61_000));
    assert_eq!(
        (level, check, found.as_str()),
        (Level::Warn, "clock", "1 min apart from the API server's clock")
    );
}

#[test]
fn pod_security_is_judged_by_the_label() {
    let (level, check, found) = only(|examined| examined.namespace = Ok(Some(namespace("baseline"))));
    assert_eq!((level, check), (Level::Fail, "pod-security"));
    assert_eq!(found, "pod-security.kubernetes.io/enforce=baseline");
    let (level, ..) = only(|examined| examined.namespace = Ok(Some(Namespace::default())));
    assert_eq!(level, Level::Warn, "the cluster's default is not known");
    let (level, _, found) = only(|examined| examined.namespace = Ok(None));
    assert_eq!((level, found.as_str()), (Level::Fail, "it is not there"));
    let (level, _, found) = only(|examined| examined.namespace = Err("forbidden".to_owned()));
    assert_eq!((level, found.as_str()), (Level::Warn, "it could not be read: forbidden"));
}

#[test]
fn definitions_are_compared_field_by_field() {
    let without = |examined: &mut Examined, field: &str| {
        let (_, Ok(Some(pool))) = &mut examined.definitions[0] else { panic!("it was read") };
        let mut value = serde_json::to_value(&*pool).expect("plain data");
        let schema = &mut value["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        schema["properties"]["spec"]["properties"]
            .as_object_mut()
            .expect("fields")
            .remove(field)
            .expect("known");
        *pool = serde_json::from_value(value).expect("a definition");
    };
    let (level, _, found) = only(|examined| without(examined, "drainNodes"));
    assert_eq!(level, Level::Fail);
    assert_eq!(found, "it is older than this program, and lacks v1alpha1.spec.drainNodes");
    let (level, _, found) = only(|examined| {
        let known = examined.definitions[0].0.clone();
        without(examined, "drainNodes");
        let (ours, Ok(theirs)) = &mut examined.definitions[0] else { panic!("it was read") };
        let mut older = theirs.replace(known).expect("there");
        let status = older.status.take();
        *ours = older;
        theirs.as_mut().expect("there").status = status;
    });
    assert_eq!(
        (level, found.as_str()),
        (Level::Warn, "it is newer than this program, and has v1alpha1.spec.drainNodes")
    );
    let (level, _, found) = only(|examined| examined.definitions[3].1 = Ok(None));
    assert_eq!((level, found.as_str()), (Level::Fail, "it is not installed"));
    let (level, _, found) = only(|examined| {
        let (_, Ok(Some(found))) = &mut examined.definitions[3] else { panic!("it was read") };
        found.status = None;
    });
    assert_eq!((level, found.as_str()), (Level::Fail, "it is not served"));
}

#[test]
fn an_operator_that_is_gone_is_broken() {
    let (level, check, found) = only(|examined| {
        objects(examined).leases.remove(0);
    });
    assert_eq!((level, check, found.as_str()), (Level::Fail, "operator", "no operator has ever held it"));
    let (level, _, found) =
        only(|examined| objects(examined).leases[0] = operator_lease("2026-01-01T00:30:00Z"));
    assert_eq!((level, found.as_str()), (Level::Fail, "held by operator-1, not renewed for 30 min"));
}

#[test]
fn nodes_say_what_they_lack() {
    let set = |examined: &mut Examined, change: fn(&mut berth_api::staging_node::StagingNodeStatus)| {
        change(objects(examined).nodes[0].status.as_mut().expect("it reports"));
    };
    let check = |name: &str, ok: bool, required: bool| {
        let (name, detail) = (name.to_owned(), "install it".to_owned());
        berth_api::staging_node::PreflightCheck { name, ok, required, detail }
    };
    let found = bad(|examined| {
        let all = vec![check("xfs", false, true), check("nbd", false, false), check("qemu-img", true, true)];
        objects(examined).nodes[0].status.as_mut().expect("it reports").preflight = all;
    });
    let told: Vec<_> = found.iter().map(|finding| (finding.level, finding.found.as_str())).collect();
    assert_eq!(told, [(Level::Fail, "xfs: install it"), (Level::Warn, "nbd: install it")]);
    let (level, check, _) =
        only(|examined| set(examined, |status| status.versions.agent = "0.0.1".to_owned()));
    assert_eq!((level, check), (Level::Warn, "version"));
    let (level, check, found) = only(|examined| {
        set(examined, |status| {
            let pool = &mut status.pools[0];
            (pool.usable, pool.reason, pool.message) =
                (false, "PoolAreaFailed".to_owned(), "no such directory".to_owned());
        });
    });
    assert_eq!((level, check, found.as_str()), (Level::Fail, "pool", "PoolAreaFailed: no such directory"));
    let (level, check, _) =
        only(|examined| set(examined, |status| status.pools[0].lineage = Some("other".to_owned())));
    assert_eq!((level, check), (Level::Fail, "ledger"));
    let (level, check, _) = only(|examined| set(examined, |status| status.pools[0].obeyed_revision = 9));
    assert_eq!((level, check), (Level::Warn, "ledger"), "most often two looks at two instants");
    let (level, _, found) = only(|examined| objects(examined).nodes.clear());
    assert_eq!((level, found.as_str()), (Level::Fail, "no node has ever reported"));
}

#[test]
fn stores_say_which_node_looked_and_what_it_found() {
    let (level, check, found) = only(|examined| {
        objects(examined).stores = vec![store("False", "ObjectStoreUnavailable", "connection refused")];
    });
    assert_eq!((level, check), (Level::Fail, "store"));
    assert_eq!(
        found,
        "node n1 does not get on with https://s3.example.org since 2026-01-01T00:00:00Z: ObjectStoreUnavailable: connection \
         refused"
    );
    let (level, _, found) = only(|examined| {
        let status = objects(examined).stores[0].status.as_mut().expect("it has one");
        let can = status.capabilities.as_mut().expect("it was probed");
        (can.conditional_writes, can.ranges) = (false, false);
    });
    assert_eq!((level, found.as_str()), (Level::Warn, "it lacks conditional writes, ranged reads"));
    let (level, _, found) = only(|examined| objects(examined).stores[0].status = None);
    assert_eq!((level, found.as_str()), (Level::Warn, "no node is assigned to it"));
}

#[test]
fn one_node_is_looked_at_alone() {
    let findings = judge(&sound(), Some("n2"));
    let failed: Vec<_> = findings.iter().filter(|finding| finding.level == Level::Fail).collect();
    assert_eq!(failed.len(), 1);
    assert_eq!(failed[0].object.as_deref(), Some("node n2"));
    assert!(findings.iter().any(|finding| finding.found.contains("looks after no ImageStore")));
}

#[test]
fn what_cannot_be_read_hides_nothing_else() {
    let (level, check, found) =
        only(|examined| examined.seen = Err("could not list StagingPool objects".to_owned()));
    assert_eq!(
        (level, check, found.as_str()),
        (Level::Fail, "objects", "could not list StagingPool objects")
    );
    let text = as_text(&bad(|examined| objects(examined).nodes.clear()), false);
    let expected = "\
FAIL node         no node has ever reported
                  There is nothing to promise there.
                  -> Look for a pod of berth-node on the node, and at its log.
0 checks in order, 0 warnings, 1 broken
";
    assert_eq!(text, expected);
}
