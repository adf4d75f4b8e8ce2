//! Who is admitted, in which order, within which limits, and for how long.

use anyhow::{Context as _, ensure};
use berth_api::StagingReservation;
use berth_api::conditions::{ConditionType, find};
use berth_api::staging_reservation::{ReservationState, StagingReservationStatus};
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use super::bed::{Bed, GIB};

type Seen<'s> = Option<&'s StagingReservation>;

fn status(seen: Seen<'_>) -> StagingReservationStatus {
    seen.and_then(|seen| seen.status.clone()).unwrap_or_default()
}

fn is(state: ReservationState) -> impl Fn(Seen<'_>) -> bool {
    move |seen| status(seen).state == Some(state)
}

/// Who holds all of the node's space, and gives it back one by one.
const HOLDERS: [&str; 5] = ["h1", "h2", "h3", "h4", "h5"];

async fn namespace(bed: &Bed, name: &str, labels: serde_json::Value) -> anyhow::Result<()> {
    let api: Api<Namespace> = Api::all(bed.cluster.admin());
    let object = serde_json::from_value(json!({"metadata": {"name": name, "labels": labels}}))?;
    api.create(&PostParams::default(), &object).await?;
    Ok(())
}

/// Three of one namespace wait, then one of another, then one of higher priority: they are served in turns, by what each namespace
/// holds already.
pub(super) async fn orders() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let _node = bed.node("n1", 10 * GIB).await?;
    namespace(&bed, "greedy", json!({})).await?;
    namespace(&bed, "modest", json!({})).await?;
    for holder in HOLDERS {
        bed.reserve(holder, 2 * GIB, "Queue").await?;
        bed.wait_state(holder, ReservationState::Ready).await?;
    }
    let line = [
        ("greedy", "g1", 0),
        ("greedy", "g2", 0),
        ("greedy", "g3", 0),
        ("modest", "m1", 0),
        ("modest", "urgent", 9),
    ];
    for (tenant, name, priority) in line {
        bed.ask(tenant, name, json!({"maxSize": 2 * GIB, "priority": priority})).await?;
        bed.wait_for(tenant, name, "to wait", is(ReservationState::Queued)).await?;
        // Their order of arrival is told by whole seconds.
        tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    }
    let wanted =
        [("modest", "urgent"), ("greedy", "g1"), ("greedy", "g2"), ("modest", "m1"), ("greedy", "g3")];
    for (at, (tenant, name)) in wanted.into_iter().enumerate() {
        let position = i32::try_from(at)? + 1;
        let there = move |seen: Seen<'_>| status(seen).queue.is_some_and(|place| place.position == position);
        let seen = bed.wait_for(tenant, name, &format!("at position {position}"), there).await?;
        let told = status(seen.as_ref()).candidates;
        ensure!(told.len() == 1 && told[0].node == "n1" && !told[0].chosen, "{told:?}");
        ensure!(told[0].shortfall_bytes == Some(2 * GIB), "{told:?}");
    }
    for ((tenant, name), holder) in wanted.into_iter().zip(HOLDERS) {
        bed.reservations().delete(holder, &DeleteParams::default()).await?;
        let seen = bed.wait_for(tenant, name, "to be ready", is(ReservationState::Ready)).await?;
        let told = status(seen.as_ref());
        ensure!(told.candidates.len() == 1 && told.candidates[0].chosen, "{told:?}");
        ensure!(told.queue.is_none() && told.shortfall_bytes.is_none(), "{told:?}");
    }
    ensure!(bed.metric("one", "berth_admissions_total").await? == 10, "admissions");
    bed.no_denials()
}

/// A namespace whose labels a limit is about waits or is refused with numbers; others are not held up by it.
pub(super) async fn limits() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    let pool = "apiVersion: staging.berth.dev/v1alpha1\nkind: StagingPool\nmetadata: {name: p}\n\
                spec: {backend: {filesystem: {path: /staging, size: 10Gi}}, admission: {tenantLimits: \
                [{namespaceLabels: {tier: small}, maxBytes: 3Gi}]}}\n";
    bed.cluster.apply_yaml(pool).await?;
    namespace(&bed, "small", json!({"tier": "small"})).await?;
    bed.start_operator("one")?;
    let _nodes = [bed.node("n1", 10 * GIB).await?, bed.node("n2", 10 * GIB).await?];
    bed.wait_lease("one").await?;
    for name in ["a", "b"] {
        bed.ask("small", name, json!({"maxSize": 2 * GIB})).await?;
    }
    bed.ask("small", "reject", json!({"maxSize": 4 * GIB, "whenFull": "Reject"})).await?;
    let refused = bed.wait_for("small", "reject", "to be refused", is(ReservationState::Refused)).await?;
    ensure!(status(refused.as_ref()).shortfall_bytes >= Some(GIB), "{refused:?}");
    let one_of = |name: &'static str| {
        bed.wait_for("small", name, "decided", |seen| {
            matches!(status(seen).state, Some(ReservationState::Ready | ReservationState::Queued))
        })
    };
    let (a, b) = (one_of("a").await?, one_of("b").await?);
    let (first, second) = match status(a.as_ref()).state {
        Some(ReservationState::Queued) => ("b", a),
        _ => ("a", b),
    };
    bed.wait_for("small", first, "to be ready", is(ReservationState::Ready)).await?;
    let waits = second.context("there")?;
    let told = status(Some(&waits));
    let promised = find(&told.conditions, ConditionType::Promised).context("no condition Promised")?;
    ensure!(promised.reason == "TenantLimit" && told.shortfall_bytes == Some(GIB), "{told:?}");
    ensure!(promised.message.contains("allows namespace small 3 GiB in all: 2 GiB are held"), "{promised:?}");
    bed.reserve("other", 8 * GIB, "Queue").await?;
    bed.wait_state("other", ReservationState::Ready).await?;
    let api: Api<StagingReservation> = Api::namespaced(bed.cluster.admin(), "small");
    api.delete(first, &DeleteParams::default()).await?;
    bed.wait_for("small", &waits.name_any(), "to be ready", is(ReservationState::Ready)).await?;
    bed.no_denials()
}

