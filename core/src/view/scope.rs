//! The part of a view that decides about some reservations.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{PoolName, Uid};

use super::{Index, NodeState, PoolChoice, ReservationView, View};

impl View {
    /// The pools that a reservation may go to, or has a promise in.
    pub fn pools_of(&self, reservation: &ReservationView) -> BTreeSet<PoolName> {
        let promised = self.ledgers_of(&reservation.uid).map(|ledger| ledger.pool.clone());
        let allowed: Vec<PoolName> = match &reservation.pools {
            PoolChoice::Named(pool) => vec![pool.clone()],
            PoolChoice::Labelled(_) => {
                let pools = self.pools.values().filter(|pool| reservation.pools.allows(pool));
                pools.map(|pool| pool.name.clone()).collect()
            }
        };
        promised.chain(allowed).collect()
    }

    /// True if this may go to other pools than these.
    fn goes_beyond(&self, pools: &BTreeSet<PoolName>, choice: &PoolChoice) -> bool {
        match choice {
            PoolChoice::Named(pool) => !pools.contains(pool),
            PoolChoice::Labelled(_) => {
                let mut others = self.pools.values().filter(|pool| !pools.contains(&pool.name));
                others.any(|pool| choice.allows(pool))
            }
        }
    }

    /// What decisions about reservations that have no place yet can look at, if they may go to these pools only: the pools,
    /// their nodes and ledgers, what is in them, and everything that waits for them, with its claims; and all that cannot be
    /// read. What may also go elsewhere is named in `elsewhere`. It has an index.
    #[must_use]
    pub fn part(&self, pools: &BTreeSet<PoolName>) -> Self {
        let mut part = Self {
            imports: self.imports.clone(),
            stores: self.stores.clone(),
            namespaces: self.namespaces.clone(),
            kube_nodes: self.kube_nodes.clone(),
            leader: self.leader,
            unheard: self.unheard,
            index: Some(Index::default()),
            unreadable: self.unreadable.clone(),
            ..Self::default()
        };
        let mut concerned: BTreeMap<&Uid, &ReservationView> = BTreeMap::new();
        for name in pools {
            part.pools
                .extend(self.pools.get_key_value(name).map(|(name, pool)| (name.clone(), pool.clone())));
            for waiting in self.open_to(Some(name)) {
                // What is promised something elsewhere does not wait here.
                let promised = self.ledgers_of(&waiting.uid).any(|ledger| !pools.contains(&ledger.pool));
                if !promised {
                    concerned.insert(&waiting.uid, waiting);
                }
                if promised || self.goes_beyond(pools, &waiting.pools) {
                    part.elsewhere.insert(waiting.uid.clone());
                }
            }
            for ledger in self.ledgers_in(name) {
                concerned
                    .extend(self.placed_on(&ledger.node, Some(name)).map(|placed| (&placed.uid, placed)));
                concerned
                    .extend(ledger.promises.keys().filter_map(|uid| self.reservations.get_key_value(uid)));
                part.enter_ledger(ledger.clone());
            }
        }
        part.claims = self.claims.as_ref().map(|claims| claims.of(concerned.values().copied()));
        for reservation in concerned.into_values() {
            part.enter_reservation(reservation.clone());
        }
        for (name, node) in &self.nodes {
            let carried: BTreeMap<_, _> =
                node.pools.iter().filter(|(pool, _)| pools.contains(*pool)).collect();
            if !carried.is_empty() || part.ledgers.values().any(|ledger| ledger.node == *name) {
                let carried = carried.into_iter().map(|(pool, report)| (pool.clone(), report.clone()));
                part.nodes.insert(name.clone(), NodeState { pools: carried.collect(), ..node.clone() });
            }
        }
        let images = self.images.iter().filter(|(_, image)| pools.contains(&image.pool));
        part.images = images.map(|(name, image)| (name.clone(), image.clone())).collect();
        part
    }
}
