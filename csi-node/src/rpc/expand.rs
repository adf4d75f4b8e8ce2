//! Volumes that become larger, in use or not: more is promised first, by the operator, then the agent makes the device
//! larger, then the file system on it takes what there is.
//!
//! Each of the three may be cut off. The promise is asked for by `spec.maxSize` of the volume's reservation, which stays; the
//! agent plans by what is promised; and [`FoundVolume::fill`] makes devices and file system as large as is recorded, whatever
//! they were.

use std::sync::Arc;
use std::time::Duration;

use berth_api::StagingReservation;
use berth_api::conditions::{self, ConditionType};
use berth_api::parse;
use berth_core::ids::{Uid, reservation_of_volume};
use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_device::filesystem;
use berth_device::mounts;
use berth_record::{AttachmentMode, VolumeEntry};
use kube::ResourceExt as _;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use tokio::time::Instant;

use super::Services;
use super::attach::{self, FoundVolume};
use super::request::{grown_size, path, volume_id};
use super::status::RpcError;
use crate::agent::pools::OpenPool;
use crate::agent::volumes;
use crate::csi::v1::{
    ControllerExpandVolumeRequest, ControllerExpandVolumeResponse, NodeExpandVolumeRequest,
    NodeExpandVolumeResponse,
};

/// How often what is recorded is looked at while a call waits for it.
const LOOK: Duration = Duration::from_millis(100);

impl Services {
    /// Returns once a volume is promised the size that is asked for.
    pub(super) async fn controller_expand(
        &self,
        request: &ControllerExpandVolumeRequest,
        until: Instant,
    ) -> Result<ControllerExpandVolumeResponse, RpcError> {
        let id = volume_id(&request.volume_id)?;
        let (size, limit) = grown_size(request.capacity_range.as_ref())?;
        let uid = reservation_of_volume(id).map_err(|_| RpcError::NoVolume(id.to_owned()))?;
        if !self.node.watches.synced() {
            return Err(RpcError::NotSynced);
        }
        let _running = self.node.in_flight.begin(id, "ControllerExpandVolume")?;
        let size = self.promise_more(id, &uid, size, limit, until).await?;
        Ok(ControllerExpandVolumeResponse { capacity_bytes: size.as_i64(), node_expansion_required: true })
    }

    /// Returns once a volume's devices, and the file system that is mounted of it, are as large as is asked for, which is
    /// promised first if it is not yet.
    pub(super) async fn node_expand(
        &self,
        request: &NodeExpandVolumeRequest,
        until: Instant,
    ) -> Result<NodeExpandVolumeResponse, RpcError> {
        let id = volume_id(&request.volume_id)?.to_owned();
        let shown = path("volume_path", &request.volume_path);
        let no_path = || RpcError::NoPath { volume: id.clone(), path: request.volume_path.clone() };
        // Volumes are shown at no such path: there is nothing, as at any other path where it is not.
        let shown = if request.volume_path.is_empty() { shown? } else { shown.map_err(|_| no_path())? };
        let uid = reservation_of_volume(&id).map_err(|_| RpcError::NoVolume(id.clone()))?;
        let guard = self.node.in_flight.begin(&id, "NodeExpandVolume")?;
        if mounts::is_mounted(&shown)?.is_none() {
            self.find_volume(&id)?;
            return Err(no_path());
        }
        if request.capacity_range.is_some() {
            let (size, limit) = grown_size(request.capacity_range.as_ref())?;
            let size = self.promise_more(&id, &uid, size, limit, until).await?;
            self.await_size(&id, size, until).await?;
        }
        let fill = move |services: &Self| services.find_volume(&id)?.fill();
        let size = self.guarded(guard, fill).await?;
        Ok(NodeExpandVolumeResponse { capacity_bytes: size.as_i64() })
    }

