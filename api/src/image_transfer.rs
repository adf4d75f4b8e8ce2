//! `ImageTransfer`: a movement of image content from a source to a destination.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::fields::{
    Assignment, HttpSource, LastError, PoolSelector, Progress, S3Source, S3Target, Span, Stage,
    TransferLimits, TransferPlan,
};

/// What decides the bytes stays as it is. Optional fields are not compared as optional values: their cost has no bound that the
/// API server could know.
const FIXED: &str = "self.source == oldSelf.source && self.destination == oldSelf.destination \
    && self.format == oldSelf.format \
    && (has(self.staging) ? has(oldSelf.staging) && self.staging == oldSelf.staging : !has(oldSelf.staging)) \
    && (has(self.checksum) ? has(oldSelf.checksum) && self.checksum == oldSelf.checksum : !has(oldSelf.checksum))";

/// What is to be moved, and where to.
#[derive(CustomResource, Clone, Debug, Default, Deserialize, Serialize, KubeSchema)]
#[kube(
    group = "staging.berth.dev",
    version = "v1alpha1",
    kind = "ImageTransfer",
    namespaced,
    shortname = "imgx",
    category = "berth",
    status = "ImageTransferStatus",
    selectable = ".status.assignment.node",
    doc = "A movement of image content from a source to a destination.",
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Succeeded\")].reason"
    ),
    printcolumn(name = "Stage", type_ = "string", json_path = ".status.stage.name"),
    printcolumn(name = "Progress", type_ = "integer", json_path = ".status.progress.percent"),
    printcolumn(name = "Node", type_ = "string", json_path = ".status.assignment.node"),
    printcolumn(name = "Size", type_ = "integer", json_path = ".status.result.virtualSize"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Rate", type_ = "integer", json_path = ".status.progress.rate", priority = 1),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Succeeded\")].message",
        priority = 1
    )
)]
#[x_kube(validation = Rule::new(FIXED)
    .message("spec: `source`, `destination`, `format`, `staging` and `checksum` are immutable; make another transfer"))]
#[x_kube(validation = Rule::new("!has(self.destination.s3) || (has(self.format.destination) && self.format.destination != 'Chunked')")
    .message("spec.format.destination: must be `Raw`, `Qcow2`, `Vmdk` or `Vhd` where `spec.destination.s3` is set"))]
#[x_kube(validation = Rule::new("!has(self.destination.storeImage) || !has(self.format.destination) || self.format.destination == 'Chunked'")
    .message("spec.format.destination: must be absent or `Chunked` where `spec.destination.storeImage` is set"))]
#[x_kube(validation = Rule::new("!has(self.source.storeImage) || !has(self.format.source)")
    .message("spec.format.source: must be absent where `spec.source.storeImage` is set: an image store knows it"))]
#[x_kube(validation = Rule::new("!has(self.source.storeImage) || !has(self.checksum)")
    .message("spec.checksum: must be absent where `spec.source.storeImage` is set: every chunk has one"))]
#[serde(rename_all = "camelCase")]
pub struct ImageTransferSpec {
    /// Where the image comes from.
    pub source: TransferSource,
    /// Where it goes.
    pub destination: TransferDestination,
    /// What is read, and what is written.
    #[serde(default)]
    pub format: TransferFormat,
    /// Whether the source comes into a pool first. Default: what the node's `--default-staging` says, which is `Auto`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub staging: Option<Staging>,
    /// What the bytes of the source must add up to, as they are transferred.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 71), regex(pattern = r"^sha256:[0-9a-f]{64}$"))]
    pub checksum: Option<String>,
    /// Bounds of the work.
    #[serde(default)]
    pub limits: ImageTransferLimits,
    /// True to have it pause: it keeps its node, its space and what it has done, and goes on there.
    #[serde(default)]
    pub suspend: bool,
    /// How many seconds after its end the object is deleted. Default: never. What was transferred stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub ttl_seconds_after_finished: Option<i32>,
    /// Pools that may stage what the work needs. Default: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_selector: Option<PoolSelector>,
}

/// Where an image comes from: exactly one of the fields.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("[has(self.http), has(self.s3), has(self.storeImage)].filter(set, set).size() == 1")
    .message("exactly one of `http`, `s3` and `storeImage` must be set"))]
pub struct TransferSource {
    /// A file behind an HTTP or HTTPS address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpSource>,
    /// An object in an S3 bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub s3: Option<S3Source>,
    /// An image in an image store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store_image: Option<StoreImage>,
}

/// Where an image goes: exactly one of the fields.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("[has(self.s3), has(self.storeImage)].filter(set, set).size() == 1")
    .message("exactly one of `s3` and `storeImage` must be set"))]
pub struct TransferDestination {
    /// An object in an S3 bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub s3: Option<S3Target>,
    /// An image in an image store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store_image: Option<StoreImage>,
}

