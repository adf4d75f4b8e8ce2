//! `berth-node agent`: everything of one node, started and stopped together.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use berth_core::ids::NodeName;
use berth_record::{NodeRecord, OpenError};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config as KubeConfig};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::agent::jobs::Jobs;
use crate::agent::news::News;
use crate::agent::pools::Pools;
use crate::agent::watches::Watches;
use crate::agent::{self, asked, heartbeat, sources};
use crate::args::{AgentArgs, SuperviseArgs};
use crate::metrics::{self, Metrics};
use crate::node::{Config, LastPreflight, Node};
use crate::node_lock::{LockError, NodeLock};
use crate::rpc::in_flight::InFlight;
use crate::rpc::{self, Services};
use crate::supervisor::keeper::Watch;
use crate::supervisor::{self, DataPlane};

/// How long jobs may take to reach their next checkpoint when the program ends.
const DRAIN: Duration = Duration::from_secs(8);

/// How long the agent waits at its start for a command that has the pools open.
const COMMANDS: Duration = Duration::from_secs(10);

/// Runs until SIGTERM or SIGINT, or until a part fails. Mounts and loop devices stay: volumes outlive the plugin.
pub async fn agent(args: AgentArgs) -> anyhow::Result<()> {
    sources::address_policy(&args.allow_source_cidrs).context("--allow-source-cidr")?;
    let stop = CancellationToken::new();
    let _alone = alone(&args.directories.state_dir).await?;
    let node = node(&args, stop.clone()).await?;
    let mut parts = JoinSet::new();
    parts.spawn({
        let (node, stop) = (Arc::clone(&node), stop.clone());
        async move { metrics::serve(node, args.metrics_addr, stop).await.context("metrics") }
    });
    parts.spawn({
        let (carrier, stop) = (Arc::new(asked::Agent(Arc::clone(&node))), stop.clone());
        let socket = asked::socket(&args.directories.state_dir);
        async move { asked::serve(carrier, socket, stop).await.context("operations") }
    });
    let endpoint = args.kubelet_socket.clone().unwrap_or_else(|| args.csi_socket.clone());
    parts.spawn({
        let (services, stop) = (Services::new(Arc::clone(&node)), stop.clone());
        async move { rpc::serve(services, args.csi_socket, stop).await.context("csi services") }
    });
    if let Some(directory) = args.registration_dir.clone() {
        let stop = stop.clone();
        parts.spawn(async move { rpc::register(directory, endpoint, stop).await.context("registration") });
    }
    // A node whose agent has ended must not go on to renew its Lease.
    let mut working = JoinSet::new();
    working.spawn(heartbeat::run(Arc::clone(&node)));
    working.spawn(agent::run(Arc::clone(&node)));
    let ended = tokio::select! {
        ended = wait_for_the_end(&stop, &mut parts) => ended,
        Some(Err(panic)) = working.join_next() => Err(panic).context("agent"),
    };
    stop.cancel();
    node.jobs.drain(DRAIN).await;
    if tokio::time::timeout(DRAIN, working.join_all()).await.is_err() {
        tracing::warn!("the last step is cut off");
    }
    tracing::info!("stopped");
    ended
}

/// `berth-node supervise`: until it is told to stop. What it serves goes on, and is taken over by the next one.
pub async fn supervise(args: SuperviseArgs, stop: CancellationToken) -> anyhow::Result<()> {
    supervisor::serve::serve(&args.socket, &args.run_dir, stop).await.context("supervisor")
}

/// The node's lock, for the agent's life. A command that runs may end first.
async fn alone(state_dir: &Path) -> Result<NodeLock, LockError> {
    let until = Instant::now() + COMMANDS;
    loop {
        match NodeLock::take(state_dir, "berth-node agent") {
            Err(LockError::Held { .. }) if Instant::now() < until => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            taken => return taken,
        }
    }
}

/// Returns on a signal, or when a part has ended, with its failure.
async fn wait_for_the_end(
    stop: &CancellationToken,
    parts: &mut JoinSet<anyhow::Result<()>>,
) -> anyhow::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => tracing::info!("asked to end"),
        _ = interrupt.recv() => tracing::info!("interrupted"),
        () = stop.cancelled() => {}
        Some(ended) = parts.join_next() => return ended?,
    }
    Ok(())
}

async fn node(args: &AgentArgs, stop: CancellationToken) -> anyhow::Result<Arc<Node>> {
    for directory in [&args.directories.state_dir, &args.directories.mount_root] {
        std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    }
    let directories = &args.directories;
    let record = open_record(&directories.state_dir, &args.node_name)?;
    let data_plane =
        DataPlane::choose(args.supervisor_socket.as_deref(), &directories.state_dir, Watch::Always);
    let pools = Pools::new(args.node_name.clone(), directories.mount_root.clone(), &directories.state_dir);
    let pools = pools.with_data_plane(data_plane);
    let host_root = args.host_root.clone();
    let (pools, preflight) = tokio::task::spawn_blocking(move || {
        pools.data_plane().await_supervisor();
        let reopened = pools.reopen_known();
        reopened.map(|()| (pools, LastPreflight::take_at(host_root)))
    })
    .await??;
    let client = client(args.kubeconfig.as_deref()).await?;
    let wake = Arc::new(Notify::new());
    let watches =
        Watches::start(&client, &args.node_name, &args.system_namespace, Arc::clone(&wake), stop.clone());
    Ok(Arc::new(Node {
        name: args.node_name.clone(),
        client,
        config: Config {
            state_dir: args.directories.state_dir.clone(),
            mount_root: args.directories.mount_root.clone(),
            system_namespace: args.system_namespace.clone(),
            hydration_rate: args.hydration_rate,
            allow_source_cidrs: args.allow_source_cidrs.clone(),
            default_staging: args.default_staging.into(),
        },
        watches,
        pools,
        jobs: Jobs::new(Arc::clone(&wake), stop.clone()),
        news: News::default(),
        record: Arc::new(record),
        reporting: tokio::sync::Mutex::default(),
        in_flight: InFlight::default(),
        preflight,
        metrics: Arc::new(Metrics::default()),
        wake,
        stop,
    }))
}

fn open_record(state_dir: &Path, node: &NodeName) -> anyhow::Result<NodeRecord> {
    let path = state_dir.join("node.redb");
    match NodeRecord::open(&path, node) {
        Err(OpenError::NotFound { .. }) => Ok(NodeRecord::create(&path, node)?),
        other => Ok(other?),
    }
}

async fn client(kubeconfig: Option<&Path>) -> anyhow::Result<Client> {
    let config = match kubeconfig {
        Some(path) => {
            let file =
                Kubeconfig::read_from(path).with_context(|| format!("cannot read {}", path.display()))?;
            KubeConfig::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?
        }
        None => KubeConfig::infer().await.context("no API server is configured")?,
    };
    Ok(Client::try_from(config)?)
}

/// Runs a command that ends soon after its token is cancelled, which SIGINT and SIGTERM do.
pub async fn until_interrupted<T, F: Future<Output = anyhow::Result<T>>>(
    work: impl FnOnce(CancellationToken) -> F,
) -> anyhow::Result<T> {
    let stop = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let work = work(stop.clone());
    tokio::pin!(work);
    tokio::select! {
        outcome = &mut work => return outcome,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    stop.cancel();
    work.await
}
