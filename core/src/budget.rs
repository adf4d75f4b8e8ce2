//! What a ledger may still promise: the one place where promises are added up.
//!
//! Sums are made in 128 bits: 4,096 promises of 64 bits each cannot overflow them, so nothing here can wrap or saturate
//! into a yes.
//!
//! A bound on data is one of bytes that are there. Where volumes are overcommitted, the sum of what they are promised counts for
//! less against it ([`Overcommit`]); metadata counts in full.

use std::fmt;

use crate::ids::Uid;
use crate::ledger::{Charge, Class, MAX_PROMISES, Promise};
use crate::overcommit::{Overcommit, Percent};
use crate::units::Bytes;
use crate::view::{LedgerCapacity, LedgerView};

/// What runs out first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bound {
    /// Bytes of data.
    Data(Area),
    /// Bytes of metadata.
    Metadata(Area),
    /// What volumes can attain: where they are overcommitted, none may be larger alone. Nobody could ever write such a one
    /// whole, whatever others give back.
    OneVolume,
    /// The number of promises, [`MAX_PROMISES`].
    Promises,
}

/// What a bound is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Area {
    /// Staged images and work space.
    Images,
    /// Volumes and snapshots.
    Volumes,
    /// Both together.
    Total,
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Data(Area::Images) => "for images",
            Self::Data(Area::Volumes) => "for volumes",
            Self::Data(Area::Total) => "in all",
            Self::Metadata(Area::Images) => "of metadata for images",
            Self::Metadata(Area::Volumes) => "of metadata for volumes",
            Self::Metadata(Area::Total) => "of metadata in all",
            Self::OneVolume => "for one volume",
            Self::Promises => "of room for one more promise",
        })
    }
}

/// How much is missing, in bytes that are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortfall {
    /// This many bytes; zero where the number of promises is what is bounded.
    pub bytes: Bytes,
    /// Of this.
    pub bound: Bound,
}

impl fmt::Display for Shortfall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bound {
            Bound::Promises => write!(f, "holds as many promises as a ledger may ({MAX_PROMISES})"),
            bound => write!(f, "lacks {} {bound}", self.bytes),
        }
    }
}

/// Sums of promises, per class; the total is the sum of both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    images: (u128, u128),
    volumes: (u128, u128),
}

impl Sums {
    /// Adds up.
    pub fn of<'p>(promises: impl IntoIterator<Item = &'p Promise>) -> Self {
        Self::of_charges(promises.into_iter().map(|promise| (promise.class, promise.charge)))
    }

    /// Adds up what promises cost.
    pub fn of_charges(charges: impl IntoIterator<Item = (Class, Charge)>) -> Self {
        charges.into_iter().fold(Self::default(), |sums, (class, charge)| sums.with(class, charge))
    }

    /// These, and one more.
    fn with(mut self, class: Class, charge: Charge) -> Self {
        let sum = match class {
            Class::Images => &mut self.images,
            Class::Volumes => &mut self.volumes,
        };
        sum.0 += u128::from(charge.data.0);
        sum.1 += u128::from(charge.metadata.0);
        self
    }

    /// What data counts for in an area, and metadata.
    fn area(&self, area: Area, percent: Percent) -> (u128, u128) {
        let volumes = (percent.charged(self.volumes.0), self.volumes.1);
        match area {
            Area::Images => self.images,
            Area::Volumes => volumes,
            Area::Total => (self.images.0 + volumes.0, self.images.1 + volumes.1),
        }
    }

    /// What data counts for in an area where volumes are overcommitted so far; clamped to 64 bits.
    pub fn data(&self, area: Area, percent: Percent) -> Bytes {
        clamp(self.area(area, percent).0)
    }

    /// Bytes of data that are promised to volumes, in full.
    pub const fn promised_to_volumes(&self) -> u128 {
        self.volumes.0
    }

    /// The worst excess over `capacity`, if there is any.
    pub fn excess(&self, capacity: &LedgerCapacity) -> Option<Shortfall> {
        let mut worst: Option<Shortfall> = None;
        for area in [Area::Images, Area::Volumes, Area::Total] {
            let (data, metadata) = self.area(area, capacity.overcommit.percent);
            let bound = capacity.area(area);
            for (sum, bound, kind) in
                [(data, bound.data, Bound::Data(area)), (metadata, bound.metadata, Bound::Metadata(area))]
            {
                let bytes = clamp(sum.saturating_sub(u128::from(bound.0)));
                if bytes > worst.map_or(Bytes::ZERO, |shortfall| shortfall.bytes) {
                    worst = Some(Shortfall { bytes, bound: kind });
                }
            }
        }
        worst
    }
}

