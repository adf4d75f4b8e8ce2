//! A whole installation on one machine: control plane, operators, node agents, an S3 server and a file server, each
//! as a process of its own, with the rights that the chart would give it.
//!
//! What stands in for a cluster: Node objects are made by hand; each node is a mount namespace of its own in which
//! its agent runs, so that all nodes may have a pool at the same path, a mount outlives the agent that made it, and
//! no mount outlives the site; or a host with a kernel of its own ([`NodeKind`]). Kubelet and the CSI sidecars are
//! played by [`crate::csi`]. Garbage collection by owner references does not happen.

mod error;
mod node;
mod programs;
mod servers;

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;

pub use self::error::SiteError;
pub use self::node::{NodeKind, SiteNode, Started};
pub use self::programs::{Programs, ProgramsError};
pub(crate) use self::servers::signed;
pub use self::servers::{BUCKET, S3Kind, S3Server, ServerError, http_get_signed};
use crate::cluster::{Cluster, SYSTEM_NAMESPACE};
use crate::kernel::{GATEWAY, KernelNetwork};
use crate::leaks::{self, Loop};
use crate::ports::free_port;
use crate::process::{Process, Program};

/// The account of the operators.
const OPERATOR_ACCOUNT: &str = "berth-operator";

/// The account of the node agents.
pub(crate) const NODE_ACCOUNT: &str = "berth-node";

/// The label that pools of a site select nodes by; its value is `yes`.
pub const NODE_LABEL: &str = "staging";

/// How long a part may take to answer.
pub(crate) const READY_LIMIT: Duration = Duration::from_secs(90);

/// How long a part gets to end by itself.
pub(crate) const STOP_GRACE: Duration = Duration::from_secs(10);

/// Which program carries a deliberate defect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Saboteur {
    /// Every operator.
    Operator,
    /// Every node agent.
    Node,
}

/// What a site consists of.
#[derive(Debug, Clone)]
pub struct SiteOptions {
    /// Everything lies below this folder.
    pub dir: PathBuf,
    /// How many nodes, called `node-1` and so on.
    pub nodes: usize,
    /// What they are.
    pub kind: NodeKind,
    /// How many operators.
    pub operators: usize,
    /// The object store.
    pub s3: S3Kind,
    /// A defect, by its name, and who has it.
    pub sabotage: Option<(Saboteur, String)>,
}

impl SiteOptions {
    /// One node that is a mount namespace, one operator, the test S3 server, no defect.
    pub fn new(dir: &Path) -> Self {
        let kind = NodeKind::Namespace;
        Self { dir: dir.to_owned(), nodes: 1, kind, operators: 1, s3: S3Kind::Test, sabotage: None }
    }
}

/// A running operator, or one that was killed.
struct Operator {
    program: Program,
    health: String,
    process: Option<Process>,
}

/// A running installation. Dropping it kills all of it and lets every loop device go.
pub struct Site {
    // In this order: agents before the API server and the object store.
    nodes: Vec<SiteNode>,
    operators: Vec<Operator>,
    http: servers::HttpServer,
    s3: S3Server,
    cluster: Cluster,
    /// Of nodes with kernels of their own.
    network: Option<KernelNetwork>,
    dir: PathBuf,
}

impl Site {
    /// Starts everything and waits until each part answers. The folder must not hold another site.
    ///
    /// # Errors
    /// [`SiteError`]; [`Site::obstacle`] tells beforehand whether this machine can run one.
    pub async fn start(options: SiteOptions) -> Result<Self, SiteError> {
        let make =
            |path: PathBuf| fs::create_dir_all(&path).map_err(|source| SiteError::Folder { path, source });
        for sub in ["files", "logs"] {
            make(options.dir.join(sub))?;
        }
        // Resolved: the kernel names the files behind loop devices so.
        let dir = fs::canonicalize(&options.dir);
        let dir = dir.map_err(|source| SiteError::Folder { path: options.dir.clone(), source })?;
        let programs = Programs::beside_this(options.sabotage.as_ref().map(|(who, _)| *who))?;
        let (cluster, s3) = tokio::try_join!(
            async { Cluster::start(&dir.join("cluster")).await.map_err(SiteError::from) },
            async { S3Server::start(options.s3, &dir, &programs.s3).await.map_err(SiteError::from) },
        )?;
        let http = servers::HttpServer::start(&dir, &programs.http).await?;
        let network = match options.kind {
            NodeKind::Namespace => None,
            NodeKind::Kernel => Some(KernelNetwork::new()?),
        };
        let (nodes, operators) = (Vec::new(), Vec::new());
        let mut site = Self { nodes, operators, http, s3, cluster, network, dir };
        site.expose()?;
        site.install().await?;
        for number in 1..=options.operators {
            site.add_operator(number, &programs, options.sabotage.as_ref()).await?;
        }
        for number in 1..=options.nodes {
            site.add_node(&format!("node-{number}"), &programs, options.sabotage.as_ref()).await?;
        }
        site.wait_ready().await?;
        Ok(site)
    }

