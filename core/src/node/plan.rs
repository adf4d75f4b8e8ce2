//! What a node does next.
//!
//! **Guarantees.** Nothing is made for a holder unless its promise is recorded as obeyed, and reported so; a promise is obeyed only if a
//! ledger that is not behind and the holder's own assignment name this node at the same generation. Bytes are removed
//! before their release is recorded, and only for a holder that is being deleted. A volume in use is never removed, and one
//! whose file is gone is never made again.
//! Steps are safe to repeat: planning again after a crash at any point leads to the same end.

use std::cmp::Ordering;

use crate::ids::{Digest, PoolName, Uid};
use crate::ledger::{Holder, Promise, is_behind};
use crate::units::{Generation, Timestamp};
use crate::view::{Access, LedgerView};

use super::files;
use super::step::{Origin, Step};
use super::view::{
    AreaView, HeldWorkDir, JobKey, JobKind, NodeImage, NodeReservation, NodeTransfer, NodeView, PoolOnNode,
};

/// Why `ledger` must not be obeyed by a node with this record, in words that name the ledger; `None` if it may be.
pub fn behind(ledger: &LedgerView, area: &AreaView) -> Option<String> {
    is_behind(ledger, area).map(|behind| format!("ledger {}: {behind}", ledger.name))
}

/// The steps to take now, in order. Empty once everything is as it is asked for.
pub fn plan(view: &NodeView, now: Timestamp) -> Vec<Step> {
    let mut steps = stop_unwanted(view);
    for (name, pool) in &view.pools {
        plan_pool(view, name, pool, &mut steps);
    }
    for (uid, transfer) in &view.transfers {
        steps.extend(plan_transfer(view, uid, transfer));
    }
    for (name, store) in &view.stores {
        let job = JobKey { kind: JobKind::Store, uid: store.uid.clone(), generation: store.generation };
        if store.due <= now && !view.jobs.contains(&job) {
            steps.push(Step::ProbeStore { store: name.clone(), generation: store.generation });
        }
    }
    steps
}

fn plan_pool(view: &NodeView, name: &PoolName, pool: &PoolOnNode, steps: &mut Vec<Step>) {
    let Some(area) = &pool.area else {
        if pool.wanted.is_some() {
            steps.push(Step::PreparePool { pool: name.clone() });
        }
        return;
    };
    if pool.wanted.is_none() && pool.ledger.is_none() && area.is_idle() {
        steps.push(Step::ClosePool { pool: name.clone() });
        return;
    }
    let obeyable = pool.ledger.as_ref().filter(|ledger| is_behind(ledger, area).is_none());
    if let Some(ledger) = obeyable {
        // What is recorded decides how large, and what is recorded next may say less.
        let next = obey(view, name, ledger, area).map_or_else(|| grow(name, area), Some);
        steps.extend(next);
        // Not while its object is shown: an operator that lags may promise the same once more, and only what is remembered
        // is not obeyed again.
        let shown = |uid: &Uid| view.reservations.contains_key(uid) || view.images.contains_key(uid);
        let gone: Vec<Uid> = area
            .promises
            .iter()
            .filter(|(uid, p)| p.released && !names(ledger, uid, p.generation) && !shown(uid))
            .map(|(uid, _)| uid.clone())
            .collect();
        if !gone.is_empty() {
            steps.push(Step::Forget { pool: name.clone(), holders: gone });
        }
    }
    for (uid, promise) in area.promises.iter().filter(|(_, promise)| !promise.released) {
        let may_make = obeyable.is_some() && promise.reported;
        if let Some(reservation) = view.reservations.get(uid).filter(|r| r.pool == *name) {
            steps.extend(serve(view, name, area, uid, reservation, promise.generation, may_make));
        } else if view.images.get(uid).is_some_and(|image| image.pool == *name) {
            steps.extend(serve_image(view, name, area, uid, promise.generation, may_make));
        } else if let Some(holder) = obeyable.and_then(|ledger| revoked(ledger, uid)) {
            steps.extend(match holder {
                Holder::Reservation(_) => give_back(view, name, area, uid, promise.generation),
                Holder::Image(_) => give_back_image(view, name, area, uid, promise.generation),
            });
        }
    }
}

/// Which object's promise this was, if the ledger says that it is gone. That no watch shows it says nothing: a watch may
/// lag.
fn revoked<'l>(ledger: &'l LedgerView, uid: &Uid) -> Option<&'l Holder> {
    let promise = ledger.promises.get(uid).filter(|promise| promise.revoked.is_some())?;
    Some(&promise.holder)
}

