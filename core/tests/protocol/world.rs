//! What the API server takes or refuses, and what nodes do. Naive on purpose.

use crate::operator::{CAPACITY, IMAGE};
use crate::scenario::{Sabotage, Scenario};
use crate::state::{
    Entry, HOLDERS, IMAGES, Image, Kind, NODES, NewEntries, RESERVATIONS, Record, Reservation, Revoked,
    State, World, Write, tag,
};

// What must never happen.
pub const OVERCOMMITTED: &str = "a ledger is overcommitted";
pub const NOT_PROMISED: &str = "a node holds what is not promised";
pub const TWO_PLACES: &str = "a reservation was given two places";
pub const IMAGE_DELETED: &str = "the image of a live reservation was deleted";
pub const IMAGE_GOES: &str = "a live reservation names an image that is being deleted";
pub const OBEYED_TWICE: &str = "a reservation is obeyed in two places";

/// Another writer was faster, or the object is gone: the list of writes ends.
pub struct Conflict;

/// What a node can do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Records what its ledger and the holders' own objects both say.
    Obey,
    Make(u8),
    Release(u8),
    Forget(u8),
    Report,
}

impl World {
    /// Takes a write, or refuses it.
    pub fn take(&mut self, write: Write, sabotage: Sabotage) -> Result<(), Conflict> {
        match write {
            Write::Ledger { node, base, entries } => self.take_ledger(node.into(), base, entries, sabotage),
            Write::Confirm(holder) => {
                let gone = !self.is_there(holder.into()) || sabotage == Sabotage::SweepWithoutAsking;
                if gone { Ok(()) } else { Err(Conflict) }
            }
            Write::CreateImage(node) => {
                let (place, made) = (&mut self.objects.images[usize::from(node)], self.images_made);
                if place.is_none() && usize::from(made) < IMAGES {
                    *place = Some(Image { uid: made, deleting: false });
                    self.images_made += 1;
                }
                Ok(())
            }
            Write::DeleteImage { node, uid } => {
                self.delete_image(node.into(), uid);
                Ok(())
            }
            Write::UnguardImage { node, uid } => {
                let place = &mut self.objects.images[usize::from(node)];
                if place.is_some_and(|image| image.uid == uid && image.deleting) {
                    let entry = self.objects.ledgers[usize::from(node)].entries[image_holder(uid)];
                    if entry.is_some_and(|entry| entry.revoked.is_none()) {
                        return Err(Conflict);
                    }
                    *place = None;
                }
                Ok(())
            }
            Write::Guard(at) => {
                let object = self.objects.reservations[usize::from(at)].as_mut();
                let object = object.filter(|object| !object.deleting).ok_or(Conflict)?;
                (object.guarded, object.version) = (true, object.version + 1);
                Ok(())
            }
            Write::Unguard(at) => self.unguard(at.into()),
            Write::Assign { reservation, version, node, image } => {
                let object = self.objects.reservations[usize::from(reservation)].as_mut().ok_or(Conflict)?;
                if object.version != version && sabotage != Sabotage::AssignWithoutVersion {
                    return Err(Conflict);
                }
                if object.assigned.is_some_and(|(before, _)| before != node) {
                    self.violated = Some(TWO_PLACES);
                }
                (object.assigned, object.version) = (Some((node, image)), object.version + 1);
                Ok(())
            }
            Write::Report { reservation, version, state } => {
                let object = self.objects.reservations[usize::from(reservation)].as_mut().ok_or(Conflict)?;
                if object.version != version {
                    return Err(Conflict);
                }
                if object.state != state {
                    (object.state, object.version) = (state, object.version + 1);
                }
                Ok(())
            }
        }
    }

