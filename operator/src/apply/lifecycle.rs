//! Making, guarding and ending objects.
//!
//! What is made or ended shows up, or goes, by its watch only; looking again at once would show the same as before.

use berth_api::defaults::RELEASE_FINALIZER;
use berth_api::fields::{ObjectRef, PoolSelector, Quantity};
use berth_api::staged_image::StagedImageSpec;
use berth_api::staging_reservation::{Access as ApiAccess, StagingReservationSpec};
use berth_api::{StagedImage, StagingLedger, StagingReservation, TemplateImport};
use berth_core::ids::{NodeName, ObjectName, PoolName, Uid, ledger_name};
use berth_core::ledger::Holder;
use berth_core::transfer::TransferId;
use berth_core::units::Bytes;
use berth_core::view::{Access, DurableImage, PoolChoice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Resource as _, ResourceExt as _};
use serde_json::json;

use super::error::{Answer, answer};
use super::{Applier, ApplyError};
use crate::observe::Observed;

impl Applier {
    pub(super) async fn guard_reservation(&self, name: &ObjectName, uid: &Uid) -> Result<bool, ApplyError> {
        let api = self.namespaced::<StagingReservation>(name);
        self.finalizer(api, name, uid, RELEASE_FINALIZER, true).await
    }

    pub(super) async fn unguard_reservation(&self, name: &ObjectName, uid: &Uid) -> Result<bool, ApplyError> {
        let seen = self.observer.stored::<StagingReservation>(name);
        if let Some(place) = seen.as_ref().and_then(|one| one.status.as_ref()?.assignment.as_ref())
            && let Some(pool) = &place.pool
            && self.promised(pool, &place.node, uid).await? != Promised::Nothing
        {
            let object = format!("StagingReservation {name}");
            return Err(ApplyError::Conflict { operation: "release", object });
        }
        let api = self.namespaced::<StagingReservation>(name);
        self.finalizer(api, name, uid, RELEASE_FINALIZER, false).await
    }

    pub(super) async fn unguard_image(&self, name: &str, uid: &Uid) -> Result<bool, ApplyError> {
        if let Some(seen) = self.observer.stored::<StagedImage>(&ObjectName::new("", name))
            && self.promised(&seen.spec.pool_name, &seen.spec.node_name, uid).await? == Promised::Space
        {
            return Err(ApplyError::Conflict { operation: "release", object: format!("StagedImage {name}") });
        }
        let api: Api<StagedImage> = Api::all(self.client.clone());
        self.finalizer(api, &ObjectName::new("", name), uid, RELEASE_FINALIZER, false).await
    }

    /// Asks the API server itself what a ledger has promised this holder. Each kind comes by a watch of its own: an entry that
    /// the watch of ledgers does not show may be one that it does not show yet.
    async fn promised(&self, pool: &str, node: &str, uid: &Uid) -> Result<Promised, ApplyError> {
        let name = ledger_name(&PoolName::from(pool), &NodeName::from(node));
        let api: Api<StagingLedger> = Api::all(self.client.clone());
        let Answer::Done(ledger) = answer("read", format!("StagingLedger {name}"), api.get(&name).await)?
        else {
            return Ok(Promised::Nothing);
        };
        Ok(match ledger.spec.promises.get(uid.as_str()) {
            None => Promised::Nothing,
            Some(promise) if promise.revoked_revision.is_some() => Promised::Revoked,
            Some(_) => Promised::Space,
        })
    }

    /// Asks the API server itself whether the holder of a promise is gone: no object of its name, or a later one.
    pub(super) async fn is_gone(&self, holder: &Holder, uid: &Uid) -> Result<bool, ApplyError> {
        match holder {
            Holder::Reservation(name) => gone(self.namespaced::<StagingReservation>(name), name, uid).await,
            Holder::Image(name) => {
                let api: Api<StagedImage> = Api::all(self.client.clone());
                gone(api, &ObjectName::new("", name), uid).await
            }
        }
    }

    /// Puts a finalizer on or takes it off, under the version that was seen.
    pub(super) async fn finalizer<K: Observed>(
        &self,
        api: Api<K>,
        name: &ObjectName,
        uid: &Uid,
        finalizer: &str,
        wanted: bool,
    ) -> Result<bool, ApplyError> {
        let Some(seen) = self.observer.stored::<K>(name).filter(|o| o.uid().as_deref() == Some(uid.as_str()))
        else {
            return Ok(false);
        };
        let mut finalizers = seen.finalizers().to_vec();
        if finalizers.iter().any(|other| other == finalizer) == wanted {
            return Ok(false);
        }
        if wanted {
            finalizers.push(finalizer.to_owned());
        } else {
            finalizers.retain(|other| other != finalizer);
        }
        let patch = json!({"metadata": {
            "uid": uid.as_str(), "resourceVersion": seen.resource_version(), "finalizers": finalizers,
        }});
        let params = PatchParams { field_manager: Some(self.manager.clone()), ..PatchParams::default() };
        let result = api.patch(&name.name, &params, &Patch::Merge(patch)).await;
        let operation = if wanted { "guard" } else { "release" };
        match answer(operation, format!("{} {name}", K::kind(&())), result)? {
            Answer::Done(object) => {
                self.observer.absorb(object);
                Ok(true)
            }
            Answer::Gone | Answer::Exists => Ok(false),
        }
    }

