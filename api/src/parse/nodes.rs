//! `StagingNode` to its view.

use std::collections::BTreeMap;

use berth_core::ids::{Lineage, NodeName, PoolName, Uid};
use berth_core::ledger::Promise;
use berth_core::reason::Reason;
use berth_core::thin::{PoolMode, PoolState, ThinState, Usage};
use berth_core::units::{Bytes, Generation};
use berth_core::view::{NodePoolState, NodeState};

use super::{generation, promise, reason, version_of};
use crate::StagingNode;
use crate::staging_node::{NodePool, Obeyed, Released, ThinPool, ThinPoolMode, ThinPools};

/// What decisions look at. Whether the node is live, has reported or is silent, only the caller knows: all are
/// `false` here.
pub fn node_state(node: &StagingNode) -> NodeState {
    let pools = node.status.iter().flat_map(|status| &status.pools);
    NodeState {
        name: NodeName(node.spec.node_name.clone()),
        version: version_of(&node.metadata),
        live: false,
        reported: false,
        silent: false,
        zone: node.status.as_ref().and_then(|status| status.zone.clone()),
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
        thin: pool.thin.as_ref().map(thin_state),
        lineage: pool.lineage.clone().map(Lineage),
        obeyed_revision: u64::try_from(pool.obeyed_revision).unwrap_or_default(),
        released: by_uid(&pool.released),
        obeyed: pool
            .obeyed
            .iter()
            .map(|entry| (Uid(entry.uid.clone()), generation(entry.generation)))
            .collect(),
        recorded: pool.obeyed.iter().filter_map(recorded).collect(),
        in_use: pool.in_use.iter().cloned().map(Uid).collect(),
    }
}

fn recorded(entry: &Obeyed) -> Option<(Uid, Promise)> {
    Some((Uid(entry.uid.clone()), promise(entry.recorded.as_ref()?)))
}

fn thin_state(pools: &ThinPools) -> ThinState {
    ThinState { images: kernel_pool(&pools.images), volumes: kernel_pool(&pools.volumes) }
}

fn kernel_pool(pool: &ThinPool) -> PoolState {
    let usage = |used, total| Usage { used: Bytes::from_i64(used), total: Bytes::from_i64(total) };
    PoolState {
        mode: match pool.mode {
            ThinPoolMode::ReadWrite => PoolMode::ReadWrite,
            ThinPoolMode::OutOfDataSpace => PoolMode::OutOfDataSpace,
            ThinPoolMode::ReadOnly => PoolMode::ReadOnly,
            ThinPoolMode::Failed => PoolMode::Failed,
        },
        needs_check: pool.needs_check,
        data: usage(pool.data_used_bytes, pool.data_bytes),
        metadata: usage(pool.metadata_used_bytes, pool.metadata_bytes),
    }
}

/// What a node reports of its kernel pools.
pub fn to_thin_pools(state: &ThinState) -> ThinPools {
    ThinPools { images: to_thin_pool(&state.images), volumes: to_thin_pool(&state.volumes) }
}

fn to_thin_pool(state: &PoolState) -> ThinPool {
    ThinPool {
        mode: match state.mode {
            PoolMode::ReadWrite => ThinPoolMode::ReadWrite,
            PoolMode::OutOfDataSpace => ThinPoolMode::OutOfDataSpace,
            PoolMode::ReadOnly => ThinPoolMode::ReadOnly,
            PoolMode::Failed => ThinPoolMode::Failed,
        },
        needs_check: state.needs_check,
        data_bytes: state.data.total.as_i64(),
        data_used_bytes: state.data.used.as_i64(),
        metadata_bytes: state.metadata.total.as_i64(),
        metadata_used_bytes: state.metadata.used.as_i64(),
    }
}

fn by_uid(list: &[Released]) -> BTreeMap<Uid, Generation> {
    list.iter().map(|entry| (Uid(entry.uid.clone()), generation(entry.generation))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::staging_ledger::{Holder, HolderKind, LedgerPromise, PromiseClass};
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
            obeyed: vec![Obeyed { uid: "x".to_owned(), generation: 2, recorded: None }],
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
        assert!(fast.recorded.is_empty(), "told only while the ledger is behind");
        let promise = LedgerPromise {
            holder: Holder { kind: HolderKind::StagedImage, namespace: None, name: "i".to_owned() },
            class: PromiseClass::Images,
            data_bytes: 5,
            metadata_bytes: 6,
            generation: 2,
            revoked_revision: None,
        };
        let pools = &mut node.status.as_mut().expect("just set").pools;
        pools[0].obeyed[0].recorded = Some(promise.clone());
        let read = &node_state(&node).pools[&PoolName::from("fast")].recorded[&Uid::from("x")];
        assert_eq!(super::super::to_ledger_promise(read), promise);
    }

    #[test]
    fn kernel_pools_are_read_back_as_they_were_reported() {
        let pool = |mode, used| PoolState {
            mode,
            needs_check: used > 5,
            data: Usage { used: Bytes(used), total: Bytes(100) },
            metadata: Usage { used: Bytes(used + 1), total: Bytes(10) },
        };
        for (images, volumes) in
            [(PoolMode::ReadWrite, PoolMode::OutOfDataSpace), (PoolMode::ReadOnly, PoolMode::Failed)]
        {
            let state = ThinState { images: pool(images, 3), volumes: pool(volumes, 7) };
            let json = serde_json::to_value(to_thin_pools(&state)).expect("plain data");
            assert_eq!(json["volumes"]["dataUsedBytes"], 7);
            let read: ThinPools = serde_json::from_value(json).expect("what was written");
            assert_eq!(thin_state(&read), state);
        }
    }
}
