//! `kubectl berth` against a real API server with a running operator: what it says is what happens, and what it writes
//! has its effect.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_api::defaults::ANNOTATION_RENEWED;
use berth_api::image_transfer::TransferState;
use berth_api::staging_ledger::LedgerPromise;
use berth_api::staging_pool::Service;
use berth_api::staging_reservation::ReservationState;
use berth_api::{StagingLedger, StagingPool};
use berth_e2e::ours::{KUBECTL, OPERATOR};
use kube::api::{DeleteParams, PostParams};
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};

use crate::operator::bed::{Bed, GIB, MOMENT};
use crate::operator::transfers::Moving;
use crate::scenario::{CONTROL_PLANE, Need, Scenario};

pub fn scenarios() -> Vec<Scenario> {
    let needs = [CONTROL_PLANE, &[Need::Program(OPERATOR), Need::Program(KUBECTL)]].concat();
    vec![
        Scenario::new("kubectl::fit_and_explain_say_what_the_operator_does", &needs, fit_and_explain),
        Scenario::new("kubectl::a41_space_is_reserved_and_released", &needs, reserve_and_release),
        Scenario::new("kubectl::b23_a_transfer_is_followed_pauses_and_goes_on", &needs, transfer),
        Scenario::new("kubectl::renew_puts_the_end_off", &needs, renew_puts_the_end_off),
        Scenario::new("kubectl::drain_names_holders_and_waits_for_them", &needs, drain_names_holders),
        Scenario::new("kubectl::doctor_finds_a_node_that_is_silent", &needs, doctor_finds_a_silent_node),
        Scenario::new("kubectl::check_names_what_does_not_agree", &needs, check_names_what_does_not_agree),
        Scenario::new("kubectl::status_shows_pools_promises_and_the_queue", &needs, status_shows_the_queue),
    ]
}

/// The plugin, as the administrator runs it.
struct Plugin {
    program: PathBuf,
    kubeconfig: PathBuf,
}

/// How a command ended.
struct Ended {
    code: i32,
    out: String,
    err: String,
}

impl Plugin {
    async fn of(bed: &Bed) -> anyhow::Result<Self> {
        let program = tokio::task::spawn_blocking(|| KUBECTL.obtain()).await??;
        Ok(Self { program, kubeconfig: bed.cluster.admin_kubeconfig() })
    }

    async fn run(&self, words: &[&str]) -> anyhow::Result<Ended> {
        let mut command = Command::new(&self.program);
        command.args(words).arg("--kubeconfig").arg(&self.kubeconfig);
        let output = tokio::task::spawn_blocking(move || command.output()).await??;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let code = output.status.code().context("killed by a signal")?;
        Ok(Ended { code, out: text(&output.stdout), err: text(&output.stderr) })
    }

    /// With this code, and JSON.
    async fn json(&self, code: i32, words: &[&str]) -> anyhow::Result<Value> {
        let ended = self.run(&[words, &["-o", "json"]].concat()).await?;
        ensure!(ended.code == code, "{words:?} ended with {}: {}{}", ended.code, ended.out, ended.err);
        serde_json::from_str(&ended.out).with_context(|| format!("{words:?} printed {:?}", ended.out))
    }

    /// With code 2, and a message that says this.
    async fn refused(&self, words: &[&str], says: &str) -> anyhow::Result<()> {
        let ended = self.run(words).await?;
        ensure!(ended.code == 2 && ended.err.contains(says), "{words:?}: {} {:?}", ended.code, ended.err);
        Ok(())
    }
}

