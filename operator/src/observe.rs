//! The only reader of the API: watches every kind, and keeps the view that decisions look at.
//!
//! **Guarantees.** An error of a watch never looks like an empty list. An object that cannot be read is that object's
//! problem: the others go on, its last readable form stays, nothing is decided about it, and sweeps pause while it is there. **Assumptions.** None
//! about freshness: what is seen here may be old, and only compare-and-swap on the way out makes decisions safe.

mod claims;
mod guarded;
mod history;
mod kind;
mod kinds;
mod kube_nodes;
mod namespaces;
mod nodes;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use berth_api::{
    ImageStore, ImageTransfer, StagedImage, StagingLedger, StagingNode, StagingPool, StagingReservation,
    TemplateImport,
};
use berth_core::ids::{NodeName, ObjectName, PoolName, Uid};
use berth_core::view::{Unreadable, View};
use kube::Client;
use kube::runtime::reflector::ObjectRef;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use kind::{Kind, Observed, name_of, version};
use nodes::{Heard, Listening};

use crate::controllers;
use crate::events::Events;

/// Something that changed, for the controllers to tell which of their objects it concerns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Touched {
    /// A pool.
    Pool(PoolName),
    /// A node's report, or whether it is live.
    Node(NodeName),
    /// A ledger.
    Ledger(PoolName, NodeName),
    /// A reservation; it may be gone.
    Reservation(ObjectName, Uid),
    /// An import; it may be gone.
    Import(ObjectName),
    /// A staged image; it may be gone.
    Image(String),
    /// An image store.
    Store(ObjectName),
    /// A transfer; it may be gone.
    Transfer(ObjectName),
    /// Anything: after the first lists, after a new list, after the Lease changed hands.
    Everything,
}

/// What is known, beside the objects themselves.
#[derive(Debug, Default)]
pub struct State {
    /// What decisions look at.
    pub view: View,
    /// Node Leases by name.
    heard: BTreeMap<String, Heard>,
    /// The clock by which nodes are silent.
    listening: Listening,
    /// Nodes whose report was read again after their Lease was seen to be renewed.
    confirmed: BTreeSet<NodeName>,
    /// Nodes whose report is being read again, or is to be.
    confirming: BTreeSet<NodeName>,
    /// Claims and `PersistentVolumes`.
    known_claims: claims::Known,
}

impl State {
    /// Notes an object that cannot be read.
    fn hide(&mut self, object: Unreadable) {
        self.show(&object.kind, &object.name);
        self.view.unreadable.push(object);
    }

    /// The object can be read, or is gone.
    fn show(&mut self, kind: &str, name: &ObjectName) {
        self.view.unreadable.retain(|one| one.kind != kind || one.name != *name);
    }
}

/// The watches, and what they have shown.
pub struct Observer {
    client: Client,
    namespace: String,
    state: RwLock<State>,
    /// The pools.
    pub pools: Kind<StagingPool>,
    /// The reservations.
    pub reservations: Kind<StagingReservation>,
    /// The imports.
    pub imports: Kind<TemplateImport>,
    /// The staged images.
    pub images: Kind<StagedImage>,
    /// The image stores.
    pub stores: Kind<ImageStore>,
    /// The ledgers.
    pub ledgers: Kind<StagingLedger>,
    /// The nodes' reports.
    pub nodes: Kind<StagingNode>,
    /// The transfers.
    pub transfers: Kind<ImageTransfer>,
    unsynced: watch::Sender<usize>,
    /// How often the API server went back in time.
    restarts: watch::Sender<u64>,
    confirm: mpsc::Sender<NodeName>,
    /// Since when it watches; anew after the API server went back in time.
    since: Mutex<Instant>,
    last_event: AtomicU64,
    events: OnceLock<Events>,
    claim_grace: Duration,
}

/// Nodes to be confirmed, for [`Observer::start`].
pub type Confirmations = mpsc::Receiver<NodeName>;

/// Eight kinds, the labels of namespaces, and the node Leases.
const WATCHES: usize = 10;
/// A node that lives has renewed its Lease by then, and its report was read; of one without any, nothing more is to be expected.
const SETTLE: Duration = Duration::from_secs(60);
/// How many nodes may wait to be confirmed; the others are asked for again a second later.
const CONFIRMATIONS: usize = 1024;