impl LedgerCapacity {
    /// The same bound for images, volumes and both together, without metadata of its own: the filesystem backend.
    pub const fn shared(data: Bytes) -> Self {
        let charge = Charge { data, metadata: Bytes::ZERO };
        Self { images: charge, volumes: charge, total: charge, overcommit: Overcommit::NONE }
    }

    /// This, with at most `limit` of data in each class and in all.
    #[must_use]
    pub fn at_most(&self, limit: Bytes) -> Self {
        let bounded = |area: Charge| Charge { data: area.data.min(limit), metadata: area.metadata };
        let (images, volumes) = (bounded(self.images), bounded(self.volumes));
        Self { images, volumes, total: bounded(self.total), overcommit: self.overcommit }
    }

    /// The lower of both bounds, for each area, overcommitted as `other`.
    #[must_use]
    pub fn lowered_to(&self, other: &Self) -> Self {
        let lower = |area| {
            let (one, two) = (self.area(area), other.area(area));
            Charge { data: one.data.min(two.data), metadata: one.metadata.min(two.metadata) }
        };
        let (images, volumes) = (lower(Area::Images), lower(Area::Volumes));
        Self { images, volumes, total: lower(Area::Total), overcommit: other.overcommit }
    }

    /// What an area may hold.
    pub const fn area(&self, area: Area) -> Charge {
        match area {
            Area::Images => self.images,
            Area::Volumes => self.volumes,
            Area::Total => self.total,
        }
    }

    /// This, but nowhere below these sums.
    pub(crate) fn raised_to(&self, sums: &Sums) -> Self {
        let cover = |area| {
            let ((data, metadata), bound) = (sums.area(area, self.overcommit.percent), self.area(area));
            Charge { data: bound.data.max(clamp(data)), metadata: bound.metadata.max(clamp(metadata)) }
        };
        let (images, volumes) = (cover(Area::Images), cover(Area::Volumes));
        Self { images, volumes, total: cover(Area::Total), overcommit: self.overcommit }
    }

    /// By how much a volume of this size is larger than all that volumes can attain, if it is.
    fn too_large(&self, class: Class, data: Bytes) -> Option<Shortfall> {
        let bytes = data.saturating_sub(self.volumes.data);
        let too_large = class == Class::Volumes && bytes > Bytes::ZERO;
        too_large.then_some(Shortfall { bytes, bound: Bound::OneVolume })
    }
}

/// Whether `new` can be promised beside everything that the ledger holds; an entry of a holder that is there already
/// replaces it.
///
/// # Errors
/// The worst [`Shortfall`].
pub fn fits(ledger: &LedgerView, new: &[(Uid, Promise)]) -> Result<(), Shortfall> {
    let kept = ledger.promises.iter().filter(|(uid, _)| new.iter().all(|(other, _)| other != *uid));
    let added = new.iter().map(|(_, promise)| promise);
    let (mut count, mut all) = (new.len(), Vec::with_capacity(ledger.promises.len() + new.len()));
    for (_, promise) in kept {
        count += 1;
        all.push(promise);
    }
    all.extend(added);
    // One that is there and does not grow was promised when volumes could attain more.
    let larger = |uid: &Uid, data: Bytes| ledger.promises.get(uid).is_none_or(|held| held.charge.data < data);
    let alone = new.iter().filter(|(uid, promise)| larger(uid, promise.charge.data));
    if let Some(shortfall) = shortfall(&ledger.capacity, &Sums::of(all), alone) {
        return Err(shortfall);
    }
    if count > MAX_PROMISES {
        return Err(Shortfall { bytes: Bytes::ZERO, bound: Bound::Promises });
    }
    Ok(())
}

/// Whether `new` could be promised if the ledger were empty.
///
/// # Errors
/// The worst [`Shortfall`].
pub fn fits_empty(capacity: &LedgerCapacity, new: &[(Uid, Promise)]) -> Result<(), Shortfall> {
    let sums = Sums::of(new.iter().map(|(_, promise)| promise));
    shortfall(capacity, &sums, new.iter()).map_or(Ok(()), Err)
}

