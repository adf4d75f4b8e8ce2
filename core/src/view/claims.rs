//! What Kubernetes has of claims and volumes, as far as it decides who will still ask for a volume.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{NodeName, Uid};

use super::ReservationView;

/// Claims and `PersistentVolumes`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claims {
    /// The claims that are there, by UID, with the node that the scheduler has selected for each.
    pub selected: BTreeMap<Uid, Option<NodeName>>,
    /// Reservations of the volumes that `PersistentVolumes` name.
    pub named: BTreeSet<Uid>,
    /// How old a reservation is at least before its claim is looked for, in milliseconds.
    pub grace_millis: u64,
}

impl Claims {
    /// What is known of these reservations' claims and volumes.
    pub(super) fn of<'v>(&self, reservations: impl Iterator<Item = &'v ReservationView>) -> Self {
        let mut part = Self { grace_millis: self.grace_millis, ..Self::default() };
        for reservation in reservations {
            part.named.extend(self.named.get(&reservation.uid).cloned());
            let claim = reservation.claim.as_ref();
            let selected = claim.and_then(|claim| self.selected.get_key_value(&claim.uid));
            part.selected.extend(selected.map(|(uid, node)| (uid.clone(), node.clone())));
        }
        part
    }
}
