//! What is promised and what fits, added up without the code under test.

use berth_core::ledger::{Class, Promise};
use berth_core::node::view::AreaView;
use berth_core::units::Bytes;
use berth_core::view::{Access, DurableImage, LedgerView, ReservationView, View};

use super::node::Disk;
use super::world::{NODE_BYTES, metadata_device};

/// Of the kernel pools of this world.
const BLOCK: u64 = 64 << 10;
const NODE_OF_A_TREE: u64 = 4 << 10;
/// Mappings in a leaf of a tree, or children of an inner node, that is half full.
const HALF_FULL: u64 = 126;
/// What a kernel pool keeps of its metadata for itself: the superblock, the trees of 4096 devices (66 leaves and 33, each with a
/// root), 7 bitmaps for 102,400 blocks with their index, and 256 blocks for the map of the metadata.
const KEPT: u64 = (1 + 67 + 34 + 7 + 1 + 256) * NODE_OF_A_TREE;

/// What may be promised of each metadata device.
const fn promisable(percent: u64) -> u64 {
    metadata_device(percent).0 / 100 * 70 - KEPT
}

/// Bytes of data and of metadata.
type Cost = (u64, u64);

/// What this much promised to volumes counts for.
pub const fn charged(promised: u64, percent: u64) -> u64 {
    (promised * 100).div_ceil(percent)
}

/// What maps so many bytes of a device: leaves of its tree, and what is above them, a root at least.
fn metadata(bytes: u64) -> u64 {
    let mut level = bytes.div_ceil(BLOCK).div_ceil(HALF_FULL).max(1);
    let mut nodes = level;
    loop {
        level = level.div_ceil(HALF_FULL);
        nodes += level;
        if level == 1 {
            return nodes * NODE_OF_A_TREE;
        }
    }
}

/// A device for so many bytes, where there are devices.
fn device(bytes: u64, thin: bool) -> Cost {
    if thin { (bytes.div_ceil(BLOCK) * BLOCK, metadata(bytes)) } else { (bytes, 0) }
}

/// An image: its bytes, and 1 MiB on a device of its own for what says which of them are there, which is enough for 100 GiB.
fn staged(bytes: u64, thin: bool) -> Cost {
    let (content, regions) = (device(bytes, thin), if thin { device(1 << 20, thin) } else { (0, 0) });
    (content.0 + regions.0, content.1 + regions.1)
}

/// Data and metadata of images, of volumes.
fn promised<'p>(promises: impl Iterator<Item = &'p Promise>) -> [Cost; 2] {
    promises.fold([(0, 0); 2], |mut sums, promise| {
        let sum = &mut sums[usize::from(promise.class == Class::Volumes)];
        (sum.0, sum.1) = (sum.0 + promise.charge.data.0, sum.1 + promise.charge.metadata.0);
        sums
    })
}

/// What is obeyed and not given back, of images and of volumes.
pub fn obeyed(area: &AreaView) -> [u64; 2] {
    area.promises.values().filter(|promise| !promise.released).fold([0, 0], |mut sums, promise| {
        sums[usize::from(promise.class == Class::Volumes)] += promise.data.0;
        sums
    })
}

/// No ledger promises more than its bounds, and no bound is more than there is.
pub fn promised_too_much(ledger: &LedgerView, thin: bool, percent: u64) -> Option<String> {
    let [images, volumes] = promised(ledger.promises.values());
    let counts = if thin { charged(volumes.0, percent) } else { volumes.0 };
    let (capacity, devices) = (&ledger.capacity, if thin { promisable(percent) } else { 0 });
    let bounds = [
        ("images", images, capacity.images, devices),
        ("volumes", (counts, volumes.1), capacity.volumes, devices),
        ("all", (images.0 + counts, images.1 + volumes.1), capacity.total, 2 * devices),
    ];
    let over = bounds.into_iter().find(|(_, sum, bound, devices)| {
        let bound = (bound.data.0, bound.metadata.0);
        sum.0 > bound.0 || bound.0 > NODE_BYTES || sum.1 > bound.1 || bound.1 > *devices
    });
    if let Some((what, sum, bound, devices)) = over {
        let there = (NODE_BYTES, devices);
        return Some(format!("{}: {what}: {sum:?} promised of {bound:?} of {there:?}", ledger.name));
    }
    let mut cheap = ledger.promises.iter().filter(|(_, promise)| {
        let (data, paid) = (promise.charge.data.0, promise.charge.metadata.0);
        let (whole, needed) = if data == 0 { (0, 0) } else { device(data, thin) };
        data != whole || paid < needed || data > NODE_BYTES
    });
    cheap.next().map(|(uid, promise)| format!("{}: {uid} is charged {:?}", ledger.name, promise.charge))
}

