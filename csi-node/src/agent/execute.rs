//! Carries out steps, one arm each. Deciding is over when this is called.

use std::sync::Arc;

use berth_core::ids::{ObjectName, PoolName, Uid};
use berth_core::ledger::{Class, Holder, Promise};
use berth_core::node::Step;
use berth_core::node::view::{JobKey, JobKind};
use berth_core::reason::Reason;
use berth_core::units::{Bytes, Generation};
use berth_record::{ChangeError, LedgerPosition, PromiseClass, PromiseEntry};
use kube::ResourceExt as _;
use thiserror::Error;

use super::files::{self, FilesError};
use super::fill::{self, FillError};
use super::jobs::StillRunning;
use super::pools::{OpenPool, PoolError};
use super::transfers::{self, WorkError};
use super::volumes::{self, VolumeError};
use super::{observe, space, stores};
use crate::area::AreaError;
use crate::node::Node;

/// Why a step was not carried out. It is planned again as long as it is needed.
#[derive(Debug, Error)]
pub enum StepError {
    /// The pool is not open.
    #[error("pool {0} is not open")]
    NotOpen(PoolName),
    /// The pool is not wanted any more.
    #[error("pool {0} does not select this node")]
    NotWanted(PoolName),
    /// A pool.
    #[error("failed to prepare a pool")]
    Pool(#[from] PoolError),
    /// The record.
    #[error("failed to record")]
    Record(#[from] ChangeError),
    /// A kernel pool.
    #[error("failed to make the kernel pool of volumes larger")]
    Area(#[from] AreaError),
    /// A volume or work directory.
    #[error("failed to make or remove a volume or directory")]
    Volume(#[from] VolumeError),
    /// A file for pods.
    #[error("failed to make or remove a file")]
    File(#[from] FilesError),
    /// A staged image.
    #[error("failed to remove a staged image")]
    Image(#[from] FillError),
    /// An import.
    #[error("failed to take an import back")]
    Import(#[from] WorkError),
    /// A job.
    #[error("failed to stop a job")]
    Job(#[from] StillRunning),
    /// A worker is gone.
    #[error("the worker of a step is gone")]
    Worker(#[from] tokio::task::JoinError),
}

/// Carries out one step; long work is only started.
pub async fn execute(node: &Arc<Node>, step: &Step) -> Result<(), StepError> {
    match step {
        Step::PreparePool { pool } => prepare(node, pool).await,
        Step::ClosePool { pool } => close(node, pool).await,
        Step::Obey { pool, lineage, revision, overcommit, promises } => {
            let (lineage, obeyed_revision, overcommit) = (Some(lineage.clone()), *revision, *overcommit);
            obey(node, pool, LedgerPosition { lineage, obeyed_revision, overcommit }, promises).await
        }
        Step::GrowVolumes { pool, size } => {
            let size = *size;
            on_pool(node, pool, move |pool| Ok(pool.area.grow(Class::Volumes, size)?)).await
        }
        Step::MakeWorkDir { pool, reservation, bytes, .. }
        | Step::BeginFile { pool, reservation, bytes, .. } => {
            make_directory(node, step, pool, reservation, *bytes).await
        }
        Step::MakeVolume { pool, reservation, generation, size, origin, labels } => {
            let (uid, generation, size) = (reservation.clone(), *generation, *size);
            let (origin, labels) = (origin.clone(), labels.clone());
            let make = move |pool: &OpenPool| volumes::make(pool, &uid, generation, size, &origin, &labels);
            on_pool(node, pool, move |pool| Ok(make(pool)?)).await
        }
        Step::GrowVolume { pool, reservation, size } => {
            let (uid, size) = (reservation.clone(), *size);
            on_pool(node, pool, move |pool| Ok(volumes::grow(pool, &uid, size)?)).await
        }
        Step::RemoveWorkDir { .. }
        | Step::RemoveVolume { .. }
        | Step::RemoveFile { .. }
        | Step::RemoveImage { .. } => remove(node, step).await,
        Step::Released { pool, holder, generation } => {
            let (uid, generation) = (holder.clone(), *generation);
            on_pool(node, pool, move |pool| Ok(pool.released(&uid, generation)?)).await
        }
        Step::Forget { pool, holders } => {
            let holders = holders.clone();
            on_pool(node, pool, move |pool| holders.iter().try_for_each(|uid| Ok(pool.forget(uid)?))).await
        }
        Step::AbandonTransfer { transfer, generation } => abandon(node, transfer, *generation).await,
        Step::StopJob { job } => Ok(node.jobs.stop(job).await?),
        Step::FillImage { .. }
        | Step::FetchFile { .. }
        | Step::PushFile { .. }
        | Step::StartProbe { .. }
        | Step::StartTransfer { .. }
        | Step::ProbeStore { .. } => start(node, step),
    }
}

/// Makes the directory of a reservation. That there is no space for it, although so much was promised, is told.
async fn make_directory(
    node: &Arc<Node>,
    step: &Step,
    pool: &PoolName,
    uid: &Uid,
    bytes: Bytes,
) -> Result<(), StepError> {
    let open = node.pools.get(pool).ok_or_else(|| StepError::NotOpen(pool.clone()))?;
    let made = match step {
        Step::BeginFile { generation, .. } => {
            files::begin(node, Arc::clone(&open), uid, *generation, bytes).await.map_err(StepError::from)
        }
        Step::MakeWorkDir { generation, bounded, .. } => {
            let (uid, generation, bounded) = (uid.clone(), *generation, *bounded);
            let make = move |pool: &OpenPool| volumes::make_work_dir(pool, &uid, generation, bytes, bounded);
            on_pool(node, pool, move |pool| Ok(make(pool)?)).await
        }
        _ => Ok(()),
    };
    match &made {
        Ok(()) => node.news.has_directory(uid),
        Err(error) if space::is_out_of_space(error) => {
            let path = open.area.work_dir(uid);
            if let Some(defect) = space::defect(node, &open, uid, bytes, path).await {
                let told = (Reason::SpacePromiseBroken, defect.to_string(), true);
                node.news.edit_file(uid, |news| news.error = Some(told));
            }
        }
        Err(_) => {}
    }
    made
}

async fn close(node: &Arc<Node>, pool: &PoolName) -> Result<(), StepError> {
    let (node, pool) = (Arc::clone(node), pool.clone());
    Ok(tokio::task::spawn_blocking(move || node.pools.close(&pool)).await??)
}

/// Ends the work of an import before its traces go.
async fn abandon(node: &Arc<Node>, import: &Uid, generation: Generation) -> Result<(), StepError> {
    for kind in [JobKind::Probe, JobKind::Transfer] {
        node.jobs.stop(&JobKey { kind, uid: import.clone(), generation }).await?;
    }
    Ok(transfers::abandon(node, import, generation).await?)
}

/// Removes the bytes of a holder.
async fn remove(node: &Arc<Node>, step: &Step) -> Result<(), StepError> {
    let open = |pool: &PoolName| node.pools.get(pool).ok_or_else(|| StepError::NotOpen(pool.clone()));
    match step {
        Step::RemoveWorkDir { pool, reservation } => {
            let uid = reservation.clone();
            on_pool(node, pool, move |pool| Ok(volumes::remove_work_dir(pool, &uid)?)).await
        }
        Step::RemoveVolume { pool, reservation } => {
            let uid = reservation.clone();
            on_pool(node, pool, move |pool| Ok(volumes::remove(pool, &uid)?)).await
        }
        Step::RemoveFile { pool, reservation, only_copy } => {
            Ok(files::remove(node, open(pool)?, reservation, *only_copy).await?)
        }
        Step::RemoveImage { pool, image, digest } => {
            Ok(fill::remove(node, &open(pool)?, image, *digest).await?)
        }
        _ => Ok(()),
    }
}

/// Starts long work.
fn start(node: &Arc<Node>, step: &Step) -> Result<(), StepError> {
    let here = Arc::clone(node);
    let key = |kind, uid: &Uid, generation| JobKey { kind, uid: uid.clone(), generation };
    let open = |pool: &PoolName| node.pools.get(pool).ok_or_else(|| StepError::NotOpen(pool.clone()));
    match step {
        Step::FillImage { pool, image, generation } => {
            let (pool, uid) = (open(pool)?, image.clone());
            let key = key(JobKind::Fill, image, *generation);
            node.jobs.start(key, |cancel| fill::fill(here, pool, uid, cancel));
        }
        Step::FetchFile { pool, reservation, generation } => {
            let (pool, uid, generation) = (open(pool)?, reservation.clone(), *generation);
            let key = key(JobKind::Fetch, reservation, generation);
            node.jobs.start(key, |cancel| files::fetch(here, pool, uid, generation, cancel));
        }
        Step::PushFile { pool, reservation, generation } => {
            let (pool, uid, generation) = (open(pool)?, reservation.clone(), *generation);
            let key = key(JobKind::Push, reservation, generation);
            node.jobs.start(key, |cancel| files::push(here, pool, uid, generation, cancel));
        }
        Step::StartProbe { transfer, generation } => {
            let uid = transfer.clone();
            let key = key(JobKind::Probe, transfer, *generation);
            node.jobs.start(key, |cancel| transfers::probe(here, uid, cancel));
        }
        Step::StartTransfer { transfer, generation, pool, reservation, promised } => {
            let (uid, generation, pool) = (transfer.clone(), *generation, open(pool)?);
            let (reservation, promised) = (reservation.clone(), *promised);
            node.jobs.start(key(JobKind::Transfer, transfer, generation), move |cancel| {
                transfers::run(here, uid, generation, pool, reservation, promised, cancel)
            });
        }
        Step::ProbeStore { store, generation } => start_probe(node, store, *generation),
        _ => {}
    }
    Ok(())
}

fn start_probe(node: &Arc<Node>, store: &ObjectName, generation: Generation) {
    let Ok(object) = stores::find(node, store) else { return };
    let Some(uid) = object.uid().map(Uid::from) else { return };
    let (here, store) = (Arc::clone(node), store.clone());
    let key = JobKey { kind: JobKind::Store, uid, generation };
    node.jobs.start(key, |cancel| stores::probe(here, store, cancel));
}

/// Runs something short and blocking on an open pool.
async fn on_pool(
    node: &Node,
    pool: &PoolName,
    act: impl FnOnce(&OpenPool) -> Result<(), StepError> + Send + 'static,
) -> Result<(), StepError> {
    let pool = node.pools.get(pool).ok_or_else(|| StepError::NotOpen(pool.clone()))?;
    tokio::task::spawn_blocking(move || {
        let _turn = pool.turn();
        act(&pool)
    })
    .await?
}

async fn prepare(node: &Arc<Node>, name: &PoolName) -> Result<(), StepError> {
    let spec = observe::wanted_pools(node).remove(name).ok_or_else(|| StepError::NotWanted(name.clone()))?;
    let (node, name) = (Arc::clone(node), name.clone());
    Ok(tokio::task::spawn_blocking(move || node.pools.prepare(&name, &spec)).await??)
}

async fn obey(
    node: &Node,
    pool: &PoolName,
    position: LedgerPosition,
    promises: &[(Uid, Promise)],
) -> Result<(), StepError> {
    let entries: Vec<(Uid, PromiseEntry)> = promises.iter().map(|(uid, p)| (uid.clone(), entry(p))).collect();
    on_pool(node, pool, move |pool| Ok(pool.obey(&position, &entries)?)).await
}

fn entry(promise: &Promise) -> PromiseEntry {
    let holder = match &promise.holder {
        Holder::Reservation(name) => berth_record::Holder {
            kind: "StagingReservation".to_owned(),
            namespace: name.namespace.clone(),
            name: name.name.clone(),
        },
        Holder::Image(name) => berth_record::Holder {
            kind: "StagedImage".to_owned(),
            namespace: String::new(),
            name: name.clone(),
        },
    };
    let Promise { charge, generation, .. } = promise;
    let (data, metadata): (Bytes, Bytes) = (charge.data, charge.metadata);
    let class = match promise.class {
        Class::Images => PromiseClass::Images,
        Class::Volumes => PromiseClass::Volumes,
    };
    PromiseEntry { generation: *generation, class, data, metadata, holder, obeyed: true, released: false }
}
