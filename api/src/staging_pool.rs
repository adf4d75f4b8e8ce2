//! `StagingPool`: a bounded area on the nodes that match, with its policy.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::fields::{Quantity, Span, WhenFull};

/// What the administrator wants of a pool.
#[derive(CustomResource, Clone, Debug, Default, Deserialize, Serialize, KubeSchema)]
#[kube(
    group = "staging.berth.dev",
    version = "v1alpha1",
    kind = "StagingPool",
    shortname = "stgpool",
    category = "berth",
    status = "StagingPoolStatus",
    doc = "A bounded area for disk images on the nodes that match.",
    validation = Rule::new("self.metadata.name.size() <= 40").message("metadata.name: at most 40 characters"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Nodes", type_ = "integer", json_path = ".status.nodes"),
    printcolumn(name = "Total", type_ = "integer", json_path = ".status.capacity.total"),
    printcolumn(name = "Promised", type_ = "integer", json_path = ".status.capacity.promised"),
    printcolumn(name = "Available", type_ = "integer", json_path = ".status.capacity.available"),
    printcolumn(name = "Queued", type_ = "integer", json_path = ".status.queued"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].message", priority = 1)
)]
#[x_kube(validation = Rule::new("has(self.backend.dmThin) || !has(self.capacity) \
        || !has(self.capacity.volumeOvercommitPercent) || self.capacity.volumeOvercommitPercent <= 100")
    .message("spec.capacity.volumeOvercommitPercent: above 100 only with `dmThin`; in a `filesystem` pool volumes and staged \
images share one file system: make a `dmThin` pool for volumes that are overcommitted"))]
#[serde(rename_all = "camelCase")]
pub struct StagingPoolSpec {
    /// What the pool is made of.
    #[x_kube(validation = Rule::new("self == oldSelf").message("spec.backend: immutable"))]
    pub backend: Backend,
    /// Labels of the nodes that carry the pool, all of them. Empty: every node.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Bounds below what the area could hold.
    #[serde(default)]
    pub capacity: CapacityPolicy,
    /// What happens to requests that do not fit.
    #[serde(default)]
    pub admission: AdmissionPolicy,
    /// When unreferenced images go.
    #[serde(default)]
    pub reclaim: ReclaimPolicy,
    /// What becomes of promises on a node that is lost. Default `Retain`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_loss_policy: Option<NodeLossPolicy>,
    /// Whether it takes anything new. Default `Open`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Service>,
    /// Nodes on which it is `Draining`, whatever `service` says.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1000), inner(length(min = 1, max = 253)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub drain_nodes: Vec<String>,
}

/// What becomes of promises on a node that is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum NodeLossPolicy {
    /// They stay until the node is back.
    Retain,
    /// What can be had again elsewhere is given up once the Kubernetes node is gone.
    Release,
}

/// Whether a pool takes anything new.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum Service {
    /// It does.
    Open,
    /// It does not; what is there stays.
    Cordoned,
    /// It does not, and images that nothing refers to go at once.
    Draining,
}

/// What a pool is made of: exactly one of the fields.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("[has(self.filesystem), has(self.dmThin)].filter(set, set).size() == 1")
    .message("spec.backend: exactly one of `filesystem` and `dmThin` must be set"))]
pub struct Backend {
    /// A directory on each node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filesystem: Option<FilesystemBackend>,
    /// Two thin pools of the device mapper on each node, one for images and one for volumes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dm_thin: Option<DmThinBackend>,
}

/// A directory that holds one preallocated XFS image with reflink, so that the bound is enforced.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FilesystemBackend {
    /// The directory, absolute, on every matching node.
    #[schemars(length(max = 512), regex(pattern = r"^/[^\s]*[^\s/]$"))]
    pub path: String,
    /// The size of the image that is preallocated there; at least 512 MiB.
    pub size: Quantity,
}

/// A volume group that holds two thin pools of the device mapper, one for images and one for volumes, and a small volume
/// for the pool's record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.devices) != has(self.volumeGroup)")
    .message("spec.backend.dmThin: exactly one of `devices` and `volumeGroup` must be set"))]
#[x_kube(validation = Rule::new("has(self.devices) == (self.ownership == 'Exclusive')")
    .message("spec.backend.dmThin: `devices` go with `ownership: Exclusive`, `volumeGroup` with `ownership: Shared`"))]
#[x_kube(validation = Rule::new("has(self.size) == (self.ownership == 'Shared')")
    .message("spec.backend.dmThin: `size` is needed with `ownership: Shared`, and goes with no other"))]
#[x_kube(validation = Rule::new("!self.wipe || has(self.devices)")
    .message("spec.backend.dmThin: `wipe` is about `devices`"))]
