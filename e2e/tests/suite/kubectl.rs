//! `kubectl berth` against a real API server with a running operator: what it says is what happens, and what it writes
//! has its effect.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, ensure};
use berth_api::StagingPool;
use berth_api::defaults::ANNOTATION_RENEWED;
use berth_api::staging_pool::Service;
use berth_api::staging_reservation::ReservationState;
use berth_e2e::ours::{KUBECTL, OPERATOR};
use kube::api::DeleteParams;
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};

use crate::operator::bed::{Bed, GIB};
use crate::scenario::{CONTROL_PLANE, Need, Scenario};

pub fn scenarios() -> Vec<Scenario> {
    let needs = [CONTROL_PLANE, &[Need::Program(OPERATOR), Need::Program(KUBECTL)]].concat();
    vec![
        Scenario::new("kubectl::fit_and_explain_say_what_the_operator_does", &needs, fit_and_explain),
        Scenario::new("kubectl::renew_puts_the_end_off", &needs, renew_puts_the_end_off),
        Scenario::new("kubectl::drain_names_holders_and_waits_for_them", &needs, drain_names_holders),
        Scenario::new("kubectl::doctor_finds_a_node_that_is_silent", &needs, doctor_finds_a_silent_node),
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
    tokio::time::sleep(std::time::Duration::from_secs(45)).await;
    let told = plugin.json(1, &["doctor"]).await?;
    ensure!(broken(&told) == ["\"node\" \"node n1\""], "{told}");
    Ok(())
}
