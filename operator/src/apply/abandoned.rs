//! Volumes that nobody will ask for again.

use berth_api::StagingReservation;
use berth_api::defaults::ANNOTATION_PERSISTENT_VOLUME;
use berth_api::parse::{SELECTED_NODE, named_reservation};
use berth_core::ids::{NodeName, ObjectName, Uid};
use berth_core::metric::Metric;
use berth_core::reason::Reason;
use berth_core::reservation::{Claim, is_abandoned};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use super::error::{Answer, answer};
use super::lifecycle::this_one;
use super::{Applier, ApplyError};

impl Applier {
    /// Asks the API server itself whether a volume's claim will not ask for it again, and no `PersistentVolume` of the claim
    /// names it.
    pub(super) async fn is_abandoned(
        &self,
        reservation: &Uid,
        claim: &Claim,
        node: &NodeName,
    ) -> Result<bool, ApplyError> {
        let volumes: Api<PersistentVolume> = Api::all(self.client.clone());
        let volume = volumes.get(&claim.volume).await;
        let volume = answer("look for", format!("PersistentVolume {}", claim.volume), volume)?;
        if let Answer::Done(volume) = volume
            && named_reservation(&volume).as_ref() == Some(reservation)
        {
            return Ok(false);
        }
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), &claim.name.namespace);
        let found = claims.get_metadata(&claim.name.name).await;
        match answer("look for", format!("PersistentVolumeClaim {}", claim.name), found)? {
            Answer::Done(found) => {
                let uid = Uid(found.uid().unwrap_or_default());
                let selected =
                    found.annotations().get(SELECTED_NODE).map(|node| NodeName::from(node.as_str()));
                Ok(is_abandoned(claim, node, Some((&uid, selected.as_ref()))))
            }
            Answer::Gone => Ok(is_abandoned(claim, node, None)),
            Answer::Exists => Ok(false),
        }
    }

    pub(super) async fn note_persistent(
        &self,
        name: &ObjectName,
        uid: &Uid,
        volume: &str,
    ) -> Result<bool, ApplyError> {
        let annotations = json!({ ANNOTATION_PERSISTENT_VOLUME: volume });
        let patch = json!({"metadata": {"uid": uid.as_str(), "annotations": annotations}});
        let params = PatchParams { field_manager: Some(self.manager.clone()), ..PatchParams::default() };
        let api = self.namespaced::<StagingReservation>(name);
        let result = api.patch(&name.name, &params, &Patch::Merge(patch)).await;
        let answer = answer("note the volume of", format!("StagingReservation {name}"), result)?;
        if let Answer::Done(reservation) = answer {
            self.observer.absorb(reservation);
            return Ok(true);
        }
        Ok(false)
    }

    pub(super) async fn abandon_reservation(
        &self,
        name: &ObjectName,
        uid: &Uid,
        message: &str,
    ) -> Result<bool, ApplyError> {
        let Some(seen) = self.seen::<StagingReservation>(name, Some(uid)) else { return Ok(false) };
        let result = self.namespaced::<StagingReservation>(name).delete(&name.name, &this_one(uid)).await;
        if let Answer::Done(_) = answer("abandon", format!("StagingReservation {name}"), result)? {
            tracing::info!(reservation = %name, message, "reservation abandoned");
            self.events.say(&*seen, "Abandoned", Reason::Abandoned, message);
            self.metrics.add(Metric::AbandonedTotal, &[], 1);
        }
        Ok(false)
    }
}
