//! What a view has under other keys than those that its maps are sorted by, so that one decision costs what it looks at, and
//! not what there is.
//!
//! A view made by hand has no index: its methods look at everything and say the same. Whoever keeps a view with one enters
//! and removes reservations and ledgers by the methods here.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{NodeName, ObjectName, PoolName, Uid};

use super::{LedgerView, PoolChoice, ReservationState, ReservationView, View};

/// A pool on a node.
type Place = (PoolName, NodeName);

/// Other keys of a view's reservations and ledgers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Index {
    /// Ledgers by holder of a promise.
    holders: BTreeMap<Uid, BTreeSet<Place>>,
    /// Reservations by name.
    names: BTreeMap<ObjectName, Uid>,
    /// Reservations by the staged image that they were assigned.
    images: BTreeMap<String, BTreeSet<Uid>>,
    /// Reservations that have a place, by node and pool.
    placed: BTreeMap<NodeName, BTreeMap<PoolName, BTreeSet<Uid>>>,
    /// Reservations that may still get a place: by the pool that they name, or under `None` if they take any with labels.
    open: BTreeMap<Option<PoolName>, BTreeSet<Uid>>,
    /// Reservations that are being deleted.
    deleting: BTreeSet<Uid>,
}

/// True if a place may still be given to it.
fn is_open(reservation: &ReservationView) -> bool {
    !reservation.deleting
        && reservation.assignment.is_none()
        && reservation.state != ReservationState::Refused
}

fn open_key(reservation: &ReservationView) -> Option<PoolName> {
    match &reservation.pools {
        PoolChoice::Named(pool) => Some(pool.clone()),
        PoolChoice::Labelled(_) => None,
    }
}

/// Takes `value` out of the set under `key`, and the set if that was all.
fn remove<K: Ord, V: Ord>(map: &mut BTreeMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(set) = map.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            map.remove(key);
        }
    }
}

impl Index {
    fn add(&mut self, reservation: &ReservationView) {
        let uid = &reservation.uid;
        self.names.insert(reservation.name.clone(), uid.clone());
        if let Some(image) = &reservation.assigned_image {
            self.images.entry(image.staged_image.clone()).or_default().insert(uid.clone());
        }
        if let Some(place) = &reservation.assignment {
            let pools = self.placed.entry(place.node.clone()).or_default();
            pools.entry(place.pool.clone()).or_default().insert(uid.clone());
        }
        if is_open(reservation) {
            self.open.entry(open_key(reservation)).or_default().insert(uid.clone());
        }
        if reservation.deleting {
            self.deleting.insert(uid.clone());
        }
    }

    fn forget(&mut self, reservation: &ReservationView) {
        let uid = &reservation.uid;
        if self.names.get(&reservation.name) == Some(uid) {
            self.names.remove(&reservation.name);
        }
        if let Some(image) = &reservation.assigned_image {
            remove(&mut self.images, &image.staged_image, uid);
        }
        if let Some(place) = &reservation.assignment
            && let Some(pools) = self.placed.get_mut(&place.node)
        {
            remove(pools, &place.pool, uid);
            if pools.is_empty() {
                self.placed.remove(&place.node);
            }
        }
        remove(&mut self.open, &open_key(reservation), uid);
        self.deleting.remove(uid);
    }
}

/// The objects of an index, or all of those of a map: whichever there is.
fn either<'v, T: 'v>(
    indexed: Option<impl Iterator<Item = T> + 'v>,
    all: impl FnOnce() -> Box<dyn Iterator<Item = T> + 'v>,
) -> Box<dyn Iterator<Item = T> + 'v> {
    match indexed {
        Some(indexed) => Box::new(indexed),
        None => all(),
    }
}

impl View {
    /// An empty one with an index.
    pub fn indexed() -> Self {
        Self { index: Some(Index::default()), ..Self::default() }
    }

    /// Takes a reservation in, in place of an older form of it.
    pub fn enter_reservation(&mut self, reservation: ReservationView) {
        self.remove_reservation(&reservation.uid);
        if let Some(index) = &mut self.index {
            index.add(&reservation);
        }
        self.reservations.insert(reservation.uid.clone(), reservation);
    }

    /// Takes a reservation out.
    pub fn remove_reservation(&mut self, uid: &Uid) -> Option<ReservationView> {
        let gone = self.reservations.remove(uid)?;
        if let Some(index) = &mut self.index {
            index.forget(&gone);
        }
        Some(gone)
    }

    /// Takes a ledger in, in place of an older form of it.
    pub fn enter_ledger(&mut self, ledger: LedgerView) {
        let place = (ledger.pool.clone(), ledger.node.clone());
        self.remove_ledger(&place);
        if let Some(index) = &mut self.index {
            for uid in ledger.promises.keys() {
                index.holders.entry(uid.clone()).or_default().insert(place.clone());
            }
        }
        self.ledgers.insert(place, ledger);
    }

