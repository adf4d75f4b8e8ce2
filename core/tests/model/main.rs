//! Random histories of two operators, three nodes and their users against the one sentence that must always hold: what is
//! promised never exceeds what there is, nobody has two places, and whatever a node has is in its ledger.

mod actors;
mod dice;
mod sums;
mod world;

use std::collections::BTreeMap;

use berth_core::check::check;
use berth_core::ids::{NodeName, ObjectName, PoolName, Uid};
use berth_core::ledger::{Class, Promise};
use berth_core::units::{Bytes, Timestamp};
use berth_core::view::{Access, PoolChoice, ReservationState, ReservationView, WhenFull};

use actors::{KINDS, Node, Object, Operator};
use dice::Dice;
use sums::{fitting, overgrown};
use world::{Coverage, NODE_BYTES, NODES, Sabotage, UNIT, World};

const HISTORIES: u64 = 2_000;
/// Of the two waves of a history.
const OPERATIONS: [usize; 2] = [120, 30];

struct History {
    world: World,
    operators: [Operator; 2],
    nodes: Vec<Node>,
    dice: Dice,
}

impl History {
    fn new(seed: u64, sabotage: Sabotage) -> Self {
        let mut world = World::new(sabotage);
        let mut first = Operator::start(&world, false);
        for object in first.objects() {
            first.left = first.about(&object, &world);
            while !first.left.is_empty() {
                first.step(&mut world);
            }
        }
        let operators = [Operator::start(&world, true), Operator::start(&world, false)];
        let nodes = NODES.iter().map(|name| Node::new(name, &world)).collect();
        Self { world, operators, nodes, dice: Dice::new(seed) }
    }

    /// One operation of somebody; true if it may have moved anything but a view.
    fn operate(&mut self) -> bool {
        self.world.coverage.operations += 1;
        let which = self.dice.below(2);
        let node = self.dice.below(NODES.len());
        match self.dice.below(100) {
            0..7 => self.ask(),
            7..9 => self.delete(),
            9 => {
                if self.dice.once_in(2) {
                    self.delete();
                } else {
                    self.slip();
                }
            }
            10..20 => {
                if self.operators.iter().all(|operator| operator.left.is_empty()) {
                    self.race();
                }
            }
            20..26 => {
                let kind = self.dice.below(KINDS);
                self.operators[which].look(&self.world, kind);
                return false;
            }
            26..28 => {
                (0..KINDS).for_each(|kind| self.operators[which].look(&self.world, kind));
                return false;
            }
            28..38 => {
                if self.operators[which].left.is_empty() || self.dice.once_in(10) {
                    self.operators[which].decide(&self.world, &mut self.dice);
                }
                return false;
            }
            38..69 => return self.operators[which].step(&mut self.world),
            69..71 => self.crash(which),
            71 => self.flicker(node),
            72..80 => {
                let kind = 2 + self.dice.below(3);
                self.nodes[node].look(&self.world, kind);
                return false;
            }
            80..92 => {
                let skip = self.dice.below(5);
                return self.nodes[node].act(&mut self.world, skip);
            }
            92..97 => return self.nodes[node].report(&mut self.world),
            97..99 => self.world.now = Timestamp(self.world.now.0 + [500, 5_000, 61_000][self.dice.below(3)]),
            _ => self.resize(),
        }
        true
    }

    /// A user asks for something.
    fn ask(&mut self) {
        let number = self.world.fresh();
        let units = if self.dice.once_in(20) { 120 } else { 5 + self.dice.below(80) as u64 };
        let template = self.dice.once_in(3).then(|| ["one", "two"][self.dice.below(2)]);
        let access = match (template, self.dice.below(4)) {
            (Some(_), _) | (None, 0) => Access::Block,
            (None, 1) => Access::Stream,
            _ => Access::File,
        };
        let request = ReservationView {
            uid: Uid(format!("r{number}")),
            name: ObjectName::new("ns", format!("r{number}")),
            version: self.world.version(),
            created: self.world.now,
            deleting: false,
            has_finalizer: self.dice.once_in(2),
            pools: match self.dice.below(3) {
                0 => PoolChoice::Labelled(BTreeMap::new()),
                1 => PoolChoice::Named(PoolName::from("q")),
                _ => PoolChoice::Named(PoolName::from("p")),
            },
            node: self.dice.once_in(3).then(|| NodeName::from(NODES[self.dice.below(2)])),
            zone: None,
            priority: 0,
            ttl_millis: None,
            renewed: None,
            expires: None,
            dry_run: false,
            max_size: Bytes(units * UNIT),
            template: template.map(|name| ObjectName::new("ns", name)),
            claim_namespace: "ns".to_owned(),
            access,
            when_full: self.dice.once_in(4).then_some(WhenFull::Reject),
            state: ReservationState::Pending,
            assignment: None,
            assigned_image: None,
            prepared: None,
            queued_since: None,
            ready_since: None,
            invalid: None,
        };
        self.world.objects.reservations.insert(request.uid.clone(), request);
    }

