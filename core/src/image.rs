//! Staged images: retired when nothing refers to them, deleted, and released like everything that holds a promise.

mod state;

use crate::change::Change;
use crate::lost;
use crate::reclaim::{Cause, Needs, has_other_copy, unused_since};
use crate::retire::{follow, is_over, is_retired, may_write, retire};
use crate::units::Timestamp;
use crate::view::{ImageView, LedgerView, View};

pub use state::{Event, StagedState};

/// How often a release is looked at without any other cause, in milliseconds.
const LOOK_MILLIS: u64 = 10_000;

/// The next steps for the staged image with this name.
pub fn decide(view: &View, name: &str, now: Timestamp) -> Vec<Change> {
    let Some(image) = view.images.get(name) else { return Vec::new() };
    let ledger = view.ledgers.get(&(image.pool.clone(), image.node.clone()));
    if image.deleting {
        return release(view, image, ledger);
    }
    if ledger.is_some_and(|ledger| is_retired(ledger, &image.uid)) {
        return vec![delete(image)];
    }
    sweep(view, image, ledger, now)
}

fn delete(image: &ImageView) -> Change {
    Change::DeleteImage { name: image.name.clone(), uid: image.uid.clone() }
}

/// The leader retires an image that nothing names and that was last used, or made, longer ago than the pool says. When else
/// one goes, see [`crate::reclaim`].
fn sweep(view: &View, image: &ImageView, ledger: Option<&LedgerView>, now: Timestamp) -> Vec<Change> {
    if !view.sweeps() || !has_other_copy(view, image) || Needs::of(view).need(image) {
        return Vec::new();
    }
    let Some(pool) = view.pools.get(&image.pool) else { return Vec::new() };
    let stays = pool.reclaim.ttl_millis.max(pool.reclaim.keep_warm_millis);
    let left = stays.saturating_sub(now.millis_since(unused_since(image)));
    if left > 0 {
        return vec![Change::RetryAfter { millis: left }];
    }
    match ledger {
        Some(ledger) => retire(view, ledger, &[image], Cause::Unused),
        // Its ledger is about to be made, and to be used.
        None if view.report_of(&image.pool, &image.node).is_some() => {
            vec![Change::RetryAfter { millis: LOOK_MILLIS }]
        }
        None => vec![delete(image)],
    }
}

