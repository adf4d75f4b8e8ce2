//! What may still be promised to volumes on this node.

use std::sync::Arc;

use berth_api::parse;
use berth_core::budget::largest;
use berth_core::ids::PoolName;
use berth_core::ledger::{Charge, Class};
use berth_core::node::behind;
use berth_core::node::view::{NodeView, PoolOnNode};
use berth_core::thin::{BlockSize, ThinState, volume_charge};
use berth_core::units::Bytes;
use berth_core::view::{PoolView, Service};

use super::Services;
use super::request::{ClassParameters, VOLUME_UNIT, is_here, uses};
use super::status::RpcError;
use crate::agent::observe::{ObserveError, observe};
use crate::csi::v1::{GetCapacityRequest, GetCapacityResponse};
use crate::node::Node;

impl Services {
    /// Of the pool that the parameters name; without parameters, as the specification allows, of all pools here.
    pub(super) async fn capacity(
        &self,
        request: &GetCapacityRequest,
    ) -> Result<GetCapacityResponse, RpcError> {
        if !self.node.watches.synced() {
            return Err(RpcError::NotSynced);
        }
        let asked = if request.parameters.is_empty() {
            None
        } else {
            Some(ClassParameters::parse(&request.parameters)?.pool)
        };
        let here =
            request.accessible_topology.as_ref().is_none_or(|topology| is_here(topology, &self.node.name));
        let possible = request.volume_capabilities.is_empty() || uses(&request.volume_capabilities).is_ok();
        let free: Vec<Bytes> = if here && possible {
            let (node, view) = (Arc::clone(&self.node), observe(&self.node).await?);
            let pools = tokio::task::spawn_blocking(move || pools(&node, view, asked.as_ref())).await;
            pools.map_err(ObserveError::from)?.iter().filter_map(free_in).collect()
        } else {
            Vec::new()
        };
        Ok(GetCapacityResponse {
            available_capacity: free.iter().copied().sum::<Bytes>().as_i64(),
            maximum_volume_size: Some(free.into_iter().max().unwrap_or_default().as_i64()),
            minimum_volume_size: Some(VOLUME_UNIT.as_i64()),
        })
    }
}

/// What decides of one pool's capacity beside its ledger.
#[derive(Clone, Debug)]
struct Pool {
    on_node: PoolOnNode,
    /// Whether the pool takes anything new on this node.
    open: bool,
    /// Its kernel pools, if it has any.
    thin: Option<ThinState>,
    /// Their blocks.
    block: Option<BlockSize>,
}

/// The pools of this node that are asked about. Blocks: kernel pools are asked through a program.
fn pools(node: &Node, view: NodeView, asked: Option<&PoolName>) -> Vec<Pool> {
    let specs: Vec<PoolView> = node.watches.pools.state().iter().map(|pool| parse::pool_view(pool)).collect();
    let asked_for = view.pools.into_iter().filter(|(name, _)| asked.is_none_or(|asked| asked == name));
    let pools = asked_for.filter_map(|(name, on_node)| {
        let spec = specs.iter().find(|spec| spec.name == name)?;
        let takes = spec.service_on(&node.name) == Service::Open && !spec.deleting && spec.invalid.is_none();
        let thin = node.pools.get(&name).and_then(|pool| pool.area.kernel_pools());
        Some(Pool { on_node, open: takes, thin, block: spec.block })
    });
    pools.collect()
}

