//! A node of a site: a mount namespace of its own, and the agent that runs in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::servers::wait_for_ok;
use super::{READY_LIMIT, STOP_GRACE, SiteError};
use crate::csi::Csi;
use crate::leaks;
use crate::ports::free_port;
use crate::process::{Process, Program};

/// How long a CSI call that may succeed later is repeated.
const CSI_LIMIT: Duration = Duration::from_secs(120);

/// Gives the node a disk of its own at the path that all nodes share, then stays to hold the namespace.
const HOLD: &str = r#"mount --bind "$1" "$2" && echo held && exec sleep infinity"#;

/// A node. Dropping it kills its agent and all its mounts vanish with the namespace.
pub struct SiteNode {
    name: String,
    dir: PathBuf,
    health: String,
    program: Program,
    // In this order: the agent before the namespace.
    agent: Option<Process>,
    namespace: Option<Process>,
}

impl SiteNode {
    pub(super) async fn start(
        name: &str,
        site: &Path,
        kubeconfig: &Path,
        program: &Path,
        finish: impl FnOnce(Program) -> Program,
    ) -> Result<Self, SiteError> {
        let dir = site.join("nodes").join(name);
        let shared = site.join("disk");
        for path in
            [dir.join("disk"), dir.join("state"), dir.join("mounts"), dir.join("kubelet"), shared.clone()]
        {
            fs::create_dir_all(&path).map_err(|source| SiteError::Folder { path, source })?;
        }
        let namespace =
            Program::new(name, Path::new("unshare"), &site.join(format!("logs/{name}.namespace.log")))
                .args(["--mount", "--propagation", "private", "sh", "-c", HOLD, "sh"])
                .args([dir.join("disk"), shared])
                .spawn()?;
        let held = || {
            std::future::ready(if namespace.log_tail().ends_with("held") {
                Ok(())
            } else {
                Err("not held".to_owned())
            })
        };
        namespace.wait_ready(READY_LIMIT, held).await?;
        let address = format!("127.0.0.1:{}", free_port().map_err(SiteError::Port)?);
        let program = Program::new(name, Path::new("nsenter"), &site.join(format!("logs/{name}.log")))
            .args([format!("--mount=/proc/{}/ns/mnt", namespace.pid())])
            .args([Path::new("--"), program])
            .args(["agent", "--node-name", name, "--metrics-addr", &address])
            .args([
                Path::new("--state-dir"),
                &dir.join("state"),
                Path::new("--mount-root"),
                &dir.join("mounts"),
            ])
            .args([Path::new("--csi-socket"), &dir.join("csi.sock")])
            // Where this site's servers are.
            .args(["--allow-source-cidr", "127.0.0.0/8"])
            .env("KUBECONFIG", kubeconfig);
        let program = finish(program);
        let agent = Some(program.spawn()?);
        let health = format!("http://{address}/readyz");
        Ok(Self { name: name.to_owned(), dir, health, program, agent, namespace: Some(namespace) })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the agent's output goes.
    pub fn log(&self) -> PathBuf {
        self.dir.join(format!("../../logs/{}.log", self.name))
    }

    /// The socket of its CSI services.
    pub fn csi_socket(&self) -> PathBuf {
        self.dir.join("csi.sock")
    }

    /// A client of its CSI services, as kubelet and external-provisioner.
    pub fn csi(&self) -> Csi {
        Csi::new(&self.name, &self.csi_socket(), CSI_LIMIT)
    }

    /// Where kubelet would have a volume staged.
    pub fn staging_path(&self, volume: &str) -> PathBuf {
        self.dir.join("kubelet/plugins").join(volume).join("globalmount")
    }

    /// Where kubelet would have a volume published for a pod.
    pub fn target_path(&self, volume: &str) -> PathBuf {
        self.dir.join("kubelet/pods").join(volume).join("mount")
    }

    /// How a path of the node is reached from outside its namespace.
    pub fn inside(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.namespace_pid()));
        root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The process that holds its namespace: `nsenter --mount=/proc/PID/ns/mnt` goes there.
    pub fn namespace_pid(&self) -> u32 {
        self.namespace.as_ref().map_or(0, Process::pid)
    }

    /// Where a pool is mounted, as the node sees it.
    pub fn pool_root(&self, pool: &str) -> PathBuf {
        self.dir.join("mounts").join(pool)
    }

    /// What is mounted in the node below the site's folder, in order.
    pub fn mounts(&self) -> Vec<PathBuf> {
        let site = self.dir.parent().and_then(Path::parent).unwrap_or(&self.dir);
        let all = leaks::mounts(&self.namespace_pid().to_string());
        all.into_iter().filter(|path| path.starts_with(site)).collect()
    }

    /// The agent's process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.agent.as_ref().filter(|agent| agent.is_running()).map(Process::pid)
    }

    /// The agent's process, to be signalled or looked at.
    pub fn agent(&mut self) -> Option<&mut Process> {
        self.agent.as_mut()
    }

    /// Kills the agent with its children (SIGKILL); mounts stay, as on a real node.
    pub fn kill9(&mut self) {
        self.agent = None;
    }

    /// Starts the agent again, unless it runs. Does not wait until it is ready.
    ///
    /// # Errors
    /// [`SiteError::Spawn`].
    pub fn start_agent(&mut self) -> Result<(), SiteError> {
        if self.pid().is_none() {
            self.agent = Some(self.program.spawn()?);
        }
        Ok(())
    }

    /// Waits until the agent says that it is ready.
    ///
    /// # Errors
    /// [`SiteError::Server`], with the end of its log.
    pub async fn wait_ready(&self) -> Result<(), SiteError> {
        if let Some(agent) = &self.agent {
            wait_for_ok(agent, &self.health).await?;
        }
        Ok(())
    }

    pub(super) fn end(&mut self, gently: bool) {
        if let Some(mut agent) = self.agent.take()
            && gently
        {
            // A process that cannot be waited for is gone already.
            agent.stop(STOP_GRACE).ok();
        }
        self.namespace = None;
    }
}
