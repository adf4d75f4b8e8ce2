//! Nodes: the shipped plan, carried out on a simulated disk that outlives everything.

mod execute;
mod report;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use berth_core::ids::ObjectName;
use berth_core::ids::{Digest, NodeName, PoolName, Uid, transfer_reservation_name};
use berth_core::ledger::Promise;
use berth_core::node::view::{
    JobKey, JobKind, NodeFile, NodeImage, NodeReservation, NodeTransfer, PoolOnNode, Shown,
};
use berth_core::node::{Halted, NodeView, plan};
use berth_core::transfer::TransferKind;
use berth_core::units::Bytes;
use berth_core::view::{Access, LedgerView, TransferState, TransferView};

use super::dice::Dice;
use super::sabotage::Sabotage;
use super::world::{Epochs, Kind, World};

/// What lies in the area of a pool, and what its record says beside what plans look at.
#[derive(Debug, Default)]
pub struct Disk {
    /// By holder.
    pub bytes: BTreeMap<Uid, Bytes>,
    /// All of each promise that is obeyed.
    pub promises: BTreeMap<Uid, Promise>,
    /// What volumes read from, where they go on to.
    pub origins: BTreeMap<Uid, Digest>,
    /// What the kernel pools have grown to, where the pool has any: they never shrink.
    pub grown: [u64; 2],
    /// How far the ledger that is obeyed overcommits volumes: its percentage, and what their kernel pool may become anyhow.
    pub overcommit: (u64, u64),
    pub thin: bool,
}

/// Whether a node can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It can.
    Connected,
    /// It goes on, but hears nothing and is not heard.
    CutOff,
    /// It is switched off.
    Down,
}

/// A node: what it has seen and recorded, and its disks by pool.
#[derive(Debug)]
pub struct Node {
    pub view: NodeView,
    pub disks: BTreeMap<PoolName, Disk>,
    pub reach: Reach,
    /// What it has seen is of before a restore. Its watches are silent until it notices, at its next renewal.
    pub stale: bool,
    epochs: Epochs,
}

impl Node {
    pub fn new(name: &str, world: &World) -> Self {
        let name = NodeName::from(name);
        let mut view = NodeView { node: name.clone(), ..NodeView::default() };
        let mut disks = BTreeMap::new();
        for pool in world.objects().nodes[&name].pools.keys() {
            let spec = &world.objects().pools[pool];
            let carried = PoolOnNode { wanted: Some(spec.uid.clone()), ..PoolOnNode::default() };
            view.pools.insert(pool.clone(), carried);
            disks.insert(pool.clone(), Disk { thin: spec.block.is_some(), ..Disk::default() });
        }
        Self { view, disks, reach: Reach::Connected, stale: false, epochs: [u64::MAX; Kind::ALL.len()] }
    }

    /// One watch catches up.
    pub fn look(&mut self, world: &World, kind: Kind) {
        let is_deaf = self.reach != Reach::Connected || self.stale;
        if is_deaf || self.epochs[kind as usize] == world.epochs[kind as usize] {
            return;
        }
        self.epochs[kind as usize] = world.epochs[kind as usize];
        let (objects, node) = (world.objects(), &self.view.node);
        match kind {
            Kind::Ledgers => {
                for (name, pool) in &mut self.view.pools {
                    pool.ledger = objects.ledgers.get(&(name.clone(), node.clone())).cloned();
                }
            }
            Kind::Reservations => self.view.reservations = reservations(world, node),
            Kind::Images => self.view.images = images(world, node),
            Kind::Imports => self.view.transfers = imports(world, node),
            Kind::Pools | Kind::Nodes => {}
        }
    }

    pub fn look_at_all(&mut self, world: &World) {
        Kind::ALL.into_iter().for_each(|kind| self.look(world, kind));
    }

    /// The agent is killed and started again: what it knew of the API server's answers and what ran are gone.
    pub fn restart(&mut self, world: &World) {
        self.view.jobs.clear();
        for area in self.view.pools.values_mut().filter_map(|pool| pool.area.as_mut()) {
            area.promises.values_mut().for_each(|promise| promise.reported = false);
            if world.sabotage == Sabotage::ForgetObeyed {
                area.promises.clear();
            }
        }
        self.begin_anew(world);
    }

    /// Every watch begins with a list.
    pub fn begin_anew(&mut self, world: &World) {
        self.stale = false;
        self.epochs = [u64::MAX; Kind::ALL.len()];
        self.look_at_all(world);
    }

