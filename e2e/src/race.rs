//! `admission-race`: two operators admit requests of 60 % of a pool against a real API server, one of them is killed in
//! the middle, and a third process counts from the API objects what was promised at every instant.
//!
//! Histories run in waves, each in a pool of its own, so that 200 take a minute or two. In each wave one operator is
//! killed (SIGKILL) at a random moment and comes back after a random pause. Nodes are API objects that follow the
//! agent's protocol ([`fake_node`]); what is promised, assigned and released is replayed from every version of every
//! object ([`mod@judge`]).

pub mod fake_node;
pub mod follow;
mod history;
pub mod judge;
mod operators;
pub mod record;
mod trace;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use berth_api::StagingNode;
use kube::api::ListParams;
use kube::{Api, ResourceExt as _};
use tokio::time::sleep;

use self::fake_node::{FakeNodeError, FakeNodes};
pub use self::history::HistoryError;
use self::history::{Ground, Outcome, play};
use self::judge::{Tally, Violation, judge};
pub use self::operators::{Operator, OperatorError};
use self::record::{Counter, version_of};
use crate::cluster::{Cluster, ClusterError};
use crate::seeded::Seeded;
use crate::wait::WaitError;

/// Where the requests are made.
const NAMESPACE: &str = "race";
/// The nodes that the pools are spread over.
const NODES: u64 = 4;
/// One history in so many has its pool on two nodes; with a defect all have, because a wrong place needs a second one.
const TWO_NODES_EVERY: u64 = 4;
/// Each operator makes at least this share of the admissions. Unit: percent.
const LEAST_SHARE: u64 = 20;
/// How long it may take until every history of a wave has begun.
const BEGIN_LIMIT: Duration = Duration::from_secs(60);
/// At least this many operations on average per history.
const LEAST_OPERATIONS: u64 = 8;
/// At least one conflict per so many histories.
const HISTORIES_PER_CONFLICT: u64 = 4;

/// What is asked for.
#[derive(Debug, Clone)]
pub struct RaceOptions {
    /// How many histories.
    pub histories: u64,
    /// How many at once.
    pub lanes: u64,
    /// Determines sizes, moments and who is killed.
    pub seed: u64,
    /// A defect of the operators, which must be noticed.
    pub sabotage: Option<String>,
}

/// What a race showed.
#[derive(Debug, Default)]
pub struct Report {
    /// Histories played to their end.
    pub histories: u64,
    /// Of them, those during which an operator was killed.
    pub killed_during: u64,
    /// Operators killed.
    pub kills: u64,
    /// Requests made and deleted.
    pub operations: u64,
    /// Conflicts met by each operator.
    pub conflicts: BTreeMap<String, u64>,
    /// What the replay counted.
    pub tally: Tally,
    /// Why the last wave did not come to its end, if a property was violated in it.
    pub cut_off: Option<String>,
    /// What was seen of the reservation that the first violation concerns.
    pub trace: Vec<String>,
    /// Floors of the coverage that were not reached.
    pub below_floor: Vec<String>,
}

