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
use berth_device::files::open_private;
use berth_device::nbd::{Attachment, BackendId, Nbd};

use super::kept::Kept;
use super::servers::{ServeError, ServerLine, ServerSpec, Servers, StateError};
use super::spec::Spec;
use super::stores::{self, HydrationOrder, StoreServerSpec};

/// In the keeper's folder: what is to be served, and who keeps it. Image stores are kept apart, because an earlier version knows
/// nothing of them.
const STATE: &str = "servers.json";
const STORES: &str = "stores.json";
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
    servers: BTreeMap<Uid, (Spec, Arc<Mutex<Kept>>)>,
    _alone: File,
}

impl Loaded {
    fn specs(&self) -> impl Iterator<Item = &Spec> {
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
            let kept = |spec: Spec| (spec.id().clone(), (spec.clone(), self.keep(spec)));
            let servers = read_state(&self.0.folder)?.into_iter().map(kept).collect();
            *loaded = Some(Loaded { servers, _alone: alone });
        }
        work(loaded.as_mut().expect("it was read just now"))
    }

    fn keep(&self, spec: Spec) -> Arc<Mutex<Kept>> {
        let folder = self.server_folder(spec.id());
        let kept = Arc::new(Mutex::new(Kept::new(spec, folder)));
        if self.0.watch == Watch::Always {
            let watched = Arc::downgrade(&kept);
            std::thread::spawn(move || watch(&watched));
        }
        kept
    }

    fn server_folder(&self, id: &Uid) -> PathBuf {
        self.0.folder.join(id.as_str())
    }

    fn find(&self, id: &Uid) -> Result<Option<Arc<Mutex<Kept>>>, StateError> {
        self.with(|loaded| Ok(loaded.servers.get(id).map(|(_, kept)| Arc::clone(kept))))
    }

    /// What is served under the id of `spec`, from now on if nothing was.
    fn find_or_keep(&self, spec: &Spec) -> Result<(Spec, Arc<Mutex<Kept>>), StateError> {
        self.with(|loaded| {
            if let Some(found) = loaded.servers.get(spec.id()) {
                return Ok(found.clone());
            }
            write_state(&self.0.folder, spec, loaded.specs().chain(std::iter::once(spec)))?;
            let kept = (spec.clone(), self.keep(spec.clone()));
            loaded.servers.insert(spec.id().clone(), kept.clone());
            Ok(kept)
        })
    }

    /// Serves what is kept under the id of `spec` as `spec` says from now on.
    fn change(&self, spec: &Spec) -> Result<(), StateError> {
        self.with(|loaded| {
            let others = loaded.specs().filter(|other| other.id() != spec.id());
            write_state(&self.0.folder, spec, others.chain(std::iter::once(spec)))?;
            if let Some((kept, _)) = loaded.servers.get_mut(spec.id()) {
                kept.clone_from(spec);
            }
            Ok(())
        })
    }
}

impl Servers for Keeper {
    fn serve(&self, server: &ServerSpec) -> Result<PathBuf, ServeError> {
        server.check()?;
        let wanted = Spec::Image(server.clone());
        let (spec, kept) = self.find_or_keep(&wanted)?;
        if spec != wanted {
            return Err(other_is_served(&spec));
        }
        let mut kept = lock(&kept);
        kept.ensure()?;
        Ok(kept.socket())
    }

    fn serve_store(&self, server: &StoreServerSpec) -> Result<PathBuf, ServeError> {
        server.check()?;
        let wanted = Spec::Store(Box::new(server.clone()));
        let (spec, kept) = self.find_or_keep(&wanted)?;
        if !spec.is_same_image(&wanted) {
            return Err(other_is_served(&spec));
        }
        let mut kept = lock(&kept);
        if spec != wanted {
            self.change(&wanted)?;
            kept.change(wanted)?;
        }
        kept.ensure()?;
        Ok(kept.socket())
    }

    fn order(&self, id: &Uid, order: Option<&HydrationOrder>) -> Result<(), ServeError> {
        if self.find(id)?.is_none() {
            let why = "it is not served".to_owned();
            return order.map_or(Ok(()), |_| Err(ServeError::Refused { id: id.clone(), why }));
        }
        Ok(stores::give_order(&self.server_folder(id), order)?)
    }

    fn serves_stores(&self) -> Result<(), ServeError> {
        Ok(())
    }

    fn stop(&self, id: &Uid) -> Result<(), ServeError> {
        let Some(kept) = self.find(id)? else { return Ok(()) };
        let mut kept = lock(&kept);
        if let Some(device) = connected(id) {
            return Err(ServeError::InUse { id: id.clone(), users: device.display().to_string() });
        }
        kept.stop()?;
        self.with(|loaded| {
            if let Some((gone, _)) = loaded.servers.get(id) {
                write_state(&self.0.folder, gone, loaded.specs().filter(|spec| spec.id() != id))?;
            }
            loaded.servers.remove(id);
            Ok(())
        })?;
        match fs::remove_dir_all(self.server_folder(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(server = %id, %error, "its folder stays");
            }
            _ => {}
        }
        Ok(())
    }

    fn list(&self) -> Result<Vec<ServerLine>, ServeError> {
        let all: Vec<_> = self.with(|loaded| Ok(loaded.servers.values().cloned().collect()))?;
        let line = |(spec, kept): (Spec, Arc<Mutex<Kept>>)| {
            let store = spec
                .is_store()
                .then(|| self.server_folder(spec.id()))
                .and_then(|folder| stores::status_in(&folder));
            let line = match kept.try_lock() {
                Ok(mut kept) => kept.line(),
                Err(_) => Kept::line_of_busy(&spec),
            };
            ServerLine { store, ..line }
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

fn read_state(folder: &Path) -> Result<Vec<Spec>, StateError> {
    let images: Vec<ServerSpec> = stores::read(&folder.join(STATE))?.unwrap_or_default();
    let stores: Vec<StoreServerSpec> = stores::read(&folder.join(STORES))?.unwrap_or_default();
    Ok(images
        .into_iter()
        .map(Spec::Image)
        .chain(stores.into_iter().map(|store| Spec::Store(Box::new(store))))
        .collect())
}

/// Writes the list that `changed` is in.
fn write_state<'a>(
    folder: &Path,
    changed: &Spec,
    specs: impl Iterator<Item = &'a Spec>,
) -> Result<(), StateError> {
    if changed.is_store() {
        let stores: Vec<_> = specs.filter_map(Spec::store).collect();
        return stores::write(&folder.join(STORES), &stores);
    }
    let images: Vec<_> = specs.filter_map(Spec::image).collect();
    stores::write(&folder.join(STATE), &images)
}

fn other_is_served(spec: &Spec) -> ServeError {
    let why = format!("{} is served under this id, in another way", spec.shown().display());
    ServeError::Refused { id: spec.id().clone(), why }
}