    /// Made for a transfer, and owned by it.
    pub(super) async fn create_reservation(
        &self,
        name: &ObjectName,
        owner: &TransferId,
        pools: &PoolChoice,
        size: Bytes,
        access: Access,
    ) -> Result<bool, ApplyError> {
        let (pool_name, pool_selector) = match pools {
            PoolChoice::Named(pool) => (Some(pool.0.clone()), None),
            PoolChoice::Labelled(labels) if labels.is_empty() => (None, None),
            PoolChoice::Labelled(labels) => (None, Some(PoolSelector { match_labels: labels.clone() })),
        };
        let spec = StagingReservationSpec {
            pool_name,
            pool_selector,
            max_size: Quantity(size.0.to_string()),
            access: match access {
                Access::Stream => ApiAccess::Stream,
                Access::File => ApiAccess::File,
                Access::Block => ApiAccess::Block,
            },
            ..StagingReservationSpec::default()
        };
        let mut reservation = StagingReservation::new(&name.name, spec);
        reservation.metadata.namespace = Some(name.namespace.clone());
        reservation.metadata.owner_references = Some(vec![OwnerReference {
            api_version: TemplateImport::api_version(&()).into_owned(),
            kind: owner.kind.as_str().to_owned(),
            name: owner.name.name.clone(),
            uid: owner.uid.0.clone(),
            controller: Some(true),
            block_owner_deletion: None,
        }]);
        let result =
            self.namespaced::<StagingReservation>(name).create(&self.as_replica(), &reservation).await;
        answer("create", format!("StagingReservation {name}"), result)?;
        Ok(false)
    }

    pub(super) async fn delete_reservation(&self, name: &ObjectName, uid: &Uid) -> Result<bool, ApplyError> {
        let result = self.namespaced::<StagingReservation>(name).delete(&name.name, &this_one(uid)).await;
        answer("delete", format!("StagingReservation {name}"), result)?;
        Ok(false)
    }

    /// Inert until it is promised; the name says what and where, so one that is there already is this one.
    pub(super) async fn create_image(
        &self,
        name: &str,
        image: &DurableImage,
        pool: &PoolName,
        node: &NodeName,
        store: &ObjectName,
    ) -> Result<bool, ApplyError> {
        let spec = StagedImageSpec {
            digest: image.digest.to_string(),
            pool_name: pool.0.clone(),
            node_name: node.0.clone(),
            store: ObjectRef { namespace: store.namespace.clone(), name: store.name.clone() },
            data_bytes: image.real_size.as_i64(),
            virtual_size: image.virtual_size.as_i64(),
        };
        let mut staged = StagedImage::new(name, spec);
        staged.metadata.finalizers = Some(vec![RELEASE_FINALIZER.to_owned()]);
        let api: Api<StagedImage> = Api::all(self.client.clone());
        let result = api.create(&self.as_replica(), &staged).await;
        answer("create", format!("StagedImage {name}"), result)?;
        Ok(false)
    }

    /// Not while its ledger promises it space, whatever the view says: a ledger may have been made or rebuilt since.
    pub(super) async fn delete_image(&self, name: &str, uid: &Uid) -> Result<bool, ApplyError> {
        if let Some(seen) = self.observer.stored::<StagedImage>(&ObjectName::new("", name))
            && self.promised(&seen.spec.pool_name, &seen.spec.node_name, uid).await? == Promised::Space
        {
            return Err(ApplyError::Conflict { operation: "delete", object: format!("StagedImage {name}") });
        }
        let api: Api<StagedImage> = Api::all(self.client.clone());
        let result = api.delete(name, &this_one(uid)).await;
        #[allow(clippy::redundant_closure_for_method_calls)]
        // the answer's type is of a crate that is not ours to name
        let leaving = answer("delete", format!("StagedImage {name}"), result.map(|answer| answer.left()))?;
        if let Answer::Done(Some(leaving)) = leaving {
            // That it goes is known at once, so that no other pass has it removed for the same purpose.
            self.observer.absorb(leaving);
        }
        Ok(false)
    }
}

/// What a ledger says of a holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Promised {
    Nothing,
    Space,
    Revoked,
}

/// Only the metadata is read: an object that cannot be understood is there all the same.
async fn gone<K: Observed>(api: Api<K>, name: &ObjectName, uid: &Uid) -> Result<bool, ApplyError> {
    let found = api.get_metadata(&name.name).await;
    match answer("look for", format!("{} {name}", K::kind(&())), found)? {
        Answer::Done(found) => Ok(found.metadata.uid.as_deref() != Some(uid.as_str())),
        Answer::Gone => Ok(true),
        Answer::Exists => Ok(false),
    }
}

/// Deletes the object with this UID, and no later one of the same name.
pub(super) fn this_one(uid: &Uid) -> DeleteParams {
    DeleteParams {
        preconditions: Some(Preconditions { uid: Some(uid.0.clone()), resource_version: None }),
        ..DeleteParams::default()
    }
}