/// Why a race could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum RaceError {
    /// The control plane.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// Definitions or rights.
    #[error("could not prepare the control plane")]
    Prepare(#[from] crate::cluster::ApplyError),
    /// The namespace of the requests.
    #[error(transparent)]
    Namespace(#[from] WaitError<kube::Error>),
    /// An operator.
    #[error(transparent)]
    Operator(#[from] OperatorError),
    /// A node.
    #[error(transparent)]
    Node(#[from] FakeNodeError),
    /// A history.
    #[error("{error}; the operators' last lines:\n{logs}")]
    History {
        /// What happened.
        error: HistoryError,
        /// Ends of the operators' logs.
        logs: String,
    },
    /// The counter may have missed something, so nothing can be said.
    #[error("the count has a gap: {0}")]
    Gap(String),
}

impl Report {
    /// The violations and missed floors; empty if all is well.
    pub fn failures(&self) -> Vec<String> {
        let violations = self.tally.violations.iter().map(Violation::to_string);
        violations.chain(self.cut_off.iter().chain(&self.below_floor).cloned()).collect()
    }

    /// Keeps what led to the first violation.
    fn explain(&mut self, changes: &[judge::Change], tally: &Tally) {
        if let Some(uid) = tally.violations.iter().find_map(|violation| violation.subject.as_ref()) {
            self.trace = trace::trace(changes, uid);
        }
    }

    fn add(&mut self, outcomes: &[Outcome], killed_at: Instant, tally: Tally) {
        for outcome in outcomes {
            self.histories += 1;
            self.operations += outcome.operations;
            self.killed_during += u64::from(outcome.began < killed_at && killed_at < outcome.ended);
        }
        self.kills += 1;
        self.tally.versions += tally.versions;
        self.tally.admissions += tally.admissions;
        self.tally.releases += tally.releases;
        self.tally.slipped += tally.slipped;
        self.tally.violations.extend(tally.violations);
        for (writer, count) in tally.by_writer {
            *self.tally.by_writer.entry(writer).or_default() += count;
        }
    }

    fn check_floors(&mut self, operators: &[Operator]) {
        let promises: u64 = self.tally.by_writer.values().sum();
        for operator in operators {
            let manager = format!("berth-operator/{}", operator.identity);
            let own = self.tally.by_writer.get(&manager).copied().unwrap_or_default();
            if own * 100 < promises * LEAST_SHARE {
                self.below_floor
                    .push(format!("{manager} made {own} of {promises} admissions, below {LEAST_SHARE} %"));
            }
        }
        let mut floor = |what: &str, found: u64, least: u64| {
            if found < least {
                self.below_floor.push(format!("{what}: {found}, at least {least} are needed"));
            }
        };
        floor("operations", self.operations, self.histories * LEAST_OPERATIONS);
        floor("ledger conflicts", self.conflicts.values().sum(), self.histories / HISTORIES_PER_CONFLICT);
        floor("histories with a kill in their middle", self.killed_during, self.histories * 9 / 10);
        floor("releases", self.tally.releases, self.histories);
    }
}

/// Runs the race with all its data in `dir`. Stops after the wave in which a property did not hold.
///
/// # Errors
/// [`RaceError`]. A property that did not hold is no error: see [`Report::failures`].
pub async fn run(dir: &Path, options: &RaceOptions) -> Result<Report, RaceError> {
    let cluster = Cluster::start(&dir.join("cluster")).await?;
    let tree = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    cluster.install_crds(&tree.join("crds")).await?;
    cluster.apply_file(&tree.join("charts/berth/files/rbac/operator.yaml")).await?;
    cluster.ensure_namespace(NAMESPACE).await?;
    let nodes: Vec<_> = (0..NODES).map(|number| format!("race-node-{number}")).collect();
    let client = cluster.client_for(&cluster.admin_kubeconfig()).await.map_err(ClusterError::from)?;
    let counter = Arc::new(Counter::start(&client, NAMESPACE));
    let mut operators = Vec::new();
    for identity in ["race-a", "race-b"] {
        operators.push(Operator::start(&cluster, dir, identity, options.sabotage.as_deref()).await?);
    }
    let agents = cluster.client_for(&cluster.admin_kubeconfig()).await.map_err(ClusterError::from)?;
    let fake = Arc::new(FakeNodes::start(&agents, NAMESPACE, &nodes, options.seed).await?);
    let ground = Ground {
        client: cluster.admin(),
        namespace: NAMESPACE.to_owned(),
        counter,
        nodes: fake,
        begun: Arc::default(),
    };
    let mut race = Race { ground, operators, nodes, options, report: Report::default() };
    race.all_waves().await?;
    cluster.stop();
    Ok(race.report)
}

struct Race<'a> {
    ground: Ground,
    operators: Vec<Operator>,
    nodes: Vec<String>,
    options: &'a RaceOptions,
    report: Report,
}

impl Race<'_> {
    async fn all_waves(&mut self) -> Result<(), RaceError> {
        let mut next = 0;
        while next < self.options.histories {
            for operator in &self.operators {
                operator.wait_ready().await?;
            }
            let end = self.options.histories.min(next + self.options.lanes);
            if let Err(error) = self.wave(next, end).await {
                // What was broken so far may be why it got stuck.
                self.tally_rest()?;
                if self.report.tally.violations.is_empty() {
                    return Err(error);
                }
                self.report.cut_off = Some(error.to_string());
            }
            eprintln!(
                "{}/{} histories, {} admissions",
                end, self.options.histories, self.report.tally.admissions
            );
            if !self.report.tally.violations.is_empty() {
                break;
            }
            next = end;
        }
        for operator in &self.operators {
            self.report.conflicts.insert(operator.identity.clone(), operator.conflicts().await);
        }
        self.report.check_floors(&self.operators);
        Ok(())
    }

    /// Histories `from` to `to` at once, and one operator killed among them.
    async fn wave(&mut self, from: u64, to: u64) -> Result<(), RaceError> {
        let seed = self.options.seed;
        let mut seeded = Seeded::part(seed, from ^ 0x6b69_6c6c);
        let histories: Vec<_> = (from..to)
            .map(|number| {
                let pool = format!("race-{number}");
                let own_seed = Seeded::part(seed, number).draw();
                tokio::spawn(play(self.ground.clone(), pool, self.nodes_of(number), own_seed))
            })
            .collect();
        // Into the middle: after every history has begun, before the first ends.
        let deadline = Instant::now() + BEGIN_LIMIT;
        while self.ground.begun.load(Ordering::SeqCst) < to && Instant::now() < deadline {
            sleep(Duration::from_millis(10)).await;
        }
        sleep(seeded.millis(50, 600)).await;
        let wave = usize::try_from(from / self.options.lanes.max(1)).unwrap_or_default();
        let victim = wave % self.operators.len();
        self.operators[victim].kill().await;
        let killed_at = Instant::now();
        sleep(seeded.millis(20, 300)).await;
        self.operators[victim].restart()?;
        let mut outcomes = Vec::new();
        for history in histories {
            match history.await.expect("a history does not panic") {
                Ok(outcome) => outcomes.push(outcome),
                Err(error) => return Err(RaceError::History { error, logs: self.logs() }),
            }
        }
        self.catch_up().await?;
        let changes = self.ground.counter.take().map_err(RaceError::Gap)?;
        let tally = judge(changes.clone());
        self.report.explain(&changes, &tally);
        self.report.add(&outcomes, killed_at, tally);
        Ok(())
    }

    /// Waits until the counter has seen what the nodes have reported: each kind comes by a watch of its own.
    async fn catch_up(&self) -> Result<(), RaceError> {
        let nodes: Api<StagingNode> = Api::all(self.ground.client.clone());
        let reported =
            nodes.list(&ListParams::default()).await.map_err(|error| RaceError::Gap(error.to_string()))?;
        let deadline = Instant::now() + BEGIN_LIMIT;
        for node in &reported.items {
            while self.ground.counter.latest("StagingNode", &node.name_any()) < version_of(node) {
                if Instant::now() >= deadline {
                    return Err(RaceError::Gap(format!("the reports of {} do not come", node.name_any())));
                }
                sleep(Duration::from_millis(10)).await;
            }
        }
        Ok(())
    }

    /// Judges a wave that did not end, whose other histories still go on; that something is left then says nothing.
    fn tally_rest(&mut self) -> Result<(), RaceError> {
        let changes = self.ground.counter.take_seen_by_all().map_err(RaceError::Gap)?;
        let mut tally = judge(changes.clone());
        tally.violations.retain(|violation| violation.property != judge::Property::NothingLeft);
        self.report.explain(&changes, &tally);
        self.report.add(&[], Instant::now(), tally);
        Ok(())
    }

    fn nodes_of(&self, number: u64) -> Vec<String> {
        let at = |offset: u64| {
            let index = usize::try_from((number + offset) % NODES).unwrap_or_default();
            self.nodes[index].clone()
        };
        let on_two = self.options.sabotage.is_some() || number.is_multiple_of(TWO_NODES_EVERY);
        if on_two { vec![at(0), at(1)] } else { vec![at(0)] }
    }

    fn logs(&self) -> String {
        self.operators.iter().map(|one| format!("{}:\n{}\n", one.identity, one.log_tail())).collect()
    }
}
