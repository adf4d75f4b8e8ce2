//! `kill-import`: imports whose operator, node agent and S3 server are killed (SIGKILL) at random moments of each stage.
//!
//! One site, three image stores in one bucket. `reference` takes an import that nothing disturbs. `killed` takes a qcow2
//! with kills in fetch, upload, verify and publish, after an import that was deleted in the middle of its upload; some of
//! the chunks that it sends are acknowledged by the S3 server, and lost. `converted` takes a VHDX with kills in convert.
//! What holds is read from outside: the server's files and request log, API objects, the node's folders.

pub(crate) mod checks;
pub mod images;
pub mod stage;
pub mod store_files;
pub(crate) mod strike;
mod watch;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use berth_testkit::s3::fault::{FaultAction, FaultRule, FaultsError, write_rules};
use berth_testkit::s3::log::LogError;
use serde_json::json;

use self::images::Images;
pub use self::stage::Stage;
use self::stage::StageWatch;
use self::store_files::FilesError;
pub use self::strike::Victim;
use self::watch::ReadyWatch;
use crate::drive::{self, DriveError};
use crate::image::ImageError;
use crate::leaks::Snapshot;
use crate::seeded::Seeded;
use crate::site::{Saboteur, Site, SiteError, SiteOptions};

/// Where the imports are made.
const NAMESPACE: &str = "default";
/// The pool that they work in.
const POOL: &str = "work";
/// What a kill may cost: the distance between two checkpoints. Unit: bytes.
pub const WINDOW: u64 = 32 << 20;
/// How much of a source may be on its way between the server and the last checkpoint. Unit: bytes.
const IN_FLIGHT: u64 = 16 << 20;
/// How long an import may take beside what its kills cost.
const IMPORT_LIMIT: Duration = Duration::from_secs(300);
/// What a kill may cost in time: restart, recovery, pauses before retries.
const KILL_LIMIT: Duration = Duration::from_secs(30);
/// How many chunks the store acknowledges and loses.
const LOST: u64 = 4;
/// The fault rule that loses them, by its name in the request log.
const LOSE: &str = "lose";
/// The largest stored form of a chunk. Unit: bytes.
const FRAME: u64 = 260 << 10;
/// How often an import is begun until every planned kill has happened.
const MOST_ROUNDS: u64 = 6;

/// Defects of the node agent that this command must notice.
pub const SABOTAGES: &[&str] = &[
    "ready-before-verified",
    "skip-verify",
    "no-checkpoint",
    "stale-hash",
    "keep-session",
    "release-without-delete",
];

/// What is asked for.
#[derive(Debug, Clone)]
pub struct KillOptions {
    /// Everything lies below this folder.
    pub dir: PathBuf,
    /// Data of the image.
    pub data_mib: u64,
    /// Kills in each stage.
    pub kills_per_stage: u64,
    /// Determines contents, moments and pauses.
    pub seed: u64,
    /// A defect of the agent, which must be noticed.
    pub sabotage: Option<String>,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Report {
    /// Kills by stage and victim.
    pub kills: BTreeMap<(Stage, Victim), u64>,
    /// One line for each import: what it did, in numbers.
    pub imports: Vec<String>,
    /// Checkpoint windows of data that the largest upload had.
    pub windows: u64,
    /// Chunks that the store acknowledged and lost.
    pub lost: u64,
    /// What did not hold.
    pub violations: Vec<String>,
    /// Floors of the coverage that were not reached.
    pub below_floor: Vec<String>,
}

impl Report {
    /// The violations and missed floors; empty if all is well.
    pub fn failures(&self) -> Vec<String> {
        self.violations.iter().chain(&self.below_floor).cloned().collect()
    }

