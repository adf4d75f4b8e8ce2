//! Volumes that were asked for and that nobody will ask for again: their claim is gone before a `PersistentVolume` was made, or
//! it has selected another node since.
//!
//! **Guarantees.** What a `PersistentVolume` names stays, also when that is deleted later: a person who keeps the bytes of a claim
//! (`Retain`) deletes the volume and makes another of the same handle. So does what something on a node uses or has used, what is
//! younger than the time of grace, and whatever cannot be told to belong to a claim. The API server itself is asked once more
//! before anything goes.

use crate::change::Change;
use crate::ids::{NodeName, ObjectName, Uid};
use crate::units::Timestamp;
use crate::view::{ReservationView, View};

/// The claim that a CSI volume was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Its name.
    pub name: ObjectName,
    /// Its UID.
    pub uid: Uid,
    /// What its volume, and the `PersistentVolume` of that, are called.
    pub volume: String,
    /// True once that was seen. From then on nothing but `DeleteVolume` ends the volume.
    pub persistent: bool,
}

/// The note that a `PersistentVolume` names the volume, or the deletion of a reservation whose claim will not ask for it again, once the API server has confirmed that.
pub(super) fn sweep(view: &View, reservation: &ReservationView, now: Timestamp) -> Option<Vec<Change>> {
    let (claim, claims) = (reservation.claim.as_ref()?, view.claims.as_ref()?);
    let node = reservation.node.as_ref()?;
    if !view.sweeps() || claim.persistent {
        return None;
    }
    if claims.named.contains(&reservation.uid) {
        let (name, uid) = (reservation.name.clone(), reservation.uid.clone());
        return Some(vec![Change::NotePersistent { name, uid, volume: claim.volume.clone() }]);
    }
    let old = now.millis_since(reservation.created) >= claims.grace_millis;
    if !old || reservation.last_used.is_some() || is_used(view, reservation) {
        return None;
    }
    let why = match claims.selected.get(&claim.uid) {
        None => format!("claim {} is gone, and no PersistentVolume was made of it", claim.name),
        Some(Some(other)) if other != node => format!("claim {} has selected node {other} since", claim.name),
        Some(_) => return None,
    };
    let confirm = Change::ConfirmAbandoned {
        reservation: reservation.uid.clone(),
        claim: claim.clone(),
        node: node.clone(),
    };
    let abandon = Change::AbandonReservation {
        name: reservation.name.clone(),
        uid: reservation.uid.clone(),
        message: format!("{why}; nobody will ask for this volume of node {node} again"),
    };
    Some(vec![confirm, abandon])
}

/// True if something uses it, or that cannot be told.
fn is_used(view: &View, reservation: &ReservationView) -> bool {
    let Some(place) = &reservation.assignment else { return false };
    view.told_of(place).is_none_or(|report| report.in_use.contains(&reservation.uid))
}

