//! The next steps for one transfer, of either kind.
//!
//! **Guarantees.** What is done is never taken back, and what has ended without success begins again only if a person asks for
//! it. One that pauses keeps what it was promised and is placed nowhere else. Space is given back with the same step that says
//! that it has ended.

use crate::change::Change;
use crate::ids::{ObjectName, transfer_reservation_names};
use crate::reason::Reason;
use crate::reclaim::templates_of;
use crate::states::Machine as _;
use crate::units::{Bytes, Generation, Timestamp};
use crate::view::{Access, Placement, ReservationState, ReservationView, TransferState, TransferView, View};

use super::TransferKind;
use super::place::{most_free, probe};
use super::state::Event;
use super::time::{end_of_life, overdue};

/// The next steps for the transfer of this kind and name.
pub fn decide(view: &View, kind: TransferKind, name: &ObjectName, now: Timestamp) -> Vec<Change> {
    let Some(transfer) = view.transfer(kind, name) else { return Vec::new() };
    let own = Own::of(view, transfer);
    if transfer.deleting {
        return release(view, transfer, &own);
    }
    let mut changes = step(view, transfer, &own, now);
    changes.extend(end_of_life(view, transfer, now));
    changes
}

fn step(view: &View, transfer: &TransferView, own: &Own<'_>, now: Timestamp) -> Vec<Change> {
    let end = |event, reason, message| {
        let told = report(transfer, event, reason, message, false);
        [told].into_iter().chain(own.drop()).collect()
    };
    if transfer.is_done() {
        let (reason, message) = match transfer.kind {
            TransferKind::Import => (Reason::Ready, "durable in its image store"),
            TransferKind::Transfer => (Reason::Succeeded, "all of it is at its destination"),
        };
        return end(Event::Finish, reason, message.to_owned());
    }
    if transfer.state == TransferState::Done {
        return own.drop().into_iter().collect(); // whatever else is shown of it now: that was true
    }
    if let Some(message) = &transfer.invalid {
        return end(Event::Fail, Reason::InvalidSpec, message.clone());
    }
    let ended = transfer.error.as_ref().filter(|error| !error.retryable);
    let failed = transfer.state == TransferState::Failed;
    if let Some(value) = transfer.retry.as_ref().filter(|_| ended.is_some() || failed) {
        return retry(view, transfer, own, value);
    }
    if let Some(error) = ended {
        return end(Event::Fail, error.reason, error.message.clone());
    }
    if failed {
        // Its reservation was refused; that is kept, holds nothing, and says why.
        let refused = own.live.is_some_and(|reservation| reservation.state == ReservationState::Refused);
        return own.drop().into_iter().filter(|_| !refused).collect();
    }
    if let Some(message) = overdue(transfer, now) {
        return end(Event::Fail, Reason::DeadlineExceeded, message);
    }
    if transfer.suspended {
        return vec![pause(transfer, own)];
    }
    go_on(view, transfer, own)
}

/// What a transfer needs that neither ended nor pauses.
fn go_on(view: &View, transfer: &TransferView, own: &Own<'_>) -> Vec<Change> {
    let is_missing = |store: &&ObjectName| view.stores.get(*store).is_none_or(|store| store.deleting);
    if let Some(store) = transfer.stores.iter().find(is_missing) {
        let message = format!("there is no ImageStore {store}");
        return vec![report(transfer, Event::Wait, Reason::ImageStoreNotFound, message, false)];
    }
    if !transfer.has_finalizer {
        return vec![Change::GuardTransfer { id: transfer.id() }];
    }
    match (&transfer.assignment, transfer.peak) {
        (Some(place), Some(peak)) => stage(view, transfer, place, peak, own),
        (place, None) => probe(view, transfer, place.as_ref()),
        (None, Some(_)) => probe(view, transfer, None),
    }
}

/// The reservation of a transfer, by its name.
struct Own<'v> {
    /// The one that counts, if it is there.
    live: Option<&'v ReservationView>,
    /// What the next one is called.
    next: ObjectName,
}

impl<'v> Own<'v> {
    /// One of no bytes that is being given back is replaced by the next one: where its node is lost, that takes until the node
    /// returns.
    fn of(view: &'v View, transfer: &TransferView) -> Self {
        let names = transfer_reservation_names(transfer.kind, &transfer.name.name, &transfer.uid);
        let known: Vec<(ObjectName, Option<&ReservationView>)> = names
            .map(|name| ObjectName::new(&transfer.name.namespace, name))
            .map(|name| (name.clone(), view.reservation_named(&name)))
            .collect();
        let streams = transfer.peak == Some(Bytes::ZERO);
        let chosen = known
            .iter()
            .position(|(_, found)| found.is_some_and(|found| !found.deleting))
            .or_else(|| known.iter().position(|(_, found)| found.is_none()).filter(|_| streams))
            .unwrap_or_default(); // the first, whatever becomes of it
        match known.into_iter().nth(chosen) {
            Some((next, live)) => Self { live, next },
            None => Self { live: None, next: transfer.name.clone() },
        }
    }

    /// The write that gives it back.
    fn drop(&self) -> Option<Change> {
        let live = self.live.filter(|live| !live.deleting)?;
        Some(Change::DeleteReservation { name: live.name.clone(), uid: live.uid.clone() })
    }

    /// True if its space is promised and its node has made room.
    fn is_prepared(&self) -> bool {
        self.live.filter(|live| !live.deleting).is_some_and(|live| {
            live.assignment.as_ref().is_some_and(|place| live.prepared == Some(place.generation))
        })
    }
}