async fn fit_and_explain() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let _node = bed.node("n1", 10 * GIB).await?;
    bed.reserve("first", 6 * GIB, "Queue").await?;
    bed.wait_state("first", ReservationState::Ready).await?;
    let plugin = Plugin::of(&bed).await?;

    let fits = plugin.json(0, &["fit", "--size", "4Gi", "--pool", "p"]).await?;
    ensure!(fits["result"] == "Fits" && fits["pool"] == "p" && fits["node"] == "n1", "{fits}");
    let waits = plugin.json(1, &["fit", "--size", "6Gi"]).await?;
    ensure!(waits["shortfallBytes"] == 2 * GIB && waits["position"] == 1, "{waits}");
    let refused = plugin.json(2, &["fit", "--size", "11Gi"]).await?;
    ensure!(refused["reason"] == "LargerThanPool", "{refused}");
    let ledger = bed.ledger("n1").await?.context("no ledger")?;
    ensure!(ledger.spec.promises.len() == 1, "asking has promised something: {:?}", ledger.spec.promises);

    bed.reserve("fits", 4 * GIB, "Queue").await?;
    bed.wait_state("fits", ReservationState::Ready).await?;
    bed.reserve("waits", 6 * GIB, "Queue").await?;
    bed.wait_state("waits", ReservationState::Queued).await?;
    bed.reserve("refused", 11 * GIB, "Queue").await?;
    bed.wait_state("refused", ReservationState::Refused).await?;

    let told = plugin.json(0, &["explain", "waits", "-n", "default"]).await?;
    ensure!(told["queue"]["position"] == 1 && told["candidates"][0]["shortfallBytes"] == 6 * GIB, "{told}");
    ensure!(told["next"].as_str().is_some_and(|next| next.contains("6 GiB must be given back")), "{told}");
    let told = plugin.json(0, &["explain", "first", "-n", "default"]).await?;
    ensure!(told["promises"][0]["dataBytes"] == 6 * GIB && told["promises"][0]["obeyed"] == true, "{told}");
    ensure!(told["next"] == "Nothing: it is ready on node n1.", "{told}");
    plugin.refused(&["explain", "none", "-n", "default"], "there is no StagingReservation none").await
}

async fn reserve_and_release() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let _node = bed.node("n1", 10 * GIB).await?;
    let plugin = Plugin::of(&bed).await?;
    let reserve = async |code: i32, name: &str, size: &str, more: &[&str]| {
        let words = ["reserve", name, "--size", size, "--pool", "p", "-n", "default", "--wait"];
        plugin.json(code, &[&words, more].concat()).await
    };
    let ready = reserve(0, "room", "6Gi", &[]).await?;
    ensure!(ready["progress"]["state"] == "Ready" && ready["progress"]["node"] == "n1", "{ready}");
    let waits = reserve(1, "more", "6Gi", &["--at-most", "3"]).await?;
    ensure!(waits["progress"]["state"] == "Queued" && waits["progress"]["queue"][0] == 1, "{waits}");
    let refused = reserve(2, "huge", "11Gi", &[]).await?;
    ensure!(refused["progress"]["reason"] == "LargerThanPool", "{refused}");
    let refused = reserve(2, "now", "6Gi", &["--when-full", "Reject"]).await?;
    ensure!(refused["progress"]["state"] == "Refused", "{refused}");
    let words = ["reserve", "odd", "--size", "6 GB", "-n", "default"];
    plugin.refused(&words, "spec.maxSize").await?;
    let words = ["reserve", "room", "--size", "1Gi", "-n", "default"];
    plugin.refused(&words, "already exists").await?;

    let released = plugin.json(0, &["release", "room", "-n", "default", "--wait"]).await?;
    ensure!(released["gone"] == true, "{released}");
    bed.wait_state("more", ReservationState::Ready).await?;
    let ledger = bed.ledger("n1").await?.context("no ledger")?;
    ensure!(ledger.spec.promises.len() == 1, "{:?}", ledger.spec.promises);
    plugin.refused(&["release", "room", "-n", "default"], "there is no StagingReservation room").await
}

async fn transfer() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let _node = bed.node("n1", 10 * GIB).await?;
    let plugin = Plugin::of(&bed).await?;
    let moving = Moving::ask(bed, "n1", json!({})).await?;
    moving.wait_state(TransferState::Probing, "Probing").await?;
    moving.plan(GIB).await?;
    moving.wait_state(TransferState::Transferring, "Progressing").await?;
    let say = async |code: i32, verb: &str, more: &[&str]| {
        plugin.json(code, &[&["transfer", verb, "t", "-n", "default"], more].concat()).await
    };
    let soon = ["--at-most", "1"];

    say(0, "suspend", &[]).await?;
    moving.wait_state(TransferState::Suspended, "Suspended").await?;
    let pauses = say(1, "wait", &soon).await?;
    ensure!(pauses["now"]["state"] == "Suspended", "{pauses}");
    say(0, "resume", &[]).await?;
    moving.wait_state(TransferState::Transferring, "Progressing").await?;

    let stage = json!({"index": 1, "total": 2, "name": "Fetch"});
    let progress = json!({"percent": 45, "bytesDone": GIB / 2, "bytesTotal": GIB, "rate": 1 << 20});
    moving.tell_beside_plan(GIB, json!({"stage": stage, "progress": progress})).await?;
    let moves = say(1, "wait", &soon).await?;
    ensure!(moves["now"]["percent"] == 45 && moves["now"]["stage"] == "1/2 Fetch", "{moves}");
    let result = json!({"result": {"size": GIB, "virtualSize": GIB, "etag": "e"}});
    let ((), ended) = tokio::try_join!(moving.tell(result), say(0, "wait", &[]))?;
    ensure!(ended["now"]["end"] == "Succeeded", "{ended}");
    plugin.refused(&["transfer", "suspend", "t", "-n", "default"], "has ended").await?;
    let none = ["transfer", "wait", "none", "-n", "default"];
    plugin.refused(&none, "there is no ImageTransfer none").await
}

