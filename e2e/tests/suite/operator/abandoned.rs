//! Volumes that nobody will ask for again, and ledgers without a pool.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_api::StagingPool;
use berth_api::defaults::{
    ANNOTATION_PERSISTENT_VOLUME, ANNOTATION_VOLUME_NAME, DRIVER, LABEL_CLAIM_NAME, LABEL_CLAIM_NAMESPACE,
};
use berth_api::{StagingReservation, staging_reservation::ReservationState};
use berth_e2e::cluster::SYSTEM_NAMESPACE;
use berth_e2e::wait::{self, Look};
use k8s_openapi::api::core::v1::{Namespace, PersistentVolume, PersistentVolumeClaim};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};

use super::bed::{Bed, CLAIM_GRACE, GIB};
use super::state_of;
use crate::scenario::{Need, Scenario};

/// How long the operator may take to look at what has not changed.
const LOOK: Duration = Duration::from_secs(90);

pub fn scenarios(needs: &[Need]) -> Vec<Scenario> {
    vec![
        Scenario::new("operator::sweeps_volumes_that_nobody_will_ask_for", needs, sweeps_volumes),
        Scenario::new(
            "operator::a_retained_volume_outlives_its_namespace_until_it_is_deleted",
            needs,
            retained_volume_outlives_its_namespace,
        )
        .limited(Duration::from_mins(6)),
        Scenario::new("operator::ends_the_ledgers_of_a_pool_that_was_removed_by_force", needs, ends_ledgers),
    ]
}

/// Claims of a namespace, and the volumes that were asked for them on node `n1`.
struct Claims<'b> {
    bed: &'b Bed,
    namespace: &'static str,
}

impl Claims<'_> {
    fn claims(&self) -> Api<PersistentVolumeClaim> {
        Api::namespaced(self.bed.cluster.admin(), self.namespace)
    }

    fn volumes(&self) -> Api<StagingReservation> {
        Api::namespaced(self.bed.cluster.admin(), SYSTEM_NAMESPACE)
    }

    /// A claim that has selected `n1`, and its volume, ready.
    async fn volume(&self, name: &str) -> anyhow::Result<StagingReservation> {
        let claim: PersistentVolumeClaim = serde_json::from_value(json!({
            "metadata": {"name": name},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
        }))?;
        let claim = self.claims().create(&PostParams::default(), &claim).await?;
        self.select(name, "n1").await?;
        let volume = json!({
            "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation",
            "metadata": {
                "name": format!("volume-{name}"),
                "labels": {LABEL_CLAIM_NAMESPACE: self.namespace, LABEL_CLAIM_NAME: name},
                "annotations": {ANNOTATION_VOLUME_NAME: format!("pvc-{}", claim.uid().context("uid")?)},
            },
            "spec": {"poolName": "p", "maxSize": GIB, "access": "Block", "nodeName": "n1"},
        });
        let made = self.volumes().create(&PostParams::default(), &serde_json::from_value(volume)?).await?;
        let what = format!("volume-{name}");
        let ready =
            |found: Option<&StagingReservation>| found.and_then(state_of) == Some(ReservationState::Ready);
        self.bed.wait_for(SYSTEM_NAMESPACE, &what, "ready", ready).await?;
        Ok(made)
    }

    async fn select(&self, name: &str, node: &str) -> anyhow::Result<()> {
        let selected = json!({"metadata": {"annotations": {"volume.kubernetes.io/selected-node": node}}});
        self.claims().patch(name, &PatchParams::default(), &Patch::Merge(selected)).await?;
        Ok(())
    }

    /// Deletes a claim, which no pod uses, as the API server and the controller that protects claims do.
    async fn delete(&self, name: &str) -> anyhow::Result<()> {
        self.claims().delete(name, &DeleteParams::default()).await?;
        let unprotect = json!({"metadata": {"finalizers": Value::Null}});
        self.claims().patch(name, &PatchParams::default(), &Patch::Merge(unprotect)).await.ok();
        Ok(())
    }

    async fn wait_swept(&self, name: &str) -> anyhow::Result<()> {
        let name = format!("volume-{name}");
        wait::until(&format!("{name} to be swept"), LOOK, || async {
            match self.volumes().get_opt(&name).await {
                Ok(None) => Look::Done(()),
                Ok(Some(found)) => Look::NotYet(format!("{:?}", found.status)),
                Err(error) => Look::Failed(error),
            }
        })
        .await?;
        Ok(())
    }
}

/// A `PersistentVolume` of a volume, whose bytes stay when it goes.
fn persistent(name: &str, volume: &StagingReservation) -> anyhow::Result<PersistentVolume> {
    Ok(serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "csi": {"driver": DRIVER, "volumeHandle": format!("v1-{}", volume.uid().context("uid")?)},
        },
    }))?)
}

/// The volume of a claim that is gone goes, and that of one that has selected another node; what a `PersistentVolume` names,
/// what is in use, and what a claim still waits for stays.
async fn sweeps_volumes() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let node = bed.node("n1", 10 * GIB).await?;
    bed.wait_lease("one").await?;
    let claims = Claims { bed: &bed, namespace: "default" };
    for name in ["stays", "gone", "moved"] {
        claims.volume(name).await?;
    }
    let (named, used) = (claims.volume("named").await?, claims.volume("used").await?);
    let volumes: Api<PersistentVolume> = Api::all(bed.cluster.admin());
    volumes.create(&PostParams::default(), &persistent("made-by-hand", &named)?).await?;
    node.set_in_use(&used.uid().context("uid")?, true);
    tokio::time::sleep(CLAIM_GRACE).await;
    for name in ["gone", "named", "used"] {
        claims.delete(name).await?;
    }
    claims.select("moved", "n2").await?;
    claims.wait_swept("gone").await?;
    claims.wait_swept("moved").await?;
    for name in ["stays", "named", "used"] {
        let found = claims.volumes().get(&format!("volume-{name}")).await?;
        ensure!(found.metadata.deletion_timestamp.is_none(), "{name} was swept");
    }
    ensure!(bed.metric("one", "berth_abandoned_total").await? == 2, "they are not counted");
    bed.no_denials()
}

