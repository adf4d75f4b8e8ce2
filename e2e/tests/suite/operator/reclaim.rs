//! Images that nothing refers to, pools that are emptied, and nodes that are gone.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_api::StagingPool;
use berth_api::conditions::{ConditionType, find};
use berth_api::staging_pool::ReclaimReason;
use berth_api::staging_reservation::ReservationState;
use berth_e2e::wait::{self, Look};
use k8s_openapi::api::core::v1::Node;
use kube::api::{DeleteParams, PostParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use super::bed::{Bed, GIB, MOMENT};
use crate::scenario::{Need, Scenario};

/// How long it takes at most until a node is known to be gone: its Lease, and as long again after the operator's start.
const GONE: Duration = Duration::from_secs(150);

pub fn scenarios(needs: &[Need]) -> Vec<Scenario> {
    vec![
        Scenario::new(
            "operator::a51_reclaims_before_a_request_waits",
            needs,
            reclaims_before_a_request_waits,
        ),
        Scenario::new("operator::a28_reclaims_above_the_watermark", needs, reclaims_above_the_watermark),
        Scenario::new("operator::a_drain_names_what_it_waits_for", needs, a_drain_names_what_it_waits_for),
        Scenario::new(
            "operator::a_deleted_pool_waits_for_its_holders",
            needs,
            a_deleted_pool_waits_for_its_holders,
        ),
        Scenario::new("operator::a_node_that_is_gone_is_retained_or_released", needs, a_node_that_is_gone),
    ]
}

fn last(pool: &StagingPool) -> Option<(i32, i64, ReclaimReason)> {
    let last = pool.status.as_ref()?.last_reclaim.as_ref()?;
    Some((last.images, last.bytes, last.reason))
}

fn ready(pool: &StagingPool) -> (String, String) {
    let conditions = pool.status.clone().unwrap_or_default().conditions;
    let ready = find(&conditions, ConditionType::Ready);
    ready.map(|ready| (ready.reason.clone(), ready.message.clone())).unwrap_or_default()
}

/// A request that would be refused gets the room of an image that nothing refers to, and one that would not help stays.
async fn reclaims_before_a_request_waits() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.change_pool(json!({"reclaim": {"highWatermark": 100, "lowWatermark": 100}})).await?;
    bed.start_operator("one")?;
    let _node = bed.node("n1", 10 * GIB).await?;
    bed.wait_lease("one").await?;
    bed.idle_image("old", 4 * GIB).await?;
    ensure!(bed.images().await?.len() == 1, "no idle image");
    bed.reserve("wants", 8 * GIB, "Reject").await?;
    bed.wait_state("wants", ReservationState::Ready).await?;
    let images = bed.images().await?;
    ensure!(images.is_empty(), "the image stayed: {images:?}");
    let told = Some((1, 4 * GIB, ReclaimReason::Shortfall));
    bed.wait_pool("lastReclaim", MOMENT, |pool| {
        if last(pool) == told { Ok(()) } else { Err(format!("{:?}", last(pool))) }
    })
    .await?;
    ensure!(bed.metric("one", "berth_reclaims_total").await? == 1, "reclaims are not counted");
    bed.reserve("more", 3 * GIB, "Reject").await?;
    bed.wait_state("more", ReservationState::Refused).await?;
    bed.no_denials()
}

/// Above the high watermark idle images go down to the low one; the one in use and the only copy stay.
async fn reclaims_above_the_watermark() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.change_pool(json!({"reclaim": {"highWatermark": 100, "lowWatermark": 0}})).await?;
    bed.start_operator("one")?;
    let _node = bed.node("n1", 20 * GIB).await?;
    bed.wait_lease("one").await?;
    bed.idle_image("idle", 3 * GIB).await?;
    bed.template("used", 3 * GIB).await?;
    bed.clone_of("used", "user", 3 * GIB).await?;
    bed.wait_state("user", ReservationState::Ready).await?;
    bed.change_pool(json!({"reclaim": {"highWatermark": 40, "lowWatermark": 10}})).await?;
    let told = Some((1, 3 * GIB, ReclaimReason::HighWatermark));
    bed.wait_pool("the idle one to go", MOMENT, |pool| {
        if last(pool) == told { Ok(()) } else { Err(format!("{:?}", last(pool))) }
    })
    .await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let images = bed.images().await?;
    ensure!(images.len() == 1 && images[0].metadata.deletion_timestamp.is_none(), "{images:?}");
    ensure!(bed.state("user").await? == Some(ReservationState::Ready), "the user lost its place");
    bed.no_denials()
}

