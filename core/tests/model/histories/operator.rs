//! Operators: views that lag behind, and lists of changes that others may get in between.

use std::borrow::Cow;
use std::collections::BTreeMap;

use berth_core::change::Change;
use berth_core::ids::{NodeName, ObjectName, PoolName, Uid};
use berth_core::overcommit::Percent;
use berth_core::transfer::TransferKind;
use berth_core::units::Timestamp;
use berth_core::view::{Access, ImageView, View};
use berth_core::{image, pool, reservation, transfer};

use super::dice::Dice;
use super::observer::Wrong;
use super::rounds::{self, Left};
use super::sabotage::Sabotage;
use super::world::apply::absorb;
use super::world::{Epochs, Kind, World};

/// An operator: what it has seen, and what is left of what it carries out.
#[derive(Debug, Default)]
pub struct Operator {
    pub seen: View,
    pub left: Left,
    /// Of what it has seen.
    epochs: Epochs,
    /// How often each node had renewed its Lease when this operator began to watch.
    heard: BTreeMap<NodeName, u64>,
    /// How far its clock is ahead.
    skew: i64,
    /// What is wrong with its last decision.
    accused: Option<(Wrong, String)>,
}

/// Something that an operator decides about.
#[derive(Clone, Debug)]
pub enum Object {
    Pool(PoolName),
    Reservation(Uid),
    Image(String),
    Import(ObjectName),
}

impl Operator {
    /// Begins to watch: every report that was made before is only believed once the node is heard again.
    pub fn start(world: &World, leader: bool, skew: i64) -> Self {
        let mut operator = Self { heard: world.beats.clone(), skew, ..Self::default() };
        operator.seen.leader = leader;
        operator.seen.stores.clone_from(&world.objects().stores);
        operator.epochs = [u64::MAX; Kind::ALL.len()];
        operator.look_at_all(world);
        operator
    }

    /// One watch catches up.
    pub fn look(&mut self, world: &World, kind: Kind) {
        let (seen, objects) = (&mut self.seen, world.objects());
        if kind != Kind::Nodes && self.epochs[kind as usize] == world.epochs[kind as usize] {
            return;
        }
        self.epochs[kind as usize] = world.epochs[kind as usize];
        match kind {
            Kind::Pools => seen.pools.clone_from(&objects.pools),
            Kind::Nodes => {
                seen.nodes.clone_from(&objects.nodes);
                seen.kube_nodes.clone_from(&objects.kube_nodes);
                for (name, node) in &mut seen.nodes {
                    let heard = world.beats[name] > self.heard[name];
                    node.silent = !node.live;
                    node.live &= heard;
                    node.reported = heard;
                }
                seen.unheard = !seen.nodes.values().all(|node| node.reported || node.is_lost());
            }
            Kind::Ledgers => seen.ledgers.clone_from(&objects.ledgers),
            Kind::Reservations => seen.reservations.clone_from(&objects.reservations),
            Kind::Images => seen.images.clone_from(&objects.images),
            Kind::Imports => seen.imports.clone_from(&objects.imports),
        }
    }

    pub fn look_at_all(&mut self, world: &World) {
        Kind::ALL.into_iter().for_each(|kind| self.look(world, kind));
    }

    /// What it is about to place.
    pub fn placing<'o>(&'o self, world: &'o World) -> impl Iterator<Item = Uid> + 'o {
        let names = self.left.changes().filter_map(|change| match change {
            Change::AssignReservation { name, .. } => Some(name),
            _ => None,
        });
        names.filter_map(|name| world.objects().reservation_named(name).map(|found| found.uid.clone()))
    }

    /// Decides about one of the objects that it sees; rather about what is new.
    pub fn decide(&mut self, world: &World, dice: &mut Dice) {
        let new = self.seen.reservations.values().filter(|r| r.assignment.is_none() || r.deleting);
        let new: Vec<Object> = new.map(|r| Object::Reservation(r.uid.clone())).collect();
        let all = match dice.below(8) {
            0..4 if !new.is_empty() => new,
            4 => self.seen.pools.keys().cloned().map(Object::Pool).collect(),
            _ => self.objects(),
        };
        if let Some(object) = dice.pick(&all).cloned() {
            self.take_up(&object, world, Some(dice));
        }
    }

