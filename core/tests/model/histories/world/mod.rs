//! The API server: objects with versions, the writes that it takes or refuses, and what people do to them.

pub mod apply;
mod objects;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use berth_core::change::ReservationReport;
use berth_core::ids::{NodeName, ObjectName, PoolName, Uid};
use berth_core::ledger::{Holder, Promise};
use berth_core::node::view::NodeFile;
use berth_core::overcommit::Percent;
use berth_core::reason::Reason;
use berth_core::thin::BlockSize;
use berth_core::units::{Bytes, Timestamp};
use berth_core::view::{
    NodeLossPolicy, NodeState, ObjectVersion, Placement, PoolView, ReservationView, StoreView, View, WhenFull,
};

use super::coverage::Coverage;
use super::observer::Wrong;
use super::sabotage::Sabotage;
pub use objects::{grown, template};

pub const NODES: [&str; 3] = ["a", "b", "c"];
pub const POOLS: [&str; 2] = ["p", "q"];
pub const NAMESPACES: [&str; 2] = ["ns", "shop"];
/// What sizes are counted in: much more than a block, so that all of them bound and are bounded.
pub const UNIT: u64 = 64 << 20;
pub const NODE_BYTES: u64 = 100 * UNIT;
/// Of each kernel pool: enough for most of what its data can hold, but not for all; more where volumes are promised so many
/// percent of that.
pub const fn metadata_device(percent: u64) -> Bytes {
    Bytes::kib(65 * percent)
}
/// How many of the last operations are told of a history that fails.
const TOLD: usize = 40;

/// What is watched, each kind at its own pace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Pools,
    Nodes,
    Ledgers,
    Reservations,
    Images,
    Imports,
}

impl Kind {
    pub const ALL: [Self; 6] =
        [Self::Pools, Self::Nodes, Self::Ledgers, Self::Reservations, Self::Images, Self::Imports];
}

/// How often each kind has changed, so that a watch knows whether there is news.
pub type Epochs = [u64; Kind::ALL.len()];

#[derive(Debug)]
pub struct World {
    objects: View,
    pub epochs: Epochs,
    /// How often each node has renewed its Lease. It reports before it does.
    pub beats: BTreeMap<NodeName, u64>,
    pub now: Timestamp,
    pub sabotage: Sabotage,
    pub coverage: Coverage,
    /// What reservations of files ask for beside what operators see.
    pub files: BTreeMap<Uid, NodeFile>,
    /// Every placement that was ever given out.
    pub placements: BTreeMap<Uid, BTreeSet<Placement>>,
    /// Holders whose bytes somebody has given up: by deleting them, or by a rule that allows it.
    pub given_up: BTreeSet<Uid>,
    /// Holders, each with the place whose ledger was restored, deleted by hand or given up, so that it may not promise them there what
    /// they were assigned.
    pub lost_promises: BTreeSet<(Uid, PoolName, NodeName)>,
    /// The pool of kernel pools promises volumes so many percent of what is there.
    pub percent: u64,
    /// Where nodes hold something, or may come to obey it, that a restore made everybody forget: see [`World::forget`].
    pub forgotten: BTreeSet<(Uid, PoolName, NodeName)>,
    /// The same, of nodes that have not reported since: it counts only if they are lost before they do.
    untold: BTreeMap<NodeName, BTreeSet<(Uid, PoolName)>>,
    /// The first thing that must not have happened.
    pub wrong: Option<(Wrong, String)>,
    /// The last operations.
    pub told: VecDeque<String>,
    reports: BTreeMap<Uid, ReservationReport>,
    counter: u64,
}

