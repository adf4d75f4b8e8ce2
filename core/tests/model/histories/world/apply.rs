//! The writes of operators: taken, or refused as the API server would.

use std::collections::BTreeMap;

use berth_core::change::{Change, ReservationReport};
use berth_core::ids::{Lineage, ObjectName, Uid, ledger_name};
use berth_core::ledger::{Class, Holder, Promise};
use berth_core::units::{Generation, Timestamp};
use berth_core::view::{
    AssignedImage, ImageView, LedgerCapacity, LedgerView, ObjectVersion, Placement, PoolChoice,
    ReservationState, ReservationView, View, WhenFull,
};

use super::{Kind, NODE_BYTES, World};
use crate::histories::sabotage::Sabotage;

/// Another writer was faster, or the object is gone: the list of changes ends.
#[derive(Debug)]
pub struct Refused;

impl World {
    /// Takes a change or refuses it; says whether anything was written.
    pub fn apply(&mut self, change: &Change) -> Result<bool, Refused> {
        let result = self.take(change);
        match &result {
            Ok(true) => self.coverage.wrote(change),
            Ok(false) => {}
            Err(Refused) => self.coverage.note("conflict"),
        }
        result
    }

    fn take(&mut self, change: &Change) -> Result<bool, Refused> {
        match change {
            Change::CreateLedger { .. } | Change::WriteLedger { .. } | Change::RebuildLedger { .. } => {
                self.take_ledger(change)
            }
            Change::ConfirmGone { holder, uid } => self.confirm_gone(holder, uid),
            Change::CreateImage { .. }
            | Change::DeleteImage { .. }
            | Change::GiveUpImage { .. }
            | Change::UnguardImage { .. } => self.take_image(change),
            Change::GuardTransfer { .. }
            | Change::UnguardTransfer { .. }
            | Change::AssignTransfer { .. }
            | Change::DeleteTransfer { .. }
            | Change::ReportTransfer { .. } => self.take_import(change),
            Change::ReportPool { .. } | Change::ReportReclaim { .. } | Change::RetryAfter { .. } => Ok(false),
            Change::CreateReservation { .. }
            | Change::DeleteReservation { .. }
            | Change::ExpireReservation { .. } => self.take_life(change),
            other => self.take_reservation(other),
        }
    }

    fn confirm_gone(&self, holder: &Holder, uid: &Uid) -> Result<bool, Refused> {
        let there = match holder {
            Holder::Reservation(_) => self.objects.reservations.contains_key(uid),
            Holder::Image(name) => self.objects.images.get(name).is_some_and(|image| image.uid == *uid),
        };
        if there { Err(Refused) } else { Ok(false) }
    }

