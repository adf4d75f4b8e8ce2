//! The plan carried out on a simulated node that can be cut off between any two effects.

mod closing;
mod files;
mod given_back;
mod growth;
mod images;
mod imports;

use std::collections::{BTreeMap, BTreeSet};

use super::view::{
    AreaView, HeldImage, HeldVolume, HeldWorkDir, JobKey, JobKind, NodeImage, NodeReservation, NodeTransfer,
    NodeView, ObeyedPromise, PoolOnNode,
};
use super::{Halted, Origin, Step, behind, plan};
use crate::ids::{Digest, ObjectName, PoolName, Sha256Sum, Uid};
use crate::ledger::{Charge, Class, Holder, Promise};
use crate::units::{Bytes, Generation, Timestamp};
use crate::view::{Access, LedgerCapacity, LedgerView, ObjectVersion};

/// The view, and beside it what really lies on the disk.
#[derive(Clone)]
struct Node {
    view: NodeView,
    disk: BTreeSet<String>,
    /// Which images their store keeps for this node.
    pins: BTreeSet<Uid>,
    /// How often an image was fetched.
    fetched: usize,
    /// Effects until the power fails.
    left: usize,
    /// Files that were sent to their object store.
    sent: BTreeSet<Uid>,
    /// Steps that have no effect and fail.
    fails: fn(&Step) -> bool,
}

#[derive(Debug)]
struct PowerCut;

impl Node {
    fn effect(&mut self, act: impl FnOnce(&mut AreaView, &mut BTreeSet<String>)) -> Result<(), PowerCut> {
        self.left = self.left.checked_sub(1).ok_or(PowerCut)?;
        let area =
            self.view.pools.get_mut(&PoolName::from("p")).and_then(|pool| pool.area.as_mut()).expect("area");
        act(area, &mut self.disk);
        Ok(())
    }

    fn run(&mut self, step: &Step) -> Result<(), PowerCut> {
        match step {
            Step::PreparePool { pool } => {
                self.left = self.left.checked_sub(1).ok_or(PowerCut)?;
                self.view.pools.get_mut(pool).expect("planned").area = Some(AreaView::default());
                Ok(())
            }
            Step::Obey { lineage, revision, promises, .. } => self.effect(|area, _| {
                (area.lineage, area.revision) = (Some(lineage.clone()), *revision);
                let obeyed = promises.iter().map(|(uid, promise)| (uid.clone(), ObeyedPromise::new(promise)));
                area.promises.extend(obeyed);
            }),
            Step::GrowVolumes { .. } => self.effect(|area, _| area.volumes_lack = None),
            Step::MakeWorkDir { reservation, generation, .. } => {
                self.must_be_obeyed(reservation);
                let held = |made| HeldWorkDir { generation: *generation, made };
                self.effect(|area, _| {
                    area.work_dirs.insert(reservation.clone(), held(false));
                })?;
                self.effect(|area, disk| {
                    disk.insert(format!("dir {reservation}"));
                    area.work_dirs.insert(reservation.clone(), held(true));
                })
            }
            Step::MakeVolume { reservation, generation, size, origin, .. } => {
                self.make_volume(reservation, *generation, *size, origin)
            }
            Step::GrowVolume { reservation, size, .. } => self.grow_volume(reservation, *size),
            Step::FillImage { image, .. } => self.fill(image),
            Step::BeginFile { .. }
            | Step::FetchFile { .. }
            | Step::PushFile { .. }
            | Step::RemoveFile { .. } => self.run_file(step),
            Step::RemoveWorkDir { .. } | Step::RemoveVolume { .. } | Step::RemoveImage { .. } => {
                self.remove(step)
            }
            Step::Released { holder, .. } => {
                assert!(
                    !self.disk.iter().any(|name| name.ends_with(holder.as_str())),
                    "bytes remain: {:?}",
                    self.disk
                );
                self.effect(|area, _| area.promises.get_mut(holder).expect("planned").released = true)
            }
            Step::Forget { holders, .. } => self.effect(|area, _| {
                for uid in holders {
                    area.promises.remove(uid);
                }
            }),
            other => panic!("not simulated: {other:?}"),
        }
    }