pub struct DmThinBackend {
    /// Block devices, by their paths on every matching node, that the pool has to itself. A volume group is made on them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(min = 1, max = 16),
        inner(length(max = 256), regex(pattern = r"^/dev(/[A-Za-z0-9_][A-Za-z0-9_.:+@=-]*)+$"))
    )]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub devices: Vec<String>,
    /// A volume group that is there on every matching node. Only volumes that carry the pool's tag are ever touched in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Za-z0-9_+][A-Za-z0-9_+.-]*$"))]
    pub volume_group: Option<String>,
    /// Whether the pool has the devices to itself. Default `Exclusive`.
    #[serde(default)]
    pub ownership: Ownership,
    /// Consent to destroy what is on `devices` if they bear signatures of file systems, partitions or other volume groups.
    /// Without it such a device is refused.
    #[serde(default)]
    pub wipe: bool,
    /// How much of a shared volume group the pool takes, all of it at once; at least 1 GiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<Quantity>,
    /// The unit in which the thin pools hand out space: a power of two from 64Ki to 1Mi. Default `64Ki`. With larger ones
    /// less metadata is needed, and staged images are charged for more than their bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("type(self) == string && self in ['64Ki', '128Ki', '256Ki', '512Ki', '1Mi']")
        .message("spec.backend.dmThin.chunkSize: one of 64Ki, 128Ki, 256Ki, 512Ki, 1Mi"))]
    pub chunk_size: Option<Quantity>,
}

/// Whether a pool has its block devices to itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum Ownership {
    /// It has whole devices.
    #[default]
    Exclusive,
    /// It has volumes in a volume group that others use too.
    Shared,
}

/// Bounds below what the area could hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CapacityPolicy {
    /// At most this much is promised on each node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<Quantity>,
    /// How much may be promised to volumes, in percent of what they can attain. Default 100. Above that, what is promised to
    /// volumes cannot all be written; staged images and work space keep their bytes whatever volumes do, for which a `dmThin`
    /// pool is needed. A lower value admits nothing until what is promised fits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 100, max = 1000))]
    pub volume_overcommit_percent: Option<i32>,
}

/// What happens to requests that do not fit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct AdmissionPolicy {
    /// For requests that do not say. Default `Queue`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when_full: Option<WhenFull>,
    /// How long a request may wait. Default `1h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_queue_time: Option<Span>,
    /// How many requests may wait. Default 1000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100_000))]
    pub max_queued: Option<i32>,
    /// Which of several places a request gets. Default `PreferPresent`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<Strategy>,
    /// How much the reservations of one namespace may hold here, over all nodes. Each limit that selects a namespace counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub tenant_limits: Vec<TenantLimit>,
}

/// Which of several places a request gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum Strategy {
    /// The first by the names of pool and node.
    FirstFit,
    /// The one with the most space left.
    MostFree,
    /// One that has the image; among those, or if none has, the one with the most space left.
    PreferPresent,
}

/// How much each of some namespaces may hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.maxBytes) || has(self.maxReservations)")
    .message("spec.admission.tenantLimits[]: one of `maxBytes` and `maxReservations` must be set"))]
pub struct TenantLimit {
    /// Labels of the namespaces that this is about, all of them. Empty: every namespace.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub namespace_labels: BTreeMap<String, String>,
    /// At most this much is promised to reservations of one such namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<Quantity>,
    /// At most so many reservations of one such namespace have a place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100_000))]
    pub max_reservations: Option<i32>,
}

/// When unreferenced images go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("(has(self.lowWatermark) ? self.lowWatermark : 70) <= (has(self.highWatermark) ? self.highWatermark : 85)")
    .message("spec.reclaim.lowWatermark: at most `highWatermark` (defaults 70 and 85)"))]
pub struct ReclaimPolicy {
    /// How long an image that nothing refers to stays. Default `1h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Span>,
    /// For how long after its last use such an image is spared whatever happens. Default `0s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_warm: Option<Span>,
    /// Above this percentage of promised space on a node, images that nothing refers to go, the longest unused first.
    /// Default 85.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub high_watermark: Option<i32>,
    /// They go until so many percent are promised. Default 70.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub low_watermark: Option<i32>,
}

/// What the operator found out about a pool, over all nodes.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct StagingPoolStatus {
    /// How many nodes carry it.
    #[serde(default)]
    pub nodes: i32,
    /// Bytes over all nodes.
    #[serde(default)]
    pub capacity: PoolCapacity,
    /// Requests that wait for it.
    #[serde(default)]
    pub queued: i32,
    /// What is not as strong as usual here, for example `Advisory`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub constraints: Vec<String>,
    /// When images were last removed here because nothing referred to them, and what that freed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_reclaim: Option<LastReclaim>,
    /// `Ready`.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// A removal of images that nothing referred to.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LastReclaim {
    /// When.
    pub time: Time,
    /// How many images.
    pub images: i32,
    /// How many bytes were promised to them.
    pub bytes: i64,
    /// Why.
    pub reason: ReclaimReason,
}

/// Why images that nothing refers to are removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum ReclaimReason {
    /// Nothing has used them for `reclaim.ttl`.
    Unused,
    /// More is promised than `reclaim.highWatermark`.
    HighWatermark,
    /// A request would have waited or been refused otherwise.
    Shortfall,
    /// The pool takes nothing new, or is being deleted.
    Draining,
    /// Their node is gone, and the pool's policy gives copies up.
    NodeLost,
}

/// Bytes of a pool over all nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolCapacity {
    /// What may be promised in all.
    #[serde(default)]
    pub total: i64,
    /// What promises count for.
    #[serde(default)]
    pub promised: i64,
    /// What is promised to volumes, in full: where they are overcommitted it counts for less.
    #[serde(default)]
    pub promised_to_volumes: i64,
    /// What the nodes have written.
    #[serde(default)]
    pub used: i64,
    /// The part of `promised` that holds images nothing refers to.
    #[serde(default)]
    pub unreferenced: i64,
    /// `total - promised`.
    #[serde(default)]
    pub available: i64,
}