async fn renew_puts_the_end_off() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let _node = bed.node("n1", 10 * GIB).await?;
    bed.reserve("kept", 6 * GIB, "Queue").await?;
    bed.wait_state("kept", ReservationState::Ready).await?;
    bed.reserve("waits", 6 * GIB, "Queue").await?;
    bed.wait_state("waits", ReservationState::Queued).await?;
    let plugin = Plugin::of(&bed).await?;

    let renewed = plugin.json(0, &["renew", "kept", "-n", "default"]).await?;
    let kept = bed.reservations().get("kept").await?;
    let written = kept.annotations().get(ANNOTATION_RENEWED).context("no annotation")?;
    ensure!(renewed["renewedAt"] == written.as_str(), "{renewed}, and {written}");
    ensure!(
        berth_api::parse::reservation_view(&kept).renewed.is_some(),
        "the operator cannot read {written}"
    );
    plugin.refused(&["renew", "waits", "-n", "default"], "maxQueueTime").await?;
    plugin.refused(&["renew", "none", "-n", "default"], "there is no StagingReservation none").await
}

async fn drain_names_holders() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let _node = bed.node("n1", 10 * GIB).await?;
    bed.reserve("held", 6 * GIB, "Queue").await?;
    bed.wait_state("held", ReservationState::Ready).await?;
    let plugin = Plugin::of(&bed).await?;
    let pools = Api::<StagingPool>::all(bed.cluster.admin());

    ensure!(plugin.run(&["cordon", "p"]).await?.code == 0, "cordon");
    ensure!(pools.get("p").await?.spec.service == Some(Service::Cordoned), "it is not cordoned");
    let waits = plugin.json(1, &["fit", "--size", "1Gi"]).await?;
    ensure!(waits["reason"] == "Cordoned", "{waits}");
    ensure!(plugin.run(&["uncordon", "p"]).await?.code == 0, "uncordon");
    plugin.json(0, &["fit", "--size", "1Gi"]).await?;

    plugin.refused(&["drain", "p", "--node", "n9"], "node n9 does not carry pool p").await?;
    plugin.refused(&["drain", "q"], "there is no StagingPool q").await?;
    let drained = plugin.json(0, &["drain", "p", "--node", "n1"]).await?;
    ensure!(drained["holders"][0]["name"] == "default/held" && drained["drained"] == false, "{drained}");
    ensure!(pools.get("p").await?.spec.drain_nodes == ["n1"], "it is not drained on the node");
    plugin.json(0, &["drain", "p", "--node", "n1", "--undo"]).await?;
    ensure!(pools.get("p").await?.spec.drain_nodes.is_empty(), "it is still drained on the node");

    let late = plugin.json(1, &["drain", "p", "--wait", "--at-most", "3"]).await?;
    ensure!(late["left"] == json!({"volumes": 0, "others": 1, "bytes": 6 * GIB}), "{late}");
    bed.reservations().delete("held", &DeleteParams::default()).await?;
    let done = plugin.json(0, &["drain", "p", "--wait", "--at-most", "40"]).await?;
    ensure!(done["drained"] == true && done["holders"] == json!([]), "{done}");
    ensure!(pools.get("p").await?.spec.service == Some(Service::Draining), "it is not drained");
    Ok(())
}

