//! Operators with views that lag, and nodes that obey by the protocol.

use std::collections::BTreeMap;

use berth_core::change::Change;
use berth_core::ids::{Lineage, NodeName, PoolName, Uid};
use berth_core::ledger::{Class, Promise};
use berth_core::units::{Bytes, Generation};
use berth_core::view::{LedgerView, View};
use berth_core::{image, pool, reservation};

use crate::dice::Dice;
use crate::world::{Sabotage, World, grown};

/// An operator: what it has seen, and what is left of the list that it carries out.
#[derive(Debug, Default)]
pub struct Operator {
    pub seen: View,
    pub left: Vec<Change>,
}

/// The kinds that are watched, each at its own pace.
pub const KINDS: usize = 6;

impl Operator {
    pub fn start(world: &World, leader: bool) -> Self {
        let mut operator = Self::default();
        operator.seen.leader = leader;
        (0..KINDS).for_each(|kind| operator.look(world, kind));
        operator
    }

    /// One watch catches up.
    pub fn look(&mut self, world: &World, kind: usize) {
        let (seen, objects) = (&mut self.seen, &world.objects);
        match kind {
            0 => seen.pools.clone_from(&objects.pools),
            1 => seen.nodes.clone_from(&objects.nodes),
            2 => seen.ledgers.clone_from(&objects.ledgers),
            3 => seen.reservations.clone_from(&objects.reservations),
            4 => seen.images.clone_from(&objects.images),
            _ => seen.imports.clone_from(&objects.imports),
        }
        if world.sabotage == Sabotage::EarlyRelease {
            for place in seen.reservations.values().filter_map(|r| Some((&r.uid, r.assignment.as_ref()?))) {
                let node =
                    seen.nodes.get_mut(&place.1.node).and_then(|node| node.pools.get_mut(&place.1.pool));
                if let Some(pool) = node {
                    pool.released.insert(place.0.clone(), place.1.generation);
                }
            }
        }
    }

    /// What it is about to place.
    pub fn placing(&self, world: &World) -> Vec<Uid> {
        let names = self.left.iter().filter_map(|change| match change {
            Change::AssignReservation { name, .. } => Some(name),
            _ => None,
        });
        let all = world.objects.reservations.values();
        names.flat_map(|name| all.clone().filter(move |r| r.name == *name).map(|r| r.uid.clone())).collect()
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
        if let Some(object) = dice.pick(&all) {
            self.left = self.about(object, world);
        }
    }

    /// Every object that it decides about.
    pub fn objects(&self) -> Vec<Object> {
        let pools = self.seen.pools.keys().cloned().map(Object::Pool);
        let reservations = self.seen.reservations.keys().cloned().map(Object::Reservation);
        let images = self.seen.images.keys().cloned().map(Object::Image);
        pools.chain(reservations).chain(images).collect()
    }

    pub fn about(&self, object: &Object, world: &World) -> Vec<Change> {
        let mut changes = match object {
            Object::Pool(name) => pool::decide(&self.seen, name, world.now),
            Object::Reservation(uid) => reservation::decide(&self.seen, uid, world.now),
            Object::Image(name) => image::decide(&self.seen, name, world.now),
        };
        let ledgers = changes.iter().filter(|change| matches!(change, Change::WriteLedger { .. })).count();
        assert!(ledgers <= 1, "one ledger write in a pass: {changes:?}");
        changes.reverse();
        changes
    }

    /// Carries out the next change; the list ends with the first that is refused.
    pub fn step(&mut self, world: &mut World) -> bool {
        let Some(change) = self.left.pop() else { return false };
        if let Ok(wrote) = world.apply(&change) {
            wrote
        } else {
            self.left.clear();
            false
        }
    }
}

/// Something that an operator decides about.
#[derive(Clone, Debug)]
pub enum Object {
    Pool(PoolName),
    Reservation(Uid),
    Image(String),
}

/// A promise that a node has obeyed.
#[derive(Clone, Debug)]
pub struct Obeyed {
    pub promise: Promise,
    /// The bytes are there.
    pub made: bool,
}

