//! Reservations: admitted, queued, refused, released.

use berth_api::StagingReservation;
use berth_core::change::Change;
use berth_core::ids::Uid;
use berth_core::units::Timestamp;
use berth_core::view::{ReservationState, ReservationView, View};
use kube::ResourceExt as _;
use kube::runtime::reflector::ObjectRef;

use super::{Controlled, reference};
use crate::observe::Touched;

impl Controlled for StagingReservation {
    const KIND: &'static str = "StagingReservation";

    fn decide(&self, view: &View, now: Timestamp) -> Vec<Change> {
        berth_core::reservation::decide(view, &Uid(self.uid().unwrap_or_default()), now)
    }

    fn affected(view: &View, touched: &Touched) -> Vec<ObjectRef<Self>> {
        let all = view.reservations.values();
        match touched {
            Touched::Reservation(name, uid) => {
                // One that went may have been ahead of others.
                let waiting = all.filter(|r| !view.reservations.contains_key(uid) && needs_a_look(r));
                waiting.map(|r| reference(&r.name)).chain([reference(name)]).collect()
            }
            Touched::Pool(_) => all.filter(|r| needs_a_look(r)).map(|r| reference(&r.name)).collect(),
            Touched::Node(node) => all
                .filter(|r| {
                    r.assignment
                        .as_ref()
                        .map_or_else(|| needs_a_look(r), |a| a.node == *node && !is_settled(r))
                })
                .map(|r| reference(&r.name))
                .collect(),
            Touched::Ledger(pool, node) => all
                .filter(|r| {
                    let here = |a: &berth_core::view::Placement| {
                        a.node == *node && a.pool == *pool && !is_settled(r)
                    };
                    r.assignment.as_ref().map_or_else(|| needs_a_look(r), here)
                })
                .map(|r| reference(&r.name))
                .collect(),
            Touched::Import(import) => all
                .filter(|r| needs_a_look(r) && r.template.as_ref() == Some(import))
                .map(|r| reference(&r.name))
                .collect(),
            Touched::Image(image) => all
                .filter(|r| needs_a_look(r) && r.template.is_some() || names(r, image) && r.deleting)
                .map(|r| reference(&r.name))
                .collect(),
            _ => Vec::new(),
        }
    }
}

/// True if a placement, or the end, is still to come. One that is only tried looks again by itself, every few seconds, so
/// that a busy pool does not make it write at every change.
fn needs_a_look(reservation: &ReservationView) -> bool {
    reservation.deleting
        || !reservation.dry_run
            && reservation.assignment.is_none()
            && reservation.state != ReservationState::Refused
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

fn names(reservation: &ReservationView, image: &str) -> bool {
    reservation.assigned_image.as_ref().is_some_and(|assigned| assigned.staged_image == image)
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_core::ids::{NodeName, ObjectName, PoolName};
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
            expires: None,
            dry_run: false,
            max_size: Bytes::gib(1),
            template: None,
            claim_namespace: "default".to_owned(),
            claim_name: None,
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
        StagingReservation::affected(view, touched).into_iter().map(|object| object.name).collect()
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
        let view =
            View { reservations: all.into_iter().map(|r| (r.uid.clone(), r)).collect(), ..View::default() };
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
        assert_eq!(concerned(&view, &gone), ["leaving", "queued", "gone"], "those behind it move up");
    }
}
