//! Nodes that are gone, and what is given up with them.
//!
//! **Guarantees.** A node that cannot be reached is not gone: only one that Kubernetes does not have any more, and that does
//! not renew its Lease. By policy only copies and work space are given up, never a volume. Should the node come back, its
//! record holds promises that the ledger lacks; nothing is admitted there until the ledger is rebuilt from it.

use crate::change::Change;
use crate::ids::{NodeName, PoolName};
use crate::view::{Access, NodeLossPolicy, ReservationView, View};

/// True if Kubernetes has no such node any more, and nothing renews its Lease.
fn is_gone(view: &View, node: &NodeName) -> bool {
    view.kube_nodes.as_ref().is_some_and(|nodes| !nodes.contains(node))
        && view.nodes.get(node).is_none_or(|state| !state.live)
}

/// True if the pool's copies and work space on this node are given up, because that is gone and the pool's policy says so.
pub fn is_given_up(view: &View, pool: &PoolName, node: &NodeName) -> bool {
    let policy = view.pools.get(pool).map(|pool| pool.node_loss);
    policy == Some(NodeLossPolicy::Release) && is_gone(view, node)
}

/// True if what is being deleted need not wait for this node: it is gone, and a person has deleted its report as well. One
/// that cannot be read is not deleted.
pub fn is_written_off(view: &View, node: &NodeName) -> bool {
    is_gone(view, node) && !view.nodes.contains_key(node) && !view.hides_reports()
}

/// How to be done with what is promised on a node that does not report; `None` if it does.
pub fn way_out(view: &View, node: &NodeName) -> Option<String> {
    if !view.is_lost(node) || is_written_off(view, node) {
        return None;
    }
    Some(if is_gone(view, node) {
        format!("node {node} is gone: delete StagingNode {node} to give up what it holds")
    } else {
        format!(
            "node {node} does not report: if it will not come back, delete Node {node} and StagingNode {node}"
        )
    })
}

/// True if nothing is lost with the space of this reservation: it is no volume, and holds no file that was not sent yet.
const fn can_be_had_again(reservation: &ReservationView) -> bool {
    !matches!(reservation.access, Access::Block) && reservation.only_copy.is_none()
}

/// True if the promise of this reservation, which is being deleted, may go without a report of its node.
pub fn releases(view: &View, reservation: &ReservationView, pool: &PoolName, node: &NodeName) -> bool {
    is_written_off(view, node) || can_be_had_again(reservation) && is_given_up(view, pool, node)
}