impl World {
    pub fn new(sabotage: Sabotage, percent: u32) -> Self {
        let mut objects = View::default();
        objects.pools.insert(PoolName::from("p"), objects::pool("p", WhenFull::Queue));
        let thin = PoolView {
            block: Some(BlockSize::DEFAULT),
            overcommit: Percent::from(percent),
            ..objects::pool("q", WhenFull::Reject)
        };
        objects.pools.insert(PoolName::from("q"), thin);
        let release = |pool: &mut PoolView| pool.node_loss = NodeLossPolicy::Release;
        objects.pools.get_mut(&PoolName::from("q")).map(release);
        for name in NODES {
            let node = node(name, u64::from(percent));
            objects.nodes.insert(node.name.clone(), node);
        }
        objects.kube_nodes = Some(NODES.into_iter().map(NodeName::from).collect());
        for (name, size) in [("one", 20 * UNIT), ("two", 35 * UNIT)] {
            let import = template(name, size);
            objects.imports.insert(import.name.clone(), import);
        }
        let store = ObjectName::new("ns", "store");
        let view = StoreView {
            name: store.clone(),
            version: ObjectVersion::default(),
            assignment: None,
            deleting: false,
        };
        objects.stores.insert(store, view);
        Self {
            objects,
            epochs: Epochs::default(),
            beats: NODES.into_iter().map(|name| (NodeName::from(name), 1)).collect(),
            now: Timestamp(100_000_000),
            sabotage,
            coverage: Coverage { histories: 1, ..Coverage::default() },
            files: BTreeMap::new(),
            placements: BTreeMap::new(),
            given_up: BTreeSet::new(),
            lost_promises: BTreeSet::new(),
            percent: u64::from(percent),
            forgotten: BTreeSet::new(),
            untold: BTreeMap::new(),
            wrong: None,
            told: VecDeque::new(),
            reports: BTreeMap::new(),
            counter: 0,
        }
    }

    /// The objects as they are.
    pub const fn objects(&self) -> &View {
        &self.objects
    }

    /// The same, to change those of one kind.
    pub fn edit(&mut self, kind: Kind) -> &mut View {
        self.epochs[kind as usize] += 1;
        &mut self.objects
    }

    /// Everything that etcd has.
    pub fn backup(&self) -> View {
        self.objects.clone()
    }

    /// etcd goes back to an older state. Leases are soon renewed, and machines do not go back in time.
    pub fn restore(&mut self, backup: View) {
        let now = std::mem::replace(&mut self.objects, backup);
        for (name, node) in &mut self.objects.nodes {
            node.live = now.nodes.get(name).is_some_and(|node| node.live);
        }
        self.objects.kube_nodes = now.kube_nodes;
        self.reports.clear();
        let placed = self
            .objects
            .reservations
            .values()
            .filter_map(|found| Some((found.uid.clone(), BTreeSet::from([found.assignment.clone()?]))));
        self.placements = placed.collect();
        self.epochs.iter_mut().for_each(|epoch| *epoch += 1);
    }

