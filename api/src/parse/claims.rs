//! The claims behind CSI volumes, and the `PersistentVolumes` that name those.

use berth_core::ids::{ObjectName, Uid, reservation_of_volume};
use berth_core::reservation::Claim;
use k8s_openapi::api::core::v1::PersistentVolume;
use kube::api::ObjectMeta;

use crate::defaults::{
    ANNOTATION_PERSISTENT_VOLUME, ANNOTATION_VOLUME_NAME, DRIVER, LABEL_CLAIM_NAME, SYSTEM_NAMESPACE,
};

/// The annotation of a claim with the node that the scheduler has selected.
pub const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
/// How long a UID of the API server is.
const UID: usize = 36;

/// The reservation whose volume a `PersistentVolume` names.
pub fn named_reservation(volume: &PersistentVolume) -> Option<Uid> {
    let csi = volume.spec.as_ref()?.csi.as_ref().filter(|csi| csi.driver == DRIVER)?;
    reservation_of_volume(&csi.volume_handle).ok()
}

/// The claim that a CSI volume was asked for. Its UID is the end of the volume's name, as the provisioner gives it.
pub(super) fn claim(meta: &ObjectMeta, namespace: &str) -> Option<Claim> {
    if meta.namespace.as_deref() != Some(SYSTEM_NAMESPACE) {
        return None;
    }
    let annotations = meta.annotations.as_ref()?;
    let volume = annotations.get(ANNOTATION_VOLUME_NAME)?;
    let name = meta.labels.as_ref()?.get(LABEL_CLAIM_NAME)?;
    let uid = volume.get(volume.len().checked_sub(UID)?..)?;
    let parts: Vec<usize> = uid.split('-').map(str::len).collect();
    let hexadecimal = uid.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit());
    (hexadecimal && parts == [8, 4, 4, 4, 12]).then(|| Claim {
        name: ObjectName::new(namespace, name.as_str()),
        uid: Uid::from(uid),
        volume: volume.clone(),
        persistent: annotations.contains_key(ANNOTATION_PERSISTENT_VOLUME),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_claim_of_a_volume_is_known_by_the_volumes_name() {
        let of = |namespace: &str, volume: &str| {
            let meta: ObjectMeta = serde_json::from_value(json!({
                "name": "r", "namespace": namespace,
                "annotations": {ANNOTATION_VOLUME_NAME: volume}, "labels": {LABEL_CLAIM_NAME: "db"},
            }))
            .expect("metadata");
            claim(&meta, "shop").map(|claim| (claim.name.to_string(), claim.uid.0))
        };
        let uid = "0b7c1f0e-5a52-4b0f-9b1d-6f4c8a1c2d3e";
        let known = Some(("shop/db".to_owned(), uid.to_owned()));
        assert_eq!(of(SYSTEM_NAMESPACE, &format!("pvc-{uid}")), known);
        assert_eq!(of("team", &format!("pvc-{uid}")), None, "only our own namespace speaks of claims");
        for other in ["sanity-controller-create-single-with-capacity", "pvc-1", "", "pvc-ö"] {
            assert_eq!(of(SYSTEM_NAMESPACE, other), None, "{other}");
        }
    }

    #[test]
    fn that_a_volume_was_made_of_it_stays_known() {
        let persistent = |annotations: serde_json::Value| {
            let meta: ObjectMeta = serde_json::from_value(json!({
                "name": "r", "namespace": SYSTEM_NAMESPACE,
                "annotations": annotations, "labels": {LABEL_CLAIM_NAME: "db"},
            }))
            .expect("metadata");
            claim(&meta, "shop").expect("a claim").persistent
        };
        let volume = "pvc-0b7c1f0e-5a52-4b0f-9b1d-6f4c8a1c2d3e";
        assert!(!persistent(json!({ANNOTATION_VOLUME_NAME: volume})));
        assert!(persistent(json!({ANNOTATION_VOLUME_NAME: volume, ANNOTATION_PERSISTENT_VOLUME: volume})));
    }

    #[test]
    fn only_volumes_of_our_driver_are_named() {
        let named = |driver: &str, handle: &str| {
            let volume = json!({"metadata": {"name": "v"}, "spec": {"csi": {"driver": driver, "volumeHandle": handle}}});
            named_reservation(&serde_json::from_value(volume).expect("a volume"))
        };
        assert_eq!(named(DRIVER, "v1-u"), Some(Uid::from("u")));
        assert_eq!(named("other.example.com", "v1-u"), None);
        assert_eq!(named(DRIVER, "s1-u"), None);
    }
}