    fn take_ledger(
        &mut self,
        node: usize,
        base: u8,
        entries: NewEntries,
        sabotage: Sabotage,
    ) -> Result<(), Conflict> {
        let ledger = &mut self.objects.ledgers[node];
        let merged = sabotage == Sabotage::LedgerMerged;
        if ledger.revision != base && sabotage != Sabotage::LedgerWithoutVersion && !merged {
            return Err(Conflict);
        }
        let before = ledger.entries;
        ledger.revision += 1;
        let revision = ledger.revision;
        ledger.entries = entries.map(|entry| {
            let entry = entry?;
            let revoked = match entry.revoked {
                Revoked::No => None,
                Revoked::Before(at) => Some(at),
                Revoked::Now => Some(revision),
            };
            Some(Entry { bytes: entry.bytes, revoked })
        });
        if merged {
            ledger.entries = std::array::from_fn(|holder| ledger.entries[holder].or(before[holder]));
        }
        if sabotage == Sabotage::SweepWithoutRevoking {
            for (holder, entry) in ledger.entries.iter_mut().enumerate().take(RESERVATIONS) {
                let gone = self.objects.reservations[holder].is_none();
                *entry = entry.filter(|entry| entry.revoked.is_none() || !gone);
            }
        }
        Ok(())
    }

    fn unguard(&mut self, at: usize) -> Result<(), Conflict> {
        let place = &mut self.objects.reservations[at];
        let object = place.as_mut().ok_or(Conflict)?;
        if let Some((node, _)) = object.assigned
            && self.objects.ledgers[usize::from(node)].entries[at].is_some()
        {
            return Err(Conflict);
        }
        (object.guarded, object.version) = (false, object.version + 1);
        if object.deleting {
            *place = None;
        }
        Ok(())
    }

    fn delete_image(&mut self, node: usize, uid: u8) {
        let named = self.is_named(node);
        if let Some(image) = self.objects.images[node].as_mut().filter(|i| i.uid == uid && !i.deleting) {
            image.deleting = true;
            if named {
                self.violated = Some(IMAGE_DELETED);
            }
        }
    }

    /// True if a live reservation's assignment names the image of this node.
    pub fn is_named(&self, node: usize) -> bool {
        let live = self.objects.reservations.iter().flatten().filter(|reservation| !reservation.deleting);
        live.filter_map(|reservation| reservation.assigned)
            .any(|(at, image)| image && usize::from(at) == node)
    }

    fn is_there(&self, holder: usize) -> bool {
        match holder.checked_sub(RESERVATIONS) {
            None => self.objects.reservations[holder].is_some(),
            Some(uid) => self.objects.images.iter().flatten().any(|image| usize::from(image.uid) == uid),
        }
    }

    /// What `kubectl create` does.
    pub fn ask(&mut self, at: usize) {
        self.unasked[at] = false;
        self.objects.reservations[at] = Some(Reservation::NEW);
    }

    /// What `kubectl delete` does.
    pub fn delete(&mut self, at: usize) {
        let place = &mut self.objects.reservations[at];
        let Some(object) = place.as_mut() else { return };
        (object.deleting, object.version) = (true, object.version + 1);
        if !object.guarded {
            *place = None;
        }
    }

    /// What a node can do.
    pub fn steps(&self, at: usize, sabotage: Sabotage) -> Vec<Step> {
        let node = &self.nodes[at];
        let (record, ledger) = (&node.record, &node.seen.ledgers[at]);
        let sound = self.is_sound(at);
        let mut steps = Vec::new();
        if sound && (ledger.revision > record.revision || !self.wanted(at, sabotage).is_empty()) {
            steps.push(Step::Obey);
        }
        for holder in 0..HOLDERS {
            let name = tag(holder);
            if record.obeyed[holder] && self.is_to_be_given_back(at, holder, sound) {
                steps.push(Step::Release(name));
            } else if record.obeyed[holder] && self.can_be_made(at, holder) && sound {
                steps.push(Step::Make(name));
            }
            if record.released[holder]
                && sound
                && ledger.entries[holder].is_none()
                && (sabotage == Sabotage::ForgetEarly || !self.is_shown(at, holder))
            {
                steps.push(Step::Forget(name));
            }
        }
        if *record != self.objects.reports[at] {
            steps.push(Step::Report);
        }
        steps
    }

    /// True if the node has seen the holder's object.
    fn is_shown(&self, at: usize, holder: usize) -> bool {
        let seen = &self.nodes[at].seen;
        match holder.checked_sub(RESERVATIONS) {
            None => seen.reservations[holder].is_some(),
            Some(uid) => seen.images[at].is_some_and(|image| usize::from(image.uid) == uid),
        }
    }