    /// Takes a ledger out.
    pub fn remove_ledger(&mut self, place: &Place) -> Option<LedgerView> {
        let gone = self.ledgers.remove(place)?;
        if let Some(index) = &mut self.index {
            for uid in gone.promises.keys() {
                remove(&mut index.holders, uid, place);
            }
        }
        Some(gone)
    }

    /// The ledgers that hold a promise of this holder, in order of pool and node.
    pub fn ledgers_of<'v>(&'v self, uid: &'v Uid) -> impl Iterator<Item = &'v LedgerView> {
        let holds = move |ledger: &&LedgerView| ledger.promises.contains_key(uid);
        let places = self.index.as_ref().map(|index| index.holders.get(uid).into_iter().flatten());
        let indexed = places.map(|places| places.filter_map(|place| self.ledgers.get(place)));
        either(indexed, || Box::new(self.ledgers.values())).filter(holds)
    }

    /// The ledgers of a pool, in order of node.
    pub fn ledgers_in<'v>(&'v self, pool: &'v PoolName) -> impl Iterator<Item = &'v LedgerView> {
        let from = (pool.clone(), NodeName(String::new()));
        self.ledgers.range(from..).map(|(_, ledger)| ledger).take_while(move |ledger| ledger.pool == *pool)
    }

    /// The reservation with this name.
    pub fn reservation_named(&self, name: &ObjectName) -> Option<&ReservationView> {
        match &self.index {
            Some(index) => self.reservations.get(index.names.get(name)?),
            None => self.reservations.values().find(|reservation| reservation.name == *name),
        }
    }

    fn listed<'v>(
        &'v self,
        uids: impl FnOnce(&'v Index) -> Box<dyn Iterator<Item = &'v Uid> + 'v>,
    ) -> Box<dyn Iterator<Item = &'v ReservationView> + 'v> {
        let indexed = self.index.as_ref().map(uids);
        let indexed = indexed.map(|uids| uids.filter_map(|uid| self.reservations.get(uid)));
        either(indexed, || Box::new(self.reservations.values()))
    }

    /// True if a live reservation's assignment names this staged image.
    pub fn is_referenced(&self, image: &str) -> bool {
        self.assigned_image(image).any(|reservation| !reservation.deleting)
    }

    /// The reservations whose assignment names this staged image.
    pub fn assigned_image<'v>(&'v self, image: &'v str) -> impl Iterator<Item = &'v ReservationView> {
        let named = move |reservation: &&ReservationView| {
            reservation.assigned_image.as_ref().is_some_and(|assigned| assigned.staged_image == image)
        };
        self.listed(move |index| Box::new(index.images.get(image).into_iter().flatten())).filter(named)
    }

