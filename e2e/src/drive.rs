//! What a user of a site does and waits for: pools, image stores, imports.

use std::collections::BTreeSet;
use std::time::Duration;

use berth_api::conditions::{self, ConditionType};
use berth_api::template_import::{DurableImage, ImportState, TemplateImportStatus};
use berth_api::{ImageStore, StagingPool, TemplateImport};
use futures::StreamExt as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::runtime::watcher;
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use crate::site::{BUCKET, NODE_LABEL, Site, SiteError, SiteNode};
use crate::wait::{self, Look, WaitError};

/// How long a pool or an image store may take to become ready on a busy machine.
const READY_LIMIT: Duration = Duration::from_secs(90);

/// Why something that was asked of a site did not come about.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// A part of the site.
    #[error(transparent)]
    Site(#[from] SiteError),
    /// It was not ready in time.
    #[error(transparent)]
    Wait(#[from] WaitError<kube::Error>),
    /// The watch of an import broke for good.
    #[error("failed to watch import {import}")]
    Watch {
        /// The import.
        import: String,
        /// What the API server said.
        source: Box<watcher::Error>,
    },
    /// The import has failed.
    #[error("import {import} failed: {reason}: {message}")]
    Failed {
        /// The import.
        import: String,
        /// The machine-readable reason.
        reason: String,
        /// For people.
        message: String,
    },
    /// The import was deleted, or says that it is ready without saying what it made.
    #[error("import {import} {what}")]
    Odd {
        /// The import.
        import: String,
        /// What is odd.
        what: &'static str,
    },
    /// The import has not ended.
    #[error("import {import} has not ended within {limit:?}; last status: {last}")]
    Late {
        /// The import.
        import: String,
        /// How long it was waited for.
        limit: Duration,
        /// Its last status.
        last: String,
    },
}

/// Makes a pool of a directory on every node, with `size` bytes as a quantity, and waits until it is ready.
///
/// # Errors
/// [`DriveError`].
pub async fn make_pool(site: &Site, name: &str, size: &str) -> Result<(), DriveError> {
    let backend = json!({ "filesystem": { "path": site.pool_path(name), "size": size } });
    make_pool_of(site, name, &backend).await
}

/// Makes a pool of the device mapper on the disk that each node with a kernel of its own has for it, and waits until it is
/// ready.
///
/// # Errors
/// [`DriveError`].
pub async fn make_thin_pool(site: &Site, name: &str) -> Result<(), DriveError> {
    let devices: BTreeSet<_> = site.nodes().iter().filter_map(SiteNode::pool_device).collect();
    make_pool_of(site, name, &json!({ "dmThin": { "devices": devices, "wipe": true } })).await
}

async fn make_pool_of(site: &Site, name: &str, backend: &Value) -> Result<(), DriveError> {
    let pool = json!({
        "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingPool", "metadata": { "name": name },
        "spec": { "backend": backend, "nodeSelector": { NODE_LABEL: "yes" } },
    });
    site.apply(&pool.to_string()).await?;
    wait_pool(&site.client(), name, site.nodes().len()).await
}

/// Waits until a pool is ready on `nodes` nodes.
///
/// # Errors
/// [`DriveError::Wait`], with the pool's last status.
pub async fn wait_pool(client: &Client, name: &str, nodes: usize) -> Result<(), DriveError> {
    let pools: Api<StagingPool> = Api::all(client.clone());
    wait::until(&format!("pool {name} on {nodes} nodes"), READY_LIMIT, || async {
        let status = match pools.get(name).await {
            Ok(pool) => pool.status.unwrap_or_default(),
            Err(error) => return Look::Failed(error),
        };
        let carried = usize::try_from(status.nodes).unwrap_or_default();
        if conditions::is_true(&status.conditions, ConditionType::Ready) && carried >= nodes {
            return Look::Done(());
        }
        Look::NotYet(format!("{carried} nodes, {}", words(&status.conditions)))
    })
    .await?;
    Ok(())
}

/// Makes an image store in `namespace` on the site's own server, with credentials that the nodes may read, and waits
/// until it is ready.
///
/// # Errors
/// [`DriveError`].
pub async fn make_store(site: &Site, namespace: &str, name: &str) -> Result<(), DriveError> {
    site.give_credentials(namespace, "images-s3").await?;
    let store = json!({
        "apiVersion": "staging.berth.dev/v1alpha1", "kind": "ImageStore",
        "metadata": { "name": name, "namespace": namespace },
        "spec": {
            "endpoint": site.s3_endpoint(), "bucket": BUCKET, "prefix": name, "secretRef": { "name": "images-s3" },
        },
    });
    site.apply(&store.to_string()).await?;
    wait_store(&site.client(), namespace, name).await
}

/// Waits until an image store is ready.
///
/// # Errors
/// [`DriveError::Wait`], with the store's last conditions.
pub async fn wait_store(client: &Client, namespace: &str, name: &str) -> Result<(), DriveError> {
    let stores: Api<ImageStore> = Api::namespaced(client.clone(), namespace);
    wait::until(&format!("image store {namespace}/{name}"), READY_LIMIT, || async {
        match stores.get(name).await.map(|store| store.status.unwrap_or_default().conditions) {
            Ok(conditions) if conditions::is_true(&conditions, ConditionType::Ready) => Look::Done(()),
            Ok(conditions) => Look::NotYet(words(&conditions)),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    Ok(())
}

/// Makes an import of `source` (as in `spec.source`) into a store of the same namespace.
///
/// # Errors
/// [`DriveError::Site`].
pub async fn import(
    site: &Site,
    namespace: &str,
    name: &str,
    store: &str,
    source: &Value,
) -> Result<(), DriveError> {
    let import = json!({
        "apiVersion": "staging.berth.dev/v1alpha1", "kind": "TemplateImport",
        "metadata": { "name": name, "namespace": namespace },
        "spec": { "source": source, "store": { "name": store } },
    });
    site.apply(&import.to_string()).await?;
    Ok(())
}

/// Watches an import until it has ended, for `limit` at most, and shows every status on the way to `seen`. Returns
/// what it made.
///
/// # Errors
/// [`DriveError`]; [`DriveError::Failed`] when the import itself has failed.
pub async fn wait_import(
    client: &Client,
    namespace: &str,
    name: &str,
    limit: Duration,
    mut seen: impl FnMut(&TemplateImportStatus),
) -> Result<DurableImage, DriveError> {
    let import = || format!("{namespace}/{name}");
    let imports: Api<TemplateImport> = Api::namespaced(client.clone(), namespace);
    let mut stream = watcher::watch_object(imports, name).boxed();
    let deadline = Instant::now() + limit;
    let mut last = TemplateImportStatus::default();
    while let Ok(Some(event)) = timeout_at(deadline, stream.next()).await {
        let object = match event {
            Ok(object) => object,
            Err(watcher::Error::WatchError(status)) if status.code == 403 => {
                let source = Box::new(watcher::Error::WatchError(status));
                return Err(DriveError::Watch { import: import(), source });
            }
            // The watcher starts over by itself.
            Err(_) => continue,
        };
        let object = object.ok_or_else(|| DriveError::Odd { import: import(), what: "was deleted" })?;
        last = object.status.unwrap_or_default();
        seen(&last);
        match last.state {
            Some(ImportState::Ready) => {
                let odd = || DriveError::Odd { import: import(), what: "is ready and names no image" };
                return last.durable.ok_or_else(odd);
            }
            Some(ImportState::Failed) => return Err(failed(import(), &last)),
            _ => {}
        }
    }
    let last = serde_json::to_string(&last).unwrap_or_default();
    Err(DriveError::Late { import: import(), limit, last })
}

fn failed(import: String, status: &TemplateImportStatus) -> DriveError {
    let ready = conditions::find(&status.conditions, ConditionType::Ready);
    let (reason, message) = match (&status.last_error, ready) {
        (Some(error), _) => (error.reason.clone(), error.message.clone()),
        (None, Some(ready)) => (ready.reason.clone(), ready.message.clone()),
        (None, None) => ("none".to_owned(), "no message".to_owned()),
    };
    DriveError::Failed { import, reason, message }
}

/// Conditions in words.
fn words(conditions: &[Condition]) -> String {
    let one = |c: &Condition| format!("{}={} ({}: {})", c.type_, c.status, c.reason, c.message);
    if conditions.is_empty() {
        "no conditions".to_owned()
    } else {
        conditions.iter().map(one).collect::<Vec<_>>().join(", ")
    }
}
