//! What was fetched and is kept, and what is on its way: nothing is fetched twice at the same time.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use berth_core::units::Bytes as Size;
use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::Shared;
use lru::LruCache;
use tokio::sync::oneshot;

use super::RemoteError;

/// What an entry takes beside its bytes.
const OVERHEAD: u64 = 256;

/// Something on its way; all who want it wait for the same. An error of the receiver means that nobody brings it any more.
pub(super) type Coming = Shared<oneshot::Receiver<Result<Bytes, RemoteError>>>;

/// What is kept, up to a number of bytes; the least recently used goes first.
pub(super) struct Shelf<K: Hash + Eq> {
    state: Mutex<State<K>>,
    budget: u64,
}

struct State<K: Hash + Eq> {
    kept: LruCache<K, Bytes>,
    weight: u64,
    coming: HashMap<K, Coming>,
}

/// Where something is.
pub(super) enum Found<K: Hash + Eq + Copy> {
    /// Here.
    Kept(Bytes),
    /// Somebody brings it.
    Coming(Coming),
    /// Nobody does: the caller has to, now.
    Absent(Delivery<K>, Coming),
}

/// The duty to bring something. Dropped without [`Delivery::done`], it is nobody's again.
pub(super) struct Delivery<K: Hash + Eq + Copy> {
    shelf: Arc<Shelf<K>>,
    key: K,
    tell: Option<oneshot::Sender<Result<Bytes, RemoteError>>>,
}

impl<K: Hash + Eq + Copy> Shelf<K> {
    /// An empty one.
    pub(super) fn new(budget: Size) -> Arc<Self> {
        let state = State { kept: LruCache::unbounded(), weight: 0, coming: HashMap::new() };
        Arc::new(Self { state: Mutex::new(state), budget: budget.0 })
    }

    /// Finds something; if it is not here, exactly one caller has to bring it.
    pub(super) fn find(self: &Arc<Self>, key: K) -> Found<K> {
        let mut state = self.lock();
        if let Some(bytes) = state.kept.get(&key) {
            return Found::Kept(bytes.clone());
        }
        if let Some(coming) = state.coming.get(&key) {
            return Found::Coming(coming.clone());
        }
        let (tell, told) = oneshot::channel();
        let coming = told.shared();
        state.coming.insert(key, coming.clone());
        Found::Absent(Delivery { shelf: Arc::clone(self), key, tell: Some(tell) }, coming)
    }

    /// True if it is here or on its way.
    pub(super) fn knows(&self, key: &K) -> bool {
        let state = self.lock();
        state.kept.contains(key) || state.coming.contains_key(key)
    }

    /// How many bytes are kept, with what their entries take.
    #[cfg(test)]
    pub(super) fn weight(&self) -> Size {
        Size(self.lock().weight)
    }

    fn lock(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Hash + Eq> State<K> {
    fn keep(&mut self, key: K, bytes: Bytes, budget: u64) {
        let weight = |bytes: &Bytes| bytes.len() as u64 + OVERHEAD;
        self.weight += weight(&bytes);
        if let Some(old) = self.kept.put(key, bytes) {
            self.weight -= weight(&old);
        }
        while self.weight > budget
            && let Some((_, old)) = self.kept.pop_lru()
        {
            self.weight -= weight(&old);
        }
    }
}

impl<K: Hash + Eq + Copy> Delivery<K> {
    /// Gives it to all who wait, and keeps it.
    pub(super) fn done(mut self, outcome: Result<Bytes, RemoteError>) {
        let mut state = self.shelf.lock();
        state.coming.remove(&self.key);
        if let Ok(bytes) = &outcome {
            state.keep(self.key, bytes.clone(), self.shelf.budget);
        }
        drop(state);
        if let Some(tell) = self.tell.take() {
            // Whoever wanted it may be gone.
            let _ = tell.send(outcome);
        }
    }
}

impl<K: Hash + Eq + Copy> Drop for Delivery<K> {
    fn drop(&mut self) {
        if self.tell.is_some() {
            self.shelf.lock().coming.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bring(shelf: &Arc<Shelf<u32>>, key: u32, len: usize) {
        match shelf.find(key) {
            Found::Absent(delivery, _) => delivery.done(Ok(Bytes::from(vec![0; len]))),
            _ => panic!("{key} is there"),
        }
    }

    #[test]
    fn the_least_recently_used_goes_first_and_the_budget_holds() {
        let shelf = Shelf::new(Size(3 * (1000 + OVERHEAD)));
        (0..3).for_each(|key| bring(&shelf, key, 1000));
        assert!(matches!(shelf.find(0), Found::Kept(_)));
        bring(&shelf, 3, 1000);
        assert_eq!([0, 1, 2, 3].map(|key| shelf.knows(&key)), [true, false, true, true]);
        bring(&shelf, 4, 5000);
        assert_eq!(shelf.weight(), Size(0), "what does not fit is not kept");
    }

    #[tokio::test]
    async fn one_brings_it_for_all_and_a_duty_that_is_dropped_is_free_again() {
        let shelf = Shelf::<u32>::new(Size(1 << 20));
        let Found::Absent(delivery, first) = shelf.find(1) else { panic!("nobody has it") };
        let Found::Coming(second) = shelf.find(1) else { panic!("it is on its way") };
        drop(delivery);
        assert!(first.await.is_err() && second.await.is_err());
        let Found::Absent(delivery, first) = shelf.find(1) else { panic!("nobody has it") };
        let Found::Coming(second) = shelf.find(1) else { panic!("it is on its way") };
        delivery.done(Ok(Bytes::from_static(b"x")));
        assert_eq!((first.await.unwrap().unwrap(), second.await.unwrap().unwrap()), ("x".into(), "x".into()));
        let Found::Absent(delivery, waiting) = shelf.find(2) else { panic!("nobody has it") };
        delivery.done(Err(RemoteError::Stopped {
            digest: berth_core::ids::Digest(berth_core::ids::Sha256Sum([0; 32])),
        }));
        assert!(waiting.await.unwrap().is_err() && !shelf.knows(&2), "a failure is not kept");
    }
}
