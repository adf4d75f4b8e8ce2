//! The space that volumes may use, as the pool's record and its kernel pools have it.

use std::collections::BTreeMap;

use berth_core::ids::Uid;
use berth_core::ledger::{Charge, Class};
use berth_core::local::{self, Books, Held, Ruling};
use berth_core::thin::{BlockSize, capacity};
use berth_core::units::Generation;
use berth_core::view::LedgerCapacity;
use berth_record::{Holder, PromiseClass, PromiseEntry, ReadError};

use super::error::OperationError;
use crate::agent::pools::OpenPool;
use crate::area::Backend;

/// What is promised, by holder.
pub fn held(promises: impl IntoIterator<Item = (Uid, PromiseEntry)>) -> BTreeMap<Uid, Held> {
    let held = promises.into_iter().map(|(uid, promise)| {
        let class = match promise.class {
            PromiseClass::Images => Class::Images,
            PromiseClass::Volumes => Class::Volumes,
        };
        let charge = Charge { data: promise.data, metadata: promise.metadata };
        (uid, Held { class, charge, obeyed: promise.obeyed, released: promise.released })
    });
    held.collect()
}

/// What may be promised to a class of the pool beside that.
pub fn books<'a>(
    pool: &OpenPool,
    class: Class,
    promises: &'a BTreeMap<Uid, Held>,
) -> Result<Books<'a>, ReadError> {
    let position = pool.record.ledger_position()?;
    let has_ledger = position.lineage.is_some();
    let total = pool.area.total();
    let state = pool.area.kernel_pools();
    let capacity = match (&pool.spec.backend, &state) {
        (Backend::Thin(spec), Some(state)) => {
            capacity(total, BlockSize::new(spec.block).unwrap_or(BlockSize::DEFAULT), state)
        }
        _ => LedgerCapacity::shared(total),
    };
    let capacity = LedgerCapacity { overcommit: position.overcommit, ..capacity };
    let stopped = state.as_ref().and_then(|state| state.stopped(class));
    Ok(Books { has_ledger, capacity, stopped, promises })
}

/// The promise under which a volume may come to use `charge`: `None` if one of the ledger's, or an older one, covers it.
pub fn promise(books: &Books<'_>, uid: &Uid, charge: Charge) -> Result<Option<PromiseEntry>, OperationError> {
    match local::rule(books, uid, Class::Volumes, charge)? {
        Ruling::Covered => Ok(None),
        Ruling::Promise(Charge { data, metadata }) => Ok(Some(PromiseEntry {
            generation: Generation::FIRST,
            class: PromiseClass::Volumes,
            data,
            metadata,
            holder: Holder::local(uid),
            obeyed: true,
            released: false,
        })),
    }
}
