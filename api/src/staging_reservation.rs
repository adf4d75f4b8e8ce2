//! `StagingReservation`: a promise of space on a pool, and a reference to what is staged in it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::fields::{
    Assignment, LastError, ObjectRef, PoolSelector, Progress, Quantity, S3Source, S3Target, Span, WhenFull,
};

/// Every field but `maxSize` stays as it is. Optional ones are not compared as optional values: their cost has no bound that the
/// API server could know.
const FIXED: &str = "self.access == oldSelf.access \
    && self.dryRun == oldSelf.dryRun \
    && (has(self.poolName) ? has(oldSelf.poolName) && self.poolName == oldSelf.poolName : !has(oldSelf.poolName)) \
    && (has(self.poolSelector) ? has(oldSelf.poolSelector) && self.poolSelector == oldSelf.poolSelector : !has(oldSelf.poolSelector)) \
    && (has(self.image) ? has(oldSelf.image) && self.image == oldSelf.image : !has(oldSelf.image)) \
    && (has(self.file) ? has(oldSelf.file) && self.file == oldSelf.file : !has(oldSelf.file)) \
    && (has(self.nodeName) ? has(oldSelf.nodeName) && self.nodeName == oldSelf.nodeName : !has(oldSelf.nodeName)) \
    && (has(self.whenFull) ? has(oldSelf.whenFull) && self.whenFull == oldSelf.whenFull : !has(oldSelf.whenFull)) \
    && (has(self.topology) ? has(oldSelf.topology) && self.topology == oldSelf.topology : !has(oldSelf.topology)) \
    && (has(self.priority) ? has(oldSelf.priority) && self.priority == oldSelf.priority : !has(oldSelf.priority)) \
    && (has(self.ttl) ? has(oldSelf.ttl) && self.ttl == oldSelf.ttl : !has(oldSelf.ttl))";

/// What is asked for.
#[derive(CustomResource, Clone, Debug, Default, Deserialize, Serialize, KubeSchema)]
#[kube(
    group = "staging.berth.dev",
    version = "v1alpha1",
    kind = "StagingReservation",
    namespaced,
    shortname = "stgres",
    category = "berth",
    status = "StagingReservationStatus",
    selectable = ".status.assignment.node",
    doc = "A promise of space on a pool, and a reference to what is staged in it.",
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason"
    ),
    printcolumn(name = "Pool", type_ = "string", json_path = ".status.assignment.pool"),
    printcolumn(name = "Node", type_ = "string", json_path = ".status.assignment.node"),
    printcolumn(name = "Size", type_ = "string", json_path = ".spec.maxSize"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Path", type_ = "string", json_path = ".status.path", priority = 1),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        priority = 1
    )
)]
#[x_kube(validation = Rule::new(FIXED).message("spec: immutable but for `maxSize`; make another reservation"))]
#[x_kube(validation = Rule::new("self.maxSize == oldSelf.maxSize || self.access == 'Block'")
    .message("spec.maxSize: changes only where `spec.access` is `Block`"))]
#[x_kube(validation = Rule::new("!(has(self.poolName) && has(self.poolSelector))")
    .message("spec: at most one of `poolName` and `poolSelector` may be set"))]
#[x_kube(validation = Rule::new("!has(self.image) || self.access == 'Block'")
    .message("spec.access: must be `Block` where `spec.image` is set"))]
#[x_kube(validation = Rule::new("!has(self.file) || self.access == 'File'")
    .message("spec.access: must be `File` where `spec.file` is set"))]
#[serde(rename_all = "camelCase")]
pub struct StagingReservationSpec {
    /// One pool by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 40), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub pool_name: Option<String>,
    /// Any pool with these labels. Without this and `poolName`: any pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_selector: Option<PoolSelector>,
    /// The most that will ever be written. Of a volume it may become larger: more is promised to it then where there is room,
    /// and the volume grows. Neither a promise nor a volume becomes smaller: less than is promised asks for nothing.
    pub max_size: Quantity,
    /// The template whose content the volume starts with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageReference>,
    /// The file that pods see in the directory, by an inline CSI volume. Only with `access: File`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<FileSpec>,
    /// `File`: a directory to work in. `Block`: a volume. `Stream`: no bytes at all. Default `File`.
    #[serde(default)]
    pub access: Access,
    /// This node only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub node_name: Option<String>,
    /// Overrides the pool's `admission.whenFull`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when_full: Option<WhenFull>,
    /// This zone only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology: Option<Topology>,
    /// Higher ones come first among those that wait. Default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = -1000, max = 1000))]
    pub priority: Option<i32>,
    /// How long the reservation stays after nothing has used it any more. Default `1h`; reservations of CSI volumes and of
    /// work that goes on have no such end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Span>,
    /// Only say what would happen: nothing is promised.
    #[serde(default)]
    pub dry_run: bool,
}

/// Where a reservation may be, by labels of nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Topology {
    /// The value of the nodes' label `topology.kubernetes.io/zone`.
    #[schemars(length(min = 1, max = 63))]
    pub zone: String,
}

