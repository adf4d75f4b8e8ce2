//! A control plane with Berth's kinds and rights, one pool, operators as processes, and fake nodes.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use berth_api::staging_reservation::ReservationState;
use berth_api::{StagedImage, StagingLedger, StagingPool, StagingReservation, TemplateImport};
use berth_e2e::cluster::{Cluster, SYSTEM_NAMESPACE};
use berth_e2e::ours::{OPERATOR, OPERATOR_SABOTAGE, Ours};
use berth_e2e::process::{Process, Program};
use berth_e2e::wait::{self, Look};
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use super::fake_node::FakeNode;
use super::state_of;

/// One GiB.
pub const GIB: i64 = 1 << 30;
/// How old a volume is before its claim is looked for.
pub const CLAIM_GRACE: Duration = Duration::from_secs(2);
/// How long anything may take to come about.
pub const MOMENT: Duration = Duration::from_secs(40);

/// What a scenario stands on.
pub struct Bed {
    operators: BTreeMap<&'static str, Process>,
    /// The control plane.
    pub cluster: Cluster,
    /// The operator's own rights, and no more.
    pub operator_kubeconfig: PathBuf,
    program: PathBuf,
    sabotage: &'static str,
    dir: TempDir,
}

impl Bed {
    /// A control plane with kinds, rights and the pool `p`.
    pub async fn start() -> anyhow::Result<Self> {
        Self::with(OPERATOR, "").await
    }

    /// The same with operators that have this defect.
    pub async fn sabotaged(sabotage: &'static str) -> anyhow::Result<Self> {
        Self::with(OPERATOR_SABOTAGE, sabotage).await
    }

    async fn with(program: Ours, sabotage: &'static str) -> anyhow::Result<Self> {
        let program = tokio::task::spawn_blocking(move || program.obtain()).await??;
        let dir = tempfile::tempdir()?;
        let cluster = Cluster::start(&dir.path().join("cluster")).await?;
        let tree = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        cluster.install_crds(&tree.join("crds")).await?;
        for file in ["operator.yaml", "node.yaml"] {
            cluster.apply_file(&tree.join("charts/berth/files/rbac").join(file)).await?;
        }
        let pool = "apiVersion: staging.berth.dev/v1alpha1\nkind: StagingPool\nmetadata: {name: p}\n\
                    spec: {backend: {filesystem: {path: /staging, size: 10Gi}}}\n";
        cluster.apply_yaml(pool).await?;
        let operator_kubeconfig =
            cluster.service_account_kubeconfig(SYSTEM_NAMESPACE, "berth-operator").await?;
        Ok(Self { operators: BTreeMap::new(), cluster, operator_kubeconfig, program, sabotage, dir })
    }

    /// Starts a replica of this name.
    pub fn start_operator(&mut self, identity: &'static str) -> anyhow::Result<()> {
        let program = Program::new("berth-operator", &self.program, &self.log(identity))
            .args(["--identity", identity, "--metrics-addr", "127.0.0.1:0", "--kubeconfig"])
            .args([&self.operator_kubeconfig])
            .env("BERTH_SABOTAGE", self.sabotage)
            .env("BERTH_CLAIM_GRACE_SECONDS", CLAIM_GRACE.as_secs().to_string())
            .env("RUST_LOG", "info,berth_operator=debug");
        self.operators.insert(identity, program.spawn()?);
        Ok(())
    }

    /// Ends a replica as a crash would.
    pub fn kill_operator(&mut self, identity: &str) -> anyhow::Result<()> {
        self.operators.remove(identity).context("no such operator")?.kill9()?;
        Ok(())
    }

    /// Asks a replica to end; its exit code.
    pub fn stop_operator(&mut self, identity: &str) -> anyhow::Result<Option<i32>> {
        let mut operator = self.operators.remove(identity).context("no such operator")?;
        Ok(operator.stop(Duration::from_secs(15))?.code())
    }

    /// Starts a node that carries the pool, with a node's rights and no more.
    pub async fn node(&self, name: &str, total: i64) -> anyhow::Result<FakeNode> {
        FakeNode::start(self.node_client(name).await?, name, "p", total).await
    }

    /// A client with a node's rights and no more, bound to its present Node object.
    pub async fn node_client(&self, name: &str) -> anyhow::Result<Client> {
        let kubeconfig = self
            .cluster
            .node_bound_kubeconfig(SYSTEM_NAMESPACE, "berth-node", name, Ipv4Addr::LOCALHOST)
            .await?;
        Ok(self.cluster.client_for(&kubeconfig).await?)
    }