/// The node gives the bytes back, then the object goes, then the promise ([`crate::pool`]). Where the node is given up there is
/// nothing to wait for, and the promise goes first.
fn release(view: &View, image: &ImageView, ledger: Option<&LedgerView>) -> Vec<Change> {
    let unguard = Change::UnguardImage { name: image.name.clone(), uid: image.uid.clone() };
    let done = if image.has_finalizer { vec![unguard] } else { Vec::new() };
    let Some(ledger) = ledger else { return done };
    let entry = ledger.promises.get(&image.uid);
    if lost::is_given_up(view, &image.pool, &image.node) || lost::is_written_off(view, &image.node) {
        return if entry.is_some() { vec![view.without(ledger, &[&image.uid])] } else { done };
    }
    if let Some(change) = follow(view, ledger, image) {
        return vec![change];
    }
    let report = view.report_of(&image.pool, &image.node).filter(|_| may_write(view, ledger));
    let over = report.zip(entry).is_some_and(|(report, entry)| is_over(report, &image.uid, entry));
    if over { done } else { vec![Change::RetryAfter { millis: LOOK_MILLIS }] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{HOUR, add, at, image, placed, reservation, template, unreadable, view};
    use crate::ids::{NodeName, ObjectName, PoolName};
    use crate::retire::retired;
    use crate::units::{Bytes, Generation};
    use crate::view::{Access, AssignedImage};

    fn staged() -> View {
        let mut view = view(&[("a", 100)]);
        let image = image("a", 20, HOUR);
        view.ledgers
            .get_mut(&at("p", "a"))
            .expect("there")
            .promises
            .insert(image.uid.clone(), image.promise(None));
        view.images.insert(image.name.clone(), image);
        view
    }

    fn ask(view: &View, now: u64) -> Vec<Change> {
        let name = view.images.keys().next().expect("one").clone();
        decide(view, &name, Timestamp(now))
    }

    #[test]
    fn nothing_is_swept_while_an_object_cannot_be_read() {
        let mut view = staged();
        view.images.values_mut().for_each(|image| image.given_up = true);
        view.unreadable.push(unreadable("StagingReservation", ObjectName::new("ns", "r"), "r"));
        assert_eq!(ask(&view, 9 * HOUR), [], "it may need the image");
        view.unreadable.clear();
        assert_eq!(retired(&ask(&view, 9 * HOUR)).len(), 1);
    }

    #[test]
    fn swept_by_the_leader_after_its_time_and_never_while_it_is_named_or_wanted() {
        let mut view = staged();
        assert_eq!(ask(&view, 9 * HOUR), [], "no other copy is known");
        view.images.values_mut().for_each(|image| image.given_up = true);
        assert_eq!(retired(&ask(&view, 9 * HOUR)).len(), 1, "its template is deleted");
        view.images.values_mut().for_each(|image| image.given_up = false);
        let import = template(30, 20);
        view.imports.insert(import.name.clone(), import);
        assert_eq!(ask(&view, HOUR + 1), [Change::RetryAfter { millis: HOUR - 1 }]);
        let swept = ask(&view, 2 * HOUR);
        let [Change::WriteLedger { .. }, Change::ReportReclaim { cause, images, bytes, .. }] = &swept[..]
        else {
            panic!("{swept:?}")
        };
        assert_eq!((*cause, *images, *bytes), (Cause::Unused, 1, Bytes(20)));
        view.pools.values_mut().for_each(|pool| pool.reclaim.keep_warm_millis = 3 * HOUR);
        assert!(matches!(&ask(&view, 2 * HOUR)[..], [Change::RetryAfter { .. }]), "it is kept warm");
        view.pools.values_mut().for_each(|pool| pool.reclaim.keep_warm_millis = 0);
        view.images.values_mut().for_each(|image| image.last_used = Some(Timestamp(2 * HOUR)));
        assert!(matches!(&ask(&view, 2 * HOUR)[..], [Change::RetryAfter { .. }]));
        view.leader = false;
        assert_eq!(ask(&view, 9 * HOUR), []);
        view.leader = true;
        let mut user = reservation("r", 1, 0);
        user.access = Access::Block;
        user.template = Some(ObjectName::new("ns", "template"));
        let uid = add(&mut view, user);
        assert_eq!(ask(&view, 9 * HOUR), [], "one that waits wants it");
        let image = view.images.values().next().expect("one").clone();
        let user = view.reservations.get_mut(&uid).expect("there");
        user.assignment = Some(placed("p", "a", 1));
        let (digest, staged_image, virtual_size) = (image.digest, image.name, image.virtual_size);
        user.assigned_image = Some(AssignedImage { digest, staged_image, virtual_size });
        assert_eq!(ask(&view, 9 * HOUR), [], "one that has its place names it");
        view.reservations.get_mut(&uid).expect("there").deleting = true;
        assert_eq!(retired(&ask(&view, 9 * HOUR)).len(), 1);
    }

    /// The ledger as the changes leave it.
    fn write(view: &mut View, changes: &[Change]) {
        let [Change::WriteLedger { promises, revision, .. }, ..] = changes else { panic!("{changes:?}") };
        let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
        (ledger.promises, ledger.revision) = (promises.clone(), *revision);
    }

    fn report(view: &mut View) -> &mut crate::view::NodePoolState {
        let node = view.nodes.get_mut(&NodeName::from("a")).expect("there");
        node.pools.values_mut().next().expect("one")
    }

    #[test]
    fn a_retired_image_is_deleted_by_any_operator_and_by_none_before() {
        let mut view = staged();
        let import = template(30, 20);
        view.imports.insert(import.name.clone(), import);
        let swept = ask(&view, 2 * HOUR);
        write(&mut view, &swept);
        view.leader = false;
        assert!(matches!(&ask(&view, 2 * HOUR)[..], [Change::DeleteImage { .. }]));
        view.ledgers.clear();
        assert_eq!(ask(&view, 2 * HOUR), [], "the leader does it");
        view.leader = true;
        assert!(matches!(&ask(&view, 2 * HOUR)[..], [Change::RetryAfter { .. }]), "its ledger is being made");
        view.nodes.clear();
        assert!(matches!(&ask(&view, 2 * HOUR)[..], [Change::DeleteImage { .. }]), "it will have none");
    }

    #[test]
    fn its_finalizer_goes_after_the_node_said_so_and_its_promise_after_that() {
        let mut view = staged();
        view.images.values_mut().for_each(|image| image.deleting = true);
        let uid = view.images.values().next().expect("one").uid.clone();
        report(&mut view).released.insert(uid.clone(), Generation::FIRST);
        let followed = ask(&view, 0);
        assert_eq!(retired(&followed).len(), 1, "a person deleted it: nothing may be given it any more");
        write(&mut view, &followed);
        let ledger = &view.ledgers[&at("p", "a")];
        let (lineage, revision) = (ledger.lineage.clone(), ledger.revision);
        report(&mut view).lineage = Some(lineage);
        assert!(
            matches!(&ask(&view, 0)[..], [Change::RetryAfter { .. }]),
            "of what was said before it counts nothing"
        );
        report(&mut view).obeyed_revision = revision;
        assert!(matches!(&ask(&view, 0)[..], [Change::UnguardImage { .. }]));
        report(&mut view).released.clear();
        assert!(matches!(&ask(&view, 0)[..], [Change::UnguardImage { .. }]), "it was never obeyed");
        report(&mut view).obeyed.insert(uid.clone(), Generation::FIRST);
        assert!(matches!(&ask(&view, 0)[..], [Change::RetryAfter { .. }]));
        report(&mut view).released.insert(uid, Generation::FIRST);
        view.images.values_mut().for_each(|image| image.has_finalizer = false);
        assert_eq!(ask(&view, 0), []);
        view.images.clear();
        let swept = crate::pool::decide(&view, &PoolName::from("p"), Timestamp(0));
        let [_, Change::ConfirmGone { .. }, Change::WriteLedger { promises, .. }] = &swept[..] else {
            panic!("{swept:?}")
        };
        assert!(promises.is_empty());
    }
}
