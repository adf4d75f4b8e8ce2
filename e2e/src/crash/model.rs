//! What must be there: everything that was acknowledged, and nothing else.

use std::collections::{BTreeMap, BTreeSet};

use super::bed::TEMPLATE_SIZE;
use super::stamp::{BLOCK, Content};
use super::step::{Class, Kind, Step};

/// How the pool is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Pool {
    /// There is none.
    #[default]
    None,
    /// It is open. Its UID.
    Open(String),
    /// It lies on the disk, and is no pool of the node.
    Forgotten(String),
}

/// A volume or snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// It refuses writes.
    pub snapshot: bool,
    /// Unit: bytes.
    pub size: u64,
    /// The template it started from, or its source did.
    pub template: Option<String>,
    /// It has a device.
    pub attached: bool,
    /// What a block may hold where it is not what it started with. More than one content: a write of it was cut off.
    pub blocks: BTreeMap<u64, Vec<Content>>,
}

impl Volume {
    /// What this block may hold.
    pub fn may_hold(&self, block: u64) -> Vec<Content> {
        self.blocks.get(&block).cloned().unwrap_or_else(|| vec![self.untouched(block)])
    }

    fn untouched(&self, block: u64) -> Content {
        if self.template.is_some() && block < TEMPLATE_SIZE / BLOCK as u64 {
            Content::Template(block)
        } else {
            Content::Zero
        }
    }

    /// How many blocks it has.
    pub const fn length(&self) -> u64 {
        self.size / BLOCK as u64
    }
}

/// Everything that was acknowledged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Model {
    /// The pool.
    pub pool: Pool,
    /// Volumes and snapshots by UID.
    pub volumes: BTreeMap<String, Volume>,
    /// Templates that are attached.
    pub templates: BTreeSet<String>,
    /// Volumes that were destroyed.
    pub gone: BTreeSet<String>,
    /// How large a kernel pool was made at least. Unit: bytes.
    pub grown: BTreeMap<Class, u64>,
}

impl Model {
    /// The UID of the open pool.
    pub fn open_pool(&self) -> Option<&str> {
        match &self.pool {
            Pool::Open(uid) => Some(uid),
            Pool::None | Pool::Forgotten(_) => None,
        }
    }

    /// Takes in what was acknowledged.
    pub fn apply(&mut self, step: &Step) {
        match step {
            Step::PoolCreate(uid) => *self = Self { pool: Pool::Open(uid.clone()), ..Self::default() },
            Step::PoolIntroduce(uid) => self.pool = Pool::Open(uid.clone()),
            Step::PoolForget => {
                if let Some(uid) = self.open_pool() {
                    self.pool = Pool::Forgotten(uid.to_owned());
                }
            }
            Step::PoolDestroy => *self = Self::default(),
            Step::PoolGrow(class, size) => {
                self.grown.insert(*class, *size);
            }
            Step::TemplateAttach(uid) => {
                self.templates.insert(uid.clone());
            }
            Step::TemplateDetach(uid) => {
                self.templates.remove(uid);
            }
            Step::Destroy(uid) => {
                self.volumes.remove(uid);
                self.gone.insert(uid.clone());
            }
            Step::Create { .. } | Step::Clone { .. } | Step::Snapshot { .. } => self.add(step),
            Step::Attach { .. } | Step::Detach(_) | Step::Resize { .. } | Step::Write { .. } => {
                self.change(step);
            }
            Step::Read { .. } | Step::Check | Step::Look => {}
        }
    }

    fn add(&mut self, step: &Step) {
        let (uid, volume) = match step {
            Step::Create { volume, size, template } => {
                let (template, blocks) = (template.clone(), BTreeMap::new());
                (volume, Volume { snapshot: false, size: *size, template, attached: false, blocks })
            }
            Step::Clone { volume: uid, source } | Step::Snapshot { snapshot: uid, source } => {
                let Some(source) = self.volumes.get(source) else { return };
                let snapshot = matches!(step, Step::Snapshot { .. });
                (uid, Volume { snapshot, attached: false, ..source.clone() })
            }
            _ => return,
        };
        self.volumes.insert(uid.clone(), volume);
    }

    fn change(&mut self, step: &Step) {
        let (Step::Attach { volume: uid, .. }
        | Step::Detach(uid)
        | Step::Resize { volume: uid, .. }
        | Step::Write { volume: uid, .. }) = step
        else {
            return;
        };
        let Some(volume) = self.volumes.get_mut(uid) else { return };
        match step {
            Step::Attach { .. } => volume.attached = true,
            Step::Detach(_) => volume.attached = false,
            Step::Resize { size, .. } => volume.size = *size,
            Step::Write { blocks, sequence, .. } => {
                for block in blocks {
                    volume.blocks.insert(*block, vec![stamp(uid, *block, *sequence)]);
                }
            }
            _ => {}
        }
    }

