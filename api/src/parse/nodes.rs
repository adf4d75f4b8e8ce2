//! `StagingNode` to its view.

use std::collections::BTreeMap;

use berth_core::ids::{Lineage, NodeName, PoolName, Uid};
use berth_core::reason::Reason;
use berth_core::units::{Bytes, Generation};
use berth_core::view::{NodePoolState, NodeState};

use super::{generation, reason};
use crate::StagingNode;
use crate::staging_node::{NodePool, Released};

/// What decisions look at. Whether the node is live, and has reported, only the caller knows: both are `false` here.
pub fn node_state(node: &StagingNode) -> NodeState {
    let pools = node.status.iter().flat_map(|status| &status.pools);
    NodeState {
        name: NodeName(node.spec.node_name.clone()),
        live: false,
        reported: false,
        pools: pools.map(|pool| (PoolName(pool.name.clone()), pool_state(pool))).collect(),
    }
}

fn pool_state(pool: &NodePool) -> NodePoolState {
    NodePoolState {
        usable: pool.usable,
        reason: reason(&pool.reason, Reason::Pending),
        message: pool.message.clone(),
        total: Bytes::from_i64(pool.total_bytes),
        used: Bytes::from_i64(pool.used_bytes),
        advisory: pool.advisory,
        lineage: pool.lineage.clone().map(Lineage),
        obeyed_revision: u64::try_from(pool.obeyed_revision).unwrap_or_default(),
        released: by_uid(&pool.released),
        obeyed: by_uid(&pool.obeyed),
    }
}

fn by_uid(list: &[Released]) -> BTreeMap<Uid, Generation> {
    list.iter().map(|entry| (Uid(entry.uid.clone()), generation(entry.generation))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::staging_node::{StagingNodeSpec, StagingNodeStatus};

    #[test]
    fn a_report_is_read_and_an_unknown_reason_does_not_hide_it() {
        let mut node = StagingNode::new("a", StagingNodeSpec { node_name: "a".to_owned() });
        assert!(node_state(&node).pools.is_empty(), "nothing was reported yet");
        let pool = NodePool {
            name: "fast".to_owned(),
            usable: true,
            reason: "Ready".to_owned(),
            total_bytes: 100,
            used_bytes: -1,
            lineage: Some("l".to_owned()),
            obeyed_revision: 7,
            obeyed: vec![Released { uid: "x".to_owned(), generation: 2 }],
            released: vec![Released { uid: "y".to_owned(), generation: 1 }],
            ..NodePool::default()
        };
        let odd =
            NodePool { name: "odd".to_owned(), reason: "FromTheFuture".to_owned(), ..NodePool::default() };
        node.status = Some(StagingNodeStatus { pools: vec![pool, odd], ..StagingNodeStatus::default() });
        let state = node_state(&node);
        let fast = &state.pools[&PoolName::from("fast")];
        assert_eq!((fast.total, fast.used, fast.obeyed_revision), (Bytes(100), Bytes::ZERO, 7));
        assert_eq!(fast.obeyed, BTreeMap::from([(Uid::from("x"), Generation(2))]));
        assert_eq!(fast.released, BTreeMap::from([(Uid::from("y"), Generation(1))]));
        assert_eq!((fast.lineage.clone(), fast.reason), (Some(Lineage::from("l")), Reason::Ready));
        assert_eq!(state.pools[&PoolName::from("odd")].reason, Reason::Pending);
        assert!(!state.live && !state.reported);
    }
}