/// The largest volume that may still be promised, by the sums that promises are made by. None in a pool that is not open to
/// anything new, not wanted here, not served, or stopped, nor by a ledger that is behind.
fn free_in(pool: &Pool) -> Option<Bytes> {
    let on_node = &pool.on_node;
    on_node.wanted.as_ref()?;
    let (ledger, area) = (on_node.ledger.as_ref()?, on_node.area.as_ref()?);
    let stopped = pool.thin.as_ref().and_then(|state| state.stopped(Class::Volumes));
    if !pool.open || stopped.is_some() || behind(ledger, area).is_some() {
        return None;
    }
    let plain = |data| Charge { data, metadata: Bytes::ZERO };
    let charge = |size| pool.block.map_or_else(|| plain(size), |block| volume_charge(size, block));
    Some(largest(ledger, Class::Volumes, VOLUME_UNIT, charge))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic in a test is a failure with a place
mod tests {
    use berth_core::ids::{Lineage, NodeName, ObjectName, Uid};
    use berth_core::ledger::{Holder, Promise};
    use berth_core::node::view::AreaView;
    use berth_core::thin::{PoolMode, PoolState, Usage};
    use berth_core::units::Generation;
    use berth_core::view::{LedgerCapacity, LedgerView, ObjectVersion};

    use super::*;

    fn pool(total: Bytes, promised: Bytes) -> Pool {
        let data = |data| Charge { data, ..Charge::default() };
        let promise = Promise {
            holder: Holder::Reservation(ObjectName::new("ns", "r")),
            class: Class::Images,
            charge: data(promised),
            generation: Generation(1),
            revoked: None,
        };
        let ledger = LedgerView {
            name: "ledger".to_owned(),
            version: ObjectVersion("1".to_owned()),
            pool: PoolName::from("p"),
            node: NodeName::from("n1"),
            lineage: Lineage::from("l"),
            revision: 1,
            rebuilt: None,
            capacity: LedgerCapacity::shared(total),
            promises: [(Uid::from("u"), promise)].into(),
        };
        let on_node = PoolOnNode {
            wanted: Some(Uid::from("pool")),
            area: Some(AreaView::default()),
            ledger: Some(ledger),
        };
        Pool { on_node, open: true, thin: None, block: None }
    }

    #[test]
    fn whole_units_that_are_promised_to_nobody() {
        let half = Bytes(VOLUME_UNIT.0 / 2);
        assert_eq!(free_in(&pool(Bytes::mib(100), Bytes::mib(40))), Some(Bytes::mib(60)));
        assert_eq!(free_in(&pool(Bytes::mib(30), half)), Some(Bytes::mib(29)));
        let but = |change: fn(&mut Pool)| {
            let mut pool = pool(Bytes::mib(7), Bytes::ZERO);
            change(&mut pool);
            free_in(&pool)
        };
        assert_eq!(but(|pool| pool.on_node.wanted = None), None);
        assert_eq!(but(|pool| pool.on_node.area = None), None, "not served");
        let newer =
            |pool: &mut Pool| pool.on_node.area = Some(AreaView { revision: 2, ..AreaView::default() });
        assert_eq!(but(newer), None, "behind");
        assert_eq!(but(|pool| pool.open = false), None, "cordoned, drained, deleted or not valid");
    }

    #[test]
    fn nothing_where_metadata_has_run_out_or_the_kernel_pool_is_stopped() {
        let mut pool = pool(Bytes::gib(100), Bytes::ZERO);
        pool.block = Some(BlockSize::DEFAULT);
        assert_eq!(free_in(&pool), Some(Bytes::ZERO), "no metadata at all");
        let metadata = volume_charge(Bytes::gib(10), BlockSize::DEFAULT).metadata;
        let capacity = &mut pool.on_node.ledger.as_mut().unwrap().capacity;
        (capacity.volumes.metadata, capacity.total.metadata) = (metadata, metadata);
        let free = free_in(&pool).unwrap();
        assert!(free >= Bytes::gib(10) && free < Bytes::gib(11), "{free}");
        let usage = |used, total| Usage { used: Bytes(used), total: Bytes(total) };
        let state = |metadata| PoolState {
            mode: PoolMode::ReadWrite,
            needs_check: false,
            data: usage(0, 1000),
            metadata,
        };
        pool.thin = Some(ThinState { images: state(usage(999, 1000)), volumes: state(usage(10, 1000)) });
        assert!(free_in(&pool).is_some_and(|free| free > Bytes::ZERO), "the other one is stopped");
        pool.thin = Some(ThinState { images: state(usage(10, 1000)), volumes: state(usage(999, 1000)) });
        assert_eq!(free_in(&pool), None);
    }
}
