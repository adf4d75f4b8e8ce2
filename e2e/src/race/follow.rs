//! Every version of every object of a kind, in the order in which the API server made them.

use std::fmt::Debug;

use futures::StreamExt as _;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::{Api, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::time::{Duration, sleep};

/// One version of an object, or its end.
#[derive(Debug, Clone)]
pub enum Seen<K> {
    /// It is now like this.
    Now(K),
    /// It is gone; this is what it was last, at the version of its deletion.
    Gone(K),
}

/// Why versions may have been missed.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The objects could not be listed at the start.
    #[error("could not list {kind}")]
    List {
        /// The kind.
        kind: &'static str,
        /// What the API server answered.
        source: kube::Error,
    },
    /// The API server no longer has the versions between the last one seen and now.
    #[error("the watch of {kind} has a gap after version {version}: {message}")]
    Gap {
        /// The kind.
        kind: &'static str,
        /// The last version seen.
        version: String,
        /// What the API server said.
        message: String,
    },
}

/// Hands every version of every object of `api` to `take`, until an error that may hide versions.
///
/// # Errors
/// [`FollowError`]. A connection that ends is no error: the watch goes on from the last version seen.
pub async fn follow<K>(kind: &'static str, api: Api<K>, mut take: impl FnMut(Seen<K>)) -> FollowError
where
    K: kube::Resource + Clone + Debug + DeserializeOwned + 'static,
{
    let list = match api.list(&ListParams::default()).await {
        Ok(list) => list,
        Err(source) => return FollowError::List { kind, source },
    };
    let mut version = list.metadata.resource_version.clone().unwrap_or_default();
    list.items.into_iter().for_each(|object| take(Seen::Now(object)));
    loop {
        let Ok(stream) = api.watch(&WatchParams::default().timeout(290), &version).await else {
            sleep(Duration::from_millis(200)).await;
            continue;
        };
        let mut stream = std::pin::pin!(stream);
        while let Some(Ok(event)) = stream.next().await {
            match event {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    version = object.resource_version().unwrap_or_default();
                    take(Seen::Now(object));
                }
                WatchEvent::Deleted(object) => {
                    version = object.resource_version().unwrap_or_default();
                    take(Seen::Gone(object));
                }
                WatchEvent::Bookmark(bookmark) => version = bookmark.metadata.resource_version,
                WatchEvent::Error(status) => {
                    return FollowError::Gap { kind, version, message: status.message };
                }
            }
        }
    }
}
