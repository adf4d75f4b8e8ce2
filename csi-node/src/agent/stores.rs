//! Image stores as this node reaches them.

use std::sync::Arc;
use std::time::Duration;

use berth_api::fields::{Addressing as ApiAddressing, Quantity};
use berth_api::image_store::StoreCapabilities;
use berth_api::parse::{self, InvalidField};
use berth_api::{ImageStore, defaults};
use berth_core::ids::{ObjectName, Uid};
use berth_core::reason::{Reason, ReasonClass};
use berth_core::retry::Fault;
use berth_core::units::{Bytes, Timestamp};
use berth_objectstore::chunks::caibx::{ChunkSize, IndexError};
use berth_objectstore::chunks::store::{ChunkStore, OpenError};
use berth_objectstore::chunks::usage::{UsageError, usage};
use berth_objectstore::layout::{LayoutError, StoreLayout};
use berth_objectstore::s3::{Addressing, ConnectError, S3Config, S3Store};
use kube::ResourceExt as _;
use kube::runtime::reflector::ObjectRef;
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use super::news::StoreNews;
use crate::credentials::{CredentialSource, CredentialsError, SecretCredentials};
use crate::node::{Node, now};
use crate::supervisor::stores::{KeyPair, StoreAccess};
use crate::telemetry::chain;
use crate::transfer::error::store_reason;

/// How often a store that answers is looked at, in milliseconds.
const AGAIN_MILLIS: u64 = 300_000;
/// How soon one that does not answer is tried again, in milliseconds; doubles up to 32 s.
const RETRY_MILLIS: u64 = 500;
/// Signatures name this region where the object does not.
const DEFAULT_REGION: &str = "us-east-1";
/// How long a look at a store may take.
const PROBE_LIMIT: Duration = Duration::from_secs(600);

/// Why an image store cannot be used.
#[derive(Debug, Error)]
pub enum AccessError {
    /// There is no such object.
    #[error("there is no ImageStore {0}")]
    Missing(ObjectName),
    /// Its credentials.
    #[error("no credentials for ImageStore {store}")]
    Credentials {
        /// Which.
        store: ObjectName,
        /// Why.
        source: CredentialsError,
    },
    /// A field of it.
    #[error("ImageStore {store} is not usable")]
    Field {
        /// Which.
        store: ObjectName,
        /// Why.
        source: InvalidField,
    },
    /// Its chunk size.
    #[error("ImageStore {store} has no possible chunk size")]
    ChunkSize {
        /// Which.
        store: ObjectName,
        /// Why.
        source: IndexError,
    },
    /// Its prefix.
    #[error("ImageStore {store} has no possible prefix")]
    Prefix {
        /// Which.
        store: ObjectName,
        /// Why.
        source: LayoutError,
    },
    /// The client.
    #[error("no client for ImageStore {store}")]
    Connect {
        /// Which.
        store: ObjectName,
        /// Why.
        source: ConnectError,
    },
    /// What lies there.
    #[error("ImageStore {store} cannot be opened")]
    Open {
        /// Which.
        store: ObjectName,
        /// Why.
        source: OpenError,
    },
    /// Its use.
    #[error("the use of ImageStore {store} cannot be counted")]
    Usage {
        /// Which.
        store: ObjectName,
        /// Why.
        source: UsageError,
    },
    /// It takes too long.
    #[error("ImageStore {store} was not looked through within {PROBE_LIMIT:?}")]
    Slow {
        /// Which.
        store: ObjectName,
    },
}

impl AccessError {
    /// The machine-readable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Missing(_) | Self::Open { source: OpenError::Absent { .. }, .. } => {
                Reason::ImageStoreNotFound
            }
            Self::Credentials { .. } => Reason::CredentialsMissing,
            Self::Field { .. } | Self::ChunkSize { .. } | Self::Prefix { .. } | Self::Connect { .. } => {
                Reason::InvalidSpec
            }
            Self::Open { source: OpenError::Store { source, .. }, .. }
            | Self::Usage { source: UsageError::List(source), .. } => store_reason(source),
            Self::Open { .. } => Reason::ImageStoreIncompatible,
            Self::Usage { .. } | Self::Slow { .. } => Reason::ObjectStoreUnavailable,
        }
    }

    /// True if it may pass without the `ImageStore` being changed.
    pub fn is_transient(&self) -> bool {
        self.reason().class() == ReasonClass::Transient
    }

    /// What it means to work that needs the store.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Open { source: OpenError::Store { source, .. }, .. }
            | Self::Usage { source: UsageError::List(source), .. }
                if source.is_transient() =>
            {
                Fault::StoreAway
            }
            _ if self.is_transient() => Fault::Passing,
            _ => Fault::Lasting,
        }
    }
}