fn names(ledger: &LedgerView, uid: &Uid, generation: Generation) -> bool {
    ledger.promises.get(uid).is_some_and(|promise| promise.generation == generation)
}

/// Records the ledger's revision, with every promise in it whose holder is assigned here at the same generation. Once the
/// revision of a revocation is recorded, what was revoked is not obeyed any more, whatever a watch that lags still shows.
fn obey(view: &NodeView, name: &PoolName, ledger: &LedgerView, area: &AreaView) -> Option<Step> {
    let assigned = |uid: &Uid, promise: &Promise| {
        let reservation =
            view.reservations.get(uid).is_some_and(|r| r.pool == *name && r.generation == promise.generation);
        reservation || view.images.get(uid).is_some_and(|image| image.pool == *name)
    };
    // A volume may be promised more at the same generation; never less, and not what was given back.
    let known = |uid: &Uid, promise: &Promise| {
        area.promises.get(uid).is_some_and(|held| match held.generation.cmp(&promise.generation) {
            Ordering::Equal => held.released || held.data >= promise.charge.data,
            order => order == Ordering::Greater,
        })
    };
    let new: Vec<(Uid, Promise)> = ledger
        .promises
        .iter()
        .filter(|(_, promise)| promise.revoked.is_none())
        .filter(|(uid, promise)| assigned(uid, promise) && !known(uid, promise))
        .map(|(uid, promise)| (uid.clone(), promise.clone()))
        .collect();
    if new.is_empty() && ledger.revision == area.revision && area.lineage.is_some() {
        return None;
    }
    Some(Step::Obey {
        pool: name.clone(),
        lineage: ledger.lineage.clone(),
        revision: ledger.revision,
        overcommit: ledger.capacity.overcommit,
        promises: new,
    })
}

fn grow(name: &PoolName, area: &AreaView) -> Option<Step> {
    area.volumes_lack.map(|size| Step::GrowVolumes { pool: name.clone(), size })
}

/// What a reservation with an obeyed promise still needs.
fn serve(
    view: &NodeView,
    pool: &PoolName,
    area: &AreaView,
    uid: &Uid,
    reservation: &NodeReservation,
    generation: Generation,
    may_make: bool,
) -> Vec<Step> {
    if reservation.deleting {
        return give_back(view, pool, area, uid, generation);
    }
    if let Some(file) = reservation.file {
        let may_make = may_make && reservation.generation == generation;
        return files::serve(view, pool, area, uid, file, generation, may_make);
    }
    if !may_make || reservation.generation != generation {
        return Vec::new();
    }
    if reservation.is_prepared(uid, area) {
        return grow_volume(pool, area, uid).into_iter().collect();
    }
    if area.volumes.get(uid).is_some_and(|volume| volume.lost) {
        return Vec::new();
    }
    let (pool, reservation_uid) = (pool.clone(), uid.clone());
    let bytes = area.promises.get(uid).map(|promise| promise.data).unwrap_or_default();
    let origin = match (&reservation.access, &reservation.image) {
        (Access::File, _) => {
            let make = |bounded| Step::MakeWorkDir {
                pool,
                reservation: reservation_uid,
                generation,
                bytes,
                bounded,
            };
            return is_bounded(view, reservation).map(make).into_iter().collect();
        }
        (Access::Block, None) => Origin::Blank,
        (Access::Block, Some(digest)) if area.images.get(digest).is_some_and(|image| image.usable) => {
            Origin::Image(*digest)
        }
        // Nothing is written, or nothing can be made from the image yet.
        (Access::Stream, _) | (Access::Block, Some(_)) => return Vec::new(),
    };
    let labels = reservation.labels.clone();
    vec![Step::MakeVolume { pool, reservation: reservation_uid, generation, size: bytes, origin, labels }]
}

/// Whether the directory of a reservation has to bound whoever writes in it. A transfer's does not: its promise is exactly what
/// its files take, and it checks every byte. `None` while the transfer that it is for is not shown, or does not need it.
fn is_bounded(view: &NodeView, reservation: &NodeReservation) -> Option<bool> {
    let Some(transfer) = &reservation.transfer else { return Some(true) };
    let transfer = view.transfers.get(transfer)?;
    (transfer.reservation == reservation.name && !transfer.deleting && !transfer.ended).then_some(false)
}