async fn doctor_finds_a_silent_node() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let node = bed.node("n1", 10 * GIB).await?;
    bed.reserve("any", GIB, "Queue").await?;
    bed.wait_state("any", ReservationState::Ready).await?;
    let plugin = Plugin::of(&bed).await?;
    let broken = |told: &Value| -> Vec<String> {
        let findings = told["findings"].as_array().into_iter().flatten();
        let failed = findings.filter(|finding| finding["level"] == "fail");
        failed.map(|finding| format!("{} {}", finding["check"], finding["object"])).collect()
    };
    let sound = plugin.json(0, &["doctor"]).await?;
    ensure!(sound["ok"] == true && broken(&sound).is_empty(), "{sound}");

    ensure!(node.fault().await.is_none(), "the node ended with an error");
    tokio::time::sleep(Duration::from_secs(45)).await;
    let told = plugin.json(1, &["doctor"]).await?;
    ensure!(broken(&told) == ["\"node\" \"node n1\""], "{told}");
    Ok(())
}

/// Everything agrees, until somebody writes into a ledger by hand while no operator is there to take it back: each of it is named
/// with its object, and by the exit code. Once it is taken back, everything agrees again.
async fn check_names_what_does_not_agree() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let _nodes = [bed.node("n1", 10 * GIB).await?, bed.node("n2", 10 * GIB).await?];
    bed.reserve("held", 6 * GIB, "Queue").await?;
    let held = bed.wait_state("held", ReservationState::Ready).await?;
    let uid = held.uid().context("uid")?;
    let place = held.status.unwrap_or_default().assignment.context("no assignment")?;
    let (here, there) = if place.node == "n1" { ("n1", "n2") } else { ("n2", "n1") };
    bed.wait_ledger("both ledgers", there, MOMENT, |ledger| ledger.is_some()).await?;
    let plugin = Plugin::of(&bed).await?;
    let looked = agrees(&plugin).await?;
    ensure!(looked["pools"] == 1 && looked["nodes"] == 2 && looked["reservations"] == 1, "{looked}");
    bed.kill_operator("one")?;
    let ledger = bed.ledger(here).await?.context("no ledger")?;
    let promise = ledger.spec.promises.get(&uid).context("no promise")?;
    let (mine, other) = (ledger.name_any(), bed.ledger(there).await?.context("no ledger")?.name_any());

    write_promise(&bed, there, "nobody", Some(promise)).await?;
    disagrees(&plugin, "Orphan", &format!("StagingLedger {other} holder nobody")).await?;
    let ended = plugin.run(&["check"]).await?;
    let says = format!("ledger {other} has a promise of nobody, which does not exist");
    ensure!(ended.code == 1 && ended.out.contains(&says), "{} {}", ended.code, ended.out);
    write_promise(&bed, there, "nobody", None).await?;

    write_promise(&bed, there, &uid, Some(promise)).await?;
    let message = disagrees(&plugin, "TwoPromises", &format!("holder {uid}")).await?;
    ensure!(message.contains(&mine) && message.contains(&other), "{message}");
    write_promise(&bed, there, &uid, None).await?;

    let larger = LedgerPromise { data_bytes: 11 * GIB, ..promise.clone() };
    write_promise(&bed, here, &uid, Some(&larger)).await?;
    let message = disagrees(&plugin, "OverCapacity", &format!("StagingLedger {mine}")).await?;
    ensure!(message.contains("1 GiB"), "{message}");
    write_promise(&bed, here, &uid, None).await?;
    let told = plugin.json(1, &["check"]).await?;
    let unpromised = format!("StagingReservation default/held generation {}", place.generation);
    ensure!(found(&told).any(|(what, of, _)| (what, of) == ("Unpromised", &unpromised)), "{told}");
    write_promise(&bed, here, &uid, Some(promise)).await?;
    agrees(&plugin).await.map(drop)
}

/// Nothing is found; in how many objects.
async fn agrees(plugin: &Plugin) -> anyhow::Result<Value> {
    let told = plugin.json(0, &["check"]).await?;
    ensure!(told["findings"] == json!([]), "{told}");
    Ok(told["looked"].clone())
}

/// This alone is found, of this object; what is said of it.
async fn disagrees(plugin: &Plugin, finding: &str, object: &str) -> anyhow::Result<String> {
    let told = plugin.json(1, &["check"]).await?;
    let mut all = found(&told);
    match (all.next(), all.next()) {
        (Some((what, of, message)), None) if (what, of) == (finding, object) => Ok(message.to_owned()),
        _ => anyhow::bail!("{finding} of {object} is not what was found: {told}"),
    }
}

