//! `StagingPool`: a bounded area on the nodes that match, with its policy.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::fields::{Quantity, Span, WhenFull};

/// What the administrator wants of a pool.
#[derive(CustomResource, Clone, Debug, Deserialize, Serialize, KubeSchema)]
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
}

/// What a pool is made of: exactly one of the fields.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.filesystem)").message("spec.backend: `filesystem` must be set"))]
pub struct Backend {
    /// A directory on each node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filesystem: Option<FilesystemBackend>,
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

/// Bounds below what the area could hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CapacityPolicy {
    /// At most this much is promised on each node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<Quantity>,
}

/// What happens to requests that do not fit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
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
}

/// When unreferenced images go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReclaimPolicy {
    /// How long an image that nothing refers to stays. Default `1h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Span>,
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
    /// `Ready`.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// Bytes of a pool over all nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolCapacity {
    /// What may be promised in all.
    #[serde(default)]
    pub total: i64,
    /// What is promised.
    #[serde(default)]
    pub promised: i64,
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