/// It begins again with an assignment of its own, to which nothing counts that an earlier one has come to, once what that
/// held is given back. One that pauses waits with that too.
fn retry(view: &View, transfer: &TransferView, own: &Own<'_>, value: &str) -> Vec<Change> {
    if own.live.is_some() {
        return own.drop().into_iter().collect();
    }
    if transfer.suspended {
        return Vec::new();
    }
    let before = transfer.assignment.as_ref();
    let same = before
        .filter(|place| !view.is_lost(&place.node))
        .map(|place| (place.pool.clone(), place.node.clone()));
    let Some((pool, node)) = same.or_else(|| most_free(view, transfer)) else { return Vec::new() };
    let generation = before.map_or(Generation::FIRST, |place| place.generation.next());
    vec![Change::AssignTransfer {
        id: transfer.id(),
        version: transfer.version.clone(),
        placement: Placement { pool, node, generation },
        retried: Some(value.to_owned()),
    }]
}

fn pause(transfer: &TransferView, own: &Own<'_>) -> Change {
    let message = match &transfer.assignment {
        None => "`spec.suspend` is true; nothing has begun".to_owned(),
        Some(place) => format!("`spec.suspend` is true; node {} keeps what is done", place.node),
    };
    report(transfer, Event::Suspend, Reason::Suspended, message, own.is_prepared())
}

/// What is needed is known: it is reserved, and the work goes where the reservation is.
fn stage(view: &View, transfer: &TransferView, place: &Placement, peak: Bytes, own: &Own<'_>) -> Vec<Change> {
    let waits = |message: String, reserved| {
        report(transfer, Event::Reserve, Reason::WaitingForReservation, message, reserved)
    };
    let Some(reservation) = own.live else {
        let access = if peak == Bytes::ZERO { Access::Stream } else { Access::File };
        let create = Change::CreateReservation {
            name: own.next.clone(),
            owner: transfer.id(),
            pools: transfer.pools.clone(),
            size: peak,
            access,
        };
        return vec![create, waits(format!("needs {peak} in a pool"), false)];
    };
    if reservation.state == ReservationState::Refused && !reservation.deleting {
        let message = format!("StagingReservation {} of {peak} was refused; it says why", reservation.name);
        return vec![report(transfer, Event::Fail, Reason::CapacityRefused, message, false)];
    }
    let Some(reserved) = reservation.assignment.as_ref().filter(|_| !reservation.deleting) else {
        let message = format!("StagingReservation {} of {peak} is {:?}", reservation.name, reservation.state);
        return vec![waits(message, false)];
    };
    if reservation.access == Access::Stream && view.is_lost(&reserved.node) {
        let message = format!("node {} is lost, and holds nothing of it: another one goes on", reserved.node);
        return own.drop().into_iter().chain([waits(message, false)]).collect();
    }
    if (&reserved.pool, &reserved.node) != (&place.pool, &place.node) {
        let generation = place.generation.next();
        let placement = Placement { pool: reserved.pool.clone(), node: reserved.node.clone(), generation };
        return vec![assign(transfer, placement)];
    }
    if reservation.prepared != Some(reserved.generation) {
        let message = format!("node {} makes room in pool {}", reserved.node, reserved.pool);
        return vec![waits(message, true)];
    }
    let (reason, message) = match &transfer.error {
        Some(error) if error.reason == Reason::ObjectStoreUnavailable => {
            (error.reason, error.message.clone())
        }
        Some(error) => (Reason::Retrying, format!("{}: {}", error.reason, error.message)),
        None => {
            let works = if transfer.kind == TransferKind::Import { "imports" } else { "transfers" };
            (Reason::Progressing, format!("node {} {works} in pool {}", reserved.node, reserved.pool))
        }
    };
    vec![report(transfer, Event::Work, reason, message, true)]
}

/// The node ends the work and removes its traces; then the reservation goes, then the finalizer.
fn release(view: &View, transfer: &TransferView, own: &Own<'_>) -> Vec<Change> {
    let gone = match &transfer.assignment {
        None => true,
        Some(place) => {
            // A report that cannot be read is not gone.
            !view.nodes.contains_key(&place.node) && !view.hides_reports()
                || transfer.released.is_some_and(|released| released >= place.generation)
        }
    };
    if !gone {
        return Vec::new();
    }
    let given_up = give_up_copies(view, transfer);
    if !given_up.is_empty() {
        return given_up;
    }
    let unguard = transfer.has_finalizer.then(|| Change::UnguardTransfer { id: transfer.id() });
    own.drop().into_iter().chain(unguard).collect()
}

/// Who deletes a template gives up its image: staged copies that no other template has need not be kept as the last ones.
/// Another template keeps them also where its store is gone: then they are all that it has.
fn give_up_copies(view: &View, transfer: &TransferView) -> Vec<Change> {
    let Some(durable) = transfer.durable.as_ref().filter(|_| transfer.has_finalizer) else {
        return Vec::new();
    };
    if templates_of(view, &durable.digest).next().is_some() {
        return Vec::new();
    }
    let copies = view
        .images
        .values()
        .filter(|image| image.digest == durable.digest && !image.deleting && !image.given_up);
    copies.map(|image| Change::GiveUpImage { name: image.name.clone(), uid: image.uid.clone() }).collect()
}

pub(super) fn assign(transfer: &TransferView, placement: Placement) -> Change {
    Change::AssignTransfer { id: transfer.id(), version: transfer.version.clone(), placement, retried: None }
}

/// What it takes no more changes nothing of its state.
pub(super) fn report(
    transfer: &TransferView,
    event: Event,
    reason: Reason,
    message: String,
    reserved: bool,
) -> Change {
    Change::ReportTransfer {
        id: transfer.id(),
        version: transfer.version.clone(),
        state: transfer.state.after(event).unwrap_or(transfer.state),
        reason,
        message,
        reserved,
    }
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
