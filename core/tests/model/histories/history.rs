//! One history: operations of everybody at random, and then quiet, in which everything has to come to its end.

use berth_core::ids::{NodeName, PoolName, Uid};
use berth_core::ledger::is_behind;
use berth_core::units::Timestamp;
use berth_core::view::View;

use super::dice::Dice;
use super::node::{Node, Reach};
use super::observer::{Excused, Wrong, left_over, overcommitted, unsettled};
use super::operator::{Fault, Object, Operator};
use super::sabotage::Sabotage;
use super::world::{Kind, NODES, POOLS, World};

/// Of the two waves of a history.
const OPERATIONS: [usize; 2] = [110, 40];
/// How far volumes are overcommitted in the pool of kernel pools, in one history or another.
const PERCENTS: [u32; 4] = [100, 100, 150, 400];
/// How many backups are kept.
const BACKUPS: usize = 2;

/// Everything there is in one history.
pub struct History {
    pub world: World,
    pub operators: [Operator; 2],
    pub nodes: Vec<Node>,
    pub dice: Dice,
    backups: Vec<View>,
    excused: Excused,
}

type Result = std::result::Result<(), (Wrong, String)>;

impl History {
    pub fn new(seed: u64, sabotage: Sabotage) -> Self {
        let mut dice = Dice::new(seed);
        let mut world = World::new(sabotage, PERCENTS[dice.below(PERCENTS.len())]);
        let nodes = NODES.iter().map(|name| Node::new(name, &world)).collect();
        let operators = [Operator::start(&world, true, 0), Operator::start(&world, false, 0)];
        world.beats.values_mut().for_each(|beats| *beats += 1);
        Self { world, operators, nodes, dice, backups: Vec::new(), excused: Excused::new() }
    }

    pub fn into_world(self) -> World {
        self.world
    }

    /// All of it.
    pub fn run(&mut self) -> Result {
        self.wave(OPERATIONS[0])?;
        // What was grown stays, and others ask for what is given back.
        let settled: Vec<Uid> = self.world.objects().reservations.keys().cloned().collect();
        for uid in &settled {
            if !self.dice.once_in(3) {
                self.world.delete_reservation(uid);
            }
        }
        (0..4).for_each(|_| self.ask());
        self.wave(OPERATIONS[1])?;
        let all: Vec<Uid> = self.world.objects().reservations.keys().cloned().collect();
        all.iter().for_each(|uid| self.world.delete_reservation(uid));
        let templates: Vec<_> = self.world.objects().imports.keys().cloned().collect();
        templates.iter().for_each(|name| self.world.delete_template(name));
        self.settle()?;
        self.world.now = Timestamp(self.world.now.0 + 7_200_000);
        self.settle()?;
        if self.world.delete_forgotten_images() {
            self.settle()?;
        }
        let operations = self.world.coverage.operations;
        self.world.coverage.least = Some(operations);
        left_over(&self.world, &self.nodes).map_or(Ok(()), |what| Err((Wrong::Stuck, what)))
    }

    /// Everybody does something at random, and then all that there is to do.
    fn wave(&mut self, operations: usize) -> Result {
        for _ in 0..operations {
            self.world.coverage.operations += 1;
            if self.operate() {
                self.observe()?;
            }
        }
        self.settle()?;
        unsettled(&self.world, &self.nodes).map_or(Ok(()), |what| Err((Wrong::Stuck, what)))
    }

    /// Looks at everything from outside.
    pub fn observe(&mut self) -> Result {
        self.excuse();
        if self.world.wrong.is_none()
            && let Some(what) = overcommitted(&self.world, &self.nodes, &self.excused)
        {
            self.world.accuse(Wrong::Overcommit, || what);
        }
        self.world.wrong.clone().map_or(Ok(()), Err)
    }

    /// A ledger may lack what its node holds while the node is gone, and after that until it has been rebuilt.
    fn excuse(&mut self) {
        let lacks = |view: &View, node: &NodeName| {
            view.kube_nodes.as_ref().is_some_and(|nodes| !nodes.contains(node))
        };
        let is_gone = |node: &NodeName| {
            lacks(self.world.objects(), node) || self.operators.iter().any(|o| lacks(&o.seen, node))
        };
        let gone: Vec<bool> = self.nodes.iter().map(|node| is_gone(&node.view.node)).collect();
        let idle = self.operators.iter().all(|operator| operator.left.is_empty());
        for (node, gone) in self.nodes.iter().zip(gone) {
            for (name, pool) in &node.view.pools {
                let place = (name.clone(), node.view.node.clone());
                if gone {
                    self.world.lose_promises(&place.0, &place.1);
                    self.excused.insert(place);
                } else if idle && !node.stale && self.excused.contains(&place) {
                    // A node that has not seen the ledger as it is may still obey an earlier form of it.
                    let ledger = self.world.objects().ledgers.get(&place).filter(|ledger| {
                        pool.ledger.as_ref().is_some_and(|seen| seen.version == ledger.version)
                    });
                    let sound =
                        ledger.zip(pool.area.as_ref()).is_some_and(|(l, a)| is_behind(l, a).is_none());
                    if sound {
                        self.excused.remove(&place);
                    }
                }
            }
        }
    }

