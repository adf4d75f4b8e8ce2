//! Pools: their ledgers, and what they hold.

use std::time::Duration;

use berth_api::StagingPool;
use berth_core::change::Change;
use berth_core::ids::{ObjectName, PoolName};
use berth_core::ledger::Holder;
use berth_core::units::Timestamp;
use berth_core::view::{LedgerView, PoolChoice, ReservationView, View};
use kube::ResourceExt as _;
use kube::runtime::reflector::ObjectRef;

use super::{Controlled, reference};
use crate::context::Context;
use crate::observe::Touched;

impl Controlled for StagingPool {
    const KIND: &'static str = "StagingPool";

    fn pause(&self, context: &Context) -> Option<Duration> {
        context.wait_for_turn(&self.name_any())
    }

    fn decide(&self, view: &View, now: Timestamp) -> Vec<Change> {
        berth_core::pool::decide(view, &PoolName(self.name_any()), now)
    }

    fn affected(view: &View, touched: &Touched) -> Vec<ObjectRef<Self>> {
        let pools: Vec<&PoolName> = match touched {
            Touched::Pool(pool) | Touched::Ledger(pool, _) => vec![pool],
            Touched::Node(node) => {
                let carried = view.nodes.get(node).into_iter().flat_map(|node| node.pools.keys());
                let promised = view.ledgers.keys().filter(|(_, on)| on == node).map(|(pool, _)| pool);
                carried.chain(promised).collect()
            }
            Touched::Reservation(_, uid) => match view.reservations.get(uid) {
                Some(reservation) => pools_of(view, reservation),
                None => view.ledgers_of(uid).map(|ledger| &ledger.pool).collect(),
            },
            Touched::Image(image) => match view.images.get(image) {
                Some(image) => vec![&image.pool],
                None => promised(view, &Holder::Image(image.clone())),
            },
            _ => Vec::new(),
        };
        pools.into_iter().map(|pool| reference(&ObjectName::new("", pool.as_str()))).collect()
    }
}

/// The pools with a promise to this holder: it is gone, and its promise may have to be swept.
fn promised<'v>(view: &'v View, holder: &Holder) -> Vec<&'v PoolName> {
    let holds = |ledger: &&LedgerView| ledger.promises.values().any(|promise| promise.holder == *holder);
    let ledgers = view.ledgers.values().filter(holds);
    ledgers.map(|ledger| &ledger.pool).collect()
}

/// The pool that a reservation is in, or those that it may go to.
fn pools_of<'v>(view: &'v View, reservation: &'v ReservationView) -> Vec<&'v PoolName> {
    match (&reservation.assignment, &reservation.pools) {
        (Some(placement), _) => vec![&placement.pool],
        (None, PoolChoice::Named(pool)) => vec![pool],
        (None, PoolChoice::Labelled(_)) => view.pools.keys().collect(),
    }
}