/// What nothing uses ends after its time, unless it is renewed; what is used stays, also across a killed operator.
pub(super) async fn ends() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let node = bed.node("n1", 10 * GIB).await?;
    bed.wait_lease("one").await?;
    for name in ["idle", "used", "renewed"] {
        bed.ask("default", name, json!({"maxSize": GIB, "ttl": "8s"})).await?;
    }
    let used = bed.wait_state("used", ReservationState::Ready).await?.uid().context("uid")?;
    node.set_in_use(&used, true);
    let ends = |seen: Seen<'_>| status(seen).expires_at.is_some();
    bed.wait_for("default", "idle", "to say when it ends", ends).await?;
    let first = bed.wait_for("default", "renewed", "to say when it ends", ends).await?;
    let first = status(first.as_ref()).expires_at;
    let stays = |seen: Seen<'_>| seen.is_some() && status(seen).expires_at.is_none();
    bed.wait_for("default", "used", "not to end while it is used", stays).await?;
    bed.kill_operator("one")?;
    bed.start_operator("one")?;
    for _ in 0..3 {
        tokio::time::sleep(std::time::Duration::from_secs(3)).await;
        let now = jiff::Timestamp::now();
        let renewal = json!({"metadata": {"annotations": {"staging.berth.dev/renewed-at": now.to_string()}}});
        bed.reservations().patch("renewed", &PatchParams::default(), &Patch::Merge(renewal)).await?;
    }
    bed.wait_gone("idle").await?;
    let later = |seen: Seen<'_>| status(seen).expires_at > first;
    bed.wait_for("default", "renewed", "to end later", later).await?;
    ensure!(bed.reservations().get_opt("used").await?.is_some(), "it ended while it was used");
    ensure!(bed.metric("one", "berth_expiries_total").await? >= 1, "expiries");
    bed.wait_gone("renewed").await?;
    node.set_in_use(&used, false);
    bed.wait_gone("used").await?;
    let ledger = bed.ledger("n1").await?.context("no ledger")?;
    ensure!(ledger.spec.promises.is_empty(), "{:?}", ledger.spec.promises);
    bed.no_denials()
}

/// A request that is only tried is answered, again when the answer changes, and nothing is ever promised to it.
pub(super) async fn dry_run() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let _node = bed.node("n1", 10 * GIB).await?;
    bed.ask("default", "tried", json!({"maxSize": 6 * GIB, "dryRun": true})).await?;
    let fits = |seen: Seen<'_>| status(seen).dry_run.is_some_and(|answer| answer.fits);
    let seen = bed.wait_for("default", "tried", "to fit", fits).await?;
    let told = status(seen.as_ref());
    let promised = find(&told.conditions, ConditionType::Promised).context("no condition Promised")?;
    ensure!(promised.status == "False" && promised.reason == "DryRun", "{promised:?}");
    let answer = told.dry_run.context("answered")?;
    ensure!(answer.node.as_deref() == Some("n1") && answer.peak_bytes == 6 * GIB, "{answer:?}");
    bed.reserve("real", 6 * GIB, "Queue").await?;
    bed.wait_state("real", ReservationState::Ready).await?;
    let short = |seen: Seen<'_>| {
        status(seen).dry_run.is_some_and(|answer| !answer.fits && answer.shortfall_bytes == Some(2 * GIB))
    };
    bed.wait_for("default", "tried", "to fit no more", short).await?;
    let ledger = bed.ledger("n1").await?.context("no ledger")?;
    ensure!(ledger.spec.promises.len() == 1, "{:?}", ledger.spec.promises);
    bed.reservations().delete("tried", &DeleteParams::default()).await?;
    bed.wait_gone("tried").await?;
    bed.no_denials()
}