/// Makes a volume as large as it is promised.
fn grow_volume(pool: &PoolName, area: &AreaView, uid: &Uid) -> Option<Step> {
    let (held, promise) = (area.volumes.get(uid)?, area.promises.get(uid)?);
    (held.ready && held.size < promise.data).then(|| Step::GrowVolume {
        pool: pool.clone(),
        reservation: uid.clone(),
        size: promise.data,
    })
}

/// Removes what a deleted reservation has, then says so. One that is in use stays until it is not.
fn give_back(
    view: &NodeView,
    pool: &PoolName,
    area: &AreaView,
    uid: &Uid,
    generation: Generation,
) -> Vec<Step> {
    if works_in(view, uid) || area.volumes.get(uid).is_some_and(|volume| volume.attached) {
        return Vec::new();
    }
    let mut steps = Vec::new();
    if let Some(held) = area.files.get(uid) {
        match files::give_back(view, pool, uid, held, generation) {
            Ok(remove) => steps.push(remove),
            Err(first) => return first,
        }
    } else if area.work_dirs.contains_key(uid) {
        steps.push(Step::RemoveWorkDir { pool: pool.clone(), reservation: uid.clone() });
    }
    if area.volumes.contains_key(uid) {
        steps.push(Step::RemoveVolume { pool: pool.clone(), reservation: uid.clone() });
    }
    steps.push(Step::Released { pool: pool.clone(), holder: uid.clone(), generation });
    steps
}

/// True while a transfer of whatever generation may still write in this reservation's directory. Where one works that is
/// not shown any more, or whose reservation is not, is not known.
fn works_in(view: &NodeView, reservation: &Uid) -> bool {
    let Some(reservation) = view.reservations.get(reservation) else {
        return view.jobs.iter().any(|job| job.kind == JobKind::Transfer);
    };
    if reservation.access != Access::File {
        return false;
    }
    view.jobs
        .iter()
        .filter(|job| job.kind == JobKind::Transfer)
        .any(|job| view.transfers.get(&job.uid).is_none_or(|found| found.reservation == reservation.name))
}

fn serve_image(
    view: &NodeView,
    pool: &PoolName,
    area: &AreaView,
    uid: &Uid,
    generation: Generation,
    may_make: bool,
) -> Vec<Step> {
    let Some(image) = view.images.get(uid) else { return Vec::new() };
    let filling = view.jobs.iter().find(|job| job.kind == JobKind::Fill && job.uid == *uid);
    let held = area.images.get(&image.digest).filter(|held| held.holder == *uid);
    // What volumes read from goes on becoming local, and goes with the last of them.
    let needed = held.is_some_and(|held| held.in_use) || is_awaited(view, area, pool, &image.digest);
    if image.deleting && !needed {
        if let Some(job) = filling {
            return vec![Step::StopJob { job: job.clone() }];
        }
        return remove_image(pool, uid, image.digest, generation);
    }
    if filling.is_some() || !may_make || held.is_some_and(|held| held.complete) {
        return Vec::new();
    }
    vec![Step::FillImage { pool: pool.clone(), image: uid.clone(), generation }]
}

/// Also where nothing is recorded of the image: its pin was set before that.
fn remove_image(pool: &PoolName, uid: &Uid, digest: Digest, generation: Generation) -> Vec<Step> {
    vec![
        Step::RemoveImage { pool: pool.clone(), image: uid.clone(), digest },
        Step::Released { pool: pool.clone(), holder: uid.clone(), generation },
    ]
}

/// Removes what an image has whose object is gone, then says so. Once the next image of the same content is promised its
/// space, that takes over what is there.
fn give_back_image(
    view: &NodeView,
    pool: &PoolName,
    area: &AreaView,
    uid: &Uid,
    generation: Generation,
) -> Vec<Step> {
    if view.jobs.iter().any(|job| job.kind == JobKind::Fill && job.uid == *uid) {
        return Vec::new(); // it is being stopped
    }
    let held = area.images.iter().find(|(_, held)| held.holder == *uid);
    let Some((digest, held)) = held else {
        return vec![Step::Released { pool: pool.clone(), holder: uid.clone(), generation }];
    };
    let takes_over = |(next, image): (&Uid, &NodeImage)| {
        let promised = area.promises.get(next).is_some_and(|promise| !promise.released);
        image.pool == *pool && image.digest == *digest && !image.deleting && promised
    };
    let needed = held.in_use || held.complete && is_awaited(view, area, pool, digest);
    if view.images.iter().any(takes_over) || needed {
        return Vec::new();
    }
    remove_image(pool, uid, *digest, generation)
}

