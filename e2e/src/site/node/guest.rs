//! A node that is a host with a kernel of its own ([`crate::kernel`]): it has the device mapper, and a power that can be cut.
//!
//! Its agent's own files lie on a disk that it keeps from boot to boot, and a second disk is there for a pool. Kubelet's folder
//! and the logs are shared with this machine, at the same paths. What listens on this machine's 127.0.0.1 for the nodes is
//! reached through the gateway of their network; the other way round, a relay in the guest makes the socket of its CSI services
//! reachable.

use std::ffi::{OsStr, OsString};
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::started::Job;
use super::{Layout, SiteError, Started};
use crate::csi::Address;
use crate::kernel::{GIB, KernelHost, KernelNetwork, MIB, NETWORK, Running};
use crate::process::Program;

/// What the agent has there; the most of it is mapped files of the machine.
const MEMORY: u64 = GIB;

/// The disk of the agent's own files.
const STATE: &str = "state";
const STATE_BYTES: u64 = 256 * MIB;
/// Where it is mounted.
const STATE_PATH: &str = "/var/lib/berth";

/// The disk that a pool may have.
const POOL: &str = "pool";
/// Its size: what a pool with two kernel pools takes, and some images and volumes.
const POOL_BYTES: u64 = 4 * GIB;

const CSI_SOCKET: &str = "/run/csi.sock";
const CSI_PORT: u16 = 7000;
const METRICS_PORT: u16 = 8081;

/// Passes connections to a port on to a socket of the guest.
const RELAY: &str = include_str!("../../../kernel/relay.pl");

/// Appends the output of a program to its log, in place of the files that the harness has for a command.
const LOGGED: &str = r#"exec >>"$1" 2>&1; shift; exec "$@""#;

/// How long the relay may take to listen.
const RELAY_LIMIT: Duration = Duration::from_secs(30);

/// The guest. Dropping it cuts its power.
pub struct Guest {
    host: Arc<KernelHost>,
    /// Of the present boot.
    relay: Option<Running>,
}

impl Guest {
    /// Boots it, with disks of its own in `dir`.
    pub async fn start(
        name: &str,
        dir: &Path,
        shares: [PathBuf; 2],
        network: &KernelNetwork,
    ) -> Result<(Self, Layout), SiteError> {
        let mut builder = KernelHost::at(&dir.join("host")).name(name).memory(MEMORY).network(network);
        for path in &shares {
            builder = builder.share(path);
        }
        let builder = builder.disk(STATE, STATE_BYTES).disk(POOL, POOL_BYTES);
        let host = blocking(move || -> Result<KernelHost, SiteError> {
            let host = builder.boot()?;
            host.run([OsStr::new("mkfs.ext4"), OsStr::new("-q"), host.device(STATE).as_os_str()])?;
            Ok(host)
        });
        let mut guest = Self { host: Arc::new(host.await?), relay: None };
        guest.prepare().await?;
        let address = guest.host.address().expect("it was given a link");
        let reach = |port| network.reach(SocketAddrV4::new(address, port));
        let layout = Layout {
            state: Path::new(STATE_PATH).join("state"),
            mounts: Path::new(STATE_PATH).join("pools"),
            csi_socket: CSI_SOCKET.into(),
            csi: Address::Relay(reach(CSI_PORT)?),
            health: format!("http://{}/readyz", reach(METRICS_PORT)?),
            metrics: format!("0.0.0.0:{METRICS_PORT}"),
            servers: NETWORK,
        };
        Ok((guest, layout))
    }

    /// The host.
    pub fn host(&self) -> &KernelHost {
        &self.host
    }

    /// The disk that a pool may have, as the node sees it.
    pub fn pool_device(&self) -> PathBuf {
        self.host.device(POOL)
    }

    /// Cuts its power.
    pub fn cut(&mut self) {
        self.relay = None;
        self.host.cut();
    }

    /// Boots it again after that.
    pub async fn boot_again(&mut self) -> Result<(), SiteError> {
        let host = Arc::clone(&self.host);
        blocking(move || host.boot_again()).await?;
        self.prepare().await
    }

    /// What a boot script does: the disk of the agent, and the relay.
    async fn prepare(&mut self) -> Result<(), SiteError> {
        let host = Arc::clone(&self.host);
        let relay = blocking(move || -> Result<Running, SiteError> {
            let device = host.device(STATE);
            host.shell(&format!("mkdir -p {STATE_PATH}; mount {} {STATE_PATH}", device.display()))?;
            let port = CSI_PORT.to_string();
            let relay = host.start(["perl", "-e", RELAY, port.as_str(), CSI_SOCKET])?;
            let deadline = Instant::now() + RELAY_LIMIT;
            while relay.stdout()?.is_empty() && !relay.ends_within(Duration::from_millis(50)) {
                if Instant::now() >= deadline {
                    break;
                }
            }
            if relay.stdout()?.is_empty() {
                let said = String::from_utf8_lossy(&relay.stderr()?).into_owned();
                return Err(SiteError::Run {
                    node: host.name().to_owned(),
                    command: "the relay".to_owned(),
                    said,
                });
            }
            Ok(relay)
        });
        self.relay = Some(relay.await?);
        Ok(())
    }

    /// Starts a program there; its log must lie in a shared folder.
    pub fn start_program(&self, program: &Program) -> Result<Started, SiteError> {
        let before =
            ["sh", "-c", LOGGED, "sh"].map(OsStr::new).into_iter().chain([program.log().as_os_str()]);
        let mut command = self.host.command(before.chain(program.words()));
        for (name, value) in program.variables() {
            command = command.env(name, value);
        }
        let (name, log) = (program.name().to_owned(), program.log().to_owned());
        Ok(Started::Job(Job { name, log, running: command.start()? }))
    }

    /// Runs a command there to its end.
    pub fn run(&self, words: &[OsString], input: &[u8]) -> Result<Vec<u8>, SiteError> {
        Ok(self.host.command(words).input(input).run()?.stdout)
    }
}

/// Runs something that blocks.
async fn blocking<T: Send + 'static, E: Into<SiteError> + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, SiteError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.expect("work on a host does not panic").map_err(Into::into)
}
