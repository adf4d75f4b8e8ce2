//! How each kind enters the view.

use berth_api::{
    ImageStore, ImageTransfer, StagedImage, StagingLedger, StagingNode, StagingPool, StagingReservation,
    TemplateImport, parse,
};
use berth_core::ids::{NodeName, PoolName, Uid};
use kube::{Resource as _, ResourceExt as _};

use super::kind::{Kind, Observed, name_of};
use super::{Observer, State, Touched, nodes};

impl Observed for StagingPool {
    fn objects(observer: &Observer) -> &Kind<Self> {
        &observer.pools
    }

    fn enter(&self, state: &mut State) -> bool {
        let pool = parse::pool_view(self);
        // What is said of it in its status is for people.
        let before = state.view.pools.insert(pool.name.clone(), pool);
        before.as_ref() != state.view.pools.get(&PoolName(self.name_any()))
    }

    fn leave(&self, state: &mut State) {
        state.view.pools.remove(&PoolName(self.name_any()));
    }

    fn touched(&self) -> Touched {
        Touched::Pool(PoolName(self.name_any()))
    }
}

impl Observed for StagingReservation {
    fn objects(observer: &Observer) -> &Kind<Self> {
        &observer.reservations
    }

    fn enter(&self, state: &mut State) -> bool {
        state.view.enter_reservation(parse::reservation_view(self));
        true
    }

    fn leave(&self, state: &mut State) {
        state.view.remove_reservation(&uid_of(self.uid()));
    }

    fn touched(&self) -> Touched {
        Touched::Reservation(name_of(self.meta()), uid_of(self.uid()))
    }
}

impl Observed for TemplateImport {
    fn objects(observer: &Observer) -> &Kind<Self> {
        &observer.imports
    }

    fn enter(&self, state: &mut State) -> bool {
        let import = parse::import_view(self);
        state.view.imports.insert(import.name.clone(), import);
        true
    }

    fn leave(&self, state: &mut State) {
        state.view.imports.remove(&name_of(self.meta()));
    }

    fn touched(&self) -> Touched {
        Touched::Import(name_of(self.meta()))
    }
}

impl Observed for StagedImage {
    fn objects(observer: &Observer) -> &Kind<Self> {
        &observer.images
    }

    fn enter(&self, state: &mut State) -> bool {
        match parse::image_view(self) {
            Ok(image) => {
                state.view.images.insert(image.name.clone(), image);
            }
            Err(error) => {
                tracing::error!(image = self.name_any(), %error, "staged image cannot be used; sweeps pause");
                state.view.images.remove(&self.name_any());
                state.hide(parse::unreadable(&Self::kind(&()), self.meta(), error.to_string()));
            }
        }
        true
    }

    fn leave(&self, state: &mut State) {
        state.view.images.remove(&self.name_any());
    }

    fn touched(&self) -> Touched {
        Touched::Image(self.name_any())
    }
}

impl Observed for ImageStore {
    fn objects(observer: &Observer) -> &Kind<Self> {
        &observer.stores
    }

    fn enter(&self, state: &mut State) -> bool {
        let store = parse::store_view(self);
        state.view.stores.insert(store.name.clone(), store);
        true
    }

    fn leave(&self, state: &mut State) {
        state.view.stores.remove(&name_of(self.meta()));
    }

    fn touched(&self) -> Touched {
        Touched::Store(name_of(self.meta()))
    }
}

impl Observed for StagingLedger {
    fn objects(observer: &Observer) -> &Kind<Self> {
        &observer.ledgers
    }

    fn enter(&self, state: &mut State) -> bool {
        state.view.enter_ledger(parse::ledger_view(self));
        true
    }

    fn leave(&self, state: &mut State) {
        state.view.remove_ledger(&place_of(self));
    }

    fn touched(&self) -> Touched {
        let (pool, node) = place_of(self);
        Touched::Ledger(pool, node)
    }
}

impl Observed for StagingNode {
    fn objects(observer: &Observer) -> &Kind<Self> {
        &observer.nodes
    }

    fn enter(&self, state: &mut State) -> bool {
        let node = parse::node_state(self);
        let name = node.name.clone();
        state.view.nodes.insert(name.clone(), node);
        nodes::judge(state, &name);
        true
    }

    fn leave(&self, state: &mut State) {
        state.view.nodes.remove(&NodeName(self.spec.node_name.clone()));
    }

    fn touched(&self) -> Touched {
        Touched::Node(NodeName(self.spec.node_name.clone()))
    }
}

impl Observed for ImageTransfer {
    fn objects(observer: &Observer) -> &Kind<Self> {
        &observer.transfers
    }

    fn enter(&self, state: &mut State) -> bool {
        let transfer = parse::transfer_view(self);
        state.view.transfers.insert(transfer.name.clone(), transfer);
        true
    }

    fn leave(&self, state: &mut State) {
        state.view.transfers.remove(&name_of(self.meta()));
    }

    fn touched(&self) -> Touched {
        Touched::Transfer(name_of(self.meta()))
    }
}

fn uid_of(uid: Option<String>) -> Uid {
    Uid(uid.unwrap_or_default())
}

fn place_of(ledger: &StagingLedger) -> (PoolName, NodeName) {
    (PoolName(ledger.spec.pool_name.clone()), NodeName(ledger.spec.scope.node_name.clone()))
}