    fn remove(&mut self, step: &Step) -> Result<(), PowerCut> {
        match step {
            Step::RemoveWorkDir { reservation, .. } => {
                self.effect(|_, disk| {
                    disk.remove(&format!("dir {reservation}"));
                })?;
                self.effect(|area, _| {
                    area.work_dirs.remove(reservation);
                })
            }
            Step::RemoveVolume { reservation, .. } => {
                self.effect(|area, _| area.volumes.get_mut(reservation).expect("planned").ready = false)?;
                self.effect(|_, disk| {
                    disk.remove(&format!("volume {reservation}"));
                })?;
                self.effect(|area, _| {
                    area.volumes.remove(reservation);
                })
            }
            Step::RemoveImage { image, digest, .. } => {
                self.pins.remove(image);
                let held = self.view.pools[&PoolName::from("p")]
                    .area
                    .as_ref()
                    .and_then(|area| area.images.get(digest));
                if held.is_none_or(|held| held.holder != *image) {
                    return Ok(());
                }
                self.effect(|area, _| {
                    let held = area.images.get_mut(digest).expect("planned");
                    (held.usable, held.complete) = (false, false);
                })?;
                self.effect(|_, disk| {
                    disk.remove(&format!("image {digest}"));
                })?;
                self.effect(|area, _| {
                    area.images.remove(digest);
                })
            }
            other => unreachable!("{other:?} removes nothing"),
        }
    }

    fn grow_volume(&mut self, uid: &Uid, size: Bytes) -> Result<(), PowerCut> {
        let area = self.view.pools[&PoolName::from("p")].area.as_ref().expect("area");
        let promise = area.promises.get(uid).expect("planned");
        assert!(promise.reported && promise.data >= size, "larger than is promised, and known to be");
        self.effect(|area, _| area.volumes.get_mut(uid).expect("planned").size = size)
    }

    fn make_volume(
        &mut self,
        uid: &Uid,
        generation: Generation,
        size: Bytes,
        origin: &Origin,
    ) -> Result<(), PowerCut> {
        self.must_be_obeyed(uid);
        if let Origin::Image(digest) = origin {
            assert!(self.disk.contains(&format!("image {digest}")), "cloned from nothing");
        }
        let held = |ready| HeldVolume { generation, size, ready, lost: false, attached: false };
        self.effect(|area, _| {
            area.volumes.insert(uid.clone(), held(false));
        })?;
        self.effect(|_, disk| {
            disk.insert(format!("volume {uid}"));
        })?;
        self.effect(|area, _| {
            area.volumes.insert(uid.clone(), held(true));
        })
    }

    fn fill(&mut self, uid: &Uid) -> Result<(), PowerCut> {
        self.must_be_obeyed(uid);
        let image = self.view.images[uid].clone();
        self.pins.insert(uid.clone());
        let area = self.view.pools[&PoolName::from("p")].area.as_ref().expect("area");
        let there = area.images.get(&image.digest).is_some_and(|held| held.complete);
        self.fetched += usize::from(!there);
        let held = |complete| HeldImage {
            holder: uid.clone(),
            usable: complete,
            complete,
            in_use: false,
            last_used: Timestamp(1),
        };
        self.effect(|area, _| {
            area.images.insert(image.digest, held(there));
        })?;
        self.effect(|_, disk| {
            disk.insert(format!("image {}", image.digest));
        })?;
        self.effect(|area, _| {
            area.images.insert(image.digest, held(true));
        })
    }

