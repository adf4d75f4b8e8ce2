//! Template imports: placed, given a reservation, ended.

use berth_api::TemplateImport;
use berth_core::change::Change;
use berth_core::ids::{ObjectName, import_reservation_name};
use berth_core::units::Timestamp;
use berth_core::view::{ImportView, TransferState, View};
use kube::ResourceExt as _;
use kube::runtime::reflector::ObjectRef;

use super::{Controlled, reference};
use crate::observe::Touched;

impl Controlled for TemplateImport {
    const KIND: &'static str = "TemplateImport";

    fn decide(&self, view: &View, now: Timestamp) -> Vec<Change> {
        let name = ObjectName::new(self.namespace().unwrap_or_default(), self.name_any());
        berth_core::transfer::decide(view, &name, now)
    }

    fn affected(view: &View, touched: &Touched) -> Vec<ObjectRef<Self>> {
        let concerned = |import: &&ImportView| match touched {
            Touched::Reservation(name, _) => {
                import.name.namespace == name.namespace
                    && import_reservation_name(&import.name.name, &import.uid) == name.name
            }
            Touched::Node(_) | Touched::Pool(_) => import.deleting || !is_ended(import),
            Touched::Store(store) => import.store == *store && !is_ended(import),
            _ => false,
        };
        let own = match touched {
            Touched::Import(name) => Some(reference(name)),
            _ => None,
        };
        view.imports.values().filter(concerned).map(|import| reference(&import.name)).chain(own).collect()
    }
}

fn is_ended(import: &ImportView) -> bool {
    matches!(import.state, TransferState::Done | TransferState::Failed)
}
