//! What may still be promised to volumes on this node.

use berth_core::ids::PoolName;
use berth_core::ledger::Class;
use berth_core::node::behind;
use berth_core::node::view::{NodeView, PoolOnNode};
use berth_core::units::Bytes;

use super::Services;
use super::request::{ClassParameters, VOLUME_UNIT, is_here, uses};
use super::status::RpcError;
use crate::agent::observe::observe;
use crate::csi::v1::{GetCapacityRequest, GetCapacityResponse};

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
        let free =
            if here && possible { free(&observe(&self.node).await?, asked.as_ref()) } else { Vec::new() };
        Ok(GetCapacityResponse {
            available_capacity: free.iter().copied().sum::<Bytes>().as_i64(),
            maximum_volume_size: Some(free.into_iter().max().unwrap_or_default().as_i64()),
            minimum_volume_size: Some(VOLUME_UNIT.as_i64()),
        })
    }
}

/// What each pool has for volumes, or the one that is asked for.
fn free(view: &NodeView, asked: Option<&PoolName>) -> Vec<Bytes> {
    let pools = view.pools.iter().filter(|(name, _)| asked.is_none_or(|asked| asked == *name));
    pools.filter_map(|(_, pool)| free_in(pool)).collect()
}

/// Whole units of what neither the volumes' part of the ledger nor all of it has promised. Nothing is promised in a pool
/// that is not wanted or not open, nor by a ledger that is behind.
fn free_in(pool: &PoolOnNode) -> Option<Bytes> {
    pool.wanted.as_ref()?;
    let (ledger, area) = (pool.ledger.as_ref()?, pool.area.as_ref()?);
    if behind(ledger, area).is_some() {
        return None;
    }
    let sum = |of: fn(Class) -> bool| -> Bytes {
        ledger.promises.values().filter(|promise| of(promise.class)).map(|promise| promise.charge.data).sum()
    };
    let volumes = ledger.capacity.volumes.data.saturating_sub(sum(|class| class == Class::Volumes));
    let free = volumes.min(ledger.capacity.total.data.saturating_sub(sum(|_| true)));
    Some(Bytes(free.0 / VOLUME_UNIT.0 * VOLUME_UNIT.0))
}

#[cfg(test)]
mod tests {
    use berth_core::ids::{Lineage, NodeName, ObjectName, Uid};
    use berth_core::ledger::{Charge, Holder, Promise};
    use berth_core::node::view::AreaView;
    use berth_core::units::Generation;
    use berth_core::view::{LedgerCapacity, LedgerView, ObjectVersion};

    use super::*;

    fn pool(total: Bytes, promised: Bytes) -> PoolOnNode {
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
            capacity: LedgerCapacity { images: data(total), volumes: data(total), total: data(total) },
            promises: [(Uid::from("u"), promise)].into(),
        };
        PoolOnNode { wanted: Some(Uid::from("pool")), area: Some(AreaView::default()), ledger: Some(ledger) }
    }

    #[test]
    fn whole_units_that_are_promised_to_nobody_of_one_pool_or_of_all() {
        let half = Bytes(VOLUME_UNIT.0 / 2);
        let one = pool(Bytes::mib(100), Bytes::mib(40));
        let other = pool(Bytes::mib(30), half);
        let unwanted = PoolOnNode { wanted: None, ..pool(Bytes::mib(7), half) };
        let closed = PoolOnNode { area: None, ..pool(Bytes::mib(7), half) };
        let newer = AreaView { revision: 2, ..AreaView::default() };
        let behind = PoolOnNode { area: Some(newer), ..pool(Bytes::mib(7), half) };
        let names = ["one", "other", "unwanted", "closed", "behind"].map(PoolName::from);
        let pools = names.into_iter().zip([one, other, unwanted, closed, behind]).collect();
        let view = NodeView { pools, ..NodeView::default() };
        assert_eq!(free(&view, Some(&PoolName::from("one"))), [Bytes::mib(60)]);
        assert_eq!(free(&view, Some(&PoolName::from("behind"))), []);
        assert_eq!(free(&view, Some(&PoolName::from("none"))), []);
        assert_eq!(free(&view, None), [Bytes::mib(60), Bytes::mib(29)]);
    }
}