/// A namespace ends with two claims in it. The volume of one, which a `PersistentVolume` names whose bytes are to stay, stays: while
/// that is there, after it was deleted, and under another one of the same handle; it goes when it is deleted itself, as
/// `DeleteVolume` does. That of the other, which has none, is swept as ever. The controllers that end a namespace are played.
async fn retained_volume_outlives_its_namespace() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let _node = bed.node("n1", 10 * GIB).await?;
    bed.wait_lease("one").await?;
    bed.cluster.ensure_namespace("team").await?;
    let (team, others) =
        (Claims { bed: &bed, namespace: "team" }, Claims { bed: &bed, namespace: "default" });
    let kept = team.volume("kept").await?;
    team.volume("unbound").await?;
    let volumes: Api<PersistentVolume> = Api::all(bed.cluster.admin());
    volumes.create(&PostParams::default(), &persistent("pv", &kept)?).await?;
    end_namespace(&team, &["kept", "unbound"]).await?;
    team.wait_swept("unbound").await?;
    stays(&team, &kept, "with its namespace").await?;

    // The administrator takes the object away, to make it again for somebody else.
    let is_noted = |found: Option<&StagingReservation>| {
        found.is_some_and(|found| found.annotations().contains_key(ANNOTATION_PERSISTENT_VOLUME))
    };
    bed.wait_for(SYSTEM_NAMESPACE, "volume-kept", "noted as persistent", is_noted).await?;
    let unprotect = json!({"metadata": {"finalizers": Value::Null}});
    volumes.delete("pv", &DeleteParams::default()).await?;
    volumes.patch("pv", &PatchParams::default(), &Patch::Merge(unprotect)).await.ok();
    others.volume("witness").await?;
    others.delete("witness").await?;
    others.wait_swept("witness").await?;
    stays(&team, &kept, "with its PersistentVolume").await?;
    volumes.create(&PostParams::default(), &persistent("again", &kept)?).await?;

    team.volumes().delete("volume-kept", &DeleteParams::default()).await?;
    team.wait_swept("kept").await?;
    let ledger = bed.ledger("n1").await?.context("no ledger")?;
    ensure!(ledger.spec.promises.is_empty(), "{:?}", ledger.spec.promises);
    bed.no_denials()
}

/// Deletes a namespace with these claims in it, down to the last object.
async fn end_namespace(team: &Claims<'_>, claims: &[&str]) -> anyhow::Result<()> {
    let namespaces: Api<Namespace> = Api::all(team.bed.cluster.admin());
    namespaces.delete(team.namespace, &DeleteParams::default()).await?;
    tokio::time::sleep(CLAIM_GRACE).await;
    for name in claims {
        team.delete(name).await?;
    }
    let mut ended = namespaces.get(team.namespace).await?;
    ensure!(ended.metadata.deletion_timestamp.is_some(), "the namespace is not being deleted");
    ended.spec.get_or_insert_default().finalizers = None;
    namespaces.replace_subresource("finalize", team.namespace, &PostParams::default(), &ended).await?;
    ensure!(namespaces.get_opt(team.namespace).await?.is_none(), "the namespace is still there");
    Ok(())
}

/// The volume is there, ready, and promised.
async fn stays(team: &Claims<'_>, volume: &StagingReservation, without: &str) -> anyhow::Result<()> {
    let found = team.volumes().get(&volume.name_any()).await?;
    let there = found.uid() == volume.uid() && found.metadata.deletion_timestamp.is_none();
    ensure!(there && state_of(&found) == Some(ReservationState::Ready), "it went {without}: {found:?}");
    let ledger = team.bed.ledger("n1").await?.context("no ledger")?;
    let uid = volume.uid().unwrap_or_default();
    ensure!(ledger.spec.promises.keys().eq([&uid]), "{without}: {:?}", ledger.spec.promises);
    Ok(())
}

/// A pool that somebody took the finalizer from leaves no ledger behind once nothing is promised in it.
async fn ends_ledgers() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let _node = bed.node("n1", 10 * GIB).await?;
    bed.wait_lease("one").await?;
    bed.reserve("held", GIB, "Queue").await?;
    bed.wait_state("held", ReservationState::Ready).await?;
    let pools: Api<StagingPool> = Api::all(bed.cluster.admin());
    pools.delete("p", &DeleteParams::default()).await?;
    let forced = json!({"metadata": {"finalizers": Value::Null}});
    pools.patch("p", &PatchParams::default(), &Patch::Merge(forced)).await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    ensure!(bed.ledger("n1").await?.is_some(), "the ledger went with a promise in it");
    bed.reservations().delete("held", &DeleteParams::default()).await?;
    bed.wait_gone("held").await?;
    bed.wait_ledger("the ledger to go", "n1", LOOK, |ledger| ledger.is_none()).await?;
    bed.no_denials()
}