/// The worst excess of all promises together, or else of one of the new ones alone.
fn shortfall<'p>(
    capacity: &LedgerCapacity,
    all: &Sums,
    mut new: impl Iterator<Item = &'p (Uid, Promise)>,
) -> Option<Shortfall> {
    let alone = || new.find_map(|(_, promise)| capacity.too_large(promise.class, promise.charge.data));
    all.excess(capacity).or_else(alone)
}

/// Bytes of data that can still be promised to a class, in all.
pub fn free(ledger: &LedgerView, class: Class) -> Bytes {
    let (sums, capacity) = (Sums::of(ledger.promises.values()), &ledger.capacity);
    let percent = capacity.overcommit.percent;
    let left = capacity.total.data.saturating_sub(sums.data(Area::Images, percent));
    match class {
        Class::Images => {
            let own = capacity.images.data.saturating_sub(sums.data(Area::Images, percent));
            own.min(capacity.total.data.saturating_sub(sums.data(Area::Total, percent)))
        }
        Class::Volumes => {
            let most = percent.promisable(capacity.volumes.data.min(left));
            clamp(most.saturating_sub(sums.promised_to_volumes()))
        }
    }
}

/// The most whole units of `unit` that one more promise of a class may have, where so many bytes are charged as `charge`
/// says: data, metadata and the number of promises have to do. Zero if nothing more can be promised.
pub fn largest(ledger: &LedgerView, class: Class, unit: Bytes, charge: impl Fn(Bytes) -> Charge) -> Bytes {
    if ledger.promises.len() >= MAX_PROMISES {
        return Bytes::ZERO;
    }
    let sums = Sums::of(ledger.promises.values());
    let fits = |units: u64| {
        let charged = charge(Bytes(units.saturating_mul(unit.0)));
        let alone = || ledger.capacity.too_large(class, charged.data);
        sums.with(class, charged).excess(&ledger.capacity).or_else(alone).is_none()
    };
    // More bytes never cost less: what fits lies below what does not.
    let (mut fitting, mut too_many) = (0, free(ledger, class).0 / unit.0.max(1) + 1);
    while too_many - fitting > 1 {
        let middle = fitting + (too_many - fitting) / 2;
        if fits(middle) { fitting = middle } else { too_many = middle }
    }
    Bytes(fitting.saturating_mul(unit.0))
}

