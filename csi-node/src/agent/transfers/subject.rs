//! What a node works on: a `TemplateImport` or an `ImageTransfer`. Both ask for the same in one form, and differ in what is
//! told of them.

use std::sync::Arc;

use berth_api::fields::{Assignment, LastError, Progress, Stage, TransferPlan};
use berth_api::image_transfer::{TransferResult, TransferState};
use berth_api::parse::{self, InvalidField};
use berth_api::template_import::{DurableImage, ImportState};
use berth_api::{ImageTransfer, TemplateImport};
use berth_core::ids::{ObjectName, Uid};
use berth_core::transfer::TransferKind;
use berth_core::units::Generation;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::Api;
use kube::api::ObjectMeta;

use super::WorkError;
use crate::node::Node;

/// An object of either kind.
#[derive(Clone, Debug)]
pub enum Subject {
    /// An import.
    Import(Arc<TemplateImport>),
    /// A transfer.
    Transfer(Arc<ImageTransfer>),
}

/// What came of the work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Of an import.
    Image(DurableImage),
    /// Of a transfer.
    Result(TransferResult),
}

/// What is shown of an object of either kind that its node wrote.
#[derive(Clone, Debug, Default)]
pub struct Reported {
    /// What will be done.
    pub plan: Option<TransferPlan>,
    /// What is being done.
    pub stage: Option<Stage>,
    /// How far.
    pub progress: Option<Progress>,
    /// How often it was begun.
    pub attempts: Option<i32>,
    /// What went wrong last.
    pub last_error: Option<LastError>,
    /// The generation whose work that has ended.
    pub failed_generation: Option<i64>,
    /// What another node needs to go on.
    pub resume: Option<String>,
    /// What came of it.
    pub outcome: Option<Outcome>,
    /// The generation whose traces are gone.
    pub released_generation: Option<i64>,
}

impl Subject {
    /// Those that are assigned to this node, as far as it is shown.
    pub fn all(node: &Node) -> Vec<Self> {
        let imports = node.watches.imports.state().into_iter().map(Self::Import);
        imports.chain(node.watches.transfers.state().into_iter().map(Self::Transfer)).collect()
    }

    /// The object with this UID.
    pub fn find(node: &Node, uid: &Uid) -> Result<Self, WorkError> {
        let is_it = |meta: &ObjectMeta| meta.uid.as_deref() == Some(uid.as_str());
        let import = node.watches.imports.find(|import| is_it(&import.metadata)).map(Self::Import);
        let transfer = || node.watches.transfers.find(|transfer| is_it(&transfer.metadata));
        import.or_else(|| transfer().map(Self::Transfer)).ok_or_else(|| WorkError::Gone(uid.clone()))
    }

    /// Which kind it is.
    pub fn kind(&self) -> TransferKind {
        match self {
            Self::Import(_) => TransferKind::Import,
            Self::Transfer(_) => TransferKind::Transfer,
        }
    }

    /// Its metadata.
    pub fn meta(&self) -> &ObjectMeta {
        match self {
            Self::Import(import) => &import.metadata,
            Self::Transfer(transfer) => &transfer.metadata,
        }
    }

    /// Its name.
    pub fn name(&self) -> ObjectName {
        let meta = self.meta();
        let (namespace, name) = (meta.namespace.clone(), meta.name.clone());
        ObjectName::new(namespace.unwrap_or_default(), name.unwrap_or_default())
    }

    /// Its UID.
    pub fn uid(&self) -> Uid {
        Uid::from(self.meta().uid.clone().unwrap_or_default())
    }

    /// True if it is being deleted.
    pub fn is_deleting(&self) -> bool {
        self.meta().deletion_timestamp.is_some()
    }

    /// True if it is to pause.
    pub fn is_suspended(&self) -> bool {
        match self {
            Self::Import(_) => false,
            Self::Transfer(transfer) => transfer.spec.suspend,
        }
    }

    /// True if the operator says that it has ended without success.
    pub fn has_failed(&self) -> bool {
        match self {
            Self::Import(import) => {
                import.status.as_ref().is_some_and(|status| status.state == Some(ImportState::Failed))
            }
            Self::Transfer(transfer) => {
                transfer.status.as_ref().is_some_and(|status| status.state == Some(TransferState::Failed))
            }
        }
    }

    /// What it asks for.
    pub fn asked(&self) -> Result<parse::Asked, InvalidField> {
        match self {
            Self::Import(import) => parse::asked_import(import),
            Self::Transfer(transfer) => parse::asked_transfer(transfer),
        }
    }

