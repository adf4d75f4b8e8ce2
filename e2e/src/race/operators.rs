//! Two operators as processes that can be killed and come back.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cluster::{Cluster, ClusterError, IdentityError};
use crate::ours::{BuildError, OPERATOR, OPERATOR_SABOTAGE};
use crate::ports::free_port;
use crate::process::{Process, Program, ReadyError, SpawnError};

/// How long an operator may take until it has seen everything.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// Why an operator does not run.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// It could not be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// It could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// It did not get ready.
    #[error(transparent)]
    Ready(#[from] ReadyError),
    /// It has no kubeconfig.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Its rights could not be granted.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The machine has no free port.
    #[error("failed to find a free port")]
    Port(#[source] std::io::Error),
}

/// One operator.
pub struct Operator {
    /// What it is called in field managers.
    pub identity: String,
    program: Program,
    port: u16,
    process: Process,
    /// Conflicts met by its killed predecessors.
    conflicts_before: u64,
}

impl Operator {
    /// Starts an operator under the operator's own service account, which must have its rights.
    ///
    /// # Errors
    /// [`OperatorError`].
    pub async fn start(
        cluster: &Cluster,
        dir: &Path,
        identity: &str,
        sabotage: Option<&str>,
    ) -> Result<Self, OperatorError> {
        let ours = if sabotage.is_some() { OPERATOR_SABOTAGE } else { OPERATOR };
        let built = tokio::task::spawn_blocking(move || ours.obtain()).await;
        let path: PathBuf = built.expect("building does not panic")?;
        Self::start_program(cluster, dir, identity, &path, sabotage).await
    }

    /// The same, with a program that is there already.
    ///
    /// # Errors
    /// [`OperatorError`].
    pub async fn start_program(
        cluster: &Cluster,
        dir: &Path,
        identity: &str,
        path: &Path,
        sabotage: Option<&str>,
    ) -> Result<Self, OperatorError> {
        let kubeconfig = cluster.service_account_kubeconfig("berth-system", "berth-operator").await?;
        let port = free_port().map_err(OperatorError::Port)?;
        let mut program = Program::new(identity, path, &dir.join(format!("{identity}.log")))
            .args(["--identity", identity, "--kubeconfig"])
            .args([&kubeconfig])
            .args([format!("--metrics-addr=127.0.0.1:{port}")])
            .env("NO_PROXY", "127.0.0.1")
            .env("no_proxy", "127.0.0.1");
        if let Some(name) = sabotage {
            program = program.env("BERTH_SABOTAGE", name);
        }
        let process = program.spawn()?;
        Ok(Self { identity: identity.to_owned(), program, port, process, conflicts_before: 0 })
    }

    /// Waits until it has seen every list.
    ///
    /// # Errors
    /// [`OperatorError::Ready`].
    pub async fn wait_ready(&self) -> Result<(), OperatorError> {
        let url = format!("http://127.0.0.1:{}/readyz", self.port);
        let client = client();
        let probe = || async {
            let answer = client.get(&url).send().await.map_err(|error| error.to_string())?;
            if answer.status().is_success() { Ok(()) } else { Err(answer.status().to_string()) }
        };
        Ok(self.process.wait_ready(READY_LIMIT, probe).await?)
    }

    /// Kills it (SIGKILL). What it had counted is read before.
    pub async fn kill(&mut self) {
        self.conflicts_before = self.conflicts().await;
        // It is gone either way.
        self.process.kill9().ok();
    }

    /// Starts it again.
    ///
    /// # Errors
    /// [`OperatorError::Spawn`].
    pub fn restart(&mut self) -> Result<(), OperatorError> {
        self.process = self.program.spawn()?;
        Ok(())
    }

    /// Ledger conflicts that it and its predecessors have met, by its own metrics.
    pub async fn conflicts(&self) -> u64 {
        let text = self.metrics().await;
        let value =
            |line: &str| line.strip_prefix("berth_ledger_conflicts_total")?.rsplit(' ').next()?.parse().ok();
        let now = text.lines().find_map(value);
        self.conflicts_before + now.unwrap_or(0_u64)
    }

    /// Its metrics; empty if it does not answer.
    pub async fn metrics(&self) -> String {
        let url = format!("http://127.0.0.1:{}/metrics", self.port);
        match client().get(&url).send().await {
            Ok(answer) => answer.text().await.unwrap_or_default(),
            Err(_) => String::new(),
        }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        self.process.log_tail()
    }
}

fn client() -> reqwest::Client {
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(2)).build();
    client.expect("a client without TLS settings can be made")
}