fn clamp(sum: u128) -> Bytes {
    Bytes(u64::try_from(sum).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{ledger, promise};
    use proptest::prelude::*;

    const G: u64 = 1 << 30;

    fn new(class: Class, data: u64) -> [(Uid, Promise); 1] {
        [(Uid::from("new"), promise("new", class, data))]
    }

    #[test]
    fn each_class_and_the_total_are_bounds_of_their_own() {
        let mut ledger = ledger("p", "n", 10 * G);
        ledger.capacity.images.data = Bytes(4 * G);
        ledger.promises.insert(Uid::from("v"), promise("v", Class::Volumes, 7 * G));
        assert_eq!(fits(&ledger, &new(Class::Images, 3 * G)), Ok(()));
        let total = fits(&ledger, &new(Class::Images, 4 * G)).expect_err("11 of 10 GiB");
        assert_eq!(total, Shortfall { bytes: Bytes(G), bound: Bound::Data(Area::Total) });
        ledger.promises.clear();
        let images = fits(&ledger, &new(Class::Images, 5 * G)).expect_err("5 of 4 GiB");
        assert_eq!(images, Shortfall { bytes: Bytes(G), bound: Bound::Data(Area::Images) });
        assert_eq!(images.to_string(), "lacks 1 GiB for images");
        assert_eq!(free(&ledger, Class::Images), Bytes(4 * G));
    }

    #[test]
    fn the_largest_promise_is_one_that_fits_and_one_unit_more_does_not() {
        let mut ledger = ledger("p", "n", 10 * G);
        ledger.promises.insert(Uid::from("v"), promise("v", Class::Volumes, 3 * G + 1));
        let plain = |data| Charge { data, metadata: Bytes::ZERO };
        assert_eq!(largest(&ledger, Class::Volumes, Bytes(G), plain), Bytes(6 * G));
        // A thousandth of metadata, of which there is enough for 4 GiB.
        ledger.capacity.total.metadata = Bytes(4 * G / 1000);
        ledger.capacity.volumes.metadata = Bytes(G);
        let mapped = |data: Bytes| Charge { data, metadata: Bytes(data.0 / 1000) };
        assert_eq!(largest(&ledger, Class::Volumes, Bytes(G), mapped), Bytes(4 * G));
        ledger.capacity.total.metadata = Bytes(10);
        assert_eq!(largest(&ledger, Class::Volumes, Bytes(G), mapped), Bytes::ZERO);
        for n in 0..MAX_PROMISES {
            ledger.promises.insert(Uid::from(format!("{n}")), promise("s", Class::Images, 0));
        }
        assert_eq!(largest(&ledger, Class::Volumes, Bytes(G), plain), Bytes::ZERO);
    }

    #[test]
    fn metadata_is_bounded_like_data() {
        let mut ledger = ledger("p", "n", 10 * G);
        ledger.capacity.total.metadata = Bytes(5);
        ledger.capacity.volumes.metadata = Bytes(4);
        let mut new = new(Class::Volumes, 0);
        new[0].1.charge.metadata = Bytes(6);
        let shortfall = fits(&ledger, &new).expect_err("6 of 4");
        assert_eq!(shortfall, Shortfall { bytes: Bytes(2), bound: Bound::Metadata(Area::Volumes) });
    }

    #[test]
    fn sums_beyond_64_bits_do_not_wrap_into_a_yes() {
        let mut ledger = ledger("p", "n", u64::MAX);
        ledger.promises.insert(Uid::from("a"), promise("a", Class::Images, u64::MAX));
        let shortfall = fits(&ledger, &new(Class::Images, u64::MAX)).expect_err("twice everything");
        assert_eq!(shortfall.bytes, Bytes(u64::MAX));
    }

    #[test]
    fn the_number_of_promises_is_bounded() {
        let mut ledger = ledger("p", "n", G);
        for index in 0..MAX_PROMISES {
            let uid = format!("u{index}");
            ledger.promises.insert(Uid(uid.clone()), promise(&uid, Class::Images, 0));
        }
        assert_eq!(fits(&ledger, &new(Class::Images, 0)).expect_err("one too many").bound, Bound::Promises);
        let (uid, promise) =
            ledger.promises.iter().next().map(|(u, p)| (u.clone(), p.clone())).expect("4096");
        assert_eq!(fits(&ledger, &[(uid, promise)]), Ok(()), "a replacement is not one more");
    }

    #[test]
    fn a_capacity_never_shrinks_below_its_promises() {
        let promises = [promise("a", Class::Images, 3 * G), promise("b", Class::Volumes, 4 * G)];
        let covered = LedgerCapacity::shared(Bytes(5 * G)).covering(Overcommit::NONE, &promises);
        assert_eq!(covered.total.data, Bytes(7 * G));
        assert_eq!(covered.volumes.data, Bytes(5 * G));
    }

    proptest! {
        #[test]
        fn fits_says_yes_exactly_when_naive_sums_are_within_bounds(
            capacity in (0..100_u64, 0..100_u64, 0..150_u64),
            held in proptest::collection::vec((any::<bool>(), 0..40_u64), 0..6),
            size in 0..60_u64, volume in any::<bool>(),
        ) {
            let mut ledger = ledger("p", "n", 0);
            ledger.capacity.images.data = Bytes(capacity.0);
            ledger.capacity.volumes.data = Bytes(capacity.1);
            ledger.capacity.total.data = Bytes(capacity.2);
            let class = |volume: bool| if volume { Class::Volumes } else { Class::Images };
            for (index, (volume, size)) in held.iter().enumerate() {
                let uid = format!("u{index}");
                ledger.promises.insert(Uid(uid.clone()), promise(&uid, class(*volume), *size));
            }
            let all = held.iter().copied().chain([(volume, size)]);
            let (mut images, mut volumes) = (0, 0);
            for (volume, size) in all {
                if volume { volumes += size } else { images += size }
            }
            let yes = images <= capacity.0 && volumes <= capacity.1 && images + volumes <= capacity.2;
            prop_assert_eq!(fits(&ledger, &new(class(volume), size)).is_ok(), yes);
        }
    }
}