    /// True if the ledger, as the node has seen it, is not behind what it has recorded.
    fn is_sound(&self, at: usize) -> bool {
        let (record, ledger) = (&self.nodes[at].record, &self.nodes[at].seen.ledgers[at]);
        let held = (0..HOLDERS).filter(|holder| record.obeyed[*holder]);
        ledger.revision > 0
            && ledger.revision >= record.revision
            && held.clone().all(|holder| ledger.entries[holder].is_some())
    }

    /// What ledger and assignment both name.
    fn wanted(&self, at: usize, sabotage: Sabotage) -> Vec<usize> {
        let node = &self.nodes[at];
        let named = |holder: usize| match holder.checked_sub(RESERVATIONS) {
            None => {
                let assigned = |reservation: Reservation| {
                    reservation.assigned.is_some_and(|(place, _)| usize::from(place) == at)
                        || sabotage == Sabotage::ObeyWithoutAssignment
                };
                node.seen.reservations[holder].is_some_and(assigned)
            }
            Some(_) => self.is_shown(at, holder),
        };
        let sound = |entry: Entry| entry.revoked.is_none();
        let new = |holder: &usize| !node.record.obeyed[*holder] && !node.record.released[*holder];
        let entries = (0..HOLDERS).filter(|holder| node.seen.ledgers[at].entries[*holder].is_some_and(sound));
        entries.filter(new).filter(|holder| named(*holder)).collect()
    }

    fn is_to_be_given_back(&self, at: usize, holder: usize, sound: bool) -> bool {
        let node = &self.nodes[at];
        let revoked =
            sound && node.seen.ledgers[at].entries[holder].is_some_and(|entry| entry.revoked.is_some());
        match holder.checked_sub(RESERVATIONS) {
            None => node.seen.reservations[holder].map_or(revoked, |reservation| reservation.deleting),
            Some(uid) => match node.seen.images[at].filter(|image| usize::from(image.uid) == uid) {
                Some(image) => image.deleting && !self.is_awaited(at),
                None => revoked,
            },
        }
    }

    /// True if a live reservation here, as the node has seen it, has yet to be made from the image.
    fn is_awaited(&self, at: usize) -> bool {
        let node = &self.nodes[at];
        let live =
            (0..RESERVATIONS).filter(|holder| node.record.obeyed[*holder] && !node.record.made[*holder]);
        let names =
            |reservation: Reservation| !reservation.deleting && reservation.assigned == Some((tag(at), true));
        live.into_iter().any(|holder| node.seen.reservations[holder].is_some_and(names))
    }

    fn can_be_made(&self, at: usize, holder: usize) -> bool {
        let node = &self.nodes[at];
        let reported = self.objects.reports[at].obeyed[holder];
        let image = |uid: usize| node.record.made[RESERVATIONS + uid];
        let seen = match holder.checked_sub(RESERVATIONS) {
            None => node.seen.reservations[holder].is_some_and(|reservation| match reservation.assigned {
                Some((_, true)) => (0..IMAGES).any(image),
                Some((_, false)) => true,
                None => false,
            }),
            Some(_) => self.is_shown(at, holder),
        };
        seen && reported && !node.record.made[holder]
    }

    /// A node takes one step.
    pub fn act(&mut self, at: usize, step: Step, sabotage: Sabotage) {
        let wanted = self.wanted(at, sabotage);
        let node = &mut self.nodes[at];
        let record = &mut node.record;
        match step {
            Step::Obey => {
                record.revision = node.seen.ledgers[at].revision;
                for holder in wanted {
                    record.obeyed[holder] = true;
                }
            }
            Step::Make(holder) => {
                record.made[usize::from(holder)] = true;
                let object = self.objects.reservations.get_mut(usize::from(holder));
                if let Some(object) = object.and_then(Option::as_mut).filter(|object| !object.prepared) {
                    (object.prepared, object.version) = (true, object.version + 1);
                }
            }
            Step::Release(holder) => {
                let holder = usize::from(holder);
                (record.obeyed[holder], record.made[holder], record.released[holder]) = (false, false, true);
            }
            Step::Forget(holder) => record.released[usize::from(holder)] = false,
            Step::Report => self.objects.reports[at] = *record,
        }
    }