    /// Asks for `size` bytes.
    pub async fn reserve(&self, name: &str, size: i64, when_full: &str) -> anyhow::Result<()> {
        let reservation = serde_json::from_value(json!({
            "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation",
            "metadata": {"name": name}, "spec": {"poolName": "p", "maxSize": size, "whenFull": when_full},
        }))?;
        self.reservations().create(&PostParams::default(), &reservation).await?;
        Ok(())
    }

    /// Asks for what `spec` says, of the pool `p`, in a namespace.
    pub async fn ask(&self, namespace: &str, name: &str, spec: serde_json::Value) -> anyhow::Result<()> {
        let mut reservation = json!({
            "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation",
            "metadata": {"name": name}, "spec": {"poolName": "p"},
        });
        for (key, value) in spec.as_object().context("not an object")? {
            reservation["spec"][key] = value.clone();
        }
        let reservation: StagingReservation = serde_json::from_value(reservation)?;
        let api: Api<StagingReservation> = Api::namespaced(self.cluster.admin(), namespace);
        api.create(&PostParams::default(), &reservation).await?;
        Ok(())
    }

    /// Waits until the status of a reservation is as wanted; `None` is one that is gone.
    pub async fn wait_for(
        &self,
        namespace: &str,
        name: &str,
        what: &str,
        wanted: impl Fn(Option<&StagingReservation>) -> bool,
    ) -> anyhow::Result<Option<StagingReservation>> {
        let api: Api<StagingReservation> = Api::namespaced(self.cluster.admin(), namespace);
        let what = format!("{name}: {what}");
        let waited = wait::until(&what, MOMENT, || async {
            match api.get_opt(name).await {
                Ok(found) if wanted(found.as_ref()) => Look::Done(found),
                Ok(found) => Look::NotYet(format!("{:?}", found.and_then(|found| found.status))),
                Err(error) => Look::Failed(error),
            }
        });
        waited.await.with_context(|| self.logs())
    }

    /// Registers a template that is durable already, of so many bytes, and its image store if that is not there yet: without
    /// one, staged images of it would be the only copies that can be reached.
    pub async fn template(&self, name: &str, size: i64) -> anyhow::Result<()> {
        let store = "apiVersion: staging.berth.dev/v1alpha1\nkind: ImageStore\n\
                     metadata: {name: images, namespace: default}\n\
                     spec: {endpoint: 'http://127.0.0.1:9', bucket: images}\n";
        self.cluster.apply_yaml(store).await?;
        let yaml = format!(
            "apiVersion: staging.berth.dev/v1alpha1\nkind: TemplateImport\nmetadata: {{name: {name}, namespace: default}}\n\
             spec: {{source: {{http: {{url: 'http://127.0.0.1/{name}'}}}}, store: {{name: images}}}}\n"
        );
        self.cluster.apply_yaml(&yaml).await?;
        let hash = Sha256::digest(name.as_bytes());
        let digest: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        let durable = json!({
            "digest": format!("sha256:{digest}"), "sourceDigest": format!("sha256:{digest}"), "size": size,
            "virtualSize": size, "realSize": size, "chunks": 1,
        });
        let api: Api<TemplateImport> = Api::namespaced(self.cluster.admin(), "default");
        let status = Patch::Merge(json!({"status": {"durable": durable}}));
        api.patch_status(name, &PatchParams::default(), &status).await?;
        Ok(())
    }

    /// Asks for a volume of a template, of the template's own size.
    pub async fn clone_of(&self, template: &str, name: &str, size: i64) -> anyhow::Result<()> {
        let reservation = serde_json::from_value(json!({
            "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation", "metadata": {"name": name},
            "spec": {
                "poolName": "p", "maxSize": size, "whenFull": "Queue", "access": "Block",
                "image": {"template": {"namespace": "default", "name": template}},
            },
        }))?;
        self.reservations().create(&PostParams::default(), &reservation).await?;
        Ok(())
    }

    /// Leaves a copy of a template on a node that nothing refers to.
    pub async fn idle_image(&self, template: &str, size: i64) -> anyhow::Result<()> {
        self.template(template, size).await?;
        let user = format!("user-of-{template}");
        self.clone_of(template, &user, size).await?;
        self.wait_state(&user, ReservationState::Ready).await?;
        self.reservations().delete(&user, &DeleteParams::default()).await?;
        self.wait_gone(&user).await
    }

    /// The staged images: names and whether each is being deleted.
    pub async fn images(&self) -> anyhow::Result<Vec<StagedImage>> {
        let api: Api<StagedImage> = Api::all(self.cluster.admin());
        Ok(api.list(&ListParams::default()).await?.items)
    }

    /// Changes fields of the pool's spec.
    pub async fn change_pool(&self, spec: serde_json::Value) -> anyhow::Result<()> {
        let api: Api<StagingPool> = Api::all(self.cluster.admin());
        api.patch("p", &PatchParams::default(), &Patch::Merge(json!({"spec": spec}))).await?;
        Ok(())
    }

