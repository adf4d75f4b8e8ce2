//! Whether a node may give space to a holder: under a promise of the pool's ledger, or, where the pool has none, under one
//! that the node makes itself by the same sums.

use std::collections::BTreeMap;
use std::fmt;

use thiserror::Error;

use crate::budget::{Area, Bound, Shortfall, Sums};
use crate::ids::Uid;
use crate::ledger::{Charge, Class, MAX_PROMISES};
use crate::overcommit::Percent;
use crate::reason::Reason;
use crate::thin::Stopped;
use crate::units::Bytes;
use crate::view::LedgerCapacity;

/// A promise as the pool's record has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// What it counts as.
    pub class: Class,
    /// How much.
    pub charge: Charge,
    /// The node may use it.
    pub obeyed: bool,
    /// Its bytes are gone, and it is about to be forgotten.
    pub released: bool,
}

/// What is promised in a pool, and what may be.
#[derive(Clone, Copy, Debug)]
pub struct Books<'a> {
    /// True if the pool obeys a ledger: then nobody else promises anything.
    pub has_ledger: bool,
    /// What may be promised where there is no ledger; under one, how far it overcommits volumes.
    pub capacity: LedgerCapacity,
    /// Why nothing more is promised to the class, if so.
    pub stopped: Option<Stopped>,
    /// What is, by holder.
    pub promises: &'a BTreeMap<Uid, Held>,
}

/// Under what an operation may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ruling {
    /// What is promised already.
    Covered,
    /// A promise of this, which the node records first, in place of what the holder had.
    Promise(Charge),
}

/// Why it may not.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refused {
    /// The ledger has promised the holder nothing, too little, or something of another kind.
    #[error("{holder} needs {}, and the pool's ledger has promised it {}", Shown(*needed), promised_to(*promised))]
    NotPromised {
        /// Who asks.
        holder: Uid,
        /// What is needed.
        needed: Charge,
        /// What is promised.
        promised: Option<Charge>,
    },
    /// It does not fit beside what is promised.
    #[error("{holder} needs {}: the pool {shortfall}, that is {} bytes", Shown(*needed), shortfall.bytes.0)]
    NoRoom {
        /// Who asks.
        holder: Uid,
        /// What is needed.
        needed: Charge,
        /// How much is missing, of what.
        shortfall: Shortfall,
    },
    /// The class takes nothing more.
    #[error("the pool {0}")]
    Stopped(Stopped),
}

impl Refused {
    /// The documented reason.
    pub const fn reason(&self) -> Reason {
        match self {
            Self::NotPromised { .. } => Reason::NotPromised,
            Self::NoRoom { shortfall: Shortfall { bound: Bound::Promises, .. }, .. } => Reason::LedgerFull,
            Self::NoRoom { .. } => Reason::CapacityRefused,
            Self::Stopped(stopped) => stopped.reason(),
        }
    }
}

struct Shown(Charge);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.metadata {
            Bytes::ZERO => write!(f, "{}", self.0.data),
            metadata => write!(f, "{} and {metadata} of metadata", self.0.data),
        }
    }
}

fn promised_to(charge: Option<Charge>) -> String {
    charge.map_or_else(|| "nothing".to_owned(), |charge| Shown(charge).to_string())
}

/// Whether `holder` may come to use `needed` of a class.
///
/// # Errors
/// [`Refused`], with numbers.
pub fn rule(books: &Books<'_>, holder: &Uid, class: Class, needed: Charge) -> Result<Ruling, Refused> {
    let promised = books.promises.get(holder);
    let usable = promised.filter(|held| held.obeyed && !held.released && held.class == class);
    if usable.is_some_and(|held| held.charge.covers(needed)) {
        return Ok(Ruling::Covered);
    }
    if books.has_ledger {
        let promised = usable.map(|held| held.charge);
        return Err(Refused::NotPromised { holder: holder.clone(), needed, promised });
    }
    if let Some(stopped) = books.stopped {
        return Err(Refused::Stopped(stopped));
    }
    let others = books.promises.iter().filter(|(uid, held)| *uid != holder && !held.released);
    let others: Vec<_> = others.map(|(_, held)| (held.class, held.charge)).collect();
    let refuse = |shortfall| Refused::NoRoom { holder: holder.clone(), needed, shortfall };
    if others.len() >= MAX_PROMISES {
        return Err(refuse(Shortfall { bytes: Bytes::ZERO, bound: Bound::Promises }));
    }
    match Sums::of_charges(others.into_iter().chain([(class, needed)])).excess(&books.capacity) {
        Some(shortfall) => Err(refuse(shortfall)),
        None => Ok(Ruling::Promise(needed)),
    }
}

