//! `ImageStore`: an S3 bucket and prefix that is the system of record for images.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::fields::{Addressing, Assignment, Quantity, SecretRef};

/// Where the bucket is.
#[derive(CustomResource, Clone, Debug, Deserialize, Serialize, KubeSchema)]
#[kube(
    group = "staging.berth.dev",
    version = "v1alpha1",
    kind = "ImageStore",
    namespaced,
    shortname = "imgstore",
    category = "berth",
    status = "ImageStoreStatus",
    doc = "An S3 bucket and prefix that is the system of record for images.",
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
    printcolumn(name = "Bucket", type_ = "string", json_path = ".spec.bucket"),
    printcolumn(name = "Images", type_ = "integer", json_path = ".status.images"),
    printcolumn(name = "Unique", type_ = "integer", json_path = ".status.uniqueBytes"),
    printcolumn(name = "Unreferenced", type_ = "integer", json_path = ".status.unreferencedBytes"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        priority = 1
    )
)]
#[x_kube(validation = Rule::new("self.bucket == oldSelf.bucket && self.endpoint == oldSelf.endpoint && has(self.prefix) == has(oldSelf.prefix) && (!has(self.prefix) || self.prefix == oldSelf.prefix)")
    .message("spec: `endpoint`, `bucket` and `prefix` are immutable"))]
#[x_kube(validation = Rule::new("has(self.chunkSize) == has(oldSelf.chunkSize) && (!has(self.chunkSize) || self.chunkSize == oldSelf.chunkSize)")
    .message("spec.chunkSize: immutable"))]
#[serde(rename_all = "camelCase")]
pub struct ImageStoreSpec {
    /// Scheme, host and optional port.
    #[schemars(length(max = 512), regex(pattern = r"^https?://[^/\s@]+/?$"))]
    pub endpoint: String,
    /// The region in request signatures. Default `us-east-1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub region: Option<String>,
    /// The bucket; it must exist.
    #[schemars(length(min = 3, max = 63), regex(pattern = r"^[a-z0-9][a-z0-9.-]*[a-z0-9]$"))]
    pub bucket: String,
    /// Everything of this store lies below it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512), regex(pattern = r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$"))]
    pub prefix: Option<String>,
    /// How the bucket's name enters a request. Default `Path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addressing: Option<Addressing>,
    /// Keys `accessKeyId`, `secretKey` and optionally `sessionToken`. Without it the node's own identity is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,
    /// PEM certificates trusted beside the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 65536))]
    pub ca_bundle: Option<String>,
    /// The size of a chunk: a power of two from 64Ki to 4Mi. Default `256Ki`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("type(self) == string && self in ['64Ki', '128Ki', '256Ki', '512Ki', '1Mi', '2Mi', '4Mi']")
        .message("spec.chunkSize: one of 64Ki, 128Ki, 256Ki, 512Ki, 1Mi, 2Mi, 4Mi"))]
    pub chunk_size: Option<Quantity>,
}

/// What the assigned node found in the store.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageStoreStatus {
    /// The node that looks after it. Written by the operator, by update with resourceVersion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment: Option<Assignment>,
    /// What the store was seen to do. Written by the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capabilities: Option<StoreCapabilities>,
    /// How many images it holds. Written by the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<i64>,
    /// Bytes of all its chunks, each counted once. Written by the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unique_bytes: Option<i64>,
    /// Bytes of the chunks that no index names. Written by the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unreferenced_bytes: Option<i64>,
    /// `Ready`, by the node.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// What a store was seen to do; never assumed.
#[allow(clippy::struct_excessive_bools)] // four facts that do not depend on each other
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StoreCapabilities {
    /// It refuses to overwrite with `If-None-Match: *`.
    pub conditional_writes: bool,
    /// It refuses a body that does not have the checksum that was sent with it.
    pub verifies_checksums: bool,
    /// It lists multipart uploads.
    pub lists_uploads: bool,
    /// It answers ranged reads with the range.
    pub ranges: bool,
}
