//! An API server that was away, or has lost a part of its history, and namespaces that are deleted.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_api::StagingReservation;
use berth_api::defaults::NODE_LEASE_DURATION_SECONDS;
use berth_api::staging_reservation::ReservationState;
use berth_e2e::cluster::SYSTEM_NAMESPACE;
use berth_e2e::wait::{self, Look};
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use super::bed::{Bed, GIB, MOMENT};
use super::state_of;
use crate::scenario::{Need, Scenario};

pub fn scenarios(needs: &[Need]) -> Vec<Scenario> {
    vec![
        Scenario::new("operator::a_restored_ledger_is_rebuilt", needs, a_restored_ledger_is_rebuilt),
        Scenario::new("operator::a_deleted_ledger_is_rebuilt", needs, a_deleted_ledger_is_rebuilt),
        Scenario::new(
            "operator::a_deleted_namespace_leaves_the_volumes_of_its_claims",
            needs,
            a_deleted_namespace_leaves_the_volumes_of_its_claims,
        ),
        Scenario::new(
            "operator::no_node_is_lost_by_an_api_server_that_is_away",
            needs,
            an_api_server_is_away,
        ),
    ]
}

/// For longer than a node's Lease lasts.
const AWAY: Duration = Duration::from_secs(NODE_LEASE_DURATION_SECONDS.unsigned_abs() as u64 + 5);

/// The API server is away for longer than a Lease lasts, and the node needs some seconds more to find it again. The operator, which
/// runs on, takes no node for lost.
async fn an_api_server_is_away() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let node = bed.node("n1", 10 * GIB).await?;
    bed.reserve("before", 2 * GIB, "Queue").await?;
    bed.wait_state("before", ReservationState::Ready).await?;
    node.set_reachable(false);
    bed.cluster.kill_apiserver();
    tokio::time::sleep(AWAY).await;
    bed.cluster.restart().await?;
    tokio::time::sleep(Duration::from_secs(8)).await;
    node.set_reachable(true);
    bed.reserve("after", 2 * GIB, "Queue").await?;
    bed.wait_state("after", ReservationState::Ready).await?;
    let said = std::fs::read_to_string(bed.log("one"))?;
    let changes: Vec<&str> = said.lines().filter(|line| line.contains("node liveness changed")).collect();
    let lost: Vec<&&str> = changes.iter().filter(|line| line.contains("live=false")).collect();
    ensure!(!changes.is_empty() && lost.is_empty(), "{changes:#?}");
    Ok(())
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

/// etcd goes back to a copy of its data from before two reservations were made. Their objects are lost; what their node holds
/// under them is promised again and counts, nothing is freed, and the pool serves again.
async fn a_restored_ledger_is_rebuilt() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let node = bed.node("n1", 10 * GIB).await?;
    bed.reserve("before", 2 * GIB, "Queue").await?;
    let before = bed.wait_state("before", ReservationState::Ready).await?.uid().context("uid")?;

    node.set_reachable(false);
    let data = bed.cluster.etcd_data();
    let backup = data.with_file_name("etcd-backup");
    bed.cluster.kill_apiserver();
    bed.cluster.kill_etcd();
    copy(&data, &backup)?;
    bed.cluster.restart().await?;
    node.set_reachable(true);
    let mut lost = Vec::new();
    for name in ["one", "two"] {
        bed.reserve(name, 3 * GIB, "Queue").await?;
        lost.push(bed.wait_state(name, ReservationState::Ready).await?.uid().context("uid")?);
    }
    let revision = bed.ledger("n1").await?.context("no ledger")?.spec.revision;

    node.set_reachable(false);
    bed.cluster.kill_apiserver();
    bed.cluster.kill_etcd();
    std::fs::remove_dir_all(&data)?;
    copy(&backup, &data)?;
    bed.cluster.restart().await?;
    let restored = bed.ledger("n1").await?.context("no ledger")?;
    ensure!(restored.spec.revision < revision && restored.spec.promises.len() == 1, "not restored");
    // The operator runs on: its watches from before are silent until the API server has come as far again.
    node.set_reachable(true);
    bed.wait_ledger("the ledger to be rebuilt", "n1", MOMENT * 3, |ledger| {
        ledger.is_some_and(|ledger| {
            let from = ledger.spec.rebuilt_from.as_ref();
            ledger.spec.lineage != restored.spec.lineage
                && ledger.spec.revision > revision
                && from.is_some_and(|from| from.lineage == restored.spec.lineage && from.recovered.len() == 2)
                && lost.iter().chain([&before]).all(|uid| ledger.spec.promises.contains_key(uid))
        })
    })
    .await?;
    ensure!(bed.check_sum("n1").await? == 8 * GIB, "what the node holds does not count");
    bed.reserve("large", 3 * GIB, "Reject").await?;
    bed.wait_state("large", ReservationState::Refused).await?;
    bed.reserve("small", GIB, "Reject").await?;
    bed.wait_state("small", ReservationState::Ready).await?;
    let ledger = bed.ledger("n1").await?.context("no ledger")?;
    ensure!(lost.iter().all(|uid| ledger.spec.promises.contains_key(uid)), "a promise was freed by itself");
    bed.reservations().delete("before", &DeleteParams::default()).await?;
    bed.wait_gone("before").await?;
    if let Some(fault) = node.fault().await {
        return Err(fault);
    }
    Ok(())
}

