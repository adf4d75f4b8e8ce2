//! Writes against an API server that knows more than the watches have shown.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

mod api_server;

use api_server::{ApiServer, KINDS};
use axum::http::Method;
use berth_api::defaults::RELEASE_FINALIZER;
use berth_core::change::Change;
use berth_core::ids::{NodeName, ObjectName, PoolName, Uid, ledger_name};
use berth_core::reason::Reason;
use berth_core::reservation::Claim;
use berth_core::transfer::{TransferId, TransferKind};
use berth_core::units::Generation;
use berth_core::view::{ObjectVersion, Placement, TransferState};
use berth_operator::apply::ApplyError;
use serde_json::{Value, json};

const FOREIGN_FINALIZER: &str = "example.com/other";

fn ledger(promises: &Value) -> Value {
    let bytes = json!({"dataBytes": 100, "metadataBytes": 0});
    json!({
        "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingLedger",
        "metadata": {"name": ledger_name(&PoolName::from("p"), &NodeName::from("n")), "uid": "ledger", "resourceVersion": "7"},
        "spec": {
            "poolName": "p", "scope": {"nodeName": "n"}, "lineage": "b5e1f1c5-6f9c-4c39-9c1a-0c6f4f8a4a11", "revision": 3,
            "capacity": {"images": bytes, "volumes": bytes, "total": bytes}, "promises": promises,
        },
    })
}

fn promise(holder: &Value) -> Value {
    json!({"holder": holder, "class": "Images", "dataBytes": 10, "metadataBytes": 0, "generation": 1})
}

fn metadata(name: &str, uid: &str) -> Value {
    json!({
        "name": name, "uid": uid, "resourceVersion": "42", "generation": 1,
        "creationTimestamp": "2026-01-01T00:00:00Z", "deletionTimestamp": "2026-01-02T00:00:00Z",
        "finalizers": [FOREIGN_FINALIZER, RELEASE_FINALIZER],
    })
}

fn reservation() -> Value {
    let mut metadata = metadata("r", "uid-r");
    metadata["namespace"] = json!("ns");
    json!({
        "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation", "metadata": metadata,
        "spec": {"poolName": "p", "maxSize": "10", "access": "File"},
        "status": {"state": "Releasing", "assignment": {"pool": "p", "node": "n", "generation": 1}},
    })
}

fn image() -> Value {
    json!({
        "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagedImage", "metadata": metadata("i", "uid-i"),
        "spec": {
            "digest": format!("sha256:{}", "ab".repeat(32)), "poolName": "p", "nodeName": "n",
            "store": {"namespace": "ns", "name": "store"}, "dataBytes": 10, "virtualSize": 20,
        },
    })
}

/// A holder that is being deleted, and what takes its finalizer.
struct Case {
    plural: &'static str,
    object: Value,
    path: String,
    holder: Value,
    uid: &'static str,
    unguard: Change,
}

fn cases() -> [Case; 2] {
    [
        Case {
            plural: "stagingreservations",
            object: reservation(),
            path: format!("{KINDS}/namespaces/ns/stagingreservations/r"),
            holder: json!({"kind": "StagingReservation", "namespace": "ns", "name": "r"}),
            uid: "uid-r",
            unguard: Change::UnguardReservation { name: ObjectName::new("ns", "r"), uid: Uid::from("uid-r") },
        },
        Case {
            plural: "stagedimages",
            object: image(),
            path: format!("{KINDS}/stagedimages/i"),
            holder: json!({"kind": "StagedImage", "name": "i"}),
            uid: "uid-i",
            unguard: Change::UnguardImage { name: "i".to_owned(), uid: Uid::from("uid-i") },
        },
    ]
}

/// The watches show the holder and a ledger without its promise; `stored` is the ledger that the API server has.
fn server(case: &Case, stored: Option<Value>) -> (ApiServer, String) {
    let mut server = ApiServer::default();
    let shown = ledger(&json!({}));
    let path = format!("{KINDS}/stagingledgers/{}", shown["metadata"]["name"].as_str().unwrap());
    server.listed.insert(case.plural, vec![case.object.clone()]);
    server.listed.insert("stagingledgers", vec![shown]);
    server.stored.insert(case.path.clone(), case.object.clone());
    server.stored.extend(stored.map(|ledger| (path.clone(), ledger)));
    (server, path)
}

#[tokio::test]
async fn a_finalizer_stays_while_the_ledger_itself_has_a_promise_that_the_watch_does_not_show() {
    for case in cases() {
        let promises = json!({case.uid: promise(&case.holder), "another": promise(&case.holder)});
        let (server, ledger_path) = server(&case, Some(ledger(&promises)));
        let operator = server.operator().await;
        operator.observer.view(|view| {
            let mut ledgers = view.ledgers.values();
            assert!(ledgers.next().unwrap().promises.is_empty(), "the view lags");
        });
        let outcome = operator.applier.apply(std::slice::from_ref(&case.unguard)).await;
        assert!(matches!(outcome, Err(ApplyError::Conflict { .. })), "{outcome:?}");
        assert_eq!(server.reads(&ledger_path), 1);
        assert_eq!(server.writes(), [], "nothing is written");
    }
}