/// Every byte lies there under a promise that the node obeys, and those are no more than there is room for.
pub fn held_too_much(area: &AreaView, disk: &Disk, percent: u64) -> Option<String> {
    let counts =
        |volumes: u64| if disk.thin { charged(volumes, disk.overcommit.0.max(100)) } else { volumes };
    let [images, volumes] = obeyed(area);
    if images + counts(volumes) > NODE_BYTES {
        return Some(format!("{images} and {volumes} obeyed of {NODE_BYTES}"));
    }
    let kept = |uid: &_| area.promises.get(uid).filter(|promise| !promise.released);
    let recorded = promised(disk.promises.iter().filter(|(uid, _)| kept(uid).is_some()).map(|(_, p)| p));
    if disk.thin && recorded.iter().any(|(_, metadata)| *metadata > promisable(percent)) {
        return Some(format!("{recorded:?} obeyed of {} of metadata", promisable(percent)));
    }
    if disk.grown.iter().sum::<u64>() > NODE_BYTES {
        return Some(format!("kernel pools have grown to {:?} of {NODE_BYTES}", disk.grown));
    }
    let of_volume = |uid: &_| kept(uid).is_some_and(|promise| promise.class == Class::Volumes);
    let (written, rest): (Vec<_>, Vec<_>) = disk.bytes.iter().partition(|(uid, _)| of_volume(uid));
    let [written, rest] = [written, rest].map(|part| part.iter().map(|(_, bytes)| bytes.0).sum::<u64>());
    // Volumes that are promised more than is there write no more than their kernel pool has.
    let written = if disk.thin { written.min(disk.grown[1]) } else { written };
    if written + rest > NODE_BYTES || disk.thin && rest > disk.grown[0] {
        return Some(format!("{written} and {rest} lie there, of {NODE_BYTES}, grown to {:?}", disk.grown));
    }
    disk.bytes.iter().find_map(|(uid, bytes)| {
        let promised = kept(uid).map(|promise| promise.data);
        let what = || format!("{bytes} of {uid} lie there, {promised:?} are promised");
        promised.is_none_or(|promised| promised < *bytes).then(what)
    })
}

/// What is promised to each class can be had, beside what the other class's kernel pool has grown to or has yet to.
pub fn overgrown(disk: &Disk, ledger: &LedgerView, percent: u64) -> Option<String> {
    let [images, volumes] = promised(ledger.promises.values()).map(|(data, _)| data);
    let promised = [images, charged(volumes, percent)];
    let needed: u64 = (0..2).map(|class| disk.grown[class].max(promised[class])).sum();
    let what = || format!("grown to {:?}, {promised:?} promised, of {NODE_BYTES}", disk.grown);
    (disk.thin && disk.grown != [0, 0] && needed > NODE_BYTES).then(what)
}

/// A place where this request would fit, by plain arithmetic.
pub fn fitting(objects: &View, request: &ReservationView, percent: u64) -> Option<String> {
    let template = request.template.as_ref().map(|name| objects.imports.get(name));
    if template.is_some_and(|import| import.is_none_or(|import| import.deleting || import.durable.is_none()))
    {
        return None;
    }
    let image = template.flatten().and_then(|import| import.durable.clone());
    let virtual_size = image.as_ref().map_or(0, |image| image.virtual_size.0);
    let usable = objects.ledgers.values().filter(|ledger| {
        request.pools.allows(&objects.pools[&ledger.pool])
            && request.node.as_ref().is_none_or(|n| *n == ledger.node)
    });
    let mut fitting = usable.filter(|ledger| {
        let thin = objects.pools[&ledger.pool].block.is_some();
        let here = |image: &DurableImage| {
            let mut same = objects.images.values().filter(|other| other.digest == image.digest);
            same.any(|other| ledger.promises.contains_key(&other.uid))
        };
        let missing = image.as_ref().filter(|image| !here(image));
        let missing = missing.map_or((0, 0), |image| staged(image.real_size.0, thin));
        let own = match request.access {
            Access::Stream => (0, 0),
            // With the file system that its directory lies in.
            Access::File if thin => {
                device(request.max_size.0 + request.max_size.0 / 100 + 1 + (32 << 20), thin)
            }
            Access::File => device(request.max_size.0, thin),
            Access::Block => device(request.max_size.0.max(virtual_size), thin),
        };
        let mut all = promised(ledger.promises.values());
        let class = usize::from(request.access == Access::Block);
        for (class, cost) in [(class, own), (0, missing)] {
            all[class] = (all[class].0 + cost.0, all[class].1 + cost.1);
        }
        let [images, volumes] = all;
        let counts = if thin { charged(volumes.0, percent) } else { volumes.0 };
        let capacity = &ledger.capacity;
        let sums = [
            (images, capacity.images),
            ((counts, volumes.1), capacity.volumes),
            ((images.0 + counts, images.1 + volumes.1), capacity.total),
        ];
        let alone = class == 0 || Bytes(own.0) <= capacity.volumes.data;
        alone && sums.iter().all(|(sum, bound)| sum.0 <= bound.data.0 && sum.1 <= bound.metadata.0)
    });
    fitting.next().map(|ledger| ledger.name.clone())
}