    /// Takes in that a write was cut off: each of its blocks is as it was, or new.
    pub fn cut_off(&mut self, step: &Step) {
        if let Step::Write { volume: uid, blocks, sequence } = step
            && let Some(volume) = self.volumes.get_mut(uid)
        {
            for block in blocks {
                let mut may = volume.may_hold(*block);
                may.push(stamp(uid, *block, *sequence));
                volume.blocks.insert(*block, may);
            }
        }
    }

    /// Takes in what was read; what does not agree is returned.
    pub fn read(&mut self, uid: &str, held: &[(u64, Content)]) -> Vec<String> {
        let Some(volume) = self.volumes.get_mut(uid) else { return Vec::new() };
        let mut wrong = Vec::new();
        for (block, content) in held {
            let may = volume.may_hold(*block);
            if may.contains(content) {
                if may.len() > 1 {
                    volume.blocks.insert(*block, vec![content.clone()]);
                }
            } else {
                let may: Vec<_> = may.iter().map(Content::to_string).collect();
                wrong.push(format!(
                    "block {block} of volume {uid} holds {content}, and not {}",
                    may.join(" or ")
                ));
            }
        }
        wrong
    }

    /// Whether a step can be asked for now and is to be done.
    pub fn allows(&self, kind: Kind) -> bool {
        let some = |wanted: &dyn Fn(&Volume) -> bool| self.volumes.values().any(wanted);
        let open = self.open_pool().is_some();
        match kind {
            Kind::Start | Kind::PoolGrow => open,
            Kind::VolumeCreate => open && self.volumes.len() < MOST_VOLUMES,
            Kind::PoolCreate => self.pool == Pool::None,
            Kind::PoolIntroduce => matches!(self.pool, Pool::Forgotten(_)),
            Kind::PoolForget | Kind::PoolDestroy => {
                open && self.templates.is_empty() && !some(&|volume| volume.attached)
            }
            Kind::TemplateAttach => open && self.templates.is_empty(),
            Kind::TemplateDetach => {
                open && !self.templates.is_empty() && !some(&|volume| volume.template.is_some())
            }
            Kind::VolumeClone => open && !self.volumes.is_empty() && self.volumes.len() < MOST_VOLUMES,
            Kind::VolumeSnapshot => {
                open && some(&|volume| !volume.snapshot) && self.volumes.len() < MOST_VOLUMES
            }
            Kind::VolumeAttach | Kind::VolumeDestroy => open && some(&|volume| !volume.attached),
            Kind::VolumeDetach => open && some(&|volume| volume.attached),
            Kind::VolumeResize => open && some(&|volume| !volume.snapshot),
            Kind::Write => open && some(&|volume| volume.attached && !volume.snapshot),
        }
    }
}

/// More than these are not made.
const MOST_VOLUMES: usize = 6;

fn stamp(volume: &str, block: u64, sequence: u64) -> Content {
    Content::Stamp { volume: volume.to_owned(), block, sequence }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn create(volume: &str) -> Step {
        Step::Create { volume: volume.into(), size: 1 << 20, template: Some("t".into()) }
    }

    fn write(volume: &str, sequence: u64) -> Step {
        Step::Write { volume: volume.into(), blocks: vec![3], sequence }
    }

    #[test]
    fn a_clone_keeps_what_its_source_held_and_a_cut_write_may_be_either() {
        let mut model = Model { pool: Pool::Open("p".into()), ..Model::default() };
        model.apply(&create("a"));
        model.apply(&write("a", 1));
        model.apply(&Step::Clone { volume: "b".into(), source: "a".into() });
        model.apply(&write("a", 2));
        model.cut_off(&write("a", 3));
        let held = |sequence| stamp("a", 3, sequence);
        assert_eq!(model.volumes["b"].may_hold(3), [held(1)]);
        assert_eq!(model.volumes["b"].may_hold(4), [Content::Template(4)]);
        assert_eq!(model.read("a", &[(3, held(1))]).len(), 1, "neither the old nor the new one");
        assert!(model.read("a", &[(3, held(3))]).is_empty());
        assert_eq!(model.volumes["a"].may_hold(3), [held(3)], "what was read once stays");
        assert_eq!(model.read("b", &[(3, Content::Zero)]).len(), 1);
        assert!(model.read("b", &[(3, held(1))]).is_empty());
    }

    #[test]
    fn what_was_destroyed_is_remembered_and_a_new_pool_begins_with_nothing() {
        let mut model = Model::default();
        assert!(model.allows(Kind::PoolCreate) && !model.allows(Kind::VolumeCreate));
        model.apply(&Step::PoolCreate("p".into()));
        model.apply(&create("a"));
        model.apply(&Step::Destroy("a".into()));
        assert!(model.volumes.is_empty() && model.gone.contains("a"));
        model.apply(&Step::PoolForget);
        assert!(model.allows(Kind::PoolIntroduce) && !model.allows(Kind::PoolDestroy));
        model.apply(&Step::PoolIntroduce("p".into()));
        model.apply(&Step::PoolDestroy);
        assert_eq!(model, Model::default());
    }
}
