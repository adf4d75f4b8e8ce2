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

/// The same with a volume of the claim `team/disk` in it, that starts from an image which its node is still fetching.
pub fn seen_with_volume() -> Seen {
    let mut seen = seen();
    let digest = format!("sha256:{}", "ab".repeat(32));
    let place = json!({"pool": "fast", "node": "n1", "generation": 1});
    let volume = json!({"apiVersion": API, "kind": "StagingReservation",
        "metadata": {"name": "csi-vol", "namespace": "berth-system", "uid": "uid-vol",
            "labels": {"staging.berth.dev/claim-namespace": "team", "staging.berth.dev/claim-name": "disk"},
            "finalizers": ["staging.berth.dev/release"]},
        "spec": {"poolName": "fast", "maxSize": "2Gi", "access": "Block",
            "image": {"template": {"namespace": "images", "name": "debian"}}},
        "status": {"state": "Promised", "assignment": place, "reused": false,
            "image": {"digest": digest, "stagedImage": "debian-img", "virtualSize": 2_u64 << 30},
            "conditions": [condition("Promised", "True", "Promised", "promised in pool fast on node n1")]}});
    let image = json!({"apiVersion": API, "kind": "StagedImage", "metadata": {"name": "debian-img", "uid": "uid-img"},
        "spec": {"digest": digest, "poolName": "fast", "nodeName": "n1", "dataBytes": 1_u64 << 30,
            "virtualSize": 2_u64 << 30, "store": {"namespace": "images", "name": "s"}},
        "status": {"state": "Filling", "progress": {"percent": 40}}});
    seen.reservations.push(read(volume));
    seen.images.push(read(image));
    let promise = |holder: Value, class: &str, gib: u64| {
        read(
            json!({"holder": holder, "class": class, "dataBytes": gib << 30, "metadataBytes": 0, "generation": 1}),
        )
    };
    let promises = &mut seen.ledgers[0].spec.promises;
    let volume = json!({"kind": "StagingReservation", "namespace": "berth-system", "name": "csi-vol"});
    promises.insert("uid-vol".to_owned(), promise(volume, "Volumes", 2));
    promises.insert(
        "uid-img".to_owned(),
        promise(json!({"kind": "StagedImage", "name": "debian-img"}), "Images", 1),
    );
    let report = seen.nodes[0].status.as_mut().expect("it reports");
    report.pools[0].obeyed.push(read(json!({"uid": "uid-vol", "generation": 1})));
    seen.leases.push(lease("n1", "2026-01-01T00:59:50Z"));
    seen
}

/// A transfer between two image stores that pauses on node `n1`.
pub fn transfer() -> berth_api::ImageTransfer {
    read(
        json!({"apiVersion": API, "kind": "ImageTransfer", "metadata": {"name": "copy", "namespace": "images", "uid": "uid-copy"},
        "spec": {"source": {"storeImage": {"store": "s", "image": "debian"}},
            "destination": {"storeImage": {"store": "backup", "image": "debian"}}, "suspend": true},
        "status": {"state": "Suspended", "assignment": {"pool": "fast", "node": "n1", "generation": 1},
            "stage": {"index": 1, "total": 3, "name": "Upload"}, "progress": {"percent": 40, "bytesDone": 40},
            "plan": {"format": "Chunked", "sourceBytes": 100, "virtualSize": 2_u64 << 30, "peakBytes": 0, "steps": ["Upload"],
                     "why": "it is chunked", "staging": "Direct"},
            "conditions": [condition("Succeeded", "Unknown", "Suspended", "`spec.suspend` is true")]}}),
    )
}

/// An image store that node `n1` looks after.
pub fn store(ready: &str, reason: &str, message: &str) -> berth_api::ImageStore {
    read(json!({"apiVersion": API, "kind": "ImageStore", "metadata": {"name": "s", "namespace": "images"},
        "spec": {"endpoint": "https://s3.example.org", "bucket": "images"},
        "status": {"assignment": {"node": "n1", "generation": 1}, "conditions": [condition("Ready", ready, reason, message)],
            "capabilities": {"conditionalWrites": true, "verifiesChecksums": true, "listsUploads": true, "ranges": true}}}))
}

/// A Lease of the operator, written when it was renewed.
pub fn operator_lease(renewed: &str) -> Lease {
    let mut lease = lease("any", renewed);
    lease.metadata.name = Some("berth-operator".to_owned());
    lease.spec.as_mut().expect("it has one").holder_identity = Some("operator-1".to_owned());
    written(lease, renewed)
}

/// The Lease as the API server notes that it was written at that time, by its own clock.
pub fn written(mut lease: Lease, time: &str) -> Lease {
    lease.metadata.managed_fields =
        Some(vec![read(json!({"manager": "m", "operation": "Update", "time": time}))]);
    lease
}
