//! One history: a new disk, and one cut after another on it.

use std::path::Path;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use super::bed::{Bed, BedError, Cut, Programs, Staged};
use super::judge::{Failure, Total};
use super::model::{Model, Pool};
use super::plan::{Planner, Script};
use super::player::Said;
use super::report::Report;
use super::schedule::Schedule;
use super::step::{Kind, Step};
use super::transcript::{self, Outcome};
use crate::kernel::Running;
use crate::seeded::Seeded;

/// How long a run may take until the step to be cut begins, and that step, on a busy machine.
const RUN_LIMIT: Duration = Duration::from_secs(300);
/// How often its output is looked at.
const LOOK: Duration = Duration::from_millis(4);
/// How long the disk refuses writes before the cut, at most. Unit: milliseconds.
const FAILING: u64 = 2500;

/// A history under way.
pub struct History<'a> {
    bed: Bed,
    planner: Planner,
    seeded: Seeded,
    schedule: &'a Mutex<Schedule>,
    model: Model,
    cut_off: Option<Step>,
    /// What happened, for whoever has to find out why it failed.
    story: Vec<String>,
    began: Instant,
    /// Tells it at once as well, under this number.
    pub verbose: Option<u64>,
    /// What was done.
    pub report: Report,
}

impl<'a> History<'a> {
    /// On a new disk in `dir`.
    ///
    /// # Errors
    /// [`BedError`].
    pub fn new(
        dir: &Path,
        programs: Programs,
        seed: u64,
        schedule: &'a Mutex<Schedule>,
    ) -> Result<Self, BedError> {
        Ok(Self {
            bed: Bed::new(dir, programs)?,
            planner: Planner::new(Seeded::part(seed, 1)),
            seeded: Seeded::part(seed, 2),
            schedule,
            model: Model::default(),
            cut_off: None,
            story: Vec::new(),
            began: Instant::now(),
            verbose: None,
            report: Report::default(),
        })
    }

    /// Cuts up to `most` times, and then looks once more without a cut. Ends at the first failure, or when no more cuts are
    /// wanted.
    ///
    /// # Errors
    /// [`BedError`]. What does not hold is in the report.
    pub fn run(&mut self, most: u64) -> Result<(), BedError> {
        for _ in 0..most {
            let ready = |kind| kind == Kind::PoolCreate || self.model.pool != Pool::None;
            let next = self.schedule().next(&mut self.seeded.clone(), ready);
            let Some((kind, cut)) = next else { break };
            self.seeded.draw();
            self.cut_once(kind, cut)?;
            if !self.report.failures.is_empty() {
                break;
            }
        }
        if self.report.failures.is_empty() {
            self.look_at_last()?;
        }
        self.report.machine = self.bed.description();
        self.bed.cut();
        Ok(())
    }

    /// How it came to this, a line each.
    pub fn story(&self) -> &[String] {
        &self.story
    }

    fn schedule(&self) -> std::sync::MutexGuard<'_, Schedule> {
        self.schedule.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// One run that ends in a cut.
    fn cut_once(&mut self, kind: Kind, cut: Cut) -> Result<(), BedError> {
        let script = self.planner.script(&self.model, self.cut_off.as_ref(), kind);
        if !self.switch_on()? {
            return Ok(());
        }
        self.tell(&format!("a run of {} steps, cut in {kind}, disk {cut:?}", script.steps.len()));
        self.tell("it is on, and was looked at");
        let playing = self.bed.play(lines(&script))?;
        let refusing = self.cut_in(&playing, &script, kind, cut)?;
        self.bed.cut();
        let said = transcript::read(&playing.stdout()?);
        self.note_times(&script, &said);
        let refusable = refusing.then(|| script.target.unwrap_or_default());
        let real = transcript::take(&self.model, &script.steps, &said, |_| true, refusable);
        self.report.cuts += 1;
        *self.report.kinds.entry(kind).or_default() += 1;
        *self.report.ways.entry(cut).or_default() += 1;
        let (mut outcome, mut answered) = (real, ended(&said, script.target));
        if !outcome.failures.is_empty() {
            self.report.failures.append(&mut outcome.failures);
            self.tell_all(&script, &said, &playing);
            return Ok(());
        }
        if cut.is_replay() {
            let remade = self.bed.remake(script.target, cut, &mut self.seeded)?;
            let lost = remade.replayed.lost;
            self.report.losses.0 += u64::from(lost > 0);
            self.report.losses.1 += lost;
            answered = remade.ended.contains(&script.target.unwrap_or_default());
            let counts = |number| remade.ended.contains(&number);
            let (acknowledged, compared) = (outcome.acknowledged, outcome.compared);
            outcome = transcript::take(&self.model, &script.steps, &said, counts, refusable);
            (outcome.acknowledged, outcome.compared) = (acknowledged, compared);
            self.tell(&format!("the disk has {} writes and lost {lost}", remade.replayed.kept));
        }
        let inside = if script.target.is_some() { outcome.cut_off.is_some() } else { !answered };
        if inside {
            *self.report.inside.entry(kind).or_default() += 1;
        }
        self.accept(outcome, script.target.is_none());
        Ok(())
    }