/// How an object's addressing is called by the client.
pub fn addressing(asked: Option<ApiAddressing>) -> Addressing {
    match asked.unwrap_or_default() {
        ApiAddressing::Path => Addressing::Path,
        ApiAddressing::VirtualHost => Addressing::VirtualHost,
    }
}

/// The region that is asked for, or the usual one.
pub fn region(asked: Option<&String>) -> String {
    asked.cloned().unwrap_or_else(|| DEFAULT_REGION.to_owned())
}

/// The chunk size of a store.
pub fn chunk_size(asked: Option<&Quantity>) -> Result<Bytes, InvalidField> {
    asked.map_or(Ok(Bytes(defaults::CHUNK_SIZE_BYTES)), |quantity| parse::bytes("spec.chunkSize", quantity))
}

/// The object of this name.
pub fn find(node: &Node, name: &ObjectName) -> Result<Arc<ImageStore>, AccessError> {
    let reference = ObjectRef::<ImageStore>::new(&name.name).within(&name.namespace);
    node.watches.stores.get(&reference).ok_or_else(|| AccessError::Missing(name.clone()))
}

async fn client(node: &Node, name: &ObjectName, store: &ImageStore) -> Result<S3Store, AccessError> {
    let config = config(node, name, store).await?;
    S3Store::connect(config).await.map_err(|source| AccessError::Connect { store: name.clone(), source })
}

async fn config(node: &Node, name: &ObjectName, store: &ImageStore) -> Result<S3Config, AccessError> {
    let spec = &store.spec;
    let secret = spec.secret_ref.as_ref().map(|reference| reference.name.as_str());
    let credentials = SecretCredentials::new(node.client.clone())
        .get(&name.namespace, secret)
        .await
        .map_err(|source| AccessError::Credentials { store: name.clone(), source })?;
    Ok(S3Config {
        endpoint: Some(spec.endpoint.clone()),
        region: region(spec.region.as_ref()),
        bucket: spec.bucket.clone(),
        addressing: addressing(spec.addressing),
        credentials,
        ca_bundle: spec.ca_bundle.clone().map(String::into_bytes),
    })
}

/// How a server of this node reaches a store, with the credentials that are there now.
pub async fn access(node: &Node, name: &ObjectName) -> Result<StoreAccess, AccessError> {
    let store = find(node, name)?;
    layout(name, &store)?;
    let S3Config { endpoint, region, bucket, addressing, credentials, .. } =
        config(node, name, &store).await?;
    Ok(StoreAccess {
        endpoint,
        region,
        bucket,
        prefix: store.spec.prefix.clone().unwrap_or_default(),
        virtual_host: addressing == Addressing::VirtualHost,
        ca_bundle: store.spec.ca_bundle.clone(),
        keys: KeyPair::of(credentials),
    })
}

fn layout(name: &ObjectName, store: &ImageStore) -> Result<StoreLayout, AccessError> {
    StoreLayout::new(store.spec.prefix.as_deref().unwrap_or_default())
        .map_err(|source| AccessError::Prefix { store: name.clone(), source })
}

/// Opens a store that may have to be made first, and finds out what it can do.
pub async fn open_or_create(node: &Node, name: &ObjectName) -> Result<ChunkStore<S3Store>, AccessError> {
    let store = find(node, name)?;
    let size = chunk_size(store.spec.chunk_size.as_ref())
        .map_err(|source| AccessError::Field { store: name.clone(), source })?;
    let size =
        ChunkSize::new(size).map_err(|source| AccessError::ChunkSize { store: name.clone(), source })?;
    let client = client(node, name, &store).await?;
    ChunkStore::open_or_create(client, layout(name, &store)?, size)
        .await
        .map_err(|source| AccessError::Open { store: name.clone(), source })
}