    fn must_be_obeyed(&self, uid: &Uid) {
        let area = self.view.pools[&PoolName::from("p")].area.as_ref().expect("area");
        assert!(area.promises.get(uid).is_some_and(|p| !p.released), "{uid} is not promised");
    }

    /// Tells the API server what is obeyed; false if it knew.
    fn report(&mut self) -> bool {
        let area = self.view.pools.get_mut(&PoolName::from("p")).and_then(|pool| pool.area.as_mut());
        let news =
            area.into_iter().flat_map(|area| area.promises.values_mut()).filter(|promise| !promise.reported);
        news.map(|promise| promise.reported = true).count() > 0
    }

    /// Runs a plan, but nothing for an object after a step for it that has failed.
    fn round(&mut self, steps: Vec<Step>) -> Result<(), PowerCut> {
        let mut halted = Halted::default();
        for step in steps {
            if halted.bars(&step) || (self.fails)(&step) {
                halted.note(&step);
            } else {
                self.run(&step)?;
            }
        }
        Ok(())
    }

    /// Plans and runs until nothing is left to do.
    fn settle(&mut self) -> Result<usize, PowerCut> {
        let before = self.left;
        for _ in 0..100 {
            let steps = plan(&self.view, Timestamp(5));
            if steps.is_empty() && !self.report() {
                return Ok(before - self.left);
            }
            self.round(steps)?;
        }
        panic!("it never settles: {:?}", plan(&self.view, Timestamp(5)));
    }
}

fn digest() -> Digest {
    Digest(Sha256Sum::of(b"image"))
}

fn reservation(name: &str, access: Access, image: Option<Digest>) -> (Uid, NodeReservation) {
    let reservation = NodeReservation {
        name: ObjectName::new("ns", name),
        deleting: false,
        pool: "p".into(),
        generation: Generation(1),
        access,
        image,
        file: None,
        transfer: None,
        labels: BTreeMap::new(),
    };
    (Uid::from(name), reservation)
}

fn promise(uid: &str, class: Class) -> (Uid, Promise) {
    let charge = Charge { data: Bytes::mib(64), metadata: Bytes::ZERO };
    let holder = Holder::Reservation(ObjectName::new("ns", uid));
    (Uid::from(uid), Promise { holder, class, charge, generation: Generation(1), revoked: None })
}

/// A work directory, a blank volume, and a clone of an image that is not there yet.
fn asked() -> Node {
    let ledger = LedgerView {
        name: "p-n".to_owned(),
        version: ObjectVersion::default(),
        pool: "p".into(),
        node: "n".into(),
        lineage: "l1".into(),
        revision: 4,
        rebuilt: None,
        capacity: LedgerCapacity::default(),
        promises: BTreeMap::from([
            promise("work", Class::Images),
            promise("blank", Class::Volumes),
            promise("clone", Class::Volumes),
            promise("img", Class::Images),
        ]),
    };
    let image = NodeImage {
        name: "img".to_owned(),
        deleting: false,
        pool: "p".into(),
        digest: digest(),
        data: Bytes::mib(64),
        virtual_size: Bytes::mib(128),
    };
    let view = NodeView {
        node: "n".into(),
        pools: BTreeMap::from([(
            "p".into(),
            PoolOnNode { wanted: Some("pu".into()), area: None, ledger: Some(ledger) },
        )]),
        reservations: BTreeMap::from([
            reservation("work", Access::File, None),
            reservation("blank", Access::Block, None),
            reservation("clone", Access::Block, Some(digest())),
        ]),
        images: BTreeMap::from([("img".into(), image)]),
        ..NodeView::default()
    };
    Node {
        view,
        disk: BTreeSet::new(),
        pins: BTreeSet::new(),
        fetched: 0,
        sent: BTreeSet::new(),
        left: 1000,
        fails: |_| false,
    }
}

fn delete_all(node: &mut Node) {
    node.view.reservations.values_mut().for_each(|reservation| reservation.deleting = true);
    node.view.images.values_mut().for_each(|image| image.deleting = true);
}

