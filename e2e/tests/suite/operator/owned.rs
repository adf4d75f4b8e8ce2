//! Reservations that belong to something else, and end with it.
//!
//! No garbage collector runs here: [`collect`] does what it does, by the owner references that the API server has.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use berth_api::staging_reservation::ReservationState;
use berth_e2e::wait::{self, Look};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DeleteParams, ListParams, PostParams, Preconditions};
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};

use super::bed::{Bed, GIB};

/// How long an image stays that nothing refers to, from when it was last used: here, made.
const WARM: Duration = Duration::from_secs(45);
/// How long after that it may take until it is gone.
const SWEEP: Duration = Duration::from_secs(90);

/// A `ConfigMap` that stands for a piece of work.
async fn owner(bed: &Bed, name: &str) -> anyhow::Result<Value> {
    let maps: Api<ConfigMap> = Api::namespaced(bed.cluster.admin(), "default");
    let map: ConfigMap = serde_json::from_value(json!({"metadata": {"name": name}}))?;
    let uid = maps.create(&PostParams::default(), &map).await?.uid().context("uid")?;
    Ok(json!({"apiVersion": "v1", "kind": "ConfigMap", "name": name, "uid": uid}))
}

/// Asks for 4 GiB, of a template or as work space, for these owners.
async fn ask(bed: &Bed, name: &str, template: Option<&str>, owners: &[&Value]) -> anyhow::Result<()> {
    let mut spec = json!({"poolName": "p", "maxSize": 4 * GIB});
    if let Some(template) = template {
        spec["access"] = json!("Block");
        spec["image"] = json!({"template": {"namespace": "default", "name": template}});
    }
    let reservation = json!({
        "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation",
        "metadata": {"name": name, "ownerReferences": owners}, "spec": spec,
    });
    bed.reservations().create(&PostParams::default(), &serde_json::from_value(reservation)?).await?;
    Ok(())
}

/// One pass of the garbage collector over what belongs to `ConfigMaps`: what has owners, none of which exists any more, is deleted
/// with that UID. Says what it deleted.
async fn collect(bed: &Bed) -> anyhow::Result<Vec<String>> {
    let maps: Api<ConfigMap> = Api::namespaced(bed.cluster.admin(), "default");
    let alive: BTreeSet<_> = maps.list(&ListParams::default()).await?.iter().map(ConfigMap::uid).collect();
    let mut deleted = Vec::new();
    for found in bed.reservations().list(&ListParams::default()).await? {
        let owners = found.owner_references();
        let orphaned = !owners.is_empty() && owners.iter().all(|o| !alive.contains(&Some(o.uid.clone())));
        if orphaned && found.metadata.deletion_timestamp.is_none() {
            let only = Preconditions { uid: found.uid(), resource_version: found.resource_version() };
            let background = DeleteParams { preconditions: Some(only), ..DeleteParams::background() };
            bed.reservations().delete(&found.name_any(), &background).await?;
            deleted.push(found.name_any());
        }
    }
    Ok(deleted)
}

async fn end(bed: &Bed, owner: &str) -> anyhow::Result<()> {
    let maps: Api<ConfigMap> = Api::namespaced(bed.cluster.admin(), "default");
    maps.delete(owner, &DeleteParams::default()).await?;
    Ok(())
}

/// The deletion of an owner releases what belonged to it alone, once its node has given it back; the image stays while another
/// reservation refers to it, and for its time after that; then it goes.
pub(super) async fn released() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    let warm = format!("{}s", WARM.as_secs());
    bed.change_pool(json!({"reclaim": {"highWatermark": 100, "lowWatermark": 100, "ttl": warm}})).await?;
    bed.start_operator("one")?;
    let node = bed.node("n1", 12 * GIB).await?;
    bed.wait_lease("one").await?;
    bed.template("t", 4 * GIB).await?;
    let (job, other) = (owner(&bed, "job").await?, owner(&bed, "other").await?);
    ask(&bed, "alone", Some("t"), &[&job]).await?;
    let made = Instant::now();
    let alone = bed.wait_state("alone", ReservationState::Ready).await?.uid().context("uid")?;
    ask(&bed, "shared", Some("t"), &[&job, &other]).await?;
    bed.wait_state("shared", ReservationState::Ready).await?;
    ensure!(bed.images().await?.len() == 1 && bed.check_sum("n1").await? == 12 * GIB, "both of one image");
    ask(&bed, "waits", None, &[&other]).await?;
    bed.wait_state("waits", ReservationState::Queued).await?;
    ensure!(collect(&bed).await?.is_empty(), "something was collected while its owner is there");

    node.set_releases(false);
    end(&bed, "job").await?;
    ensure!(collect(&bed).await? == ["alone"], "the wrong ones were collected");
    bed.wait_state("alone", ReservationState::Releasing).await?;
    super::promise_stays(&bed, &alone).await?;
    ensure!(bed.state("waits").await? == Some(ReservationState::Queued), "admitted into what is not free");
    node.set_releases(true);
    bed.wait_gone("alone").await?;
    bed.wait_state("waits", ReservationState::Ready).await?;
    ensure!(bed.state("shared").await? == Some(ReservationState::Ready), "it went with one of its owners");
    ensure!(bed.images().await?.len() == 1, "the image went while something refers to it");

    // While nobody decides anything, and seen by the operator only when it starts.
    bed.kill_operator("one")?;
    end(&bed, "other").await?;
    ensure!(collect(&bed).await? == ["shared", "waits"], "the wrong ones were collected");
    bed.start_operator("one")?;
    bed.wait_gone("shared").await?;
    bed.wait_gone("waits").await?;
    ensure!(made.elapsed() < WARM, "too slow a machine for what this shows: {:?}", made.elapsed());
    ensure!(bed.images().await?.len() == 1, "the image went before its time");
    image_goes(&bed).await?;
    let age = made.elapsed();
    // Its time of creation is told by whole seconds.
    ensure!(age + Duration::from_secs(1) >= WARM, "the image went {age:?} after it was made");
    bed.wait_ledger("nothing to be promised", "n1", SWEEP, |ledger| {
        ledger.is_some_and(|ledger| ledger.spec.promises.is_empty())
    })
    .await?;
    bed.no_denials()
}

/// Waits until no image is left.
async fn image_goes(bed: &Bed) -> anyhow::Result<()> {
    wait::until("the image to go", WARM + SWEEP, || async {
        match Api::<berth_api::StagedImage>::all(bed.cluster.admin()).list(&ListParams::default()).await {
            Ok(list) if list.items.is_empty() => Look::Done(()),
            Ok(list) => Look::NotYet(format!("{:?}", list.items)),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    Ok(())
}