    /// Asks for a larger promise, unless the volume has it, and waits until it is obeyed here. Returns what is promised then.
    /// What is refused is not asked for any more.
    async fn promise_more(
        &self,
        id: &str,
        uid: &Uid,
        size: Bytes,
        limit: Option<Bytes>,
        until: Instant,
    ) -> Result<Bytes, RpcError> {
        let found = self.live(uid).ok_or_else(|| RpcError::NoVolume(id.to_owned()))?;
        let has = self.promised(id, uid)?;
        if let Some(limit) = limit.filter(|limit| has > *limit) {
            return Err(RpcError::Size { needed: has, limit });
        }
        if has >= size {
            return Ok(has);
        }
        let asked = parse::bytes("spec.maxSize", &found.spec.max_size);
        let asked = asked.map_err(|problem| RpcError::invalid("spec.maxSize", problem.to_string()))?;
        let asked_at =
            if asked == size { found.metadata.generation } else { self.ask_for(&found, size).await? };
        let answer = self.await_promise(id, uid, size, asked_at, until).await;
        if let Err(RpcError::Refused { .. }) = &answer
            && let Some(found) = self.live(uid)
        {
            self.ask_for(&found, has).await?;
        }
        answer
    }

    /// The reservation of a volume that this node made, and that nobody deletes.
    fn live(&self, uid: &Uid) -> Option<Arc<StagingReservation>> {
        let is_it = |found: &StagingReservation| found.metadata.uid.as_deref() == Some(uid.as_str());
        self.node.watches.made.find(is_it).filter(|found| found.metadata.deletion_timestamp.is_none())
    }

    /// Writes down what is asked for. Returns the generation of the reservation that says it.
    async fn ask_for(&self, found: &StagingReservation, size: Bytes) -> Result<Option<i64>, RpcError> {
        let name = found.name_any();
        let only_this = json!({
            "metadata": {"uid": found.metadata.uid}, // whatever its status has become since
            "spec": {"maxSize": size.0.to_string()},
        });
        let patched =
            self.reservations().patch(&name, &PatchParams::default(), &Patch::Merge(only_this)).await;
        match patched {
            Ok(patched) => Ok(patched.metadata.generation),
            Err(kube::Error::Api(status)) if status.code == 409 => {
                let why = "it was changed at the same time".to_owned();
                Err(RpcError::Waiting { what: format!("reservation {}", self.full_name(&name)), why })
            }
            Err(error) => Err(self.api_error("enlarge", &name)(error)),
        }
    }

    /// Waits until this node has obeyed a promise of at least `size`, and returns how much that is.
    async fn await_promise(
        &self,
        id: &str,
        uid: &Uid,
        size: Bytes,
        asked_at: Option<i64>,
        until: Instant,
    ) -> Result<Bytes, RpcError> {
        let mut changes = self.node.watches.changes();
        loop {
            let has = self.promised(id, uid)?;
            if has >= size {
                return Ok(has);
            }
            let seen = self.live(uid).ok_or_else(|| RpcError::NoVolume(id.to_owned()))?;
            if let Some(refusal) = refusal(&seen, asked_at) {
                return Err(refusal);
            }
            if Instant::now() >= until {
                return Err(RpcError::Waiting { what: format!("volume {id} of {size}"), why: told(&seen) });
            }
            let pause = until.min(Instant::now() + LOOK);
            drop(tokio::time::timeout_at(pause, changes.changed()).await);
        }
    }

    /// How much this node has obeyed to be promised to a volume.
    fn promised(&self, id: &str, uid: &Uid) -> Result<Bytes, RpcError> {
        let (pool, _) = self.find_recorded(id, uid)?;
        let (_, promises) =
            pool.promises().map_err(|source| RpcError::Record { pool: pool.name.clone(), source })?;
        let held = promises.get(uid).filter(|promise| !promise.released);
        Ok(held.map(|promise| promise.data).unwrap_or_default())
    }

    fn find_recorded(&self, id: &str, uid: &Uid) -> Result<(Arc<OpenPool>, VolumeEntry), RpcError> {
        match attach::recorded(&self.node.pools, uid)? {
            Some(found) => Ok(found),
            // It may lie in a pool that is not open; then that is said.
            None => self.find_volume(id).and(Err(RpcError::NoVolume(id.to_owned()))),
        }
    }