fn ledger(node: &mut Node) -> &mut LedgerView {
    node.view.pools.get_mut(&PoolName::from("p")).and_then(|pool| pool.ledger.as_mut()).expect("ledger")
}

fn area(node: &Node) -> &AreaView {
    node.view.pools[&PoolName::from("p")].area.as_ref().expect("area")
}

#[test]
fn a_cut_after_any_effect_leads_to_the_same_end() {
    let start = asked();
    let mut made = start.clone();
    let effects = made.settle().unwrap();
    assert_eq!(made.disk.len(), 4, "{:?}", made.disk);
    let mut gone = made.clone();
    delete_all(&mut gone);
    let removals = gone.settle().unwrap();
    assert!(gone.disk.is_empty() && area(&gone).promises.values().all(|p| p.released));
    assert!(effects >= 12 && removals >= 12, "{effects} {removals}");
    let mut leaving = made.clone();
    delete_all(&mut leaving);
    for (first, end, count) in [(&start, &made, effects), (&leaving, &gone, removals)] {
        for cut in 0..count {
            let mut node = first.clone();
            node.left = cut;
            assert!(node.settle().is_err(), "cut {cut} is before the end");
            node.left = 1000;
            node.settle().unwrap();
            assert_eq!((&node.disk, area(&node)), (&end.disk, area(end)), "cut after {cut} effects");
        }
    }
}

#[test]
fn deleted_while_it_is_made_leaves_nothing_after_any_cut() {
    for cut in 1..30 {
        let mut node = asked();
        node.left = cut;
        let _ = node.settle();
        node.left = 1000;
        delete_all(&mut node);
        node.settle().unwrap();
        assert!(node.disk.is_empty(), "cut {cut}: {:?}", node.disk);
        assert!(area(&node).promises.values().all(|promise| promise.released));
        assert_eq!(area(&node).promises.len(), 4, "each release is acknowledged");
        let ledger = ledger(&mut node);
        ledger.promises.clear();
        ledger.revision += 1;
        node.view.reservations.clear();
        node.view.images.clear();
        node.settle().unwrap();
        assert!(area(&node).promises.is_empty(), "and forgotten once the ledger has dropped it");
    }
}

#[test]
fn what_is_revoked_is_given_back_and_what_is_only_not_seen_stays() {
    for cut in 0..20 {
        let mut node = asked();
        node.settle().unwrap();
        let (whole, seen) = (node.disk.clone(), std::mem::take(&mut node.view.reservations));
        node.settle().unwrap();
        assert_eq!(node.disk, whole, "a watch that lags deletes nothing");
        let ledger = ledger(&mut node);
        ledger.revision += 1;
        let revision = ledger.revision;
        for uid in seen.keys() {
            ledger.promises.get_mut(uid).unwrap().revoked = Some(revision);
        }
        node.left = cut;
        let _ = node.settle();
        node.left = 1000;
        node.settle().unwrap();
        let left: Vec<_> = node.disk.iter().filter(|bytes| !bytes.starts_with("image ")).collect();
        assert!(left.is_empty(), "cut {cut}: {left:?}");
        assert!(seen.keys().all(|uid| area(&node).promises[uid].released), "cut {cut}");
    }
}

#[test]
fn what_cannot_be_removed_is_not_released() {
    type Which = fn(&Step) -> bool;
    let removals: [(&str, &str, Which); 3] = [
        ("work", "dir work", |step| matches!(step, Step::RemoveWorkDir { .. })),
        ("blank", "volume blank", |step| matches!(step, Step::RemoveVolume { .. })),
        ("img", "image ", |step| matches!(step, Step::RemoveImage { .. })),
    ];
    for (holder, bytes, fails) in removals {
        let mut node = asked();
        node.settle().unwrap();
        delete_all(&mut node);
        node.fails = fails;
        for _ in 0..3 {
            let steps = plan(&node.view, Timestamp(5));
            node.round(steps).unwrap();
        }
        assert!(!area(&node).promises[&Uid::from(holder)].released, "{holder}");
        assert!(node.disk.iter().any(|name| name.starts_with(bytes)), "{holder}");
        assert!(area(&node).promises.values().any(|promise| promise.released), "the others go on");
        node.fails = |_| false;
        node.settle().unwrap();
        assert!(node.disk.is_empty() && area(&node).promises.values().all(|promise| promise.released));
    }
}

