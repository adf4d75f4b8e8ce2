//! What a change of something else is to a transfer, of either kind.

use berth_core::ids::is_transfer_reservation;
use berth_core::view::TransferView;

use crate::observe::Touched;

/// True if the transfer is to be looked at again because of this.
pub(super) fn is_concerned(transfer: &TransferView, touched: &Touched) -> bool {
    match touched {
        Touched::Reservation(name, _) => {
            let (kind, own) = (transfer.kind, &transfer.name);
            own.namespace == name.namespace
                && is_transfer_reservation(kind, &own.name, &transfer.uid, &name.name)
        }
        Touched::Node(_) | Touched::Pool(_) => transfer.deleting || !transfer.has_ended(),
        Touched::Store(store) => transfer.stores.contains(store) && !transfer.has_ended(),
        _ => false,
    }
}