    /// Waits until the agent has recorded that a volume has at least `size`.
    async fn await_size(&self, id: &str, size: Bytes, until: Instant) -> Result<(), RpcError> {
        loop {
            let has = self.find_volume(id)?.entry.size;
            if has >= size {
                return Ok(());
            }
            if Instant::now() >= until {
                let why = format!("it has {has}, and is being made larger");
                return Err(RpcError::Waiting { what: format!("volume {id} of {size}"), why });
            }
            tokio::time::sleep_until(until.min(Instant::now() + LOOK)).await;
        }
    }
}

/// What is said of a reservation's promise.
fn told(found: &StagingReservation) -> String {
    let status = found.status.as_ref();
    let condition = status.and_then(|status| conditions::find(&status.conditions, ConditionType::Promised));
    condition.map_or_else(
        || "the operator has not seen it".to_owned(),
        |condition| format!("{}: {}", condition.reason, condition.message),
    )
}

/// The operator's answer to what the reservation asked for at this generation, if it is that there is no room.
fn refusal(found: &StagingReservation, asked_at: Option<i64>) -> Option<RpcError> {
    let status = found.status.as_ref()?;
    let condition = conditions::find(&status.conditions, ConditionType::Promised)?;
    if condition.observed_generation < asked_at {
        return None;
    }
    let reason = Reason::from_name(&condition.reason)?;
    is_about_space(reason).then(|| RpcError::Refused { reason, message: condition.message.clone() })
}

/// True if only space that others give back can help, or a person.
const fn is_about_space(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::InsufficientCapacity
            | Reason::LargerThanPool
            | Reason::TenantLimit
            | Reason::DataAlmostFull
            | Reason::MetadataAlmostFull
    )
}

impl FoundVolume {
    /// Makes the devices of a volume, and the file system of it that is mounted, as large as it is recorded. Returns that
    /// size. May be repeated, and ends what was cut off.
    pub fn fill(&self) -> Result<Bytes, RpcError> {
        let pool = Arc::clone(&self.pool);
        let _turn = pool.turn();
        volumes::enlarged(&pool, &self.uid)?;
        let Some(attachment) = self.attachment()? else { return Ok(self.entry.size) };
        if attachment.mode == AttachmentMode::Filesystem {
            let staged = &attachment.staged_path;
            let mount = mounts::is_mounted(staged)?.ok_or_else(|| self.not_staged(staged))?;
            filesystem::grow(&mount)?;
        }
        Ok(self.entry.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reservation(reason: &str, observed: i64) -> StagingReservation {
        let condition = json!({"type": "Promised", "status": "True", "reason": reason, "message": "lacks 5 bytes",
            "observedGeneration": observed, "lastTransitionTime": "2026-01-01T00:00:00Z"});
        let object = json!({
            "apiVersion": "staging.berth.dev/v1alpha1",
            "kind": "StagingReservation",
            "metadata": {"name": "r", "namespace": "berth-system"},
            "spec": {"maxSize": "1Gi", "access": "Block"},
            "status": {"state": "Ready", "conditions": [condition]},
        });
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn only_an_answer_to_what_is_asked_for_now_is_a_refusal() {
        let refused = |reason, observed| refusal(&reservation(reason, observed), Some(2));
        let no_room = refused("InsufficientCapacity", 2).expect("no room");
        assert!(no_room.to_string().contains("lacks 5 bytes"), "{no_room}");
        assert!(refused("InsufficientCapacity", 1).is_none(), "that was another size");
        assert!(refused("Ready", 2).is_none() && refused("Promised", 3).is_none());
        assert!(refused("NodeLost", 2).is_none(), "that passes");
        assert!(refused("LargerThanPool", 3).is_some() && refused("TenantLimit", 2).is_some());
    }
}