#[test]
fn a_volume_whose_file_is_gone_is_not_made_again() {
    let mut node = asked();
    node.settle().unwrap();
    for uid in ["blank", "clone"] {
        node.disk.remove(&format!("volume {uid}"));
        let pool = node.view.pools.get_mut(&PoolName::from("p")).unwrap();
        let volume = pool.area.as_mut().unwrap().volumes.get_mut(&Uid::from(uid)).unwrap();
        (volume.ready, volume.lost) = (false, true);
    }
    assert_eq!(plan(&node.view, Timestamp(5)), []);
}

#[test]
fn nothing_is_made_without_ledger_and_assignment_at_one_generation() {
    let mut unassigned = asked();
    unassigned.view.reservations.clear();
    unassigned.view.images.clear();
    let mut unpromised = asked();
    ledger(&mut unpromised).promises.clear();
    let mut other_generation = asked();
    other_generation.view.images.clear();
    other_generation.view.reservations.values_mut().for_each(|r| r.generation = Generation(2));
    let mut other_pool = asked();
    other_pool.view.images.clear();
    other_pool.view.reservations.values_mut().for_each(|r| r.pool = "q".into());
    for mut node in [unassigned, unpromised, other_generation, other_pool] {
        node.settle().unwrap();
        assert!(node.disk.is_empty() && area(&node).promises.is_empty());
        assert_eq!(area(&node).revision, 4, "the revision is recorded all the same");
    }
}

#[test]
fn a_ledger_that_is_behind_starts_nothing_and_releases_go_on() {
    let restores: [fn(&mut LedgerView); 3] = [
        |ledger| ledger.lineage = "l2".into(),
        |ledger| ledger.revision = 3,
        |ledger| drop(ledger.promises.remove(&Uid::from("work"))),
    ];
    for restore in restores {
        let mut node = asked();
        node.settle().unwrap();
        let (uid, new) = reservation("new", Access::File, None);
        node.view.reservations.insert(uid, new);
        let (uid, promised) = promise("new", Class::Images);
        ledger(&mut node).promises.insert(uid, promised);
        restore(ledger(&mut node));
        let known = area(&node).clone();
        assert!(behind(&ledger(&mut node).clone(), &known).is_some());
        assert_eq!(plan(&node.view, Timestamp(5)), [], "no new work");
        node.view.reservations.get_mut(&Uid::from("blank")).unwrap().deleting = true;
        node.settle().unwrap();
        assert!(!node.disk.contains("volume blank"));
        assert!(!node.disk.contains("dir new"));
    }
}

#[test]
fn a_volume_in_use_and_an_image_that_is_awaited_stay() {
    let mut node = asked();
    node.settle().unwrap();
    let uid = Uid::from("blank");
    let pool = node.view.pools.get_mut(&PoolName::from("p")).unwrap();
    pool.area.as_mut().unwrap().volumes.get_mut(&uid).unwrap().attached = true;
    node.view.reservations.get_mut(&uid).unwrap().deleting = true;
    assert_eq!(plan(&node.view, Timestamp(5)), []);

    let mut node = asked();
    node.view.images.values_mut().for_each(|image| image.deleting = true);
    node.settle().unwrap();
    assert!(node.disk.contains("volume clone"), "the clone was made first");
    assert!(!node.disk.iter().any(|name| name.starts_with("image")), "then the image went");
}