    /// Where it was placed.
    pub fn assignment(&self) -> Option<&Assignment> {
        match self {
            Self::Import(import) => import.status.as_ref()?.assignment.as_ref(),
            Self::Transfer(transfer) => transfer.status.as_ref()?.assignment.as_ref(),
        }
    }

    /// The generation of its assignment, if that is to this node.
    pub fn assigned_to(&self, node: &Node) -> Option<Generation> {
        let ours = self.assignment().filter(|assignment| assignment.node == node.name.as_str())?;
        Some(parse::generation(ours.generation))
    }

    /// What is shown of its conditions.
    pub fn conditions(&self) -> Vec<Condition> {
        match self {
            Self::Import(import) => import.status.as_ref().map(|status| status.conditions.clone()),
            Self::Transfer(transfer) => transfer.status.as_ref().map(|status| status.conditions.clone()),
        }
        .unwrap_or_default()
    }

    /// What is shown of what its node has told.
    pub fn reported(&self) -> Reported {
        match self {
            Self::Import(import) => {
                let status = import.status.clone().unwrap_or_default();
                Reported {
                    plan: status.plan,
                    stage: status.stage,
                    progress: status.progress,
                    attempts: status.attempts,
                    last_error: status.last_error,
                    failed_generation: status.failed_generation,
                    resume: None,
                    outcome: status.durable.map(Outcome::Image),
                    released_generation: status.released_generation,
                }
            }
            Self::Transfer(transfer) => {
                let status = transfer.status.clone().unwrap_or_default();
                Reported {
                    plan: status.plan,
                    stage: status.stage,
                    progress: status.progress,
                    attempts: status.attempts,
                    last_error: status.last_error,
                    failed_generation: status.failed_generation,
                    resume: status.resume,
                    outcome: status.result.map(Outcome::Result),
                    released_generation: status.released_generation,
                }
            }
        }
    }

    /// True if the API server itself says that this generation of it is this node's to do: a watch may lag, and what was
    /// given up is not to be begun again. False where it does not answer.
    pub async fn is_ours(&self, node: &Node, generation: Generation) -> bool {
        let (client, name) = (node.client.clone(), self.name());
        let found = match self {
            Self::Import(_) => {
                let api = Api::<TemplateImport>::namespaced(client, &name.namespace);
                api.get_opt(&name.name).await.map(|found| found.map(|found| Self::Import(Arc::new(found))))
            }
            Self::Transfer(_) => {
                let api = Api::<ImageTransfer>::namespaced(client, &name.namespace);
                api.get_opt(&name.name).await.map(|found| found.map(|found| Self::Transfer(Arc::new(found))))
            }
        };
        match found {
            Ok(found) => found.is_some_and(|found| {
                found.uid() == self.uid() && found.is_assigned(node.name.as_str(), generation)
            }),
            Err(error) => {
                let error = crate::telemetry::chain(&error);
                tracing::warn!(%name, error, "whose work this is could not be read");
                false
            }
        }
    }

    /// True if this generation of it is to be done on this node, and it is not being deleted.
    fn is_assigned(&self, node: &str, generation: Generation) -> bool {
        let ours = self.assignment().is_some_and(|assignment| {
            assignment.node == node && parse::generation(assignment.generation) == generation
        });
        ours && !self.is_deleting()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_superseded_is_ours_only_at_our_generation_and_while_it_is_not_deleted() {
        let import = |node: &str, generation: u64, deleted: bool| {
            let mut import = serde_json::json!({
                "apiVersion": "staging.berth.dev/v1alpha1", "kind": "TemplateImport",
                "metadata": {"name": "t", "namespace": "ns", "uid": "u"},
                "spec": {"source": {"http": {"url": "https://example.org/a"}}, "store": {"name": "s"}},
                "status": {"assignment": {"pool": "p", "node": node, "generation": generation}},
            });
            if deleted {
                import["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
            }
            Subject::Import(Arc::new(serde_json::from_value(import).unwrap()))
        };
        let is_ours = |import: &Subject| import.is_assigned("n1", Generation(2));
        assert!(is_ours(&import("n1", 2, false)));
        assert!(!is_ours(&import("n2", 2, false)) && !is_ours(&import("n1", 3, false)));
        assert!(!is_ours(&import("n1", 2, true)), "its session is being removed");
    }
}