    /// Takes over what a run has come to.
    fn accept(&mut self, outcome: Outcome, in_start: bool) {
        self.report.acknowledged += outcome.acknowledged;
        self.report.compared += outcome.compared;
        self.model = outcome.model;
        // Cut in the start, what was cut off before still is, unless something else is by now.
        if !(in_start && outcome.cut_off.is_none() && outcome.acknowledged == 0) {
            self.cut_off = outcome.cut_off;
        }
        let cut_off = format!("{:?}", self.cut_off);
        self.tell(&format!("cut off: {cut_off}"));
    }

    /// Waits for the moment of the cut; returns whether the disk refuses writes then.
    fn cut_in(&mut self, playing: &Running, script: &Script, kind: Kind, cut: Cut) -> Result<bool, BedError> {
        let deadline = Instant::now() + RUN_LIMIT;
        let said = |playing: &Running| Ok::<_, BedError>(transcript::read(&playing.stdout()?));
        let hopeless = |said: &[Said]| said.iter().any(|line| matches!(line, Said::Ended(_)));
        loop {
            let now = said(playing)?;
            if begun(&now, script.target) {
                break;
            }
            if hopeless(&now) || Instant::now() > deadline || playing.ends_within(Duration::ZERO) {
                self.late(&now, deadline);
                return Ok(false);
            }
            thread::sleep(LOOK);
        }
        let usual = self.schedule().usual(kind);
        let pause = Duration::from_millis(self.seeded.between(0, usual));
        if cut.is_replay() {
            // The moment is chosen in the log.
            while !ended(&said(playing)?, script.target)
                && Instant::now() < deadline
                && !hopeless(&said(playing)?)
            {
                thread::sleep(LOOK);
            }
            let now = said(playing)?;
            self.late(&now, deadline);
            thread::sleep(self.seeded.millis(0, 150));
            return Ok(false);
        }
        thread::sleep(pause);
        if cut == Cut::Failing {
            self.bed.refuse_writes()?;
            // Nothing more is to begin that could be refused.
            let end = Instant::now() + self.seeded.millis(0, FAILING);
            while Instant::now() < end && !ended(&said(playing)?, script.target) {
                thread::sleep(LOOK);
            }
        }
        Ok(cut == Cut::Failing)
    }

    fn late(&mut self, said: &[Said], deadline: Instant) {
        if Instant::now() > deadline {
            let what = format!("nothing happens any more after {:?}", said.last());
            self.report.failures.push(Failure { total: Total::Other, what });
        }
    }

    /// Switches on and looks; false if what it finds is a failure already.
    fn switch_on(&mut self) -> Result<bool, BedError> {
        let Staged { checked, bad, unreadable, record } = self.bed.boot()?;
        self.report.checked += checked;
        self.report.recoveries += u64::from(record.as_ref().is_some_and(half_done));
        for volume in bad {
            let what = format!("thin_check refuses {volume}");
            self.report.failures.push(Failure { total: Total::ThinCheckBad, what });
        }
        if let Some(said) = unreadable {
            let what = format!("LVM cannot read the pool's device: {said}");
            self.report.failures.push(Failure { total: Total::LostAcknowledged, what });
        }
        if !self.report.failures.is_empty() {
            self.report.cuts += 1;
        }
        Ok(self.report.failures.is_empty())
    }

