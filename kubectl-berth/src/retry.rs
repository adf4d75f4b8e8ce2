//! `kubectl berth retry`: an import or a transfer that has failed is tried again, on the same object.

use std::fmt::Debug;
use std::process::ExitCode;

use anyhow::Context as _;
use berth_api::defaults::ANNOTATION_RETRY;
use berth_api::{ImageTransfer, TemplateImport, parse};
use berth_core::transfer::TransferKind;
use berth_core::view::{TransferState, TransferView};
use kube::api::{Patch, PatchParams};
use kube::core::NamespaceResourceScope;
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use thiserror::Error;

use crate::args::{Output, RetryArgs, WorkName};
use crate::observe::Scope;
use crate::server::{self, rfc3339};

/// Why an import or a transfer cannot be tried again.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NotRetryable {
    /// It is being deleted.
    #[error("{kind} {name} is being deleted")]
    Deleted {
        /// What it is.
        kind: &'static str,
        /// Which.
        name: String,
    },
    /// A field cannot be used.
    #[error("{kind} {name} cannot be used: {problem}; change it first")]
    Invalid {
        /// What it is.
        kind: &'static str,
        /// Which.
        name: String,
        /// The field and its value.
        problem: String,
    },
    /// It has not failed.
    #[error("{kind} {name} has not failed: it is {state}")]
    NotFailed {
        /// What it is.
        kind: &'static str,
        /// Which.
        name: String,
        /// In which state it is.
        state: &'static str,
    },
}

/// Asks for an import or a transfer to be tried again.
///
/// # Errors
/// If it is not there, if it has not failed, or if it cannot be read or written.
pub async fn run(client: &Client, scope: &Scope, args: &RetryArgs) -> anyhow::Result<ExitCode> {
    let namespace = args.namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
    let found = match args.what.kind {
        TransferKind::Import => find(client, &namespace, &args.what, parse::import_view).await?,
        TransferKind::Transfer => find(client, &namespace, &args.what, parse::transfer_view).await?,
    };
    require_failed(&found)?;
    // A value that it never had: the API server's time, which no clock of ours sets back.
    let value = rfc3339(server::ask(client, scope.timeout).await?.now);
    let body = json!({"metadata": {"uid": found.uid.as_str(), "annotations": {ANNOTATION_RETRY: value}}});
    match args.what.kind {
        TransferKind::Import => annotate::<TemplateImport>(client, &found, body).await?,
        TransferKind::Transfer => annotate::<ImageTransfer>(client, &found, body).await?,
    }
    let (noun, name) = (found.kind.noun(), &found.name);
    match args.output {
        Output::Table => println!("{noun} {name} is tried again"),
        Output::Json => {
            println!("{:#}", json!({"kind": found.kind.as_str(), "name": name.to_string(), "retry": value}));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads one object as decisions see it.
async fn find<K>(
    client: &Client,
    namespace: &str,
    what: &WorkName,
    view: impl Fn(&K) -> TransferView,
) -> anyhow::Result<TransferView>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    let (kind, name) = (what.kind, &what.name);
    let api = Api::<K>::namespaced(client.clone(), namespace);
    let found =
        api.get_opt(name).await.with_context(|| format!("could not read {kind} {namespace}/{name}"))?;
    let found = found.with_context(|| format!("there is no {kind} {name} in namespace {namespace}"))?;
    Ok(view(&found))
}

async fn annotate<K>(client: &Client, found: &TransferView, body: Value) -> anyhow::Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    let api = Api::<K>::namespaced(client.clone(), &found.name.namespace);
    let params = PatchParams { field_manager: Some("kubectl-berth".to_owned()), ..PatchParams::default() };
    let written = api.patch(&found.name.name, &params, &Patch::Merge(body)).await;
    written.map(drop).with_context(|| format!("could not annotate {}", found.id()))
}

fn require_failed(found: &TransferView) -> Result<(), NotRetryable> {
    let (kind, name) = (found.kind.noun(), found.name.to_string());
    if found.deleting {
        return Err(NotRetryable::Deleted { kind, name });
    }
    if let Some(problem) = found.invalid.clone() {
        return Err(NotRetryable::Invalid { kind, name, problem });
    }
    match found.state {
        TransferState::Failed => Ok(()),
        state => {
            let state = found.kind.name_of(state).unwrap_or("in no state");
            Err(NotRetryable::NotFailed { kind, name, state })
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

    #[test]
    fn a_transfer_is_named_with_its_kind() {
        let transfer = |state: &str| {
            let object: ImageTransfer = serde_json::from_value(json!({
                "apiVersion": "staging.berth.dev/v1alpha1", "kind": "ImageTransfer",
                "metadata": {"name": "t", "namespace": "ns", "uid": "u"},
                "spec": {
                    "source": {"storeImage": {"store": "s", "image": "i"}},
                    "destination": {"storeImage": {"store": "s", "image": "copy"}},
                },
                "status": {"state": state},
            }))
            .expect("readable");
            parse::transfer_view(&object)
        };
        assert_eq!(require_failed(&transfer("Failed")), Ok(()));
        let says = require_failed(&transfer("Succeeded")).expect_err("refused").to_string();
        assert_eq!(says, "transfer ns/t has not failed: it is Succeeded");
    }
}
