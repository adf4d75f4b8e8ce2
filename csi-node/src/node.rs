//! What the agent and the CSI services of one node share.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use berth_api::staging_node::Versions;
use berth_core::ids::NodeName;
use berth_core::transfer::Staging;
use berth_core::units::{Bytes, Timestamp};
use berth_device::preflight::Preflight;
use berth_record::NodeRecord;
use kube::Client;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::agent::jobs::Jobs;
use crate::agent::news::News;
use crate::agent::pools::Pools;
use crate::agent::watches::Watches;
use crate::metrics::Metrics;
use crate::rpc::in_flight::InFlight;

/// Settings that do not change while the program runs.
#[derive(Clone, Debug)]
pub struct Config {
    /// The node's own directory.
    pub state_dir: PathBuf,
    /// Where pools are mounted.
    pub mount_root: PathBuf,
    /// The namespace of Berth's own objects.
    pub system_namespace: String,
    /// How many bytes a second of an image are fetched that nobody waits for, at most.
    pub hydration_rate: Bytes,
    /// Addresses that sources may have though they would be refused.
    pub allow_source_cidrs: Vec<String>,
    /// Whether sources are staged where nobody says.
    pub default_staging: Staging,
}

/// One node.
pub struct Node {
    /// Its name.
    pub name: NodeName,
    /// The API server.
    pub client: Client,
    /// Settings.
    pub config: Config,
    /// What the API server shows.
    pub watches: Watches,
    /// Open pools.
    pub pools: Pools,
    /// Long work.
    pub jobs: Jobs,
    /// What long work has to say.
    pub news: News,
    /// The agent's own record.
    pub record: Arc<NodeRecord>,
    /// Held from looking until the node's own object is written, so that an older report never follows a newer one.
    pub reporting: tokio::sync::Mutex<()>,
    /// The volumes on which a CSI call or an operation works.
    pub in_flight: InFlight,
    /// What the machine has and lacks.
    pub preflight: LastPreflight,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Rung whenever there may be something to do.
    pub wake: Arc<Notify>,
    /// Cancelled when the program ends.
    pub stop: CancellationToken,
}

/// The last look at what the machine has and lacks: looking starts programs, so it is not done for every report.
pub struct LastPreflight {
    host_root: PathBuf,
    last: RwLock<(Instant, Preflight)>,
}

/// For how long a look is good.
const PREFLIGHT_AGE: Duration = Duration::from_secs(300);

impl LastPreflight {
    /// Looks now, at a host whose root is `/`. Blocks for well under a second.
    pub fn take() -> Self {
        Self::take_at(PathBuf::from("/"))
    }

    /// The same where the host's root is somewhere else.
    pub fn take_at(host_root: PathBuf) -> Self {
        let last = RwLock::new((Instant::now(), Preflight::run_at(&host_root)));
        Self { host_root, last }
    }

    /// What was found.
    pub fn get(&self) -> Preflight {
        self.last.read().unwrap_or_else(PoisonError::into_inner).1.clone()
    }

    /// Looks again, if it was long ago. Blocks for well under a second.
    pub fn refresh(&self) {
        let old = self.last.read().unwrap_or_else(PoisonError::into_inner).0.elapsed() > PREFLIGHT_AGE;
        if old {
            let found = Preflight::run_at(&self.host_root);
            *self.last.write().unwrap_or_else(PoisonError::into_inner) = (Instant::now(), found);
        }
    }
}

/// What runs here, and what it runs on.
pub fn versions(preflight: &Preflight) -> Versions {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let qemu = preflight.checks.iter().find(|check| check.name == "qemu-img" && check.ok);
    Versions {
        agent: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: kernel.trim().to_owned(),
        qemu_img: qemu.map(|check| check.detail.clone()),
    }
}

/// The time, for decisions: they never read a clock themselves.
pub fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
