//! Reservations: admitted, queued, refused, released.

use std::collections::BTreeSet;

use berth_api::StagingReservation;
use berth_core::change::Change;
use berth_core::ids::{PoolName, Uid};
use berth_core::units::Timestamp;
use berth_core::view::{ReservationState, ReservationView, View};
use kube::ResourceExt as _;
use kube::runtime::reflector::ObjectRef;

use super::{Controlled, reference};
use crate::observe::Touched;

impl Controlled for StagingReservation {
    const KIND: &'static str = "StagingReservation";
    const AT_ONCE: u16 = 256; // nearly all of them wait for the round that they are in

    fn asks(&self, view: &View) -> Option<(Uid, BTreeSet<PoolName>)> {
        let known = view.reservations.get(&Uid(self.uid().unwrap_or_default()))?;
        let waits = !known.deleting && !known.dry_run && known.assignment.is_none();
        let pools = view.pools_of(known);
        let asks = waits && known.state != ReservationState::Refused && !pools.is_empty();
        asks.then(|| (known.uid.clone(), pools))
    }

    fn decide(&self, view: &View, now: Timestamp) -> Vec<Change> {
        berth_core::reservation::decide(view, &Uid(self.uid().unwrap_or_default()), now)
    }

    fn affected(view: &View, touched: &Touched) -> Vec<ObjectRef<Self>> {
        let concerned: Vec<&ReservationView> = match touched {
            // One that went may have been ahead of others.
            Touched::Reservation(_, uid) if !view.reservations.contains_key(uid) => {
                view.open_to(None).filter(waits).chain(view.leaving()).collect()
            }
            Touched::Pool(pool) => {
                let leaving =
                    view.leaving().filter(|r| r.assignment.as_ref().is_none_or(|a| a.pool == *pool));
                view.open_to(Some(pool)).filter(waits).chain(leaving).collect()
            }
            Touched::Node(node) => {
                let pools = view.nodes.get(node).into_iter().flat_map(|node| node.pools.keys());
                let waiting = pools.flat_map(|pool| view.open_to(Some(pool))).filter(waits);
                let here = view.placed_on(node, None).filter(|r| !is_settled(r));
                waiting.chain(here).chain(never_placed(view)).collect()
            }
            Touched::Ledger(pool, node) => {
                let here = view.placed_on(node, Some(pool)).filter(|r| !is_settled(r));
                view.open_to(Some(pool)).filter(waits).chain(here).chain(never_placed(view)).collect()
            }
            Touched::Import(import) => {
                view.open_to(None).filter(waits).filter(|r| r.template.as_ref() == Some(import)).collect()
            }
            Touched::Image(image) => {
                let pool = view.images.get(image).map(|image| &image.pool);
                let waiting = view.open_to(pool).filter(waits).filter(|r| r.template.is_some());
                waiting.chain(view.assigned_image(image).filter(|r| r.deleting)).collect()
            }
            _ => Vec::new(),
        };
        let own = match touched {
            Touched::Reservation(name, _) => Some(reference(name)),
            _ => None,
        };
        concerned.into_iter().map(|r| reference(&r.name)).chain(own).collect()
    }
}

/// True if a placement is still to come. One that is only tried looks again by itself, every few seconds, so that a busy
/// pool does not make it write at every change.
#[allow(clippy::trivially_copy_pass_by_ref)] // as filters have it
const fn waits(reservation: &&ReservationView) -> bool {
    !reservation.dry_run
}

/// Those that are being deleted without ever having had a place: their entries are in any ledger.
fn never_placed(view: &View) -> impl Iterator<Item = &ReservationView> {
    view.leaving().filter(|reservation| reservation.assignment.is_none())
}

/// True if nothing but deletion can change it. One that ends when nothing uses it is never settled.
fn is_settled(reservation: &ReservationView) -> bool {
    let ended = match reservation.state {
        ReservationState::Ready => reservation.ttl_millis.is_none(),
        ReservationState::Refused => true,
        _ => false,
    };
    ended && !reservation.deleting
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_api::staging_node::{NodePool, StagingNodeSpec};
    use berth_api::{StagingNode, parse};
    use berth_core::ids::{NodeName, ObjectName};
    use berth_core::units::{Bytes, Generation};
    use berth_core::view::{Access, ObjectVersion, Placement, PoolChoice};

    fn reservation(name: &str, node: Option<&str>, state: ReservationState) -> ReservationView {
        ReservationView {
            uid: Uid::from(name),
            name: ObjectName::new("default", name),
            version: ObjectVersion::default(),
            created: Timestamp(0),
            deleting: false,
            has_finalizer: true,
            pools: PoolChoice::Named(PoolName::from("p")),
            node: None,
            zone: None,
            priority: 0,
            ttl_millis: None,
            renewed: None,
            last_used: None,
            expires: None,
            dry_run: false,
            max_size: Bytes::gib(1),
            template: None,
            claim_namespace: "default".to_owned(),
            claim_name: None,
            claim: None,
            access: Access::File,
            when_full: None,
            state,
            assignment: node.map(|node| Placement {
                pool: PoolName::from("p"),
                node: NodeName::from(node),
                generation: Generation::FIRST,
            }),
            assigned_image: None,
            prepared: None,
            queued_since: None,
            ready_since: None,
            only_copy: None,
            invalid: None,
        }
    }

    fn concerned(view: &View, touched: &Touched) -> Vec<String> {
        let found = StagingReservation::affected(view, touched).into_iter().map(|object| object.name);
        found.collect::<BTreeSet<_>>().into_iter().collect()
    }

    #[test]
    fn a_change_concerns_those_whose_fate_it_may_change() {
        let mut leaving = reservation("leaving", Some("n1"), ReservationState::Releasing);
        leaving.deleting = true;
        let all = [
            reservation("queued", None, ReservationState::Queued),
            reservation("refused", None, ReservationState::Refused),
            reservation("promised", Some("n1"), ReservationState::Promised),
            reservation("ready", Some("n1"), ReservationState::Ready),
            reservation("elsewhere", Some("n2"), ReservationState::Promised),
            leaving,
        ];
        let mut view = View::indexed();
        for reservation in all {
            view.enter_reservation(reservation);
        }
        let mut carrier = StagingNode::new("n1", StagingNodeSpec { node_name: "n1".to_owned() });
        carrier
            .status
            .get_or_insert_default()
            .pools
            .push(NodePool { name: "p".to_owned(), ..NodePool::default() });
        view.nodes.insert(NodeName::from("n1"), parse::node_state(&carrier));
        let n1 = NodeName::from("n1");
        assert_eq!(concerned(&view, &Touched::Node(n1.clone())), ["leaving", "promised", "queued"]);
        assert_eq!(
            concerned(&view, &Touched::Ledger(PoolName::from("p"), n1)),
            ["leaving", "promised", "queued"]
        );
        assert_eq!(concerned(&view, &Touched::Pool(PoolName::from("p"))), ["leaving", "queued"]);
        let known = Touched::Reservation(ObjectName::new("default", "ready"), Uid::from("ready"));
        assert_eq!(concerned(&view, &known), ["ready"]);
        let gone = Touched::Reservation(ObjectName::new("default", "gone"), Uid::from("gone"));
        assert_eq!(concerned(&view, &gone), ["gone", "leaving", "queued"], "those behind it move up");
    }
}