    fn take_ledger(&mut self, change: &Change) -> Result<bool, Refused> {
        let next = self.version();
        let blind = self.sabotage == Sabotage::LedgerWithoutVersion;
        let lineage = Lineage(format!("lineage-{}", next.0));
        let (name, version) = match change {
            Change::CreateLedger { pool, node, capacity } => {
                let key = (pool.clone(), node.clone());
                if self.objects.ledgers.contains_key(&key) {
                    return Ok(false);
                }
                let (name, pool, node) = (ledger_name(pool, node), pool.clone(), node.clone());
                let (revision, rebuilt, promises, capacity) = (1, None, BTreeMap::new(), *capacity);
                let version = next;
                let ledger =
                    LedgerView { name, version, pool, node, lineage, revision, rebuilt, capacity, promises };
                self.edit(Kind::Ledgers).ledgers.insert(key, ledger);
                return Ok(true);
            }
            Change::WriteLedger { name, version, .. } => (name, version),
            Change::RebuildLedger { name, version, node, report, .. } => {
                if self.objects.nodes.get(node).is_none_or(|node| node.version != *report) {
                    return Err(Refused);
                }
                (name, version)
            }
            other => unreachable!("{other:?} writes no ledger"),
        };
        let swept = self.sabotage == Sabotage::SweepWithoutRevoking;
        let mut over = 0;
        let mut all = self.edit(Kind::Ledgers).ledgers.values_mut();
        let ledger = all.find(|ledger| ledger.name == *name).ok_or(Refused)?;
        if ledger.version != *version && !blind {
            return Err(Refused);
        }
        match change {
            Change::WriteLedger { revision, capacity, promises, .. } => {
                let revoked = ledger.promises.iter().filter(|(_, promise)| promise.revoked.is_some());
                over = revoked.filter(|(uid, _)| !promises.contains_key(*uid)).count();
                ledger.revision = if blind { ledger.revision + 1 } else { *revision };
                put(ledger, *capacity, promises);
            }
            Change::RebuildLedger { revision, capacity, promises, rebuilt, .. } => {
                (ledger.revision, ledger.lineage) = (*revision, lineage);
                ledger.rebuilt = Some(rebuilt.clone());
                put(ledger, *capacity, promises);
            }
            _ => {}
        }
        ledger.version = next;
        if swept {
            ledger.promises.retain(|_, promise| promise.revoked.is_none());
        }
        let volumes = ledger.promises.values().filter(|promise| promise.class == Class::Volumes);
        let beyond = volumes.map(|promise| promise.charge.data.0).sum::<u64>() > NODE_BYTES;
        (0..over).for_each(|_| self.coverage.note("orphan swept"));
        (0..u8::from(beyond)).for_each(|_| self.coverage.note("volumes promised more than is there"));
        Ok(true)
    }

    fn take_reservation(&mut self, change: &Change) -> Result<bool, Refused> {
        let next = self.version();
        match change {
            Change::GuardReservation { uid, .. } => {
                let objects = self.edit(Kind::Reservations);
                let object =
                    objects.reservations.get_mut(uid).filter(|object| !object.deleting).ok_or(Refused)?;
                (object.has_finalizer, object.version) = (true, next);
                Ok(true)
            }
            Change::UnguardReservation { uid, .. } => {
                let objects = self.edit(Kind::Reservations);
                let object = objects.reservations.get_mut(uid).ok_or(Refused)?;
                (object.has_finalizer, object.version) = (false, next);
                if object.deleting {
                    objects.reservations.remove(uid);
                }
                Ok(true)
            }
            Change::AssignReservation { name, version, placement, image, .. } => {
                self.assign(name, version, placement, image.as_ref(), next)
            }
            Change::ReportReservation { uid, version, report, .. } => {
                self.report_reservation(uid, version, report, next)
            }
            other => panic!("nothing here calls for {other:?}"),
        }
    }

    fn assign(
        &mut self,
        name: &ObjectName,
        version: &ObjectVersion,
        placement: &Placement,
        image: Option<&AssignedImage>,
        next: ObjectVersion,
    ) -> Result<bool, Refused> {
        let blind = self.sabotage == Sabotage::AssignWithoutVersion;
        let mut all = self.edit(Kind::Reservations).reservations.values_mut();
        let object = all.find(|other| other.name == *name).ok_or(Refused)?;
        if object.version != *version && !blind {
            return Err(Refused);
        }
        object.assignment = Some(placement.clone());
        object.assigned_image = image.cloned();
        let before = std::mem::replace(&mut object.state, ReservationState::Promised);
        object.version = next;
        let uid = object.uid.clone();
        self.coverage.transitions.insert((before, ReservationState::Promised));
        self.placements.entry(uid).or_default().insert(placement.clone());
        Ok(true)
    }

