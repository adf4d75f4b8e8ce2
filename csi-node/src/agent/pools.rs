//! The areas that are open on this node, each with its record.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use berth_core::ids::{NodeName, PoolName, Uid};
use berth_core::reason::Reason;
use berth_core::units::Generation;
use berth_device::files::{self, FileError};
use berth_record::{
    ChangeError, CreateError, LedgerPosition, OpenError, PoolRecord, PromiseEntry, ReadError, tables,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::area::templates::{self, TemplateError};
use crate::area::{self, Area, AreaError, Backend, Place};
use crate::sabotage;
use crate::supervisor::DataPlane;
use crate::supervisor::keeper::Watch;

/// Why a pool's area cannot be used.
#[derive(Debug, Error)]
pub enum PoolError {
    /// The area itself.
    #[error("the area of pool {pool} cannot be opened")]
    Area {
        /// The pool.
        pool: PoolName,
        /// Why.
        source: Box<AreaError>,
    },
    /// Its record.
    #[error("the record of pool {pool} cannot be opened")]
    Record {
        /// The pool.
        pool: PoolName,
        /// Why.
        source: OpenError,
    },
    /// Its record could not be made.
    #[error("the record of pool {pool} cannot be made")]
    NewRecord {
        /// The pool.
        pool: PoolName,
        /// Why.
        source: CreateError,
    },
    /// The area holds data and no record: what lies there is not known, so nothing is done with it.
    #[error("the area of pool {pool} holds data but its record {path} is gone")]
    RecordGone {
        /// The pool.
        pool: PoolName,
        /// The record.
        path: PathBuf,
    },
    /// A template of it cannot be let go.
    #[error("a template of pool {pool} stays")]
    Template {
        /// The pool.
        pool: PoolName,
        /// Why.
        source: Box<TemplateError>,
    },
    /// A call or a job still works in it.
    #[error("pool {pool} is in use")]
    InUse {
        /// The pool.
        pool: PoolName,
    },
    /// The list of known pools.
    #[error("the list of pools cannot be written")]
    Known(#[from] FileError),
    /// The list of known pools.
    #[error("the list of pools {path} cannot be read: {reason}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl PoolError {
    /// The machine-readable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Area { source, .. } => source.reason(),
            Self::Template { source, .. } => source.reason(),
            Self::Record { source: OpenError::WrongOwner { .. }, .. } => Reason::InUseByPool,
            _ => Reason::PoolAreaFailed,
        }
    }
}

/// What is needed to open a pool again without the API server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolSpec {
    /// The UID of the `StagingPool`.
    pub uid: Uid,
    /// What it is made of.
    #[serde(flatten)]
    pub backend: Backend,
}

/// An open area.
pub struct OpenPool {
    /// The pool.
    pub name: PoolName,
    /// What it was opened by.
    pub spec: PoolSpec,
    /// The area.
    pub area: Box<dyn Area>,
    /// Its record.
    pub record: PoolRecord,
    /// What the defect `no-record` keeps from the record.
    unrecorded: Mutex<Unrecorded>,
}

/// Promises that are obeyed without being recorded: a defect, chosen in test builds only.
#[derive(Default)]
struct Unrecorded {
    position: LedgerPosition,
    promises: BTreeMap<Uid, PromiseEntry>,
}

impl OpenPool {
    /// Records that the ledger at this position is obeyed, with these promises.
    pub fn obey(
        &self,
        position: &LedgerPosition,
        promises: &[(Uid, PromiseEntry)],
    ) -> Result<(), ChangeError> {
        if !sabotage::active(sabotage::NO_RECORD) {
            return self.record.obey(position, promises);
        }
        let mut kept = self.unrecorded();
        kept.position = position.clone();
        kept.promises.extend(promises.iter().cloned());
        Ok(())
    }

    /// Records that the bytes of a promise are gone.
    pub fn released(&self, holder: &Uid, generation: Generation) -> Result<(), ChangeError> {
        match self.unrecorded().promises.get_mut(holder) {
            Some(promise) => promise.released = true,
            None => self.record.promise_released(holder, generation)?,
        }
        Ok(())
    }

    /// Forgets a released promise.
    pub fn forget(&self, holder: &Uid) -> Result<(), ChangeError> {
        if self.unrecorded().promises.remove(holder).is_some() {
            return Ok(());
        }
        self.record.forget_promise(holder)
    }

