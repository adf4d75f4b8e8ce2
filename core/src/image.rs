//! Staged images: swept when nothing refers to them, and released like everything that holds a promise.

use crate::change::Change;
use crate::lost;
use crate::reclaim::{Cause, Needs, delete, has_other_copy, unused_since};
use crate::units::Timestamp;
use crate::view::{ImageView, View};

/// How often a release is looked at without any other cause, in milliseconds.
const LOOK_MILLIS: u64 = 10_000;

/// The next steps for the staged image with this name.
pub fn decide(view: &View, name: &str, now: Timestamp) -> Vec<Change> {
    let Some(image) = view.images.get(name) else { return Vec::new() };
    if image.deleting { release(view, image) } else { sweep(view, image, now) }
}

/// The leader deletes an image that nothing names and that was last used, or made, longer ago than the pool says. When else
/// one goes, see [`crate::reclaim`].
fn sweep(view: &View, image: &ImageView, now: Timestamp) -> Vec<Change> {
    if !view.leader || !has_other_copy(view, image) || Needs::of(view).need(image) {
        return Vec::new();
    }
    let Some(pool) = view.pools.get(&image.pool) else { return Vec::new() };
    let stays = pool.reclaim.ttl_millis.max(pool.reclaim.keep_warm_millis);
    let left = stays.saturating_sub(now.millis_since(unused_since(image)));
    if left > 0 {
        return vec![Change::RetryAfter { millis: left }];
    }
    match view.ledgers.get(&(image.pool.clone(), image.node.clone())) {
        Some(ledger) => delete(ledger, &[image], Cause::Unused),
        None => vec![Change::DeleteImage { name: image.name.clone(), uid: image.uid.clone() }],
    }
}

fn release(view: &View, image: &ImageView) -> Vec<Change> {
    let unguard = Change::UnguardImage { name: image.name.clone(), uid: image.uid.clone() };
    let done = if image.has_finalizer { vec![unguard] } else { Vec::new() };
    let report = view.report_of(&image.pool, &image.node);
    let Some(ledger) = view.ledgers.get(&(image.pool.clone(), image.node.clone())) else { return done };
    let given_up =
        lost::is_given_up(view, &image.pool, &image.node) || lost::is_written_off(view, &image.node);
    // By the last report of a node that is gone, a ledger is behind for what was given up alone.
    if view.behind(ledger).is_some() && !given_up {
        return vec![Change::RetryAfter { millis: LOOK_MILLIS }];
    }
    let Some(entry) = ledger.promises.get(&image.uid) else { return done };
    let released =
        report.and_then(|report| report.released.get(&image.uid)).is_some_and(|g| *g >= entry.generation);
    if released || given_up {
        vec![view.without(ledger, &[&image.uid])]
    } else {
        vec![Change::RetryAfter { millis: LOOK_MILLIS }]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{HOUR, add, at, image, placed, reservation, template, view};
    use crate::ids::{NodeName, ObjectName};
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
    fn swept_by_the_leader_after_its_time_and_never_while_it_is_named_or_wanted() {
        let mut view = staged();
        assert_eq!(ask(&view, 9 * HOUR), [], "no other copy is known");
        view.images.values_mut().for_each(|image| image.given_up = true);
        assert!(
            matches!(&ask(&view, 9 * HOUR)[..], [Change::DeleteImage { .. }, ..]),
            "its template is deleted"
        );
        view.images.values_mut().for_each(|image| image.given_up = false);
        let import = template(30, 20);
        view.imports.insert(import.name.clone(), import);
        assert_eq!(ask(&view, HOUR + 1), [Change::RetryAfter { millis: HOUR - 1 }]);
        let swept = ask(&view, 2 * HOUR);
        let [Change::DeleteImage { .. }, Change::ReportReclaim { cause, images, bytes, .. }] = &swept[..]
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
        assert!(matches!(&ask(&view, 9 * HOUR)[..], [Change::DeleteImage { .. }, ..]));
    }

    #[test]
    fn its_promise_goes_after_the_node_said_so_and_its_finalizer_after_that() {
        let mut view = staged();
        view.images.values_mut().for_each(|image| image.deleting = true);
        assert!(matches!(&ask(&view, 0)[..], [Change::RetryAfter { .. }]));
        let uid = view.images.values().next().expect("one").uid.clone();
        let node = view.nodes.get_mut(&NodeName::from("a")).expect("there");
        node.pools.values_mut().for_each(|pool| {
            pool.released.insert(uid.clone(), Generation::FIRST);
        });
        assert!(matches!(&ask(&view, 0)[..], [Change::WriteLedger { promises, .. }] if promises.is_empty()));
        view.ledgers.values_mut().for_each(|ledger| ledger.promises.clear());
        assert!(matches!(&ask(&view, 0)[..], [Change::UnguardImage { .. }]));
        view.images.values_mut().for_each(|image| image.has_finalizer = false);
        assert_eq!(ask(&view, 0), []);
    }
}
