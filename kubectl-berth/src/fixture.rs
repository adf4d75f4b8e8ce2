//! A small cluster for unit tests: one pool on one node, a reservation that is ready, one that waits, and an import.

use berth_core::ids::{NodeName, PoolName, ledger_name, node_lease_name};
use k8s_openapi::api::coordination::v1::Lease;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::observe::Seen;

const API: &str = "staging.berth.dev/v1alpha1";

fn read<K: DeserializeOwned>(object: Value) -> K {
    serde_json::from_value(object).expect("an object of its kind")
}

fn condition(kind: &str, status: &str, reason: &str, message: &str) -> Value {
    json!({"type": kind, "status": status, "reason": reason, "message": message,
           "lastTransitionTime": "2026-01-01T00:00:00Z"})
}

/// The Lease of a node, 40 s long.
pub fn lease(node: &str, renewed: &str) -> Lease {
    read(json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": node_lease_name(&NodeName::from(node))},
        "spec": {"renewTime": renewed.replace('Z', ".000000Z"), "leaseDurationSeconds": 40}}))
}

fn reservation(name: &str, size: &str, status: &Value) -> Value {
    json!({"apiVersion": API, "kind": "StagingReservation",
        "metadata": {"name": name, "namespace": "team", "uid": format!("uid-{name}"),
                     "finalizers": ["staging.berth.dev/release"]},
        "spec": {"poolName": "fast", "maxSize": size, "access": "File"}, "status": status})
}

/// Without a finding.
pub fn seen() -> Seen {
    let bytes = |data: u64| json!({"dataBytes": data, "metadataBytes": 0});
    let total = bytes(10 << 30);
    let ledger = json!({"apiVersion": API, "kind": "StagingLedger",
        "metadata": {"name": ledger_name(&PoolName::from("fast"), &NodeName::from("n1"))},
        "spec": {"poolName": "fast", "scope": {"nodeName": "n1"}, "lineage": "l", "revision": 3,
            "capacity": {"images": total, "volumes": total, "total": total},
            "promises": {"uid-ready": {"holder": {"kind": "StagingReservation", "namespace": "team", "name": "ready"},
                "class": "Images", "dataBytes": 3_u64 << 30, "metadataBytes": 0, "generation": 1}}}});
    let node = json!({"apiVersion": API, "kind": "StagingNode", "metadata": {"name": "n1"}, "spec": {"nodeName": "n1"},
        "status": {"pools": [{"name": "fast", "uid": "pool-uid", "usable": true, "reason": "Ready", "totalBytes": 10_u64 << 30,
            "usedBytes": 1 << 30, "lineage": "l", "obeyedRevision": 3,
            "obeyed": [{"uid": "uid-ready", "generation": 1}]}]}});
    let pool = json!({"apiVersion": API, "kind": "StagingPool", "metadata": {"name": "fast", "uid": "pool-uid"},
        "spec": {"backend": {"filesystem": {"path": "/srv/berth", "size": "10Gi"}}},
        "status": {"conditions": [condition("Ready", "True", "Ready", "usable on 1 node")]}});
    let ready = json!({"state": "Ready", "preparedGeneration": 1,
        "assignment": {"pool": "fast", "node": "n1", "generation": 1},
        "conditions": [condition("Promised", "True", "Promised", ""), condition("Ready", "True", "Ready", "prepared")]});
    let waits = json!({"state": "Queued", "queue": {"position": 1, "bytesAhead": 0, "reason": "InsufficientSpace"},
        "conditions": [condition("Promised", "False", "InsufficientSpace", "lacks 1 GiB in all")]});
    let import = json!({"apiVersion": API, "kind": "TemplateImport",
        "metadata": {"name": "debian", "namespace": "images", "uid": "uid-import"},
        "spec": {"source": {"http": {"url": "https://example.org/debian.qcow2"}}, "store": {"name": "s"}},
        "status": {"state": "Importing", "assignment": {"pool": "fast", "node": "n1", "generation": 2},
            "stage": {"index": 3, "total": 5, "name": "Upload"},
            "progress": {"percent": 37, "bytesDone": 37, "bytesTotal": 100},
            "plan": {"format": "Qcow2", "sourceBytes": 100, "virtualSize": 2_u64 << 30, "peakBytes": 100,
                     "steps": ["Fetch"], "why": "it is compressed"},
            "conditions": [condition("Ready", "False", "Importing", "stage 3 of 5")]}});
    Seen {
        pools: vec![read(pool)],
        nodes: vec![read(node)],
        reservations: vec![
            read(reservation("ready", "3Gi", &ready)),
            read(reservation("waits", "8Gi", &waits)),
        ],
        imports: vec![read(import)],
        ledgers: vec![read(ledger)],
        fresh_leases: [node_lease_name(&NodeName::from("n1"))].into(),
        ..Seen::default()
    }
}
