//! A control plane with pools, nodes and an operator.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use berth_api::defaults::RELEASE_FINALIZER;
use berth_api::fields::Quantity;
use berth_api::staging_pool::{Backend, FilesystemBackend, StagingPoolSpec};
use berth_api::staging_reservation::{Access, StagingReservationSpec};
use berth_api::{StagingPool, StagingReservation};
use futures::{StreamExt as _, TryStreamExt as _};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use tokio::time::sleep;

use super::Sizes;
use super::nodes::Nodes;
use super::seen::{REQUEST_BYTES, World};
use crate::cluster::Cluster;
use crate::race::Operator;

/// Where the reservations are.
pub const NAMESPACE: &str = "scale";
/// Where the yardstick's objects are, which the operator never sees.
const YARD: &str = "yard";
/// How many objects the yardstick's patches go to.
const YARD_OBJECTS: usize = 64;
/// How many requests the yardstick has under way at once: as many as the operator's rounds together.
const YARD_AT_ONCE: usize = 48;
/// How many reservations are made at once.
const DECLARED_AT_ONCE: usize = 16;
/// How long anything may take.
const LIMIT: Duration = Duration::from_mins(20);

/// What a run stands on.
pub struct Stage {
    pub cluster: Cluster,
    pub client: Client,
    pub operator: Operator,
    pub nodes: Nodes,
}

impl Stage {
    /// Everything is there, and every node has its ledger.
    pub async fn set(dir: &Path, sizes: &Sizes) -> anyhow::Result<Self> {
        ensure!(sizes.nodes >= sizes.pools && sizes.pools > 0, "each pool needs a node");
        let cluster = Cluster::start(&dir.join("cluster")).await?;
        let tree = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        cluster.install_crds(&tree.join("crds")).await?;
        cluster.apply_file(&tree.join("charts/berth/files/rbac/operator.yaml")).await?;
        if sizes.guarded {
            cluster.apply_file(&tree.join("charts/berth/files/admission/guard-reservations.yaml")).await?;
        }
        cluster.ensure_namespace(NAMESPACE).await?;
        cluster.ensure_namespace(YARD).await?;
        let client = cluster.client_for(&cluster.admin_kubeconfig()).await?;
        let operator = Operator::start_program(&cluster, dir, "scale", &sizes.operator, None).await?;
        operator.wait_ready().await?;
        let pools = pools(&client, sizes).await?;
        let pool_of = |node: usize| (format!("scale-node-{node:04}"), pools[node % pools.len()].clone());
        let each = sizes.reservations.div_ceil(sizes.nodes);
        // A third more than is asked for in all, and in whole requests.
        let node_bytes = i64::try_from(each + each / 3 + 2)? * REQUEST_BYTES;
        let world = World::new((0..sizes.nodes).map(pool_of).collect(), node_bytes);
        let nodes = Nodes::start(&client, world).await?;
        let stage = Self { cluster, client, operator, nodes };
        stage.until("every node's ledger", || stage.nodes.world().ledgers() == sizes.nodes).await?;
        stage.until_nodes_are_trusted(sizes.nodes).await?;
        if sizes.guarded {
            stage.until_guarded().await?;
        }
        Ok(stage)
    }

    /// Waits until the API server acts by the policy that puts finalizers on new reservations.
    async fn until_guarded(&self) -> anyhow::Result<()> {
        let api: Api<StagingReservation> = Api::namespaced(self.client.clone(), YARD);
        let dry = PostParams { dry_run: true, ..PostParams::default() };
        let deadline = Instant::now() + LIMIT;
        while api.create(&dry, &reservation("asks", "scale-0")).await?.finalizers() != [RELEASE_FINALIZER] {
            ensure!(Instant::now() < deadline, "the policy that puts finalizers on does nothing");
            sleep(Duration::from_millis(200)).await;
        }
        Ok(())
    }