    fn report_reservation(
        &mut self,
        uid: &Uid,
        version: &ObjectVersion,
        report: &ReservationReport,
        next: ObjectVersion,
    ) -> Result<bool, Refused> {
        let object = self.objects.reservations.get(uid).ok_or(Refused)?;
        if object.version != *version {
            return Err(Refused);
        }
        if self.reports.get(uid) == Some(report) && object.state == report.state {
            return Ok(false);
        }
        if object.state != report.state {
            self.coverage.transitions.insert((object.state, report.state));
        }
        self.reports.insert(uid.clone(), report.clone());
        let now = self.now;
        let object = self.edit(Kind::Reservations).reservations.get_mut(uid).ok_or(Refused)?;
        object.state = report.state;
        object.expires = report.expires;
        object.version = next;
        if report.state == ReservationState::Queued && object.queued_since.is_none() {
            object.queued_since = Some(now);
        }
        Ok(true)
    }

    /// Reservations that begin or end by an operator's decision.
    fn take_life(&mut self, change: &Change) -> Result<bool, Refused> {
        match change {
            Change::CreateReservation { name, pools, size, access, .. } => {
                if self.objects.reservations.values().any(|other| other.name == *name) {
                    return Ok(false);
                }
                let uid = Uid(format!("r{}", self.fresh()));
                let mut request = request(uid, name.clone(), self.version(), self.now);
                (request.pools, request.max_size, request.access) = (pools.clone(), *size, *access);
                self.edit(Kind::Reservations).reservations.insert(request.uid.clone(), request);
                Ok(true)
            }
            Change::DeleteReservation { uid, .. } => {
                let there = self.objects.reservations.get(uid).is_some_and(|found| !found.deleting);
                self.delete_reservation(uid);
                Ok(there)
            }
            Change::ExpireReservation { uid, version, .. } => {
                let object = self.objects.reservations.get(uid).ok_or(Refused)?;
                if object.version != *version {
                    return Err(Refused);
                }
                self.delete_reservation(uid);
                Ok(true)
            }
            other => unreachable!("{other:?} neither makes nor ends a reservation"),
        }
    }

    /// True if a ledger promises this image space that is not revoked: then its object stays.
    fn is_promised(&self, uid: &Uid) -> bool {
        let mut entries = self.objects.ledgers.values().filter_map(|ledger| ledger.promises.get(uid));
        entries.any(|promise| promise.revoked.is_none())
    }

    fn take_image(&mut self, change: &Change) -> Result<bool, Refused> {
        if let Change::DeleteImage { uid, .. } | Change::UnguardImage { uid, .. } = change
            && self.is_promised(uid)
        {
            return Err(Refused);
        }
        Ok(match change {
            Change::CreateImage { name, image, pool, node, .. } => {
                if self.objects.images.contains_key(name) {
                    return Ok(false);
                }
                let uid = Uid(format!("image-{}", self.fresh()));
                let staged = ImageView {
                    uid,
                    name: name.clone(),
                    created: self.now,
                    deleting: false,
                    has_finalizer: true,
                    digest: image.digest,
                    pool: pool.clone(),
                    node: node.clone(),
                    data_bytes: image.real_size,
                    virtual_size: image.virtual_size,
                    ready: false,
                    last_used: None,
                    given_up: false,
                };
                self.edit(Kind::Images).images.insert(name.clone(), staged);
                true
            }
            Change::DeleteImage { name, uid } => match self.edit(Kind::Images).images.get_mut(name) {
                Some(image) if image.uid == *uid && !image.deleting => {
                    image.deleting = true;
                    self.given_up.insert(uid.clone());
                    true
                }
                _ => false,
            },
            Change::GiveUpImage { name, uid } => match self.edit(Kind::Images).images.get_mut(name) {
                Some(image) if image.uid == *uid && !image.given_up => {
                    image.given_up = true;
                    true
                }
                _ => false,
            },
            Change::UnguardImage { name, uid } => match self.objects.images.get(name) {
                Some(image) if image.uid == *uid && image.deleting => {
                    self.edit(Kind::Images).images.remove(name).is_some()
                }
                _ => false,
            },
            _ => false,
        })
    }

