//! `kill-transfers`: transfers whose operator, node agent and object store are killed (SIGKILL) at random moments of every
//! stage, by an object store that answers 503, breaks connections off and loses answers.
//!
//! One site with one image in an image store. Transfers come one after the other, of each kind in turn ([`routes`]), until
//! all kills have happened; every seventh is deleted under way. What holds is read from outside: the object store's request
//! log and files, the objects as `qemu-img` reads them, the node's folders.

mod checks;
mod routes;
mod strike;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;

use berth_testkit::s3::fault::{FaultAction, FaultRule, FaultsError, write_rules};
use berth_testkit::s3::log::LogError;

use self::routes::Route;
use crate::drive::{self, DriveError};
use crate::image::ImageError;
use crate::kill::images::{self, Images};
use crate::kill::stage::StageWatch;
use crate::kill::store_files::FilesError;
use crate::kill::{Stage, Victim};
use crate::seeded::Seeded;
use crate::site::{Saboteur, Site, SiteError, SiteOptions};

/// Where the transfers are made.
const NAMESPACE: &str = "default";
/// The pool that they stage in.
const POOL: &str = "work";
/// The image store that images come from, and the template in it.
const STORE: &str = "images";
const TEMPLATE: &str = "disk";
/// The image store that images go to.
const ARCHIVE: &str = "archive";
/// What a kill may cost: the distance between two checkpoints, and parts in flight. Unit: bytes.
pub const WINDOW: u64 = 32 << 20;
/// In which stages one transfer is struck, as far as it has them and kills are missing.
const STRIKES: [Stage; 5] = [Stage::Fetch, Stage::Upload, Stage::Verify, Stage::Publish, Stage::Upload];
/// One in so many transfers is deleted under way.
const DELETED: u64 = 7;

/// Defects of the node agent that this command must notice.
pub const SABOTAGES: &[&str] = &["ready-before-verified", "no-checkpoint", "stale-hash", "keep-upload"];

/// What is asked for.
#[derive(Debug, Clone)]
pub struct KillOptions {
    /// Everything lies below this folder.
    pub dir: PathBuf,
    /// Data of the image.
    pub data_mib: u64,
    /// Kills in all.
    pub kills: u64,
    /// Determines contents, moments, victims, pauses and faults.
    pub seed: u64,
    /// A defect of the agent, which must be noticed.
    pub sabotage: Option<String>,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Report {
    /// Kills by stage and victim.
    pub kills: BTreeMap<(Stage, Victim), u64>,
    /// Kills of transfers that came to the same image all the same, or left nothing where they were deleted.
    pub identical: u64,
    /// Of each transfer, how many windows each of its kills cost; the most of all, rounded up.
    pub repeated_windows_max: u64,
    /// Uploads, sessions, pins and files that are left.
    pub orphans: u64,
    /// One line for each transfer.
    pub transfers: Vec<String>,
    /// Transfers by route.
    pub routes: BTreeMap<&'static str, u64>,
    /// Faults that the object store committed, by kind.
    pub faults: BTreeMap<String, u64>,
    /// What did not hold.
    pub violations: Vec<String>,
    /// Floors of the coverage that were not reached.
    pub below_floor: Vec<String>,
}

impl Report {
    /// All kills.
    pub fn all_kills(&self) -> u64 {
        self.kills.values().sum()
    }

    /// The violations and missed floors; empty if all is well.
    pub fn failures(&self) -> Vec<String> {
        self.violations.iter().chain(&self.below_floor).cloned().collect()
    }

