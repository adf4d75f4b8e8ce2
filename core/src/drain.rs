//! Pools that are emptied: who still holds something in them, and when a deleted one may go.

use std::fmt::Write as _;

use crate::change::Change;
use crate::ids::{NodeName, Uid};
use crate::ledger::{Holder, Promise};
use crate::reclaim::has_other_copy;
use crate::view::{Access, LedgerView, PoolView, ReservationView, Service, View};

/// How many holders a message names; the others are counted.
const NAMED: usize = 8;

/// What keeps a pool from being empty where it is drained: the first few by name, and how many more there are. `None` if
/// nothing does. With `everywhere`, on every node.
pub fn held_by(view: &View, pool: &PoolView, everywhere: bool) -> Option<String> {
    let drained = view.ledgers.values().filter(|ledger| {
        ledger.pool == pool.name && (everywhere || pool.service_on(&ledger.node) == Service::Draining)
    });
    let (mut text, mut count) = (String::new(), 0_usize);
    for (ledger, (uid, promise)) in
        drained.flat_map(|ledger| ledger.promises.iter().map(move |p| (ledger, p)))
    {
        count += 1;
        if count <= NAMED {
            let separator = if text.is_empty() { "" } else { ", " };
            let _ = write!(text, "{separator}{}", holder(view, ledger, uid, promise));
        }
    }
    if count > NAMED {
        let _ = write!(text, " and {} more", count - NAMED);
    }
    (count > 0).then(|| format!("held by {text}"))
}

fn holder(view: &View, ledger: &LedgerView, uid: &Uid, promise: &Promise) -> String {
    let node = &ledger.node;
    let what = match (&promise.holder, view.reservations.get(uid)) {
        (Holder::Reservation(_), Some(reservation)) => of_reservation(view, ledger, reservation),
        (Holder::Reservation(name), None) => format!("reservation {name}, which does not exist"),
        (Holder::Image(name), _) => match view.images.get(name).filter(|image| image.uid == *uid) {
            Some(image) if !has_other_copy(view, image) => {
                format!("image {name}, of which no other copy is known")
            }
            Some(_) => format!("image {name}"),
            None => format!("image {name}, which does not exist"),
        },
    };
    format!("{what} on node {node}")
}

fn of_reservation(view: &View, ledger: &LedgerView, reservation: &ReservationView) -> String {
    let report = view.report_of(&ledger.pool, &ledger.node);
    let used =
        if report.is_some_and(|report| report.in_use.contains(&reservation.uid)) { " (in use)" } else { "" };
    match (&reservation.claim_name, reservation.access) {
        (Some(claim), Access::Block) => {
            format!("volume of claim {}/{claim}{used}", reservation.claim_namespace)
        }
        _ => format!("reservation {}{used}", reservation.name),
    }
}

/// The next steps for a pool that is being deleted: its empty ledgers go, then its finalizer.
pub fn end(view: &View, pool: &PoolView) -> Vec<Change> {
    let mut ledgers = view.ledgers.values().filter(|ledger| ledger.pool == pool.name).peekable();
    if ledgers.peek().is_none() {
        let unguard = || Change::UnguardPool { name: pool.name.clone(), uid: pool.uid.clone() };
        return pool.has_finalizer.then(unguard).into_iter().collect();
    }
    let empty = ledgers.filter(|ledger| is_over(view, ledger));
    empty
        .map(|ledger| Change::DeleteLedger { name: ledger.name.clone(), version: ledger.version.clone() })
        .collect()
}

