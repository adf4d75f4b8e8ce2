//! `StagingNode`: what one node's agent reports. Its status is written by that node alone.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::staging_ledger::LedgerPromise;

/// Which node.
#[derive(CustomResource, Clone, Debug, Deserialize, Serialize, KubeSchema)]
#[kube(
    group = "staging.berth.dev",
    version = "v1alpha1",
    kind = "StagingNode",
    shortname = "stgnode",
    category = "berth",
    status = "StagingNodeStatus",
    doc = "What one node's agent reports. Written by Berth itself.",
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason"
    ),
    printcolumn(name = "Pools", type_ = "string", json_path = ".status.pools[*].name"),
    printcolumn(name = "Version", type_ = "string", json_path = ".status.versions.agent"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[x_kube(validation = Rule::new("self == oldSelf").message("spec: immutable"))]
#[serde(rename_all = "camelCase")]
pub struct StagingNodeSpec {
    /// The Kubernetes node.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
}

/// What the node reports.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct StagingNodeStatus {
    /// The pools on it.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub pools: Vec<NodePool>,
    /// What the agent needs of the node, and whether it is there.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub preflight: Vec<PreflightCheck>,
    /// The value of the Kubernetes node's label `topology.kubernetes.io/zone`, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Versions of what matters.
    #[serde(default)]
    pub versions: Versions,
    /// `Ready`.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// One pool on the node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodePool {
    /// The pool's name.
    pub name: String,
    /// The UID of the `StagingPool` that the area belongs to.
    #[serde(default)]
    pub uid: String,
    /// True if the area is there and can be used.
    pub usable: bool,
    /// Why, one of the documented reasons.
    pub reason: String,
    /// For people.
    #[serde(default)]
    pub message: String,
    /// What may be promised here, in bytes.
    #[serde(default)]
    pub total_bytes: i64,
    /// What is written here, in bytes.
    #[serde(default)]
    pub used_bytes: i64,
    /// True if the bound is not enforced.
    #[serde(default)]
    pub advisory: bool,
    /// The two thin pools of the device mapper; absent where the backend has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thin: Option<ThinPools>,
    /// The lineage of the ledger that the node obeys; absent before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lineage: Option<String>,
    /// The highest revision of that ledger that the node has recorded.
    #[serde(default)]
    pub obeyed_revision: i64,
    /// Promises that the node has obeyed and whose bytes are gone.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub released: Vec<Released>,
    /// Promises that the node has obeyed and whose bytes are there.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub obeyed: Vec<Obeyed>,
    /// What lies in the area without an object of the API server that it belongs to. Nothing removes it by itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub orphans: Vec<Orphan>,
    /// How many there are, if more than are listed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub orphans_total: Option<i32>,
    /// UIDs of reservations whose bytes something on the node uses now.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub in_use: Vec<String>,
}

/// The thin pools that a pool is made of.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ThinPools {
    /// Of staged images and directories.
    pub images: ThinPool,
    /// Of volumes.
    pub volumes: ThinPool,
}

/// One thin pool of the device mapper, as the kernel tells of it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ThinPool {
    /// What it can do.
    pub mode: ThinPoolMode,
    /// True if its metadata must be checked offline before anything else.
    #[serde(default)]
    pub needs_check: bool,
    /// What its data has grown to, in bytes. It never shrinks. A report that says that bytes are gone says what this was
    /// then, or later.
    #[serde(default)]
    pub data_bytes: i64,
    /// What is used of its data, in bytes.
    #[serde(default)]
    pub data_used_bytes: i64,
    /// The size of its metadata device, in bytes.
    #[serde(default)]
    pub metadata_bytes: i64,
    /// What is used of it, in bytes.
    #[serde(default)]
    pub metadata_used_bytes: i64,
}

/// What a thin pool of the device mapper can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum ThinPoolMode {
    /// Everything.
    ReadWrite,
    /// No new block; blocks that are there are written.
    OutOfDataSpace,
    /// Nothing that changes metadata.
    ReadOnly,
    /// Nothing at all.
    Failed,
}

/// A promise that the node has obeyed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Obeyed {
    /// The holder's UID.
    pub uid: String,
    /// The promise's generation.
    pub generation: i64,
    /// All that the node has recorded of it. Told while its ledger is behind, which is rebuilt from that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recorded: Option<LedgerPromise>,
}

/// Something in a pool's area without an object that it belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Orphan {
    /// The UID of the object that it was made for.
    pub uid: String,
    /// What it is.
    pub kind: OrphanKind,
    /// How many bytes are promised to it, or, without a promise, how large it is.
    pub bytes: i64,
    /// The namespace and name of the object that it was made for, if that was recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<String>,
    /// What people know it by, for a volume its claim.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// What an orphan is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum OrphanKind {
    /// A volume or snapshot.
    Volume,
    /// A staged image.
    Image,
    /// A directory of a transfer.
    WorkDir,
    /// A promise under which nothing lies.
    #[default]
    Promise,
}

/// A promise by its holder and generation.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Released {
    /// The holder's UID.
    pub uid: String,
    /// The promise's generation.
    pub generation: i64,
}

/// One thing that the agent needs of the node.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PreflightCheck {
    /// What is checked.
    pub name: String,
    /// Whether it is there.
    pub ok: bool,
    /// Whether anything works without it.
    pub required: bool,
    /// What was found, or what to do.
    pub detail: String,
}

/// Versions of what matters on the node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Versions {
    /// Of the agent.
    #[serde(default)]
    pub agent: String,
    /// Of the kernel.
    #[serde(default)]
    pub kernel: String,
    /// Of qemu-img; absent where it is not installed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu_img: Option<String>,
}
