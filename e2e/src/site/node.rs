//! A node of a site: what it is, and the agent that runs on it.

mod guest;
mod namespace;
mod started;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use self::guest::Guest;
use self::namespace::Namespace;
pub use self::started::Started;
use super::servers::OkProbe;
use super::{READY_LIMIT, STOP_GRACE, SiteError};
use crate::csi::{Address, Csi};
use crate::kernel::{KernelHost, KernelNetwork};
use crate::leaks;
use crate::process::Program;

/// How long a CSI call that may succeed later is repeated.
const CSI_LIMIT: Duration = Duration::from_secs(120);

/// What the nodes of a site are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeKind {
    /// Mount namespaces on the kernel of this machine.
    Namespace,
    /// Hosts with a kernel of their own.
    Kernel,
}

/// Where everything is on a node, and how it is reached from this machine.
struct Layout {
    state: PathBuf,
    mounts: PathBuf,
    csi_socket: PathBuf,
    csi: Address,
    /// Where the agent is asked whether it is ready, from here.
    health: String,
    /// Where it listens for that.
    metrics: String,
    /// The addresses that the site's servers have for the node.
    servers: &'static str,
}

/// What a node is.
enum Ground {
    Namespace(Namespace),
    Guest(Guest),
}

impl Ground {
    fn start_program(&self, program: &Program) -> Result<Started, SiteError> {
        match self {
            Self::Namespace(namespace) => namespace.start_program(program),
            Self::Guest(guest) => guest.start_program(program),
        }
    }

    fn run(&self, words: &[OsString], input: &[u8]) -> Result<Vec<u8>, SiteError> {
        match self {
            Self::Namespace(namespace) => namespace.run(words, input),
            Self::Guest(guest) => guest.run(words, input),
        }
    }
}

/// A node. Dropping it kills its agent, and what it is goes with all that is in it.
pub struct SiteNode {
    name: String,
    dir: PathBuf,
    layout: Layout,
    program: Program,
    /// What was mounted before the agent ran for the first time.
    mounted: Vec<PathBuf>,
    // In this order: the agent before what it runs on.
    agent: Option<Started>,
    ground: Ground,
}

