//! Template imports: placed, given a reservation, ended.

use berth_api::TemplateImport;
use berth_core::change::Change;
use berth_core::transfer::{self, TransferKind};
use berth_core::units::Timestamp;
use berth_core::view::View;
use kube::Resource as _;
use kube::runtime::reflector::ObjectRef;

use super::transfers::is_concerned;
use super::{Controlled, reference};
use crate::observe::{Touched, name_of};

impl Controlled for TemplateImport {
    const KIND: &'static str = "TemplateImport";

    fn decide(&self, view: &View, now: Timestamp) -> Vec<Change> {
        transfer::decide(view, TransferKind::Import, &name_of(self.meta()), now)
    }

    fn affected(view: &View, touched: &Touched) -> Vec<ObjectRef<Self>> {
        let own = match touched {
            Touched::Import(name) => Some(reference(name)),
            _ => None,
        };
        let concerned = view.imports.values().filter(|import| is_concerned(import, touched));
        concerned.map(|import| reference(&import.name)).chain(own).collect()
    }
}
