//! Where the head of a source is read, before anything is promised.

use crate::budget::free;
use crate::change::Change;
use crate::ids::{NodeName, PoolName};
use crate::ledger::Class;
use crate::reason::Reason;
use crate::units::{Bytes, Generation};
use crate::view::{Placement, TransferView, View};

use super::decide::{assign, report};
use super::state::Event;

/// The head of the source is read by any live node; by another one if that is lost, which nothing depends on.
pub(super) fn probe(view: &View, transfer: &TransferView, place: Option<&Placement>) -> Vec<Change> {
    let best = most_free(view, transfer);
    let probes = |place: &Placement| {
        let message = format!("node {} reads the head of the source", place.node);
        vec![report(transfer, Event::Probe, Reason::Probing, message, false)]
    };
    match (place, best) {
        (Some(place), None) => probes(place),
        (Some(place), Some(_)) if !view.is_lost(&place.node) => probes(place),
        (_, Some((pool, node))) => {
            let generation = place.map_or(Generation::FIRST, |place| place.generation.next());
            vec![assign(transfer, Placement { pool, node, generation })]
        }
        (None, None) if !view.pools.values().any(|pool| transfer.pools.allows(pool)) => {
            let message = "no pool has these labels".to_owned();
            vec![report(transfer, Event::Wait, Reason::NoMatchingPool, message, false)]
        }
        (None, None) => {
            let message = "no live node carries a pool that may be used".to_owned();
            vec![report(transfer, Event::Wait, Reason::NoMatchingNode, message, false)]
        }
    }
}

/// The live node with most left in a usable pool that the transfer allows; ties go to the first by pool and node.
pub(super) fn most_free(view: &View, transfer: &TransferView) -> Option<(PoolName, NodeName)> {
    let mut best: Option<(Bytes, (PoolName, NodeName))> = None;
    let allowed = view
        .pools
        .values()
        .filter(|pool| !pool.deleting && pool.invalid.is_none() && transfer.pools.allows(pool));
    for pool in allowed {
        for (name, node) in view.nodes.iter().filter(|(_, node)| node.live) {
            if !node.pools.get(&pool.name).is_some_and(|report| report.usable) {
                continue;
            }
            let place = (pool.name.clone(), name.clone());
            let left = view.ledgers.get(&place).map_or(Bytes::ZERO, |ledger| free(ledger, Class::Images));
            if best.as_ref().is_none_or(|(most, _)| left > *most) {
                best = Some((left, place));
            }
        }
    }
    best.map(|(_, place)| place)
}