    /// Every object that it decides about.
    pub fn objects(&self) -> Vec<Object> {
        let pools = self.seen.pools.keys().cloned().map(Object::Pool);
        let reservations = self.seen.reservations.keys().cloned().map(Object::Reservation);
        let images = self.seen.images.keys().cloned().map(Object::Image);
        let imports = self.seen.imports.keys().cloned().map(Object::Import);
        pools.chain(reservations).chain(images).chain(imports).collect()
    }

    /// Decides about an object, and is about to carry that out. A request that has no place yet is decided about in a round,
    /// together with others that may go nowhere else: all of them, or some of them by the dice.
    pub fn take_up(&mut self, object: &Object, world: &World, dice: Option<&mut Dice>) {
        let now = Timestamp(world.now.0.saturating_add_signed(self.skew));
        let view = shown(&self.seen, world.sabotage);
        let asked = match object {
            Object::Reservation(uid) => rounds::asked(&view, uid),
            _ => None,
        };
        let left = match (asked, object) {
            (Some(asked), _) => rounds::round(&view, asked, dice, now),
            (None, Object::Pool(name)) => Left::one(pool::decide(&view, name, now)),
            (None, Object::Reservation(uid)) => Left::one(reservation::decide(&view, uid, now)),
            (None, Object::Image(name)) => Left::one(image::decide(&view, name, now)),
            (None, Object::Import(name)) => {
                Left::one(transfer::decide(&view, TransferKind::Import, name, now))
            }
        };
        drop(view);
        self.accused = left.changes().find_map(|change| self.judge(world, change));
        self.left = left;
    }

    /// Carries out the next change; a list ends with the first that is refused. Once in a while one is refused for no
    /// reason of ours, and once in a while the answer to one that was taken is lost.
    pub fn step(&mut self, world: &mut World, fault: Option<Fault>) -> bool {
        let Some(change) = self.left.next(&mut world.coverage) else { return false };
        if let Some((wrong, what)) = self.accused.take() {
            world.accuse(wrong, || what);
        }
        if let Change::DeleteImage { name, uid } = &change
            && is_retired(world, name, uid)
            && world.objects().is_referenced(name)
        {
            world.accuse(Wrong::EvictedInUse, || format!("image {name} was named after it was retired"));
        }
        if matches!(fault, Some(Fault::Refuses)) {
            world.coverage.note("refused by the API server");
            self.left.failed(world.sabotage);
            return false;
        }
        let result = world.apply(&change);
        if !matches!(result, Ok(false)) {
            let outcome = if result.is_ok() { "" } else { " (refused)" };
            world.tell(|| format!("operator (leader: {}): {}{outcome}", self.seen.leader, brief(&change)));
        }
        let answered = !matches!(fault, Some(Fault::LosesAnswer));
        if !answered {
            world.coverage.note("lost response");
        }
        if result.is_err() || !answered {
            self.left.failed(world.sabotage);
        } else {
            self.left.done();
            if matches!(result, Ok(true)) {
                absorb(&mut self.seen, world.objects(), &change);
            }
        }
        result.unwrap_or(false)
    }

    /// Looks at a change by what this operator has seen, whatever its decision was shown.
    fn judge(&self, world: &World, change: &Change) -> Option<(Wrong, String)> {
        match change {
            Change::ExpireReservation { name, uid, .. } => {
                let mut reports = self.seen.nodes.values().flat_map(|node| node.pools.values());
                let used = reports.any(|report| report.in_use.contains(uid));
                used.then(|| (Wrong::EvictedInUse, format!("{name} ends while something uses it")))
            }
            Change::DeleteReservation { name, uid } => {
                let found = self.seen.reservations.get(uid)?;
                let only = matches!(found.access, Access::Block) || found.only_copy.is_some();
                only.then(|| (Wrong::LostOnlyCopy, format!("{name} is deleted, and is nowhere else")))
            }
            Change::DeleteImage { name, .. } if world.objects().is_referenced(name) => {
                Some((Wrong::EvictedInUse, format!("image {name} goes though it is named")))
            }
            Change::WriteLedger { revision, promises, .. } => {
                let mut images = self.seen.images.values().filter(|image| {
                    promises.get(&image.uid).is_some_and(|promise| promise.revoked == Some(*revision))
                });
                images.find_map(|image| self.may_go(world, image))
            }
            _ => None,
        }
    }

