//! Applying manifests of any kind: CRDs, RBAC, examples.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, TypeMeta};
use kube::core::discovery::Scope;
use kube::{Api, Client, ResourceExt, discovery};
use serde_json::Value;

use super::Cluster;
use crate::wait::{self, Look, WaitError};

/// How long one object may take to be accepted: a fresh CRD answers 404 and 429 for some seconds.
const APPLY_LIMIT: Duration = Duration::from_secs(60);

/// Who owns the fields that tests apply.
const FIELD_MANAGER: &str = "berth-e2e";

/// Why a manifest could not be applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// A file or folder could not be read.
    #[error("failed to read {path}")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is no YAML.
    #[error("failed to parse a manifest")]
    Yaml(#[source] serde_saphyr::Error),
    /// A document is no Kubernetes object.
    #[error("document {index} of a manifest is no Kubernetes object")]
    Object {
        /// The document's place, from 0.
        index: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A document lacks `apiVersion` and `kind`, or they are malformed.
    #[error("document {index} of a manifest has no usable apiVersion and kind")]
    NoKind {
        /// The document's place, from 0.
        index: usize,
    },
    /// A folder of CRDs holds none.
    #[error("no custom resource definition in {path}")]
    NoCrds {
        /// The folder.
        path: PathBuf,
    },
    /// The API server refused an object, or did not take it in time.
    #[error(transparent)]
    Refused(#[from] WaitError<kube::Error>),
}

impl Cluster {
    /// Applies a manifest of one or more documents, as the administrator, by server-side apply with force. Objects
    /// without a namespace go to `default`. Waits for kinds that are being installed. Returns what the server stored.
    ///
    /// # Errors
    /// [`ApplyError`]; documents before the refused one stay applied.
    pub async fn apply_yaml(&self, manifest: &str) -> Result<Vec<DynamicObject>, ApplyError> {
        let mut stored = Vec::new();
        for (object, types) in parse(manifest)? {
            stored.push(apply_one(&self.admin(), &types, &object).await?);
        }
        Ok(stored)
    }

    /// [`Cluster::apply_yaml`] of a file's content.
    ///
    /// # Errors
    /// [`ApplyError`].
    pub async fn apply_file(&self, path: &Path) -> Result<Vec<DynamicObject>, ApplyError> {
        let manifest = fs::read_to_string(path);
        self.apply_yaml(&manifest.map_err(|source| ApplyError::Read { path: path.to_owned(), source })?).await
    }

    /// Applies every `*.yaml` of a folder and waits until each CRD among them is established and its storage answers.
    ///
    /// # Errors
    /// [`ApplyError`].
    pub async fn install_crds(&self, dir: &Path) -> Result<(), ApplyError> {
        let mut names = Vec::new();
        for file in yaml_files(dir).map_err(|source| ApplyError::Read { path: dir.to_owned(), source })? {
            let stored = self.apply_file(&file).await?;
            let is_crd = |types: &TypeMeta| types.kind == "CustomResourceDefinition";
            let crds = stored.iter().filter(|object| object.types.as_ref().is_some_and(is_crd));
            names.extend(crds.map(ResourceExt::name_any));
        }
        if names.is_empty() {
            return Err(ApplyError::NoCrds { path: dir.to_owned() });
        }
        for name in names {
            wait_established(&self.admin(), &name).await?;
        }
        Ok(())
    }
}

/// Whether the same request may succeed a moment later: the server is busy, starting, or (re)initialising a storage.
pub(super) fn is_transient(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => matches!(status.code, 429 | 500 | 503 | 504),
        kube::Error::HyperError(_) | kube::Error::Service(_) => true,
        _ => false,
    }
}

/// Whether the server does not know a kind yet. A missing namespace is a 404 too, and stays one.
fn is_unknown_kind(error: &kube::Error) -> bool {
    match error {
        kube::Error::Discovery(_) => true,
        kube::Error::Api(status) => {
            let namespace = status.details.as_ref().is_some_and(|details| details.kind == "namespaces");
            status.code == 404 && !namespace
        }
        _ => false,
    }
}

fn parse(manifest: &str) -> Result<Vec<(DynamicObject, GroupVersionKind)>, ApplyError> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(manifest).map_err(ApplyError::Yaml)?;
    let mut objects = Vec::new();
    for (index, document) in documents.into_iter().enumerate().filter(|(_, document)| !document.is_null()) {
        let object: DynamicObject =
            serde_json::from_value(document).map_err(|source| ApplyError::Object { index, source })?;
        let types = object.types.as_ref().and_then(|types| GroupVersionKind::try_from(types).ok());
        objects.push((object, types.ok_or(ApplyError::NoKind { index })?));
    }
    Ok(objects)
}

