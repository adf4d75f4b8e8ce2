//! `kubectl berth retry`: an import that has failed is tried again, on the same object.

use std::process::ExitCode;

use anyhow::Context as _;
use berth_api::defaults::ANNOTATION_RETRY;
use berth_api::{TemplateImport, parse};
use berth_core::transfer::TransferKind;
use berth_core::view::{TransferState, TransferView};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use thiserror::Error;

use crate::args::{Output, RetryArgs};
use crate::observe::Scope;
use crate::server::{self, rfc3339};

/// Why an import cannot be tried again.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NotRetryable {
    /// It is being deleted.
    #[error("import {0} is being deleted")]
    Deleted(String),
    /// A field cannot be used.
    #[error("import {name} cannot be used: {problem}; change it first")]
    Invalid {
        /// Which.
        name: String,
        /// The field and its value.
        problem: String,
    },
    /// It has not failed.
    #[error("import {name} has not failed: it is {state}")]
    NotFailed {
        /// Which.
        name: String,
        /// What it is.
        state: &'static str,
    },
}

/// Asks for an import to be tried again.
///
/// # Errors
/// If it is not there, if it has not failed, or if it cannot be read or written.
pub async fn run(client: &Client, scope: &Scope, args: &RetryArgs) -> anyhow::Result<ExitCode> {
    let namespace = args.namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
    let imports = Api::<TemplateImport>::namespaced(client.clone(), &namespace);
    let name = &args.name;
    let what = format!("TemplateImport {namespace}/{name}");
    let found = imports.get_opt(name).await.with_context(|| format!("could not read {what}"))?;
    let found =
        found.with_context(|| format!("there is no TemplateImport {name} in namespace {namespace}"))?;
    let view = parse::import_view(&found);
    require_failed(&view)?;
    // A value that it never had: the API server's time, which no clock of ours sets back.
    let value = rfc3339(server::ask(client, scope.timeout).await?.now);
    let body = json!({"metadata": {"uid": view.uid.as_str(), "annotations": {ANNOTATION_RETRY: value}}});
    let params = PatchParams { field_manager: Some("kubectl-berth".to_owned()), ..PatchParams::default() };
    let written = imports.patch(name, &params, &Patch::Merge(body)).await;
    written.with_context(|| format!("could not annotate {what}"))?;
    match args.output {
        Output::Table => println!("import {} is tried again", view.name),
        Output::Json => println!("{:#}", json!({"name": view.name.to_string(), "retry": value})),
    }
    Ok(ExitCode::SUCCESS)
}

fn require_failed(import: &TransferView) -> Result<(), NotRetryable> {
    let name = import.name.to_string();
    if import.deleting {
        return Err(NotRetryable::Deleted(name));
    }
    if let Some(problem) = import.invalid.clone() {
        return Err(NotRetryable::Invalid { name, problem });
    }
    match import.state {
        TransferState::Failed => Ok(()),
        state => {
            let state = TransferKind::Import.name_of(state).unwrap_or("in no state");
            Err(NotRetryable::NotFailed { name, state })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_has_failed_is_tried_again() {
        let import = |state: &str, limits: &str| {
            let object: TemplateImport = serde_json::from_value(json!({
                "apiVersion": "staging.berth.dev/v1alpha1", "kind": "TemplateImport",
                "metadata": {"name": "t", "namespace": "ns", "uid": "u"},
                "spec": {
                    "source": {"http": {"url": "https://example.org/a"}}, "store": {"name": "s"},
                    "limits": {"bytes": limits},
                },
                "status": {"state": state},
            }))
            .expect("readable");
            parse::import_view(&object)
        };
        assert_eq!(require_failed(&import("Failed", "1Gi")), Ok(()));
        let says = |import: &TransferView| require_failed(import).expect_err("refused").to_string();
        assert!(says(&import("Ready", "1Gi")).contains("ns/t has not failed: it is Ready"));
        assert!(says(&import("Failed", "0")).contains("spec.limits.bytes"));
        let mut deleted = import("Failed", "1Gi");
        deleted.deleting = true;
        assert!(says(&deleted).contains("is being deleted"));
    }
}
