//! What people ask for, delete, and decide.

use std::collections::BTreeMap;

use berth_core::ids::{NodeName, ObjectName, PoolName, Uid};
use berth_core::node::view::NodeFile;
use berth_core::units::Bytes;
use berth_core::view::{Access, PoolChoice, Service, TransferState, TransferView, WhenFull};

use super::history::History;
use super::operator::Object;
use super::world::apply::request;
use super::world::{Kind, NAMESPACES, NODES, POOLS, UNIT, template};

impl History {
    /// Somebody does something.
    pub fn by_people(&mut self) {
        match self.dice.below(30) {
            14..20 => self.delete(),
            20 => self.slip(),
            28 => self.enlarge(),
            21 => self.renew(),
            22 => self.cordon_or_drain(),
            23..25 => self.resize(),
            25 => self.import_or_delete_template(),
            26 => self.consent(),
            27 if self.dice.once_in(3) => self.delete_namespace(),
            29 if self.dice.once_in(3) => drop(self.world.strike_recovered()),
            _ => self.ask(),
        }
    }

    /// A user asks for something.
    pub fn ask(&mut self) {
        self.world.coverage.note("ask");
        let number = self.world.fresh();
        let uid = Uid(format!("r{number}"));
        let namespace = NAMESPACES[usize::from(self.dice.once_in(3))];
        let name = ObjectName::new(namespace, format!("r{number}"));
        let units = if self.dice.once_in(20) { 120 } else { 5 + self.dice.below(80) as u64 };
        let template = self.dice.once_in(3).then(|| ["one", "two", "three"][self.dice.below(3)]);
        let mut asked = request(uid.clone(), name, self.world.version(), self.world.now);
        asked.access = match (template, self.dice.below(4)) {
            (Some(_), _) | (None, 0) => Access::Block,
            (None, 1) => Access::Stream,
            _ => Access::File,
        };
        asked.has_finalizer = self.dice.once_in(2);
        asked.pools = match self.dice.below(3) {
            0 => PoolChoice::Labelled(BTreeMap::new()),
            1 => PoolChoice::Named(PoolName::from("q")),
            _ => PoolChoice::Named(PoolName::from("p")),
        };
        asked.node = self.dice.once_in(3).then(|| NodeName::from(NODES[self.dice.below(2)]));
        asked.max_size = Bytes(units * UNIT);
        asked.template = template.map(|name| ObjectName::new("ns", name));
        asked.when_full = self.dice.once_in(4).then_some(WhenFull::Reject);
        asked.ttl_millis = self.dice.once_in(4).then_some(60_000);
        asked.priority = i32::from(self.dice.once_in(6));
        if self.world.percent > 100 && self.dice.once_in(2) {
            // Where volumes may be promised more than is there, they crowd on one node until they are.
            (asked.access, asked.pools) = (Access::Block, PoolChoice::Named(PoolName::from("q")));
            asked.node = Some(NodeName::from("a"));
        }
        if asked.access == Access::File && self.dice.once_in(2) {
            let file = NodeFile { fetches: self.dice.once_in(2), failed: false, discards: false };
            self.world.files.insert(uid.clone(), file);
        }
        let what = (asked.name.to_string(), asked.access, units, asked.template.clone(), asked.node.clone());
        self.world.tell(|| format!("asked for: {what:?} of units"));
        self.world.edit(Kind::Reservations).reservations.insert(uid, asked);
    }

    /// A user deletes something; every other time what an operator is just about to place.
    fn delete(&mut self) {
        let operators = self.operators.iter();
        let placed: Vec<Uid> = operators.flat_map(|operator| operator.placing(&self.world)).collect();
        let all: Vec<Uid> = self.world.objects().reservations.keys().cloned().collect();
        let from = if self.dice.once_in(2) && !placed.is_empty() { placed } else { all };
        if let Some(uid) = self.dice.pick(&from) {
            self.world.coverage.note("delete");
            self.world.tell(|| format!("{uid} is deleted"));
            self.world.delete_reservation(uid);
        }
    }

    /// The end of a namespace: everything in it is deleted at once.
    fn delete_namespace(&mut self) {
        self.world.coverage.note("delete a namespace");
        let namespace = NAMESPACES[usize::from(!self.dice.once_in(4))];
        self.world.tell(|| format!("namespace {namespace} is deleted"));
        let all = self.world.objects().reservations.values();
        let uids: Vec<Uid> =
            all.filter(|found| found.name.namespace == namespace).map(|found| found.uid.clone()).collect();
        uids.iter().for_each(|uid| self.world.delete_reservation(uid));
        let all = self.world.objects().imports.keys();
        let names: Vec<ObjectName> = all.filter(|name| name.namespace == namespace).cloned().collect();
        names.iter().for_each(|name| self.world.delete_template(name));
    }