    fn check_floors(&mut self, options: &KillOptions) {
        // A defect is noticed by what it breaks, or not at all.
        if !self.violations.is_empty() || options.sabotage.is_some() {
            return;
        }
        for stage in Stage::ALL {
            let found: u64 =
                self.kills.iter().filter(|((at, _), _)| *at == stage).map(|(_, count)| count).sum();
            if found < options.kills_per_stage {
                let least = options.kills_per_stage;
                self.below_floor.push(format!("{found} kills in {stage}, at least {least} are needed"));
            }
        }
        if self.lost < LOST {
            self.below_floor.push(format!("the store has lost {} chunks, not {LOST}", self.lost));
        }
        for victim in Victim::ALL {
            let found: u64 =
                self.kills.iter().filter(|((_, who), _)| *who == victim).map(|(_, count)| count).sum();
            let least = options.kills_per_stage;
            if found < least {
                self.below_floor
                    .push(format!("{victim:?} was killed {found} times, at least {least} are needed"));
            }
        }
        if self.windows < 16 {
            self.below_floor.push(format!("{} windows of data, at least 16 are needed", self.windows));
        }
    }
}

/// Why the command could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum KillError {
    /// The images.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The site.
    #[error(transparent)]
    Site(#[from] SiteError),
    /// Something asked of it.
    #[error(transparent)]
    Drive(#[from] DriveError),
    /// The S3 server's faults.
    #[error(transparent)]
    Faults(#[from] FaultsError),
    /// A request log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The S3 server's files.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// A file of the run.
    #[error("failed to use {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The API server refused something.
    #[error("failed to {action}")]
    Request {
        /// What was asked for.
        action: &'static str,
        /// What it answered.
        source: kube::Error,
    },
}

/// One import, and the kills planned for it.
struct Plan<'a> {
    name: String,
    store: &'a str,
    file: &'a Path,
    /// Bytes per second that the source gives, if limited.
    rate: Option<u64>,
    kills: BTreeMap<Stage, u64>,
}

/// A run under way.
struct Run<'a> {
    options: &'a KillOptions,
    images: Images,
    site: Site,
    stages: StageWatch,
    ready: ReadyWatch,
    seeded: Seeded,
    before: Snapshot,
    /// What every import must come to.
    digest: Option<String>,
    /// Kills of the imports into each store, and the names that were published there.
    stores: BTreeMap<String, (u64, Vec<String>)>,
    /// Kills so far: they take turns.
    strikes: u64,
    report: Report,
}

/// Runs everything.
///
/// # Errors
/// [`KillError`]. What does not hold is no error: see [`Report::failures`].
pub async fn run(options: &KillOptions) -> Result<Report, KillError> {
    let (data_mib, seed) = (options.data_mib, options.seed);
    let made = tokio::task::spawn_blocking(move || images::obtain(data_mib, 1)).await;
    let images = made.expect("making an image does not panic")?;
    let mut site_options = SiteOptions::new(&options.dir);
    site_options.sabotage = options.sabotage.clone().map(|name| (Saboteur::Node, name));
    let site = Site::start(site_options).await?;
    drive::make_pool(&site, POOL, &format!("{}Mi", 3 * data_mib + 1024)).await?;
    for store in ["reference", "killed", "converted"] {
        drive::make_store(&site, NAMESPACE, store).await?;
    }
    let mut run = Run {
        options,
        images,
        stages: StageWatch::new(&site.nodes()[0].log()),
        ready: ReadyWatch::start(&site.client(), NAMESPACE, &site.dir().join("s3")),
        before: Snapshot::below(site.dir()),
        site,
        seeded: Seeded::new(seed),
        digest: None,
        stores: BTreeMap::new(),
        strikes: 0,
        report: Report::default(),
    };
    run.all().await?;
    run.report.check_floors(options);
    let left = run.site.stop();
    if !left.is_empty() {
        run.report.violations.push(format!("loop devices after the end: {left:?}"));
    }
    Ok(run.report)
}

impl Run<'_> {
    async fn all(&mut self) -> Result<(), KillError> {
        let Images { qcow2, vhdx, .. } = self.images.clone();
        self.import(Self::plan("reference", "reference", &qcow2)).await?;
        if !self.report.violations.is_empty() {
            return Ok(());
        }
        self.give_up_in_the_middle().await?;
        self.spoil_store()?;
        let mut wanted: BTreeMap<Stage, u64> = [Stage::Fetch, Stage::Upload, Stage::Verify, Stage::Publish]
            .into_iter()
            .map(|stage| (stage, self.options.kills_per_stage))
            .collect();
        for round in 0..MOST_ROUNDS {
            let mut plan = Self::plan(&format!("killed-{round}"), "killed", &qcow2);
            plan.rate = Some((self.images.data / (2 * self.options.kills_per_stage + 2)).max(8 << 20));
            plan.kills = wanted;
            wanted = self.import(plan).await?;
            if wanted.is_empty() || !self.report.violations.is_empty() {
                break;
            }
        }
        self.check_store("killed").await?;
        let mut wanted = BTreeMap::from([(Stage::Convert, self.options.kills_per_stage)]);
        for round in 0..MOST_ROUNDS {
            if !self.report.violations.is_empty() {
                break;
            }
            let mut plan = Self::plan(&format!("converted-{round}"), "converted", &vhdx);
            plan.kills = wanted;
            wanted = self.import(plan).await?;
            if wanted.is_empty() {
                break;
            }
        }
        self.check_store("converted").await?;
        self.check_store("reference").await?;
        self.check_node().await?;
        if self.report.violations.is_empty() {
            self.check_content("killed").await?;
        }
        Ok(())
    }