    /// A run without a cut, to its end.
    fn look_at_last(&mut self) -> Result<(), BedError> {
        let script = self.planner.last(&self.model, self.cut_off.as_ref());
        if !self.switch_on()? {
            return Ok(());
        }
        let playing = self.bed.play(lines(&script))?;
        let deadline = Instant::now() + RUN_LIMIT;
        let last = script.steps.len() - 1;
        let said = loop {
            let said = transcript::read(&playing.stdout()?);
            if ended(&said, Some(last)) || said.iter().any(|line| matches!(line, Said::Ended(_))) {
                break said;
            }
            if Instant::now() > deadline {
                self.late(&said, deadline);
                break said;
            }
            thread::sleep(LOOK);
        };
        let mut outcome = transcript::take(&self.model, &script.steps, &said, |_| true, None);
        if !outcome.failures.is_empty() {
            self.tell_all(&script, &said, &playing);
        }
        self.report.failures.append(&mut outcome.failures);
        self.accept(outcome, false);
        Ok(())
    }

    /// Remembers how long each step took.
    fn note_times(&self, script: &Script, said: &[Said]) {
        let mut schedule = self.schedule();
        for line in said {
            if let Said::Took(number, millis) = line {
                let kind = script.steps.get(*number).and_then(Step::kind).filter(|_| *number > 0);
                let kind = kind.or((*number == 0).then_some(Kind::Start));
                if let Some(kind) = kind {
                    schedule.took(kind, *millis);
                }
            }
        }
    }

    fn tell(&mut self, what: &str) {
        let what = format!("{:5.1} s: {what}", self.began.elapsed().as_secs_f64());
        if let Some(lane) = self.verbose {
            eprintln!("{lane}: {what}");
        }
        self.story.push(what);
    }

    fn tell_all(&mut self, script: &Script, said: &[Said], playing: &Running) {
        let steps: Vec<_> =
            script.steps.iter().enumerate().map(|(number, step)| format!("  {number}: {step:?}")).collect();
        self.story.extend(steps);
        for line in said.iter().filter(|line| !matches!(line, Said::Took(..) | Said::Begun(_))) {
            let text = format!("  {line:?}").replace("\\n", "\n    ");
            self.story.extend(text.lines().map(str::to_owned));
        }
        let errors = playing.stderr().unwrap_or_default();
        self.story.push(String::from_utf8_lossy(&errors).into_owned());
    }
}

fn lines(script: &Script) -> String {
    let lines = script.steps.iter().enumerate();
    lines.map(|(number, step)| step.line(number) + "\n").collect()
}

fn begun(said: &[Said], target: Option<usize>) -> bool {
    said.iter().any(|line| match (target, line) {
        (None, Said::Started) => true,
        (Some(target), Said::Begun(number)) => *number == target,
        _ => false,
    })
}

/// Whether the step to be cut has come to its end; for the start, the first step.
fn ended(said: &[Said], target: Option<usize>) -> bool {
    let target = target.unwrap_or_default();
    said.iter().any(|line| match line {
        Said::Answered(number, _)
        | Said::Written(number)
        | Said::NotWritten(number, _)
        | Said::Held(number, _)
        | Said::NotRead(number, _)
        | Said::Seen(number, _) => *number == target,
        Said::Started | Said::Begun(_) | Said::Took(..) | Said::Ended(_) => false,
    })
}

/// Whether a record speaks of something that was begun and not ended.
fn half_done(record: &serde_json::Value) -> bool {
    const STATES: [&str; 7] =
        ["Making", "Removing", "Creating", "Deleting", "Attaching", "Detaching", "Resizing"];
    let tables = record["tables"].as_object();
    let rows = tables.into_iter().flat_map(|tables| tables.values()).filter_map(|rows| rows.as_object());
    rows.flat_map(|rows| rows.values())
        .any(|row| row["state"].as_str().is_some_and(|state| STATES.contains(&state)))
}
