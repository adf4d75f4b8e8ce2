//! Image transfers: this version carries out none, and says so on each.

use berth_api::ImageTransfer;
use berth_core::change::Change;
use berth_core::units::Timestamp;
use berth_core::view::View;
use kube::runtime::reflector::ObjectRef;

use super::{Controlled, reference};
use crate::observe::Touched;

impl Controlled for ImageTransfer {
    const KIND: &'static str = "ImageTransfer";
    const CARRIED_OUT: bool = false;

    fn decide(&self, _: &View, _: Timestamp) -> Vec<Change> {
        Vec::new()
    }

    fn affected(_: &View, touched: &Touched) -> Vec<ObjectRef<Self>> {
        match touched {
            Touched::Transfer(name) => vec![reference(name)],
            _ => Vec::new(),
        }
    }
}
