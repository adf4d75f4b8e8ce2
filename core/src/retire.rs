//! Images are retired in their ledger before their object is deleted.
//!
//! **Guarantees.** The object of an image is deleted only where its ledger shows its promise as revoked: it is retired. That
//! is a compare-and-swap, and so is every write that gives an image to a reservation: whoever comes first fails the other
//! one, however much the views of both lag. A retired image is given to nobody and is never taken back; who wants its
//! content waits until it is gone. Its promise stays until its object is gone, so that nobody who still sees the object can
//! promise it anew. An operator that ends in between leaves nothing undone: any other goes on from what the ledger says.

use std::collections::BTreeSet;

use crate::change::Change;
use crate::ids::Uid;
use crate::ledger::{Charge, Holder, MAX_PROMISES, Promise};
use crate::lost;
use crate::reclaim::Cause;
use crate::units::Bytes;
use crate::view::{ImageView, LedgerView, NodePoolState, ReservationState, ReservationView, View};

/// How many holders that the view lacks are asked for, so that an image may be retired beside them.
const ASKED_AT_ONCE: usize = 32;

/// True if the ledger says that this image goes.
pub fn is_retired(ledger: &LedgerView, image: &Uid) -> bool {
    ledger.promises.get(image).is_some_and(|promise| promise.revoked.is_some())
}

/// True if nothing may be given this image any more.
pub fn is_leaving(ledger: &LedgerView, image: &ImageView) -> bool {
    image.deleting || is_retired(ledger, &image.uid)
}

/// The promises of images that go: by holder, with the image's name. Their objects may be gone already.
pub fn leaving<'v>(view: &'v View, ledger: &'v LedgerView) -> impl Iterator<Item = (&'v Uid, &'v str)> {
    ledger.promises.iter().filter_map(|(uid, promise)| {
        let Holder::Image(name) = &promise.holder else { return None };
        let image = view.images.get(name).filter(|image| image.uid == *uid);
        let goes = promise.revoked.is_some() || image.is_some_and(|image| image.deleting);
        goes.then_some((uid, name.as_str()))
    })
}

/// True if a promise is revoked, its node has recorded that, and nothing that the node held under it is left.
pub(crate) fn is_over(report: &NodePoolState, uid: &Uid, promise: &Promise) -> bool {
    let fenced = promise.revoked.is_some_and(|revision| report.obeyed_revision >= revision);
    let released = report.released.get(uid).is_some_and(|released| *released >= promise.generation);
    fenced && (released || !report.obeyed.contains_key(uid))
}

/// True if this ledger may be written to about images that go. By the last report of a node that is given up, a ledger is
/// behind for what was given up alone.
pub(crate) fn may_write(view: &View, ledger: &LedgerView) -> bool {
    view.behind(ledger).is_none()
        || lost::is_given_up(view, &ledger.pool, &ledger.node)
        || lost::is_written_off(view, &ledger.node)
}

/// The ledger write that retires those of these images that no reservation can have been given, and says why. Nothing if
/// there is none, or if a reservation with a promise in this ledger has yet to be told what it was given.
pub fn retire(view: &View, ledger: &LedgerView, images: &[&ImageView], cause: Cause) -> Vec<Change> {
    let Some(holders) = Holders::of(view, ledger).filter(|_| may_write(view, ledger)) else {
        return Vec::new();
    };
    let free = images.iter().filter(|image| !holders.named.contains(image.name.as_str()));
    let retiring = Retiring::of(view, ledger, free.copied());
    if retiring.images.is_empty() {
        return Vec::new();
    }
    let told = Change::ReportReclaim {
        pool: ledger.pool.clone(),
        cause,
        images: u32::try_from(retiring.images.len()).unwrap_or(u32::MAX),
        bytes: retiring.bytes,
    };
    holders.ask().chain([retiring.write(), told]).collect()
}

/// The ledger write for an image whose object a person is deleting. Nothing if it has been made, or cannot be made now.
pub(crate) fn follow(view: &View, ledger: &LedgerView, image: &ImageView) -> Option<Change> {
    let retiring = Retiring::of(view, ledger, [image]);
    (!retiring.images.is_empty() && may_write(view, ledger)).then(|| retiring.write())
}

/// The names of the images that a list of changes retires.
pub fn retired(changes: &[Change]) -> Vec<&str> {
    let writes = changes.iter().filter_map(|change| match change {
        Change::WriteLedger { revision, promises, .. } => Some((*revision, promises)),
        _ => None,
    });
    let new = writes.flat_map(|(revision, promises)| {
        promises.values().filter(move |promise| promise.revoked == Some(revision))
    });
    let images = new.filter_map(|promise| match &promise.holder {
        Holder::Image(name) => Some(name.as_str()),
        Holder::Reservation(_) => None,
    });
    images.collect()
}

/// What the reservations with a promise in a ledger may have been given.
struct Holders<'v> {
    /// Images that live ones name.
    named: BTreeSet<&'v str>,
    /// Those that the view lacks: they may be new.
    unknown: Vec<(&'v Uid, &'v Holder)>,
}

