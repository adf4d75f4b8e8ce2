//! Whether a pool can be used, and what is said of it.

use super::{OTHER_AREA, carriers, ledgers, stopped};
use crate::drain;
use crate::ids::NodeName;
use crate::ledger::Behind;
use crate::overcommit::Percent;
use crate::reason::Reason;
use crate::view::{LedgerView, PoolView, Service, View};

/// How many of the nodes that are drained a message names.
const DRAINED_NAMED: usize = 8;

/// Whether it can be used, why, and a message.
pub(super) fn health(view: &View, pool: &PoolView) -> (bool, Reason, String) {
    if let Some(message) = &pool.invalid {
        return (false, Reason::InvalidSpec, message.clone());
    }
    if pool.deleting || pool.service == Service::Draining {
        let held = drain::held_by(view, pool, pool.deleting);
        let held = held.as_deref().unwrap_or("holds nothing");
        if pool.deleting {
            return (false, Reason::Releasing, format!("it is being deleted and takes nothing new; {held}"));
        }
        return (false, Reason::Draining, format!("takes nothing new; {held}"));
    }
    let mut nodes = 0_u32;
    for (name, report) in carriers(view, pool) {
        nodes += 1;
        if !report.usable {
            return (false, report.reason, format!("node {name}: {}", report.message));
        }
        if pool.capacity(report).is_none() {
            return (false, Reason::PoolAreaFailed, format!("node {name}: {OTHER_AREA}"));
        }
        if let Some(stopped) = report.thin.as_ref().and_then(|state| stopped(state).next()) {
            return (false, stopped.reason(), format!("node {name} {stopped}"));
        }
        let key = (pool.name.clone(), name.clone());
        if view.is_lost(name) {
            return (false, Reason::NodeLost, format!("node {name} no longer renews its Lease"));
        }
        match view.ledgers.get(&key).map(|ledger| view.behind(ledger)) {
            // A revision alone is most often a view that lags.
            Some(Some(behind)) if !matches!(behind, Behind::Revision { .. }) => {
                return (false, Reason::LedgerBehind, format!("node {name}: {behind}"));
            }
            Some(_) => {}
            None => return (false, Reason::Progressing, format!("the ledger of node {name} is being made")),
        }
    }
    let carried = match nodes {
        0 => return (false, Reason::NoMatchingNode, "no node carries the pool".to_owned()),
        1 => "1 node carries the pool".to_owned(),
        more => format!("{more} nodes carry the pool"),
    };
    let carried =
        [Some(carried), overcommitted(view, pool)].into_iter().flatten().collect::<Vec<_>>().join("; ");
    if pool.drain_nodes.is_empty() {
        return (true, Reason::Ready, carried);
    }
    let nodes: Vec<&str> = pool.drain_nodes.iter().take(DRAINED_NAMED).map(NodeName::as_str).collect();
    let held = drain::held_by(view, pool, false);
    let held = held.as_deref().unwrap_or("holds nothing");
    (true, Reason::Ready, format!("{carried}; draining {}: {held}", nodes.join(", ")))
}

/// What is said where volumes are promised more than is there: by the policy, or still although that has changed.
pub(super) fn overcommitted(view: &View, pool: &PoolView) -> Option<String> {
    let most = ledgers(view, pool).max_by_key(|ledger| ledger.capacity.overcommit.percent);
    let (policy, most) =
        (pool.overcommit, most.filter(|ledger| ledger.capacity.overcommit.percent > pool.overcommit));
    if let Some(LedgerView { node, capacity, .. }) = most {
        let percent = capacity.overcommit.percent;
        return Some(format!(
            "promise 1 is not made for volumes: overcommitted to {percent} on node {node}, where nothing more is promised until \
             what is fits at {policy}"
        ));
    }
    let over = policy > Percent::WHOLE;
    over.then(|| format!("promise 1 is not made for volumes: overcommitted to {policy}"))
}