#[tokio::test]
async fn the_finalizer_goes_once_the_ledger_itself_has_no_promise() {
    for case in cases() {
        let others = json!({"another": promise(&case.holder)});
        for stored in [Some(ledger(&others)), None] {
            let gone = stored.is_none();
            let (server, ledger_path) = server(&case, stored);
            let operator = server.operator().await;
            let outcome = operator.applier.apply(std::slice::from_ref(&case.unguard)).await.unwrap();
            assert!(outcome.wrote);
            assert_eq!(server.reads(&ledger_path), 1, "the ledger is gone: {gone}");
            let [(method, path, body)] = server.writes().try_into().expect("one write");
            assert_eq!((method, path), (Method::PATCH, case.path.clone()));
            let metadata = &body["metadata"];
            assert_eq!(metadata["finalizers"], json!([FOREIGN_FINALIZER]), "the others stay");
            assert_eq!((&metadata["uid"], &metadata["resourceVersion"]), (&json!(case.uid), &json!("42")));
        }
    }
}

#[tokio::test]
async fn an_import_is_reported_on_only_at_the_version_that_the_decision_saw() {
    let import = json!({
        "apiVersion": "staging.berth.dev/v1alpha1", "kind": "TemplateImport",
        "metadata": {"name": "t", "namespace": "ns", "uid": "uid-t", "resourceVersion": "42", "generation": 1},
        "spec": {"source": {"http": {"url": "http://example.com/disk"}}, "store": {"name": "store"}},
    });
    let path = format!("{KINDS}/namespaces/ns/templateimports/t");
    let mut server = ApiServer::default();
    server.listed.insert("templateimports", vec![import.clone()]);
    server.stored.insert(path.clone(), import);
    let operator = server.operator().await;
    let report = |version: &str| Change::ReportTransfer {
        id: TransferId {
            kind: TransferKind::Import,
            name: ObjectName::new("ns", "t"),
            uid: Uid::from("uid-t"),
        },
        version: ObjectVersion(version.to_owned()),
        state: TransferState::Queued,
        reason: Reason::Progressing,
        message: "m".to_owned(),
        reserved: false,
    };
    let outcome = operator.applier.apply(&[report("41")]).await;
    assert!(matches!(outcome, Err(ApplyError::Conflict { .. })), "{outcome:?}");
    assert_eq!(server.writes(), []);

    assert!(operator.applier.apply(&[report("42")]).await.unwrap().wrote);
    let [(method, written, body)] = server.writes().try_into().expect("one write");
    assert_eq!((method, written), (Method::PATCH, format!("{path}/status")));
    assert_eq!(body["metadata"]["resourceVersion"], json!("42"), "the API server compares it, too");
    assert_eq!(body["status"]["state"], json!("Queued"));
}

fn transfer(status: &Value) -> Value {
    json!({
        "apiVersion": "staging.berth.dev/v1alpha1", "kind": "ImageTransfer",
        "metadata": {"name": "t", "namespace": "ns", "uid": "uid-t", "resourceVersion": "42", "generation": 1},
        "spec": {
            "source": {"storeImage": {"store": "s", "image": "i"}},
            "destination": {"storeImage": {"store": "s", "image": "copy"}},
        },
        "status": status,
    })
}

/// What one change asks of an API server that has this transfer.
async fn asked_for(
    status: &Value,
    change: impl FnOnce(TransferId, ObjectVersion) -> Change,
) -> (Method, String, Value) {
    let path = format!("{KINDS}/namespaces/ns/imagetransfers/t");
    let mut server = ApiServer::default();
    server.listed.insert("imagetransfers", vec![transfer(status)]);
    server.stored.insert(path.clone(), transfer(status));
    let operator = server.operator().await;
    let id = TransferId {
        kind: TransferKind::Transfer,
        name: ObjectName::new("ns", "t"),
        uid: Uid::from("uid-t"),
    };
    operator.applier.apply(&[change(id, ObjectVersion("42".to_owned()))]).await.unwrap();
    let [(method, written, body)] = server.writes().try_into().expect("one write");
    (method, written.strip_prefix(&path).expect("of the transfer").to_owned(), body)
}