    /// Both operators decide about something new, most often the same, with views that need not be alike. Their changes
    /// are made one at a time by the operations that follow.
    fn race(&mut self) {
        let new = self.world.objects.reservations.values().filter(|r| r.assignment.is_none() || r.deleting);
        let new: Vec<Uid> = new.map(|r| r.uid.clone()).collect();
        let Some(one) = self.dice.pick(&new).cloned() else { return };
        for which in 0..2 {
            if self.dice.once_in(2) {
                let node = self.dice.below(NODES.len());
                self.flicker(node);
            }
            if self.dice.once_in(4) {
                self.resize();
            }
            (0..KINDS)
                .filter(|_| !self.dice.once_in(5))
                .for_each(|kind| self.operators[which].look(&self.world, kind));
            let other = self.dice.pick(&new).cloned().unwrap_or_else(|| one.clone());
            let about = if self.dice.once_in(3) { other } else { one.clone() };
            let left = self.operators[which].about(&Object::Reservation(about), &self.world);
            self.operators[which].left = left;
        }
    }

    /// A user deletes something; every other time what an operator is just about to place.
    fn delete(&mut self) {
        let placed: Vec<Uid> =
            self.operators.iter().flat_map(|operator| operator.placing(&self.world)).collect();
        let all: Vec<Uid> = self.world.objects.reservations.keys().cloned().collect();
        let from = if self.dice.once_in(2) && !placed.is_empty() { placed } else { all };
        if let Some(uid) = self.dice.pick(&from) {
            self.world.delete_reservation(uid);
        }
    }

    /// What was just placed goes in spite of its finalizer, before its node may have seen it; the leader sees all of it.
    fn slip(&mut self) {
        let new = self.world.objects.reservations.values().filter(|r| r.assignment.is_some());
        let new: Vec<Uid> = new.filter(|r| r.prepared.is_none()).map(|r| r.uid.clone()).collect();
        let Some(uid) = self.dice.pick(&new) else { return };
        self.world.slip(uid);
        for operator in self.operators.iter_mut().filter(|operator| operator.seen.leader) {
            (0..KINDS).for_each(|kind| operator.look(&self.world, kind));
            let pool = PoolName::from(["p", "q"][self.dice.below(2)]);
            operator.left = operator.about(&Object::Pool(pool), &self.world);
        }
    }

    /// A node's Lease runs out, or is renewed again.
    fn flicker(&mut self, node: usize) {
        let node = self.world.objects.nodes.get_mut(&NodeName::from(NODES[node])).expect("there");
        node.live = !node.live;
    }

    /// An operator is killed and started again; the Lease may change hands.
    fn crash(&mut self, which: usize) {
        self.world.coverage.crashes += 1;
        let leader = self.dice.below(2);
        self.operators[which] = Operator::start(&self.world, leader == which);
        self.operators[1 - which].seen.leader = leader != which;
    }

    /// The administrator bounds a pool, or unbounds it.
    fn resize(&mut self) {
        let limit = [None, Some(Bytes(60 * UNIT)), Some(Bytes(90 * UNIT))][self.dice.below(3)];
        let pool = ["p", "q"][self.dice.below(2)];
        let pool = PoolName::from(pool);
        self.world.objects.pools.get_mut(&pool).expect("there").limit = limit;
        let mut prompt = Operator::start(&self.world, false);
        prompt.left = prompt.about(&Object::Pool(pool), &self.world);
        while !prompt.left.is_empty() {
            prompt.step(&mut self.world);
        }
    }