/// True if a ledger has nothing promised, its node has given everything back, and no object is left that would ask for it:
/// what is being deleted looks for its promise there.
fn is_over(view: &View, ledger: &LedgerView) -> bool {
    let here = |node: &NodeName| *node == ledger.node;
    let assigned = view.reservations.values().any(|reservation| {
        reservation.assignment.as_ref().is_some_and(|place| place.pool == ledger.pool && here(&place.node))
    });
    let staged = view.images.values().any(|image| image.pool == ledger.pool && here(&image.node));
    ledger.promises.is_empty() && !assigned && !staged && view.behind(ledger).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{add, at, hold, image, placed, reservation, view};
    use crate::ids::PoolName;
    use crate::ledger::Class;
    use crate::reason::Reason;
    use crate::units::{Generation, Timestamp};

    fn ask(view: &View) -> Vec<Change> {
        let changes = crate::pool::decide(view, &PoolName::from("p"), Timestamp(0));
        changes.into_iter().filter(|change| !matches!(change, Change::ReportPool { .. })).collect()
    }

    fn told(view: &View) -> (bool, Reason, String) {
        let report = crate::pool::report(view, &view.pools[&PoolName::from("p")]);
        (report.ready, report.reason, report.message)
    }

    /// A volume in use, a plain reservation and an image without another copy.
    fn held() -> View {
        let mut view = view(&[("a", 100), ("b", 100)]);
        let mut volume = reservation("volume", 10, 0);
        volume.access = Access::Block;
        volume.claim_namespace = "shop".to_owned();
        volume.claim_name = Some("db".to_owned());
        for mut held in [volume, reservation("plain", 10, 0)] {
            held.assignment = Some(placed("p", "a", 1));
            let name = held.name.name.clone();
            add(&mut view, held);
            hold(&mut view, "a", &name, Class::Images, 10);
        }
        let image = image("a", 20, 0);
        let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
        ledger.promises.insert(image.uid.clone(), image.promise(None));
        view.images.insert(image.name.clone(), image);
        let node = view.nodes.get_mut(&NodeName::from("a")).expect("there");
        node.pools.values_mut().for_each(|pool| {
            pool.in_use.insert(Uid::from("volume"));
        });
        view
    }

    #[test]
    fn what_a_drain_waits_for_is_named() {
        let mut view = held();
        view.pools.values_mut().for_each(|pool| pool.service = Service::Draining);
        let name = view.images.keys().next().expect("one").clone();
        let (ready, reason, message) = told(&view);
        assert_eq!((ready, reason), (false, Reason::Draining));
        let expected = format!(
            "takes nothing new; held by image {name}, of which no other copy is known on node a, reservation ns/plain \
             on node a, volume of claim shop/db (in use) on node a"
        );
        assert_eq!(message, expected);
        view.ledgers.values_mut().for_each(|ledger| ledger.promises.clear());
        assert_eq!(told(&view).2, "takes nothing new; holds nothing");
        for n in 0..20 {
            hold(&mut view, "b", &format!("many-{n}"), Class::Images, 1);
        }
        assert!(told(&view).2.ends_with(" and 12 more"), "{}", told(&view).2);
    }

    #[test]
    fn one_node_may_be_drained_while_the_others_serve() {
        let mut view = held();
        view.pools.values_mut().for_each(|pool| {
            pool.drain_nodes.insert(NodeName::from("b"));
        });
        let (ready, _, message) = told(&view);
        assert_eq!((ready, message.as_str()), (true, "2 nodes carry the pool; draining b: holds nothing"));
        hold(&mut view, "b", "last", Class::Images, 10);
        assert!(
            told(&view).2.ends_with("held by reservation ns/last, which does not exist on node b"),
            "{}",
            told(&view).2
        );
    }

    #[test]
    fn a_deleted_pool_goes_after_its_last_promise_and_its_last_object() {
        let mut view = held();
        view.pools.values_mut().for_each(|pool| pool.deleting = true);
        let deleted = |view: &View| {
            let changes = ask(view);
            changes.iter().filter(|c| matches!(c, Change::DeleteLedger { .. })).count()
        };
        assert_eq!(told(&view).1, Reason::Releasing);
        assert!(told(&view).2.contains("volume of claim shop/db"), "{}", told(&view).2);
        assert_eq!(deleted(&view), 1, "the empty one");
        view.ledgers.remove(&at("p", "b"));
        view.ledgers.values_mut().for_each(|ledger| ledger.promises.clear());
        assert_eq!(deleted(&view), 0, "objects that look for their promise there are left");
        view.reservations.clear();
        view.images.clear();
        let node = view.nodes.get_mut(&NodeName::from("a")).expect("there");
        node.pools.values_mut().for_each(|pool| {
            pool.obeyed.insert(Uid::from("x"), Generation::FIRST);
        });
        assert_eq!(deleted(&view), 0, "the node holds something that nobody knows");
        let node = view.nodes.get_mut(&NodeName::from("a")).expect("there");
        node.pools.values_mut().for_each(|pool| pool.obeyed.clear());
        assert_eq!(deleted(&view), 1);
        view.ledgers.clear();
        assert!(matches!(&ask(&view)[..], [Change::UnguardPool { .. }]));
        view.pools.values_mut().for_each(|pool| pool.has_finalizer = false);
        assert_eq!(ask(&view), []);
    }

    #[test]
    fn a_pool_is_guarded_before_it_has_ledgers() {
        let mut view = view(&[("a", 100)]);
        view.ledgers.clear();
        view.pools.values_mut().for_each(|pool| pool.has_finalizer = false);
        assert!(matches!(&ask(&view)[..], [Change::GuardPool { .. }]));
        view.pools.values_mut().for_each(|pool| pool.has_finalizer = true);
        assert!(matches!(&ask(&view)[..], [Change::CreateLedger { .. }]));
    }
}
