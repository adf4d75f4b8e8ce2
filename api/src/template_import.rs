//! `TemplateImport`: an image from elsewhere, registered as a template. Ready only when durable in its image store.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::fields::{
    Assignment, LastError, PoolSelector, Progress, Source, Stage, TransferLimits, TransferPlan,
};

/// What is to be imported.
#[derive(CustomResource, Clone, Debug, Deserialize, Serialize, KubeSchema)]
#[kube(
    group = "staging.berth.dev",
    version = "v1alpha1",
    kind = "TemplateImport",
    namespaced,
    shortname = "tmplimp",
    category = "berth",
    status = "TemplateImportStatus",
    selectable = ".status.assignment.node",
    doc = "An image from elsewhere, registered as a template.",
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason"
    ),
    printcolumn(name = "Stage", type_ = "string", json_path = ".status.stage.name"),
    printcolumn(name = "Progress", type_ = "integer", json_path = ".status.progress.percent"),
    printcolumn(name = "Node", type_ = "string", json_path = ".status.assignment.node"),
    printcolumn(name = "Size", type_ = "integer", json_path = ".status.durable.virtualSize"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Rate", type_ = "integer", json_path = ".status.progress.rate", priority = 1),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        priority = 1
    )
)]
#[x_kube(validation = Rule::new("self.source == oldSelf.source && self.store == oldSelf.store && has(self.checksum) == has(oldSelf.checksum) && (!has(self.checksum) || self.checksum == oldSelf.checksum)")
    .message("spec: `source`, `store` and `checksum` are immutable; make another import"))]
#[serde(rename_all = "camelCase")]
pub struct TemplateImportSpec {
    /// Where the image comes from.
    pub source: Source,
    /// The image store, in the same namespace.
    pub store: StoreReference,
    /// What the bytes of the source must add up to, as they are transferred.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 71), regex(pattern = r"^sha256:[0-9a-f]{64}$"))]
    pub checksum: Option<String>,
    /// Bounds of the work.
    #[serde(default)]
    pub limits: TransferLimits,
    /// Pools that may stage what the work needs. Default: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_selector: Option<PoolSelector>,
    /// Namespaces whose claims may start from the template, beside its own. `*` allows all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 256),
        inner(length(min = 1, max = 63), regex(pattern = r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?|\*)$"))
    )]
    pub allowed_namespaces: Vec<String>,
}

/// An `ImageStore` in the same namespace.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StoreReference {
    /// Its name.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub name: String,
}

/// The states, in the order they are passed through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum ImportState {
    /// Nothing has looked at it yet, or no node can.
    Pending,
    /// A node reads the head of the source.
    Probing,
    /// It waits for its reservation.
    Queued,
    /// A node imports it.
    Importing,
    /// It is durable.
    Ready,
    /// It has ended without success.
    Failed,
}

/// What became of an import.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, KubeSchema)]
#[x_kube(validation = Rule::new(crate::states::rule_of(berth_core::transfer::TransferKind::Import)).message(crate::states::MESSAGE))]
#[serde(rename_all = "camelCase")]
pub struct TemplateImportStatus {
    /// The discriminant of its state. Written by the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<ImportState>,
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
    /// The image as it lies in the store. Written by the node, after everything was verified there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub durable: Option<DurableImage>,
    /// The generation whose work and traces are gone from the node and the store. Written by the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub released_generation: Option<i64>,
    /// `Ready` and `Reserved` by the operator, `Durable` and `Progressing` by the node.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// An image in its store.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DurableImage {
    /// `sha256:` of its index: the image's identity.
    pub digest: String,
    /// `sha256:` of the source's bytes.
    pub source_digest: String,
    /// Bytes in the store that the image names, compressed, each chunk once.
    pub size: i64,
    /// The size of the disk.
    pub virtual_size: i64,
    /// Bytes of its chunks that are not holes: what a staged copy is charged.
    pub real_size: i64,
    /// How many chunks it names, each once.
    pub chunks: i64,
}
