//! Transfers as the operator decides about them; the node's side of each is written by the scenario, with a node's rights.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_api::conditions::{ConditionType, find};
use berth_api::defaults::{ANNOTATION_RETRY, TRANSFER_FINALIZER};
use berth_api::fields::Assignment;
use berth_api::image_transfer::{ImageTransferStatus, TransferState};
use berth_api::staging_reservation::{Access, ReservationState};
use berth_api::{ImageTransfer, StagingReservation};
use berth_e2e::wait::{self, Look};
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};

use super::bed::{Bed, GIB, MOMENT};
use super::state_of;
use crate::scenario::{Need, Scenario};

/// A node that is silent is lost after this long at most, and what it held is somewhere else.
const LOST: Duration = Duration::from_secs(120);

pub(super) fn scenarios(operator: &[Need]) -> Vec<Scenario> {
    vec![
        Scenario::new("operator::b23_a_transfer_pauses_and_goes_on", operator, pauses_and_goes_on),
        Scenario::new("operator::a63_a_transfer_ends_at_its_deadline", operator, ends_at_its_deadline),
        Scenario::new("operator::a_refused_transfer_is_tried_again", operator, is_refused_and_tried_again),
        Scenario::new(
            "operator::what_needs_no_space_leaves_a_lost_node",
            operator,
            leaves_a_lost_node_if_it_needs_no_space,
        ),
    ]
}

/// A bed with one transfer, and the client of its node.
pub struct Moving {
    pub bed: Bed,
    node: Client,
}

impl Moving {
    /// Asks for the transfer `t` of a file to an object, with these fields beside.
    pub async fn ask(bed: Bed, node: &str, more: Value) -> anyhow::Result<Self> {
        let mut spec = json!({
            "source": {"http": {"url": "http://127.0.0.1:9/disk.raw"}},
            "destination": {"s3": {"endpoint": "http://127.0.0.1:9", "bucket": "disks", "key": "disk.raw"}},
            "format": {"destination": "Raw"},
        });
        for (field, value) in more.as_object().context("not an object")? {
            spec[field] = value.clone();
        }
        let node = bed.node_client(node).await?;
        let moving = Self { bed, node };
        let transfer = ImageTransfer::new("t", serde_json::from_value(spec)?);
        moving.api().create(&PostParams::default(), &transfer).await?;
        Ok(moving)
    }

    fn api(&self) -> Api<ImageTransfer> {
        Api::namespaced(self.bed.cluster.admin(), "default")
    }

    async fn change(&self, patch: Value) -> anyhow::Result<()> {
        self.api().patch("t", &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(())
    }

    async fn change_spec(&self, spec: Value) -> anyhow::Result<()> {
        self.change(json!({"spec": spec})).await
    }

    async fn retry(&self, value: &str) -> anyhow::Result<()> {
        self.change(json!({"metadata": {"annotations": {ANNOTATION_RETRY: value}}})).await
    }

    /// What the node says.
    pub async fn tell(&self, status: Value) -> anyhow::Result<()> {
        let api: Api<ImageTransfer> = Api::namespaced(self.node.clone(), "default");
        let body = json!({
            "apiVersion": "staging.berth.dev/v1alpha1", "kind": "ImageTransfer", "metadata": {"name": "t"}, "status": status,
        });
        api.patch_status("t", &PatchParams::apply("berth-node/n1").force(), &Patch::Apply(body)).await?;
        Ok(())
    }

    pub async fn plan(&self, peak: i64) -> anyhow::Result<()> {
        self.tell_beside_plan(peak, json!({})).await
    }

    /// A plan, and these fields.
    pub async fn tell_beside_plan(&self, peak: i64, mut status: Value) -> anyhow::Result<()> {
        status["plan"] = json!({
            "format": "Raw", "sourceBytes": GIB, "virtualSize": GIB, "peakBytes": peak, "steps": ["Fetch", "Upload"], "why": "a test",
        });
        self.tell(status).await
    }

    /// Waits until its status is as wanted.
    async fn wait(
        &self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&ImageTransferStatus) -> bool,
    ) -> anyhow::Result<ImageTransferStatus> {
        let api = self.api();
        let waited = wait::until(what, limit, || async {
            match api.get("t").await.map(|found| found.status.unwrap_or_default()) {
                Ok(status) if wanted(&status) => Look::Done(status),
                Ok(status) => Look::NotYet(format!("{status:?}")),
                Err(error) => Look::Failed(error),
            }
        });
        waited.await.with_context(|| self.bed.logs())
    }