    /// Why this machine cannot run a site, if it cannot.
    pub fn obstacle() -> Option<String> {
        if !nix::unistd::geteuid().is_root() {
            return Some("a node needs root: mounts and loop devices".to_owned());
        }
        let namespace =
            std::process::Command::new("unshare").args(["--mount", "--", "losetup", "--find"]).output();
        match namespace {
            Ok(output) if output.status.success() => None,
            Ok(output) => {
                Some(format!("no mounts or loop devices: {}", String::from_utf8_lossy(&output.stderr).trim()))
            }
            Err(error) => Some(format!("unshare (util-linux): {error}")),
        }
    }

    /// The folder of everything.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The control plane.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// The control plane, to be killed and restarted.
    pub fn cluster_mut(&mut self) -> &mut Cluster {
        &mut self.cluster
    }

    /// A client with all rights.
    pub fn client(&self) -> Client {
        self.cluster.admin()
    }

    /// The object store.
    pub fn s3(&self) -> &S3Server {
        &self.s3
    }

    /// The object store, to be killed and restarted.
    pub fn s3_mut(&mut self) -> &mut S3Server {
        &mut self.s3
    }

    /// The folder that the file server serves.
    pub fn files(&self) -> PathBuf {
        self.dir.join("files")
    }

    /// The address of the file server for the nodes; what follows it chooses the server's mood, as in `/plain/FILE`.
    pub fn http(&self) -> String {
        self.for_nodes(self.http.endpoint())
    }

    /// The address of the object store for the nodes.
    pub fn s3_endpoint(&self) -> String {
        self.for_nodes(&self.s3.endpoint())
    }

    /// This machine as the nodes know it.
    fn server(&self) -> Ipv4Addr {
        if self.network.is_some() { GATEWAY } else { Ipv4Addr::LOCALHOST }
    }

    fn for_nodes(&self, address: &str) -> String {
        address.replace("127.0.0.1", &self.server().to_string())
    }

    /// What the nodes are.
    pub fn kind(&self) -> NodeKind {
        if self.network.is_some() { NodeKind::Kernel } else { NodeKind::Namespace }
    }

    /// The path at which each node that is a mount namespace has a disk of its own: where pools of directories go.
    pub fn pool_path(&self, pool: &str) -> PathBuf {
        self.dir.join("disk").join(pool)
    }

    /// The nodes.
    pub fn nodes(&self) -> &[SiteNode] {
        &self.nodes
    }

    /// Node `index`, from 0, to be killed and restarted.
    pub fn node_mut(&mut self, index: usize) -> &mut SiteNode {
        &mut self.nodes[index]
    }

    /// Where the output of operator `index`, from 0, goes.
    pub fn operator_log(&self, index: usize) -> PathBuf {
        self.dir.join(format!("logs/operator-{}.log", index + 1))
    }

    /// The process id of operator `index`, from 0, while it runs.
    pub fn operator_pid(&self, index: usize) -> Option<u32> {
        self.operators[index].process.as_ref().filter(|process| process.is_running()).map(Process::pid)
    }

    /// Kills operator `index`, from 0 (SIGKILL).
    pub fn kill9_operator(&mut self, index: usize) {
        self.operators[index].process = None;
    }

    /// Starts operator `index`, from 0, again, unless it runs. Does not wait until it is ready.
    ///
    /// # Errors
    /// [`SiteError::Spawn`].
    pub fn start_operator(&mut self, index: usize) -> Result<(), SiteError> {
        let operator = &mut self.operators[index];
        if !operator.process.as_ref().is_some_and(Process::is_running) {
            operator.process = Some(operator.program.spawn()?);
        }
        Ok(())
    }

    /// Applies a manifest as the administrator.
    ///
    /// # Errors
    /// [`SiteError::Apply`].
    pub async fn apply(&self, manifest: &str) -> Result<Vec<DynamicObject>, SiteError> {
        Ok(self.cluster.apply_yaml(manifest).await?)
    }

