//! Placements: fixed by replacing the status under the version that was seen.

use std::fmt::Debug;
use std::time::Duration;

use berth_api::conditions::{ConditionType, Truth, condition, timestamp};
use berth_api::fields::Assignment;
use berth_api::staging_reservation::{AssignedImage as ApiImage, ReservationState, StagingReservationStatus};
use berth_api::{ImageStore, StagingReservation};
use berth_core::change::Considered;
use berth_core::ids::{NodeName, ObjectName};
use berth_core::metric::Metric;
use berth_core::reservation::promised;
use berth_core::units::Generation;
use berth_core::view::{AssignedImage, ObjectVersion, Placement};
use kube::ResourceExt as _;
use kube::core::NamespaceResourceScope;
use serde::Serialize;

use super::error::swapped;
use super::reservations::candidate_place;
use super::{Applier, ApplyError};
use crate::context::now;
use crate::observe::Observed;
use crate::sabotage;

impl Applier {
    /// Where a reservation is, and what it starts from.
    pub(super) async fn assign_reservation(
        &self,
        name: &ObjectName,
        version: &ObjectVersion,
        placement: &Placement,
        image: Option<(&AssignedImage, bool)>,
        considered: &[Considered],
    ) -> Result<bool, ApplyError> {
        let waited = self.waited(name);
        self.assign(name, version, |reservation: &mut StagingReservation| {
            let generation = reservation.metadata.generation;
            let status = reservation.status.get_or_insert_default();
            status.assignment = Some(assignment_of(placement));
            status.image = image.map(|(image, _)| ApiImage {
                digest: image.digest.to_string(),
                staged_image: image.staged_image.clone(),
                virtual_size: image.virtual_size.as_i64(),
            });
            status.reused = image.map(|(_, reused)| reused);
            status.candidates = considered.iter().map(candidate_place).collect();
            promise(status, generation, placement);
        })
        .await?;
        tracing::info!(reservation = %name, pool = %placement.pool, node = %placement.node,
            generation = %placement.generation, "reservation assigned");
        if let Some(seen) = self.observer.stored::<StagingReservation>(name) {
            let (reason, message) = promised(placement);
            self.events.say(&*seen, "Promised", reason, &message);
        }
        let labels = [("pool", placement.pool.as_str())];
        self.metrics.add(Metric::AdmissionsTotal, &labels, 1);
        self.metrics.add(Metric::QueueWaitSecondsTotal, &labels, waited.as_secs());
        Ok(true)
    }

    /// How long ago a reservation was made.
    fn waited(&self, name: &ObjectName) -> Duration {
        let seen = self.observer.stored::<StagingReservation>(name);
        let made = seen.as_ref().and_then(|seen| seen.metadata.creation_timestamp.as_ref()).map(timestamp);
        Duration::from_millis(made.map_or(0, |made| now().millis_since(made)))
    }

    /// Which node looks after an image store.
    pub(super) async fn assign_store(
        &self,
        name: &ObjectName,
        version: &ObjectVersion,
        node: &NodeName,
        generation: Generation,
    ) -> Result<bool, ApplyError> {
        self.assign(name, version, |store: &mut ImageStore| {
            let generation = generation.0.try_into().unwrap_or(i64::MAX);
            store.status.get_or_insert_default().assignment =
                Some(Assignment { pool: None, node: node.0.clone(), generation });
        })
        .await?;
        tracing::info!(store = %name, %node, %generation, "image store assigned");
        Ok(true)
    }

    /// Compare-and-swap: the object must still be at `version`.
    pub(super) async fn assign<K>(
        &self,
        name: &ObjectName,
        version: &ObjectVersion,
        place: impl Fn(&mut K),
    ) -> Result<(), ApplyError>
    where
        K: Observed<Scope = NamespaceResourceScope> + Serialize + Debug,
    {
        let object = || format!("{} {name}", K::kind(&()));
        let conflict = || ApplyError::Conflict { operation: "assign", object: object() };
        let seen = self.observer.stored::<K>(name).ok_or_else(conflict)?;
        if seen.resource_version().as_deref() != Some(version.0.as_str()) {
            return Err(conflict());
        }
        let api = self.namespaced::<K>(name);
        let mut changed = K::clone(&seen);
        if sabotage::active(sabotage::ASSIGN_WITHOUT_VERSION) {
            changed = swapped("read", object(), api.get(&name.name).await)?;
        }
        changed.meta_mut().managed_fields = None;
        place(&mut changed);
        let result = api.replace_status(&name.name, &self.as_replica(), &changed).await;
        self.observer.absorb(swapped("assign", object(), result)?);
        Ok(())
    }
}

/// That it is promised is said in the write that places it. What was said while it waited is over, and from now on whether
/// it is ready is the node's to say.
fn promise(status: &mut StagingReservationStatus, generation: Option<i64>, placement: &Placement) {
    let (reason, message) = promised(placement);
    let kind = ConditionType::Promised;
    let told = condition(&status.conditions, kind, Truth::True, reason, message, generation, now());
    let over = [ConditionType::Promised.as_str(), ConditionType::Ready.as_str()];
    status.conditions.retain(|condition| !over.contains(&condition.type_.as_str()));
    status.conditions.push(told);
    status.state = Some(ReservationState::Promised);
    (status.queue, status.shortfall_bytes) = (None, None);
}

pub(super) fn assignment_of(placement: &Placement) -> Assignment {
    Assignment {
        pool: Some(placement.pool.0.clone()),
        node: placement.node.0.clone(),
        generation: placement.generation.0.try_into().unwrap_or(i64::MAX),
    }
}
