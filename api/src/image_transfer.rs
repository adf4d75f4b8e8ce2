//! `ImageTransfer`: a movement of image content. This version stores such objects and says that it carries out none.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

/// A movement of image content. Fields enter as they work.
#[derive(CustomResource, Clone, Debug, Default, Deserialize, Serialize, KubeSchema)]
#[kube(
    group = "staging.berth.dev",
    version = "v1alpha1",
    kind = "ImageTransfer",
    namespaced,
    shortname = "imgx",
    category = "berth",
    status = "ImageTransferStatus",
    doc = "A movement of image content. This version carries out none.",
    printcolumn(
        name = "Succeeded",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Succeeded\")].status"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Succeeded\")].reason"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct ImageTransferSpec {}

/// What became of a transfer.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageTransferStatus {
    /// `Succeeded`, by the operator.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}