    /// Looks at an image that is about to be retired, and that nobody has deleted.
    fn may_go(&self, world: &World, image: &ImageView) -> Option<(Wrong, String)> {
        if image.deleting {
            return None;
        }
        let name = &image.name;
        if self.seen.is_referenced(name) {
            return Some((Wrong::EvictedInUse, format!("image {name} is retired though it is named")));
        }
        let copied = is_copied(&self.seen, image) || is_copied(world.objects(), image);
        (!copied)
            .then(|| (Wrong::LostOnlyCopy, format!("image {name} is retired, and no other copy is known")))
    }
}

/// What goes wrong with a write.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// The API server refuses it.
    Refuses,
    /// It is taken, and nobody hears of it.
    LosesAnswer,
}

/// True if the image's ledger takes nothing more for it.
fn is_retired(world: &World, name: &str, uid: &Uid) -> bool {
    let objects = world.objects();
    let image = objects.images.get(name).filter(|image| image.uid == *uid);
    let ledger = image.and_then(|image| objects.ledgers.get(&(image.pool.clone(), image.node.clone())));
    ledger.and_then(|ledger| ledger.promises.get(uid)).is_some_and(|promise| promise.revoked.is_some())
}

/// True if a template that stays says that the image is durable, or the template was given up.
fn is_copied(objects: &View, image: &ImageView) -> bool {
    let mut templates = objects.imports.values().filter(|import| !import.deleting);
    let given_up = objects.images.get(&image.name).is_some_and(|now| now.uid == image.uid && now.given_up);
    given_up
        || templates.any(|import| import.durable.as_ref().is_some_and(|known| known.digest == image.digest))
}

/// What decisions are shown: what was seen, or what a defect makes of it.
fn shown(seen: &View, sabotage: Sabotage) -> Cow<'_, View> {
    let mut view = Cow::Borrowed(seen);
    let reports = |view: &mut View, act: &dyn Fn(&mut berth_core::view::NodePoolState)| {
        view.nodes.values_mut().flat_map(|node| node.pools.values_mut()).for_each(act);
    };
    match sabotage {
        Sabotage::EarlyRelease => {
            let view = view.to_mut();
            for ledger in seen.ledgers.values() {
                let node = view.nodes.get_mut(&ledger.node).and_then(|node| node.pools.get_mut(&ledger.pool));
                let given_back =
                    ledger.promises.iter().map(|(uid, promise)| (uid.clone(), promise.generation));
                node.into_iter().for_each(|report| report.released.extend(given_back.clone()));
            }
        }
        Sabotage::MetadataTwice => reports(view.to_mut(), &|report| {
            report.thin.iter_mut().flat_map(|thin| [&mut thin.images, &mut thin.volumes]).for_each(|pool| {
                pool.metadata.total.0 *= 2;
            });
        }),
        Sabotage::OvercommitTwice => view.to_mut().pools.values_mut().for_each(|pool| {
            pool.overcommit = Percent::from(pool.overcommit.get() * 2);
        }),
        Sabotage::ExpireInUse => reports(view.to_mut(), &|report| report.in_use.clear()),
        Sabotage::EvictByRecency => view.to_mut().reservations.values_mut().for_each(|reservation| {
            reservation.assigned_image = None;
            if reservation.assignment.is_some() {
                reservation.template = None;
            }
        }),
        Sabotage::EvictOnlyCopy => view.to_mut().images.values_mut().for_each(|image| image.given_up = true),
        Sabotage::AdmitBehind => reports(view.to_mut(), &|report| {
            (report.lineage, report.obeyed_revision) = (None, 0);
            report.obeyed.clear();
        }),
        _ => {}
    }
    view
}

/// A change in few words.
fn brief(change: &Change) -> String {
    match change {
        Change::WriteLedger { name, version, revision, promises, .. } => {
            let uids: Vec<&str> = promises.keys().map(Uid::as_str).collect();
            format!("WriteLedger {name} at {} to revision {revision}: {uids:?}", version.0)
        }
        Change::RebuildLedger { name, revision, promises, rebuilt, capacity, .. } => {
            let uids: Vec<&str> = promises.keys().map(Uid::as_str).collect();
            format!(
                "RebuildLedger {name} to revision {revision} from {rebuilt:?}: {uids:?} {:?}",
                capacity.total.data
            )
        }
        Change::AssignReservation { name, version, placement, .. } => {
            format!("AssignReservation {name} at {} to {placement:?}", version.0)
        }
        Change::ReportReservation { name, report, .. } => {
            format!("ReportReservation {name} {:?} {}: {}", report.state, report.reason, report.message)
        }
        other => format!("{other:?}"),
    }
}
