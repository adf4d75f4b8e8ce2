//! Keeps servers of images running: starts them, starts those anew that die, and gives their devices the new connection.
//!
//! What is to be served is on the disk before a server is started, so whoever comes after a killed keeper knows it. A
//! server is in a control group of its own that is named after its id; there a later keeper finds it, alive, and takes it
//! over, or starts another in its place. The devices wait meanwhile.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::Duration;

use berth_core::ids::Uid;
use berth_device::files::{self, open_private};
use berth_device::nbd::{Attachment, BackendId, Nbd};

use super::kept::Kept;
use super::servers::{ServeError, ServerLine, ServerSpec, Servers, StateError};

/// In the keeper's folder: what is to be served, and who keeps it.
const STATE: &str = "servers.json";
const LOCK: &str = "lock";
/// How often a server is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// How long is waited at most until one that cannot be started is tried again.
const MOST_PAUSE: Duration = Duration::from_secs(5);

/// Whether servers are looked at all the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// In threads of their own: for a process that stays.
    Always,
    /// Only when asked for one: for a command. The servers outlive it.
    WhenAsked,
}

/// Runs servers as children of this process.
#[derive(Clone)]
pub struct Keeper(Arc<Inner>);

struct Inner {
    folder: PathBuf,
    watch: Watch,
    loaded: Mutex<Option<Loaded>>,
}

struct Loaded {
    /// The description beside it: one that is worked on for long must not hold up the others.
    servers: BTreeMap<Uid, (ServerSpec, Arc<Mutex<Kept>>)>,
    _alone: File,
}

impl Loaded {
    fn specs(&self) -> impl Iterator<Item = &ServerSpec> {
        self.servers.values().map(|(spec, _)| spec)
    }
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").field("folder", &self.0.folder).field("watch", &self.0.watch).finish()
    }
}

impl Keeper {
    /// Of the servers in this folder. Nothing is read or made before it is needed.
    pub fn new(folder: &Path, watch: Watch) -> Self {
        Self(Arc::new(Inner { folder: folder.to_owned(), watch, loaded: Mutex::default() }))
    }

    /// Takes over what an earlier keeper has left. Its servers are looked at in the background.
    ///
    /// # Errors
    /// [`StateError::Locked`] while another process does it.
    pub fn start(&self) -> Result<(), StateError> {
        self.with(|_| Ok(()))
    }

    /// Does something with the list, which is read first if it was not.
    fn with<T>(&self, work: impl FnOnce(&mut Loaded) -> Result<T, StateError>) -> Result<T, StateError> {
        let mut loaded = self.0.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if loaded.is_none() {
            let alone = lock_folder(&self.0.folder)?;
            let specs = read_state(&self.0.folder.join(STATE))?;
            let kept = |spec: ServerSpec| (spec.id.clone(), (spec.clone(), self.keep(spec)));
            let servers = specs.into_iter().map(kept).collect();
            *loaded = Some(Loaded { servers, _alone: alone });
        }
        work(loaded.as_mut().expect("it was read just now"))
    }

    fn keep(&self, spec: ServerSpec) -> Arc<Mutex<Kept>> {
        let folder = self.0.folder.join(spec.id.as_str());
        let kept = Arc::new(Mutex::new(Kept::new(spec, folder)));
        if self.0.watch == Watch::Always {
            let watched = Arc::downgrade(&kept);
            std::thread::spawn(move || watch(&watched));
        }
        kept
    }

    fn find(&self, id: &Uid) -> Result<Option<Arc<Mutex<Kept>>>, StateError> {
        self.with(|loaded| Ok(loaded.servers.get(id).map(|(_, kept)| Arc::clone(kept))))
    }

    /// What is served under the id of `spec`, from now on if nothing was.
    fn find_or_keep(&self, spec: &ServerSpec) -> Result<(ServerSpec, Arc<Mutex<Kept>>), StateError> {
        self.with(|loaded| {
            if let Some(found) = loaded.servers.get(&spec.id) {
                return Ok(found.clone());
            }
            let specs: Vec<_> = loaded.specs().chain(std::iter::once(spec)).collect();
            write_state(&self.0.folder.join(STATE), &specs)?;
            let kept = (spec.clone(), self.keep(spec.clone()));
            loaded.servers.insert(spec.id.clone(), kept.clone());
            Ok(kept)
        })
    }
}