    /// Makes namespace `namespace`, Secret `name` in it with the keys of the site's object store, and lets the nodes
    /// read it: what the owner of a namespace does once.
    ///
    /// # Errors
    /// [`SiteError`].
    pub async fn give_credentials(&self, namespace: &str, name: &str) -> Result<(), SiteError> {
        self.cluster.ensure_namespace(namespace).await?;
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret",
            "metadata": { "name": name, "namespace": namespace },
            "stringData": { "accessKeyId": self.s3.access_key(), "secretKey": self.s3.secret_key() },
        });
        self.apply(&secret.to_string()).await?;
        self.let_nodes_read(namespace, &[name]).await
    }

    /// Lets the nodes read these Secrets of a namespace, and none beside them.
    ///
    /// # Errors
    /// [`SiteError::Apply`].
    pub async fn let_nodes_read(&self, namespace: &str, secrets: &[&str]) -> Result<(), SiteError> {
        let named = json!({ "name": "berth-node-secrets", "namespace": namespace });
        let role = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": named,
            "rules": [{ "apiGroups": [""], "resources": ["secrets"], "resourceNames": secrets, "verbs": ["get"] }],
        });
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": named,
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "berth-node-secrets" },
            "subjects": [{ "kind": "ServiceAccount", "name": NODE_ACCOUNT, "namespace": SYSTEM_NAMESPACE }],
        });
        self.apply(&role.to_string()).await?;
        self.apply(&binding.to_string()).await?;
        Ok(())
    }

    /// Ends everything, agents first, and lets every loop device go. Returns the loop devices that stay.
    pub fn stop(mut self) -> Vec<Loop> {
        self.end_all(true);
        leaks::detach_loops_below(&self.dir)
    }

    /// Lets nodes with kernels of their own reach the servers of this site.
    fn expose(&self) -> Result<(), SiteError> {
        let Some(network) = &self.network else { return Ok(()) };
        network.expose(self.cluster.port())?;
        for address in [self.http.endpoint().to_owned(), self.s3.endpoint()] {
            let port = address.rsplit(':').next().and_then(|port| port.parse().ok());
            network.expose(port.ok_or(SiteError::Address { address })?)?;
        }
        Ok(())
    }

    /// The kinds, the accounts and their rights, and what nodes may write.
    async fn install(&self) -> Result<(), SiteError> {
        let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        self.cluster.install_crds(&tree.join("crds")).await?;
        for part in ["rbac/operator", "rbac/node", "admission/nodes-write-their-own"] {
            self.cluster.apply_file(&tree.join(format!("charts/berth/files/{part}.yaml"))).await?;
        }
        Ok(())
    }

    async fn add_operator(
        &mut self,
        number: usize,
        programs: &Programs,
        sabotage: Option<&(Saboteur, String)>,
    ) -> Result<(), SiteError> {
        let kubeconfig = self.cluster.service_account_kubeconfig(SYSTEM_NAMESPACE, OPERATOR_ACCOUNT).await?;
        let address = format!("127.0.0.1:{}", free_port().map_err(SiteError::Port)?);
        let name = format!("operator-{number}");
        let program = Program::new(&name, &programs.operator, &self.operator_log(number - 1))
            .args(["--identity", &name, "--metrics-addr", &address])
            .env("KUBECONFIG", kubeconfig);
        let program = sabotaged(logging(program), Saboteur::Operator, sabotage);
        let process = Some(program.spawn()?);
        self.operators.push(Operator { program, health: format!("http://{address}/readyz"), process });
        Ok(())
    }

    async fn add_node(
        &mut self,
        name: &str,
        programs: &Programs,
        sabotage: Option<&(Saboteur, String)>,
    ) -> Result<(), SiteError> {
        let kubeconfig =
            self.cluster.node_bound_kubeconfig(SYSTEM_NAMESPACE, NODE_ACCOUNT, name, self.server());
        let kubeconfig = kubeconfig.await?;
        let labels = BTreeMap::from([(NODE_LABEL, "yes"), ("kubernetes.io/hostname", name)]);
        let labels = json!({ "metadata": { "labels": labels } });
        let nodes: Api<Node> = Api::all(self.client());
        let patched = nodes.patch(name, &PatchParams::default(), &Patch::Merge(&labels)).await;
        patched.map_err(|source| SiteError::Node { node: name.to_owned(), source })?;
        let (network, program) = (self.network.as_ref(), &programs.node);
        let node = SiteNode::start(name, &self.dir, network, &kubeconfig, program, |program| {
            sabotaged(logging(program), Saboteur::Node, sabotage)
        });
        self.nodes.push(node.await?);
        Ok(())
    }

    async fn wait_ready(&self) -> Result<(), SiteError> {
        for operator in &self.operators {
            if let Some(process) = &operator.process {
                let probe = servers::OkProbe::new(&operator.health)?;
                process.wait_ready(READY_LIMIT, || probe.ask()).await?;
            }
        }
        for node in &self.nodes {
            node.wait_ready().await?;
        }
        Ok(())
    }

    fn end_all(&mut self, gently: bool) {
        for node in self.nodes.drain(..) {
            node.end(gently);
        }
        for operator in &mut self.operators {
            if let Some(mut process) = operator.process.take()
                && gently
            {
                // A process that cannot be waited for is gone already.
                process.stop(STOP_GRACE).ok();
            }
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.end_all(false);
        leaks::detach_loops_below(&self.dir);
    }
}

/// Log lines of our own programs at the level that helps when a test fails.
fn logging(program: Program) -> Program {
    let level = std::env::var_os("BERTH_SITE_LOG").unwrap_or_else(|| "info".into());
    program.env("RUST_LOG", level).env("NO_COLOR", "1")
}

fn sabotaged(program: Program, who: Saboteur, sabotage: Option<&(Saboteur, String)>) -> Program {
    match sabotage {
        Some((saboteur, name)) if *saboteur == who => program.env("BERTH_SABOTAGE", name),
        _ => program,
    }
}
