//! What the program under test is asked to do, and the lines in which it is asked: the only place that knows the form of an
//! operation and of its answer (`csi-node/src/operation.rs`).

use std::fmt;
use std::str::FromStr;

use serde_json::{Value, json};

use super::bed::{POOL_DEVICE, TEMPLATE_FILE};

/// The pool's name.
pub const POOL: &str = "crash";
/// The unit in which it hands out space. Unit: bytes.
pub const BLOCK: u64 = 64 << 10;

/// What can be cut: every operation that changes something, the start of the program, and writes to a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The start of the program, with all it takes up again.
    Start,
    /// `poolCreate`.
    PoolCreate,
    /// `poolGrow`.
    PoolGrow,
    /// `poolForget`.
    PoolForget,
    /// `poolIntroduce`.
    PoolIntroduce,
    /// `poolDestroy`.
    PoolDestroy,
    /// `templateAttach`.
    TemplateAttach,
    /// `templateDetach`.
    TemplateDetach,
    /// `volumeCreate`.
    VolumeCreate,
    /// `volumeClone`.
    VolumeClone,
    /// `volumeSnapshot`.
    VolumeSnapshot,
    /// `volumeAttach`.
    VolumeAttach,
    /// `volumeDetach`.
    VolumeDetach,
    /// `volumeResize`.
    VolumeResize,
    /// `volumeDestroy`.
    VolumeDestroy,
    /// Blocks written to a volume, and `fsync`.
    Write,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 16] = [
        Self::Start,
        Self::PoolCreate,
        Self::PoolGrow,
        Self::PoolForget,
        Self::PoolIntroduce,
        Self::PoolDestroy,
        Self::TemplateAttach,
        Self::TemplateDetach,
        Self::VolumeCreate,
        Self::VolumeClone,
        Self::VolumeSnapshot,
        Self::VolumeAttach,
        Self::VolumeDetach,
        Self::VolumeResize,
        Self::VolumeDestroy,
        Self::Write,
    ];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = format!("{self:?}");
        write!(f, "{}{}", name[..1].to_lowercase(), &name[1..])
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = || Self::ALL.map(|kind| kind.to_string()).join(", ");
        let found = Self::ALL.into_iter().find(|kind| kind.to_string() == text);
        found.ok_or_else(|| format!("no operation is called {text}; there are: {}", names()))
    }
}

/// Which kernel pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// That of images.
    Images,
    /// That of volumes.
    Volumes,
}

impl Class {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Images, Self::Volumes];

    /// As device mapper and the record spell it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Images => "images",
            Self::Volumes => "volumes",
        }
    }
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Make the pool of this UID.
    PoolCreate(String),
    /// Take over what was forgotten.
    PoolIntroduce(String),
    /// Let the pool go.
    PoolForget,
    /// Delete it with its volumes.
    PoolDestroy,
    /// Make a kernel pool at least so large. Unit: bytes.
    PoolGrow(Class, u64),
    /// Give the image file a device.
    TemplateAttach(String),
    /// Take it away.
    TemplateDetach(String),
    /// Make a volume of so many bytes, of zeros or of a template.
    Create {
        /// Its UID.
        volume: String,
        /// Unit: bytes.
        size: u64,
        /// The template's UID.
        template: Option<String>,
    },
    /// Make a volume that starts as another.
    Clone {
        /// Its UID.
        volume: String,
        /// The other.
        source: String,
    },
    /// Keep a volume as it is.
    Snapshot {
        /// The UID of the snapshot.
        snapshot: String,
        /// The volume.
        source: String,
    },
    /// Show a volume's device.
    Attach {
        /// Which.
        volume: String,
        /// Without writes.
        read_only: bool,
    },
    /// Take it away.
    Detach(String),
    /// Make a volume larger.
    Resize {
        /// Which.
        volume: String,
        /// Unit: bytes.
        size: u64,
    },
    /// Delete a volume.
    Destroy(String),
    /// Write stamped blocks of 4 KiB to an attached volume, and `fsync`.
    Write {
        /// Which.
        volume: String,
        /// The blocks.
        blocks: Vec<u64>,
        /// The number in their stamps.
        sequence: u64,
    },
    /// Read blocks of an attached volume.
    Read {
        /// Which.
        volume: String,
        /// The blocks.
        blocks: Vec<u64>,
    },
    /// Have the program compare its record with the kernel.
    Check,
    /// Look at everything with other programs.
    Look,
}

impl Step {
    /// What it counts as; nothing for what changes nothing.
    pub const fn kind(&self) -> Option<Kind> {
        Some(match self {
            Self::PoolCreate(_) => Kind::PoolCreate,
            Self::PoolIntroduce(_) => Kind::PoolIntroduce,
            Self::PoolForget => Kind::PoolForget,
            Self::PoolDestroy => Kind::PoolDestroy,
            Self::PoolGrow(..) => Kind::PoolGrow,
            Self::TemplateAttach(_) => Kind::TemplateAttach,
            Self::TemplateDetach(_) => Kind::TemplateDetach,
            Self::Create { .. } => Kind::VolumeCreate,
            Self::Clone { .. } => Kind::VolumeClone,
            Self::Snapshot { .. } => Kind::VolumeSnapshot,
            Self::Attach { .. } => Kind::VolumeAttach,
            Self::Detach(_) => Kind::VolumeDetach,
            Self::Resize { .. } => Kind::VolumeResize,
            Self::Destroy(_) => Kind::VolumeDestroy,
            Self::Write { .. } => Kind::Write,
            Self::Read { .. } | Self::Check | Self::Look => return None,
        })
    }