/// An image of an `ImageStore` in the same namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StoreImage {
    /// The image store's name.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub store: String,
    /// The name under which the image is published: that of the `TemplateImport` which brought it, or what a transfer called it.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub image: String,
}

/// What is read, and what is written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.compression) || (has(self.destination) && (self.destination == 'Qcow2' || (self.destination == 'Vmdk' && self.compression == 'Zlib')))")
    .message("`compression` must be absent where `destination` is neither `Qcow2` nor, with `Zlib`, `Vmdk`"))]
pub struct TransferFormat {
    /// The source's format. Default: found out by reading its head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceFormat>,
    /// What is written. An image store gets `Chunked`, which is its default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<DestinationFormat>,
    /// How what is written is compressed. Default: `Zlib` in `Qcow2` and `Vmdk`; nothing else is compressed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<Compression>,
}

/// The formats that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SourceFormat {
    /// The disk's bytes, nothing else.
    Raw,
    /// QEMU's.
    Qcow2,
    /// `VMware`'s.
    Vmdk,
    /// Virtual PC's and Azure's.
    Vhd,
    /// Hyper-V's.
    Vhdx,
}

/// The formats that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DestinationFormat {
    /// The disk's bytes, nothing else.
    Raw,
    /// QEMU's.
    Qcow2,
    /// `VMware`'s, stream-optimised.
    Vmdk,
    /// Virtual PC's and Azure's.
    Vhd,
    /// Chunks of an image store, and an index of them.
    Chunked,
}

/// How an image is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Compression {
    /// Not at all.
    None,
    /// Deflate: every reader knows it.
    Zlib,
    /// Faster and smaller; readers of such a qcow2 need QEMU 5.1 or newer.
    Zstd,
}

/// Whether the source comes into a pool first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Staging {
    /// Only if it has to.
    Auto,
    /// It must not: what would need that is refused.
    Never,
    /// It must.
    Required,
}

/// Bounds of the work.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageTransferLimits {
    /// Those that an import has too.
    #[serde(flatten)]
    pub common: TransferLimits,
    /// How long after the object was made it may take to succeed; after that it fails. Default: for ever. May be changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Span>,
}

/// The states, in the order they are passed through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum TransferState {
    /// Nothing has looked at it yet, or no node can.
    Pending,
    /// A node reads the head of the source.
    Probing,
    /// It waits for its reservation.
    Queued,
    /// A node transfers it.
    Transferring,
    /// It pauses, because `spec.suspend` says so.
    Suspended,
    /// All of it is at its destination.
    Succeeded,
    /// It has ended without success.
    Failed,
}

/// What became of a transfer.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, KubeSchema)]
#[x_kube(validation = Rule::new(crate::states::rule_of(berth_core::transfer::TransferKind::Transfer)).message(crate::states::MESSAGE))]
#[serde(rename_all = "camelCase")]
pub struct ImageTransferStatus {
    /// The discriminant of its state. Written by the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<TransferState>,
    /// The node that works on it. Written by the operator, by update with resourceVersion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment: Option<Assignment>,
    /// What will be done, known before anything is. Written by the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<TransferPlan>,
    /// Written by the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage: Option<Stage>,
    /// Written by the node: at most every 2 s, and only on 1 % or a new stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// How often the work was begun. Written by the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempts: Option<i32>,
    /// What went wrong last. Written by the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<LastError>,
    /// The generation of the assignment whose work `lastError` has ended. Written by the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed_generation: Option<i64>,
    /// The value of the annotation `staging.berth.dev/retry` that was acted on last. Written by the operator with the assignment
    /// that it made for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retried: Option<String>,
    /// What another node needs to go on, in a form that only nodes read. Written by the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 524_288))]
    pub resume: Option<String>,
    /// What was written. Written by the node, after everything was verified at the destination.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<TransferResult>,
    /// The generation whose work and traces are gone from the node and the destination. Written by the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub released_generation: Option<i64>,
    /// `Succeeded` and `Reserved` by the operator, `Staged`, `Durable` and `Progressing` by the node.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TransferResult {
    /// `sha256:` of the image's index, its identity, where it is in an image store; else `sha256:` of the object's bytes, if it is
    /// known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// `sha256:` of the source's bytes; of an image in a store, its identity. Absent where not all bytes of the source were read: where
    /// a qcow2, vmdk, VHD or VHDX was read by ranges. A `spec.checksum` has such a source staged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_digest: Option<String>,
    /// Bytes of the object; in an image store, of the chunks that the image names, compressed, each once.
    pub size: i64,
    /// The size of the disk.
    pub virtual_size: i64,
    /// The object's `ETag`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
    /// The object's version, where the bucket keeps versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version_id: Option<String>,
}