    /// What must hold at every instant, counted without the code under test where that is possible.
    fn violation(&self) -> Option<String> {
        for ledger in self.world.objects.ledgers.values() {
            let sum = |class: Option<Class>| -> u64 {
                let entries = ledger.promises.values().filter(|p| class.is_none_or(|class| p.class == class));
                entries.map(|promise| promise.charge.data.0).sum()
            };
            let bounds = [
                (sum(Some(Class::Images)), ledger.capacity.images),
                (sum(Some(Class::Volumes)), ledger.capacity.volumes),
                (sum(None), ledger.capacity.total),
            ];
            for (sum, bound) in bounds {
                if sum > bound.data.0 || bound.data.0 > NODE_BYTES {
                    return Some(format!("{}: {sum} promised of {bound:?} of {NODE_BYTES}", ledger.name));
                }
            }
        }
        for node in &self.nodes {
            for (pool, record) in &node.records {
                let held: u64 = record.obeyed.values().map(|obeyed| obeyed.promise.charge.data.0).sum();
                if held > NODE_BYTES {
                    return Some(format!("node {} holds {held} in pool {pool}", node.name));
                }
                let ledger = self.world.objects.ledgers.get(&(pool.clone(), node.name.clone()));
                if let Some(violation) = ledger.and_then(|ledger| overgrown(record, ledger)) {
                    return Some(format!("node {}, pool {pool}: {violation}", node.name));
                }
                for (uid, obeyed) in &record.obeyed {
                    let entry = ledger.and_then(|ledger| ledger.promises.get(uid));
                    let same = |entry: &Promise| Promise { revoked: None, ..entry.clone() } == obeyed.promise;
                    if !entry.is_some_and(same) {
                        return Some(format!("node {} holds {uid}, its ledger says {entry:?}", node.name));
                    }
                }
            }
        }
        if let Some((uid, places)) = self.world.placements.iter().find(|(_, places)| places.len() > 1) {
            return Some(format!("{uid} was given {places:?}"));
        }
        check(&self.world.objects)
            .into_iter()
            .find(|finding| !finding.may_pass())
            .map(|finding| finding.to_string())
    }

    /// Everybody does all that there is to do, until nothing changes any more.
    fn settle(&mut self) -> Result<(), String> {
        self.world.objects.nodes.values_mut().for_each(|node| node.live = true);
        let mut quiet = 0;
        for _ in 0..200 {
            let mut wrote = false;
            for operator in &mut self.operators {
                (0..KINDS).for_each(|kind| operator.look(&self.world, kind));
                for object in operator.objects() {
                    operator.left = operator.about(&object, &self.world);
                    let mut moved = false;
                    while !operator.left.is_empty() {
                        moved |= operator.step(&mut self.world);
                    }
                    if moved {
                        (0..KINDS).for_each(|kind| operator.look(&self.world, kind));
                    }
                    wrote |= moved;
                }
            }
            for node in &mut self.nodes {
                (2..5).for_each(|kind| node.look(&self.world, kind));
                while node.act(&mut self.world, 0) {
                    wrote = true;
                }
                wrote |= node.report(&mut self.world);
            }
            if let Some(violation) = self.violation() {
                return Err(violation);
            }
            quiet = if wrote { 0 } else { quiet + 1 };
            if quiet == 2 {
                return Ok(());
            }
        }
        Err("it does not settle".to_owned())
    }

    /// What must hold when nothing moves any more.
    fn unsettled(&self) -> Option<String> {
        let objects = &self.world.objects;
        if let Some(finding) = check(objects).first() {
            return Some(format!("left over: {finding}"));
        }
        let mut waiting: Vec<&ReservationView> = Vec::new();
        for reservation in objects.reservations.values() {
            let name = &reservation.name;
            if reservation.deleting {
                return Some(format!("{name} was deleted and is still there"));
            }
            match reservation.state {
                ReservationState::Ready | ReservationState::Refused => {}
                ReservationState::Queued => waiting.push(reservation),
                state => return Some(format!("{name} stays {state:?}")),
            }
        }
        let first = waiting.into_iter().min_by_key(|waiting| (waiting.created, waiting.uid.clone()))?;
        fitting(objects, first).map(|place| format!("{} waits although it fits {place}", first.name))
    }

    /// Everybody does something at random, and then all that there is to do.
    fn wave(&mut self, operations: usize) -> Result<(), String> {
        for _ in 0..operations {
            if self.operate()
                && let Some(violation) = self.violation()
            {
                return Err(violation);
            }
        }
        self.settle()?;
        self.unsettled().map_or(Ok(()), Err)
    }

