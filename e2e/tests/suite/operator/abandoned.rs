//! Volumes that nobody will ask for again, and ledgers without a pool.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_api::StagingPool;
use berth_api::defaults::{ANNOTATION_VOLUME_NAME, DRIVER, LABEL_CLAIM_NAME, LABEL_CLAIM_NAMESPACE};
use berth_api::{StagingReservation, staging_reservation::ReservationState};
use berth_e2e::cluster::SYSTEM_NAMESPACE;
use berth_e2e::wait::{self, Look};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
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
        Scenario::new("operator::ends_the_ledgers_of_a_pool_that_was_removed_by_force", needs, ends_ledgers),
    ]
}

/// Claims, and the volumes that were asked for them on node `n1`.
struct Claims<'b> {
    bed: &'b Bed,
}

impl Claims<'_> {
    fn claims(&self) -> Api<PersistentVolumeClaim> {
        Api::namespaced(self.bed.cluster.admin(), "default")
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
                "labels": {LABEL_CLAIM_NAMESPACE: "default", LABEL_CLAIM_NAME: name},
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

/// The volume of a claim that is gone goes, and that of one that has selected another node; what a `PersistentVolume` names,
/// what is in use, and what a claim still waits for stays.
async fn sweeps_volumes() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let node = bed.node("n1", 10 * GIB).await?;
    bed.wait_lease("one").await?;
    let claims = Claims { bed: &bed };
    for name in ["stays", "gone", "moved"] {
        claims.volume(name).await?;
    }
    let (named, used) = (claims.volume("named").await?, claims.volume("used").await?);
    let volume = json!({
        "metadata": {"name": "made-by-hand"},
        "spec": {
            "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"],
            "csi": {"driver": DRIVER, "volumeHandle": format!("v1-{}", named.uid().context("uid")?)},
        },
    });
    let volumes: Api<PersistentVolume> = Api::all(bed.cluster.admin());
    volumes.create(&PostParams::default(), &serde_json::from_value::<PersistentVolume>(volume)?).await?;
    node.set_in_use(&used.uid().context("uid")?, true);
    tokio::time::sleep(CLAIM_GRACE).await;
    for name in ["gone", "named", "used"] {
        claims.claims().delete(name, &DeleteParams::default()).await?;
        let unprotect = json!({"metadata": {"finalizers": Value::Null}});
        claims.claims().patch(name, &PatchParams::default(), &Patch::Merge(unprotect)).await.ok();
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
