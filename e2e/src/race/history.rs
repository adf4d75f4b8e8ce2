//! One history: a pool, several requests for 60 % of it at once, deletions at random moments, until nothing is left.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use berth_api::fields::Quantity;
use berth_api::staging_pool::{Backend, FilesystemBackend, StagingPoolSpec};
use berth_api::staging_reservation::{Access, StagingReservationSpec};
use berth_api::{StagingLedger, StagingPool, StagingReservation};
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use tokio::time::sleep;

use super::fake_node::FakeNodes;
use super::record::{Counter, version_of};
use crate::seeded::Seeded;

/// The size of each pool on each node; nothing is really written. Unit: bytes.
pub const POOL_BYTES: i64 = 100 << 30;
/// What each request asks for: 60 % of it. Unit: bytes.
pub const REQUEST_BYTES: i64 = POOL_BYTES / 10 * 6;
/// How long any step of a history may take.
const STEP_LIMIT: Duration = Duration::from_secs(60);
/// How often the counter is asked.
const LOOK: Duration = Duration::from_millis(8);

/// What all histories share.
#[derive(Clone)]
pub struct Ground {
    /// For the requests.
    pub client: Client,
    /// Of the requests.
    pub namespace: String,
    /// What is seen.
    pub counter: Arc<Counter>,
    /// Who obeys.
    pub nodes: Arc<FakeNodes>,
    /// How many histories have begun.
    pub begun: Arc<AtomicU64>,
}

/// How a history went.
#[derive(Debug)]
pub struct Outcome {
    /// When its first request was made.
    pub began: Instant,
    /// When its last object was gone.
    pub ended: Instant,
    /// Requests made and deleted.
    pub operations: u64,
}

/// Why a history could not be carried to its end.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// The API server refused a request of the history.
    #[error("history {history}: failed to {action}")]
    Request {
        /// Which.
        history: String,
        /// What was asked for.
        action: &'static str,
        /// What it answered.
        source: kube::Error,
    },
    /// Something did not come about.
    #[error("history {history}: waited {limit:?} for {what}", limit = STEP_LIMIT)]
    Stuck {
        /// Which.
        history: String,
        /// For what.
        what: String,
    },
}

/// Plays history `pool` on `nodes`.
///
/// # Errors
/// [`HistoryError`].
pub async fn play(
    ground: Ground,
    pool: String,
    nodes: Vec<String>,
    seed: u64,
) -> Result<Outcome, HistoryError> {
    let history = History { ground, pool, operations: Arc::default() };
    let mut seeded = Seeded::new(seed);
    history.open(&nodes).await?;
    let began = Instant::now();
    history.ground.begun.fetch_add(1, Ordering::SeqCst);
    let requests = seeded.between(4, 6);
    let tasks = (0..requests).map(|number| history.request(number, Seeded::new(seeded.draw())));
    futures::future::try_join_all(tasks.collect::<Vec<_>>()).await?;
    let ended = Instant::now();
    history.close(&nodes).await?;
    Ok(Outcome { began, ended, operations: history.operations.load(Ordering::Relaxed) })
}

struct History {
    ground: Ground,
    pool: String,
    operations: Arc<AtomicU64>,
}

impl History {
    /// Makes the pool and waits for its ledgers.
    async fn open(&self, nodes: &[String]) -> Result<(), HistoryError> {
        let pools: Api<StagingPool> = Api::all(self.ground.client.clone());
        let path = format!("/var/lib/berth-race/{}", self.pool);
        let spec = StagingPoolSpec {
            backend: Backend {
                filesystem: Some(FilesystemBackend { path, size: Quantity(POOL_BYTES.to_string()) }),
                ..Backend::default()
            },
            node_selector: [("race".to_owned(), self.pool.clone())].into(),
            ..StagingPoolSpec::default()
        };
        let made = pools.create(&PostParams::default(), &StagingPool::new(&self.pool, spec)).await;
        let made = made.map_err(|source| self.failed("make the pool", source))?;
        let uid = made.uid().unwrap_or_default();
        for node in nodes {
            self.ground.nodes.carry(node, &self.pool, &uid, POOL_BYTES);
        }
        for node in nodes {
            self.wait(|| self.ground.counter.promises(&self.pool, node).is_some(), "its ledger").await?;
        }
        Ok(())
    }

    /// One request: made at a random moment, and deleted at another, before or after it was admitted.
    async fn request(&self, number: u64, mut seeded: Seeded) -> Result<(), HistoryError> {
        let name = format!("{}-{number}", self.pool);
        let api: Api<StagingReservation> =
            Api::namespaced(self.ground.client.clone(), &self.ground.namespace);
        sleep(seeded.millis(0, 300)).await;
        let spec = StagingReservationSpec {
            pool_name: Some(self.pool.clone()),
            max_size: Quantity(REQUEST_BYTES.to_string()),
            access: if seeded.chance(50) { Access::File } else { Access::Block },
            ..StagingReservationSpec::default()
        };
        let made = api.create(&PostParams::default(), &StagingReservation::new(&name, spec)).await;
        made.map_err(|source| self.failed("make a reservation", source))?;
        if seeded.chance(25) {
            // Whatever it is doing then: nothing, queueing, being promised or assigned.
            sleep(seeded.millis(0, 400)).await;
        } else {
            let placed = || self.ground.counter.reservation(&name).is_some_and(|place| place.is_some());
            self.wait(placed, &format!("reservation {name} to be admitted")).await?;
            sleep(seeded.millis(5, 120)).await;
        }
        let deleted = api.delete(&name, &DeleteParams::default()).await;
        deleted.map_err(|source| self.failed("delete a reservation", source))?;
        self.operations.fetch_add(2, Ordering::Relaxed);
        sleep(LOOK).await;
        self.wait(|| self.ground.counter.reservation(&name).is_none(), &format!("reservation {name} to go"))
            .await
    }

    /// Waits until nothing is promised and the counter has seen all of it, then takes the pool away.
    async fn close(&self, nodes: &[String]) -> Result<(), HistoryError> {
        for node in nodes {
            let empty = || self.ground.counter.promises(&self.pool, node) == Some(0);
            self.wait(empty, &format!("the ledger on {node} to be empty")).await?;
        }
        self.ground.nodes.drop_pool(&self.pool);
        let pools: Api<StagingPool> = Api::all(self.ground.client.clone());
        let deleted = pools.delete(&self.pool, &DeleteParams::default()).await;
        deleted.map_err(|source| self.failed("delete the pool", source))?;
        let ledgers: Api<StagingLedger> = Api::all(self.ground.client.clone());
        let all = ledgers.list(&ListParams::default()).await;
        let all = all.map_err(|source| self.failed("list the ledgers", source))?;
        for ledger in all.items.iter().filter(|ledger| ledger.spec.pool_name == self.pool) {
            let seen =
                || self.ground.counter.latest("StagingLedger", &ledger.name_any()) >= version_of(ledger);
            self.wait(seen, "the counter to see the ledger's last version").await?;
        }
        Ok(())
    }

    fn failed(&self, action: &'static str, source: kube::Error) -> HistoryError {
        HistoryError::Request { history: self.pool.clone(), action, source }
    }

    async fn wait(&self, done: impl Fn() -> bool, what: &str) -> Result<(), HistoryError> {
        let deadline = Instant::now() + STEP_LIMIT;
        while !done() {
            if Instant::now() >= deadline {
                return Err(HistoryError::Stuck { history: self.pool.clone(), what: what.to_owned() });
            }
            sleep(LOOK).await;
        }
        Ok(())
    }
}