    fn plan<'a>(name: &str, store: &'a str, file: &'a Path) -> Plan<'a> {
        Plan { name: name.to_owned(), store, file, rate: None, kills: BTreeMap::new() }
    }

    /// Makes every stage at the S3 server long enough to be hit, and the server lose some chunks: further apart than what
    /// a kill lets come again by itself.
    fn spoil_store(&self) -> Result<(), KillError> {
        let delay = |op: &str, prefix: &str, ms: u64| {
            FaultRule::new(FaultAction::Delay { ms }).op(op).key_prefix(prefix)
        };
        let pages = self.images.data / (256 << 10) / 1000 + 1;
        let mut lose = FaultRule::new(FaultAction::Lose).op("PutObject").key_prefix("killed/chunks/");
        LOSE.clone_into(&mut lose.id);
        let rules = [
            lose.percent(1, self.options.seed).times(LOST),
            delay("PutObject", "killed/chunks/", 25),
            delay("ListObjectsV2", "killed/chunks/", 1500 / pages + 50),
            delay("PutObject", "killed/images/", 1000),
            delay("PutObject", "killed/manifests/", 500),
        ];
        Ok(write_rules(&self.site.dir().join("s3"), &rules)?)
    }

    /// Imports with the plan's kills, and compares what it comes to; returns the kills that did not happen.
    async fn import(&mut self, plan: Plan<'_>) -> Result<BTreeMap<Stage, u64>, KillError> {
        let url = self.serve(&plan)?;
        let began = Instant::now();
        self.request(&plan, &url).await?;
        let mut limit =
            IMPORT_LIMIT + KILL_LIMIT * u32::try_from(plan.kills.values().sum::<u64>()).unwrap_or(1);
        if self.options.sabotage.is_some() {
            limit = limit.min(IMPORT_LIMIT);
        }
        let planned: u64 = plan.kills.values().sum();
        let before = self.node_kills();
        let left = self.strike_until_ended(&plan, began + limit).await?;
        let node_kills = self.node_kills() - before;
        let struck = planned - left.values().sum::<u64>();
        let entry = self.stores.entry(plan.store.to_owned()).or_default();
        entry.0 += struck;
        entry.1.push(plan.name.clone());
        self.check_outcome(&plan, struck, node_kills, began.elapsed())?;
        self.stages.reset().map_err(|source| self.log_failed(source))?;
        Ok(left)
    }

    /// Puts the source where the file server finds it, under the import's name; returns its address.
    fn serve(&self, plan: &Plan<'_>) -> Result<String, KillError> {
        let target = self.site.files().join(&plan.name);
        let linked = fs::hard_link(plan.file, &target).or_else(|_| fs::copy(plan.file, &target).map(drop));
        linked.map_err(|source| KillError::File { path: target, source })?;
        let mood = plan.rate.map_or("plain".to_owned(), |rate| format!("slow/{rate}"));
        Ok(format!("{}/{mood}/{}", self.site.http(), plan.name))
    }

    async fn request(&self, plan: &Plan<'_>, url: &str) -> Result<(), KillError> {
        let import = json!({
            "apiVersion": "staging.berth.dev/v1alpha1", "kind": "TemplateImport",
            "metadata": { "name": plan.name, "namespace": NAMESPACE },
            "spec": {
                "source": { "http": { "url": url } }, "store": { "name": plan.store },
                "limits": { "retries": 20 },
            },
        });
        self.site.apply(&import.to_string()).await?;
        Ok(())
    }

    fn node_kills(&self) -> u64 {
        self.report.kills.iter().filter(|((_, who), _)| *who == Victim::Node).map(|(_, count)| count).sum()
    }

    fn log_failed(&self, source: io::Error) -> KillError {
        KillError::File { path: self.site.nodes()[0].log(), source }
    }

    fn violated(&mut self, what: String) {
        self.report.violations.push(what);
    }
}