    /// Carries out the first steps of its plan, at most so many; says how many.
    pub fn act(&mut self, world: &mut World, most: usize) -> usize {
        if self.reach == Reach::Down {
            return 0;
        }
        let steps = plan(&shown(&self.view, world.sabotage), world.now);
        let mut halted = Halted::default();
        let mut done = 0;
        for step in steps.into_iter().take(most) {
            if halted.bars(&step) || self.execute(world, &step).is_err() {
                halted.note(&step);
            } else {
                done += 1;
            }
        }
        done
    }

    /// Something on the node begins or ends to use what is there.
    pub fn workload(&mut self, world: &mut World, dice: &mut Dice) {
        if self.reach == Reach::Down {
            return;
        }
        let areas = self.view.pools.values_mut().filter_map(|pool| pool.area.as_mut());
        let (mut volumes, mut files) = (Vec::new(), Vec::new());
        for area in areas {
            volumes.extend(area.volumes.values_mut().filter(|volume| volume.ready));
            files.extend(area.files.values_mut().filter(|file| file.fetched));
        }
        let rather_volume = files.is_empty() || dice.once_in(2);
        if rather_volume && let Some(volume) = pick(volumes, dice) {
            volume.attached = !volume.attached;
            world.coverage.note(if volume.attached { "attach" } else { "detach" });
            return;
        }
        let Some(file) = pick(files, dice) else { return };
        (file.shown, file.only_copy) = match (file.shown, file.only_copy) {
            (Shown::ToNone, false) if dice.once_in(3) => (Shown::ToReaders, false),
            (Shown::ToNone, false) => {
                world.coverage.note("write to a file");
                (Shown::ToWriter, true)
            }
            (_, only_copy) => (Shown::ToNone, only_copy),
        };
    }

    /// Whatever uses bytes of holders that are leaving, or that are unknown, ends.
    pub fn end_workloads(&mut self) {
        let known = &self.view.reservations;
        let leaves = |uid: &Uid| known.get(uid).is_none_or(|reservation| reservation.deleting);
        for area in self.view.pools.values_mut().filter_map(|pool| pool.area.as_mut()) {
            let volumes = area.volumes.iter_mut().filter(|(uid, _)| leaves(uid));
            volumes.for_each(|(_, volume)| volume.attached = false);
            let files = area.files.iter_mut().filter(|(uid, _)| leaves(uid));
            files.for_each(|(_, file)| file.shown = Shown::ToNone);
        }
    }

    /// Whatever it obeys, or may obey by its ledgers as it has seen them.
    pub fn promised(&self) -> BTreeSet<(Uid, PoolName)> {
        let mut promised = BTreeSet::new();
        for (name, pool) in &self.view.pools {
            let seen = pool.ledger.iter().flat_map(|ledger| ledger.promises.keys());
            let area = pool.area.iter().flat_map(|area| &area.promises);
            let obeyed = area.filter(|(_, promise)| !promise.released).map(|(uid, _)| uid);
            promised.extend(seen.chain(obeyed).map(|uid| (uid.clone(), name.clone())));
        }
        promised
    }

    /// Everything that it works on, which may end.
    pub fn jobs(&self) -> Vec<JobKey> {
        self.view.jobs.iter().cloned().collect()
    }
}

fn pick<'t, T>(from: Vec<&'t mut T>, dice: &mut Dice) -> Option<&'t mut T> {
    let count = from.len();
    let at = (count > 0).then(|| dice.below(count))?;
    from.into_iter().nth(at)
}

fn reservations(world: &World, node: &NodeName) -> BTreeMap<Uid, NodeReservation> {
    let all = world.objects().reservations.values();
    let import_of = |name: &ObjectName| {
        let mut imports = world.objects().imports.values();
        let made = |import: &TransferView| {
            transfer_reservation_name(TransferKind::Import, &import.name.name, &import.uid) == name.name
        };
        imports.find(|import| made(import)).map(|import| import.uid.clone())
    };
    let here = all.filter_map(|found| {
        let place = found.assignment.as_ref().filter(|place| place.node == *node)?;
        let reservation = NodeReservation {
            name: found.name.clone(),
            deleting: found.deleting,
            pool: place.pool.clone(),
            generation: place.generation,
            access: found.access,
            image: found.assigned_image.as_ref().map(|image| image.digest),
            file: world.files.get(&found.uid).copied().filter(|_| found.access == Access::File),
            transfer: import_of(&found.name),
            labels: BTreeMap::new(),
        };
        Some((found.uid.clone(), reservation))
    });
    here.collect()
}