    /// Waits until the pool is as wanted: told whether it is, or what is wrong.
    pub async fn wait_pool(
        &self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&StagingPool) -> Result<(), String>,
    ) -> anyhow::Result<()> {
        let api: Api<StagingPool> = Api::all(self.cluster.admin());
        let waited = wait::until(what, limit, || async {
            match api.get("p").await {
                Ok(pool) => match wanted(&pool) {
                    Ok(()) => Look::Done(()),
                    Err(why) => Look::NotYet(why),
                },
                Err(error) => Look::Failed(error),
            }
        });
        waited.await.with_context(|| self.logs())
    }

    /// Waits until the ledger of the pool on a node is as wanted.
    pub async fn wait_ledger(
        &self,
        what: &str,
        node: &str,
        limit: Duration,
        wanted: impl Fn(Option<&StagingLedger>) -> bool,
    ) -> anyhow::Result<()> {
        let waited = wait::until(what, limit, || async {
            match self.ledger(node).await {
                Ok(ledger) if wanted(ledger.as_ref()) => Look::<(), Infallible>::Done(()),
                Ok(ledger) => Look::NotYet(format!("{:?}", ledger.map(|ledger| ledger.spec))),
                Err(error) => Look::NotYet(format!("{error:#}")),
            }
        });
        waited.await.with_context(|| self.logs())
    }

    /// The reservations of the scenario.
    pub fn reservations(&self) -> Api<StagingReservation> {
        Api::namespaced(self.cluster.admin(), "default")
    }

    /// The state of a reservation.
    pub async fn state(&self, name: &str) -> anyhow::Result<Option<ReservationState>> {
        Ok(state_of(&self.reservations().get(name).await?))
    }

    /// Waits for a state.
    pub async fn wait_state(
        &self,
        name: &str,
        wanted: ReservationState,
    ) -> anyhow::Result<StagingReservation> {
        let api = self.reservations();
        let what = format!("{name} to be {wanted:?}");
        let waited = wait::until(&what, MOMENT, || async {
            match api.get(name).await {
                Ok(found) if state_of(&found) == Some(wanted) => Look::Done(found),
                Ok(found) => Look::NotYet(format!("{:?}", found.status)),
                Err(error) => Look::Failed(error),
            }
        });
        waited.await.with_context(|| self.logs())
    }

    /// Waits until a reservation is gone.
    pub async fn wait_gone(&self, name: &str) -> anyhow::Result<()> {
        let api = self.reservations();
        let what = format!("{name} to be gone");
        let waited = wait::until(&what, MOMENT, || async {
            match api.get_opt(name).await {
                Ok(None) => Look::Done(()),
                Ok(Some(found)) => {
                    Look::NotYet(format!("{:?} {:?}", found.metadata.finalizers, found.status))
                }
                Err(error) => Look::Failed(error),
            }
        });
        waited.await.with_context(|| self.logs())
    }

    /// The ledger of the pool on a node.
    pub async fn ledger(&self, node: &str) -> anyhow::Result<Option<StagingLedger>> {
        let api: Api<StagingLedger> = Api::all(self.cluster.admin());
        let ledgers = api.list(&ListParams::default().fields(&format!("spec.scope.nodeName={node}"))).await?;
        ensure!(ledgers.items.len() <= 1, "{} ledgers of one pool on {node}", ledgers.items.len());
        Ok(ledgers.items.into_iter().next())
    }

    /// Every reservation with a place has its promise in the ledger of that place, at the same generation.
    pub async fn check_promises(&self) -> anyhow::Result<()> {
        // In this order: a promise comes before the placement, and goes after the release.
        let reservations = self.reservations().list(&ListParams::default()).await?;
        for reservation in reservations.iter().filter(|r| r.metadata.deletion_timestamp.is_none()) {
            let Some(place) = reservation.status.as_ref().and_then(|status| status.assignment.as_ref())
            else {
                continue;
            };
            let ledger = self.ledger(&place.node).await?.context("a placement without a ledger")?;
            let uid = reservation.uid().unwrap_or_default();
            let generation = ledger.spec.promises.get(&uid).map(|promise| promise.generation);
            let name = reservation.name_any();
            ensure!(generation == Some(place.generation), "{name} at {place:?}, promised at {generation:?}");
        }
        Ok(())
    }

    /// The promised bytes on a node, which must not be above the capacity in the same object.
    pub async fn check_sum(&self, node: &str) -> anyhow::Result<i64> {
        let Some(ledger) = self.ledger(node).await? else { return Ok(0) };
        let sum: i64 = ledger.spec.promises.values().map(|promise| promise.data_bytes).sum();
        let capacity = ledger.spec.capacity.total.data_bytes;
        ensure!(sum <= capacity, "{node}: {sum} bytes promised of {capacity}");
        Ok(sum)
    }

    /// Waits until a replica has seen every list.
    pub async fn wait_ready(&self, identity: &str) -> anyhow::Result<()> {
        let waited = wait::until("readiness", MOMENT, || async {
            match self.fetch(identity, "readyz").await {
                Ok((200, _)) => Look::<(), Infallible>::Done(()),
                Ok((code, body)) => Look::NotYet(format!("{code} {body}")),
                Err(error) => Look::NotYet(error.to_string()),
            }
        });
        waited.await.with_context(|| self.logs())?;
        let (code, _) = self.fetch(identity, "healthz").await?;
        ensure!(code == 200, "healthz: {code}");
        Ok(())
    }

    /// The sum of a metric of a replica over all labels.
    pub async fn metric(&self, identity: &str, name: &str) -> anyhow::Result<i64> {
        Ok(self.samples(identity, name).await?.values().sum())
    }

    /// What a replica says of a metric, by its labels as they stand in its answer: `pool="p",node="n"`.
    pub async fn samples(&self, identity: &str, name: &str) -> anyhow::Result<BTreeMap<String, i64>> {
        let (code, body) = self.fetch(identity, "metrics").await?;
        ensure!(code == 200, "metrics: {code}");
        let samples = body.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let bare = rest.strip_prefix(' ').map(|value| ("", value));
            let (labels, value) = bare.or_else(|| rest.strip_prefix('{')?.split_once("} "))?;
            Some((labels.to_owned(), value.parse::<i64>().ok()?))
        });
        Ok(samples.collect())
    }

    /// Waits until a replica says of a metric just this, by its labels.
    pub async fn wait_samples(
        &self,
        identity: &str,
        name: &str,
        wanted: &[(&str, i64)],
    ) -> anyhow::Result<()> {
        let wanted: BTreeMap<String, i64> =
            wanted.iter().map(|(labels, value)| ((*labels).to_owned(), *value)).collect();
        let what = format!("{name} to be {wanted:?}");
        let waited = wait::until(&what, MOMENT, || async {
            match self.samples(identity, name).await {
                Ok(samples) if samples == wanted => Look::<(), Infallible>::Done(()),
                Ok(samples) => Look::NotYet(format!("{samples:?}")),
                Err(error) => Look::NotYet(format!("{error:#}")),
            }
        });
        waited.await.with_context(|| self.logs())
    }

    /// Waits until the operators' Lease has this holder.
    pub async fn wait_lease(&self, holder: &str) -> anyhow::Result<()> {
        let leases: Api<Lease> = Api::namespaced(self.cluster.admin(), SYSTEM_NAMESPACE);
        wait::until("the Lease", MOMENT, || async {
            match leases.get_opt("berth-operator").await {
                Ok(lease) => {
                    let found = lease.and_then(|lease| lease.spec).and_then(|spec| spec.holder_identity);
                    if found.as_deref() == Some(holder) {
                        Look::Done(())
                    } else {
                        Look::NotYet(format!("{found:?}"))
                    }
                }
                Err(error) => Look::Failed(error),
            }
        })
        .await?;
        Ok(())
    }

    /// The operators' rights were enough: nothing was forbidden.
    pub fn no_denials(&self) -> anyhow::Result<()> {
        for identity in ["one", "two"] {
            let log = std::fs::read_to_string(self.log(identity)).unwrap_or_default();
            if let Some(line) = log.lines().find(|line| line.contains("forbidden")) {
                bail!("operator {identity}: {line}");
            }
        }
        Ok(())
    }

    async fn fetch(&self, identity: &str, path: &str) -> anyhow::Result<(u16, String)> {
        let log = std::fs::read_to_string(self.log(identity))?;
        let line =
            log.lines().rfind(|line| line.contains("metrics listening")).context("not listening yet")?;
        let address = line.rsplit("address=").next().context("no address in the log")?.trim();
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build()?;
        let answer = client.get(format!("http://{address}/{path}")).send().await?;
        Ok((answer.status().as_u16(), answer.text().await?))
    }

    /// Where a replica writes what it does.
    pub fn log(&self, identity: &str) -> PathBuf {
        self.dir.path().join(format!("operator-{identity}.log"))
    }

    pub fn logs(&self) -> String {
        let tails = self.operators.iter().map(|(identity, operator)| {
            let state = if operator.is_running() { "running" } else { "ended" };
            format!("operator {identity} ({state}):\n{}", operator.log_tail())
        });
        tails.collect::<Vec<_>>().join("\n")
    }
}
