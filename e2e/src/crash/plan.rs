//! Which steps a run takes: those that settle what the cut before has left, some at random, and at last the one whose
//! turn it is to be cut.

use super::bed::TEMPLATE_SIZE;
use super::model::{Model, Pool};
use super::step::{Class, Kind, Step};
use crate::kernel::MIB;
use crate::seeded::Seeded;

/// Nothing becomes larger. Unit: bytes.
const LARGEST: u64 = 32 * MIB;
/// More steps are never needed to come to one of any kind.
const MOST: usize = 40;

/// Chooses steps; knows nothing but the model.
#[derive(Debug)]
pub struct Planner {
    seeded: Seeded,
    sequence: u64,
}

/// The steps of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Script {
    /// In their order.
    pub steps: Vec<Step>,
    /// The step to be cut; the start of the program if there is none.
    pub target: Option<usize>,
}

impl Planner {
    /// Equal generators give equal steps for equal models.
    pub fn new(seeded: Seeded) -> Self {
        Self { seeded, sequence: 0 }
    }

    /// A run that ends in a step of this kind, after what `settling` takes up `cut_off`, the step that was cut before.
    pub fn script(&mut self, model: &Model, cut_off: Option<&Step>, target: Kind) -> Script {
        let again = cut_off.and_then(Step::kind) == Some(target);
        let mut model = model.clone();
        let mut steps = self.settle(&mut model, cut_off);
        if target == Kind::Start {
            return Script { steps, target: None };
        }
        // What was cut may be cut again while it is repeated.
        if again && steps.first().and_then(Step::kind) == Some(target) && self.seeded.chance(40) {
            return Script { steps, target: Some(0) };
        }
        for _ in 0..self.seeded.between(0, 2) {
            self.filler(&mut model, &mut steps);
        }
        self.come_to(&mut model, &mut steps, target);
        let target = Some(steps.len() - 1);
        Script { steps, target }
    }

    /// The last run of a history: everything is read, nothing is cut.
    pub fn last(&mut self, model: &Model, cut_off: Option<&Step>) -> Script {
        let mut model = model.clone();
        let mut steps = self.settle(&mut model, cut_off);
        steps.pop();
        let all: Vec<_> = model.volumes.keys().cloned().collect();
        if model.open_pool().is_some() {
            for uid in &all {
                self.verify(&mut model, &mut steps, uid);
            }
        }
        steps.push(Step::Look);
        Script { steps, target: None }
    }

    /// Repeats what was cut off or gives it up, attaches again what is attached, reads some of what was written, and looks.
    fn settle(&mut self, model: &mut Model, cut_off: Option<&Step>) -> Vec<Step> {
        let mut steps = Vec::new();
        if let Some(step) = cut_off.and_then(|step| self.take_up(step)) {
            take(model, &mut steps, step);
        }
        if model.open_pool().is_none() {
            steps.push(Step::Look);
            return steps;
        }
        steps.push(Step::Check);
        let attached = model.volumes.iter().filter(|(_, volume)| volume.attached);
        let attached: Vec<_> = attached.map(|(uid, volume)| (uid.clone(), volume.snapshot)).collect();
        for (volume, read_only) in attached {
            take(model, &mut steps, Step::Attach { volume, read_only });
        }
        let interesting = concerned(cut_off).map(str::to_owned).into_iter();
        let mut known: Vec<String> = model.volumes.keys().cloned().collect();
        self.shuffle(&mut known);
        let mut chosen: Vec<String> = interesting.filter(|uid| model.volumes.contains_key(uid)).collect();
        chosen.extend(known.into_iter().take(2));
        chosen.sort();
        chosen.dedup();
        for uid in chosen {
            self.verify(model, &mut steps, &uid);
        }
        steps.push(Step::Look);
        steps
    }

    /// What is done about a step that was cut off: mostly the same again.
    fn take_up(&mut self, step: &Step) -> Option<Step> {
        match step {
            Step::Create { volume, .. }
            | Step::Clone { volume, .. }
            | Step::Snapshot { snapshot: volume, .. }
                if self.seeded.chance(40) =>
            {
                Some(Step::Destroy(volume.clone()))
            }
            Step::Write { .. } => None,
            other => other.kind().map(|_| other.clone()),
        }
    }

    /// Reads all that was written to a volume, and some of what was not.
    fn verify(&mut self, model: &mut Model, steps: &mut Vec<Step>, uid: &str) {
        let Some(volume) = model.volumes.get(uid).cloned() else { return };
        let mut blocks: Vec<u64> = volume.blocks.keys().copied().collect();
        blocks.extend((0..6).map(|_| self.seeded.between(0, volume.length() - 1)));
        blocks.sort_unstable();
        blocks.dedup();
        if !volume.attached {
            let attach = Step::Attach { volume: uid.to_owned(), read_only: volume.snapshot };
            take(model, steps, attach);
        }
        steps.push(Step::Read { volume: uid.to_owned(), blocks });
        if !volume.attached {
            take(model, steps, Step::Detach(uid.to_owned()));
        }
    }

