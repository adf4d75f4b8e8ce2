//! Names, keys and versions of what lies in a record.

use std::fmt;
use std::marker::PhantomData;

use berth_core::ids::{Digest, Lineage, NodeName, PoolName, Uid};
use berth_core::overcommit::Overcommit;
use redb::TableDefinition;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::entry::PromiseClass;

/// The version of the format that this program writes. Older ones are read, newer ones refused.
///
/// 2: snapshots among the volumes, and templates. 3: files for pods, which may be only copies. 4: images that are shown before
/// all of them is here.
pub const FORMAT_VERSION: u32 = 4;

/// Key of the format version in the header table: a JSON number, in every version.
pub(crate) const KEY_VERSION: &str = "format_version";
/// Key of the [`Owner`] in the header table.
pub(crate) const KEY_OWNER: &str = "owner";
/// Key of the [`PoolIdentity`] in the header table of a pool's record.
pub(crate) const KEY_POOL: &str = "pool";
/// Key of a pool's place in its ledger's history, in the header table.
pub(crate) const KEY_LEDGER: &str = "ledger";
/// Key of what was found damaged, in the header table. Its presence makes every later opening fail.
pub(crate) const KEY_DAMAGE: &str = "damage";

/// Header: text key to JSON value.
pub(crate) const HEADER: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("header");

/// Whose record it is. It is refused to anyone else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Owner {
    /// One pool's area on one node.
    Pool {
        /// The UID of the `StagingPool`.
        uid: Uid,
        /// The node.
        node: NodeName,
    },
    /// One node's agent.
    Node {
        /// The node.
        node: NodeName,
    },
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pool { uid, node } => write!(f, "pool {uid} on node {node}"),
            Self::Node { node } => write!(f, "node {node}"),
        }
    }
}

/// Which pool area this is. Written when the area is made, and when another pool takes it over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolIdentity {
    /// The UID of the `StagingPool`.
    pub pool_uid: Uid,
    /// Its name, for people and for recovery without an API server.
    pub pool_name: PoolName,
    /// The node.
    pub node: NodeName,
    /// A UUID of the area itself, new each time one is made.
    pub pool_id: String,
    /// The UID of the pool that the area was made for, where that is another one: everything on the disk is named after it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub area: Option<Uid>,
    /// What the area is made of, in the node's own form, for whoever finds the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_of: Option<serde_json::Value>,
}

impl PoolIdentity {
    /// The owner that a record with this identity has.
    pub fn owner(&self) -> Owner {
        Owner::Pool { uid: self.pool_uid.clone(), node: self.node.clone() }
    }

    /// The UID that everything on the area's disk is named after.
    pub fn area(&self) -> &Uid {
        self.area.as_ref().unwrap_or(&self.pool_uid)
    }
}

/// Saved form of a pool's place in its ledger's history.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedPosition {
    pub lineage: Option<Lineage>,
    pub revision: u64,
    #[serde(default)]
    pub overcommit: Overcommit,
}

/// What can be the key of a table: a text that reads back.
pub trait RecordKey: Sized {
    /// The text.
    fn to_text(&self) -> String;
    /// The key with this text, if there is one.
    fn from_text(text: &str) -> Option<Self>;
}

impl RecordKey for Uid {
    fn to_text(&self) -> String {
        self.0.clone()
    }
    fn from_text(text: &str) -> Option<Self> {
        Some(Self::from(text))
    }
}

impl RecordKey for Digest {
    fn to_text(&self) -> String {
        self.to_string()
    }
    fn from_text(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

impl RecordKey for PromiseClass {
    fn to_text(&self) -> String {
        match self {
            Self::Images => "images",
            Self::Volumes => "volumes",
        }
        .to_owned()
    }
    fn from_text(text: &str) -> Option<Self> {
        [Self::Images, Self::Volumes].into_iter().find(|class| class.to_text() == text)
    }
}

/// A table whose values are saved as JSON.
pub struct StructTable<K, V> {
    name: &'static str,
    types: PhantomData<fn() -> (K, V)>,
}

impl<K, V> Clone for StructTable<K, V> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<K, V> Copy for StructTable<K, V> {}

impl<K: RecordKey, V: Serialize + DeserializeOwned> StructTable<K, V> {
    const fn new(name: &'static str) -> Self {
        Self { name, types: PhantomData }
    }

    /// Its name in the file and in messages.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    pub(crate) const fn definition(&self) -> TableDefinition<'static, &'static str, &'static [u8]> {
        TableDefinition::new(self.name)
    }
}

/// The tables. All lie in a pool's record but [`JOBS`](tables::JOBS), which lies in the node's.
pub mod tables {
    use berth_core::units::Timestamp;

    use super::{Digest, StructTable, Uid};
    use crate::entry::{
        Attachment, FileEntry, ImageEntry, JobEntry, PromiseClass, PromiseEntry, StagingEntry, TemplateEntry,
        ThinCounters, ThinEntry, VolumeEntry,
    };

    /// Promises of the ledger, by holder.
    pub const PROMISES: StructTable<Uid, PromiseEntry> = StructTable::new("promises");
    /// Staged images.
    pub const IMAGES: StructTable<Digest, ImageEntry> = StructTable::new("images");
    /// Volumes, by reservation.
    pub const VOLUMES: StructTable<Uid, VolumeEntry> = StructTable::new("volumes");
    /// Volumes in use on this node, by reservation.
    pub const ATTACHMENTS: StructTable<Uid, Attachment> = StructTable::new("attachments");
    /// Space of transfers, by reservation.
    pub const STAGING: StructTable<Uid, StagingEntry> = StructTable::new("staging");
    /// Files for pods, by reservation.
    pub const FILES: StructTable<Uid, FileEntry> = StructTable::new("files");
    /// Thin devices, by the UID that each is named after. Only pools of the device mapper have any.
    pub const THIN: StructTable<Uid, ThinEntry> = StructTable::new("thin");
    /// Image files that are attached, by the UID that the device of each carries.
    pub const TEMPLATES: StructTable<Uid, TemplateEntry> = StructTable::new("templates");
    /// What the two kernel pools were last asked for.
    pub const THIN_COUNTERS: StructTable<PromiseClass, ThinCounters> = StructTable::new("thin_counters");
    /// When something last ceased to use what a reservation has, by the node's clock.
    pub const LAST_USED: StructTable<Uid, Timestamp> = StructTable::new("last_used");
    /// Work under way, by the object that asks for it.
    pub const JOBS: StructTable<Uid, JobEntry> = StructTable::new("jobs");
}
