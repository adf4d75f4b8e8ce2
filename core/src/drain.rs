//! Pools that are emptied: who still holds something in them, and when a deleted one may go.

use std::fmt::Write as _;

use crate::change::Change;
use crate::ids::{NodeName, Uid};
use crate::ledger::{Holder, Promise};
use crate::lost;
use crate::reclaim::has_other_copy;
use crate::view::{Access, LedgerView, PoolView, ReservationView, Service, View};

/// How many holders a message names; the others are counted.
const NAMED: usize = 8;

/// What keeps a pool from being empty where it is drained: the first few by name, and how many more there are. `None` if
/// nothing does. With `everywhere`, on every node.
pub fn held_by(view: &View, pool: &PoolView, everywhere: bool) -> Option<String> {
    let drained = || {
        view.ledgers.values().filter(|ledger| {
            ledger.pool == pool.name && (everywhere || pool.service_on(&ledger.node) == Service::Draining)
        })
    };
    let (mut text, mut count) = (String::new(), 0_usize);
    for (ledger, (uid, promise)) in
        drained().flat_map(|ledger| ledger.promises.iter().map(move |p| (ledger, p)))
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
    let held = drained().filter(|ledger| !ledger.promises.is_empty()).map(|ledger| &ledger.node);
    for way_out in held.filter_map(|node| lost::way_out(view, node)).take(NAMED) {
        let _ = write!(text, "; {way_out}");
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
    ledgers.filter_map(|ledger| end_ledger(view, ledger)).collect()
}

/// The end of a ledger of a pool that goes or has gone, once nothing needs it any more.
pub(crate) fn end_ledger(view: &View, ledger: &LedgerView) -> Option<Change> {
    let (name, version) = (ledger.name.clone(), ledger.version.clone());
    is_over(view, ledger).then_some(Change::DeleteLedger { name, version })
}

/// True if a ledger has nothing promised, its node has given everything back or is given up, and no object is left that would
/// ask for it: what is being deleted looks for its promise there.
fn is_over(view: &View, ledger: &LedgerView) -> bool {
    let here = |node: &NodeName| *node == ledger.node;
    let assigned = view.reservations.values().any(|reservation| {
        reservation.assignment.as_ref().is_some_and(|place| place.pool == ledger.pool && here(&place.node))
    });
    let staged = view.images.values().any(|image| image.pool == ledger.pool && here(&image.node));
    let given_back = view.behind(ledger).is_none() || lost::is_given_up(view, &ledger.pool, &ledger.node);
    ledger.promises.is_empty() && !assigned && !staged && given_back
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

    /// The pool of [`held`], being deleted, whose node `a` does not answer; its holders were removed by force.
    fn forced() -> View {
        let mut view = held();
        view.pools.values_mut().for_each(|pool| pool.deleting = true);
        view.reservations.clear();
        view.images.clear();
        view.ledgers.remove(&at("p", "b"));
        let (uids, lineage): (Vec<Uid>, _) = {
            let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
            ledger.promises.get_mut(&Uid::from("volume")).expect("held").class = Class::Volumes;
            (ledger.promises.keys().cloned().collect(), ledger.lineage.clone())
        };
        let node = view.nodes.get_mut(&NodeName::from("a")).expect("there");
        node.live = false;
        node.pools.values_mut().for_each(|pool| {
            pool.lineage = Some(lineage.clone());
            pool.obeyed.extend(uids.iter().map(|uid| (uid.clone(), Generation::FIRST)));
        });
        view.kube_nodes = Some([NodeName::from("b")].into());
        view
    }

    /// The holders that are asked for, and those that are promised something afterwards.
    fn swept(view: &View) -> Option<(usize, Vec<String>)> {
        let changes = ask(view);
        let asked = changes.iter().filter(|change| matches!(change, Change::ConfirmGone { .. })).count();
        changes.iter().find_map(|change| match change {
            Change::WriteLedger { promises, .. } => {
                let kept = promises.iter().filter(|(_, promise)| promise.revoked.is_none());
                Some((asked, kept.map(|(uid, _)| uid.to_string()).collect()))
            }
            _ => None,
        })
    }

    #[test]
    fn what_is_promised_on_a_node_that_is_written_off_goes_so_that_a_deleted_pool_ends() {
        let mut view = forced();
        view.nodes.remove(&NodeName::from("a"));
        assert_eq!(swept(&view), Some((3, Vec::new())), "each is asked for, then all go, also the volume");
        view.kube_nodes = Some([NodeName::from("a")].into());
        assert_eq!(swept(&view), None, "Kubernetes still has the node");
        view.kube_nodes = Some([NodeName::from("b")].into());
        view.ledgers.values_mut().for_each(|ledger| ledger.promises.clear());
        assert!(ask(&view).iter().any(|change| matches!(change, Change::DeleteLedger { .. })));
    }

    #[test]
    fn by_the_policy_release_copies_and_work_space_go_from_a_node_that_is_gone_and_no_volume() {
        let mut view = forced();
        let retained = swept(&view);
        assert_ne!(retained, Some((2, vec!["volume".to_owned()])), "{retained:?}");
        view.pools.values_mut().for_each(|pool| pool.node_loss = crate::view::NodeLossPolicy::Release);
        assert_eq!(swept(&view), Some((2, vec!["volume".to_owned()])));
        view.ledgers.values_mut().for_each(|ledger| ledger.promises.clear());
        assert!(view.behind(&view.ledgers[&at("p", "a")]).is_some(), "by the node's last report");
        assert!(ask(&view).iter().any(|change| matches!(change, Change::DeleteLedger { .. })));
    }

    #[test]
    fn what_a_lost_node_keeps_is_told_with_the_way_out() {
        let mut view = forced();
        let (.., message) = told(&view);
        assert!(
            message.ends_with("; node a is gone: delete StagingNode a to give up what it holds"),
            "{message}"
        );
        view.kube_nodes = None;
        let (.., message) = told(&view);
        let way_out = "; node a does not report: if it will not come back, delete Node a and StagingNode a";
        assert!(message.ends_with(way_out), "{message}");
        view.nodes.values_mut().for_each(|node| node.live = true);
        assert!(!told(&view).2.contains("node a does not report"));
    }

    #[test]
    fn the_ledgers_of_a_pool_that_was_removed_by_force_go_once_nothing_is_promised_in_them() {
        let mut view = held();
        let end = |view: &View, node: &str| {
            crate::pool::decide_ledger(view, &PoolName::from("p"), &NodeName::from(node))
        };
        assert_eq!(end(&view, "b"), [], "its pool is there");
        view.pools.clear();
        assert!(matches!(&end(&view, "b")[..], [Change::DeleteLedger { .. }]));
        assert_eq!(end(&view, "a"), [], "what holds something is there");
        view.reservations.clear();
        view.images.clear();
        let changes = end(&view, "a");
        assert!(
            matches!(&changes[..], [.., Change::WriteLedger { .. }]) && changes.len() == 4,
            "{changes:?}"
        );
        view.leader = false;
        assert_eq!(end(&view, "b"), []);
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
