//! What is promised and what fits, added up without the code under test.

use berth_core::ledger::{Charge, Class};
use berth_core::thin::{BlockSize, directory_charge, image_charge, volume_charge};
use berth_core::units::Bytes;
use berth_core::view::{Access, DurableImage, LedgerView, ReservationView, View};

use super::node::Disk;
use super::world::NODE_BYTES;

/// What is promised to each class can be had, beside what the other class's kernel pool has grown to or has yet to.
pub fn overgrown(disk: &Disk, ledger: &LedgerView) -> Option<String> {
    let promised = [Class::Images, Class::Volumes].map(|class| -> u64 {
        let entries = ledger.promises.values().filter(|promise| promise.class == class);
        entries.map(|promise| promise.charge.data.0).sum()
    });
    let needed: u64 = (0..2).map(|class| disk.grown[class].max(promised[class])).sum();
    let what = || format!("grown to {:?}, {promised:?} promised, of {NODE_BYTES}", disk.grown);
    (disk.grown != [0, 0] && needed > NODE_BYTES).then(what)
}

/// A place where this request would fit, by plain arithmetic.
pub fn fitting(objects: &View, request: &ReservationView) -> Option<String> {
    let template = request.template.as_ref().map(|name| objects.imports.get(name));
    if template.is_some_and(|import| import.is_none_or(|import| import.deleting || import.durable.is_none()))
    {
        return None;
    }
    let image = template.flatten().and_then(|import| import.durable.clone());
    let virtual_size = image.as_ref().map_or(0, |image| image.virtual_size.0);
    let asked = request.max_size.max(Bytes(virtual_size));
    let own = |block: Option<BlockSize>| match (request.access, block) {
        (Access::Stream, _) => Charge::default(),
        (_, None) => Charge { data: asked, metadata: Bytes::ZERO },
        (Access::File, Some(block)) => directory_charge(asked, block),
        (Access::Block, Some(block)) => volume_charge(asked, block),
    };
    let usable = objects.ledgers.values().filter(|ledger| {
        request.pools.allows(&objects.pools[&ledger.pool])
            && request.node.as_ref().is_none_or(|n| *n == ledger.node)
    });
    let mut fitting = usable.filter(|ledger| {
        let block = objects.pools[&ledger.pool].block;
        let here = |image: &DurableImage| {
            let mut same = objects.images.values().filter(|other| other.digest == image.digest);
            same.any(|other| ledger.promises.contains_key(&other.uid))
        };
        let missing = image.as_ref().filter(|image| !here(image)).map(|image| match block {
            None => Charge { data: image.real_size, metadata: Bytes::ZERO },
            Some(block) => image_charge(image.real_size, image.virtual_size, block),
        });
        let class = if request.access == Access::Block { Class::Volumes } else { Class::Images };
        let new = [(class, own(block)), (Class::Images, missing.unwrap_or_default())];
        let held = ledger.promises.values().map(|promise| (promise.class, promise.charge));
        let all: Vec<(Class, Charge)> = held.chain(new).collect();
        let sum = |class: Option<Class>, of: fn(&Charge) -> Bytes| -> Bytes {
            let counted = all.iter().filter(|(other, _)| class.is_none_or(|class| class == *other));
            counted.map(|(_, charge)| of(charge)).sum()
        };
        let (capacity, images, volumes) = (&ledger.capacity, Some(Class::Images), Some(Class::Volumes));
        [(images, capacity.images), (volumes, capacity.volumes), (None, capacity.total)].into_iter().all(
            |(class, bound)| {
                sum(class, |charge| charge.data) <= bound.data
                    && sum(class, |charge| charge.metadata) <= bound.metadata
            },
        )
    });
    fitting.next().map(|ledger| ledger.name.clone())
}
