//! What is judged of the cluster as a whole: API server, definitions, namespace, operator.

use std::collections::BTreeSet;

use berth_api::defaults::OPERATOR_LEASE;
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::ResourceExt as _;
use serde_json::Value;

use super::examine::{Examined, Read};
use super::finding::Finding;
use super::leases::{Renewal, SKEW_WARNING_MILLIS};
use crate::observe::Seen;
use crate::text::{count, span};

/// The label that says what pods of a namespace may do.
const POD_SECURITY: &str = "pod-security.kubernetes.io/enforce";
/// How many missing fields are named.
const NAMED: usize = 5;

/// The API server: its version, its speed, and this machine's clock against its own.
pub fn server(examined: &Examined) -> Vec<Finding> {
    let answer = examined.server;
    let version = examined.version.as_deref().unwrap_or("of unknown version");
    let mut findings =
        vec![Finding::ok("api-server", None, format!("{version}, answers in {} ms", answer.millis))];
    // Its time is exact to a second only.
    let apart =
        answer.now.millis_since(answer.here).max(answer.here.millis_since(answer.now)).saturating_sub(1000);
    findings.push(if apart > SKEW_WARNING_MILLIS {
        Finding::warn(
            "clock",
            Some("this machine".to_owned()),
            format!("{} apart from the API server's clock", span(apart)),
            "`status`, `fit` and `check` may take live nodes for silent ones, or the reverse.",
            "Synchronise this machine's clock.",
        )
    } else {
        Finding::ok("clock", Some("this machine".to_owned()), "agrees with the API server's")
    });
    findings
}

/// The definitions of the kinds, compared field by field with what this program knows.
pub fn definitions(
    all: &[(CustomResourceDefinition, Read<Option<CustomResourceDefinition>>)],
) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::new();
    for (known, found) in all {
        let name = Some(known.name_any());
        let apply = "Apply the definitions of the version that runs: `kubectl apply -f crds/`.";
        match found {
            Err(why) => findings.push(unread("definitions", name, why)),
            Ok(None) => findings.push(Finding::fail(
                "definitions",
                name,
                "it is not installed",
                "Objects of this kind cannot be made, and neither operator nor nodes start.",
                apply,
            )),
            Ok(Some(found)) if !is_established(found) => findings.push(Finding::fail(
                "definitions",
                name,
                "it is not served",
                "Objects of this kind cannot be read or made.",
                "`kubectl describe crd` says why: most often its names collide with another definition's.",
            )),
            Ok(Some(found)) => findings.extend(differences(known, found)),
        }
    }
    if findings.is_empty() {
        let found = format!("{}, each as this program knows it", count(all.len(), "definition"));
        findings.push(Finding::ok("definitions", None, found));
    }
    findings
}

fn is_established(definition: &CustomResourceDefinition) -> bool {
    let conditions = definition.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|condition| condition.type_ == "Established" && condition.status == "True")
}

/// A field that a definition lacks is dropped without a word when an object is written.
fn differences(known: &CustomResourceDefinition, found: &CustomResourceDefinition) -> Option<Finding> {
    let (ours, theirs) = (fields(known), fields(found));
    let missing: Vec<&String> = ours.difference(&theirs).collect();
    let newer: Vec<&String> = theirs.difference(&ours).collect();
    let named = |all: &[&String]| {
        let first: Vec<&str> = all.iter().take(NAMED).map(|name| name.as_str()).collect();
        let more = if all.len() > NAMED { format!(" and {} more", all.len() - NAMED) } else { String::new() };
        format!("{}{more}", first.join(", "))
    };
    if !missing.is_empty() {
        return Some(Finding::fail(
            "definitions",
            Some(known.name_any()),
            format!("it is older than this program, and lacks {}", named(&missing)),
            "What is written to these fields is dropped without a word.",
            "Apply the definitions of the version that runs: `kubectl apply -f crds/`.",
        ));
    }
    (!newer.is_empty()).then(|| {
        Finding::warn(
            "definitions",
            Some(known.name_any()),
            format!("it is newer than this program, and has {}", named(&newer)),
            "This program does not show everything that there is.",
            "Use the kubectl-berth of the version that runs.",
        )
    })
}