    fn check_floors(&mut self, options: &KillOptions) {
        // A defect is noticed by what it breaks, or not at all.
        if !self.violations.is_empty() || options.sabotage.is_some() {
            return;
        }
        let mut floor = |what: String, found: u64, least: u64| {
            if found < least {
                self.below_floor.push(format!("{what}: {found}, at least {least} are needed"));
            }
        };
        floor("kills".to_owned(), self.kills.values().sum(), options.kills);
        for stage in [Stage::Fetch, Stage::Upload, Stage::Verify, Stage::Publish] {
            let found = self.kills.iter().filter(|((at, _), _)| *at == stage).map(|(_, count)| count).sum();
            floor(format!("kills in {stage}"), found, options.kills / 20);
        }
        for victim in Victim::ALL {
            let found =
                self.kills.iter().filter(|((_, who), _)| *who == victim).map(|(_, count)| count).sum();
            floor(format!("kills of {victim:?}"), found, options.kills / 10);
        }
        for route in Route::ALL {
            let found = self.routes.get(route.name()).copied().unwrap_or_default();
            floor(format!("transfers {}", route.name()), found, 1);
        }
        for fault in ["busy", "reset", "lost"] {
            let found = self.faults.get(fault).copied().unwrap_or_default();
            floor(format!("faults `{fault}`"), found, options.kills / 20);
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

/// A run under way.
struct Run<'a> {
    options: &'a KillOptions,
    images: Images,
    site: Site,
    stages: StageWatch,
    seeded: Seeded,
    /// The digest of the image, and of the source as it was read.
    digest: String,
    /// Kills so far: victims take turns.
    strikes: u64,
    /// Bytes of chunks that the archive had received again before this transfer.
    chunks_again: u64,
    report: Report,
}

/// Runs everything.
///
/// # Errors
/// [`KillError`]. What does not hold is no error: see [`Report::failures`].
pub async fn run(options: &KillOptions) -> Result<Report, KillError> {
    let data_mib = options.data_mib;
    let made = tokio::task::spawn_blocking(move || images::obtain(data_mib, 1)).await;
    let images = made.expect("making an image does not panic")?;
    let mut site_options = SiteOptions::new(&options.dir);
    site_options.sabotage = options.sabotage.clone().map(|name| (Saboteur::Node, name));
    let site = Site::start(site_options).await?;
    drive::make_pool(&site, POOL, &format!("{}Mi", 3 * data_mib + 1024)).await?;
    for store in [STORE, ARCHIVE] {
        drive::make_store(&site, NAMESPACE, store).await?;
    }
    for (file, name) in [(&images.raw, "disk.raw"), (&images.qcow2, "disk.qcow2")] {
        let target = site.files().join(name);
        let linked = fs::hard_link(file, &target).or_else(|_| fs::copy(file, &target).map(drop));
        linked.map_err(|source| KillError::File { path: target, source })?;
    }
    let mut run = Run {
        options,
        images,
        stages: StageWatch::new(&site.nodes()[0].log()),
        site,
        seeded: Seeded::new(options.seed),
        digest: String::new(),
        strikes: 0,
        chunks_again: 0,
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
        self.digest = self.import().await?;
        self.spoil_store()?;
        let mut number = 0;
        while self.report.violations.is_empty() {
            let missing = self.options.kills.saturating_sub(self.report.all_kills());
            if missing == 0 && number >= Route::ALL.len() as u64 {
                break;
            }
            let route = Route::of(number);
            let deleted = number % DELETED == DELETED - 1;
            let mut left = BTreeMap::new();
            for stage in STRIKES.iter().take(usize::try_from(missing).unwrap_or(usize::MAX)) {
                *left.entry(*stage).or_default() += 1;
            }
            self.transfer(number, route, left, deleted).await?;
            number += 1;
            if number > 4 * self.options.kills + 20 {
                self.report.violations.push(format!("{number} transfers, and kills are still missing"));
            }
        }
        self.count_faults()?;
        write_rules(&self.site.dir().join("s3"), &[])?;
        self.check_nothing_left().await
    }

    async fn import(&self) -> Result<String, KillError> {
        let source = serde_json::json!({ "http": { "url": format!("{}/plain/disk.raw", self.site.http()) } });
        drive::import(&self.site, NAMESPACE, TEMPLATE, STORE, &source).await?;
        let limit = std::time::Duration::from_secs(300);
        let made = drive::wait_import(&self.site.client(), NAMESPACE, TEMPLATE, limit, |_| {}).await?;
        Ok(made.digest)
    }

    /// Makes every stage long enough to be hit, and the object store fail now and then in three ways.
    fn spoil_store(&self) -> Result<(), KillError> {
        let named = |id: &str, action: FaultAction| {
            let mut rule = FaultRule::new(action);
            id.clone_into(&mut rule.id);
            rule
        };
        let delay = |op: &str, ms: u64| FaultRule::new(FaultAction::Delay { ms }).op(op);
        let seed = self.options.seed;
        let rules = [
            named("busy", FaultAction::SlowDown).op("UploadPart").percent(8, seed),
            named("busy", FaultAction::SlowDown)
                .op("PutObject")
                .key_prefix("archive/chunks/")
                .percent(1, seed),
            named("reset", FaultAction::Reset { after_bytes: 1 << 20 }).op("UploadPart").percent(8, seed + 1),
            named("lost", FaultAction::LostResponse).op("UploadPart").percent(8, seed + 2),
            named("lost", FaultAction::LostResponse).op("CompleteMultipartUpload").percent(20, seed + 3),
            delay("UploadPart", 300),
            delay("ListParts", 700),
            delay("CompleteMultipartUpload", 700),
            delay("PutObject", 20).key_prefix("archive/chunks/"),
            delay("ListObjectsV2", 400).key_prefix("archive/chunks/"),
            delay("PutObject", 700).key_prefix("archive/images/"),
        ];
        Ok(write_rules(&self.site.dir().join("s3"), &rules)?)
    }

    fn violated(&mut self, what: String) {
        self.report.violations.push(what);
    }

    fn log_failed(&self, source: io::Error) -> KillError {
        KillError::File { path: self.site.nodes()[0].log(), source }
    }
}