/// What was found, of what, and what is said of it.
fn found(told: &Value) -> impl Iterator<Item = (&str, &str, &str)> {
    let findings = told["findings"].as_array().into_iter().flatten();
    findings.map(|one| {
        let text = |key| one[key].as_str().unwrap_or_default();
        (text("finding"), text("object"), text("message"))
    })
}

/// Writes a promise to a ledger, or takes it out, as no operator would.
async fn write_promise(
    bed: &Bed,
    node: &str,
    uid: &str,
    promise: Option<&LedgerPromise>,
) -> anyhow::Result<()> {
    let mut ledger = bed.ledger(node).await?.context("no ledger")?;
    match promise {
        Some(promise) => ledger.spec.promises.insert(uid.to_owned(), promise.clone()),
        None => ledger.spec.promises.remove(uid),
    };
    ledger.spec.revision += 1;
    let ledgers: Api<StagingLedger> = Api::all(bed.cluster.admin());
    ledgers.replace(&ledger.name_any(), &PostParams::default(), &ledger).await?;
    Ok(())
}

/// One table has the pool, its node, what is promised of it, who waits, in which order and for what; of one namespace where asked.
async fn status_shows_the_queue() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let _node = bed.node("n1", 10 * GIB).await?;
    bed.reserve("held", 6 * GIB, "Queue").await?;
    bed.wait_state("held", ReservationState::Ready).await?;
    for (position, name) in ["next", "last"].into_iter().enumerate() {
        bed.reserve(name, 5 * GIB, "Queue").await?;
        let there = |place: i32| usize::try_from(place).is_ok_and(|place| place == position + 1);
        bed.wait_for("default", name, "to have its place in the queue", |seen| {
            let status = seen.and_then(|seen| seen.status.clone()).unwrap_or_default();
            status.queue.is_some_and(|queue| there(queue.position))
        })
        .await?;
        // Their order of arrival is told by whole seconds.
        tokio::time::sleep(Duration::from_millis(1100)).await;
    }
    bed.wait_pool("the pool to be ready", MOMENT, |pool| {
        let total = pool.status.clone().unwrap_or_default().capacity.total;
        if total == 10 * GIB { Ok(()) } else { Err(format!("{:?}", pool.status)) }
    })
    .await?;
    let plugin = Plugin::of(&bed).await?;

    let told = plugin.json(0, &["status"]).await?;
    let row = |kind: &str, name: &str| -> anyhow::Result<&Value> {
        let mut rows = told.as_array().into_iter().flatten();
        rows.find(|row| row["kind"] == kind && row["name"] == name).with_context(|| format!("{name}: {told}"))
    };
    for (kind, name, wanted) in [
        ("pool", "p", json!({"state": "Ready", "size": 10 * GIB, "promised": 6 * GIB})),
        ("node", "n1", json!({"state": "Live", "pool": "p", "size": 10 * GIB, "promised": 6 * GIB})),
        ("reservation", "default/held", json!({"state": "Ready", "node": "n1", "promised": 6 * GIB})),
        ("reservation", "default/next", json!({"state": "Queued", "progress": "next in queue"})),
        ("reservation", "default/last", json!({"state": "Queued", "progress": "no. 2 in queue"})),
    ] {
        let row = row(kind, name)?;
        for (key, value) in wanted.as_object().context("an object")? {
            ensure!(row[key] == *value, "{key} of {kind} {name}: {row}");
        }
    }
    let next = row("reservation", "default/next")?;
    ensure!(next["reason"] == "InsufficientCapacity" && next.get("promised").is_none(), "{next}");

    let table = plugin.run(&["status"]).await?;
    let line = |name: &str| table.out.lines().find(|line| line.contains(name)).map(str::to_owned);
    let (pool, next) = (line("pool "), line("default/next").context("no row")?);
    ensure!(table.code == 0 && pool.is_some_and(|pool| pool.contains("6 GiB")), "{}", table.out);
    ensure!(next.contains("next in queue") && next.contains("InsufficientCapacity"), "{}", table.out);
    let elsewhere = plugin.json(0, &["status", "-n", "elsewhere"]).await?;
    let kinds = elsewhere.as_array().into_iter().flatten().map(|row| row["kind"].as_str());
    ensure!(kinds.flatten().eq(["pool", "node"]), "{elsewhere}");
    bed.no_denials()
}
