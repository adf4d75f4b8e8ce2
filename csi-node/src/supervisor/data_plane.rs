//! By whom devices are suspended and images served.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use berth_core::ids::Uid;
use berth_device::nbd::Slots;
use berth_device::thin::{InProcess, Suspender};

use super::client::Client;
use super::keeper::{Keeper, Watch};
use super::servers::Servers;

/// How long a supervisor that is starting is waited for.
const START_LIMIT: Duration = Duration::from_secs(10);

/// By whom devices are suspended and images served, for everything of one process.
#[derive(Clone, Debug)]
pub struct DataPlane {
    suspender: Arc<dyn Suspender>,
    servers: Arc<dyn Servers>,
    slots: Arc<Mutex<Slots>>,
    told: Arc<Mutex<BTreeMap<Uid, String>>>,
    /// Where there is one; then only it resumes what it finds suspended.
    supervisor: Option<Client>,
}

impl DataPlane {
    /// By this process: for commands, and where a plugin is all there is. A process that is killed while a device is
    /// suspended leaves it so until the next one starts. Servers outlive it; what belongs to them lies in `folder`.
    pub fn in_process(folder: &Path, watch: Watch) -> Self {
        Self {
            suspender: Arc::new(InProcess),
            servers: Arc::new(Keeper::new(folder, watch)),
            slots: Arc::default(),
            told: Arc::default(),
            supervisor: None,
        }
    }

    /// By the supervisor at this socket. What it does not answer is not done.
    pub fn supervised(socket: &Path) -> Self {
        let client = Client::new(socket);
        Self {
            suspender: Arc::new(client.clone()),
            servers: Arc::new(client.clone()),
            slots: Arc::default(),
            told: Arc::default(),
            supervisor: Some(client),
        }
    }

    /// Who suspends devices.
    pub fn suspender(&self) -> Arc<dyn Suspender> {
        Arc::clone(&self.suspender)
    }

    /// By the supervisor at this socket, or without one by this process, which keeps what it serves in mind in `state_dir`. A
    /// supervisor that answers at its usual place is never worked against.
    pub fn choose(supervisor: Option<&Path>, state_dir: &Path, watch: Watch) -> Self {
        let usual = Path::new(super::SOCKET);
        match supervisor {
            Some(socket) => Self::supervised(socket),
            None if usual.exists() && Client::new(usual).hello().is_ok() => Self::supervised(usual),
            None => Self::in_process(&state_dir.join("servers"), watch),
        }
    }

    /// True if a supervisor does it, whose servers are kept when this process ends.
    pub fn is_supervised(&self) -> bool {
        self.supervisor.is_some()
    }

    /// Who serves images.
    pub fn servers(&self) -> &dyn Servers {
        &*self.servers
    }

    /// Which NBD devices are not to be used. Held while a template is attached or detached: one at a time.
    pub(crate) fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if this is another trouble with a template than the last one, so that it is worth a line in the log.
    pub(crate) fn is_news(&self, template: &Uid, trouble: Option<&str>) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match trouble {
            Some(text) => told.insert(template.clone(), text.to_owned()),
            None => told.remove(template),
        };
        before.as_deref() != trouble
    }

    /// Resumes what an earlier process has left suspended, unless that is the supervisor's to do: it alone knows what it has
    /// suspended this very moment. Blocks.
    pub fn resume_left_behind(&self) {
        if self.supervisor.is_none() {
            crate::area::resume_suspended();
        }
    }

    /// Waits a few seconds for a supervisor that is starting. Says so if it does not answer; what needs it fails then.
    pub fn await_supervisor(&self) {
        let Some(client) = &self.supervisor else { return };
        let deadline = Instant::now() + START_LIMIT;
        while let Err(error) = client.hello() {
            if Instant::now() >= deadline {
                tracing::error!(error, socket = %client.socket().display(), "no supervisor");
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}