impl Observer {
    /// Watches nothing yet. Volumes that are younger than `claim_grace` are never taken for abandoned.
    pub fn new(client: Client, namespace: String, claim_grace: Duration) -> (Self, Confirmations) {
        let (confirm, confirmations) = mpsc::channel(CONFIRMATIONS);
        let observer = Self {
            client,
            namespace,
            state: RwLock::new(State { view: View::indexed(), ..State::default() }),
            pools: Kind::default(),
            reservations: Kind::default(),
            imports: Kind::default(),
            images: Kind::default(),
            stores: Kind::default(),
            ledgers: Kind::default(),
            nodes: Kind::default(),
            transfers: Kind::default(),
            unsynced: watch::Sender::new(WATCHES),
            restarts: watch::Sender::new(0),
            confirm,
            since: Mutex::new(Instant::now()),
            last_event: AtomicU64::new(0),
            events: OnceLock::new(),
            claim_grace,
        };
        (observer, confirmations)
    }

    /// Starts every watch; they end with `stop`. What cannot be read is said in events.
    pub fn start(
        self: &Arc<Self>,
        events: Events,
        confirmations: Confirmations,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) {
        drop(self.events.set(events)); // it is started once
        self.clone().spawn::<StagingPool>(tasks, stop);
        self.clone().spawn::<StagingReservation>(tasks, stop);
        self.clone().spawn::<TemplateImport>(tasks, stop);
        self.clone().spawn::<StagedImage>(tasks, stop);
        self.clone().spawn::<ImageStore>(tasks, stop);
        self.clone().spawn::<StagingLedger>(tasks, stop);
        self.clone().spawn::<StagingNode>(tasks, stop);
        self.clone().spawn::<ImageTransfer>(tasks, stop);
        let (one, token) = (self.clone(), stop.clone());
        tasks.spawn(async move { token.run_until_cancelled(namespaces::watch(&one)).await });
        nodes::spawn(self, confirmations, tasks, stop);
        kube_nodes::spawn(self, tasks, stop);
        claims::spawn(self, tasks, stop);
    }

    fn spawn<K: Observed>(self: Arc<Self>, tasks: &TaskTracker, stop: &CancellationToken) {
        let stop = stop.clone();
        tasks.spawn(async move {
            stop.run_until_cancelled(kind::watch::<K>(&self)).await;
        });
    }

    /// Looks at the view. Nothing else is seen while `look` runs: it must be short.
    pub fn view<R>(&self, look: impl FnOnce(&View) -> R) -> R {
        look(&self.read().view)
    }

    /// True once every watch has shown its first list.
    pub fn synced(&self) -> bool {
        *self.unsynced.borrow() == 0
    }

    /// Brings [`View::unheard`] up to date: every node has reported, is lost, or would have been heard by now.
    pub fn judge_unheard(&self) {
        let unheard = |state: &State| {
            let waits = self.since.lock().unwrap_or_else(PoisonError::into_inner).elapsed() < SETTLE;
            waits && !state.view.nodes.values().all(|node| node.reported || node.is_lost())
        };
        let is_news = {
            let state = self.read();
            unheard(&state) != state.view.unheard
        };
        if is_news {
            let mut state = self.write();
            state.view.unheard = unheard(&state);
        }
    }

    /// Waits until every watch has shown its first list.
    pub async fn wait_until_synced(&self) {
        let mut unsynced = self.unsynced.subscribe();
        // The sender lives in `self`, so it cannot be gone.
        drop(unsynced.wait_for(|left| *left == 0).await);
    }

    /// When something was last seen: milliseconds since 1970, 0 before the first time.
    pub fn last_event_millis(&self) -> u64 {
        self.last_event.load(Ordering::Relaxed)
    }

    /// Tells decisions whether this process holds the Lease.
    pub fn set_leader(&self, leader: bool) {
        self.write().view.leader = leader;
        self.touch(&Touched::Everything);
    }

    /// The stored form of an object, as it was last seen.
    pub fn stored<K: Observed>(&self, name: &ObjectName) -> Option<Arc<K>> {
        let reference = ObjectRef::<K>::new(&name.name);
        let reference = if name.namespace.is_empty() { reference } else { reference.within(&name.namespace) };
        K::objects(self).reader.get(&reference)
    }

    /// Takes in the answer to a write of our own, so that the next decision need not wait for the watch.
    pub fn absorb<K: Observed>(&self, object: K) {
        kind::enter(self, object, kind::Source::Answer);
    }

    /// Lets every controller queue what this concerns. Nothing is queued before everything was seen once.
    fn touch(&self, touched: &Touched) {
        self.last_event.store(crate::context::now().0, Ordering::Relaxed);
        if !self.synced() {
            return;
        }
        let state = self.read();
        controllers::queue_affected(self, &state.view, touched);
    }

    /// One more watch has shown its first list.
    fn one_synced(&self) {
        self.unsynced.send_modify(|left| *left = left.saturating_sub(1));
        if self.synced() {
            self.touch(&Touched::Everything);
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}