    /// Waits for a state, with the reason that its condition `Succeeded` has then.
    pub async fn wait_state(
        &self,
        state: TransferState,
        reason: &str,
    ) -> anyhow::Result<ImageTransferStatus> {
        let said = |status: &ImageTransferStatus| {
            find(&status.conditions, ConditionType::Succeeded).is_some_and(|told| told.reason == reason)
        };
        let what = format!("the transfer to be {state:?}, {reason}");
        self.wait(&what, MOMENT, |status| status.state == Some(state) && said(status)).await
    }

    /// The reservations that it owns.
    async fn owned(&self) -> anyhow::Result<Vec<StagingReservation>> {
        let uid = self.api().get("t").await?.uid().context("uid")?;
        let mut all = self.bed.reservations().list(&ListParams::default()).await?.items;
        all.retain(|found| found.owner_references().iter().any(|owner| owner.uid == uid));
        Ok(all)
    }

    /// The name of the only one.
    async fn reservation(&self) -> anyhow::Result<String> {
        let owned = self.owned().await?;
        ensure!(owned.len() == 1, "{owned:?}");
        Ok(owned[0].name_any())
    }
}

fn succeeded(status: &ImageTransferStatus) -> Option<&str> {
    find(&status.conditions, ConditionType::Succeeded).map(|told| told.status.as_str())
}

fn place(status: &ImageTransferStatus) -> anyhow::Result<Assignment> {
    status.assignment.clone().context("no assignment")
}

/// From a start that waits for a person to an object that is deleted some time after its end.
async fn pauses_and_goes_on() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let _node = bed.node("n1", 10 * GIB).await?;
    let moving = Moving::ask(bed, "n1", json!({"suspend": true})).await?;
    let status = moving.wait_state(TransferState::Suspended, "Suspended").await?;
    ensure!(status.assignment.is_none(), "it was placed while it pauses: {status:?}");

    moving.change_spec(json!({"suspend": false})).await?;
    let status = moving.wait_state(TransferState::Probing, "Probing").await?;
    ensure!(succeeded(&status) == Some("Unknown"), "{status:?}");
    let finalizers = moving.api().get("t").await?.finalizers().to_vec();
    ensure!(finalizers == [TRANSFER_FINALIZER], "{finalizers:?}");

    moving.plan(GIB).await?;
    let status = moving.wait_state(TransferState::Transferring, "Progressing").await?;
    let before = place(&status)?;
    let own = moving.reservation().await?;
    let reservation = moving.bed.reservations().get(&own).await?;
    let owner = reservation.owner_references().first().context("no owner")?.clone();
    ensure!((owner.kind.as_str(), owner.controller) == ("ImageTransfer", Some(true)), "{owner:?}");

    moving.change_spec(json!({"suspend": true})).await?;
    let status = moving.wait_state(TransferState::Suspended, "Suspended").await?;
    ensure!(place(&status)? == before, "{status:?}");
    let reserved = find(&status.conditions, ConditionType::Reserved).context("no condition Reserved")?;
    ensure!(reserved.status == "True", "{reserved:?}");
    // Longer than any decision takes: nothing else is made of it.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let held = moving.bed.reservations().get(&own).await?;
    ensure!(state_of(&held) == Some(ReservationState::Ready), "{:?}", held.status);
    ensure!(held.metadata.deletion_timestamp.is_none(), "its space is given back");

    moving.change_spec(json!({"suspend": false})).await?;
    let status = moving.wait_state(TransferState::Transferring, "Progressing").await?;
    ensure!(place(&status)? == before, "it went on elsewhere: {status:?}");
    moving.tell(json!({"result": {"size": GIB, "virtualSize": GIB, "etag": "e"}})).await?;
    let status = moving.wait_state(TransferState::Succeeded, "Succeeded").await?;
    ensure!(succeeded(&status) == Some("True"), "{status:?}");
    moving.bed.wait_gone(&own).await?;
    let after = moving.api().get("t").await?.status.unwrap_or_default();
    ensure!(place(&after)? == before, "b28: its last node is forgotten: {after:?}");

    moving.change_spec(json!({"ttlSecondsAfterFinished": 1})).await?;
    let leaving = wait::until("the transfer to be deleted", MOMENT, || async {
        match moving.api().get("t").await {
            Ok(found) if found.metadata.deletion_timestamp.is_some() => Look::Done(()),
            Ok(found) => Look::NotYet(format!("{:?}", found.status)),
            Err(error) => Look::Failed(error),
        }
    });
    leaving.await.with_context(|| moving.bed.logs())?;
    moving.tell(json!({"releasedGeneration": before.generation})).await?;
    let gone = wait::until("the transfer to be gone", MOMENT, || async {
        match moving.api().get_opt("t").await {
            Ok(None) => Look::Done(()),
            Ok(Some(found)) => Look::NotYet(format!("{:?}", found.metadata.finalizers)),
            Err(error) => Look::Failed(error),
        }
    });
    gone.await.with_context(|| moving.bed.logs())?;
    moving.bed.no_denials()
}

