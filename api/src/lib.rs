//! The kinds of `staging.berth.dev/v1alpha1` as Rust types, and their translation into the types that decisions use.
//!
//! Spec is intent. Status has one writer per field: `assignment`, `state` and the operator's conditions are written by
//! the operator, everything that only a node can know by that node's agent.
#![allow(clippy::duplicated_attributes)] // printed columns of one type are not written twice by mistake

pub mod conditions;
pub mod defaults;
pub mod fields;
pub mod image_store;
pub mod image_transfer;
pub mod parse;
pub mod staged_image;
pub mod staging_ledger;
pub mod staging_node;
pub mod staging_pool;
pub mod staging_reservation;
mod states;
pub mod template_import;

pub use image_store::ImageStore;
pub use image_transfer::ImageTransfer;
pub use staged_image::StagedImage;
pub use staging_ledger::StagingLedger;
pub use staging_node::StagingNode;
pub use staging_pool::StagingPool;
pub use staging_reservation::StagingReservation;
pub use template_import::TemplateImport;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;

/// The API group of every kind.
pub const GROUP: &str = "staging.berth.dev";

/// The definitions of all kinds, in the order they are documented.
pub fn definitions() -> Vec<CustomResourceDefinition> {
    vec![
        StagingPool::crd(),
        StagingReservation::crd(),
        ImageTransfer::crd(),
        TemplateImport::crd(),
        ImageStore::crd(),
        StagingLedger::crd(),
        StagingNode::crd(),
        StagedImage::crd(),
    ]
}