/// A pool that is drained loses its idle images at once, takes nothing new, and says who still holds something.
async fn a_drain_names_what_it_waits_for() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let _node = bed.node("n1", 20 * GIB).await?;
    bed.wait_lease("one").await?;
    bed.idle_image("idle", GIB).await?;
    bed.reserve("held", GIB, "Queue").await?;
    bed.wait_state("held", ReservationState::Ready).await?;
    bed.change_pool(json!({"service": "Draining"})).await?;
    let told =
        ("Draining".to_owned(), "takes nothing new; held by reservation default/held on node n1".to_owned());
    bed.wait_pool("the holder to be named", MOMENT, |pool| {
        if ready(pool) == told { Ok(()) } else { Err(format!("{:?}", ready(pool))) }
    })
    .await?;
    ensure!(bed.images().await?.is_empty(), "an idle image stayed");
    bed.reservations().delete("held", &DeleteParams::default()).await?;
    bed.wait_pool("nothing to be held", MOMENT, |pool| {
        if ready(pool).1.ends_with("holds nothing") { Ok(()) } else { Err(format!("{:?}", ready(pool))) }
    })
    .await?;
    bed.no_denials()
}

/// A deleted pool stays until its last promise is given back; then its ledgers go, and then the pool.
async fn a_deleted_pool_waits_for_its_holders() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let node = bed.node("n1", 20 * GIB).await?;
    bed.wait_lease("one").await?;
    bed.reserve("held", GIB, "Queue").await?;
    bed.wait_state("held", ReservationState::Ready).await?;
    let pools: Api<StagingPool> = Api::all(bed.cluster.admin());
    pools.delete("p", &DeleteParams::default()).await?;
    bed.wait_pool("the holder to be named", MOMENT, |pool| {
        let (reason, message) = ready(pool);
        let named = reason == "Releasing" && message.contains("held by reservation default/held on node n1");
        if named { Ok(()) } else { Err(message) }
    })
    .await?;
    node.set_releases(false);
    bed.reservations().delete("held", &DeleteParams::default()).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    ensure!(pools.get_opt("p").await?.is_some(), "the pool went before its node gave anything back");
    ensure!(bed.ledger("n1").await?.is_some(), "the ledger went before its node gave anything back");
    node.set_releases(true);
    wait::until("the pool to be gone", MOMENT, || async {
        match pools.get_opt("p").await {
            Ok(None) => Look::Done(()),
            Ok(Some(pool)) => Look::NotYet(format!("{:?}", ready(&pool))),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    ensure!(bed.ledger("n1").await?.is_none(), "a ledger outlived its pool");
    bed.no_denials()
}

/// A silent node keeps everything; with `Release`, one that Kubernetes does not have any more keeps only volumes. When it comes
/// back, its ledger is rebuilt, and what was given up is asked back.
async fn a_node_that_is_gone() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.change_pool(json!({"nodeLossPolicy": "Release"})).await?;
    let nodes: Api<Node> = Api::all(bed.cluster.admin());
    let kube_node = serde_json::from_value(json!({"metadata": {"name": "n1"}}))?;
    nodes.create(&PostParams::default(), &kube_node).await?;
    bed.start_operator("one")?;
    let node = bed.node("n1", 20 * GIB).await?;
    bed.wait_lease("one").await?;
    bed.template("t", GIB).await?;
    bed.reserve("work", GIB, "Queue").await?;
    bed.clone_of("t", "volume", GIB).await?;
    bed.wait_state("work", ReservationState::Ready).await?;
    let volume = bed.wait_state("volume", ReservationState::Ready).await?.uid().context("uid")?;
    node.set_reachable(false);
    bed.wait_pool("the node to be lost", GONE, |pool| {
        if ready(pool).0 == "NodeLost" { Ok(()) } else { Err(format!("{:?}", ready(pool))) }
    })
    .await?;
    ensure!(bed.state("work").await? == Some(ReservationState::Ready), "a partition is no loss");
    nodes.delete("n1", &DeleteParams::default()).await?;
    let waited = wait::until("the work space to be given up", GONE, || async {
        match bed.reservations().get_opt("work").await {
            Ok(None) => Look::Done(()),
            Ok(Some(found)) => Look::NotYet(format!("{:?}", found.status)),
            Err(error) => Look::Failed(error),
        }
    });
    waited.await?;
    ensure!(bed.state("volume").await? == Some(ReservationState::Ready), "a volume was given up");
    let ledger = bed.ledger("n1").await?.context("no ledger")?;
    let kept = |uid: &String| ledger.spec.promises.contains_key(uid);
    ensure!(ledger.spec.promises.len() == 2 && kept(&volume), "{:?}", ledger.spec.promises);
    // The volume names its image, so that is in use and stays, too.
    ensure!(bed.images().await?.len() == 1, "the image of a volume was given up");

    nodes.create(&PostParams::default(), &kube_node).await?;
    node.use_client(bed.node_client("n1").await?);
    node.set_reachable(true);
    bed.wait_ledger("the ledger to be rebuilt", "n1", MOMENT * 2, |ledger| {
        ledger.is_some_and(|ledger| ledger.spec.rebuilt_from.is_some() && ledger.spec.promises.len() == 3)
    })
    .await?;
    bed.reserve("next", GIB, "Queue").await?;
    bed.wait_state("next", ReservationState::Ready).await?;
    if let Some(fault) = node.fault().await {
        return Err(fault);
    }
    bed.no_denials()
}