/// The record of one pool on a node: it outlives everything.
#[derive(Clone, Debug, Default)]
pub struct Record {
    pub lineage: Option<Lineage>,
    pub revision: u64,
    pub obeyed: BTreeMap<Uid, Obeyed>,
    pub released: BTreeMap<Uid, Generation>,
    /// What the kernel pools have grown to, where the pool has any: they never shrink.
    pub grown: [u64; 2],
}

impl Record {
    /// Bytes of data that are obeyed, for images and for volumes.
    fn data(&self) -> [u64; 2] {
        [Class::Images, Class::Volumes].map(|class| {
            let promises = self.obeyed.values().map(|obeyed| &obeyed.promise);
            promises.filter(|promise| promise.class == class).map(|promise| promise.charge.data.0).sum()
        })
    }
}

/// A node: what it has seen, and its records by pool.
#[derive(Debug)]
pub struct Node {
    pub name: NodeName,
    pub seen: View,
    pub records: BTreeMap<PoolName, Record>,
}

impl Node {
    pub fn new(name: &str, world: &World) -> Self {
        let name = NodeName::from(name);
        let pools = world.objects.nodes[&name].pools.keys();
        let records = pools.map(|pool| (pool.clone(), Record::default())).collect();
        Self { name, seen: View::default(), records }
    }

    /// One watch catches up.
    pub fn look(&mut self, world: &World, kind: usize) {
        match kind {
            2 => self.seen.ledgers.clone_from(&world.objects.ledgers),
            3 => self.seen.reservations.clone_from(&world.objects.reservations),
            4 => self.seen.images.clone_from(&world.objects.images),
            _ => {}
        }
    }

    /// Takes one step that the protocol allows: the first, or the one after `skip` others. False if there is none.
    pub fn act(&mut self, world: &mut World, skip: usize) -> bool {
        let pools: Vec<PoolName> = self.records.keys().cloned().collect();
        let steps: Vec<(PoolName, Step)> = pools
            .into_iter()
            .flat_map(|pool| self.steps(&pool).into_iter().map(move |s| (pool.clone(), s)))
            .collect();
        if steps.is_empty() {
            return false;
        }
        let (pool, step) = steps[skip % steps.len()].clone();
        self.take(world, &pool, step);
        true
    }

    fn steps(&self, pool: &PoolName) -> Vec<Step> {
        let record = &self.records[pool];
        let Some(ledger) = self.seen.ledgers.get(&(pool.clone(), self.name.clone())) else {
            return Vec::new();
        };
        let mut steps = Vec::new();
        let sound = record.lineage.as_ref().is_none_or(|lineage| *lineage == ledger.lineage)
            && ledger.revision >= record.revision
            && record.obeyed.keys().all(|uid| ledger.promises.contains_key(uid));
        for (uid, promise) in self.wanted(ledger) {
            let known = record.obeyed.contains_key(&uid) || record.released.contains_key(&uid);
            if sound && !known {
                steps.push(Step::Obey(uid, promise, ledger.lineage.clone(), ledger.revision));
            }
        }
        if sound && ledger.revision > record.revision && steps.is_empty() {
            steps.push(Step::Follow(ledger.lineage.clone(), ledger.revision));
        }
        for (uid, obeyed) in &record.obeyed {
            if !obeyed.made && !self.is_leaving(pool, uid) {
                steps.push(Step::Make(uid.clone(), obeyed.promise.generation));
            }
            if self.is_leaving(pool, uid) {
                steps.push(Step::Release(uid.clone(), obeyed.promise.generation));
            }
        }
        for (uid, promise) in &ledger.promises {
            let known = record.obeyed.contains_key(uid) || record.released.contains_key(uid);
            if !known && self.is_deleted(pool, uid) {
                steps.push(Step::Release(uid.clone(), promise.generation));
            }
        }
        let forgotten = record
            .released
            .keys()
            .filter(|uid| ledger.revision >= record.revision && !ledger.promises.contains_key(*uid));
        steps.extend(forgotten.cloned().map(Step::Forget));
        steps
    }