/// True if a live reservation here has yet to be made from the image.
fn is_awaited(view: &NodeView, area: &AreaView, pool: &PoolName, digest: &Digest) -> bool {
    view.reservations.iter().any(|(uid, reservation)| {
        let names = reservation.pool == *pool && reservation.image.as_ref() == Some(digest);
        let obeyed = area.promises.get(uid).is_some_and(|promise| !promise.released);
        names && obeyed && !reservation.deleting && !reservation.is_prepared(uid, area)
    })
}

/// What a transfer needs next. One that pauses is neither probed nor begun; what is promised to it and what it has made stays.
fn plan_transfer(view: &NodeView, uid: &Uid, transfer: &NodeTransfer) -> Option<Step> {
    let running =
        |kind| view.jobs.contains(&JobKey { kind, uid: uid.clone(), generation: transfer.generation });
    let (transfer_uid, generation) = (uid.clone(), transfer.generation);
    if transfer.deleting {
        let done = transfer.released.is_some_and(|released| released >= generation);
        return (!done).then_some(Step::AbandonTransfer { transfer: transfer_uid, generation });
    }
    if transfer.ended || transfer.suspended || running(JobKind::Probe) || running(JobKind::Transfer) {
        return None;
    }
    if !transfer.planned {
        return Some(Step::StartProbe { transfer: transfer_uid, generation });
    }
    let (reservation, found) =
        view.reservations.iter().find(|(_, found)| !found.deleting && works_for(found, uid, transfer))?;
    let pool = view.pools.get(&found.pool)?;
    let promise = pool.promise(reservation).filter(|promise| promise.generation == found.generation)?;
    let area = pool.area.as_ref()?;
    if !found.is_prepared(reservation, area) {
        return None;
    }
    Some(Step::StartTransfer {
        transfer: transfer_uid,
        generation,
        pool: found.pool.clone(),
        reservation: reservation.clone(),
        promised: promise.charge.data,
    })
}

/// True if a reservation holds what this transfer needs. One of no bytes may have taken the place of the first.
fn works_for(reservation: &NodeReservation, uid: &Uid, transfer: &NodeTransfer) -> bool {
    let stands_in = reservation.access == Access::Stream && reservation.transfer.as_ref() == Some(uid);
    reservation.name == transfer.reservation || stands_in
}

/// Transfers that have moved away, been finished elsewhere, been placed anew or are to pause, and fills without an image.
fn stop_unwanted(view: &NodeView) -> Vec<Step> {
    let wanted = |job: &&JobKey| match job.kind {
        JobKind::Probe | JobKind::Transfer => {
            let is_due = |transfer: &NodeTransfer| {
                transfer.generation == job.generation && !transfer.ended && !transfer.suspended
            };
            view.transfers.get(&job.uid).is_some_and(is_due)
        }
        JobKind::Fill => view.images.contains_key(&job.uid),
        JobKind::Fetch => view.reservations.get(&job.uid).is_some_and(|r| r.generation == job.generation),
        // It goes on whatever becomes of the reservation: what it sends is the only copy.
        JobKind::Push => true,
        JobKind::Store => {
            view.stores.values().any(|store| store.uid == job.uid && store.generation == job.generation)
        }
    };
    view.jobs.iter().filter(|job| !wanted(job)).map(|job| Step::StopJob { job: job.clone() }).collect()
}

impl NodeReservation {
    /// True if what was asked for is there, at the assigned generation, under an obeyed promise.
    pub fn is_prepared(&self, uid: &Uid, area: &AreaView) -> bool {
        let promised = area.promises.get(uid).is_some_and(|p| p.generation == self.generation && !p.released);
        promised
            && match self.access {
                Access::Stream => true,
                Access::File => {
                    let made = |dir: &HeldWorkDir| dir.made && dir.generation == self.generation;
                    let file = self.file.is_none() || area.files.get(uid).is_some_and(|file| file.fetched);
                    file && area.work_dirs.get(uid).is_some_and(made)
                }
                Access::Block => {
                    area.volumes.get(uid).is_some_and(|v| v.ready && v.generation == self.generation)
                }
            }
    }
}