/// A file for pods: what it begins as, and where its changes go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.source) || has(self.result)")
    .message("at least one of `source` and `result` must be set"))]
#[x_kube(validation = Rule::new("has(self.name) || (has(self.source) && !self.source.key.endsWith('/'))")
    .message("`name` must be set where there is no `source`, or its key ends with `/`"))]
pub struct FileSpec {
    /// The object that it begins as; without one, the directory is empty at first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<S3Source>,
    /// Its name in the directory. Default: the last part of the source's key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255), regex(pattern = r"^([^/.]|\.[^/.]|\.\.[^/])[^/]*$"))]
    pub name: Option<String>,
    /// Where it is sent after a pod that may write to it has gone. Without one, pods only read it, or say that what they write
    /// is to be discarded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<S3Target>,
}

/// How the reserved space is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum Access {
    /// Nothing is written in the pool.
    Stream,
    /// A directory to work in; counted among the pool's images.
    #[default]
    File,
    /// A volume; counted among the pool's volumes.
    Block,
}

/// What an image is named by.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageReference {
    /// A `TemplateImport`.
    pub template: ObjectRef,
}

/// The states, in the order they are passed through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum ReservationState {
    /// Nothing has looked at it yet.
    Pending,
    /// It waits for space.
    Queued,
    /// The space is promised.
    Promised,
    /// The node has made what was asked for.
    Ready,
    /// The node gives the bytes back.
    Releasing,
    /// It will not be met.
    Refused,
}

/// What became of a reservation.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, KubeSchema)]
#[x_kube(validation = Rule::new(crate::states::rule::<berth_core::view::ReservationState>()).message(crate::states::MESSAGE))]
#[serde(rename_all = "camelCase")]
pub struct StagingReservationStatus {
    /// The discriminant of its state. Written by the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<ReservationState>,
    /// Where it is. Written by the operator, by update with resourceVersion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment: Option<Assignment>,
    /// The image it refers to, with what the node needs to stage it. Written by the operator with the assignment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<AssignedImage>,
    /// True if the image was promised before this reservation came. Written by the operator with the assignment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reused: Option<bool>,
    /// Its place among those that wait. Written by the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<QueuePlace>,
    /// How many bytes were missing when it was refused or queued. Written by the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shortfall_bytes: Option<i64>,
    /// The places that were looked at: the chosen one first, then by name. Written by the operator; once there is an
    /// assignment, with that, and then never again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "atomic"))]
    pub candidates: Vec<CandidatePlace>,
    /// When it is deleted if nothing uses it until then. Absent while something does, or while its node is lost. Written by
    /// the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Time>,
    /// When something last ceased to use it, by the clock of its node. Written by the node, once for each use that ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used: Option<Time>,
    /// What would happen, where `spec.dryRun` asks for no more. Written by the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<DryRunAnswer>,
    /// How much of its object is in its file, or of its file in the object store. Written by the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// What was sent last of its file. Written by the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<FileResult>,
    /// What went wrong last with its file. Written by the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<LastError>,
    /// The file's name in the volume of a pod. Written by the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The generation that the node has made ready. Written by the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prepared_generation: Option<i64>,
    /// `Promised` by the operator, `Ready` by the node; with a file also `Staged` and `Durable` by the node.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// A file as its object store has it, verified.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FileResult {
    /// The object's version, as the store named it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
    /// The version's id, in a bucket that keeps versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version_id: Option<String>,
    /// `sha256:` of its bytes.
    pub digest: String,
    /// Its size in bytes.
    pub size: i64,
}

/// The image that a reservation refers to.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AssignedImage {
    /// `sha256:` of its index.
    pub digest: String,
    /// The `StagedImage` that holds it.
    pub staged_image: String,
    /// Its virtual size in bytes.
    pub virtual_size: i64,
}

/// A pool on a node that was looked at for a reservation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CandidatePlace {
    /// The pool.
    pub pool: String,
    /// The node.
    pub node: String,
    /// Why it was chosen, or why not.
    pub reason: String,
    /// For people, with numbers.
    pub message: String,
    /// How many bytes were missing there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shortfall_bytes: Option<i64>,
    /// True for the place that the reservation was given.
    #[serde(default)]
    pub chosen: bool,
}

/// What would happen to a reservation that is only tried.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DryRunAnswer {
    /// True if it would be promised now.
    pub fits: bool,
    /// The pool that it would be promised in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// On this node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Its position among those that wait, if it would have to wait; 1 is next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<i32>,
    /// The most that would be promised for it, with the image that it starts from where that is not there yet.
    pub peak_bytes: i64,
    /// How many bytes are missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shortfall_bytes: Option<i64>,
    /// Staged images that would have to go first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reclaims: Vec<String>,
}

/// A place in a pool's queue.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct QueuePlace {
    /// 1 is next.
    pub position: i32,
    /// Bytes that those before it ask for.
    pub bytes_ahead: i64,
    /// Why it waits.
    pub reason: String,
}