/// How large the kernel pool of a class may be made ahead of need. Under a ledger that is what is promised in it: what it had
/// more would be missing to the other class, which the operator may have promised it to. Without one, what promises to the
/// other class leave.
pub fn most_ahead(books: &Books<'_>, class: Class) -> Bytes {
    let sums = Sums::of_charges(
        books.promises.values().filter(|held| !held.released).map(|held| (held.class, held.charge)),
    );
    let (own, other) = match class {
        Class::Images => (Area::Images, Area::Volumes),
        Class::Volumes => (Area::Volumes, Area::Images),
    };
    let promised = |area| sums.data(area, Percent::WHOLE);
    if books.has_ledger {
        return match class {
            Class::Images => promised(own),
            Class::Volumes => books.capacity.overcommit.target(promised(own)),
        };
    }
    let left = books.capacity.total.data.saturating_sub(promised(other));
    left.min(books.capacity.area(own).data)
}

impl Charge {
    /// True if nothing of `other` is more than this.
    pub const fn covers(self, other: Self) -> bool {
        self.data.0 >= other.data.0 && self.metadata.0 >= other.metadata.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::overcommit::Overcommit;
    use crate::thin::{StopReason, Usage};

    fn charge(data: u64, metadata: u64) -> Charge {
        Charge { data: Bytes(data), metadata: Bytes(metadata) }
    }

    fn held(class: Class, data: u64, metadata: u64) -> Held {
        Held { class, charge: charge(data, metadata), obeyed: true, released: false }
    }

    fn books(promises: &BTreeMap<Uid, Held>, has_ledger: bool) -> Books<'_> {
        let bounds =
            LedgerCapacity { images: charge(80, 8), volumes: charge(60, 6), ..LedgerCapacity::default() };
        let capacity = LedgerCapacity { total: charge(100, 14), ..bounds };
        Books { has_ledger, capacity, stopped: None, promises }
    }

    fn ask(books: &Books<'_>, holder: &str, data: u64, metadata: u64) -> Result<Ruling, Refused> {
        rule(books, &Uid::from(holder), Class::Volumes, charge(data, metadata))
    }

    #[test]
    fn under_a_ledger_only_what_it_promised_to_this_holder_is_given() {
        let mut promises = BTreeMap::from([(Uid::from("a"), held(Class::Volumes, 10, 2))]);
        let asked =
            |promises: &BTreeMap<Uid, Held>, data, metadata| ask(&books(promises, true), "a", data, metadata);
        assert_eq!(asked(&promises, 10, 2), Ok(Ruling::Covered));
        for (data, metadata) in [(11, 2), (10, 3)] {
            let refused = asked(&promises, data, metadata).expect_err("too little");
            assert_eq!(refused.reason(), Reason::NotPromised);
            assert!(refused.to_string().contains("10 bytes and 2 bytes of metadata"), "{refused}");
        }
        let nothing = ask(&books(&promises, true), "b", 1, 0).expect_err("nothing");
        assert!(nothing.to_string().ends_with("has promised it nothing"), "{nothing}");
        for spoil in [
            |held: &mut Held| held.released = true,
            |held: &mut Held| held.obeyed = false,
            |held: &mut Held| held.class = Class::Images,
        ] {
            let before = promises[&Uid::from("a")];
            spoil(promises.get_mut(&Uid::from("a")).expect("there"));
            assert!(asked(&promises, 1, 0).is_err(), "{promises:?}");
            promises.insert(Uid::from("a"), before);
        }
    }

    #[test]
    fn without_one_the_node_promises_up_to_every_bound_and_no_further() {
        let promises = BTreeMap::from([
            (Uid::from("i"), held(Class::Images, 50, 1)),
            (Uid::from("v"), held(Class::Volumes, 20, 3)),
        ]);
        let books = books(&promises, false);
        assert_eq!(ask(&books, "n", 30, 3), Ok(Ruling::Promise(charge(30, 3))), "to the last byte of all");
        for (data, metadata, words) in [
            (31, 0, "lacks 1 bytes in all, that is 1 bytes"),
            (45, 0, "lacks 15 bytes in all, that is 15 bytes"),
            (1, 4, "lacks 1 bytes of metadata for volumes, that is 1 bytes"),
        ] {
            let refused = ask(&books, "n", data, metadata).expect_err("too much");
            assert_eq!(refused.reason(), Reason::CapacityRefused);
            assert!(refused.to_string().contains(words), "{refused}");
        }
        assert_eq!(ask(&books, "v", 20, 3), Ok(Ruling::Covered), "asked again");
        assert_eq!(ask(&books, "v", 50, 3), Ok(Ruling::Promise(charge(50, 3))), "in place of what it had");
        assert!(ask(&books, "v", 51, 3).is_err());
    }