/// At its deadline it fails, whatever it is at; another try needs another deadline.
async fn ends_at_its_deadline() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let _node = bed.node("n1", 10 * GIB).await?;
    let moving = Moving::ask(bed, "n1", json!({"limits": {"deadline": "15s"}})).await?;
    moving.wait_state(TransferState::Probing, "Probing").await?;
    moving.plan(GIB).await?;
    moving.wait_state(TransferState::Transferring, "Progressing").await?;
    let own = moving.reservation().await?;
    let status = moving.wait_state(TransferState::Failed, "DeadlineExceeded").await?;
    ensure!(succeeded(&status) == Some("False"), "{status:?}");
    let told = find(&status.conditions, ConditionType::Succeeded).context("no condition")?;
    let made = moving.api().get("t").await?.metadata.creation_timestamp.context("no time")?.0;
    let late = told.last_transition_time.0.duration_since(made).as_secs();
    println!("failed {late} s after it was made, with a deadline of 15 s");
    ensure!((14..=25).contains(&late), "{late} s after it was made");
    moving.bed.wait_gone(&own).await?;
    let first = place(&status)?.generation;

    moving.retry("1").await?;
    let again = moving
        .wait("the second try to end", MOMENT, |status| {
            status.retried.as_deref() == Some("1") && status.state == Some(TransferState::Failed)
        })
        .await?;
    ensure!(place(&again)?.generation == first + 1, "{again:?}");
    moving.bed.wait_gone(&own).await?;

    moving.change_spec(json!({"limits": {"deadline": "1h"}})).await?;
    moving.retry("2").await?;
    let status = moving.wait_state(TransferState::Transferring, "Progressing").await?;
    ensure!(place(&status)?.generation == first + 2, "{status:?}");
    moving.bed.no_denials()
}

/// One that needs more than there is fails, says which reservation was refused, and begins again once a person asks for it.
async fn is_refused_and_tried_again() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let _node = bed.node("n1", 10 * GIB).await?;
    let moving = Moving::ask(bed, "n1", json!({})).await?;
    let status = moving.wait_state(TransferState::Probing, "Probing").await?;
    let first = place(&status)?.generation;
    moving.plan(100 * GIB).await?;
    let status = moving.wait_state(TransferState::Failed, "CapacityRefused").await?;
    let own = moving.reservation().await?;
    let told = find(&status.conditions, ConditionType::Succeeded).context("no condition")?;
    ensure!(told.message.contains(&own), "{told:?}");
    let refused = moving.bed.reservations().get(&own).await?;
    ensure!(state_of(&refused) == Some(ReservationState::Refused), "{:?}", refused.status);

    moving.plan(GIB).await?;
    moving.retry("again").await?;
    let status = moving.wait_state(TransferState::Transferring, "Progressing").await?;
    ensure!(status.retried.as_deref() == Some("again"), "{status:?}");
    ensure!(place(&status)?.generation > first, "{status:?}");
    let reservation = moving.bed.reservations().get(&own).await?;
    ensure!(reservation.uid() != refused.uid(), "the refused reservation is used");
    moving.bed.no_denials()
}

/// The reservation of no bytes stays with the lost node, and the work goes on with another one.
async fn leaves_a_lost_node_if_it_needs_no_space() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let nodes = [bed.node("n1", 10 * GIB).await?, bed.node("n2", 10 * GIB).await?];
    let moving = Moving::ask(bed, "n1", json!({})).await?;
    moving.wait_state(TransferState::Probing, "Probing").await?;
    moving.plan(0).await?;
    let status = moving.wait_state(TransferState::Transferring, "Progressing").await?;
    let before = place(&status)?;
    let name = moving.reservation().await?;
    let first = moving.bed.reservations().get(&name).await?;
    ensure!(first.spec.access == Access::Stream, "{:?}", first.spec);

    nodes[usize::from(before.node == "n2")].set_reachable(false);
    let moved = |status: &ImageTransferStatus| {
        let elsewhere = status.assignment.as_ref().is_some_and(|place| place.node != before.node);
        elsewhere && status.state == Some(TransferState::Transferring)
    };
    let status = moving.wait("the transfer to go on elsewhere", LOST, moved).await?;
    ensure!(place(&status)?.generation > before.generation, "{status:?}");
    let first = moving.bed.reservations().get(&name).await?;
    ensure!(first.metadata.deletion_timestamp.is_some(), "{:?}", first.status);
    ensure!(moving.owned().await?.len() == 2, "no other reservation");

    nodes[usize::from(before.node == "n2")].set_reachable(true);
    moving.bed.wait_gone(&name).await?;
    let after = moving.api().get("t").await?.status.unwrap_or_default();
    ensure!(place(&after)? == place(&status)?, "it went back: {after:?}");
    moving.bed.no_denials()
}
