use serde_json::json;

use super::Total::{Leaked, LostAcknowledged, Other, RecordMismatch};
use super::*;
use crate::crash::step::Step;

const POOL: &str = "0f3c9a1e-5b7d-4c2a-9e10-00a1b2c3d4e5";
const VOLUME: &str = "11111111-0000-4000-8000-000000000001";
const TEMPLATE: &str = "22222222-0000-4000-8000-000000000002";

fn model() -> Model {
    let mut model = Model::default();
    for step in [
        Step::PoolCreate(POOL.into()),
        Step::TemplateAttach(TEMPLATE.into()),
        Step::Create { volume: VOLUME.into(), size: 8 << 20, template: Some(TEMPLATE.into()) },
        Step::Attach { volume: VOLUME.into(), read_only: false },
        Step::PoolGrow(Class::Volumes, 16 << 20),
    ] {
        model.apply(&step);
    }
    model
}

/// What is there when all is well.
fn text(record: &Value) -> String {
    format!(
        "== info
disk||Active
i|BERTH-pool-images-{POOL}|Active
v|BERTH-pool-volumes-{POOL}|Active
one|BERTH-thin-volumes-{POOL}-{VOLUME}|Active
== table
i: 0 8192 thin-pool 254:4 254:5 128 0 0
v: 0 32768 thin-pool 254:6 254:7 128 0 0
one: 0 16384 thin 254:8 3 43:0
== lvs
  berth-0f3c9a1e-record|16777216|berth
  berth-0f3c9a1e-images-data|4194304|berth
  berth-0f3c9a1e-images-metadata|4194304|berth
  berth-0f3c9a1e-volumes-data|16777216|berth
  berth-0f3c9a1e-volumes-metadata|4194304|berth
== dump images
<superblock transaction=\"0\">
== dump volumes
<superblock uuid=\"\" transaction=\"2\">
  <device dev_id=\"3\" mapped_blocks=\"2\" transaction=\"1\">
== record
{record}
== nbd
nbd0|BERTH-{TEMPLATE}
"
    )
}

fn record() -> Value {
    json!({"tables": {
        "volumes": {VOLUME: {"state": "Ready", "kind": "Volume", "size": 8 << 20, "origin": TEMPLATE}},
        "thin": {VOLUME: {"class": "Volumes", "id": 3, "size": 8 << 20, "state": "Made"}},
        "thin_counters": {"volumes": {"transaction": 2, "last_id": 3}},
        "templates": {TEMPLATE: {"state": "Attached"}},
        "attachments": {VOLUME: {"mode": "Device"}},
        "promises": {VOLUME: {"released": false}},
    }})
}

fn failures(model: &Model, text: &str) -> Vec<Total> {
    judge(model, &Found::read(text)).into_iter().map(|failure| failure.total).collect()
}

#[test]
fn where_all_is_there_nothing_fails() {
    assert_eq!(judge(&model(), &Found::read(&text(&record()))), []);
}

#[test]
fn each_kind_of_damage_is_noticed() {
    let good = text(&record());
    let with = |old: &str, new: &str| {
        let bad = good.replacen(old, new, 1);
        assert_ne!(bad, good, "`{old}` is in the text");
        failures(&model(), &bad)
    };
    assert_eq!(with("one|BERTH", "one|X"), [LostAcknowledged]);
    assert_eq!(
        with("-volumes-0f3c9a1e-5b7d-4c2a-9e10-00a1b2c3d4e5|Active", "-volumes-0f|Suspended"),
        [Other]
    );
    assert_eq!(with("transaction=\"2\"", "transaction=\"3\""), [RecordMismatch]);
    assert_eq!(with("v: 0 32768", "v: 0 16384"), [RecordMismatch]);
    assert_eq!(with("one: 0 16384", "one: 0 8192"), [LostAcknowledged]);
    assert_eq!(with("dev_id=\"3\"", "dev_id=\"4\""), [RecordMismatch, Leaked]);
    assert_eq!(with("  <device", "  <device dev_id=\"9\">\n  <device"), [Leaked]);
    assert_eq!(with("thin 254:8 3", "thin 254:8 4"), [RecordMismatch]);
    assert_eq!(with("\"Device\"", "\"Device\"}, \"x\": {\"y\": 0"), [Leaked]);
    assert_eq!(with("\"attachments\"", "\"others\""), [LostAcknowledged]);
    assert_eq!(with("\"Made\"", "\"Removing\""), [RecordMismatch]);
    assert_eq!(with("\"Ready\"", "\"Creating\""), [LostAcknowledged]);
    assert_eq!(with("\"Volume\"", "\"Snapshot\""), [LostAcknowledged]);
    assert_eq!(with("nbd0|BERTH-2", "nbd0|BERTH-3"), [LostAcknowledged, Leaked]);
    assert_eq!(with("  berth-0f3c9a1e-record", "  x|4|berth\n  berth-0f3c9a1e-record"), [Leaked]);
    assert_eq!(
        with("  berth-0f3c9a1e-volumes-data|16777216|berth\n", ""),
        [LostAcknowledged; 3][..2].to_vec().into_iter().chain([RecordMismatch]).collect::<Vec<_>>()
    );
}

#[test]
fn what_nobody_has_is_a_leak_and_what_is_gone_must_be_gone() {
    let mut model = model();
    model.apply(&Step::Destroy(VOLUME.into()));
    let found = failures(&model, &text(&record()));
    assert_eq!(found, [LostAcknowledged, Leaked, Leaked, Leaked, Leaked]);
    model.gone.clear();
    assert!(failures(&model, &text(&record())).contains(&Leaked));
    let none = Model::default();
    assert!(failures(&none, &text(&record())).iter().all(|total| *total == Leaked));
    assert_eq!(failures(&none, "== info\ndisk||Active\n== lvs\n"), []);
}
