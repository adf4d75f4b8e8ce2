//! Image transfers: placed, given a reservation, ended.

use berth_api::ImageTransfer;
use berth_core::change::Change;
use berth_core::transfer::{self, TransferKind};
use berth_core::units::Timestamp;
use berth_core::view::View;
use kube::Resource as _;
use kube::runtime::reflector::ObjectRef;

use super::transfers::is_concerned;
use super::{Controlled, reference};
use crate::observe::{Touched, name_of};

impl Controlled for ImageTransfer {
    const KIND: &'static str = "ImageTransfer";

    fn decide(&self, view: &View, now: Timestamp) -> Vec<Change> {
        transfer::decide(view, TransferKind::Transfer, &name_of(self.meta()), now)
    }

    fn affected(view: &View, touched: &Touched) -> Vec<ObjectRef<Self>> {
        let own = match touched {
            Touched::Transfer(name) => Some(reference(name)),
            _ => None,
        };
        let concerned = view.transfers.values().filter(|transfer| is_concerned(transfer, touched));
        concerned.map(|transfer| reference(&transfer.name)).chain(own).collect()
    }
}