    fn take_import(&mut self, change: &Change) -> Result<bool, Refused> {
        let next = self.version();
        let objects = self.edit(Kind::Imports);
        match change {
            Change::GuardTransfer { id } => {
                let import = objects.imports.get_mut(&id.name).filter(|i| i.uid == id.uid && !i.deleting);
                let import = import.ok_or(Refused)?;
                (import.has_finalizer, import.version) = (true, next);
                Ok(true)
            }
            Change::UnguardTransfer { id } => {
                let import =
                    objects.imports.get(&id.name).filter(|import| import.uid == id.uid).ok_or(Refused)?;
                if import.deleting {
                    objects.imports.remove(&id.name);
                }
                Ok(true)
            }
            Change::AssignTransfer { id, version, placement, .. } => {
                let import =
                    objects.imports.get_mut(&id.name).filter(|i| i.version == *version).ok_or(Refused)?;
                (import.assignment, import.version) = (Some(placement.clone()), next);
                Ok(true)
            }
            Change::ReportTransfer { id, version, state, .. } => {
                let import =
                    objects.imports.get_mut(&id.name).filter(|i| i.version == *version).ok_or(Refused)?;
                if import.state == *state {
                    return Ok(false);
                }
                (import.state, import.version) = (*state, next);
                Ok(true)
            }
            other => unreachable!("{other:?} is about no import"),
        }
    }
}

fn put(ledger: &mut LedgerView, capacity: LedgerCapacity, promises: &BTreeMap<Uid, Promise>) {
    ledger.capacity = capacity;
    ledger.promises.clone_from(promises);
}

/// A guarded request for nothing yet.
pub fn request(uid: Uid, name: ObjectName, version: ObjectVersion, now: Timestamp) -> ReservationView {
    ReservationView {
        uid,
        claim_namespace: name.namespace.clone(),
        name,
        version,
        created: now,
        deleting: false,
        has_finalizer: true,
        pools: PoolChoice::Labelled(BTreeMap::new()),
        node: None,
        zone: None,
        priority: 0,
        ttl_millis: None,
        renewed: None,
        last_used: None,
        expires: None,
        dry_run: false,
        max_size: berth_core::units::Bytes::ZERO,
        template: None,
        claim_name: None,
        claim: None,
        access: berth_core::view::Access::File,
        when_full: None::<WhenFull>,
        state: ReservationState::Pending,
        assignment: None,
        assigned_image: None,
        prepared: None::<Generation>,
        queued_since: None,
        ready_since: None,
        only_copy: None,
        invalid: None,
    }
}

/// The object of a change's kind that it writes, as it is now, for a view that takes over the answer.
pub fn absorb(seen: &mut View, now: &View, change: &Change) {
    let reservation = |seen: &mut View, uid: &Uid| match now.reservations.get(uid) {
        Some(found) => drop(seen.reservations.insert(uid.clone(), found.clone())),
        None => drop(seen.reservations.remove(uid)),
    };
    match change {
        Change::WriteLedger { name, .. } | Change::RebuildLedger { name, .. } => {
            let found = now.ledgers.iter().find(|(_, ledger)| ledger.name == *name);
            found
                .into_iter()
                .for_each(|(key, ledger)| drop(seen.ledgers.insert(key.clone(), ledger.clone())));
        }
        Change::CreateLedger { pool, node, .. } => {
            let key = (pool.clone(), node.clone());
            now.ledgers.get(&key).into_iter().for_each(|l| drop(seen.ledgers.insert(key.clone(), l.clone())));
        }
        Change::ReportReservation { uid, .. } | Change::GuardReservation { uid, .. } => {
            reservation(seen, uid);
        }
        Change::AssignReservation { name, .. } => {
            let found = now.reservations.values().find(|found| found.name == *name);
            found.into_iter().for_each(|found| reservation(seen, &found.uid));
        }
        // The object of an image that was made is seen when its watch shows it.
        Change::GiveUpImage { name, .. } | Change::DeleteImage { name, .. } => {
            now.images.get(name).into_iter().for_each(|i| drop(seen.images.insert(name.clone(), i.clone())));
        }
        _ => {}
    }
}
