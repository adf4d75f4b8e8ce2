//! Requests for a zone: nodes say theirs by the label that their Kubernetes node has.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_api::StagingReservation;
use berth_api::conditions::{ConditionType, find};
use berth_api::defaults::LABEL_ZONE;
use berth_api::staging_reservation::{ReservationState, StagingReservationStatus};
use berth_e2e::drive::wait_pool;
use berth_e2e::site::{NODE_LABEL, NodeKind, Site, SiteOptions};
use berth_e2e::wait::{self, Look};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::scenario::Scenario;
use crate::scene::{self, POOL, make_pool};

/// How long a step may take on a busy machine.
const STEP_LIMIT: Duration = Duration::from_secs(90);
/// What is asked for each time. Unit: MiB. The area of each node has room for one of them, and not for two.
const ASKED: i64 = 600;

pub fn scenarios() -> Vec<Scenario> {
    let needs = scene::needs(NodeKind::Namespace);
    vec![
        Scenario::new("zone::a_request_lands_in_its_zone_or_waits_for_it", &needs, lands_or_waits),
        Scenario::new("zone::a37_pools_beside_each_other_are_chosen_by_labels", &needs, beside_each_other),
    ]
}

/// A site of two nodes with a pool on both.
struct Bed {
    site: Site,
    reservations: Api<StagingReservation>,
}

impl Bed {
    /// Two nodes that carry the pool.
    async fn start(dir: &Path) -> anyhow::Result<Self> {
        let mut options = SiteOptions::new(&dir.join("site"));
        options.nodes = 2;
        let site = Site::start(options).await?;
        let reservations = Api::namespaced(site.client(), "default");
        make_pool(&site).await?;
        Ok(Self { site, reservations })
    }

    async fn label(&self, node: &str, zone: &str) -> anyhow::Result<()> {
        let nodes: Api<Node> = Api::all(self.site.client());
        let labels = json!({"metadata": {"labels": {LABEL_ZONE: zone}}});
        nodes.patch(node, &PatchParams::default(), &Patch::Merge(labels)).await?;
        Ok(())
    }

    async fn ask(&self, name: &str, zone: Option<&str>, when_full: &str) -> anyhow::Result<()> {
        self.ask_of(&json!({ "poolName": POOL }), name, zone, when_full).await
    }

    /// Asks for space in a pool that `pools` names or selects.
    async fn ask_of(
        &self,
        pools: &Value,
        name: &str,
        zone: Option<&str>,
        when_full: &str,
    ) -> anyhow::Result<()> {
        let mut spec = pools.clone();
        (spec["maxSize"], spec["whenFull"]) = (json!(format!("{ASKED}Mi")), json!(when_full));
        if let Some(zone) = zone {
            spec["topology"] = json!({ "zone": zone });
        }
        let object = json!({
            "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation",
            "metadata": { "name": name, "namespace": "default" }, "spec": spec,
        });
        self.site.apply(&object.to_string()).await?;
        Ok(())
    }

    async fn until(&self, name: &str, state: ReservationState) -> anyhow::Result<StagingReservationStatus> {
        let what = format!("{name} to be {state:?}");
        let status = wait::until(&what, STEP_LIMIT, || async {
            match self.reservations.get(name).await.map(|found| found.status.unwrap_or_default()) {
                Ok(status) if status.state == Some(state) => Look::Done(status),
                Ok(status) => Look::NotYet(format!("{status:?}")),
                Err(error) => Look::Failed(error),
            }
        });
        Ok(status.await?)
    }

    /// Waits until a reservation is ready, which must be on this node.
    async fn lands(&self, name: &str, node: &str) -> anyhow::Result<()> {
        let place = self.until(name, ReservationState::Ready).await?.assignment.context("no assignment")?;
        ensure!(place.node == node, "{name} is on {place:?}");
        Ok(())
    }

    /// Waits until a reservation is in this state for this reason; what is said of that.
    async fn is(&self, name: &str, state: ReservationState, reason: &str) -> anyhow::Result<String> {
        let status = self.until(name, state).await?;
        let told = find(&status.conditions, ConditionType::Promised).context("no condition Promised")?;
        ensure!(told.status == "False" && told.reason == reason, "{name}: {told:?}");
        Ok(told.message.clone())
    }
}

