//! What is judged of each node: its Lease, its clock, its preflight, its pools, its ledgers.

use berth_api::StagingNode;
use berth_api::parse;
use berth_core::ids::{NodeName, node_lease_name};
use berth_core::ledger::Behind;
use berth_core::reason::Reason;
use berth_core::units::Timestamp;
use berth_core::view::View;
use kube::ResourceExt as _;

use super::finding::Finding;
use super::leases::{Renewal, SKEW_FAILURE_MILLIS, SKEW_WARNING_MILLIS};
use crate::observe::Seen;
use crate::text::{count, span};

/// This program's version, which is that of the whole release.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Every node, or this one.
pub fn nodes(seen: &Seen, view: &View, only: Option<&str>, now: Timestamp) -> Vec<Finding> {
    let chosen: Vec<&StagingNode> =
        seen.nodes.iter().filter(|node| only.is_none_or(|only| node.name_any() == only)).collect();
    if chosen.is_empty() {
        let (object, found) = match only {
            Some(only) => (Some(format!("node {only}")), "it has never reported"),
            None => (None, "no node has ever reported"),
        };
        let means = "There is nothing to promise there.";
        let fix = "Look for a pod of berth-node on the node, and at its log.";
        return vec![Finding::fail("node", object, found, means, fix)];
    }
    chosen.into_iter().flat_map(|node| one(seen, view, node, now)).collect()
}

fn one(seen: &Seen, view: &View, node: &StagingNode, now: Timestamp) -> Vec<Finding> {
    let name = NodeName(node.name_any());
    let renewal = Renewal::of(&seen.leases, &node_lease_name(&name), now);
    let mut findings = vec![liveness(&name, renewal.as_ref())];
    findings.extend(renewal.and_then(|renewal| clock(&name, &renewal)));
    findings.extend(preflight(&name, node));
    findings.extend(versions(&name, node));
    findings.extend(pools(&name, node));
    findings.extend(ledgers(view, &name));
    findings
}

fn object(name: &NodeName) -> String {
    format!("node {name}")
}

fn liveness(name: &NodeName, renewal: Option<&Renewal>) -> Finding {
    let means = "It counts as lost: nothing is promised there, and what is being deleted there keeps its space. \
                 Volumes that are attached go on.";
    let fix = "See whether the node runs, whether a pod of berth-node does there, and whether that reaches the API server.";
    match renewal {
        None => Finding::fail("node", Some(object(name)), "it has no Lease", means, fix),
        Some(renewal) if renewal.fresh => Finding::ok(
            "node",
            Some(object(name)),
            format!("live, renewed its Lease {} ago", span(renewal.age_millis)),
        ),
        Some(renewal) => {
            let found = format!("it has not renewed its Lease for {}", span(renewal.age_millis));
            Finding::fail("node", Some(object(name)), found, means, fix)
        }
    }
}

fn clock(name: &NodeName, renewal: &Renewal) -> Option<Finding> {
    let skew = renewal.skew_millis?;
    let apart = skew.unsigned_abs().saturating_sub(1000);
    let direction = if skew > 0 { "ahead of" } else { "behind" };
    let found = format!("its clock is {} {direction} the API server's", span(apart));
    let fix = "Synchronise the node's clock (chrony, systemd-timesyncd).";
    Some(match apart {
        SKEW_FAILURE_MILLIS.. => {
            let means = "S3 servers refuse requests signed with such a clock (RequestTimeTooSkewed), and certificates \
                         may seem invalid.";
            Finding::fail("clock", Some(object(name)), found, means, fix)
        }
        SKEW_WARNING_MILLIS.. => {
            let means =
                "No promise rests on it, but times in logs and status mislead, and it may become worse.";
            Finding::warn("clock", Some(object(name)), found, means, fix)
        }
        _ => Finding::ok("clock", Some(object(name)), "agrees with the API server's"),
    })
}