    /// Where in its ledger's history the node is, and the promises that it knows.
    pub fn promises(&self) -> Result<(LedgerPosition, BTreeMap<Uid, PromiseEntry>), ReadError> {
        let mut position = self.record.ledger_position()?;
        let mut promises: BTreeMap<Uid, PromiseEntry> =
            self.record.record().entries(tables::PROMISES)?.into_iter().collect();
        let kept = self.unrecorded();
        if kept.position.lineage.is_some() {
            position = kept.position.clone();
            promises.extend(kept.promises.iter().map(|(uid, promise)| (uid.clone(), promise.clone())));
        }
        Ok((position, promises))
    }

    fn unrecorded(&self) -> MutexGuard<'_, Unrecorded> {
        self.unrecorded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The open pools, and why others are not.
pub struct Pools {
    node: NodeName,
    mount_root: PathBuf,
    known_file: PathBuf,
    data_plane: DataPlane,
    open: Mutex<BTreeMap<PoolName, Arc<OpenPool>>>,
    failed: Mutex<BTreeMap<PoolName, (Reason, String)>>,
}

impl Pools {
    /// None open yet. Devices are suspended and images served by this process, as a command does it.
    pub fn new(node: NodeName, mount_root: PathBuf, state_dir: &Path) -> Self {
        let data_plane = DataPlane::in_process(&state_dir.join("servers"), Watch::WhenAsked);
        let known_file = state_dir.join("pools.json");
        Self { node, mount_root, known_file, data_plane, open: Mutex::default(), failed: Mutex::default() }
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
        self.open.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// All open ones.
    pub fn all(&self) -> Vec<Arc<OpenPool>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Those that are not open though they were before, or are `wanted`: what lies in them is not known.
    pub fn unopened(
        &self,
        wanted: impl IntoIterator<Item = PoolName>,
    ) -> Result<BTreeSet<PoolName>, PoolError> {
        let mut names: BTreeSet<PoolName> = self.known()?.into_keys().chain(wanted).collect();
        names.retain(|name| self.get(name).is_none());
        Ok(names)
    }

    /// Why the pool's area could not be opened when that was last tried.
    pub fn failure(&self, name: &PoolName) -> Option<(Reason, String)> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// Opens the pools that were open before, so that volumes can be served while the API server is away. One that
    /// fails is tried again once the API server shows it. Blocks.
    pub fn reopen_known(&self) -> Result<(), PoolError> {
        self.data_plane.resume_left_behind();
        for (name, spec) in self.known()? {
            if let Err(error) = self.prepare(&name, &spec) {
                tracing::warn!(pool = %name, error = crate::telemetry::chain(&error), "pool not reopened");
            }
        }
        Ok(())
    }

    /// Makes or opens a pool's area and its record. Blocks, for as long as making a file system takes.
    pub fn prepare(&self, name: &PoolName, spec: &PoolSpec) -> Result<(), PoolError> {
        if self.get(name).is_some() {
            return Ok(());
        }
        let result = self.try_prepare(name, spec);
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        match &result {
            Ok(()) => drop(failed.remove(name)),
            Err(error) => drop(failed.insert(name.clone(), (error.reason(), crate::telemetry::chain(error)))),
        }
        result
    }

    fn try_prepare(&self, name: &PoolName, spec: &PoolSpec) -> Result<(), PoolError> {
        let failed = |source| PoolError::Area { pool: name.clone(), source: Box::new(source) };
        let place = Place {
            pool: spec.uid.clone(),
            name: name.clone(),
            node: self.node.clone(),
            mount_point: self.mount_root.join(name.as_str()),
            known: self.known()?.get(name).is_some_and(|known| known.uid == spec.uid),
            data_plane: self.data_plane.clone(),
        };
        let area = area::open(&place, &spec.backend).map_err(failed)?;
        let opened = self.open_record(name, &spec.uid, &*area).and_then(|record| {
            templates::restore(&record, &self.data_plane); // before what starts from them
            area.start(&record).map_err(failed)?;
            Ok(record)
        });
        let record = match opened {
            Ok(record) => record,
            Err(error) => {
                // What is in use keeps it mounted, and is served from there again once it can be opened.
                if let Err(busy) = area.close() {
                    tracing::warn!(pool = %name, error = crate::telemetry::chain(&busy), "area stays mounted");
                }
                return Err(error);
            }
        };
        let mut known = self.known()?;
        if known.insert(name.clone(), spec.clone()).as_ref() != Some(spec) {
            self.write_known(&known)?;
        }
        let pool =
            OpenPool { name: name.clone(), spec: spec.clone(), area, record, unrecorded: Mutex::default() };
        self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone(), Arc::new(pool));
        tracing::info!(pool = %name, "pool open");
        Ok(())
    }

