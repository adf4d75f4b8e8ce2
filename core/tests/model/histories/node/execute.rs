//! The steps of a plan, carried out in memory, and the work that they start.

use berth_core::ids::{Digest, PoolName, Uid};
use berth_core::node::view::{
    AreaView, HeldFile, HeldImage, HeldVolume, HeldWorkDir, JobKey, JobKind, ObeyedPromise, Shown,
};
use berth_core::node::{Origin, Step};
use berth_core::units::{Bytes, Generation, Timestamp};
use berth_core::view::DurableImage;

use super::{Disk, Node, job};
use crate::histories::observer::Wrong;
use crate::histories::sabotage::Sabotage;
use crate::histories::sums::{charged, obeyed};
use crate::histories::world::{Kind, UNIT, World};

/// A step that could not be carried out now.
#[derive(Debug)]
pub struct Failed;

/// One pool of the node.
struct Place<'n> {
    area: &'n mut AreaView,
    disk: &'n mut Disk,
}

impl Node {
    fn place(&mut self, pool: &PoolName) -> Result<Place<'_>, Failed> {
        let area = self.view.pools.get_mut(pool).and_then(|pool| pool.area.as_mut()).ok_or(Failed)?;
        Ok(Place { area, disk: self.disks.get_mut(pool).ok_or(Failed)? })
    }

    /// Carries out one step; long work is only started.
    pub(super) fn execute(&mut self, world: &mut World, step: &Step) -> Result<(), Failed> {
        world.tell(|| format!("node {}: {step:?}", self.view.node));
        match step {
            Step::PreparePool { pool } => {
                self.view.pools.get_mut(pool).ok_or(Failed)?.area = Some(AreaView::default());
            }
            Step::Obey { pool, lineage, revision, overcommit, promises } => {
                let place = self.place(pool)?;
                (place.area.lineage, place.area.revision) = (Some(lineage.clone()), *revision);
                promises.iter().for_each(|(uid, promise)| {
                    place.area.promises.insert(uid.clone(), ObeyedPromise::new(promise));
                    place.disk.promises.insert(uid.clone(), promise.clone());
                });
                place.disk.overcommit = (u64::from(overcommit.percent.get()), overcommit.attain.0);
                place.disk.grow(place.area);
            }
            Step::MakeWorkDir { pool, reservation, generation, bytes, .. } => {
                let place = self.place(pool)?;
                let dir = HeldWorkDir { generation: *generation, made: true };
                place.area.work_dirs.insert(reservation.clone(), dir);
                place.disk.bytes.insert(reservation.clone(), *bytes);
            }
            Step::BeginFile { pool, reservation, generation, bytes } => {
                let fetches = world.files.get(reservation).is_some_and(|file| file.fetches);
                let place = self.place(pool)?;
                let dir = HeldWorkDir { generation: *generation, made: true };
                place.area.work_dirs.insert(reservation.clone(), dir);
                let (fetched, generation) = (!fetches, *generation);
                let new =
                    HeldFile { generation, fetched, shown: Shown::ToNone, only_copy: false, lost: false };
                place.area.files.entry(reservation.clone()).or_insert(new).generation = generation;
                place.disk.bytes.insert(reservation.clone(), *bytes);
            }
            Step::MakeVolume { pool, reservation, generation, size, origin, .. } => {
                self.make_volume(pool, reservation, *generation, *size, origin, world.now)?;
            }
            Step::GrowVolume { pool, reservation, size } => {
                let place = self.place(pool)?;
                place.area.volumes.get_mut(reservation).ok_or(Failed)?.size = *size;
                place.disk.bytes.insert(reservation.clone(), *size);
                world.coverage.note("volume grown");
            }
            Step::FillImage { pool, image, generation } => self.begin_fill(pool, image, *generation)?,
            Step::FetchFile { reservation, generation, .. } => {
                self.view.jobs.insert(job(JobKind::Fetch, reservation.clone(), *generation));
            }
            Step::PushFile { reservation, generation, .. } => {
                self.view.jobs.insert(job(JobKind::Push, reservation.clone(), *generation));
            }
            Step::StartProbe { transfer, generation } => {
                self.view.jobs.insert(job(JobKind::Probe, transfer.clone(), *generation));
            }
            Step::StartTransfer { transfer, generation, .. } => {
                self.view.jobs.insert(job(JobKind::Transfer, transfer.clone(), *generation));
            }
            Step::AbandonTransfer { transfer, generation } => self.abandon(world, transfer, *generation)?,
            Step::StopJob { job } => drop(self.view.jobs.remove(job)),
            Step::Released { pool, holder, generation } => {
                let never = world.sabotage == Sabotage::NeverReleased;
                let promise = self.place(pool)?.area.promises.get_mut(holder).ok_or(Failed)?;
                promise.released |= !never && promise.generation <= *generation;
            }
            Step::Forget { pool, holders } => {
                let place = self.place(pool)?;
                holders.iter().for_each(|uid| {
                    place.area.promises.remove(uid);
                    place.disk.promises.remove(uid);
                });
            }
            Step::RemoveWorkDir { pool, reservation }
            | Step::RemoveVolume { pool, reservation }
            | Step::RemoveFile { pool, reservation, .. } => self.remove(world, pool, reservation, step)?,
            Step::RemoveImage { pool, image, digest } => self.remove_image(world, pool, image, digest)?,
            Step::ClosePool { .. } | Step::GrowVolumes { .. } | Step::ProbeStore { .. } => {
                return Err(Failed);
            }
        }
        Ok(())
    }

    fn make_volume(
        &mut self,
        pool: &PoolName,
        uid: &Uid,
        generation: Generation,
        size: Bytes,
        origin: &Origin,
        now: Timestamp,
    ) -> Result<(), Failed> {
        let place = self.place(pool)?;
        if let Origin::Image(digest) = origin {
            let image = place.area.images.get_mut(digest).filter(|image| image.complete).ok_or(Failed)?;
            image.last_used = now;
            if place.disk.thin {
                place.disk.origins.insert(uid.clone(), *digest);
            }
        }
        let volume = HeldVolume { generation, size, ready: true, lost: false, attached: false };
        place.area.volumes.insert(uid.clone(), volume);
        place.disk.bytes.insert(uid.clone(), size);
        Ok(())
    }

    /// What lies there of the same content is taken over.
    fn begin_fill(&mut self, pool: &PoolName, uid: &Uid, generation: Generation) -> Result<(), Failed> {
        let digest = self.view.images.get(uid).ok_or(Failed)?.digest;
        let place = self.place(pool)?;
        let before = place.area.images.get(&digest).cloned();
        if let Some(before) = before.as_ref().filter(|before| before.holder != *uid)
            && let Some(bytes) = place.disk.bytes.remove(&before.holder)
        {
            place.disk.bytes.insert(uid.clone(), bytes);
        }
        let held = HeldImage {
            holder: uid.clone(),
            usable: before.as_ref().is_some_and(|before| before.usable),
            complete: before.as_ref().is_some_and(|before| before.complete),
            in_use: false,
            last_used: before.map_or(Timestamp(0), |before| before.last_used),
        };
        let complete = held.complete;
        place.area.images.insert(digest, held);
        if !complete {
            self.view.jobs.insert(job(JobKind::Fill, uid.clone(), generation));
        }
        Ok(())
    }

    fn abandon(&mut self, world: &mut World, import: &Uid, generation: Generation) -> Result<(), Failed> {
        self.view.jobs.retain(|job| job.uid != *import);
        if self.reach != super::Reach::Connected {
            return Err(Failed);
        }
        let version = world.version();
        let mut all = world.edit(Kind::Imports).imports.values_mut();
        if let Some(found) = all.find(|found| found.uid == *import) {
            (found.released, found.version) = (Some(generation), version);
        }
        if let Some(known) = self.view.transfers.get_mut(import) {
            known.released = Some(generation);
        }
        Ok(())
    }

    fn remove(&mut self, world: &mut World, pool: &PoolName, uid: &Uid, step: &Step) -> Result<(), Failed> {
        let stays = world.sabotage == Sabotage::ReleaseWithoutRemoving;
        let consents = world.files.get(uid).is_some_and(|file| file.discards);
        let given_up = world.given_up.contains(uid);
        let place = self.place(pool)?;
        let (mut used, mut lost) = (false, !given_up);
        match step {
            Step::RemoveVolume { .. } => {
                used = place.area.volumes.remove(uid).is_some_and(|volume| volume.attached);
                place.disk.origins.remove(uid);
            }
            Step::RemoveFile { .. } => {
                if let Some(file) = place.area.files.remove(uid) {
                    used = file.shown != Shown::ToNone;
                    lost |= file.only_copy && !consents;
                }
                place.area.work_dirs.remove(uid);
            }
            _ => drop(place.area.work_dirs.remove(uid)),
        }
        if !stays {
            place.disk.bytes.remove(uid);
        }
        world.coverage.note("node removes bytes");
        if used {
            world.accuse(Wrong::EvictedInUse, || format!("{uid} goes while something uses it"));
        }
        if lost {
            world.accuse(Wrong::LostOnlyCopy, || format!("{uid} goes, and is nowhere else"));
        }
        Ok(())
    }

    fn remove_image(
        &mut self,
        world: &mut World,
        pool: &PoolName,
        uid: &Uid,
        digest: &Digest,
    ) -> Result<(), Failed> {
        let stays = world.sabotage == Sabotage::ReleaseWithoutRemoving;
        let place = self.place(pool)?;
        if place.area.images.get(digest).is_none_or(|held| held.holder != *uid) {
            return Ok(());
        }
        if place.disk.origins.values().any(|origin| origin == digest) {
            return Err(Failed); // a volume reads from it
        }
        place.area.images.remove(digest);
        if !stays {
            place.disk.bytes.remove(uid);
        }
        world.coverage.note("node removes bytes");
        Ok(())
    }

    /// Work that runs comes to its end.
    pub fn finish(&mut self, world: &mut World, done: &JobKey) {
        if !self.view.jobs.remove(done) {
            return;
        }
        world.tell(|| format!("node {}: ended {done:?}", self.view.node));
        match done.kind {
            JobKind::Fill => {
                for (name, pool) in &mut self.view.pools {
                    let Some(area) = &mut pool.area else { continue };
                    let Some(image) = area.images.values_mut().find(|held| held.holder == done.uid) else {
                        continue;
                    };
                    (image.usable, image.complete) = (true, true);
                    let bytes = area.promises.get(&done.uid).map(|promise| promise.data);
                    let disk = self.disks.get_mut(name).expect("one for each pool");
                    disk.bytes.insert(done.uid.clone(), bytes.unwrap_or(Bytes(UNIT)));
                }
            }
            JobKind::Fetch | JobKind::Push => {
                let areas = self.view.pools.values_mut().filter_map(|pool| pool.area.as_mut());
                for file in areas.filter_map(|area| area.files.get_mut(&done.uid)) {
                    file.fetched |= done.kind == JobKind::Fetch;
                    file.only_copy &= done.kind == JobKind::Fetch;
                }
            }
            JobKind::Probe | JobKind::Transfer => self.import_ends(world, done),
            JobKind::Store => {}
        }
    }

    /// Only at the generation that is assigned now: the API server holds what this node says to that.
    fn import_ends(&self, world: &mut World, done: &JobKey) {
        if self.reach != super::Reach::Connected {
            return;
        }
        let (version, node) = (world.version(), &self.view.node);
        let mut all = world.edit(Kind::Imports).imports.values_mut();
        let found = all.find(|found| {
            let here = found.assignment.as_ref();
            found.uid == done.uid
                && here.is_some_and(|place| place.node == *node && place.generation == done.generation)
        });
        let Some(import) = found else { return };
        import.version = version;
        let size = Bytes(10 * UNIT);
        if done.kind == JobKind::Probe {
            import.peak = Some(size);
        } else {
            let digest = Digest(berth_core::ids::Sha256Sum::of(import.uid.as_str().as_bytes()));
            import.durable = Some(DurableImage { digest, virtual_size: size, real_size: size });
            world.coverage.note("import ready");
        }
    }
}

impl Disk {
    /// The kernel pools become as large as what is obeyed counts for.
    fn grow(&mut self, area: &AreaView) {
        if self.thin {
            let [images, volumes] = obeyed(area);
            let (percent, attain) = self.overcommit;
            let counts = if percent > 100 { charged(volumes, percent).max(attain) } else { volumes };
            self.grown = [self.grown[0].max(images), self.grown[1].max(counts)];
        }
    }
}
