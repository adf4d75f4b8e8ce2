//! `StagedImage`: one immutable image in one pool on one node.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::fields::{ObjectRef, Progress};

/// Which image, where. Written by the operator.
#[derive(CustomResource, Clone, Debug, Deserialize, Serialize, KubeSchema)]
#[kube(
    group = "staging.berth.dev",
    version = "v1alpha1",
    kind = "StagedImage",
    shortname = "stgimg",
    category = "berth",
    status = "StagedImageStatus",
    selectable = ".spec.nodeName",
    doc = "One immutable image in one pool on one node. Written by Berth itself.",
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "Health", type_ = "string", json_path = ".status.health"),
    printcolumn(name = "Pool", type_ = "string", json_path = ".spec.poolName"),
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.nodeName"),
    printcolumn(name = "Progress", type_ = "integer", json_path = ".status.progress.percent"),
    printcolumn(name = "Size", type_ = "integer", json_path = ".spec.dataBytes"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[x_kube(validation = Rule::new("self == oldSelf").message("spec: immutable"))]
#[serde(rename_all = "camelCase")]
pub struct StagedImageSpec {
    /// `sha256:` of its index.
    #[schemars(length(max = 71), regex(pattern = r"^sha256:[0-9a-f]{64}$"))]
    pub digest: String,
    /// The pool.
    #[schemars(length(min = 1, max = 40))]
    pub pool_name: String,
    /// The node.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
    /// The `ImageStore` that has it.
    pub store: ObjectRef,
    /// Bytes of its chunks that are not holes: what it is charged.
    #[schemars(range(min = 0))]
    pub data_bytes: i64,
    /// The size of the disk in bytes.
    #[schemars(range(min = 0))]
    pub virtual_size: i64,
}

/// The states, in the order they are passed through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum StagedImageState {
    /// Its chunks are being fetched.
    Filling,
    /// Volumes start from it, and read from its store what is not here yet.
    Usable,
    /// All of it is here, verified.
    Ready,
    /// It cannot be fetched.
    Failed,
}

/// How good an image is to whoever starts from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum StagedImageHealth {
    /// All of it is here.
    Optimal,
    /// It works, and a better form of it is on its way: some of it is still read from its store.
    Usable,
    /// Nothing can start from it.
    Unusable,
}

/// What the node says of the image.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, KubeSchema)]
#[x_kube(validation = Rule::new(crate::states::rule::<berth_core::image::StagedState>()).message(crate::states::MESSAGE))]
#[serde(rename_all = "camelCase")]
pub struct StagedImageStatus {
    /// Its state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<StagedImageState>,
    /// How good it is to whoever starts from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<StagedImageHealth>,
    /// How much of it is here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// When a volume was last made from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used: Option<Time>,
    /// `Ready`.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}