    /// A step at random of what changes content, so that there is something to lose.
    fn filler(&mut self, model: &mut Model, steps: &mut Vec<Step>) {
        const KINDS: [Kind; 6] = [
            Kind::Write,
            Kind::Write,
            Kind::VolumeCreate,
            Kind::VolumeClone,
            Kind::VolumeSnapshot,
            Kind::VolumeAttach,
        ];
        let kind = KINDS[self.index(KINDS.len())];
        if model.allows(kind) {
            self.one(model, steps, kind);
        }
    }

    /// Steps that make one of this kind possible, and that one.
    fn come_to(&mut self, model: &mut Model, steps: &mut Vec<Step>, target: Kind) {
        for _ in 0..MOST {
            if model.allows(target) {
                break;
            }
            let next = before(model, target);
            self.one(model, steps, next);
        }
        self.one(model, steps, target);
    }

    /// A step of this kind, which the model allows.
    fn one(&mut self, model: &mut Model, steps: &mut Vec<Step>, kind: Kind) {
        if let Some(step) = self.step(model, kind) {
            take(model, steps, step);
        }
    }

    fn step(&mut self, model: &Model, kind: Kind) -> Option<Step> {
        let pool = || match &model.pool {
            Pool::Open(uid) | Pool::Forgotten(uid) => uid.clone(),
            Pool::None => String::new(),
        };
        Some(match kind {
            Kind::Start => return None,
            Kind::PoolCreate => Step::PoolCreate(self.uid()),
            Kind::PoolIntroduce => Step::PoolIntroduce(pool()),
            Kind::PoolForget => Step::PoolForget,
            Kind::PoolDestroy => Step::PoolDestroy,
            Kind::PoolGrow => {
                let class = Class::BOTH[self.index(2)];
                let old = model.grown.get(&class).copied().unwrap_or(16 * MIB);
                Step::PoolGrow(class, old + 4 * MIB * self.seeded.between(1, 3))
            }
            Kind::TemplateAttach => Step::TemplateAttach(self.uid()),
            Kind::TemplateDetach => Step::TemplateDetach(model.templates.first()?.clone()),
            Kind::VolumeCreate => {
                let template = model.templates.first().cloned().filter(|_| self.seeded.chance(50));
                let least = if template.is_some() { TEMPLATE_SIZE / MIB } else { 1 };
                Step::Create { volume: self.uid(), size: self.seeded.between(least, 16) * MIB, template }
            }
            Kind::VolumeClone => Step::Clone { volume: self.uid(), source: self.pick(model, |_| true)? },
            Kind::VolumeSnapshot => Step::Snapshot {
                snapshot: self.uid(),
                source: self.pick(model, |uid| !model.volumes[uid].snapshot)?,
            },
            Kind::VolumeAttach => {
                let volume = self.pick(model, |uid| !model.volumes[uid].attached)?;
                let read_only = model.volumes[&volume].snapshot;
                Step::Attach { volume, read_only }
            }
            Kind::VolumeDetach => Step::Detach(self.pick(model, |uid| model.volumes[uid].attached)?),
            Kind::VolumeResize => {
                let volume = self.pick(model, |uid| !model.volumes[uid].snapshot)?;
                let size = (model.volumes[&volume].size + self.seeded.between(1, 4) * MIB).min(LARGEST);
                Step::Resize { volume, size }
            }
            Kind::VolumeDestroy => Step::Destroy(self.destroyed(model)?),
            Kind::Write => {
                let fit = |uid: &str| model.volumes[uid].attached && !model.volumes[uid].snapshot;
                let volume = self.pick(model, fit)?;
                let length = model.volumes[&volume].length();
                let blocks = (0..self.seeded.between(2, 12)).map(|_| self.block(length)).collect();
                self.sequence += 1;
                Step::Write { volume, blocks, sequence: self.sequence }
            }
        })
    }

    /// Mostly near the beginning, so that clones and their sources write to the same.
    fn block(&mut self, length: u64) -> u64 {
        let end = if self.seeded.chance(70) { length.min(128) } else { length };
        self.seeded.between(0, end - 1)
    }

    /// One that is not attached; those of a template first, so that the template can go.
    fn destroyed(&mut self, model: &Model) -> Option<String> {
        let fit = |uid: &str| !model.volumes[uid].attached;
        let of_template = |uid: &str| fit(uid) && model.volumes[uid].template.is_some();
        self.pick(model, of_template).or_else(|| self.pick(model, fit))
    }

    fn pick(&mut self, model: &Model, fit: impl Fn(&str) -> bool) -> Option<String> {
        let fitting: Vec<_> = model.volumes.keys().filter(|uid| fit(uid)).collect();
        if fitting.is_empty() { None } else { Some(fitting[self.index(fitting.len())].clone()) }
    }

    fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.seeded.between(0, length as u64 - 1)).unwrap_or_default()
    }

    fn shuffle(&mut self, all: &mut [String]) {
        for last in (1..all.len()).rev() {
            all.swap(last, self.index(last + 1));
        }
    }

    fn uid(&mut self) -> String {
        let (high, low) = (self.seeded.draw(), self.seeded.draw());
        let digits = format!("{high:016x}{low:016x}");
        let part = |from: usize, to: usize| digits[from..to].to_owned();
        [part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32)].join("-")
    }
}

/// Adds a step, as if it were acknowledged.
fn take(model: &mut Model, steps: &mut Vec<Step>, step: Step) {
    model.apply(&step);
    steps.push(step);
}

/// The volume that a step is about.
fn concerned(step: Option<&Step>) -> Option<&str> {
    match step? {
        Step::Create { volume, .. }
        | Step::Clone { volume, .. }
        | Step::Snapshot { snapshot: volume, .. }
        | Step::Attach { volume, .. }
        | Step::Detach(volume)
        | Step::Resize { volume, .. }
        | Step::Write { volume, .. } => Some(volume),
        _ => None,
    }
}

/// What has to come first where a step of this kind is not possible.
fn before(model: &Model, target: Kind) -> Kind {
    let attached = model.volumes.values().any(|volume| volume.attached);
    match (&model.pool, target) {
        (Pool::None, _) => Kind::PoolCreate,
        (Pool::Forgotten(_), _) => Kind::PoolIntroduce,
        (Pool::Open(_), Kind::PoolCreate | Kind::PoolDestroy | Kind::PoolForget | Kind::PoolIntroduce) => {
            let template = model.volumes.values().any(|volume| volume.template.is_some());
            match target {
                _ if attached => Kind::VolumeDetach,
                _ if !model.templates.is_empty() && template => Kind::VolumeDestroy,
                _ if !model.templates.is_empty() => Kind::TemplateDetach,
                Kind::PoolCreate => Kind::PoolDestroy,
                _ => Kind::PoolForget,
            }
        }
        (Pool::Open(_), Kind::TemplateAttach) => {
            if model.volumes.values().any(|volume| volume.template.is_some()) {
                before_destroy(attached)
            } else {
                Kind::TemplateDetach
            }
        }
        (Pool::Open(_), Kind::TemplateDetach) => {
            if model.templates.is_empty() {
                Kind::TemplateAttach
            } else {
                before_destroy(attached)
            }
        }
        (Pool::Open(_), Kind::VolumeDetach | Kind::Write) if !model.allows(Kind::VolumeAttach) => {
            if model.allows(Kind::VolumeCreate) { Kind::VolumeCreate } else { before_destroy(attached) }
        }
        (Pool::Open(_), Kind::VolumeDetach | Kind::Write) => Kind::VolumeAttach,
        (Pool::Open(_), Kind::VolumeAttach | Kind::VolumeDestroy) if attached => Kind::VolumeDetach,
        (Pool::Open(_), _) if model.allows(Kind::VolumeCreate) => Kind::VolumeCreate,
        (Pool::Open(_), _) => before_destroy(attached),
    }
}

fn before_destroy(attached: bool) -> Kind {
    if attached { Kind::VolumeDetach } else { Kind::VolumeDestroy }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn every_kind_is_come_to_from_wherever_a_history_is() {
        let mut planner = Planner::new(Seeded::new(3));
        let (mut model, mut cut_off) = (Model::default(), None);
        let mut seen: BTreeMap<Kind, u64> = BTreeMap::new();
        let mut order = Seeded::new(5);
        for _ in 0..800 {
            let wanted = usize::try_from(order.between(0, Kind::ALL.len() as u64 - 1)).unwrap();
            let target = Kind::ALL[wanted];
            let script = planner.script(&model, cut_off.as_ref(), target);
            assert!(script.steps.len() < 2 * MOST, "{script:?}");
            let last = script.target.map(|at| script.steps[at].clone());
            assert_eq!(last.as_ref().and_then(Step::kind).unwrap_or(Kind::Start), target);
            let end = script.target.unwrap_or(0);
            for step in &script.steps[..end] {
                let (kind, settled) = (step.kind(), matches!(step, Step::Attach { .. }));
                // What is attached is attached again, and what was cut off repeated, whatever the model says.
                let repeated = cut_off.as_ref() == Some(step) || matches!(step, Step::Destroy(_));
                let allowed = kind.is_none_or(|kind| model.allows(kind)) || settled || repeated;
                assert!(allowed, "{step:?}");
                model.apply(step);
            }
            let last = last.or(if end == 0 && script.target.is_none() { cut_off.clone() } else { None });
            cut_off = if order.chance(80) {
                last
            } else {
                if let Some(step) = last {
                    model.apply(&step);
                }
                None
            };
            *seen.entry(target).or_default() += 1;
        }
        assert_eq!(seen.len(), Kind::ALL.len(), "{seen:?}");
    }
}
