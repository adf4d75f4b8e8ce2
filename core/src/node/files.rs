//! Files for pods: what a reservation that makes an object a file still needs, and when it may go.
//!
//! **Guarantees.** Bytes that are in no object store go only if somebody consents; until then they are sent, again and
//! again, also while their reservation is being deleted and after it is gone. What pods see is neither changed nor removed.
//! A file whose directory is gone is never begun again: a blank one would pass for it.

use crate::ids::{PoolName, Uid};
use crate::units::Generation;

use super::step::Step;
use super::view::{AreaView, HeldFile, JobKind, NodeFile, NodeView, Shown};

/// What a file still needs, under a promise of this generation. `may_make` is false while nothing may be made under it.
pub(super) fn serve(
    view: &NodeView,
    pool: &PoolName,
    area: &AreaView,
    uid: &Uid,
    file: NodeFile,
    generation: Generation,
    may_make: bool,
) -> Vec<Step> {
    let (pool, reservation) = (pool.clone(), uid.clone());
    let directory = area.work_dirs.get(uid).filter(|dir| dir.made && dir.generation == generation);
    let held = area.files.get(uid).filter(|held| held.generation == generation);
    if area.files.get(uid).is_some_and(|held| held.lost) {
        return Vec::new();
    }
    let step = match (directory, held) {
        (Some(_), Some(held)) if held.only_copy => push(view, &pool, uid, held, generation),
        (Some(_), Some(held)) if held.fetched || file.failed || !file.fetches => None,
        (Some(_), Some(_)) => (may_make && !runs(view, JobKind::Fetch, uid)).then_some(Step::FetchFile {
            pool,
            reservation,
            generation,
        }),
        _ => may_make.then(|| {
            let bytes = area.promises.get(uid).map(|promise| promise.data).unwrap_or_default();
            Step::BeginFile { pool, reservation, generation, bytes }
        }),
    };
    step.into_iter().collect()
}

/// The step that removes a file whose reservation is being deleted or gone; the steps to take first, none if that is only to
/// wait, as an error.
pub(super) fn give_back(
    view: &NodeView,
    pool: &PoolName,
    uid: &Uid,
    held: &HeldFile,
    generation: Generation,
) -> Result<Step, Vec<Step>> {
    let file = view.reservations.get(uid).and_then(|reservation| reservation.file).unwrap_or_default();
    if held.only_copy && !file.discards {
        return Err(push(view, pool, uid, held, generation).into_iter().collect());
    }
    if held.shown != Shown::ToNone {
        return Err(Vec::new());
    }
    let running = view.jobs.iter().filter(|job| job.uid == *uid);
    let running = running.filter(|job| matches!(job.kind, JobKind::Fetch | JobKind::Push));
    let stops: Vec<Step> = running.map(|job| Step::StopJob { job: job.clone() }).collect();
    if !stops.is_empty() {
        return Err(stops);
    }
    Ok(Step::RemoveFile { pool: pool.clone(), reservation: uid.clone(), only_copy: file.discards })
}

/// A file is sent once nobody writes to it any more.
fn push(
    view: &NodeView,
    pool: &PoolName,
    uid: &Uid,
    held: &HeldFile,
    generation: Generation,
) -> Option<Step> {
    let still = held.shown != Shown::ToWriter && !held.lost && !runs(view, JobKind::Push, uid);
    still.then(|| Step::PushFile { pool: pool.clone(), reservation: uid.clone(), generation })
}

/// True while such work runs for this reservation, of whatever generation: two would use one file.
fn runs(view: &NodeView, kind: JobKind, uid: &Uid) -> bool {
    view.jobs.iter().any(|job| job.kind == kind && job.uid == *uid)
}