    fn renew(&mut self) {
        let all: Vec<Uid> = self.world.objects().reservations.keys().cloned().collect();
        let Some(uid) = self.dice.pick(&all) else { return };
        self.world.coverage.note("renew");
        let (version, now) = (self.world.version(), self.world.now);
        let found = self.world.edit(Kind::Reservations).reservations.get_mut(uid).expect("just seen");
        (found.renewed, found.version) = (Some(now), version);
    }

    /// A user wants a volume to be larger; some of these never can.
    fn enlarge(&mut self) {
        let all = self.world.objects().reservations.values();
        let volumes = all.filter(|found| found.access == Access::Block && found.assignment.is_some());
        let volumes: Vec<Uid> = volumes.map(|found| found.uid.clone()).collect();
        let Some(uid) = self.dice.pick(&volumes).cloned() else { return };
        self.world.coverage.note("enlarge");
        let more = Bytes((1 + self.dice.below(30) as u64) * UNIT);
        self.world.tell(|| format!("{uid} is to have {more} more"));
        let version = self.world.version();
        let found = self.world.edit(Kind::Reservations).reservations.get_mut(&uid).expect("just seen");
        (found.max_size, found.version) = (found.max_size.saturating_add(more), version);
    }

    fn cordon_or_drain(&mut self) {
        self.world.coverage.note("cordon or drain");
        let service = [Service::Open, Service::Cordoned, Service::Draining][self.dice.below(3)];
        let pool = PoolName::from(POOLS[self.dice.below(2)]);
        let node = NodeName::from(NODES[self.dice.below(NODES.len())]);
        let one = self.dice.once_in(2);
        let pool = self.world.edit(Kind::Pools).pools.get_mut(&pool).expect("a pool of this world");
        if one {
            pool.drain_nodes = [node].into();
        } else {
            (pool.service, pool.drain_nodes) = (service, std::collections::BTreeSet::new());
        }
    }

    /// The administrator bounds a pool, or unbounds it; an operator takes note at once.
    pub fn resize(&mut self) {
        self.world.coverage.note("grow or shrink");
        let limit = [None, Some(Bytes(60 * UNIT)), Some(Bytes(90 * UNIT))][self.dice.below(3)];
        let pool = PoolName::from(POOLS[self.dice.below(2)]);
        self.world.edit(Kind::Pools).pools.get_mut(&pool).expect("a pool of this world").limit = limit;
        let which = self.dice.below(2);
        let operator = &mut self.operators[which];
        if operator.left.is_empty() {
            operator.look_at_all(&self.world);
            operator.take_up(&Object::Pool(pool), &self.world, None);
        }
    }

    /// A template is imported under a name that is free, or one is deleted.
    fn import_or_delete_template(&mut self) {
        let names = ["one", "two", "three"].map(|name| ObjectName::new("ns", name));
        let Some(name) = self.dice.pick(&names).cloned() else { return };
        if self.world.objects().imports.contains_key(&name) {
            self.world.coverage.note("delete a template");
            self.world.tell(|| format!("template {name} is deleted"));
            self.world.delete_template(&name);
            return;
        }
        let number = self.world.fresh();
        let import = TransferView {
            uid: Uid(format!("import-{number}")),
            version: self.world.version(),
            created: self.world.now,
            has_finalizer: false,
            state: TransferState::Pending,
            assignment: None,
            durable: None,
            ..template(&name.name, UNIT)
        };
        self.world.tell(|| format!("template {name} is to be imported"));
        self.world.edit(Kind::Imports).imports.insert(name, import);
    }

    /// Somebody consents to losing what a file holds.
    fn consent(&mut self) {
        let held = self.world.objects().reservations.values().filter(|found| found.only_copy.is_some());
        let held: Vec<Uid> = held.map(|found| found.uid.clone()).collect();
        let files: Vec<Uid> = if held.is_empty() { self.world.files.keys().cloned().collect() } else { held };
        let Some(uid) = self.dice.pick(&files) else { return };
        self.world.coverage.note("consent to losing a file");
        if let Some(file) = self.world.files.get_mut(uid) {
            file.discards = true;
        }
        self.world.edit(Kind::Reservations);
    }
}
