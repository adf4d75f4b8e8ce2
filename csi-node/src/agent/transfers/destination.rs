//! Where an image goes, as this node reaches it.

use berth_api::fields::S3Target;
use berth_api::parse::AskedDestination;
use berth_core::transfer::OutputFormat;
use berth_objectstore::chunks::store::ChunkStore;
use berth_objectstore::s3::{S3Config, S3Store};

use super::super::{sources, stores};
use super::WorkError;
use crate::credentials::{CredentialSource as _, SecretCredentials};
use crate::node::Node;
use crate::transfer::ObjectTarget;

/// An opened destination.
pub(super) enum Destination {
    /// An image store, for an image with a name.
    Image(ChunkStore<S3Store>),
    /// One object.
    Object(ObjectTarget),
}

/// Opens what is to be written to; an image store may have to be made first.
pub(super) async fn open(
    node: &Node,
    namespace: &str,
    asked: &AskedDestination,
) -> Result<Destination, WorkError> {
    match asked {
        AskedDestination::StoreImage { store, .. } => {
            Ok(Destination::Image(stores::open_or_create(node, store).await?))
        }
        AskedDestination::Object { target, format } => object(node, namespace, target, *format).await,
    }
}

/// Opens what was written to.
pub(super) async fn open_again(
    node: &Node,
    namespace: &str,
    asked: &AskedDestination,
) -> Result<Destination, WorkError> {
    match asked {
        AskedDestination::StoreImage { store, .. } => {
            Ok(Destination::Image(stores::open(node, store).await?))
        }
        AskedDestination::Object { target, format } => object(node, namespace, target, *format).await,
    }
}

async fn object(
    node: &Node,
    namespace: &str,
    target: &S3Target,
    format: OutputFormat,
) -> Result<Destination, WorkError> {
    let addresses = sources::address_policy(&node.config.allow_source_cidrs)?;
    sources::refuse_endpoint(&target.endpoint, &addresses).await?;
    let secret = target.secret_ref.as_ref().map(|reference| reference.name.as_str());
    let config = S3Config {
        endpoint: Some(target.endpoint.clone()),
        region: stores::region(target.region.as_ref()),
        bucket: target.bucket.clone(),
        addressing: stores::addressing(target.addressing),
        credentials: SecretCredentials::new(node.client.clone()).get(namespace, secret).await?,
        ca_bundle: target.ca_bundle.clone().map(String::into_bytes),
    };
    let (store, key) = (S3Store::connect(config).await?, target.key.clone());
    Ok(Destination::Object(ObjectTarget { store, key, format }))
}