impl<'v> Holders<'v> {
    /// `None` if that cannot be told yet.
    fn of(view: &'v View, ledger: &'v LedgerView) -> Option<Self> {
        let mut holders = Self { named: BTreeSet::new(), unknown: Vec::new() };
        for (uid, promise) in &ledger.promises {
            if let Holder::Image(_) = promise.holder {
                continue;
            }
            match view.reservations.get(uid) {
                None => holders.unknown.push((uid, &promise.holder)),
                Some(reservation) if is_undecided(reservation) => return None,
                Some(reservation) => holders.named.extend(named_by(reservation)),
            }
        }
        (holders.unknown.len() <= ASKED_AT_ONCE).then_some(holders)
    }

    /// What has to be asked for first.
    fn ask(&self) -> impl Iterator<Item = Change> {
        let gone = self.unknown.iter();
        gone.map(|(uid, holder)| Change::ConfirmGone { holder: (*holder).clone(), uid: (*uid).clone() })
    }
}

/// True if it may be assigned still, with an image. Neither what is being deleted nor what was refused ever is.
fn is_undecided(reservation: &ReservationView) -> bool {
    let ended = reservation.deleting || reservation.state == ReservationState::Refused;
    !ended && reservation.assignment.is_none() && reservation.template.is_some()
}

fn named_by(reservation: &ReservationView) -> Option<&str> {
    let image = reservation.assigned_image.as_ref().filter(|_| !reservation.deleting)?;
    Some(&image.staged_image)
}

/// Images that a ledger is about to say are retired.
struct Retiring<'v> {
    /// The ledger, with an entry for each of them.
    ledger: LedgerView,
    images: Vec<&'v ImageView>,
    /// What is promised to them.
    bytes: Bytes,
}

impl<'v> Retiring<'v> {
    /// One that nothing is promised to gets an entry of no bytes: without it another operator could promise it anew.
    fn of(view: &View, ledger: &LedgerView, all: impl IntoIterator<Item = &'v ImageView>) -> Self {
        let mut retiring = Self { ledger: ledger.clone(), images: Vec::new(), bytes: Bytes::ZERO };
        for image in all {
            let promises = &mut retiring.ledger.promises;
            let full = promises.len() >= MAX_PROMISES;
            if is_retired(ledger, &image.uid) || full && !promises.contains_key(&image.uid) {
                continue;
            }
            let promise = image.promise(view.block_of(&ledger.pool));
            let nothing = Promise { charge: Charge::default(), ..promise };
            let entry = promises.entry(image.uid.clone()).or_insert(nothing);
            retiring.bytes = retiring.bytes.saturating_add(entry.charge.data);
            retiring.images.push(image);
        }
        retiring
    }

