//! The areas that are open on this node, each with its record.

mod error;
mod known;
mod life;
mod open_pool;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use berth_core::ids::{NodeName, PoolName};
use berth_core::reason::Reason;
use berth_record::{OpenError, PoolRecord, ReadError, tables};

pub use self::error::PoolError;
pub use self::known::PoolSpec;
use self::known::{Known, KnownPools};
pub use self::open_pool::OpenPool;
use crate::area::{self, Area, Place, templates};
use crate::supervisor::DataPlane;
use crate::supervisor::keeper::Watch;
use crate::telemetry::chain;

/// The open pools, and why others are not.
pub struct Pools {
    node: NodeName,
    mount_root: PathBuf,
    state_dir: PathBuf,
    known: KnownPools,
    data_plane: DataPlane,
    open: Mutex<BTreeMap<PoolName, Arc<OpenPool>>>,
    failed: Mutex<BTreeMap<PoolName, (Reason, String)>>,
    /// Held while a pool is opened, let go or deleted.
    life: Mutex<()>,
}

/// A pool that is not open though it was before.
#[derive(Clone, Debug)]
pub struct UnopenedPool {
    /// Its name.
    pub name: PoolName,
    /// What it was opened by.
    pub spec: PoolSpec,
    /// Why it is not open, if that was tried.
    pub failure: Option<(Reason, String)>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pools {
    /// None open yet. Devices are suspended and images served by this process, as a command does it.
    pub fn new(node: NodeName, mount_root: PathBuf, state_dir: &Path) -> Self {
        let data_plane = DataPlane::in_process(&state_dir.join("servers"), Watch::WhenAsked);
        Self {
            node,
            mount_root,
            state_dir: state_dir.to_owned(),
            known: KnownPools::in_dir(state_dir),
            data_plane,
            open: Mutex::default(),
            failed: Mutex::default(),
            life: Mutex::default(),
        }
    }

    /// The same, with devices suspended and images served by somebody else.
    #[must_use = "it is the same set of pools"]
    pub fn with_data_plane(self, data_plane: DataPlane) -> Self {
        Self { data_plane, ..self }
    }

    /// By whom devices are suspended and images served.
    pub fn data_plane(&self) -> &DataPlane {
        &self.data_plane
    }

    /// The pool of this name, if its area is open.
    pub fn get(&self, name: &PoolName) -> Option<Arc<OpenPool>> {
        locked(&self.open).get(name).cloned()
    }

    /// All open ones.
    pub fn all(&self) -> Vec<Arc<OpenPool>> {
        locked(&self.open).values().cloned().collect()
    }

    /// Those that are not open though they were before, or are `wanted`: what lies in them is not known.
    pub fn unopened(
        &self,
        wanted: impl IntoIterator<Item = PoolName>,
    ) -> Result<BTreeSet<PoolName>, PoolError> {
        let mut names: BTreeSet<PoolName> = self.known.read()?.into_keys().chain(wanted).collect();
        names.retain(|name| self.get(name).is_none());
        Ok(names)
    }

    /// Those that are not open though they were before, with what they were opened by.
    pub fn closed(&self) -> Result<Vec<UnopenedPool>, PoolError> {
        let known = self.known.read()?.into_iter().filter(|(name, _)| self.get(name).is_none());
        let closed =
            known.map(|(name, known)| UnopenedPool { failure: self.failure(&name), spec: known.spec, name });
        Ok(closed.collect())
    }

    /// True if no cluster asked for the pool, so that nobody but a person decides about it.
    pub fn is_local(&self, name: &PoolName) -> Result<bool, PoolError> {
        Ok(self.known.get(name)?.is_some_and(|known| known.local))
    }

    /// Why the pool's area could not be opened when that was last tried.
    pub fn failure(&self, name: &PoolName) -> Option<(Reason, String)> {
        locked(&self.failed).get(name).cloned()
    }

    /// The directories that ever held an area of this node.
    pub fn directories(&self) -> Result<Vec<PathBuf>, PoolError> {
        self.known.directories()
    }

    /// The node's own directory.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// Where the areas of pools are mounted.
    pub fn mount_root(&self) -> &Path {
        &self.mount_root
    }

    /// Opens the pools that were open before, so that volumes can be served while the API server is away. One that
    /// fails is tried again once the API server shows it. Blocks.
    pub fn reopen_known(&self) -> Result<(), PoolError> {
        self.data_plane.resume_left_behind();
        for (name, known) in self.known.read()? {
            if known.destroying {
                continue; // what is left of it is not to be opened
            }
            if let Err(error) = self.prepare(&name, &known.spec) {
                tracing::warn!(pool = %name, error = chain(&error), "pool not reopened");
            }
        }
        Ok(())
    }

    /// Makes or opens a pool's area and its record. Blocks, for as long as making a file system takes.
    pub fn prepare(&self, name: &PoolName, spec: &PoolSpec) -> Result<(), PoolError> {
        let _life = locked(&self.life);
        self.prepare_as(name, spec, false)
    }

    /// `local`: it is not asked for by a cluster.
    fn prepare_as(&self, name: &PoolName, spec: &PoolSpec, local: bool) -> Result<(), PoolError> {
        if self.get(name).is_some() {
            return Ok(());
        }
        let result = self.try_prepare(name, spec, local);
        self.note(name, &result);
        result
    }

    /// Remembers why a pool is not open.
    fn note(&self, name: &PoolName, result: &Result<(), PoolError>) {
        let mut failed = locked(&self.failed);
        match result {
            Ok(()) => drop(failed.remove(name)),
            Err(error) => drop(failed.insert(name.clone(), (error.reason(), chain(error)))),
        }
    }

    fn try_prepare(&self, name: &PoolName, spec: &PoolSpec, local: bool) -> Result<(), PoolError> {
        // A pool that has taken over an area is served from there: the API knows nothing of it.
        let known = self.known.get(name)?;
        if let Some(other) = known.as_ref().filter(|known| known.spec.uid != spec.uid) {
            // Made anew, its devices would be wiped if that was ever agreed to: a person introduces it first.
            let found = Box::new(other.spec.clone());
            return Err(PoolError::Different { pool: name.clone(), found });
        }
        if known.as_ref().is_some_and(|known| known.destroying) {
            return Err(PoolError::BeingDestroyed { pool: name.clone() });
        }
        let area_uid = spec.area.clone().or_else(|| known.as_ref()?.spec.area.clone());
        let spec = PoolSpec { area: area_uid.filter(|area| *area != spec.uid), ..spec.clone() };
        self.require_free(name, spec.area())?;
        let local = known.as_ref().map_or(local, |known| known.local);
        let area = area::open(&self.place(name, &spec, known.is_some()), &spec.backend)
            .map_err(|source| in_area(name, source))?;
        let record = self.open_record(name, &spec, &*area);
        self.serve(name, &spec, area, record, local)
    }

    /// Starts an area under its record, and has it served from then on. Whatever fails, what is in use stays in use.
    fn serve(
        &self,
        name: &PoolName,
        spec: &PoolSpec,
        area: Box<dyn Area>,
        record: Result<PoolRecord, PoolError>,
        local: bool,
    ) -> Result<(), PoolError> {
        let leave = |area: &dyn Area, attached: Option<&BTreeSet<_>>| {
            // What is in use keeps it mounted, and is served from there again once it can be opened.
            if let Err(busy) = area.leave(attached) {
                tracing::warn!(pool = %name, error = chain(&busy), "area stays mounted");
            }
        };
        let record = record.inspect_err(|_| leave(&*area, None))?;
        templates::restore(&record, &self.data_plane); // before what starts from them
        if let Err(source) = area.start(&record) {
            let attached = record.record().entries(tables::ATTACHMENTS);
            let attached: Option<BTreeSet<_>> =
                attached.ok().map(|all| all.into_iter().map(|(uid, _)| uid).collect());
            drop(record);
            leave(&*area, attached.as_ref());
            return Err(in_area(name, source));
        }
        self.known.put(name, Known { spec: spec.clone(), local, destroying: false })?;
        let pool = OpenPool::new(name.clone(), spec.clone(), area, record);
        locked(&self.open).insert(name.clone(), Arc::new(pool));
        tracing::info!(pool = %name, "pool open");
        Ok(())
    }

    fn place(&self, name: &PoolName, spec: &PoolSpec, known: bool) -> Place {
        Place {
            area: spec.area().clone(),
            name: name.clone(),
            node: self.node.clone(),
            mount_point: self.mount_root.join(name.as_str()),
            known,
            data_plane: self.data_plane.clone(),
        }
    }

    /// The record is made before anything else in an area, so one that is missing beside data is lost.
    fn open_record(
        &self,
        name: &PoolName,
        spec: &PoolSpec,
        area: &dyn Area,
    ) -> Result<PoolRecord, PoolError> {
        let path = record_path(area);
        let identity = berth_record::PoolIdentity {
            pool_uid: spec.uid.clone(),
            pool_name: name.clone(),
            node: self.node.clone(),
            pool_id: uuid::Uuid::new_v4().to_string(),
            area: spec.area.clone(),
            made_of: serde_json::to_value(&spec.backend).ok(),
        };
        match PoolRecord::open(&path, Some(&identity.owner())) {
            Err(OpenError::NotFound { .. }) => {}
            other => return other.map_err(|source| PoolError::Record { pool: name.clone(), source }),
        }
        if area.holds_data().map_err(|source| in_area(name, source))? {
            return Err(PoolError::RecordGone { pool: name.clone(), path });
        }
        PoolRecord::create(&path, identity)
            .map_err(|source| PoolError::NewRecord { pool: name.clone(), source })
    }
}

fn record_path(area: &dyn Area) -> PathBuf {
    area.root().join("record.redb")
}

fn in_area(pool: &PoolName, source: area::AreaError) -> PoolError {
    PoolError::Area { pool: pool.clone(), source: Box::new(source) }
}

fn unread(pool: &PoolName) -> impl Fn(ReadError) -> PoolError {
    |source| PoolError::Read { pool: pool.clone(), source }
}