    /// The record is made before anything else in an area, so one that is missing beside data is lost.
    fn open_record(&self, name: &PoolName, uid: &Uid, area: &dyn Area) -> Result<PoolRecord, PoolError> {
        let path = area.root().join("record.redb");
        let identity = berth_record::PoolIdentity {
            pool_uid: uid.clone(),
            pool_name: name.clone(),
            node: self.node.clone(),
            pool_id: uuid::Uuid::new_v4().to_string(),
        };
        match PoolRecord::open(&path, Some(&identity.owner())) {
            Err(OpenError::NotFound { .. }) => {}
            other => return other.map_err(|source| PoolError::Record { pool: name.clone(), source }),
        }
        let failed = |source| PoolError::Area { pool: name.clone(), source: Box::new(source) };
        if area.holds_data().map_err(failed)? {
            return Err(PoolError::RecordGone { pool: name.clone(), path });
        }
        PoolRecord::create(&path, identity)
            .map_err(|source| PoolError::NewRecord { pool: name.clone(), source })
    }

    /// Unmounts the area of a pool in which nothing is left, and forgets the pool. What lies on its disk stays. Blocks.
    pub fn close(&self, name: &PoolName) -> Result<(), PoolError> {
        let Some(pool) = self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(name) else {
            return Ok(());
        };
        if let Err(source) = templates::release(&pool.record, &self.data_plane) {
            templates::restore(&pool.record, &self.data_plane);
            self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone(), pool);
            return Err(PoolError::Template { pool: name.clone(), source: Box::new(source) });
        }
        let pool = match Arc::try_unwrap(pool) {
            Ok(pool) => pool,
            Err(pool) => {
                self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone(), pool);
                return Err(PoolError::InUse { pool: name.clone() });
            }
        };
        let OpenPool { area, record, .. } = pool;
        drop(record);
        let mut known = self.known()?;
        known.remove(name);
        self.write_known(&known)?;
        area.close().map_err(|source| PoolError::Area { pool: name.clone(), source: Box::new(source) })?;
        tracing::info!(pool = %name, "pool closed");
        Ok(())
    }

    fn write_known(&self, known: &BTreeMap<PoolName, PoolSpec>) -> Result<(), PoolError> {
        let text = serde_json::to_vec_pretty(known)
            .map_err(|e| PoolError::Unreadable { path: self.known_file.clone(), reason: e.to_string() })?;
        Ok(files::write_durably(&self.known_file, &text)?)
    }

    fn known(&self) -> Result<BTreeMap<PoolName, PoolSpec>, PoolError> {
        let path = self.known_file.clone();
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|e| PoolError::Unreadable { path, reason: e.to_string() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(error) => Err(PoolError::Unreadable { path, reason: error.to_string() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use berth_core::units::Bytes;

    use super::*;
    use crate::area::{ThinGroup, ThinSpec};

    #[test]
    fn what_was_written_of_a_pool_is_read_again() {
        let filesystem = Backend::Filesystem { path: "/srv/pool".into(), size: Bytes(512) };
        let thin = |group| Backend::Thin(ThinSpec { group, block: Bytes::kib(64) });
        let devices = vec![PathBuf::from("/dev/sdb")];
        let own = thin(ThinGroup::Exclusive { devices, wipe: true });
        let shared = thin(ThinGroup::Shared { name: "vg".to_owned(), size: Bytes::gib(1) });
        let mut texts = BTreeSet::new();
        for backend in [filesystem, own, shared] {
            let spec = PoolSpec { uid: "u".into(), backend };
            let text = serde_json::to_string(&spec).unwrap();
            assert_eq!(serde_json::from_str::<PoolSpec>(&text).unwrap(), spec, "{text}");
            texts.insert(text);
        }
        assert!(texts.contains(r#"{"uid":"u","path":"/srv/pool","size":512}"#), "{texts:?}");
    }
}
