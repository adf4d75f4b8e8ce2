//! The only writer of the API: one function per [`Change`]. Applying decides nothing.
//!
//! Ledgers and placements are replaced under the version that the decision saw. Conditions and states go by server-side
//! apply, and only where they differ from what was seen. A list of changes ends at the first that did not go through.

mod abandoned;
mod error;
mod ledgers;
mod lifecycle;
mod placements;
mod pools;
mod rebuild;
mod reports;
mod reservations;
mod transfers;

use std::sync::Arc;

use berth_api::defaults::OPERATOR_MANAGER;
use berth_core::change::Change;
use berth_core::ids::ObjectName;
use kube::api::{PatchParams, PostParams};
use kube::core::NamespaceResourceScope;
use kube::{Api, Client, Resource};

pub use error::ApplyError;

use self::transfers::TransferReport;
use crate::events::Events;
use crate::metrics::Metrics;
use crate::observe::Observer;

/// What became of a list of changes that all went through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// True if anything was written: the view has moved on, and it is worth looking again.
    pub wrote: bool,
    /// Look again after this many milliseconds.
    pub retry: Option<u64>,
}

/// Writes.
pub struct Applier {
    client: Client,
    observer: Arc<Observer>,
    events: Events,
    metrics: Arc<Metrics>,
    manager: String,
}

impl Applier {
    /// Writes as the replica `identity`; the observer takes in what the API server answers.
    pub fn new(
        client: Client,
        observer: Arc<Observer>,
        events: Events,
        metrics: Arc<Metrics>,
        identity: &str,
    ) -> Self {
        Self { client, observer, events, metrics, manager: format!("{OPERATOR_MANAGER}/{identity}") }
    }

    /// Makes the changes, in order.
    ///
    /// # Errors
    /// At the first that did not go through; those after it are not made.
    pub async fn apply(&self, changes: &[Change]) -> Result<Outcome, ApplyError> {
        let mut outcome = Outcome::default();
        for change in changes {
            match change {
                Change::RetryAfter { millis } => {
                    outcome.retry = Some(outcome.retry.map_or(*millis, |sooner| sooner.min(*millis)));
                }
                Change::ConfirmGone { holder, uid } => {
                    if !self.is_gone(holder, uid).await? {
                        return Ok(outcome);
                    }
                }
                Change::ConfirmAbandoned { reservation, claim, node } => {
                    if !self.is_abandoned(reservation, claim, node).await? {
                        return Ok(outcome);
                    }
                }
                _ => outcome.wrote |= self.one(change).await?,
            }
        }
        Ok(outcome)
    }

    /// Makes one change; says whether anything was written.
    async fn one(&self, change: &Change) -> Result<bool, ApplyError> {
        match change {
            Change::CreateLedger { pool, node, capacity } => self.create_ledger(pool, node, *capacity).await,
            Change::WriteLedger { name, version, revision, capacity, promises } => {
                self.write_ledger(name, version, *revision, *capacity, promises).await
            }
            Change::RebuildLedger { name, version, node, report, revision, capacity, promises, rebuilt } => {
                let new = rebuild::NewLedger { revision: *revision, capacity: *capacity, promises, rebuilt };
                self.rebuild_ledger(name, version, node, report, &new).await
            }
            Change::DeleteLedger { name, version } => self.delete_ledger(name, version).await,
            Change::GuardPool { name, uid } => self.guard_pool(name, uid).await,
            Change::UnguardPool { name, uid } => self.unguard_pool(name, uid).await,
            Change::GiveUpImage { name, uid } => self.give_up_image(name, uid).await,
            Change::ReportReclaim { pool, cause, images, bytes } => {
                self.report_reclaim(pool, *cause, *images, *bytes).await
            }
            Change::GuardReservation { name, uid } => self.guard_reservation(name, uid).await,
            Change::UnguardReservation { name, uid } => self.unguard_reservation(name, uid).await,
            Change::AssignReservation { name, version, placement, image, reused, considered } => {
                let image = image.as_ref().map(|image| (image, *reused));
                self.assign_reservation(name, version, placement, image, considered).await
            }
            Change::ExpireReservation { name, uid, version, pool, message } => {
                self.expire_reservation(name, uid, version, pool, message).await
            }
            Change::ReportReservation { name, uid, version, report } => {
                self.report_reservation(name, uid, version, report).await
            }
            Change::CreateReservation { name, owner, pools, size, access } => {
                self.create_reservation(name, owner, pools, *size, *access).await
            }
            Change::DeleteReservation { name, uid } => self.delete_reservation(name, uid).await,
            Change::CreateImage { name, image, pool, node, store } => {
                self.create_image(name, image, pool, node, store).await
            }
            Change::DeleteImage { name, uid } => self.delete_image(name, uid).await,
            Change::UnguardImage { name, uid } => self.unguard_image(name, uid).await,
            Change::GuardTransfer { id } => self.guard_transfer(id, true).await,
            Change::UnguardTransfer { id } => self.guard_transfer(id, false).await,
            Change::AssignTransfer { id, version, placement, retried } => {
                self.assign_transfer(id, version, placement, retried.as_deref()).await
            }
            Change::ReportTransfer { id, version, state, reason, message, reserved } => {
                let report = TransferReport { state: *state, reason: *reason, message, reserved: *reserved };
                self.report_transfer(id, version, &report).await
            }
            Change::DeleteTransfer { id, version } => self.delete_transfer(id, version).await,
            Change::AssignStore { name, version, node, generation } => {
                self.assign_store(name, version, node, *generation).await
            }
            Change::ReportPool { name, report } => self.report_pool(name, report).await,
            Change::NotePersistent { name, uid, volume } => self.note_persistent(name, uid, volume).await,
            Change::AbandonReservation { name, uid, message } => {
                self.abandon_reservation(name, uid, message).await
            }
            Change::ConfirmGone { .. } | Change::ConfirmAbandoned { .. } | Change::RetryAfter { .. } => {
                Ok(false)
            }
        }
    }

    fn namespaced<K>(&self, name: &ObjectName) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), &name.namespace)
    }

    /// For writes that must show which replica made them.
    fn as_replica(&self) -> PostParams {
        PostParams { field_manager: Some(self.manager.clone()), ..PostParams::default() }
    }

    /// For conditions and states.
    fn as_operator() -> PatchParams {
        PatchParams::apply(OPERATOR_MANAGER).force()
    }
}