    /// One operation of somebody; true if it may have moved anything but a view.
    fn operate(&mut self) -> bool {
        let which = self.dice.below(2);
        let node = self.dice.below(NODES.len());
        match self.dice.below(200) {
            0..30 => self.by_people(),
            30..46 => self.race(),
            46..60 => {
                let kind = Kind::ALL[self.dice.below(Kind::ALL.len())];
                self.operators[which].look(&self.world, kind);
                return false;
            }
            60..66 => {
                self.operators[which].look_at_all(&self.world);
                return false;
            }
            66..82 => {
                if self.operators[which].left.is_empty() || self.dice.once_in(10) {
                    self.operators[which].decide(&self.world, &mut self.dice);
                }
                return false;
            }
            82..122 => {
                let fault = match self.dice.below(40) {
                    0 => Some(Fault::Refuses),
                    1 => Some(Fault::LosesAnswer),
                    _ => None,
                };
                return self.operators[which].step(&mut self.world, fault);
            }
            122..126 => self.crash(which),
            126..140 => {
                if self.dice.once_in(2) {
                    self.nodes[node].look_at_all(&self.world);
                } else {
                    let kind = Kind::ALL[self.dice.below(Kind::ALL.len())];
                    self.nodes[node].look(&self.world, kind);
                }
                return false;
            }
            140..160 => {
                let most = 1 + self.dice.below(5);
                return self.nodes[node].act(&mut self.world, most) > 0;
            }
            160..170 => {
                let answered = !self.dice.once_in(12);
                self.nodes[node].report(&mut self.world, answered);
            }
            170..176 => self.finish_some(node),
            176..185 => self.nodes[node].workload(&mut self.world, &mut self.dice),
            185..190 => self.time_passes(),
            _ => self.by_fate(node),
        }
        true
    }

    /// What happens to machines and to the API server.
    fn by_fate(&mut self, node: usize) {
        match self.dice.below(12) {
            0..4 => self.lose_or_return(node),
            4..6 => {
                self.world.coverage.note("node restarts");
                if self.nodes[node].reach == Reach::Connected {
                    self.nodes[node].restart(&self.world);
                }
            }
            6..9 => {
                self.world.coverage.note("backup");
                self.backups.push(self.world.backup());
                if self.backups.len() > BACKUPS {
                    let at = self.dice.below(BACKUPS);
                    self.backups.remove(at);
                }
            }
            9 | 10 => self.restore(),
            _ => self.delete_a_ledger(),
        }
    }

    /// etcd goes back. Operators notice at once, or are started again; nodes when they next look at their own objects.
    fn restore(&mut self) {
        let count = self.backups.len();
        if count == 0 {
            return;
        }
        self.world.coverage.note("restore");
        self.world.tell(|| "etcd is restored".to_owned());
        let backup = self.backups[self.dice.below(count)].clone();
        self.world.restore(backup);
        self.excuse_all(None);
        let leader = self.dice.below(2);
        for which in 0..2 {
            self.operators[which] = Operator::start(&self.world, which == leader, 0);
        }
        for node in &mut self.nodes {
            node.stale = true;
            self.world.forget(&node.view.node, node.promised());
            if node.reach != Reach::Connected {
                self.world.lost(&node.view.node);
            }
        }
        self.hear_all();
    }

    fn excuse_all(&mut self, only: Option<&(PoolName, NodeName)>) {
        for node in &self.nodes {
            let places = node.view.pools.keys().map(|pool| (pool.clone(), node.view.node.clone()));
            for place in places.filter(|place| only.is_none_or(|only| only == place)) {
                self.world.lose_promises(&place.0, &place.1);
                self.excused.insert(place);
            }
        }
    }

    /// Somebody deletes a ledger by hand.
    fn delete_a_ledger(&mut self) {
        let all: Vec<_> = self.world.objects().ledgers.keys().cloned().collect();
        let Some(place) = self.dice.pick(&all).cloned() else { return };
        self.world.coverage.note("delete a ledger");
        self.world.tell(|| format!("the ledger of {place:?} is deleted"));
        self.excuse_all(Some(&place));
        self.world.edit(Kind::Ledgers).ledgers.remove(&place);
    }