impl Servers for Keeper {
    fn serve(&self, server: &ServerSpec) -> Result<PathBuf, ServeError> {
        server.check()?;
        let (spec, kept) = self.find_or_keep(server)?;
        if spec != *server {
            let why = format!("{} is served under this id, in another way", spec.image.display());
            return Err(ServeError::Refused { id: server.id.clone(), why });
        }
        let mut kept = lock(&kept);
        kept.ensure()?;
        Ok(kept.socket())
    }

    fn stop(&self, id: &Uid) -> Result<(), ServeError> {
        let Some(kept) = self.find(id)? else { return Ok(()) };
        let mut kept = lock(&kept);
        if let Some(device) = connected(id) {
            return Err(ServeError::InUse { id: id.clone(), users: device.display().to_string() });
        }
        kept.stop()?;
        self.with(|loaded| {
            let specs: Vec<_> = loaded.specs().filter(|spec| spec.id != *id).collect();
            write_state(&self.0.folder.join(STATE), &specs)?;
            loaded.servers.remove(id);
            Ok(())
        })?;
        match fs::remove_dir_all(self.0.folder.join(id.as_str())) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(server = %id, %error, "its folder stays");
            }
            _ => {}
        }
        Ok(())
    }

    fn list(&self) -> Result<Vec<ServerLine>, ServeError> {
        let all: Vec<_> = self.with(|loaded| Ok(loaded.servers.values().cloned().collect()))?;
        let line = |(spec, kept): (ServerSpec, Arc<Mutex<Kept>>)| match kept.try_lock() {
            Ok(mut kept) => kept.line(),
            Err(_) => Kept::line_of_busy(spec),
        };
        Ok(all.into_iter().map(line).collect())
    }
}

/// Looks at a server until nobody keeps it any more.
fn watch(kept: &Weak<Mutex<Kept>>) {
    let mut pause = LOOK;
    while let Some(kept) = kept.upgrade() {
        // One that is worked on is looked at by whoever does.
        let looked = match kept.try_lock() {
            Ok(mut kept) => kept.ensure_if_kept(),
            Err(TryLockError::Poisoned(kept)) => kept.into_inner().ensure_if_kept(),
            Err(TryLockError::WouldBlock) => Ok(()),
        };
        drop(kept);
        pause = match looked {
            Ok(()) => LOOK,
            Err(_) => (pause * 2).min(MOST_PAUSE), // it was told
        };
        std::thread::sleep(pause);
    }
}

fn lock(kept: &Mutex<Kept>) -> MutexGuard<'_, Kept> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The device that carries this id. None where there is no kernel NBD.
fn connected(id: &Uid) -> Option<PathBuf> {
    let id = BackendId::new(id).ok()?;
    let mut nbd = Nbd::open().ok()?;
    Attachment::find(&mut nbd, &id).ok()?.map(|device| device.path())
}

fn lock_folder(folder: &Path) -> Result<File, StateError> {
    fs::create_dir_all(folder).map_err(StateError::io(folder))?;
    // The servers' user goes through it to a folder of its own.
    fs::set_permissions(folder, fs::Permissions::from_mode(0o711)).map_err(StateError::io(folder))?;
    let path = folder.join(LOCK);
    let file = open_private(&path).map_err(StateError::io(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(StateError::Locked { folder: folder.to_owned() }),
        Err(fs::TryLockError::Error(error)) => Err(StateError::io(&path)(error)),
    }
}

fn read_state(path: &Path) -> Result<Vec<ServerSpec>, StateError> {
    match fs::read(path) {
        Ok(text) => serde_json::from_slice(&text)
            .map_err(|error| StateError::Unreadable { path: path.to_owned(), reason: error.to_string() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(StateError::io(path)(error)),
    }
}

fn write_state(path: &Path, specs: &[&ServerSpec]) -> Result<(), StateError> {
    let text = serde_json::to_vec_pretty(specs)
        .map_err(|error| StateError::Unreadable { path: path.to_owned(), reason: error.to_string() })?;
    Ok(files::write_durably(path, &text)?)
}