    fn run(&mut self) -> Result<(), String> {
        self.wave(OPERATIONS[0])?;
        // What was grown stays, and others ask for what is given back.
        let settled: Vec<Uid> = self.world.objects.reservations.keys().cloned().collect();
        for uid in &settled {
            if !self.dice.once_in(3) {
                self.world.delete_reservation(uid);
            }
        }
        (0..4).for_each(|_| self.ask());
        self.wave(OPERATIONS[1])?;
        let all: Vec<Uid> = self.world.objects.reservations.keys().cloned().collect();
        for uid in &all {
            self.world.delete_reservation(uid);
        }
        self.settle()?;
        self.world.now = Timestamp(self.world.now.0 + 7_200_000);
        self.settle()?;
        self.left_over().map_or(Ok(()), Err)
    }

    /// Everything was deleted long ago.
    fn left_over(&self) -> Option<String> {
        let objects = &self.world.objects;
        let promised: Vec<&Uid> =
            objects.ledgers.values().flat_map(|ledger| ledger.promises.keys()).collect();
        let held =
            self.nodes.iter().flat_map(|node| node.records.values()).any(|record| !record.obeyed.is_empty());
        let clean =
            promised.is_empty() && !held && objects.reservations.is_empty() && objects.images.is_empty();
        let what = || {
            format!(
                "left: promises {promised:?}, images {:?}, reservations {:?}, bytes {held}",
                objects.images.keys(),
                objects.reservations.keys()
            )
        };
        (!clean).then(what)
    }
}

fn run(seeds: impl Iterator<Item = u64>, sabotage: Sabotage) -> (Coverage, Option<(u64, String)>) {
    let mut coverage = Coverage::default();
    for seed in seeds {
        let mut history = History::new(seed, sabotage);
        let result = history.run();
        coverage.add(&history.world.coverage);
        if let Err(violation) = result {
            return (coverage, Some((seed, violation)));
        }
    }
    (coverage, None)
}

#[test]
fn promises_hold_in_every_history() {
    use ReservationState::{Pending, Promised, Queued, Ready, Refused, Releasing};
    let halves = std::thread::scope(|scope| {
        let other = scope.spawn(|| run((0..HISTORIES).filter(|seed| seed % 2 == 1), Sabotage::None));
        let own = run((0..HISTORIES).filter(|seed| seed % 2 == 0), Sabotage::None);
        [own, other.join().expect("the other half ends")]
    });
    let mut coverage = Coverage::default();
    for (part, violation) in halves {
        coverage.add(&part);
        assert_eq!(violation, None, "seed and what was violated");
    }
    println!("{coverage:?}");
    let per_history = coverage.operations / coverage.histories;
    assert!(coverage.histories >= 2_000 && per_history >= 100, "{coverage:?}");
    assert!(coverage.conflicts >= coverage.histories, "too few conflicts: {coverage:?}");
    assert!(coverage.crashes >= coverage.histories, "too few crashes: {coverage:?}");
    assert!(coverage.swept >= 5, "too few promises swept: {coverage:?}");
    assert!(coverage.slipped >= 100, "too few deletions in spite of a finalizer: {coverage:?}");
    for kind in [
        "WriteLedger",
        "AssignReservation",
        "UnguardReservation",
        "CreateImage",
        "DeleteImage",
        "UnguardImage",
    ] {
        let count = coverage.writes.get(kind).copied().unwrap_or_default();
        assert!(count >= coverage.histories / 2, "{kind} only {count} times");
    }
    for seen in [
        (Pending, Queued),
        (Pending, Promised),
        (Pending, Refused),
        (Queued, Promised),
        (Queued, Refused),
        (Promised, Ready),
        (Queued, Releasing),
        (Ready, Releasing),
    ] {
        assert!(coverage.transitions.contains(&seen), "{seen:?} was never seen");
    }
    for (from, to) in &coverage.transitions {
        assert!(!(matches!(from, Refused | Releasing) && *to != Releasing), "{from:?} ended as {to:?}");
    }
}

#[test]
fn every_sabotage_is_found() {
    for sabotage in [
        Sabotage::LedgerWithoutVersion,
        Sabotage::AssignWithoutVersion,
        Sabotage::ReportWithoutVersion,
        Sabotage::EarlyRelease,
        Sabotage::SweepWithoutAsking,
        Sabotage::SweepWithoutRevoking,
        Sabotage::GrowthUntold,
    ] {
        let (coverage, found) = run(0..3 * HISTORIES, sabotage);
        println!("{sabotage:?}: after {} histories: {found:?}", coverage.histories);
        assert!(found.is_some(), "{sabotage:?} was not found");
    }
}