    /// Every watch that never lags in this scenario catches up.
    pub fn follow(&mut self, scenario: &Scenario) {
        let now = self.objects;
        for (at, operator) in self.operators.iter_mut().enumerate() {
            let prompt = Kind::ALL.into_iter().filter(|kind| !scenario.operators[at].contains(kind));
            prompt.for_each(|kind| operator.seen.look(&now, kind));
        }
        for node in &mut self.nodes {
            let prompt = Kind::ALL.into_iter().filter(|kind| !scenario.lagging.contains(kind));
            prompt.for_each(|kind| node.seen.look(&now, kind));
        }
    }

    /// What is wrong with this moment, if anything.
    pub fn violation(&self, scenario: &Scenario) -> Option<&'static str> {
        if self.violated.is_some() {
            return self.violated;
        }
        let bytes = |holder: usize| match scenario.asked.get(holder) {
            Some(asked) => u32::from(asked.bytes),
            None => u32::from(IMAGE),
        };
        for (at, node) in self.nodes.iter().enumerate() {
            let entries = &self.objects.ledgers[at].entries;
            let promised: u32 = entries.iter().flatten().map(|entry| u32::from(entry.bytes)).sum();
            let obeyed = || (0..HOLDERS).filter(|holder| node.record.obeyed[*holder]);
            if promised > CAPACITY.into() || obeyed().map(bytes).sum::<u32>() > CAPACITY.into() {
                return Some(OVERCOMMITTED);
            }
            if obeyed().any(|holder| entries[holder].is_none()) {
                return Some(NOT_PROMISED);
            }
            if self.objects.images[at].is_some_and(|image| image.deleting) && self.is_named(at) {
                return Some(IMAGE_GOES);
            }
        }
        let twice = |holder: usize| self.nodes.iter().filter(|node| node.record.obeyed[holder]).count() > 1;
        (0..RESERVATIONS).any(twice).then_some(OBEYED_TWICE)
    }

    /// True if nothing is left to be done: what was deleted is gone, and what is live is served, or waits for space that no
    /// ledger has.
    pub fn is_at_rest(&self, scenario: &Scenario) -> bool {
        let objects = &self.objects;
        let alive = || objects.reservations.iter().enumerate().filter_map(|(at, one)| Some((at, (*one)?)));
        let free = |bytes: u8| {
            let usable = (0..NODES).filter(|at| objects.reports[*at].revision > 0);
            let promised =
                |at: usize| objects.ledgers[at].entries.iter().flatten().map(|entry| entry.bytes).sum();
            usable.map(promised).any(|promised: u8| promised + bytes <= CAPACITY)
        };
        let served = |(at, reservation): (usize, Reservation)| match reservation.state {
            State::Ready => reservation.prepared,
            State::Queued => alive().count() > 1 && !free(scenario.asked[at].bytes),
            State::Pending | State::Promised | State::Releasing | State::Refused => false,
        };
        let entries = objects.ledgers.iter().flat_map(|ledger| ledger.entries.iter().enumerate());
        let mut orphans = entries.filter(|(holder, entry)| {
            entry.is_some_and(|entry| entry.revoked.is_some() || !self.is_there(*holder))
        });
        alive().all(|(at, reservation)| !reservation.deleting && served((at, reservation)))
            && objects.images.iter().flatten().all(|image| !image.deleting)
            && orphans.next().is_none()
            && (0..NODES).all(|at| objects.reports[at] == self.nodes[at].record)
    }
}

pub fn image_holder(uid: u8) -> usize {
    RESERVATIONS + usize::from(uid)
}

impl Record {
    /// A node that has recorded this much of its ledger, and holds these.
    pub fn holding(revision: u8, holders: &[usize]) -> Self {
        let mut record = Self { revision, ..Self::default() };
        for holder in holders {
            (record.obeyed[*holder], record.made[*holder]) = (true, true);
        }
        record
    }
}