/// What the leader does about a reservation on a node that is given up: nobody can use its space any more.
pub fn give_up(view: &View, reservation: &ReservationView) -> Option<Change> {
    let place = reservation.assignment.as_ref()?;
    let lost = view.sweeps() && can_be_had_again(reservation) && is_given_up(view, &place.pool, &place.node);
    lost.then(|| Change::DeleteReservation { name: reservation.name.clone(), uid: reservation.uid.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{add, at, hold, image, placed, reservation, template, unreadable, view};
    use crate::ids::Uid;
    use crate::ledger::Class;
    use crate::units::Timestamp;
    use std::collections::BTreeSet;

    /// A pool of policy `Release` with work space, a volume and an image on a node that Kubernetes does not have.
    fn gone() -> View {
        let mut view = view(&[("a", 100)]);
        view.pools.values_mut().for_each(|pool| pool.node_loss = NodeLossPolicy::Release);
        for (name, access) in [("work", Access::File), ("volume", Access::Block)] {
            let mut held = reservation(name, 10, 0);
            held.access = access;
            held.assignment = Some(placed("p", "a", 1));
            held.prepared = Some(crate::units::Generation::FIRST);
            held.state = crate::view::ReservationState::Ready;
            add(&mut view, held);
            hold(&mut view, "a", name, Class::Images, 10);
        }
        let import = template(20, 20);
        view.imports.insert(import.name.clone(), import);
        let image = image("a", 20, 0);
        let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
        ledger.promises.insert(image.uid.clone(), image.promise(None));
        view.images.insert(image.name.clone(), image);
        let (uids, lineage): (Vec<Uid>, _) = {
            let ledger = &view.ledgers[&at("p", "a")];
            (ledger.promises.keys().cloned().collect(), ledger.lineage.clone())
        };
        let node = view.nodes.get_mut(&NodeName::from("a")).expect("there");
        let report = node.pools.values_mut().next().expect("one");
        report.obeyed.extend(uids.into_iter().map(|uid| (uid, crate::units::Generation::FIRST)));
        report.lineage = Some(lineage);
        view.nodes.values_mut().for_each(|node| node.live = false);
        view.kube_nodes = Some(BTreeSet::new());
        view
    }

    fn about(view: &View, uid: &str) -> Vec<Change> {
        crate::reservation::decide(view, &Uid::from(uid), Timestamp(0))
    }

    fn images_go(view: &View) -> bool {
        let changes = crate::pool::decide(view, &PoolName::from("p"), Timestamp(0));
        !crate::retire::retired(&changes).is_empty()
    }

    #[test]
    fn copies_and_work_space_of_a_node_that_is_gone_are_given_up_and_volumes_never() {
        let mut view = gone();
        assert!(matches!(&about(&view, "work")[..], [Change::DeleteReservation { .. }]));
        assert!(!about(&view, "volume").iter().any(|c| matches!(c, Change::DeleteReservation { .. })));
        assert!(images_go(&view));
        let work = |view: &mut View, copy: Option<&str>| {
            let work = view.reservations.get_mut(&Uid::from("work")).expect("there");
            work.only_copy = copy.map(str::to_owned);
        };
        work(&mut view, Some("result.raw is to be sent"));
        assert!(
            !about(&view, "work").iter().any(|c| matches!(c, Change::DeleteReservation { .. })),
            "only copy"
        );
        view.reservations.values_mut().for_each(|r| r.deleting = true);
        assert!(matches!(&about(&view, "work")[..], [Change::ReportReservation { .. }]), "it waits, too");
        work(&mut view, None);
        assert!(
            matches!(&about(&view, "work")[..], [Change::WriteLedger { promises, .. }] if promises.len() == 2)
        );
        assert!(
            matches!(&about(&view, "volume")[..], [Change::ReportReservation { .. }]),
            "it waits for its node, or for a person"
        );
        let [Change::WriteLedger { promises, .. }] = &about(&view, "work")[..] else {
            panic!("a ledger write")
        };
        let promises = promises.clone();
        let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
        (ledger.promises, ledger.revision) = (promises, ledger.revision + 1);
        assert!(view.behind(&view.ledgers[&at("p", "a")]).is_some(), "by the node's last report");
        assert!(matches!(&about(&view, "work")[..], [Change::UnguardReservation { .. }]));
        view.nodes.clear();
        assert!(
            matches!(&about(&view, "volume")[..], [Change::WriteLedger { .. }]),
            "its report is deleted too"
        );
        view.unreadable.push(unreadable("StagingNode", crate::ids::ObjectName::new("", "a"), "node"));
        assert!(
            matches!(&about(&view, "volume")[..], [Change::ReportReservation { .. }]),
            "its report is there, and cannot be read"
        );
        view.unreadable.clear();
        view.ledgers.clear();
        assert!(
            matches!(&about(&view, "volume")[..], [Change::UnguardReservation { .. }]),
            "so is its ledger"
        );
    }

    #[test]
    fn a_partition_is_not_enough_nor_is_the_policy_retain_nor_a_list_that_is_not_known() {
        for keep in [
            (|view: &mut View| view.kube_nodes = Some(BTreeSet::from([NodeName::from("a")])))
                as fn(&mut View),
            |view| view.kube_nodes = None,
            |view| view.pools.values_mut().for_each(|pool| pool.node_loss = NodeLossPolicy::Retain),
            |view| view.nodes.values_mut().for_each(|node| node.live = true),
        ] {
            let mut view = gone();
            keep(&mut view);
            view.reservations.values_mut().for_each(|r| r.max_size = crate::units::Bytes(10));
            assert!(!about(&view, "work").iter().any(|c| matches!(c, Change::DeleteReservation { .. })));
            assert!(!images_go(&view));
            view.reservations.values_mut().for_each(|r| r.deleting = true);
            assert!(!about(&view, "work").iter().any(|c| matches!(c, Change::WriteLedger { .. })));
        }
    }

    #[test]
    fn an_image_that_is_being_deleted_does_not_wait_for_a_node_that_is_given_up() {
        let mut view = gone();
        view.images.values_mut().for_each(|image| image.deleting = true);
        let name = view.images.keys().next().expect("one").clone();
        let ask = |view: &View| crate::image::decide(view, &name, Timestamp(0));
        let held = view.images[&name].uid.clone();
        let keeps = |changes: &[Change]| match changes {
            [Change::WriteLedger { promises, .. }] => promises.contains_key(&held),
            _ => panic!("{changes:?}"),
        };
        assert!(!keeps(&ask(&view)));
        view.nodes.values_mut().for_each(|node| node.live = true);
        assert!(keeps(&ask(&view)), "it is only revoked");
    }
}
