//! Pools: guarded while they have ledgers; and what was removed in them.

use berth_api::conditions::time;
use berth_api::defaults::{ANNOTATION_GIVEN_UP, POOL_FINALIZER, RECLAIM_MANAGER};
use berth_api::staging_pool::{LastReclaim, ReclaimReason};
use berth_api::{StagedImage, StagingLedger, StagingPool};
use berth_core::ids::{ObjectName, PoolName, Uid};
use berth_core::metric::Metric;
use berth_core::reason::Reason;
use berth_core::reclaim::Cause;
use berth_core::units::Bytes;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Resource as _, ResourceExt as _};
use serde_json::json;

use super::error::{Answer, answer, swapped};
use super::{Applier, ApplyError};
use crate::context::now;

impl Applier {
    pub(super) async fn guard_pool(&self, name: &PoolName, uid: &Uid) -> Result<bool, ApplyError> {
        let api: Api<StagingPool> = Api::all(self.client.clone());
        self.finalizer(api, &ObjectName::new("", name.as_str()), uid, POOL_FINALIZER, true).await
    }

    /// Asks the API server itself whether a ledger is left: one that the watch does not show may have been made a moment ago,
    /// by an operator that did not see that the pool is being deleted.
    pub(super) async fn unguard_pool(&self, name: &PoolName, uid: &Uid) -> Result<bool, ApplyError> {
        let ledgers: Api<StagingLedger> = Api::all(self.client.clone());
        let all = ledgers.list(&ListParams::default()).await;
        let all = swapped("list", format!("the ledgers of StagingPool {name}"), all)?;
        if all.items.iter().any(|ledger| ledger.spec.pool_name == name.as_str()) {
            return Err(ApplyError::Conflict { operation: "release", object: format!("StagingPool {name}") });
        }
        let api: Api<StagingPool> = Api::all(self.client.clone());
        self.finalizer(api, &ObjectName::new("", name.as_str()), uid, POOL_FINALIZER, false).await
    }

    /// Marks a copy of what a person has deleted.
    pub(super) async fn give_up_image(&self, name: &str, uid: &Uid) -> Result<bool, ApplyError> {
        let patch = json!({"metadata": {"uid": uid.as_str(), "annotations": {ANNOTATION_GIVEN_UP: "true"}}});
        let params = PatchParams { field_manager: Some(self.manager.clone()), ..PatchParams::default() };
        let api: Api<StagedImage> = Api::all(self.client.clone());
        let result = api.patch(name, &params, &Patch::Merge(patch)).await;
        match answer("give up", format!("StagedImage {name}"), result)? {
            Answer::Done(image) => {
                self.observer.absorb(image);
                Ok(true)
            }
            Answer::Gone | Answer::Exists => Ok(false),
        }
    }

    /// In the pool's status, in its events, and counted.
    pub(super) async fn report_reclaim(
        &self,
        pool: &PoolName,
        cause: Cause,
        images: u32,
        bytes: Bytes,
    ) -> Result<bool, ApplyError> {
        let labels = [("pool", pool.as_str()), ("cause", cause.as_str())];
        self.metrics.add(Metric::ReclaimsTotal, &labels, images.into());
        self.metrics.add(Metric::ReclaimedBytesTotal, &labels, bytes.0);
        let Some(seen) = self.observer.stored::<StagingPool>(&ObjectName::new("", pool.as_str())) else {
            return Ok(false);
        };
        let message =
            format!("{images} images that nothing refers to go, {bytes} in all: {}", cause.as_str());
        tracing::info!(%pool, cause = cause.as_str(), images, bytes = bytes.0, "images reclaimed");
        self.events.say(&*seen, "Reclaim", Reason::Reclaimed, &message);
        let last = LastReclaim {
            time: time(now()),
            images: images.try_into().unwrap_or(i32::MAX),
            bytes: bytes.as_i64(),
            reason: reason(cause),
        };
        let body = json!({
            "apiVersion": StagingPool::api_version(&()), "kind": StagingPool::kind(&()),
            "metadata": {"name": pool.as_str(), "uid": seen.uid()},
            "status": {"lastReclaim": last},
        });
        let api: Api<StagingPool> = Api::all(self.client.clone());
        let params = PatchParams::apply(RECLAIM_MANAGER).force();
        let result = api.patch_status(pool.as_str(), &params, &Patch::Apply(body)).await;
        if let Answer::Done(written) = answer("report on", format!("StagingPool {pool}"), result)? {
            self.observer.absorb(written);
        }
        Ok(false)
    }
}

const fn reason(cause: Cause) -> ReclaimReason {
    match cause {
        Cause::Unused => ReclaimReason::Unused,
        Cause::HighWatermark => ReclaimReason::HighWatermark,
        Cause::Shortfall => ReclaimReason::Shortfall,
        Cause::Draining => ReclaimReason::Draining,
        Cause::NodeLost => ReclaimReason::NodeLost,
    }
}