    pub fn fresh(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    pub fn version(&mut self) -> ObjectVersion {
        ObjectVersion(self.fresh().to_string())
    }

    /// Says what must not have happened; only the first counts, for all that follows may come of it.
    pub fn accuse(&mut self, wrong: Wrong, what: impl FnOnce() -> String) {
        if self.wrong.is_none() {
            self.wrong = Some((wrong, what()));
        }
    }

    /// Remembers an operation.
    pub fn tell(&mut self, what: impl FnOnce() -> String) {
        if self.told.len() == TOLD {
            self.told.pop_front();
        }
        self.told.push_back(what());
    }

    /// What `kubectl delete` does to a reservation.
    pub fn delete_reservation(&mut self, uid: &Uid) {
        let version = self.version();
        self.given_up.insert(uid.clone());
        let objects = self.edit(Kind::Reservations);
        let Some(reservation) = objects.reservations.get_mut(uid) else { return };
        reservation.deleting = true;
        reservation.version = version;
        if !reservation.has_finalizer {
            objects.reservations.remove(uid);
        }
    }

    /// What `kubectl delete` does to a template: who deletes it gives its copies up.
    pub fn delete_template(&mut self, name: &ObjectName) {
        let version = self.version();
        let objects = self.edit(Kind::Imports);
        let Some(import) = objects.imports.get_mut(name) else { return };
        import.deleting = true;
        import.version = version;
        if !import.has_finalizer {
            objects.imports.remove(name);
        }
    }

    /// A deletion that the API server began before the finalizer was added, and carries out only now. True if it was assigned.
    pub fn slip(&mut self, uid: &Uid) -> bool {
        let guarded = self.objects.reservations.get(uid).is_some_and(|r| r.has_finalizer && !r.deleting);
        if !guarded {
            return false;
        }
        self.given_up.insert(uid.clone());
        let gone = self.edit(Kind::Reservations).reservations.remove(uid);
        gone.is_some_and(|gone| gone.assignment.is_some())
    }

    /// Whoever is assigned to this place, or is promised something there, may have lost that.
    pub fn lose_promises(&mut self, pool: &PoolName, node: &NodeName) {
        let all = self.objects.reservations.values();
        let here = all.filter(|found| {
            found.assignment.as_ref().is_some_and(|place| place.pool == *pool && place.node == *node)
        });
        let ledger = self.objects.ledgers.get(&(pool.clone(), node.clone()));
        let promised = ledger.iter().flat_map(|ledger| ledger.promises.keys());
        let lost = here.map(|found| &found.uid).chain(promised);
        self.lost_promises.extend(lost.map(|uid| (uid.clone(), pool.clone(), node.clone())));
    }

    /// True if the ledger of the place where this is assigned was lost since it may have promised it, or its image, something.
    pub fn has_lost(&self, uid: &Uid, place: &Placement) -> bool {
        self.lost_promises.contains(&(uid.clone(), place.pool.clone(), place.node.clone()))
    }

    /// A person deletes images that no template has any more, and that nobody gave up as it went. True if there were any.
    pub fn delete_forgotten_images(&mut self) -> bool {
        let mut forgotten = 0;
        for image in self.edit(Kind::Images).images.values_mut().filter(|image| !image.deleting) {
            image.deleting = true;
            forgotten += 1;
        }
        (0..forgotten).for_each(|_| self.coverage.note("image forgotten by its template"));
        forgotten > 0
    }

    /// A person deletes what an operator says to be lost, to fit no more since the ledger of its place was lost, or to lack an image
    /// since then whose template is gone. True if there was any.
    pub fn delete_lost(&mut self) -> bool {
        let all = self.objects.reservations.values().filter(|found| !found.deleting);
        let lost =
            all.filter(|found| found.assignment.as_ref().is_some_and(|place| self.is_lost(found, place)));
        let lost: Vec<Uid> = lost.map(|found| found.uid.clone()).collect();
        lost.iter().for_each(|uid| {
            self.coverage.note("lost with a restore");
            self.delete_reservation(uid);
        });
        !lost.is_empty()
    }

    fn is_lost(&self, found: &ReservationView, place: &Placement) -> bool {
        let ledger = self.objects.ledger_at(place);
        let promised = |uid: &Uid| ledger.is_some_and(|ledger| ledger.promises.contains_key(uid));
        let image = found.assigned_image.as_ref().map(|image| self.objects.images.get(&image.staged_image));
        let lacks_image = image.is_some_and(|image| image.is_none_or(|image| !promised(&image.uid)));
        let told = self.reports.get(&found.uid).map(|report| report.reason);
        self.has_lost(&found.uid, place)
            && match told {
                Some(Reason::VolumeLost | Reason::FileLost) => true,
                Some(Reason::InsufficientCapacity) => !promised(&found.uid) || lacks_image,
                Some(Reason::TemplateNotFound) => lacks_image,
                _ => false,
            }
    }

    /// What a node holds, or may come to obey, after a restore. A reservation that has another place by the restored objects, as
    /// where one restore follows another to a backup of between them, is known by nobody to be held here. One that has none
    /// gets this place again, unless the node is lost before it has told.
    pub fn forget(&mut self, node: &NodeName, held: BTreeSet<(Uid, PoolName)>) {
        let mut untold = BTreeSet::new();
        for (uid, pool) in held {
            let Some(found) = self.objects.reservations.get(&uid) else { continue };
            match &found.assignment {
                None => drop(untold.insert((uid, pool))),
                Some(place) if place.pool == pool && place.node == *node => {}
                Some(_) => drop(self.forgotten.insert((uid, pool, node.clone()))),
            }
        }
        self.untold.insert(node.clone(), untold);
    }

    /// The node has reported what it holds.
    pub fn heard(&mut self, node: &NodeName) {
        self.untold.remove(node);
    }

    /// The node is lost: what it has not told by now, it tells when it is back.
    pub fn lost(&mut self, node: &NodeName) {
        let untold = self.untold.remove(node).unwrap_or_default();
        self.forgotten.extend(untold.into_iter().map(|(uid, pool)| (uid, pool, node.clone())));
    }

    /// A person deletes what `kubectl berth check` names: a reservation that lost a place with a restore, and has another one
    /// since, while the node of the first still holds it. True if there was any.
    pub fn delete_placed_twice(&mut self) -> bool {
        let promises = |uid: &Uid, place: &(PoolName, NodeName)| {
            self.objects.ledgers.get(place).is_some_and(|ledger| ledger.promises.contains_key(uid))
        };
        let ledgers =
            |uid: &Uid| self.objects.ledgers.values().filter(|l| l.promises.contains_key(uid)).count();
        let back = self
            .forgotten
            .iter()
            .filter(|(uid, pool, node)| promises(uid, &(pool.clone(), node.clone())) && ledgers(uid) > 1);
        let there = |uid: &&Uid| self.objects.reservations.get(*uid).is_some_and(|found| !found.deleting);
        let twice: BTreeSet<Uid> = back.map(|(uid, ..)| uid).filter(there).cloned().collect();
        twice.iter().for_each(|uid| {
            self.coverage.note("placed twice after a restore");
            self.delete_reservation(uid);
        });
        !twice.is_empty()
    }

    /// A person decides about what a rebuilt ledger has kept for holders that are lost: they are given up.
    pub fn strike_recovered(&mut self) -> bool {
        let lost = |uid: &Uid, promise: &Promise, objects: &View| match &promise.holder {
            Holder::Reservation(_) => !objects.reservations.contains_key(uid),
            Holder::Image(name) => objects.images.get(name).is_none_or(|image| image.uid != *uid),
        };
        let mut struck = Vec::new();
        for (key, ledger) in &self.objects.ledgers {
            let Some(rebuilt) = ledger.rebuilt.as_ref() else { continue };
            let recovered = rebuilt.recovered.iter().filter(|uid| {
                ledger.promises.get(*uid).is_some_and(|promise| lost(uid, promise, &self.objects))
            });
            let uids: Vec<Uid> = recovered.cloned().collect();
            if !uids.is_empty() {
                struck.push((key.clone(), uids));
            }
        }
        for (key, uids) in &struck {
            let version = self.version();
            self.given_up.extend(uids.iter().cloned());
            let ledger = self.edit(Kind::Ledgers).ledgers.get_mut(key).expect("just seen");
            let rebuilt = ledger.rebuilt.as_mut().expect("just seen");
            uids.iter().for_each(|uid| {
                rebuilt.recovered.remove(uid);
            });
            ledger.revision += 1;
            ledger.version = version;
        }
        !struck.is_empty()
    }
}

/// A node that carries the pool of directories, except for the last one, and the pool of kernel pools.
fn node(name: &str, percent: u64) -> NodeState {
    let pools: &[&str] = if name == "c" { &["q"] } else { &POOLS };
    NodeState {
        name: NodeName::from(name),
        version: ObjectVersion("0".to_owned()),
        live: true,
        reported: true,
        silent: false,
        zone: None,
        pools: pools
            .iter()
            .map(|pool| (PoolName::from(*pool), objects::report((*pool == "q").then_some(percent))))
            .collect(),
    }
}