    /// Whether a refusal says that what it is to take away is gone.
    pub fn is_gone(&self, refusal: &str) -> bool {
        matches!(self, Self::TemplateDetach(_)) && refusal.starts_with("VolumeNotFound:")
    }

    /// The line of the player's script.
    pub fn line(&self, number: usize) -> String {
        let play = match self {
            Self::Write { volume, blocks, sequence } => {
                json!({"write": {"volume": volume, "blocks": blocks, "sequence": sequence}})
            }
            Self::Read { volume, blocks } => json!({"read": {"volume": volume, "blocks": blocks}}),
            Self::Look => json!("look"),
            asked => {
                let (volume, operation) = asked.operation();
                json!({"ask": {"operation": operation, "volume": volume}})
            }
        };
        json!({"number": number, "play": play}).to_string()
    }

    /// The operation, and the volume whose device its answer may name.
    fn operation(&self) -> (Option<&str>, Value) {
        let mut operation = match self {
            Self::PoolCreate(uid) => json!({"do": "poolCreate", "uid": uid, "backend": backend()}),
            Self::PoolIntroduce(uid) => json!({"do": "poolIntroduce", "area": uid, "backend": backend()}),
            Self::PoolForget => json!({"do": "poolForget"}),
            Self::PoolDestroy => json!({"do": "poolDestroy", "withContents": true}),
            Self::PoolGrow(class, size) => {
                json!({"do": "poolGrow", "class": format!("{class:?}"), "size": size})
            }
            Self::TemplateAttach(uid) => {
                json!({"do": "templateAttach", "template": uid, "file": TEMPLATE_FILE, "format": "raw"})
            }
            Self::TemplateDetach(uid) => json!({"do": "templateDetach", "template": uid}),
            Self::Create { volume, size, template } => {
                let origin = template.as_ref().map(|template| json!({"template": template}));
                json!({"do": "volumeCreate", "volume": volume, "size": size, "origin": origin})
            }
            Self::Clone { volume, source } => {
                json!({"do": "volumeClone", "volume": volume, "source": source})
            }
            Self::Snapshot { snapshot, source } => {
                json!({"do": "volumeSnapshot", "snapshot": snapshot, "source": source})
            }
            Self::Attach { volume, read_only } => {
                json!({"do": "volumeAttach", "volume": volume, "readOnly": read_only})
            }
            Self::Detach(volume) => json!({"do": "volumeDetach", "volume": volume}),
            Self::Resize { volume, size } => json!({"do": "volumeResize", "volume": volume, "size": size}),
            Self::Destroy(volume) => json!({"do": "volumeDestroy", "volume": volume}),
            Self::Check => json!({"do": "poolCheck"}),
            Self::Write { .. } | Self::Read { .. } | Self::Look => Value::Null,
        };
        operation["pool"] = POOL.into();
        let device = match self {
            Self::Attach { volume, .. } => Some(volume.as_str()),
            _ => None,
        };
        (device, operation)
    }
}

fn backend() -> Value {
    json!({"group": {"exclusive": {"devices": [POOL_DEVICE], "wipe": true}}, "block": BLOCK})
}

/// What the program answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It is done; findings if it was asked for them.
    Done(Vec<String>),
    /// It is not, and why.
    Refused(String),
}

impl Answer {
    /// Reads a line of the program; nothing if it is none.
    pub fn read(value: &Value) -> Option<Self> {
        if let Some(refusal) = value.get("refused") {
            let text = |name: &str| refusal[name].as_str().unwrap_or_default().to_owned();
            return Some(Self::Refused(format!("{}: {}", text("reason"), text("message"))));
        }
        let findings = value.get("done")?.get("findings").and_then(Value::as_array);
        let shown = |finding: &Value| finding["message"].as_str().unwrap_or("?").to_owned();
        Some(Self::Done(findings.map(|all| all.iter().map(shown).collect()).unwrap_or_default()))
    }

    /// The device that an answer names.
    pub fn device(value: &Value) -> Option<&str> {
        value.get("done")?.get("device")?.as_str()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_operation_with_its_pool_and_answers_are_read() {
        let step = Step::Create { volume: "v".into(), size: 5, template: Some("t".into()) };
        let line: Value = serde_json::from_str(&step.line(3)).unwrap();
        let asked = json!({"do": "volumeCreate", "pool": POOL, "volume": "v", "size": 5, "origin": {"template": "t"}});
        assert_eq!(line, json!({"number": 3, "play": {"ask": {"operation": asked, "volume": null}}}));
        assert_eq!(Kind::VolumeCreate.to_string(), "volumeCreate");
        let device = json!({"done": {"device": "/dev/x"}});
        assert_eq!(
            (Answer::read(&device), Answer::device(&device)),
            (Some(Answer::Done(vec![])), Some("/dev/x"))
        );
        let refused = json!({"refused": {"reason": "InUse", "message": "it is open"}});
        assert_eq!(Answer::read(&refused), Some(Answer::Refused("InUse: it is open".into())));
        assert_eq!(Answer::read(&json!({"done": "done"})), Some(Answer::Done(vec![])));
        assert_eq!(Answer::read(&json!({"findings": []})), None);
    }
}