impl SiteNode {
    /// Makes a namespace, or a host if there is a network for it, and starts the agent in it.
    pub(super) async fn start(
        name: &str,
        site: &Path,
        network: Option<&KernelNetwork>,
        kubeconfig: &Path,
        program: &Path,
        finish: impl FnOnce(Program) -> Program,
    ) -> Result<Self, SiteError> {
        let (dir, logs) = (site.join("nodes").join(name), site.join("logs"));
        let shared = dir.join("kubelet");
        fs::create_dir_all(&shared).map_err(|source| SiteError::Folder { path: shared.clone(), source })?;
        let (ground, layout) = match network {
            None => {
                let (namespace, layout) = Namespace::start(name, &dir, site).await?;
                (Ground::Namespace(namespace), layout)
            }
            Some(network) => {
                let (guest, layout) = Guest::start(name, &dir, [shared, logs.clone()], network).await?;
                (Ground::Guest(guest), layout)
            }
        };
        let program = Program::new(name, program, &logs.join(format!("{name}.log")))
            .args(["agent", "--node-name", name, "--metrics-addr", &layout.metrics])
            .args([Path::new("--state-dir"), &layout.state, Path::new("--mount-root"), &layout.mounts])
            .args([Path::new("--csi-socket"), &layout.csi_socket])
            // Where this site's servers are.
            .args(["--allow-source-cidr", layout.servers])
            .env("KUBECONFIG", kubeconfig);
        let program = finish(program);
        let mut node =
            Self { name: name.to_owned(), dir, layout, program, mounted: Vec::new(), agent: None, ground };
        node.mounted = node.all_mounts()?;
        node.start_agent()?;
        Ok(node)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is, in one line.
    pub fn description(&self) -> String {
        match &self.ground {
            Ground::Namespace(_) => format!("{}: a mount namespace of this machine", self.name),
            Ground::Guest(guest) => format!("{}: {}", self.name, guest.host().description()),
        }
    }

    /// Where the agent's output goes.
    pub fn log(&self) -> PathBuf {
        self.program.log().to_owned()
    }

    /// The socket of its CSI services, as the node sees it.
    pub fn csi_socket(&self) -> &Path {
        &self.layout.csi_socket
    }

    /// A client of its CSI services, as kubelet and external-provisioner.
    pub fn csi(&self) -> Csi {
        Csi::new(&self.name, &self.layout.csi, CSI_LIMIT)
    }

    /// Kubelet's folder: the node and this machine see the same there, but not what is mounted in it.
    pub fn kubelet(&self) -> PathBuf {
        self.dir.join("kubelet")
    }

    /// Where kubelet would have a volume staged.
    pub fn staging_path(&self, volume: &str) -> PathBuf {
        self.kubelet().join("plugins").join(volume).join("globalmount")
    }

    /// Where kubelet would have a volume published for a pod.
    pub fn target_path(&self, volume: &str) -> PathBuf {
        self.kubelet().join("pods").join(volume).join("mount")
    }

    /// Where a pool is mounted, as the node sees it.
    pub fn pool_root(&self, pool: &str) -> PathBuf {
        self.layout.mounts.join(pool)
    }

    /// The disk that a pool may have, as a node with a kernel of its own sees it.
    pub fn pool_device(&self) -> Option<PathBuf> {
        self.guest().map(Guest::pool_device)
    }

    /// How `nsenter` goes to a node that is a namespace.
    pub fn namespace_argument(&self) -> Option<String> {
        match &self.ground {
            Ground::Namespace(namespace) => Some(namespace.argument()),
            Ground::Guest(_) => None,
        }
    }

    /// Runs a command on the node to its end, which must be a good one; returns what it printed.
    ///
    /// # Errors
    /// [`SiteError::Run`], [`SiteError::Command`].
    pub fn run<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(&self, words: I) -> Result<Vec<u8>, SiteError> {
        let words: Vec<OsString> = words.into_iter().map(|word| word.as_ref().to_owned()).collect();
        self.ground.run(&words, b"")
    }

    /// Starts a program on the node. Its log must be in kubelet's folder or beside the agent's.
    ///
    /// # Errors
    /// [`SiteError::Spawn`], [`SiteError::Command`].
    pub fn start_program(&self, program: &Program) -> Result<Started, SiteError> {
        self.ground.start_program(program)
    }

    /// The content of a file of the node.
    ///
    /// # Errors
    /// Like [`Self::run`].
    pub fn read(&self, path: &Path) -> Result<Vec<u8>, SiteError> {
        self.run([OsStr::new("cat"), path.as_os_str()])
    }

    /// Writes a file of the node, to its disk.
    ///
    /// # Errors
    /// Like [`Self::run`].
    pub fn write(&self, path: &Path, content: &[u8]) -> Result<(), SiteError> {
        let words = ["sh", "-c", r#"cat >"$1" && sync "$1""#, "sh"].map(OsString::from);
        let words: Vec<OsString> = words.into_iter().chain([path.into()]).collect();
        self.ground.run(&words, content).map(drop)
    }

    /// The names in a folder of the node, in order.
    ///
    /// # Errors
    /// Like [`Self::run`].
    pub fn names(&self, path: &Path) -> Result<Vec<String>, SiteError> {
        let listed = self.run([OsStr::new("ls"), OsStr::new("-A"), path.as_os_str()])?;
        Ok(String::from_utf8_lossy(&listed).lines().map(str::to_owned).collect())
    }

    /// What is mounted on the node beside what was before its agent ran for the first time, in order.
    ///
    /// # Errors
    /// Like [`Self::run`].
    pub fn mounts(&self) -> Result<Vec<PathBuf>, SiteError> {
        let mut before = self.mounted.clone();
        let mut now = self.all_mounts()?;
        now.retain(|path| match before.iter().position(|known| known == path) {
            Some(at) => {
                before.swap_remove(at);
                false
            }
            None => true,
        });
        Ok(now)
    }

    fn all_mounts(&self) -> Result<Vec<PathBuf>, SiteError> {
        let text = self.read(Path::new("/proc/self/mountinfo"))?;
        Ok(leaks::mount_points(&String::from_utf8_lossy(&text)))
    }

    /// The agent's process id on this machine while it runs; the agent of a guest has none.
    pub fn pid(&self) -> Option<u32> {
        self.agent.as_ref().filter(|agent| agent.is_running()).and_then(Started::pid)
    }

    /// Kills the agent with its children (SIGKILL); mounts stay, as on a real node.
    pub fn kill9(&mut self) {
        self.agent = None;
    }

    /// Starts the agent again, unless it runs. Does not wait until it is ready.
    ///
    /// # Errors
    /// [`SiteError::Spawn`], [`SiteError::Command`].
    pub fn start_agent(&mut self) -> Result<(), SiteError> {
        if !self.agent.as_ref().is_some_and(Started::is_running) {
            self.agent = Some(self.ground.start_program(&self.program)?);
        }
        Ok(())
    }

    /// Waits until the agent says that it is ready.
    ///
    /// # Errors
    /// [`SiteError::Server`], [`SiteError::Ready`], with the end of its log.
    pub async fn wait_ready(&self) -> Result<(), SiteError> {
        if let Some(agent) = &self.agent {
            let probe = OkProbe::new(&self.layout.health)?;
            agent.wait_ready(READY_LIMIT, || probe.ask()).await?;
        }
        Ok(())
    }

    /// What its agent serves at `/metrics`.
    ///
    /// # Errors
    /// [`SiteError::Server`], [`SiteError::Run`].
    pub async fn metrics(&self) -> Result<String, SiteError> {
        let url = self.layout.health.replace("/readyz", "/metrics");
        let failed = |said| SiteError::Run { node: self.name.clone(), command: format!("GET {url}"), said };
        OkProbe::new(&url)?.text().await.map_err(failed)
    }

    /// Cuts the power of a node with a kernel of its own: everything on it is gone when this returns, but its disks.
    ///
    /// # Errors
    /// [`SiteError::NoPower`].
    pub fn cut_power(&mut self) -> Result<(), SiteError> {
        let Ground::Guest(guest) = &mut self.ground else {
            return Err(SiteError::NoPower { node: self.name.clone() });
        };
        guest.cut();
        self.agent = None;
        Ok(())
    }

    /// Boots it again, and starts its agent.
    ///
    /// # Errors
    /// [`SiteError::NoPower`], [`SiteError::Boot`], [`SiteError::Command`].
    pub async fn boot_again(&mut self) -> Result<(), SiteError> {
        let Ground::Guest(guest) = &mut self.ground else {
            return Err(SiteError::NoPower { node: self.name.clone() });
        };
        guest.boot_again().await?;
        self.start_agent()
    }

    /// The host that it is, if it is one.
    pub fn host(&self) -> Option<&KernelHost> {
        self.guest().map(Guest::host)
    }

    fn guest(&self) -> Option<&Guest> {
        match &self.ground {
            Ground::Namespace(_) => None,
            Ground::Guest(guest) => Some(guest),
        }
    }

    pub(super) fn end(mut self, gently: bool) {
        if let Some(agent) = self.agent.take()
            && gently
        {
            agent.stop(STOP_GRACE);
        }
    }
}