#[tokio::test]
async fn how_a_transfer_ended_is_not_told_before_it_has_and_its_time_is_of_its_last_end() {
    let states = [
        (TransferState::Working, "Transferring", "Unknown"),
        (TransferState::Suspended, "Suspended", "Unknown"),
        (TransferState::Done, "Succeeded", "True"),
        (TransferState::Failed, "Failed", "False"),
    ];
    for (state, named, truth) in states {
        let (method, path, body) = asked_for(&json!({}), |id, version| Change::ReportTransfer {
            id,
            version,
            state,
            reason: Reason::Progressing,
            message: "m".to_owned(),
            reserved: true,
        })
        .await;
        assert_eq!((method, path.as_str()), (Method::PATCH, "/status"));
        assert_eq!(body["metadata"]["resourceVersion"], json!("42"));
        let told = &body["status"]["conditions"];
        assert_eq!((&body["status"]["state"], &told[0]["type"]), (&json!(named), &json!("Succeeded")));
        assert_eq!((&told[0]["status"], &told[1]["status"]), (&json!(truth), &json!("True")), "{named}");
    }
    let condition = |kind: &str| {
        json!({"type": kind, "status": "False", "reason": "SourceNotFound", "message": "m",
            "lastTransitionTime": "2026-01-01T00:00:00Z"})
    };
    let failed = json!({"state": "Failed", "conditions": [condition("Succeeded"), condition("Progressing")]});
    let (method, path, body) = asked_for(&failed, |id, version| Change::AssignTransfer {
        id,
        version,
        placement: Placement {
            pool: PoolName::from("p"),
            node: NodeName::from("n"),
            generation: Generation(2),
        },
        retried: Some("again".to_owned()),
    })
    .await;
    assert_eq!((method, path.as_str()), (Method::PUT, "/status"));
    let status = &body["status"];
    assert_eq!((&status["state"], &status["retried"]), (&json!("Pending"), &json!("again")));
    assert_eq!(status["conditions"], json!([condition("Progressing")]), "what its node says is its node's");
}

#[tokio::test]
async fn a_transfer_is_deleted_only_as_the_decision_saw_it() {
    let (method, path, body) =
        asked_for(&json!({}), |id, version| Change::DeleteTransfer { id, version }).await;
    assert_eq!((method, path.as_str()), (Method::DELETE, ""));
    assert_eq!(body["preconditions"], json!({"uid": "uid-t", "resourceVersion": "42"}));
}

#[tokio::test]
async fn a_volume_is_abandoned_only_if_the_api_server_itself_knows_nobody_who_asks_for_it() {
    let claim = |node: &str| {
        json!({"metadata": {
            "name": "db", "namespace": "shop", "uid": "claim",
            "annotations": {"volume.kubernetes.io/selected-node": node},
        }})
    };
    let volume = |handle: &str| {
        let csi = json!({"driver": "csi.berth.dev", "volumeHandle": handle});
        json!({"metadata": {"name": "pvc-claim"}, "spec": {"csi": csi}})
    };
    let cases = [
        ("the claim is there", Some(claim("n")), None, 0),
        ("it has selected another node", Some(claim("m")), None, 1),
        ("it is gone", None, None, 1),
        ("a PersistentVolume names it", None, Some(volume("v1-uid-r")), 0),
        ("a PersistentVolume names the one of another node", None, Some(volume("v1-other")), 1),
    ];
    for (case, claim, volume, deleted) in cases {
        let mut server = ApiServer::default();
        let mut made = reservation();
        made["metadata"]["deletionTimestamp"] = Value::Null;
        let path = format!("{KINDS}/namespaces/ns/stagingreservations/r");
        server.listed.insert("stagingreservations", vec![made.clone()]);
        server.stored.insert(path.clone(), made);
        let stored = [
            ("/api/v1/namespaces/shop/persistentvolumeclaims/db", claim),
            ("/api/v1/persistentvolumes/pvc-claim", volume),
        ];
        let stored = stored.into_iter().filter_map(|(path, object)| Some((path.to_owned(), object?)));
        server.stored.extend(stored);
        let operator = server.operator().await;
        let claim = Claim {
            name: ObjectName::new("shop", "db"),
            uid: Uid::from("claim"),
            volume: "pvc-claim".to_owned(),
            persistent: false,
        };
        let changes = [
            Change::ConfirmAbandoned { reservation: Uid::from("uid-r"), claim, node: NodeName::from("n") },
            Change::AbandonReservation {
                name: ObjectName::new("ns", "r"),
                uid: Uid::from("uid-r"),
                message: "m".to_owned(),
            },
        ];
        operator.applier.apply(&changes).await.unwrap();
        let writes = server.writes();
        assert_eq!(writes.len(), deleted, "{case}: {writes:?}");
        assert!(
            writes.iter().all(|(method, written, _)| *method == Method::DELETE && *written == path),
            "{case}"
        );
    }
}

#[tokio::test]
async fn an_object_that_cannot_be_read_is_told_by_an_event_with_its_field() {
    let mut bad = reservation();
    bad["spec"]["access"] = json!("Sideways");
    let mut server = ApiServer::default();
    server.listed.insert("stagingreservations", vec![bad]);
    let operator = server.operator().await;
    operator.observer.set_leader(true);
    operator.observer.view(|view| assert!(view.leader && !view.sweeps(), "sweeps rest"));
    let begun = std::time::Instant::now();
    while server.notes().is_empty() && begun.elapsed() < std::time::Duration::from_secs(10) {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let note = server.notes().pop().unwrap_or_default();
    let told = "StagingReservation ns/r cannot be read: spec.access: unknown variant `Sideways`";
    assert!(note.starts_with(told), "{note}");
}
