//! Image stores: given to a live node.

use berth_api::ImageStore;
use berth_core::change::Change;
use berth_core::ids::ObjectName;
use berth_core::units::Timestamp;
use berth_core::view::View;
use kube::ResourceExt as _;
use kube::runtime::reflector::ObjectRef;

use super::{Controlled, reference};
use crate::observe::Touched;

impl Controlled for ImageStore {
    const KIND: &'static str = "ImageStore";

    fn decide(&self, view: &View, now: Timestamp) -> Vec<Change> {
        let name = ObjectName::new(self.namespace().unwrap_or_default(), self.name_any());
        berth_core::store::decide(view, &name, now)
    }

    fn affected(view: &View, touched: &Touched) -> Vec<ObjectRef<Self>> {
        match touched {
            Touched::Store(name) => vec![reference(name)],
            Touched::Node(node) => {
                let theirs = view
                    .stores
                    .values()
                    .filter(|store| store.assignment.as_ref().is_none_or(|(n, _)| n == node));
                theirs.map(|store| reference(&store.name)).collect()
            }
            _ => Vec::new(),
        }
    }
}