    /// The reservations that have a place on this node: in this pool, or in any.
    pub fn placed_on<'v>(
        &'v self,
        node: &'v NodeName,
        pool: Option<&'v PoolName>,
    ) -> impl Iterator<Item = &'v ReservationView> {
        let here = move |reservation: &&ReservationView| {
            let place = reservation.assignment.as_ref().filter(|place| place.node == *node);
            place.is_some_and(|place| pool.is_none_or(|pool| place.pool == *pool))
        };
        let of_node = move |index: &'v Index| -> Box<dyn Iterator<Item = &'v Uid> + 'v> {
            let pools = index.placed.get(node).into_iter().flatten();
            let pools = pools.filter(move |(name, _)| pool.is_none_or(|pool| *name == pool));
            Box::new(pools.flat_map(|(_, uids)| uids))
        };
        self.listed(of_node).filter(here)
    }

    /// The reservations that may still get a place: in this pool, or in any.
    pub fn open_to<'v>(&'v self, pool: Option<&'v PoolName>) -> impl Iterator<Item = &'v ReservationView> {
        let known = pool.map(|name| self.pools.get(name));
        let allowed = move |reservation: &&ReservationView| {
            let allows = match (&reservation.pools, known) {
                (_, None) => true,
                (PoolChoice::Named(name), Some(_)) => Some(name) == pool,
                (PoolChoice::Labelled(_), Some(known)) => {
                    // One that is gone may have been allowed.
                    known.is_none_or(|pool| reservation.pools.allows(pool))
                }
            };
            allows && is_open(reservation)
        };
        let of_pool = move |index: &'v Index| -> Box<dyn Iterator<Item = &'v Uid> + 'v> {
            let Some(pool) = pool else { return Box::new(index.open.values().flatten()) };
            let keys = [Some(pool.clone()), None];
            Box::new(keys.into_iter().filter_map(|key| index.open.get(&key)).flatten())
        };
        self.listed(of_pool).filter(allowed)
    }

    /// The reservations that are being deleted.
    pub fn leaving(&self) -> impl Iterator<Item = &ReservationView> {
        self.listed(|index| Box::new(index.deleting.iter())).filter(|reservation| reservation.deleting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{hold, ledger, placed, reservation, view};
    use crate::ledger::Class;
    use crate::units::Bytes;
    use crate::view::AssignedImage;

    const NODES: &[&str] = &["a", "b"];

    /// A small generator: the order of entries and removals.
    fn draw(seed: &mut u64) -> usize {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(*seed >> 33).expect("31 bits")
    }

    fn some_reservation(seed: &mut u64) -> ReservationView {
        let mut some = reservation(&format!("r{}", draw(seed) % 6), 10, 0);
        if draw(seed).is_multiple_of(3) {
            some.pools = PoolChoice::Labelled(BTreeMap::new());
        }
        some.deleting = draw(seed).is_multiple_of(4);
        if draw(seed).is_multiple_of(5) {
            some.state = ReservationState::Refused;
        }
        if draw(seed).is_multiple_of(2) {
            some.assignment = Some(placed("p", NODES[draw(seed) % 2], 1));
            some.assigned_image = Some(AssignedImage {
                digest: crate::fixture::digest(),
                staged_image: format!("image-{}", draw(seed) % 2),
                virtual_size: Bytes(1),
            });
        }
        some
    }

    fn all_answers(view: &View) -> Vec<Vec<String>> {
        let names = |found: &mut dyn Iterator<Item = &ReservationView>| {
            let mut names: Vec<String> = found.map(|one| one.name.name.clone()).collect();
            names.sort();
            names
        };
        let pool = PoolName::from("p");
        let mut answers = vec![names(&mut view.leaving()), names(&mut view.open_to(None))];
        answers.push(names(&mut view.open_to(Some(&pool))));
        for node in NODES.iter().map(|node| NodeName::from(*node)) {
            answers.push(names(&mut view.placed_on(&node, None)));
            answers.push(names(&mut view.placed_on(&node, Some(&pool))));
            answers.push(names(&mut view.placed_on(&node, Some(&PoolName::from("q")))));
        }
        for image in ["image-0", "image-1"] {
            answers.push(names(&mut view.assigned_image(image)));
            answers.push(vec![view.is_referenced(image).to_string()]);
        }
        for number in 0..6 {
            let name = format!("r{number}");
            answers.push(view.ledgers_of(&Uid::from(name.as_str())).map(|one| one.name.clone()).collect());
            let named = view.reservation_named(&ObjectName::new("ns", &name));
            answers.push(vec![format!("{:?}", named.map(|one| &one.uid))]);
        }
        answers
    }

    #[test]
    fn an_index_says_what_a_look_at_everything_says() {
        let mut seed = 7;
        let mut indexed = View { index: Some(Index::default()), ..view(&[]) };
        let mut answered = 0;
        for round in 0..2000 {
            let node = NODES[draw(&mut seed) % 2];
            match draw(&mut seed) % 4 {
                0 => {
                    let mut with = view(&[(node, 100)]);
                    for _ in 0..draw(&mut seed) % 3 {
                        hold(&mut with, node, &format!("r{}", draw(&mut seed) % 6), Class::Images, 1);
                    }
                    let (_, ledger) = with.ledgers.pop_first().expect("one");
                    indexed.enter_ledger(ledger);
                }
                1 => {
                    indexed.remove_ledger(&(PoolName::from("p"), NodeName::from(node)));
                }
                2 => {
                    indexed.remove_reservation(&some_reservation(&mut seed).uid);
                }
                _ => indexed.enter_reservation(some_reservation(&mut seed)),
            }
            let plain = View { index: None, ..indexed.clone() };
            assert_eq!(all_answers(&indexed), all_answers(&plain), "round {round}");
            answered += all_answers(&plain).iter().flatten().count();
        }
        assert!(answered > 10_000, "{answered}");
        for uid in indexed.reservations.keys().cloned().collect::<Vec<_>>() {
            indexed.remove_reservation(&uid);
        }
        for node in NODES {
            indexed.remove_ledger(&(PoolName::from("p"), NodeName::from(*node)));
        }
        assert_eq!(indexed.index, Some(Index::default()), "nothing of what went is left");
    }

    #[test]
    fn the_ledgers_of_a_pool_are_those_of_no_other() {
        let mut view = view(&[("a", 1), ("b", 1)]);
        for pool in ["o", "pa", "q"] {
            view.enter_ledger(ledger(pool, "a", 1));
        }
        let of = |pool: &str| view.ledgers_in(&PoolName::from(pool)).count();
        assert_eq!((of("p"), of("pa"), of("o"), of("none")), (2, 1, 1, 0));
    }
}