fn preflight(name: &NodeName, node: &StagingNode) -> Vec<Finding> {
    let checks = node.status.as_ref().map(|status| status.preflight.as_slice()).unwrap_or_default();
    let passed = checks.iter().filter(|check| check.ok).count();
    let mut findings = Vec::new();
    for check in checks.iter().filter(|check| !check.ok) {
        let found = format!("{}: {}", check.name, check.detail);
        let fix =
            "Do what it says, then restart berth-node there; `berth-node preflight` on the node looks again.";
        findings.push(if check.required {
            Finding::fail("preflight", Some(object(name)), found, "No pool can be used on this node.", fix)
        } else {
            let means = "What needs it does not work on this node, or is not as safe; the rest works.";
            Finding::warn("preflight", Some(object(name)), found, means, fix)
        });
    }
    if passed > 0 {
        findings.push(Finding::ok(
            "preflight",
            Some(object(name)),
            format!("{} passed", count(passed, "check")),
        ));
    }
    findings
}

fn versions(name: &NodeName, node: &StagingNode) -> Option<Finding> {
    let agent = &node.status.as_ref()?.versions.agent;
    let differs = !agent.is_empty() && agent != VERSION;
    differs.then(|| {
        Finding::warn(
            "version",
            Some(object(name)),
            format!("its agent is {agent}, this program {VERSION}"),
            "What this program says may not be all that there is.",
            "Use the kubectl-berth of the version that runs, or bring the node to the same one.",
        )
    })
}

fn pools(name: &NodeName, node: &StagingNode) -> Vec<Finding> {
    let state = parse::node_state(node);
    let mut findings = Vec::new();
    for (pool, report) in &state.pools {
        let object = Some(format!("pool {pool} on node {name}"));
        if !report.usable {
            let found = format!("{}: {}", report.reason, report.message);
            let means = "Nothing is promised there, and nothing new is made there.";
            let fix = format!("docs/reasons.md says what {} means and what to do.", report.reason);
            findings.push(Finding::fail("pool", object, found, means, &fix));
        } else if report.advisory {
            let means = "The bound is not enforced: others may fill the disk that it lies on.";
            let fix =
                "Give it a disk or partition of its own, or a file system with reflink and preallocation.";
            findings.push(Finding::warn("pool", object, "it is Advisory", means, fix));
        } else if report.reason != Reason::Ready {
            let found = format!("{}: {}", report.reason, report.message);
            let fix = format!("docs/reasons.md says what {} means and what to do.", report.reason);
            findings.push(Finding::warn("pool", object, found, "It works, but not as it should.", &fix));
        } else {
            let found = format!("usable, {} of {} written", report.used, report.total);
            findings.push(Finding::ok("pool", object, found));
        }
    }
    if state.pools.is_empty() {
        let means = "There is nothing to promise there.";
        let fix =
            "If it should carry a pool: compare its labels with `spec.nodeSelector` of the StagingPool.";
        findings.push(Finding::warn("pool", Some(object(name)), "it carries no pool", means, fix));
    }
    findings
}

fn ledgers(view: &View, name: &NodeName) -> Vec<Finding> {
    let mut findings = Vec::new();
    for ledger in view.ledgers.values().filter(|ledger| ledger.node == *name) {
        let object = Some(format!("StagingLedger {}", ledger.name));
        match view.behind(ledger) {
            None => {
                let found = format!("revision {}, not behind its node", ledger.revision);
                findings.push(Finding::ok("ledger", object, found));
            }
            // Node and ledger were not read at one instant.
            Some(behind @ Behind::Revision { .. }) => findings.push(Finding::warn(
                "ledger",
                object,
                behind.to_string(),
                "If that stays so, the API server's data were restored from an older state.",
                "Look again in a minute.",
            )),
            Some(behind) => findings.push(Finding::fail(
                "ledger",
                object,
                behind.to_string(),
                "Nothing is promised on this ledger, and the node starts no new work under it.",
                "docs/operations.md, `LedgerBehind`: were the API server's data restored from an older state?",
            )),
        }
    }
    findings
}
