//! `StagingLedger`: what is promised in one pool on one node. Written by the operator, obeyed by the node.

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The promises, and the capacity that they are compared with, in the object that is compared and swapped.
#[derive(CustomResource, Clone, Debug, PartialEq, Deserialize, Serialize, KubeSchema)]
#[kube(
    group = "staging.berth.dev",
    version = "v1alpha1",
    kind = "StagingLedger",
    shortname = "stgledger",
    category = "berth",
    selectable = ".spec.scope.nodeName",
    doc = "What is promised in one pool on one node. Written by Berth itself.",
    derive = "PartialEq",
    printcolumn(name = "Pool", type_ = "string", json_path = ".spec.poolName"),
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.scope.nodeName"),
    printcolumn(name = "Total", type_ = "integer", json_path = ".spec.capacity.total.dataBytes"),
    printcolumn(name = "Revision", type_ = "integer", json_path = ".spec.revision"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[x_kube(validation = Rule::new("self.poolName == oldSelf.poolName && self.scope == oldSelf.scope")
    .message("spec: `poolName` and `scope` are immutable"))]
#[x_kube(validation = Rule::new("self.lineage != oldSelf.lineage || self.revision > oldSelf.revision")
    .message("spec.revision: must rise with every write"))]
#[serde(rename_all = "camelCase")]
pub struct StagingLedgerSpec {
    /// The pool.
    #[schemars(length(min = 1, max = 40))]
    pub pool_name: String,
    /// The area of use.
    pub scope: LedgerScope,
    /// A UUID, new each time the ledger is made or rebuilt.
    #[schemars(length(min = 36, max = 36))]
    pub lineage: String,
    /// Rises by one with every write.
    #[schemars(range(min = 1))]
    pub revision: i64,
    /// Set if the ledger was rebuilt from its node's record. The node obeys it only if its record is still that one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rebuilt_from: Option<RebuiltFrom>,
    /// What may be promised.
    pub capacity: LedgerCapacity,
    /// By the holder's UID.
    #[serde(default)]
    #[schemars(extend("maxProperties" = 4096, "x-kubernetes-map-type" = "atomic"))]
    pub promises: BTreeMap<String, LedgerPromise>,
}

/// What a ledger was rebuilt from.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RebuiltFrom {
    /// The lineage that the node obeyed then.
    #[schemars(length(min = 36, max = 36))]
    pub lineage: String,
    /// The revision that it had recorded then.
    #[schemars(range(min = 0))]
    pub revision: i64,
    /// UIDs of holders in the node's record that did not exist. Their promises stay until a person strikes them from this
    /// list; then the node gives back what lies under them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 4096), inner(length(max = 128)))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub recovered: Vec<String>,
}

/// The area that a ledger is for.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LedgerScope {
    /// One node.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
}

/// What may be promised: per class, and in all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LedgerCapacity {
    /// For staged images and work space.
    pub images: LedgerBytes,
    /// For volumes and snapshots.
    pub volumes: LedgerBytes,
    /// For both together.
    pub total: LedgerBytes,
    /// How far volumes are promised beyond that. Absent: not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume_overcommit: Option<VolumeOvercommit>,
}

/// How far volumes are promised beyond what is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VolumeOvercommit {
    /// Bytes that are promised to volumes count for a hundred of this many. It follows the pool's `volumeOvercommitPercent`,
    /// a lower one as promises are given back.
    #[schemars(range(min = 100, max = 1000))]
    pub percent: i32,
    /// The thin pool of volumes may become so large, although its promises count for less. Images are not promised these.
    #[schemars(range(min = 0))]
    pub attain_bytes: i64,
}

/// Bytes of data and of metadata.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LedgerBytes {
    /// Bytes of data.
    #[schemars(range(min = 0))]
    pub data_bytes: i64,
    /// Bytes of metadata; 0 where the backend keeps none of its own.
    #[schemars(range(min = 0))]
    pub metadata_bytes: i64,
}

/// One promise.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LedgerPromise {
    /// For whom.
    pub holder: Holder,
    /// What it counts as.
    pub class: PromiseClass,
    /// Bytes of data.
    #[schemars(range(min = 0))]
    pub data_bytes: i64,
    /// Bytes of metadata.
    #[schemars(range(min = 0))]
    pub metadata_bytes: i64,
    /// Of the holder's assignment.
    #[schemars(range(min = 1))]
    pub generation: i64,
    /// The revision at which it was revoked, because its holder is gone: no node obeys it any more. It counts until the
    /// node has recorded that revision and holds nothing under it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub revoked_revision: Option<i64>,
}

/// Who holds a promise.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Holder {
    /// Its kind.
    pub kind: HolderKind,
    /// Its namespace; absent for a `StagedImage`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
}

/// The kinds that may hold a promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum HolderKind {
    /// A `StagingReservation`.
    StagingReservation,
    /// A `StagedImage`.
    StagedImage,
}

/// What a promise counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum PromiseClass {
    /// Staged images and work space.
    Images,
    /// Volumes and snapshots.
    Volumes,
}
