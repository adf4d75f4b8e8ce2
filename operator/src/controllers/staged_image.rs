//! Staged images: retired when nothing refers to them, deleted, released.

use berth_api::StagedImage;
use berth_core::change::Change;
use berth_core::ids::ObjectName;
use berth_core::retire::is_leaving;
use berth_core::units::Timestamp;
use berth_core::view::View;
use kube::ResourceExt as _;
use kube::runtime::reflector::ObjectRef;

use super::{Controlled, reference};
use crate::observe::Touched;

impl Controlled for StagedImage {
    const KIND: &'static str = "StagedImage";

    fn decide(&self, view: &View, now: Timestamp) -> Vec<Change> {
        berth_core::image::decide(view, &self.name_any(), now)
    }

    fn affected(view: &View, touched: &Touched) -> Vec<ObjectRef<Self>> {
        let own = match touched {
            Touched::Image(name) => Some(reference(&ObjectName::new("", name))),
            _ => None,
        };
        let releasing = view.images.values().filter(|image| match touched {
            Touched::Node(node) => image.deleting && image.node == *node,
            Touched::Ledger(pool, node) => {
                image.node == *node
                    && image.pool == *pool
                    && view.ledgers.get(&(pool.clone(), node.clone())).is_some_and(|l| is_leaving(l, image))
            }
            _ => false,
        });
        releasing.map(|image| reference(&ObjectName::new("", &image.name))).chain(own).collect()
    }
}
