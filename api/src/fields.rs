//! Field types that several kinds share.

use std::borrow::Cow;

use kube::KubeSchema;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize};

/// A Kubernetes quantity of bytes, as text (`10Gi`) or a whole number. Parsed once, in [`crate::parse`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Quantity(pub String);

impl Default for Quantity {
    /// No bytes.
    fn default() -> Self {
        Self("0".to_owned())
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Text(String),
            Number(u64),
        }
        Ok(match Written::deserialize(deserializer)? {
            Written::Text(text) => Self(text),
            Written::Number(number) => Self(number.to_string()),
        })
    }
}

impl JsonSchema for Quantity {
    fn schema_name() -> Cow<'static, str> {
        "Quantity".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "x-kubernetes-int-or-string": true,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "pattern": "^[0-9]{1,18}(\\.[0-9]{1,9})?(k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$",
            "maxLength": 32,
        })
    }
}

/// A span of time: whole hours, minutes and seconds, as in `1h`, `90s`, `1h30m`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Span(pub String);

impl JsonSchema for Span {
    fn schema_name() -> Cow<'static, str> {
        "Span".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^([0-9]{1,6}h)?([0-9]{1,6}m)?([0-9]{1,8}s)?$",
            "minLength": 2,
            "maxLength": 24,
        })
    }
}

/// Which pool an object's bytes are in, on which node. Written by the operator, by update with resourceVersion only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(validation = Rule::new("self.generation >= oldSelf.generation").message("generation: never falls"))]
#[serde(rename_all = "camelCase")]
pub struct Assignment {
    /// The pool's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// The node's name.
    pub node: String,
    /// Rises with each new placement; older ones are refused everywhere.
    pub generation: i64,
}

/// Pools by their labels. An empty selector matches every pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolSelector {
    /// Labels that the pool must carry, all of them.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub match_labels: std::collections::BTreeMap<String, String>,
}

/// What happens when the space is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum WhenFull {
    /// Wait in the queue.
    Queue,
    /// Refuse at once, with the shortfall.
    Reject,
}

/// How a bucket's name enters a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Addressing {
    /// `https://endpoint/bucket/key`.
    #[default]
    Path,
    /// `https://bucket.endpoint/key`.
    VirtualHost,
}

/// A Secret in the request's own namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretRef {
    /// The Secret's name.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub name: String,
}

/// A namespaced object elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ObjectRef {
    /// Its namespace.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub namespace: String,
    /// Its name.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub name: String,
}

/// A file behind an HTTP or HTTPS address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HttpSource {
    /// The address.
    #[schemars(length(max = 2048), regex(pattern = r"^https?://[^/\s@]+(/\S*)?$"))]
    pub url: String,
    /// PEM certificates trusted beside the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 65536))]
    pub ca_bundle: Option<String>,
}

/// An object in an S3 bucket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct S3Source {
    /// Scheme, host and optional port.
    #[schemars(length(max = 512), regex(pattern = r"^https?://[^/\s@]+/?$"))]
    pub endpoint: String,
    /// The region in request signatures. Default `us-east-1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub region: Option<String>,
    /// The bucket.
    #[schemars(length(min = 3, max = 63), regex(pattern = r"^[a-z0-9][a-z0-9.-]*[a-z0-9]$"))]
    pub bucket: String,
    /// The object's key.
    #[schemars(length(min = 1, max = 1024))]
    pub key: String,
    /// One version of the object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub version_id: Option<String>,
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
}

/// A place in an S3 bucket that is written to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct S3Target {
    /// Scheme, host and optional port.
    #[schemars(length(max = 512), regex(pattern = r"^https?://[^/\s@]+/?$"))]
    pub endpoint: String,
    /// The region in request signatures. Default `us-east-1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub region: Option<String>,
    /// The bucket.
    #[schemars(length(min = 3, max = 63), regex(pattern = r"^[a-z0-9][a-z0-9.-]*[a-z0-9]$"))]
    pub bucket: String,
    /// The object's key. What is there is replaced.
    #[schemars(length(min = 1, max = 1024))]
    pub key: String,
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
}

/// Where an image comes from: exactly one of the fields.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("[has(self.http), has(self.s3)].filter(set, set).size() == 1")
    .message("exactly one of `http` and `s3` must be set"))]
pub struct Source {
    /// A file behind an HTTP or HTTPS address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpSource>,
    /// An object in an S3 bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub s3: Option<S3Source>,
}

/// Bounds of the work.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TransferLimits {
    /// The largest virtual size. Default `256Gi`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub virtual_size: Option<Quantity>,
    /// The most bytes that the source may have. Default `256Gi`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Quantity>,
    /// How long the source may send nothing. Default `60s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stall_timeout: Option<Span>,
    /// How often in a row a fault that passes is tried again. Default 10. While the image store is away it is tried again
    /// without end, whatever this says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub retries: Option<i32>,
}

/// What a transfer will do, an import's among them.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct TransferPlan {
    /// The source's format: `Raw`, `Qcow2`, `Vmdk`, `Vhd`, `Vhdx` or, in an image store, `Chunked`.
    pub format: String,
    /// The source's bytes.
    pub source_bytes: i64,
    /// The image's virtual size in bytes.
    pub virtual_size: i64,
    /// The most that the work occupies in a pool at once.
    pub peak_bytes: i64,
    /// The stages, in order.
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub steps: Vec<String>,
    /// Why it is done this way.
    pub why: String,
    /// Whether the source comes into a pool first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub staging: Option<PlannedStaging>,
}

/// Whether a source comes into a pool before it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum PlannedStaging {
    /// It goes straight to the destination.
    Direct,
    /// It comes into a pool first.
    Staged,
}

/// What went wrong last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LastError {
    /// One of the documented reasons.
    pub reason: String,
    /// For people, with numbers.
    pub message: String,
    /// When.
    pub time: k8s_openapi::apimachinery::pkg::apis::meta::v1::Time,
    /// Whether it is tried again by itself.
    pub retryable: bool,
}

/// Which step of how many is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Stage {
    /// 1 for the first.
    pub index: i32,
    /// How many there are.
    pub total: i32,
    /// `Fetch`, `Convert`, `Upload`, `Verify` or `Publish`.
    pub name: String,
}

/// How far a piece of work is. Never falls.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// 0 to 100 over all stages; absent while unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<i32>,
    /// Bytes done in this stage.
    #[serde(default)]
    pub bytes_done: i64,
    /// Bytes of this stage; absent while unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_total: Option<i64>,
    /// Bytes that did not have to be moved: holes, and chunks that the store had.
    #[serde(default)]
    pub bytes_skipped: i64,
    /// Bytes that crossed the network, both ways.
    #[serde(default)]
    pub bytes_on_wire: i64,
    /// Bytes per second over the last seconds.
    #[serde(default)]
    pub rate: i64,
}
