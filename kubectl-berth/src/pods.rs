//! Which pods use which claims: the people behind a volume.

use std::collections::{BTreeMap, BTreeSet};

use berth_core::ids::ObjectName;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};

/// The names of the pods that use each claim, in its namespace.
pub type PodsOfClaims = BTreeMap<ObjectName, Vec<String>>;

/// Looks in these namespaces. A namespace whose pods cannot be listed is left out, with a warning: not everybody may.
pub async fn of_claims(client: &Client, namespaces: &BTreeSet<String>) -> PodsOfClaims {
    let mut found = PodsOfClaims::new();
    for namespace in namespaces {
        let pods = Api::<Pod>::namespaced(client.clone(), namespace);
        match pods.list(&ListParams::default()).await {
            Ok(pods) => pods.iter().for_each(|pod| note(&mut found, namespace, pod)),
            Err(error) => eprintln!("warning: the pods of namespace {namespace} are not shown: {error}"),
        }
    }
    found
}

fn note(found: &mut PodsOfClaims, namespace: &str, pod: &Pod) {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    if matches!(phase, Some("Succeeded" | "Failed")) {
        return;
    }
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    for volume in volumes {
        let claim = match (&volume.persistent_volume_claim, &volume.ephemeral) {
            (Some(claim), _) => claim.claim_name.clone(),
            (None, Some(_)) => format!("{}-{}", pod.name_any(), volume.name),
            (None, None) => continue,
        };
        found.entry(ObjectName::new(namespace, claim)).or_default().push(pod.name_any());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn claims_are_found_by_name_and_by_the_pod_that_they_were_made_for() {
        let pod = |phase: &str| {
            serde_json::from_value(
                json!({"metadata": {"name": "web"}, "status": {"phase": phase}, "spec": {"containers": [],
                "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "disk"}},
                            {"name": "scratch", "ephemeral": {}}, {"name": "other", "emptyDir": {}}]}}),
            )
            .expect("a pod")
        };
        let mut found = PodsOfClaims::new();
        note(&mut found, "team", &pod("Running"));
        note(&mut found, "team", &pod("Succeeded"));
        let claim = |name| ObjectName::new("team", name);
        assert_eq!(found.len(), 2);
        assert_eq!(
            (&found[&claim("disk")], &found[&claim("web-scratch")]),
            (&vec!["web".to_owned()], &vec!["web".to_owned()])
        );
    }
}