    /// A node's Lease runs out, with its machine or without, or it is back.
    fn lose_or_return(&mut self, node: usize) {
        let name = NodeName::from(NODES[node]);
        let gone = self.dice.once_in(2);
        let returns = self.nodes[node].reach != Reach::Connected;
        self.world.coverage.note(if returns { "node returns" } else { "node lost" });
        self.world.tell(|| format!("node {name} {}", if returns { "returns" } else { "is lost" }));
        let down = self.dice.once_in(2);
        let objects = self.world.edit(Kind::Nodes);
        objects.nodes.get_mut(&name).expect("a node of this world").live = returns;
        let known = objects.kube_nodes.get_or_insert_default();
        if returns {
            known.insert(name);
        } else if gone {
            known.remove(&name);
        }
        let node = &mut self.nodes[node];
        if !returns {
            self.world.lost(&node.view.node);
        }
        let was = node.reach;
        node.reach = match (returns, down) {
            (true, _) => Reach::Connected,
            (false, true) => Reach::Down,
            (false, false) => Reach::CutOff,
        };
        if was == Reach::Down {
            node.restart(&self.world);
        }
    }

    /// An operator is killed and started again; the Lease may change hands.
    fn crash(&mut self, which: usize) {
        self.world.coverage.note("operator crash");
        if !self.operators[which].left.is_empty() {
            self.world.coverage.note("operator crash between two writes");
        }
        let leader = self.dice.below(2);
        let skew = [0, 0, 30_000, -30_000][self.dice.below(4)];
        self.operators[which] = Operator::start(&self.world, leader == which, skew);
        self.operators[1 - which].seen.leader = leader != which;
        self.hear_all();
    }

    /// Mostly every node renews its Lease before an operator that has just begun to watch does anything that counts: it waits
    /// until it has heard them.
    fn hear_all(&mut self) {
        if self.dice.once_in(4) {
            return;
        }
        for node in &mut self.nodes {
            node.report(&mut self.world, true); // what is of before a restore is noticed
            node.report(&mut self.world, true);
        }
        self.operators.iter_mut().for_each(|operator| operator.look(&self.world, Kind::Nodes));
    }

    fn finish_some(&mut self, node: usize) {
        let jobs = self.nodes[node].jobs();
        if let Some(job) = self.dice.pick(&jobs).filter(|_| self.nodes[node].reach != Reach::Down) {
            self.nodes[node].finish(&mut self.world, job);
        }
    }

    fn time_passes(&mut self) {
        self.world.coverage.note("clock jump");
        let now = self.world.now.0;
        let later = [500, 5_000, 61_000, 4_000_000][self.dice.below(4)];
        let back = self.dice.once_in(6);
        self.world.now = Timestamp(if back { now - later } else { now + later });
    }

    /// Both operators decide about something new, most often the same, with views that need not be alike. Their changes
    /// are made one at a time by the operations that follow.
    fn race(&mut self) {
        if self.operators.iter().any(|operator| !operator.left.is_empty()) {
            return;
        }
        let new = self.world.objects().reservations.values();
        let new: Vec<Uid> =
            new.filter(|r| r.assignment.is_none() || r.deleting).map(|r| r.uid.clone()).collect();
        let Some(one) = self.dice.pick(&new).cloned() else { return };
        for which in 0..2 {
            if self.dice.once_in(4) {
                self.resize();
            }
            let kinds = Kind::ALL.into_iter().filter(|_| !self.dice.once_in(5));
            let kinds: Vec<Kind> = kinds.collect();
            kinds.into_iter().for_each(|kind| self.operators[which].look(&self.world, kind));
            let other = self.dice.pick(&new).cloned().unwrap_or_else(|| one.clone());
            let about = if self.dice.once_in(3) { other } else { one.clone() };
            let about = Object::Reservation(about);
            self.operators[which].take_up(&about, &self.world, Some(&mut self.dice));
        }
    }

    /// What was just placed goes in spite of its finalizer, before its node may have seen it; the leader sees all of it.
    pub fn slip(&mut self) {
        let new = self.world.objects().reservations.values().filter(|r| r.assignment.is_some());
        let new: Vec<Uid> = new.filter(|r| r.prepared.is_none()).map(|r| r.uid.clone()).collect();
        let Some(uid) = self.dice.pick(&new).cloned() else { return };
        self.world.tell(|| format!("{uid} is gone in spite of its finalizer"));
        if self.world.slip(&uid) {
            self.world.coverage.note("slipped past a finalizer");
        }
        for operator in self.operators.iter_mut().filter(|operator| operator.seen.leader) {
            operator.look_at_all(&self.world);
            let pool = PoolName::from(POOLS[self.dice.below(2)]);
            operator.take_up(&Object::Pool(pool), &self.world, None);
        }
    }
}