    /// Waits for something that is seen.
    pub async fn until(&self, what: &str, is_so: impl Fn() -> bool) -> anyhow::Result<()> {
        let deadline = Instant::now() + LIMIT;
        while !is_so() {
            if let Some(gap) = &self.nodes.world().gap {
                bail!("{gap}");
            }
            ensure!(
                Instant::now() < deadline,
                "{what} did not come; the operator says:\n{}",
                self.operator.log_tail()
            );
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Waits until the operator has heard of every node and read its report.
    pub async fn until_nodes_are_trusted(&self, nodes: usize) -> anyhow::Result<()> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let metrics = self.operator.metrics().await;
            let ready = |line: &&str| line.starts_with("berth_node_ready{") && line.ends_with(" 1");
            if metrics.lines().filter(ready).count() == nodes {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the nodes are not trusted:\n{}", self.operator.log_tail());
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Makes reservations `from` to `to`, spread over the pools; at most so many per second. Returns when each was declared.
    pub async fn declare(
        &self,
        from: usize,
        to: usize,
        pools: usize,
        rate: Option<f64>,
    ) -> anyhow::Result<BTreeMap<String, Instant>> {
        let api: Api<StagingReservation> = Api::namespaced(self.client.clone(), NAMESPACE);
        let start = tokio::time::Instant::now();
        futures::stream::iter(from..to)
            .map(|number| {
                let api = api.clone();
                async move {
                    if let Some(rate) = rate {
                        let at =
                            Duration::try_from_secs_f64(f64::from(u32::try_from(number - from)?) / rate)?;
                        tokio::time::sleep_until(start + at).await;
                    }
                    let declared = Instant::now();
                    let object = reservation(&format!("r-{number:06}"), &format!("scale-{}", number % pools));
                    api.create(&PostParams::default(), &object).await?;
                    anyhow::Ok((object.name_any(), declared))
                }
            })
            .buffer_unordered(if rate.is_some() { 256 } else { DECLARED_AT_ONCE })
            .try_collect()
            .await
            .context("declaring reservations")
    }

    /// Bare status patches per second, while nothing else happens.
    pub async fn yardstick(&self, patches: usize) -> anyhow::Result<f64> {
        let api: Api<StagingReservation> = Api::namespaced(self.client.clone(), YARD);
        let name = |number: usize| format!("yard-{:03}", number % YARD_OBJECTS);
        for number in 0..YARD_OBJECTS {
            let mut yard = reservation(&name(number), "scale-0");
            // Nobody guards what only asks: it goes at once when it is deleted.
            yard.spec.dry_run = true;
            let made = api.create(&PostParams::default(), &yard).await;
            made.context("making the yardstick's objects")?;
        }
        let start = Instant::now();
        futures::stream::iter(0..patches)
            .map(|number| {
                let (api, name) = (api.clone(), name(number));
                let status = json!({ "status": { "path": format!("/{number}") } });
                async move {
                    let params = PatchParams::default();
                    api.patch_status(&name, &params, &Patch::Merge(&status)).await.map(drop)
                }
            })
            .buffer_unordered(YARD_AT_ONCE)
            .try_collect::<()>()
            .await
            .context("the yardstick's patches")?;
        let rate = f64::from(u32::try_from(patches)?) / start.elapsed().as_secs_f64();
        for number in 0..YARD_OBJECTS {
            api.delete(&name(number), &kube::api::DeleteParams::default()).await?;
        }
        Ok(rate)
    }

    /// Resident memory of the operator: now, and at most so far. Unit: MiB.
    pub fn memory(&self) -> (u64, u64) {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.operator.pid())).unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or_default()
                / 1024
        };
        (field("VmRSS:"), field("VmHWM:"))
    }
}

fn reservation(name: &str, pool: &str) -> StagingReservation {
    let spec = StagingReservationSpec {
        pool_name: Some(pool.to_owned()),
        max_size: Quantity(REQUEST_BYTES.to_string()),
        access: Access::File,
        ..StagingReservationSpec::default()
    };
    StagingReservation::new(name, spec)
}

/// Makes the pools; their names and UIDs.
async fn pools(client: &Client, sizes: &Sizes) -> anyhow::Result<Vec<(String, String)>> {
    let api: Api<StagingPool> = Api::all(client.clone());
    let mut pools = Vec::with_capacity(sizes.pools);
    for number in 0..sizes.pools {
        let name = format!("scale-{number}");
        let filesystem =
            FilesystemBackend { path: format!("/var/lib/{name}"), size: Quantity("64Ti".to_owned()) };
        let spec = StagingPoolSpec {
            backend: Backend { filesystem: Some(filesystem), ..Backend::default() },
            node_selector: [("scale".to_owned(), name.clone())].into(),
            ..StagingPoolSpec::default()
        };
        let made = api.create(&PostParams::default(), &StagingPool::new(&name, spec)).await;
        pools.push((name, made.context("making a pool")?.uid().unwrap_or_default()));
    }
    Ok(pools)
}
