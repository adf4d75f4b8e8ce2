//! A real Kubernetes control plane as two processes of one test: etcd and kube-apiserver, on 127.0.0.1.
//!
//! It is what a client sees of Kubernetes: CRD validation and CEL, RBAC, watches, conflicts, server-side apply. What
//! needs kube-controller-manager does not happen: no garbage collection of owned objects, no finishing of a deleted
//! namespace, no `default` service accounts (made by [`Cluster::service_account_kubeconfig`] instead), no PV binder.
//! There are no nodes; Node objects may be created freely.
//!
//! etcd runs without fsync: its data survive the death of the process, not that of the machine.

mod apply;
mod identity;
mod pki;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::core::v1::Namespace;
use kube::api::PostParams;
use kube::{Api, Client};

pub use self::apply::ApplyError;
pub use self::identity::IdentityError;
pub use self::pki::{Pki, PkiError};
use crate::ports::free_port;
use crate::process::{Process, Program, ReadyError, SpawnError};
use crate::tools::{Tool, ToolUnavailable};
use crate::wait::{self, Look, WaitError};

/// The namespace that Berth's own objects live in.
pub const SYSTEM_NAMESPACE: &str = "berth-system";

/// How long a process may take to answer, on a machine that is busy compiling something else.
const READY_LIMIT: Duration = Duration::from_secs(90);

/// How long one process gets to end by itself.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// How often a start is tried with new ports when somebody else took one.
const ATTEMPTS: u32 = 3;