async fn apply_one(
    client: &Client,
    types: &GroupVersionKind,
    object: &DynamicObject,
) -> Result<DynamicObject, WaitError<kube::Error>> {
    let name = object.name_any();
    let params = PatchParams::apply(FIELD_MANAGER).force();
    wait::until(&format!("{} {name} to be applied", types.kind), APPLY_LIMIT, || async {
        let applying = async {
            let (resource, capabilities) = discovery::pinned_kind(client, types).await?;
            let namespaced = capabilities.scope == Scope::Namespaced;
            api_for(client, &resource, namespaced, object).patch(&name, &params, &Patch::Apply(object)).await
        };
        match applying.await {
            Ok(stored) => Look::Done(stored),
            Err(error) if is_transient(&error) || is_unknown_kind(&error) => Look::NotYet(error.to_string()),
            Err(error) => Look::Failed(error),
        }
    })
    .await
}

fn api_for(
    client: &Client,
    resource: &ApiResource,
    namespaced: bool,
    object: &DynamicObject,
) -> Api<DynamicObject> {
    if namespaced {
        let namespace = object.namespace().unwrap_or_else(|| "default".to_owned());
        Api::namespaced_with(client.clone(), &namespace, resource)
    } else {
        Api::all_with(client.clone(), resource)
    }
}

/// Waits until a CRD is established, then until a list of every served version is answered: a fresh storage says
/// 404, or 429 "storage is (re)initializing", for a while.
async fn wait_established(client: &Client, name: &str) -> Result<(), WaitError<kube::Error>> {
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    let crd = wait::until(&format!("CRD {name} to be established"), APPLY_LIMIT, || async {
        match crds.get(name).await {
            Ok(crd) if is_established(&crd) => Look::Done(crd),
            Ok(_) => Look::NotYet("it exists".to_owned()),
            Err(error) if is_transient(&error) => Look::NotYet(error.to_string()),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    for version in crd.spec.versions.iter().filter(|version| version.served) {
        let kind = GroupVersionKind::gvk(&crd.spec.group, &version.name, &crd.spec.names.kind);
        let resource = ApiResource::from_gvk_with_plural(&kind, &crd.spec.names.plural);
        let objects: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
        wait::until(&format!("the storage of {name} {}", version.name), APPLY_LIMIT, || async {
            match objects.list(&ListParams::default().limit(1)).await {
                Ok(_) => Look::Done(()),
                Err(error) if is_transient(&error) || is_unknown_kind(&error) => {
                    Look::NotYet(error.to_string())
                }
                Err(error) => Look::Failed(error),
            }
        })
        .await?;
    }
    Ok(())
}

fn is_established(crd: &CustomResourceDefinition) -> bool {
    let conditions = crd.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions
        .into_iter()
        .flatten()
        .any(|condition| condition.type_ == "Established" && condition.status == "True")
}

/// The `*.yaml` of a folder, in the order of their names.
fn yaml_files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_keep_their_order_and_types() {
        let manifest = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {number: \"1\"}\n---\n\
                        apiVersion: staging.berth.dev/v1alpha1\nkind: StagingPool\nmetadata: {name: b}\n\
                        spec: {percent: 70, on: true}\n";
        let objects = parse(manifest).unwrap();
        let kinds: Vec<_> =
            objects.iter().map(|(_, types)| (types.group.as_str(), types.kind.as_str())).collect();
        assert_eq!(kinds, [("", "ConfigMap"), ("staging.berth.dev", "StagingPool")]);
        assert_eq!(objects[0].0.data["data"]["number"], Value::from("1"));
        assert_eq!(objects[1].0.data["spec"]["percent"], Value::from(70));
        assert_eq!(objects[1].0.data["spec"]["on"], Value::from(true));
    }

    #[test]
    fn a_document_without_a_kind_is_named() {
        let error = parse("apiVersion: v1\nkind: ConfigMap\n---\nmetadata: {name: b}\n").unwrap_err();
        assert!(matches!(error, ApplyError::NoKind { index: 1 }), "{error:?}");
    }
}