    fn write(&self) -> Change {
        let uids: Vec<&Uid> = self.images.iter().map(|image| &image.uid).collect();
        self.ledger.revoking(&uids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{HOUR, add, at, digest, hold, image, placed, reservation, template, view};
    use crate::ids::{NodeName, ObjectName, PoolName};
    use crate::ledger::Class;
    use crate::reason::Reason;
    use crate::units::{Generation, Timestamp};
    use crate::view::{Access, AssignedImage, Service};

    const NOW: Timestamp = Timestamp(9 * HOUR);

    /// An image that nothing needs.
    fn idle() -> View {
        let mut view = view(&[("a", 100)]);
        let import = template(30, 20);
        view.imports.insert(import.name.clone(), import);
        let image = image("a", 20, 0);
        let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
        ledger.promises.insert(image.uid.clone(), image.promise(None));
        view.images.insert(image.name.clone(), image);
        view
    }

    fn volume(access: Access) -> ReservationView {
        let mut request = reservation("r", 30, 0);
        (request.access, request.template) = (access, Some(ObjectName::new("ns", "template")));
        request
    }

    fn of_image(view: &View) -> Vec<Change> {
        crate::image::decide(view, view.images.keys().next().expect("one"), NOW)
    }

    fn of_request(view: &View) -> Vec<Change> {
        crate::reservation::decide(view, &Uid::from("r"), NOW)
    }

    fn version_of(changes: &[Change]) -> &crate::view::ObjectVersion {
        let version = changes.iter().find_map(|change| match change {
            Change::WriteLedger { version, .. } => Some(version),
            _ => None,
        });
        version.expect("a ledger write")
    }

    fn take(view: &mut View, changes: &[Change]) {
        let written = changes.iter().find_map(|change| match change {
            Change::WriteLedger { promises, revision, .. } => Some((promises.clone(), *revision)),
            _ => None,
        });
        let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
        (ledger.promises, ledger.revision) = written.expect("a ledger write");
    }

    #[test]
    fn whatever_joins_an_image_conflicts_with_its_retirement() {
        for access in [Access::Block, Access::File, Access::Stream] {
            let mut view = idle();
            let retired = of_image(&view);
            assert!(matches!(&retired[..], [Change::WriteLedger { .. }, Change::ReportReclaim { .. }]));
            add(&mut view, volume(access));
            let joined = of_request(&view);
            assert!(matches!(&joined[..], [Change::WriteLedger { .. }, Change::AssignReservation { .. }]));
            assert_eq!(version_of(&retired), version_of(&joined), "{access:?}");
        }
    }

    #[test]
    fn a_retired_image_is_given_to_nobody_and_made_anew_once_it_is_gone() {
        let mut view = idle();
        let retired = of_image(&view);
        take(&mut view, &retired);
        let mut request = volume(Access::Block);
        request.when_full = Some(crate::view::WhenFull::Reject);
        add(&mut view, request);
        let waits = of_request(&view);
        let [Change::ReportReservation { report, .. }, ..] = &waits[..] else { panic!("{waits:?}") };
        assert_eq!(report.reason, Reason::Releasing);
        view.images.clear();
        assert!(matches!(&of_request(&view)[..], [Change::CreateImage { .. }]));
    }

    #[test]
    fn what_was_given_an_image_that_was_retired_since_waits_until_it_is_gone() {
        let mut view = idle();
        let retired = of_image(&view);
        take(&mut view, &retired);
        let mut request = volume(Access::Block);
        let staged_image = view.images.keys().next().expect("one").clone();
        request.assignment = Some(placed("p", "a", 1));
        request.assigned_image =
            Some(AssignedImage { digest: digest(), staged_image, virtual_size: Bytes(30) });
        add(&mut view, request);
        hold(&mut view, "a", "r", Class::Volumes, 30);
        assert!(matches!(&of_request(&view)[..], [Change::RetryAfter { .. }]));
    }

    #[test]
    fn an_image_stays_while_a_promise_beside_it_may_be_of_one_that_starts_from_it() {
        let mut view = idle();
        hold(&mut view, "a", "r", Class::Volumes, 30);
        let asked = of_image(&view);
        let [Change::ConfirmGone { uid, .. }, Change::WriteLedger { .. }, _] = &asked[..] else {
            panic!("{asked:?}")
        };
        assert_eq!(uid.as_str(), "r", "the view lacks it: it may be new");
        let mut request = volume(Access::Block);
        // This view shows another template than the one that the other operator saw.
        request.template = Some(ObjectName::new("ns", "other"));
        add(&mut view, request);
        assert_eq!(of_image(&view), [], "promised, and not assigned yet");
        let is = |view: &mut View, change: fn(&mut ReservationView)| {
            change(view.reservations.get_mut(&Uid::from("r")).expect("there"));
        };
        is(&mut view, |r| r.state = ReservationState::Refused);
        assert_eq!(retired(&of_image(&view)).len(), 1, "it will never be assigned");
        is(&mut view, |r| (r.state, r.template) = (ReservationState::Promised, None));
        assert_eq!(retired(&of_image(&view)).len(), 1, "it starts from nothing");
        is(&mut view, |r| r.template = Some(ObjectName::new("ns", "other")));
        is(&mut view, |r| r.deleting = true);
        assert_eq!(retired(&of_image(&view)).len(), 1, "nor will this one");
        for n in 0..=ASKED_AT_ONCE {
            hold(&mut view, "a", &format!("new-{n}"), Class::Images, 0);
        }
        assert_eq!(of_image(&view), [], "too many to ask for");
    }

    #[test]
    fn an_image_without_a_promise_gets_one_that_is_revoked() {
        let mut view = idle();
        view.ledgers.values_mut().for_each(|ledger| ledger.promises.clear());
        let swept = of_image(&view);
        take(&mut view, &swept);
        let ledger = &view.ledgers[&at("p", "a")];
        let (uid, entry) = ledger.promises.first_key_value().expect("one");
        assert_eq!((entry.charge, entry.revoked), (Charge::default(), Some(ledger.revision)));
        assert!(is_retired(ledger, uid));
        assert!(matches!(&of_image(&view)[..], [Change::DeleteImage { .. }]));
    }

    #[test]
    fn a_ledger_is_written_once_in_a_pass_and_never_while_it_is_behind() {
        let mut view = idle();
        view.pools.values_mut().for_each(|pool| pool.service = Service::Draining);
        hold(&mut view, "a", "gone", Class::Images, 1);
        let writes = |view: &View| {
            let changes = crate::pool::decide(view, &PoolName::from("p"), NOW);
            let all = changes.iter().filter(|change| matches!(change, Change::WriteLedger { .. }));
            (all.count(), retired(&changes).len())
        };
        assert_eq!(writes(&view), (1, 0), "the promise of a holder that is gone first");
        view.ledgers.values_mut().for_each(|ledger| drop(ledger.promises.remove(&Uid::from("gone"))));
        assert_eq!(writes(&view), (1, 1));
        let node = view.nodes.get_mut(&NodeName::from("a")).expect("there");
        node.pools.values_mut().for_each(|pool| {
            pool.obeyed.insert(Uid::from("x"), Generation::FIRST);
        });
        assert_eq!(writes(&view), (0, 0));
        assert_eq!(of_image(&view), []);
    }
}