/// Each request lands in the zone that it names, though there is more room in another; where that is full it waits, or is refused,
/// with numbers of that zone alone, and keeps nobody of another zone waiting. A zone that no node is in is waited for.
async fn lands_or_waits() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let bed = Bed::start(dir.path()).await?;

    bed.ask("first", Some("east"), "Queue").await?;
    bed.is("first", ReservationState::Queued, "NoMatchingNode").await?;
    bed.label("node-1", "west").await?;
    bed.label("node-2", "east").await?;
    bed.lands("first", "node-2").await?;

    bed.ask("second", Some("east"), "Queue").await?;
    let said = bed.is("second", ReservationState::Queued, "InsufficientCapacity").await?;
    ensure!(said.contains("node-2") && !said.contains("node-1"), "{said}");
    let status = bed.until("second", ReservationState::Queued).await?;
    let places: Vec<&str> = status.candidates.iter().map(|place| place.node.as_str()).collect();
    ensure!(places == ["node-2"], "places {places:?}");
    ensure!(status.queue.is_some_and(|queue| queue.position == 1), "no place in the queue");
    bed.ask("now", Some("east"), "Reject").await?;
    bed.is("now", ReservationState::Refused, "CapacityRefused").await?;
    bed.ask("anywhere", None, "Reject").await?;
    bed.lands("anywhere", "node-1").await?;
    ensure!(bed.until("second", ReservationState::Queued).await?.assignment.is_none(), "it left its zone");

    bed.reservations.delete("first", &DeleteParams::default()).await?;
    bed.lands("second", "node-2").await?;

    bed.reservations.delete("anywhere", &DeleteParams::default()).await?;
    bed.ask("elsewhere", Some("north"), "Queue").await?;
    bed.is("elsewhere", ReservationState::Queued, "NoMatchingNode").await?;
    bed.label("node-1", "north").await?;
    bed.lands("elsewhere", "node-1").await?;
    ensure!(bed.site.stop().is_empty(), "a loop device stays");
    Ok(())
}

/// Two pools on each of two nodes in two zones: each request lands in the pool whose labels it selects, in its zone; where that is
/// full it waits, though the other pool of that node and the same pool of the other zone have room.
async fn beside_each_other() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let bed = Bed::start(dir.path()).await?;
    for (pool, tier, path) in
        [(POOL, "hot", bed.site.pool_path(POOL)), ("slow", "cold", bed.site.pool_path("slow"))]
    {
        let object = json!({
            "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingPool",
            "metadata": { "name": pool, "labels": { "tier": tier } },
            "spec": {
                "backend": { "filesystem": { "path": path, "size": "1Gi" } },
                "nodeSelector": { NODE_LABEL: "yes" },
            },
        });
        bed.site.apply(&object.to_string()).await?;
        wait_pool(&bed.site.client(), pool, 2).await?;
    }
    bed.label("node-1", "west").await?;
    bed.label("node-2", "east").await?;
    let of = |tier: &str| json!({ "poolSelector": { "matchLabels": { "tier": tier } } });
    for (tier, zone, pool, node) in [
        ("cold", "east", "slow", "node-2"),
        ("hot", "west", POOL, "node-1"),
        ("cold", "west", "slow", "node-1"),
    ] {
        let name = format!("{tier}-{zone}");
        bed.ask_of(&of(tier), &name, Some(zone), "Queue").await?;
        let place = bed.until(&name, ReservationState::Ready).await?.assignment.context("no assignment")?;
        ensure!(place.node == node && place.pool.as_deref() == Some(pool), "{name} is at {place:?}");
    }
    bed.ask_of(&of("hot"), "second", Some("west"), "Queue").await?;
    let said = bed.is("second", ReservationState::Queued, "InsufficientCapacity").await?;
    ensure!(said.contains(POOL) && said.contains("node-1") && !said.contains("slow"), "{said}");
    bed.ask_of(&of("hot"), "anywhere", None, "Reject").await?;
    let place = bed.until("anywhere", ReservationState::Ready).await?.assignment.context("no assignment")?;
    ensure!(place.node == "node-2" && place.pool.as_deref() == Some(POOL), "anywhere is at {place:?}");
    bed.ask_of(&of("warm"), "nowhere", None, "Queue").await?;
    bed.is("nowhere", ReservationState::Queued, "NoMatchingPool").await?;

    bed.reservations.delete("hot-west", &DeleteParams::default()).await?;
    bed.lands("second", "node-1").await?;
    ensure!(bed.site.stop().is_empty(), "a loop device stays");
    Ok(())
}