fn images(world: &World, node: &NodeName) -> BTreeMap<Uid, NodeImage> {
    let here = world.objects().images.values().filter(|image| image.node == *node);
    let image = |image: &berth_core::view::ImageView| NodeImage {
        name: image.name.clone(),
        deleting: image.deleting,
        pool: image.pool.clone(),
        digest: image.digest,
        data: image.data_bytes,
        virtual_size: image.virtual_size,
    };
    here.map(|found| (found.uid.clone(), image(found))).collect()
}

fn imports(world: &World, node: &NodeName) -> BTreeMap<Uid, NodeTransfer> {
    let all = world.objects().imports.values();
    let here = all.filter_map(|found| {
        let place = found.assignment.as_ref().filter(|place| place.node == *node)?;
        let reservation = transfer_reservation_name(TransferKind::Import, &found.name.name, &found.uid);
        let import = NodeTransfer {
            kind: TransferKind::Import,
            name: found.name.clone(),
            deleting: found.deleting,
            generation: place.generation,
            reservation: ObjectName::new(&found.name.namespace, reservation),
            suspended: found.suspended,
            planned: found.peak.is_some(),
            ended: found.durable.is_some()
                || matches!(found.state, TransferState::Done | TransferState::Failed),
            released: found.released,
        };
        Some((found.uid.clone(), import))
    });
    here.collect()
}

/// What plans are shown: what there is, or what a defect makes of it.
fn shown(seen: &NodeView, sabotage: Sabotage) -> Cow<'_, NodeView> {
    let mut view = Cow::Borrowed(seen);
    match sabotage {
        Sabotage::RemoveInUse => {
            for area in view.to_mut().pools.values_mut().filter_map(|pool| pool.area.as_mut()) {
                area.volumes.values_mut().for_each(|volume| volume.attached = false);
                area.files.values_mut().for_each(|file| file.shown = Shown::ToNone);
            }
        }
        Sabotage::RemoveUnsent => {
            for area in view.to_mut().pools.values_mut().filter_map(|pool| pool.area.as_mut()) {
                area.files.values_mut().for_each(|file| file.only_copy = false);
            }
        }
        Sabotage::ObeyBehind => {
            for (name, pool) in &mut view.to_mut().pools {
                let (Some(area), Some(ledger)) = (&pool.area, &mut pool.ledger) else { continue };
                if let Some(lineage) = &area.lineage {
                    ledger.lineage.clone_from(lineage);
                }
                ledger.revision = ledger.revision.max(area.revision);
                add_held(ledger, seen, name);
            }
        }
        Sabotage::ObeyWithoutAssignment => assign_all(view.to_mut()),
        _ => {}
    }
    view
}

/// Shows a ledger as if it held what the node does.
fn add_held(ledger: &mut LedgerView, seen: &NodeView, name: &PoolName) {
    let Some(area) = seen.pools.get(name).and_then(|pool| pool.area.as_ref()) else { return };
    for (uid, obeyed) in area.promises.iter().filter(|(_, promise)| !promise.released) {
        let charge = berth_core::ledger::Charge { data: obeyed.data, metadata: Bytes::ZERO };
        let holder = berth_core::ledger::Holder::Image(String::new());
        let generation = obeyed.generation;
        let promise = Promise { holder, class: obeyed.class, charge, generation, revoked: None };
        ledger.promises.entry(uid.clone()).or_insert(promise);
    }
}

/// Shows every promise as one whose holder is assigned to this node.
fn assign_all(view: &mut NodeView) {
    let mut invented = Vec::new();
    for (name, ledger) in view.pools.iter().filter_map(|(name, pool)| Some((name, pool.ledger.as_ref()?))) {
        for (uid, promise) in &ledger.promises {
            let berth_core::ledger::Holder::Reservation(holder) = &promise.holder else { continue };
            let reservation = NodeReservation {
                name: holder.clone(),
                deleting: false,
                pool: name.clone(),
                generation: promise.generation,
                access: Access::File,
                image: None,
                file: None::<NodeFile>,
                transfer: None,
                labels: BTreeMap::new(),
            };
            invented.push((uid.clone(), reservation));
        }
    }
    invented.into_iter().for_each(|(uid, found)| {
        view.reservations.entry(uid).or_insert(found);
    });
}

/// What work of this kind is called.
pub const fn job(kind: JobKind, uid: Uid, generation: berth_core::units::Generation) -> JobKey {
    JobKey { kind, uid, generation }
}