/// Why the control plane did not start, or did not come back.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// A program is missing; [`ToolUnavailable::is_missing_prerequisite`] says whether to skip the test.
    #[error(transparent)]
    Tool(#[from] ToolUnavailable),
    /// The certificates could not be made.
    #[error("failed to make the certificates of the control plane")]
    Pki(#[from] PkiError),
    /// A folder of the control plane could not be made.
    #[error("failed to make folder {path}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The machine has no free port.
    #[error("failed to find a free port")]
    Port(#[source] io::Error),
    /// A process could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// A process did not get ready; the message holds the end of its log.
    #[error(transparent)]
    Ready(#[from] ReadyError),
    /// A client for the administrator could not be made.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A client for the readiness probe could not be made.
    #[error("failed to make the client that probes readiness")]
    Probe(#[source] reqwest::Error),
    /// A namespace that every cluster has did not come about.
    #[error(transparent)]
    Namespace(#[from] WaitError<kube::Error>),
}

impl ClusterError {
    /// The missing prerequisite because of which a test is to be skipped, if that is what is wrong.
    pub fn missing_prerequisite(&self) -> Option<&ToolUnavailable> {
        match self {
            Self::Tool(tool) if tool.is_missing_prerequisite() => Some(tool),
            _ => None,
        }
    }
}

/// The programs of a control plane, found or built.
#[derive(Debug, Clone)]
struct Programs {
    etcd: PathBuf,
    apiserver: PathBuf,
}

/// Where the parts listen; unchanged over a restart, so that every kubeconfig stays valid.
#[derive(Debug, Clone, Copy)]
struct Ports {
    etcd: u16,
    etcd_peer: u16,
    apiserver: u16,
}

/// A running control plane. Dropping it kills its processes; the data stay in the folder it was given.
pub struct Cluster {
    // In this order: an API server without etcd takes long to end.
    apiserver: Option<Process>,
    etcd: Option<Process>,
    dir: PathBuf,
    programs: Programs,
    ports: Ports,
    pki: Pki,
    probe: reqwest::Client,
    admin: Client,
}

impl Cluster {
    /// Starts a control plane with all its data in `dir`, ready in seconds: the namespaces `default` and
    /// `berth-system` exist when this returns. Missing programs are built first, which takes minutes, once.
    ///
    /// Assumes a Tokio runtime that lives as long as the cluster is used: the administrator's client works on it.
    ///
    /// # Errors
    /// [`ClusterError`].
    pub async fn start(dir: &Path) -> Result<Self, ClusterError> {
        let programs = tokio::task::spawn_blocking(|| -> Result<Programs, ToolUnavailable> {
            Ok(Programs { etcd: Tool::Etcd.obtain()?, apiserver: Tool::KubeApiserver.obtain()? })
        })
        .await
        .expect("obtaining a tool does not panic")?;
        fs::create_dir_all(dir).map_err(|source| ClusterError::Folder { path: dir.to_owned(), source })?;
        let pki = Pki::create(&dir.join("pki"))?;
        let mut attempt = 1;
        loop {
            match Self::try_start(dir, &programs, &pki).await {
                Err(ClusterError::Ready(error)) if error.is_port_race() && attempt < ATTEMPTS => attempt += 1,
                outcome => return outcome,
            }
        }
    }

    async fn try_start(dir: &Path, programs: &Programs, pki: &Pki) -> Result<Self, ClusterError> {
        let port = || free_port().map_err(ClusterError::Port);
        let ports = Ports { etcd: port()?, etcd_peer: port()?, apiserver: port()? };
        let config = identity::write_admin_kubeconfig(dir, pki, ports.apiserver)?;
        let authority = reqwest::Certificate::from_pem(pki.authority_pem().as_bytes());
        let authority = authority.map_err(ClusterError::Probe)?;
        let probe = reqwest::Client::builder().no_proxy().tls_certs_only([authority]);
        let mut cluster = Self {
            apiserver: None,
            etcd: None,
            dir: dir.to_owned(),
            programs: programs.clone(),
            ports,
            pki: pki.clone(),
            probe: probe.timeout(Duration::from_secs(5)).build().map_err(ClusterError::Probe)?,
            admin: identity::client(&config).await?,
        };
        cluster.restart().await?;
        cluster.ensure_namespace(SYSTEM_NAMESPACE).await?;
        Ok(cluster)
    }

    /// Starts whatever of the control plane does not run, on the data and ports it had, and waits until all of it is
    /// ready and `default` exists.
    ///
    /// # Errors
    /// [`ClusterError`]; a port that somebody took meanwhile shows as [`ClusterError::Ready`].
    pub async fn restart(&mut self) -> Result<(), ClusterError> {
        if !self.etcd.as_ref().is_some_and(Process::is_running) {
            self.etcd = Some(self.etcd_program().spawn()?);
        }
        self.wait_for(self.etcd.as_ref(), &format!("http://127.0.0.1:{}/health", self.ports.etcd)).await?;
        if !self.apiserver.as_ref().is_some_and(Process::is_running) {
            self.apiserver = Some(self.apiserver_program().spawn()?);
        }
        self.wait_for(self.apiserver.as_ref(), &format!("{}/readyz", self.url())).await?;
        let namespaces: Api<Namespace> = Api::all(self.admin.clone());
        wait::until("namespace default", READY_LIMIT, || async {
            match namespaces.get_opt("default").await {
                Ok(Some(_)) => Look::Done(()),
                Ok(None) => Look::NotYet("it does not exist".to_owned()),
                Err(error) => Look::NotYet(error.to_string()),
            }
        })
        .await?;
        Ok(())
    }

    /// Kills etcd (SIGKILL). Until [`Cluster::restart`] the API server answers with errors or not at all.
    pub fn kill_etcd(&mut self) {
        self.etcd = None;
    }

    /// Kills the API server (SIGKILL), until [`Cluster::restart`].
    pub fn kill_apiserver(&mut self) {
        self.apiserver = None;
    }

    /// Ends both processes; the data stay.
    pub fn stop(mut self) {
        for mut process in [self.apiserver.take(), self.etcd.take()].into_iter().flatten() {
            // A process that cannot be waited for is gone already.
            process.stop(STOP_GRACE).ok();
        }
    }

    /// A client with all rights.
    pub fn admin(&self) -> Client {
        self.admin.clone()
    }

    /// The address of the API server, as kubeconfigs have it.
    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.ports.apiserver)
    }

    /// The port of 127.0.0.1 on which the API server listens.
    pub fn port(&self) -> u16 {
        self.ports.apiserver
    }

    /// The folder of etcd's data: copied while etcd is down, it is a backup that a test can restore.
    pub fn etcd_data(&self) -> PathBuf {
        self.dir.join("etcd")
    }

    /// Creates a namespace unless it exists.
    ///
    /// # Errors
    /// [`WaitError`], when that does not succeed in time or is refused.
    pub async fn ensure_namespace(&self, name: &str) -> Result<(), WaitError<kube::Error>> {
        let namespaces: Api<Namespace> = Api::all(self.admin.clone());
        let mut namespace = Namespace::default();
        namespace.metadata.name = Some(name.to_owned());
        wait::until(&format!("namespace {name}"), READY_LIMIT, || async {
            match namespaces.create(&PostParams::default(), &namespace).await {
                Ok(_) => Look::Done(()),
                Err(kube::Error::Api(status)) if status.is_already_exists() => Look::Done(()),
                Err(error) if apply::is_transient(&error) => Look::NotYet(error.to_string()),
                Err(error) => Look::Failed(error),
            }
        })
        .await
    }

    /// Waits until `process` answers 200 at `url`.
    async fn wait_for(&self, process: Option<&Process>, url: &str) -> Result<(), ReadyError> {
        let process = process.expect("restart has started it");
        process
            .wait_ready(READY_LIMIT, || async {
                let answer = self.probe.get(url).send().await.map_err(|error| format!("{error:?}"))?;
                if answer.status().is_success() { Ok(()) } else { Err(answer.status().to_string()) }
            })
            .await
    }

    fn etcd_program(&self) -> Program {
        let client = format!("http://127.0.0.1:{}", self.ports.etcd);
        let peer = format!("http://127.0.0.1:{}", self.ports.etcd_peer);
        Program::new("etcd", &self.programs.etcd, &self.dir.join("etcd.log"))
            .args(["--name=berth", "--unsafe-no-fsync", "--log-level=warn"])
            .args([format!("--data-dir={}", self.etcd_data().display())])
            .args([format!("--listen-client-urls={client}"), format!("--advertise-client-urls={client}")])
            .args([format!("--listen-peer-urls={peer}"), format!("--initial-advertise-peer-urls={peer}")])
            .args([format!("--initial-cluster=berth={peer}")])
    }

    fn apiserver_program(&self) -> Program {
        let file = |flag: &str, name: &str| format!("--{flag}={}", self.pki.file(name).display());
        Program::new("kube-apiserver", &self.programs.apiserver, &self.dir.join("apiserver.log"))
            .args([format!("--etcd-servers=http://127.0.0.1:{}", self.ports.etcd)])
            .args(["--bind-address=127.0.0.1", "--advertise-address=127.0.0.1"])
            .args([format!("--secure-port={}", self.ports.apiserver)])
            .args([file("client-ca-file", "ca.crt"), file("tls-cert-file", "apiserver.crt")])
            .args([file("tls-private-key-file", "apiserver.key")])
            .args(["--service-account-issuer=https://kubernetes.default.svc"])
            .args([file("service-account-key-file", "service-account.pub")])
            .args([file("service-account-signing-key-file", "service-account.key")])
            .args(["--service-cluster-ip-range=10.96.0.0/16", "--allow-privileged=true"])
            .args(["--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"])
            // Waits for the service account controller, which does not run here.
            .args(["--disable-admission-plugins=ServiceAccount"])
            // There is no node that could reach the Service `kubernetes`, so nobody maintains its endpoints.
            .args(["--endpoint-reconciler-type=none", "--profiling=false"])
    }
}