/// The paths of all fields, of the version that both have.
fn fields(definition: &CustomResourceDefinition) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for version in definition.spec.versions.iter().filter(|version| version.served) {
        let schema = version.schema.as_ref().and_then(|schema| schema.open_api_v3_schema.as_ref());
        let schema = schema.and_then(|schema| serde_json::to_value(schema).ok()).unwrap_or_default();
        collect(&version.name, &schema, &mut all);
    }
    all
}

fn collect(path: &str, schema: &Value, all: &mut BTreeSet<String>) {
    for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
        // What every object has is not Berth's; the API server fills it in.
        if !path.contains('.') && ["apiVersion", "kind", "metadata"].contains(&name.as_str()) {
            continue;
        }
        let path = format!("{path}.{name}");
        collect(&path, inner, all);
        all.insert(path);
    }
    for inner in ["items", "additionalProperties"] {
        if schema[inner].is_object() {
            collect(&format!("{path}[]"), &schema[inner], all);
        }
    }
}

/// Berth's namespace, and what its pods may do.
pub fn namespace(name: &str, found: &Read<Option<Namespace>>) -> Finding {
    let object = Some(format!("namespace {name}"));
    let fix = format!("kubectl label namespace {name} {POD_SECURITY}=privileged --overwrite");
    let found = match found {
        Err(why) => return unread("pod-security", object, why),
        Ok(None) => {
            let fix = format!("kubectl create namespace {name}, or name the right one by --system-namespace");
            let means =
                "There is no place for the operator, the nodes' pods and the reservations of volumes.";
            return Finding::fail("pod-security", object, "it is not there", means, &fix);
        }
        Ok(Some(found)) => found,
    };
    match found.labels().get(POD_SECURITY).map(String::as_str) {
        Some("privileged") => Finding::ok("pod-security", object, "its pods may be privileged"),
        Some(level) => Finding::fail(
            "pod-security",
            object,
            format!("{POD_SECURITY}={level}"),
            "Pods of berth-node need privileges that this level forbids: no new one starts.",
            &fix,
        ),
        None => Finding::warn(
            "pod-security",
            object,
            format!("it has no label {POD_SECURITY}"),
            "The cluster's default counts. Unless that is `privileged`, pods of berth-node do not start.",
            &fix,
        ),
    }
}

/// The operator's Lease.
pub fn operator(seen: &Seen, examined: &Examined) -> Finding {
    let object = Some(format!("Lease {OPERATOR_LEASE}"));
    let means = "Nothing new is promised, released or explained. What is ready goes on.";
    let fix = format!(
        "Look for the pods of berth-operator in namespace {}, and at their logs.",
        examined.system_namespace
    );
    let Some(renewal) = Renewal::of(&seen.leases, OPERATOR_LEASE, examined.server.now) else {
        return Finding::fail("operator", object, "no operator has ever held it", means, &fix);
    };
    let holder = if renewal.holder.is_empty() { "nobody".to_owned() } else { renewal.holder.clone() };
    if renewal.fresh && !renewal.holder.is_empty() {
        return Finding::ok(
            "operator",
            object,
            format!("held by {holder}, renewed {} ago", span(renewal.age_millis)),
        );
    }
    let found = format!("held by {holder}, not renewed for {}", span(renewal.age_millis));
    Finding::fail("operator", object, found, means, &fix)
}

/// What this user, or this network, does not let us see.
pub fn unread(check: &'static str, object: Option<String>, why: &str) -> Finding {
    Finding::warn(
        check,
        object,
        format!("it could not be read: {why}"),
        "Nothing can be said of it.",
        "Ask as somebody who may read it.",
    )
}