/// Opens a store that holds images already.
pub async fn open(node: &Node, name: &ObjectName) -> Result<ChunkStore<S3Store>, AccessError> {
    let store = find(node, name)?;
    let client = client(node, name, &store).await?;
    ChunkStore::open(client, layout(name, &store)?)
        .await
        .map_err(|source| AccessError::Open { store: name.clone(), source })
}

/// Looks at a store: what it can do, and what it holds.
///
/// Runs on a thread of its own: counting what a store holds compares long sorted lists.
pub async fn probe(node: Arc<Node>, name: ObjectName, cancel: CancellationToken) {
    let runtime = tokio::runtime::Handle::current();
    let look = move || runtime.block_on(cancel.run_until_cancelled(probe_here(node, name)));
    if let Err(error) = tokio::task::spawn_blocking(look).await {
        tracing::error!(%error, "looking at an image store failed");
    }
}

async fn probe_here(node: Arc<Node>, name: ObjectName) {
    let Ok(store) = find(&node, &name) else { return };
    let Some(uid) = store.uid().map(Uid::from) else { return };
    let looked = tokio::time::timeout(PROBE_LIMIT, look(Arc::clone(&node), name.clone())).await;
    let looked = looked.unwrap_or_else(|_| Err(AccessError::Slow { store: name.clone() }));
    let observed = store.metadata.generation;
    let news = match looked {
        Ok((capabilities, counted)) => StoreNews {
            observed,
            due: Timestamp(now().0 + AGAIN_MILLIS),
            capabilities: Some(capabilities),
            usage: Some(counted),
            error: None,
            failures: 0,
        },
        Err(error) => {
            tracing::warn!(store = %name, error = chain(&error), "image store is not usable");
            let before = node.news.store(&uid);
            let failures = before.as_ref().map_or(0, |news| news.failures).saturating_add(1);
            StoreNews {
                observed,
                due: Timestamp(now().0 + (RETRY_MILLIS << failures.min(6))),
                capabilities: before.as_ref().and_then(|news| news.capabilities.clone()),
                usage: before.and_then(|news| news.usage),
                error: Some((error.reason(), chain(&error))),
                failures,
            }
        }
    };
    node.news.set_store(&uid, news);
}

async fn look(
    node: Arc<Node>,
    name: ObjectName,
) -> Result<(StoreCapabilities, (i64, i64, i64)), AccessError> {
    let chunks = open_or_create(&node, &name).await?;
    let found = chunks.capabilities();
    let capabilities = StoreCapabilities {
        conditional_writes: found.conditional_writes,
        verifies_checksums: found.verifies_checksums,
        lists_uploads: found.lists_uploads,
        ranges: found.ranges,
    };
    let used = usage(&chunks).await.map_err(|source| AccessError::Usage { store: name.clone(), source })?;
    let images = i64::try_from(used.images).unwrap_or(i64::MAX);
    Ok((capabilities, (images, used.unique_bytes.as_i64(), used.unreferenced_bytes.as_i64())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_objectstore::{Place, StoreError};

    #[test]
    fn only_a_store_that_does_not_answer_counts_as_away() {
        let store = || ObjectName::new("ns", "store");
        let place = || Place { bucket: "b".to_owned(), key: "k".to_owned() };
        let open = |source| AccessError::Open { store: store(), source };
        let failed = |source| open(OpenError::Store { at: "k".to_owned(), source });
        let said = || "said".to_owned();
        let cases = [
            (failed(StoreError::Unavailable { place: place(), said: said() }), Fault::StoreAway),
            (failed(StoreError::NotFound { place: place() }), Fault::Passing),
            (AccessError::Missing(store()), Fault::Passing),
            (failed(StoreError::AccessDenied { place: place(), said: said() }), Fault::Lasting),
            (failed(StoreError::NoSuchBucket { place: place(), said: said() }), Fault::Lasting),
        ];
        for (error, fault) in cases {
            assert_eq!(error.fault(), fault, "{}", chain(&error));
        }
    }
}