    #[test]
    fn what_is_released_counts_no_more_and_a_stopped_class_takes_nothing_new() {
        let mut gone = held(Class::Images, 100, 8);
        gone.released = true;
        let promises = BTreeMap::from([(Uid::from("i"), gone), (Uid::from("v"), held(Class::Volumes, 1, 1))]);
        let open = books(&promises, false);
        assert!(ask(&open, "n", 59, 5).is_ok() && ask(&open, "n", 60, 5).is_err());
        let metadata = Usage { used: Bytes(71), total: Bytes(100) };
        let why =
            Stopped { class: Class::Volumes, why: StopReason::Metadata, data: Usage::default(), metadata };
        let stopped = Books { stopped: Some(why), ..open };
        assert_eq!(ask(&stopped, "n", 1, 1), Err(Refused::Stopped(why)));
        assert_eq!(ask(&stopped, "v", 1, 1), Ok(Ruling::Covered), "what is promised may be used");
    }

    fn some_promises() -> impl Strategy<Value = Vec<(bool, u64, u64, bool)>> {
        proptest::collection::vec((any::<bool>(), 0..60_u64, 0..6_u64, any::<bool>()), 0..6)
    }

    proptest! {
        /// Told from naive sums: what is promised stays within every bound, and nothing that fits is refused.
        #[test]
        fn the_node_promises_exactly_what_fits(
            all in some_promises(),
            (is_image, data, metadata) in (any::<bool>(), 0..90_u64, 0..9_u64),
        ) {
            let class = |is_image| if is_image { Class::Images } else { Class::Volumes };
            let promises: BTreeMap<Uid, Held> = all
                .iter()
                .enumerate()
                .map(|(n, (is_image, data, metadata, released))| {
                    let held = Held { released: *released, ..held(class(*is_image), *data, *metadata) };
                    (Uid::from(format!("{n}")), held)
                })
                .collect();
            let ruling = rule(&books(&promises, false), &"new".into(), class(is_image), charge(data, metadata));
            let sums = |images: bool| -> (u64, u64) {
                let new = (is_image, data, metadata, false);
                let counted = all.iter().chain([&new]).filter(|promise| !promise.3 && promise.0 == images);
                counted.fold((0, 0), |sum, promise| (sum.0 + promise.1, sum.1 + promise.2))
            };
            let ((images, image_metadata), (volumes, volume_metadata)) = (sums(true), sums(false));
            let fits = images <= 80 && volumes <= 60 && images + volumes <= 100
                && image_metadata <= 8 && volume_metadata <= 6 && image_metadata + volume_metadata <= 14;
            prop_assert_eq!(ruling.is_ok(), fits, "{:?}", ruling);
        }
    }

    #[test]
    fn no_more_promises_than_a_ledger_has() {
        let full = (0..MAX_PROMISES).map(|n| (Uid::from(format!("{n}")), held(Class::Volumes, 0, 0)));
        let promises: BTreeMap<_, _> = full.collect();
        let refused = ask(&books(&promises, false), "n", 0, 0).expect_err("full");
        assert_eq!(refused.reason(), Reason::LedgerFull);
        assert!(ask(&books(&promises, false), "7", 1, 0).is_ok(), "one that is there may grow");
    }

    #[test]
    fn a_kernel_pool_grows_ahead_only_into_what_nobody_else_was_promised() {
        let promises = BTreeMap::from([
            (Uid::from("i"), held(Class::Images, 70, 1)),
            (Uid::from("v"), held(Class::Volumes, 20, 3)),
        ]);
        let (local, clustered) = (books(&promises, false), books(&promises, true));
        assert_eq!(most_ahead(&local, Class::Volumes), Bytes(30));
        assert_eq!(most_ahead(&local, Class::Images), Bytes(80));
        assert_eq!(most_ahead(&clustered, Class::Volumes), Bytes(20));
        let overcommit = Overcommit { percent: Percent::from(200), attain: Bytes(15) };
        let over = Books { capacity: LedgerCapacity { overcommit, ..clustered.capacity }, ..clustered };
        assert_eq!(
            (most_ahead(&over, Class::Volumes), most_ahead(&over, Class::Images)),
            (Bytes(15), Bytes(70))
        );
    }
}