/// True if a claim that has this UID, if it is there, and this selected node will not ask for a volume on `node`.
pub fn is_abandoned(claim: &Claim, node: &NodeName, found: Option<(&Uid, Option<&NodeName>)>) -> bool {
    match found {
        Some((uid, selected)) if *uid == claim.uid => selected.is_some_and(|selected| selected != node),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{add, placed, reservation, view};
    use crate::reservation::decide;
    use crate::units::Bytes;
    use crate::view::{Access, Claims, ReservationState};

    const GRACE: u64 = 600_000;

    /// A volume on node `a`, made at 0, of a claim that selected this node.
    fn volume() -> View {
        let mut view = view(&[("a", 100), ("b", 100)]);
        let mut volume = reservation("r", 10, 0);
        volume.access = Access::Block;
        volume.node = Some(NodeName::from("a"));
        volume.state = ReservationState::Ready;
        volume.assignment = Some(placed("p", "a", 1));
        volume.prepared = Some(crate::units::Generation::FIRST);
        volume.claim = Some(Claim {
            name: ObjectName::new("shop", "db"),
            uid: Uid::from("claim"),
            volume: "pvc-claim".to_owned(),
            persistent: false,
        });
        add(&mut view, volume);
        view.claims = Some(Claims { grace_millis: GRACE, ..Claims::default() });
        select(&mut view, Some("a"));
        view
    }

    fn claims(view: &mut View) -> &mut Claims {
        view.claims.as_mut().expect("known")
    }

    fn select(view: &mut View, node: Option<&str>) {
        claims(view).selected.insert(Uid::from("claim"), node.map(NodeName::from));
    }

    fn volume_of(view: &mut View) -> &mut ReservationView {
        view.reservations.get_mut(&Uid::from("r")).expect("there")
    }

    #[test]
    fn that_a_volume_names_it_is_noted_once() {
        let mut view = volume();
        claims(&mut view).named.insert(Uid::from("r"));
        let changes = decide(&view, &Uid::from("r"), Timestamp(1));
        assert!(matches!(&changes[..], [Change::NotePersistent { volume, .. }] if volume == "pvc-claim"));
        volume_of(&mut view).claim.as_mut().expect("set").persistent = true;
        let changes = decide(&view, &Uid::from("r"), Timestamp(1));
        assert!(!changes.iter().any(|change| matches!(change, Change::NotePersistent { .. })));
    }

    fn abandoned(view: &View, now: u64) -> Option<String> {
        match &decide(view, &Uid::from("r"), Timestamp(now))[..] {
            [Change::ConfirmAbandoned { .. }, Change::AbandonReservation { message, .. }] => {
                Some(message.clone())
            }
            changes => {
                assert!(!changes.iter().any(|c| matches!(c, Change::AbandonReservation { .. })));
                None
            }
        }
    }

    #[test]
    fn a_claim_that_is_gone_or_elsewhere_asks_for_nothing_any_more() {
        let mut view = volume();
        assert_eq!(abandoned(&view, GRACE), None);
        select(&mut view, None);
        assert_eq!(abandoned(&view, GRACE), None, "nothing is selected at the moment");
        select(&mut view, Some("b"));
        assert_eq!(abandoned(&view, GRACE - 1), None, "there is a time of grace");
        let message =
            "claim shop/db has selected node b since; nobody will ask for this volume of node a again";
        assert_eq!(abandoned(&view, GRACE).as_deref(), Some(message));
        claims(&mut view).selected.clear();
        assert!(abandoned(&view, GRACE).expect("gone").starts_with("claim shop/db is gone"));
    }

    #[test]
    fn what_is_named_used_or_not_known_stays() {
        type Keep = fn(&mut View);
        let keeps: [(&str, Keep); 9] = [
            ("a volume names it", |view| {
                claims(view).named.insert(Uid::from("r"));
            }),
            ("a volume has named it", |view| {
                volume_of(view).claim.as_mut().expect("set").persistent = true;
            }),
            ("it was used", |view| volume_of(view).last_used = Some(Timestamp(1))),
            ("its pool is not open", |view| {
                let node = view.nodes.get_mut(&NodeName::from("a")).expect("there");
                node.pools.values_mut().for_each(|pool| pool.total = Bytes::ZERO);
            }),
            ("in use", |view| {
                let node = view.nodes.get_mut(&NodeName::from("a")).expect("there");
                node.pools.values_mut().for_each(|pool| {
                    pool.in_use.insert(Uid::from("r"));
                });
            }),
            ("its node is silent", |view| {
                view.nodes.get_mut(&NodeName::from("a")).expect("there").live = false;
            }),
            ("nobody knows the claims", |view| view.claims = None),
            ("another operator leads", |view| view.leader = false),
            ("it is of no claim", |view| {
                view.reservations.values_mut().for_each(|volume| volume.claim = None);
            }),
        ];
        for (why, keep) in keeps {
            let mut view = volume();
            claims(&mut view).selected.clear();
            assert!(abandoned(&view, GRACE).is_some());
            keep(&mut view);
            assert_eq!(abandoned(&view, GRACE), None, "{why}");
        }
    }

    #[test]
    fn the_api_servers_own_word_counts() {
        let view = volume();
        let claim = view.reservations[&Uid::from("r")].claim.clone().expect("set");
        let (a, b) = (NodeName::from("a"), NodeName::from("b"));
        let (same, later) = (Uid::from("claim"), Uid::from("later"));
        assert!(is_abandoned(&claim, &a, None) && is_abandoned(&claim, &a, Some((&later, Some(&a)))));
        assert!(is_abandoned(&claim, &a, Some((&same, Some(&b)))));
        assert!(
            !is_abandoned(&claim, &a, Some((&same, Some(&a))))
                && !is_abandoned(&claim, &a, Some((&same, None)))
        );
    }
}