/// Somebody deletes a ledger: the one made in its place is empty, until it is rebuilt from what the node holds.
async fn a_deleted_ledger_is_rebuilt() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    bed.start_operator("two")?;
    let node = bed.node("n1", 10 * GIB).await?;
    bed.reserve("held", 6 * GIB, "Queue").await?;
    let held = bed.wait_state("held", ReservationState::Ready).await?.uid().context("uid")?;
    let ledger = bed.ledger("n1").await?.context("no ledger")?;
    let ledgers: Api<berth_api::StagingLedger> = Api::all(bed.cluster.admin());
    ledgers.delete(&ledger.name_any(), &DeleteParams::default()).await?;
    bed.reserve("second", 6 * GIB, "Queue").await?;
    bed.wait_ledger("the ledger to be rebuilt", "n1", MOMENT * 2, |new| {
        new.is_some_and(|new| {
            new.spec.lineage != ledger.spec.lineage
                && new.spec.rebuilt_from.as_ref().is_some_and(|from| from.recovered.is_empty())
                && new.spec.promises.contains_key(&held)
        })
    })
    .await?;
    bed.check_sum("n1").await?;
    bed.wait_state("second", ReservationState::Queued).await?;
    bed.reservations().delete("held", &DeleteParams::default()).await?;
    bed.wait_state("second", ReservationState::Ready).await?;
    if let Some(fault) = node.fault().await {
        return Err(fault);
    }
    bed.no_denials()
}

/// What the end of a namespace does to its objects: a reservation in it is given back by its node before it goes; the volume of
/// a claim in it has its reservation elsewhere, and stays.
async fn a_deleted_namespace_leaves_the_volumes_of_its_claims() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let node = bed.node("n1", 10 * GIB).await?;
    bed.cluster.ensure_namespace("team").await?;
    let team: Api<StagingReservation> = Api::namespaced(bed.cluster.admin(), "team");
    let system: Api<StagingReservation> = Api::namespaced(bed.cluster.admin(), SYSTEM_NAMESPACE);
    let work = serde_json::from_value(json!({
        "metadata": {"name": "work"}, "spec": {"poolName": "p", "maxSize": GIB},
        "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation",
    }))?;
    let volume = serde_json::from_value(json!({
        "metadata": {"name": "volume", "labels": {
            "staging.berth.dev/claim-namespace": "team", "staging.berth.dev/claim-name": "data",
        }},
        "spec": {"poolName": "p", "maxSize": GIB, "access": "Block"},
        "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation",
    }))?;
    team.create(&PostParams::default(), &work).await?;
    let volume = system.create(&PostParams::default(), &volume).await?.uid().context("uid")?;
    for (api, name) in [(&team, "work"), (&system, "volume")] {
        wait_for(api, name, Some(ReservationState::Ready)).await?;
    }
    node.set_releases(false);
    // As the namespace controller deletes what is in a namespace.
    team.delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
    wait_for(&team, "work", Some(ReservationState::Releasing)).await?;
    ensure!(bed.check_sum("n1").await? == 2 * GIB, "given back before its node said so");
    node.set_releases(true);
    wait_for(&team, "work", None).await?;
    let kept = system.get("volume").await?;
    ensure!(state_of(&kept) == Some(ReservationState::Ready) && kept.metadata.deletion_timestamp.is_none());
    let ledger = bed.ledger("n1").await?.context("no ledger")?;
    ensure!(ledger.spec.promises.keys().eq([&volume]), "{:?}", ledger.spec.promises);
    bed.no_denials()
}

/// Waits for a state, or without one until the reservation is gone.
async fn wait_for(
    api: &Api<StagingReservation>,
    name: &str,
    wanted: Option<ReservationState>,
) -> anyhow::Result<()> {
    wait::until(&format!("{name} to be {wanted:?}"), MOMENT, || async {
        match api.get_opt(name).await {
            Ok(found)
                if found.as_ref().and_then(state_of) == wanted && found.is_some() == wanted.is_some() =>
            {
                Look::Done(())
            }
            Ok(found) => Look::NotYet(format!("{:?}", found.map(|found| found.status))),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    Ok(())
}
