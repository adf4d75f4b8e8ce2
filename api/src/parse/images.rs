//! `StagedImage` and `ImageStore` to their views.

use berth_core::ids::{NodeName, ParseIdError, PoolName};
use berth_core::image::StagedState;
use berth_core::units::Bytes;
use berth_core::view::{ImageView, StoreView};

use super::{InvalidField, created_of, generation, has_finalizer, name_of, uid_of, version_of};
use crate::conditions::timestamp;
use crate::defaults::{ANNOTATION_GIVEN_UP, RELEASE_FINALIZER};
use crate::staged_image::StagedImageState;
use crate::{ImageStore, StagedImage};

/// What decisions look at.
///
/// # Errors
/// [`InvalidField`] if its digest is none, which the API server does not take.
pub fn image_view(image: &StagedImage) -> Result<ImageView, InvalidField> {
    let (meta, spec) = (&image.metadata, &image.spec);
    let status = image.status.as_ref();
    let digest = spec.digest.parse().map_err(|error: ParseIdError| InvalidField::Shape {
        field: "spec.digest",
        problem: error.to_string(),
    })?;
    Ok(ImageView {
        uid: uid_of(meta),
        name: name_of(meta).name,
        created: created_of(meta),
        deleting: meta.deletion_timestamp.is_some(),
        has_finalizer: has_finalizer(meta, RELEASE_FINALIZER),
        digest,
        pool: PoolName(spec.pool_name.clone()),
        node: NodeName(spec.node_name.clone()),
        data_bytes: Bytes::from_i64(spec.data_bytes),
        virtual_size: Bytes::from_i64(spec.virtual_size),
        ready: staged_state(image) == StagedState::Ready,
        last_used: status.and_then(|status| status.last_used.as_ref()).map(timestamp),
        given_up: meta.annotations.as_ref().is_some_and(|all| all.contains_key(ANNOTATION_GIVEN_UP)),
    })
}

/// The recorded state of a staged image.
pub fn staged_state(image: &StagedImage) -> StagedState {
    match image.status.as_ref().and_then(|status| status.state) {
        None => StagedState::New,
        Some(StagedImageState::Filling) => StagedState::Filling,
        Some(StagedImageState::Usable) => StagedState::Usable,
        Some(StagedImageState::Ready) => StagedState::Ready,
        Some(StagedImageState::Failed) => StagedState::Failed,
    }
}

/// What decisions look at.
pub fn store_view(store: &ImageStore) -> StoreView {
    let assignment = store.status.as_ref().and_then(|status| status.assignment.as_ref());
    StoreView {
        name: name_of(&store.metadata),
        version: version_of(&store.metadata),
        assignment: assignment.map(|place| (NodeName(place.node.clone()), generation(place.generation))),
        deleting: store.metadata.deletion_timestamp.is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_core::units::{Generation, Timestamp};

    #[test]
    fn a_staged_image() {
        let digest = format!("sha256:{}", "b".repeat(64));
        let yaml = format!(
            "apiVersion: staging.berth.dev/v1alpha1\nkind: StagedImage\nmetadata: {{name: i, uid: u, finalizers: \
             [staging.berth.dev/release], creationTimestamp: '1970-01-01T00:00:02Z'}}\nspec: {{digest: '{digest}', poolName: p, \
             nodeName: n, store: {{namespace: ns, name: s}}, dataBytes: 5, virtualSize: 9}}\nstatus: {{state: Ready, lastUsed: \
             '1970-01-01T00:00:03Z'}}\n"
        );
        let mut image: StagedImage = serde_saphyr::from_str(&yaml).expect("readable");
        let view = image_view(&image).expect("a digest");
        assert_eq!(view.digest.to_string(), digest);
        assert_eq!((view.data_bytes, view.virtual_size, view.ready), (Bytes(5), Bytes(9), true));
        assert_eq!((view.created, view.last_used), (Timestamp(2000), Some(Timestamp(3000))));
        assert!(view.has_finalizer && !view.deleting);
        image.spec.digest = "md5:1".to_owned();
        let error = image_view(&image).expect_err("no digest").to_string();
        assert_eq!(error, "spec.digest: `md5:1` does not start with `sha256:`");
    }

    #[test]
    fn an_image_store() {
        let yaml = "apiVersion: staging.berth.dev/v1alpha1\nkind: ImageStore\nmetadata: {name: s, namespace: ns, resourceVersion: \
                    '3', deletionTimestamp: '2026-01-01T00:00:00Z'}\nspec: {endpoint: 'https://s3.example.org', bucket: bbb}\nstatus: \
                    {assignment: {node: n, generation: 4}}\n";
        let view = store_view(&serde_saphyr::from_str(yaml).expect("readable"));
        assert_eq!((view.name.to_string().as_str(), view.version.0.as_str()), ("ns/s", "3"));
        assert_eq!(view.assignment, Some((NodeName::from("n"), Generation(4))));
        assert!(view.deleting);
    }
}
