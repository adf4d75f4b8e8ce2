//! Ledgers: those whose pool is gone end here; all else that happens to one is a pool's or a reservation's doing.

use berth_api::StagingLedger;
use berth_core::change::Change;
use berth_core::ids::{NodeName, ObjectName, PoolName};
use berth_core::units::Timestamp;
use berth_core::view::View;
use kube::runtime::reflector::ObjectRef;

use super::{Controlled, reference};
use crate::observe::Touched;

impl Controlled for StagingLedger {
    const KIND: &'static str = "StagingLedger";

    fn decide(&self, view: &View, _: Timestamp) -> Vec<Change> {
        let pool = PoolName(self.spec.pool_name.clone());
        berth_core::pool::decide_ledger(view, &pool, &NodeName(self.spec.scope.node_name.clone()))
    }

    fn affected(view: &View, touched: &Touched) -> Vec<ObjectRef<Self>> {
        // Those of one pool stand together.
        let mut last: Option<(&PoolName, bool)> = None;
        let ended = view.ledgers.values().filter(|ledger| match last {
            Some((pool, gone)) if *pool == ledger.pool => gone,
            _ => {
                let gone = !view.pools.contains_key(&ledger.pool);
                last = Some((&ledger.pool, gone));
                gone
            }
        });
        let concerned = ended.filter(|ledger| match touched {
            Touched::Pool(pool) => ledger.pool == *pool,
            Touched::Node(node) => ledger.node == *node,
            Touched::Ledger(pool, node) => ledger.pool == *pool && ledger.node == *node,
            Touched::Reservation(..) | Touched::Image(_) => true,
            _ => false,
        });
        concerned.map(|ledger| reference(&ObjectName::new("", &ledger.name))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_core::ids::{Lineage, Uid};
    use berth_core::view::{LedgerCapacity, LedgerView, ObjectVersion};

    #[test]
    fn only_what_happens_around_a_pool_that_is_gone_concerns_its_ledgers() {
        let ledger = |pool: &str| LedgerView {
            name: format!("ledger-{pool}"),
            version: ObjectVersion::default(),
            pool: PoolName::from(pool),
            node: NodeName::from("n"),
            lineage: Lineage::from("lineage"),
            revision: 1,
            rebuilt: None,
            capacity: LedgerCapacity::default(),
            promises: [].into(),
        };
        let mut view = View::default();
        for ledger in [ledger("p"), ledger("q")] {
            view.ledgers.insert((ledger.pool.clone(), ledger.node.clone()), ledger);
        }
        let concerned = |touched: &Touched| -> Vec<String> {
            StagingLedger::affected(&view, touched).into_iter().map(|object| object.name).collect()
        };
        assert_eq!(concerned(&Touched::Pool(PoolName::from("p"))), ["ledger-p"]);
        let gone = Touched::Reservation(ObjectName::new("ns", "r"), Uid::from("r"));
        assert_eq!(concerned(&gone), ["ledger-p", "ledger-q"]);
        assert_eq!(concerned(&Touched::Node(NodeName::from("other"))), [""; 0]);
    }
}