    /// What ledger and assignment both name, and nobody is deleting.
    fn wanted(&self, ledger: &LedgerView) -> Vec<(Uid, Promise)> {
        let named = |uid: &Uid, promise: &Promise| {
            let reservation = self.seen.reservations.get(uid).is_some_and(|reservation| {
                !reservation.deleting
                    && reservation.assignment.as_ref().is_some_and(|place| {
                        place.pool == ledger.pool
                            && place.node == ledger.node
                            && place.generation == promise.generation
                    })
            });
            reservation || self.seen.images.values().any(|image| image.uid == *uid && !image.deleting)
        };
        let entries =
            ledger.promises.iter().filter(|(uid, promise)| promise.revoked.is_none() && named(uid, promise));
        entries.map(|(uid, promise)| (uid.clone(), promise.clone())).collect()
    }

    /// The holder is here and is being deleted.
    fn is_deleted(&self, pool: &PoolName, uid: &Uid) -> bool {
        let here = |place: &berth_core::view::Placement| place.pool == *pool && place.node == self.name;
        self.seen.reservations.get(uid).is_some_and(|r| r.deleting && r.assignment.as_ref().is_some_and(here))
            || self.seen.images.values().any(|image| image.uid == *uid && image.deleting)
    }

    /// The holder is being deleted, or gone.
    fn is_leaving(&self, pool: &PoolName, uid: &Uid) -> bool {
        let there =
            self.seen.reservations.contains_key(uid) || self.seen.images.values().any(|i| i.uid == *uid);
        !there || self.is_deleted(pool, uid)
    }

    fn take(&mut self, world: &mut World, pool: &PoolName, step: Step) {
        let record = self.records.get_mut(pool).expect("one record for each pool");
        match step {
            Step::Obey(uid, promise, lineage, revision) => {
                record.lineage = Some(lineage);
                record.revision = revision;
                record.obeyed.insert(uid, Obeyed { promise, made: false });
            }
            Step::Follow(lineage, revision) => {
                record.lineage = Some(lineage);
                record.revision = revision;
            }
            Step::Make(uid, generation) => {
                record.obeyed.get_mut(&uid).expect("obeyed before").made = true;
                if world.objects.pools[pool].block.is_some() {
                    let data = record.data();
                    record.grown = [0, 1].map(|class| record.grown[class].max(data[class]));
                }
                if let Some(reservation) = world.objects.reservations.get(&uid).map(|r| r.uid.clone()) {
                    let version = world.version();
                    let object = world.objects.reservations.get_mut(&reservation).expect("just seen");
                    object.prepared = Some(generation);
                    object.version = version;
                }
            }
            Step::Release(uid, generation) => {
                record.obeyed.remove(&uid);
                record.released.insert(uid, generation);
            }
            Step::Forget(uid) => {
                record.released.remove(&uid);
            }
        }
    }

    /// Writes its report; true if it differs from the last.
    pub fn report(&self, world: &mut World) -> bool {
        let node = world.objects.nodes.get_mut(&self.name).expect("there");
        let before = node.pools.clone();
        for (pool, record) in &self.records {
            let report = node.pools.get_mut(pool).expect("there");
            report.lineage.clone_from(&record.lineage);
            report.obeyed_revision = record.revision;
            if report.thin.is_some() && world.sabotage != Sabotage::GrowthUntold {
                report.thin = Some(grown(record.grown));
            }
            report.released.clone_from(&record.released);
            report.obeyed =
                record.obeyed.iter().map(|(uid, o)| (uid.clone(), o.promise.generation)).collect();
            report.used =
                record.obeyed.values().filter(|o| o.made).map(|o| o.promise.charge.data).sum::<Bytes>();
        }
        node.pools != before
    }
}

#[derive(Clone, Debug)]
enum Step {
    Obey(Uid, Promise, Lineage, u64),
    /// Records a revision in which there is nothing to obey.
    Follow(Lineage, u64),
    Make(Uid, Generation),
    Release(Uid, Generation),
    Forget(Uid),
}
