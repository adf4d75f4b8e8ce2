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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::JSONSchemaProps;

    use super::*;

    /// The names of all fields below a schema.
    fn names(schema: &JSONSchemaProps, into: &mut BTreeSet<String>) {
        for (name, inner) in schema.properties.iter().flatten() {
            into.insert(name.clone());
            names(inner, into);
        }
        let items = schema.items.as_ref().and_then(|items| serde_json::to_value(items).ok());
        if let Some(items) = items.and_then(|items| serde_json::from_value::<JSONSchemaProps>(items).ok()) {
            names(&items, into);
        }
    }

    fn spec_fields(definition: &CustomResourceDefinition) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let schema =
            definition.spec.versions[0].schema.as_ref().and_then(|schema| schema.open_api_v3_schema.as_ref());
        let spec = schema.and_then(|schema| schema.properties.as_ref()?.get("spec"));
        names(spec.expect("every kind has a spec"), &mut found);
        found
    }

    #[test]
    fn a42_staging_is_configured_on_pools_and_transfers_alone() {
        let of_pools = [
            "filesystem",
            "dmThin",
            "devices",
            "volumeGroup",
            "size",
            "admission",
            "reclaim",
            "highWatermark",
            "keepWarm",
            "maxQueued",
            "tenantLimits",
            "strategy",
        ];
        for definition in definitions() {
            let (kind, fields) = (&definition.spec.names.kind, spec_fields(&definition));
            if kind == "StagingPool" {
                let missing: Vec<_> = of_pools.iter().filter(|name| !fields.contains(**name)).collect();
                assert!(missing.is_empty(), "not on pools any more: {missing:?} of {fields:?}");
            } else {
                let here: Vec<_> = of_pools.iter().filter(|name| fields.contains(**name)).collect();
                assert!(here.is_empty(), "{kind} configures {here:?}");
            }
            assert_eq!(fields.contains("staging"), kind == "ImageTransfer", "`staging` on {kind}");
        }
    }
}
