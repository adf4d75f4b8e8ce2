//! What is judged of the image stores: the handshake that a node had with each.

use berth_api::ImageStore;
use berth_api::conditions::{ConditionType, Truth, find};
use berth_core::ids::NodeName;
use kube::ResourceExt as _;

use super::finding::Finding;
use crate::observe::Seen;
use crate::server::{rfc3339, timestamp};

/// Every store, or those that this node looks after.
pub fn stores(seen: &Seen, only: Option<&str>) -> Vec<Finding> {
    let node_of = |store: &ImageStore| {
        store.status.as_ref().and_then(|status| status.assignment.as_ref()).map(|at| at.node.clone())
    };
    let chosen: Vec<&ImageStore> = seen
        .stores
        .iter()
        .filter(|store| only.is_none_or(|only| node_of(store).as_deref() == Some(only)))
        .collect();
    if chosen.is_empty() {
        let found = only.map_or_else(
            || "there is no ImageStore".to_owned(),
            |node| format!("node {node} looks after no ImageStore; other nodes may"),
        );
        return vec![Finding::ok("store", None, found)];
    }
    chosen.into_iter().flat_map(|store| one(seen, store, node_of(store))).collect()
}

fn one(seen: &Seen, store: &ImageStore, node: Option<String>) -> Vec<Finding> {
    let name = format!("{}/{}", store.namespace().unwrap_or_default(), store.name_any());
    let object = || Some(format!("ImageStore {name}"));
    let endpoint = &store.spec.endpoint;
    let Some(node) = node else {
        let means = "Nobody looks after it: imports into it wait.";
        let fix = "A live node with a usable pool is needed; see the findings about nodes.";
        return vec![Finding::warn("store", object(), "no node is assigned to it", means, fix)];
    };
    let status = store.status.clone().unwrap_or_default();
    let mut findings = Vec::new();
    match find(&status.conditions, ConditionType::Ready) {
        None => {
            let found = format!("node {node} has not tried {endpoint} yet");
            let means = "It is not known whether the store can be reached.";
            findings.push(Finding::warn("store", object(), found, means, "Look again in a minute."));
        }
        Some(ready) if ready.status == Truth::True.as_str() => {
            let since = rfc3339(timestamp(ready.last_transition_time.0));
            findings.push(Finding::ok(
                "store",
                object(),
                format!("node {node} reaches {endpoint} since {since}"),
            ));
        }
        Some(ready) => {
            let since = rfc3339(timestamp(ready.last_transition_time.0));
            let found = format!(
                "node {node} does not get on with {endpoint} since {since}: {}: {}",
                ready.reason, ready.message
            );
            let means = "Imports into it wait, and images that are not staged yet cannot be.";
            let fix = format!("docs/reasons.md says what {} means and what to do.", ready.reason);
            findings.push(Finding::fail("store", object(), found, means, &fix));
        }
    }
    if !seen.is_live(&NodeName(node.clone())) {
        let found = format!("node {node}, which looked, is silent");
        let means = "What it said of the store may no longer be so.";
        let fix = "An operator moves the store to another node once that one counts as lost.";
        findings.push(Finding::warn("store", object(), found, means, fix));
    }
    if let Some(can) = &status.capabilities {
        findings.extend(lacks(object(), can));
    }
    findings
}

fn lacks(object: Option<String>, can: &berth_api::image_store::StoreCapabilities) -> Option<Finding> {
    let all = [
        (can.conditional_writes, "conditional writes", "two writers of one name may overwrite each other"),
        (can.verifies_checksums, "checksums", "every chunk is read back after it was sent"),
        (can.lists_uploads, "listing of uploads", "what a broken upload leaves is not found again"),
        (can.ranges, "ranged reads", "reading cannot go on where it stopped"),
    ];
    let missing: Vec<_> = all.iter().filter(|(can, ..)| !can).collect();
    let names: Vec<&str> = missing.iter().map(|(_, name, _)| *name).collect();
    let means: Vec<&str> = missing.iter().map(|(_, _, means)| *means).collect();
    (!missing.is_empty()).then(|| {
        let means = format!("Without these: {}.", means.join("; "));
        let fix = "Use a release of the S3 server that can, if there is one.";
        Finding::warn("store", object, format!("it lacks {}", names.join(", ")), &means, fix)
    })
}
