//! `crash`: power cuts at random moments of every operation on a node's pool.
//!
//! A machine (user-mode Linux) with one disk, on which everything of a node lies: its state, and a pool of the device mapper
//! with its volume group, its record and its two kernel pools. On it a *player* gives `berth-node batch` one operation after
//! another and writes to volumes. The power is cut while an operation whose turn it is is carried out. Then the disk may be
//! made anew from the log of what was written to it, as another disk could have been left by the same cut: without what no
//! flush had made safe, or with some of that. The machine is switched on again, and before the program runs, `thin_check`
//! looks at the metadata. The program starts; what was cut off is repeated or given up; and what `thin_dump`, `dmsetup`,
//! `lvs` and the dump of the record say then is compared with what was acknowledged, and nothing but that may be there.
//! The next cut comes on the same disk.
//!
//! Which disks a cut may leave, and why so: `docs/design/0015-crash.md`.

mod bed;
mod found;
mod history;
mod judge;
mod model;
mod plan;
mod player;
mod report;
mod schedule;
mod stamp;
mod step;
mod transcript;

use std::path::PathBuf;
use std::sync::Mutex;
use std::thread;

pub use self::bed::BedError;
use self::bed::{Cut, Programs};
use self::history::History;
pub use self::player::play;
pub use self::report::Report;
use self::schedule::Schedule;
pub use self::step::Kind;
use crate::seeded::Seeded;

/// Cuts on one disk; then there is a new one.
const PER_HISTORY: u64 = 16;

/// How often a disk is left in which way.
const WAYS: [Cut; 10] = [
    Cut::AsItWas,
    Cut::AsItWas,
    Cut::AsItWas,
    Cut::Lost,
    Cut::Lost,
    Cut::Reordered,
    Cut::Reordered,
    Cut::Reordered,
    Cut::Reordered,
    Cut::Failing,
];

/// What is asked for.
#[derive(Debug, Clone)]
pub struct CrashOptions {
    /// Everything lies below this folder.
    pub dir: PathBuf,
    /// Power cuts.
    pub cuts: u64,
    /// Determines operations, moments and disks.
    pub seed: u64,
    /// Machines at the same time.
    pub lanes: u64,
    /// A defect of the program, which must be noticed.
    pub sabotage: Option<String>,
    /// What is cut; everything if empty.
    pub only: Vec<Kind>,
    /// Tells what happens.
    pub verbose: bool,
}

/// A defect of the program that this command must notice, and where it is looked for.
struct Sabotage {
    name: &'static str,
    kinds: &'static [Kind],
    ways: &'static [Cut],
}

const SABOTAGES: &[Sabotage] = &[
    Sabotage { name: "no-intent", kinds: &[Kind::VolumeCreate], ways: &[Cut::AsItWas, Cut::Lost] },
    Sabotage {
        name: "ack-before-sync",
        kinds: &[Kind::VolumeCreate, Kind::VolumeResize, Kind::VolumeDestroy],
        ways: &[Cut::AsItWas, Cut::Lost],
    },
    Sabotage { name: "skip-transaction", kinds: &[Kind::VolumeCreate], ways: &[Cut::AsItWas] },
    Sabotage {
        name: "forget-before-delete",
        kinds: &[Kind::VolumeDestroy],
        ways: &[Cut::AsItWas, Cut::Lost],
    },
    Sabotage {
        name: "trust-half-made",
        kinds: &[Kind::VolumeCreate, Kind::VolumeSnapshot],
        ways: &[Cut::AsItWas, Cut::Reordered],
    },
    Sabotage { name: "attach-unrecorded", kinds: &[Kind::VolumeAttach, Kind::Write], ways: &[Cut::AsItWas] },
];

/// The names of the defects.
pub fn sabotages() -> Vec<&'static str> {
    SABOTAGES.iter().map(|sabotage| sabotage.name).collect()
}

/// Runs everything. Blocks.
///
/// # Errors
/// [`BedError`]. What does not hold is no error: see [`Report::failures`].
pub fn run(options: &CrashOptions) -> Result<Report, BedError> {
    let programs = Programs::obtain(options.sabotage.as_deref())?;
    let chosen = SABOTAGES.iter().find(|sabotage| options.sabotage.as_deref() == Some(sabotage.name));
    let (kinds, ways) = chosen.map_or((&Kind::ALL[..], &WAYS[..]), |one| (one.kinds, one.ways));
    let kinds = if options.only.is_empty() { kinds } else { &options.only[..] };
    let schedule = Mutex::new(Schedule::new(options.cuts, kinds, ways));
    let lanes: Vec<Result<Report, BedError>> = thread::scope(|scope| {
        let begin = |lane| {
            let (schedule, programs) = (&schedule, &programs);
            scope.spawn(move || run_lane(options, lane, programs, schedule))
        };
        let lanes: Vec<_> = (0..options.lanes).map(begin).collect();
        lanes.into_iter().map(|lane| lane.join().expect("a lane does not panic")).collect()
    });
    let mut report = Report::of(kinds);
    for lane in lanes {
        report.add(lane?);
    }
    Ok(report)
}

/// One history after another until all cuts are given.
fn run_lane(
    options: &CrashOptions,
    lane: u64,
    programs: &Programs,
    schedule: &Mutex<Schedule>,
) -> Result<Report, BedError> {
    let mut report = Report::default();
    let lock = || schedule.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut number = 0;
    while !lock().is_done() {
        let dir = options.dir.join(format!("{lane}-{number}"));
        let seed = Seeded::part(options.seed, 1000 * lane + number).draw();
        let mut history = History::new(&dir, programs.clone(), seed, schedule)?;
        history.verbose = options.verbose.then_some(lane);
        let ended = history.run(PER_HISTORY);
        if ended.is_err() || !history.report.failures.is_empty() {
            lock().stop();
            println!("history {lane}-{number}, seed {}:", options.seed);
            history.story().iter().for_each(|line| println!("  {line}"));
        }
        ended?;
        report.add(std::mem::take(&mut history.report));
        number += 1;
        if report.failures.is_empty() {
            drop(history);
            // Nobody needs what is left of it, and the next one needs the space.
            std::fs::remove_dir_all(&dir).ok();
        }
    }
    Ok(report)
}
