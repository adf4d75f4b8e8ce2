//! Transfers, imports among them: guarded, placed, reported on and, once they ended long ago, deleted.

use std::fmt::Debug;

use berth_api::conditions::{ConditionType, Truth, condition};
use berth_api::defaults::{IMPORT_FINALIZER, TRANSFER_FINALIZER};
use berth_api::fields::Assignment;
use berth_api::image_transfer::TransferState as ApiTransferState;
use berth_api::template_import::ImportState;
use berth_api::{ImageTransfer, TemplateImport, parse};
use berth_core::reason::Reason;
use berth_core::transfer::{TransferId, TransferKind};
use berth_core::view::{ObjectVersion, Placement, TransferState};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt as _;
use kube::api::{DeleteParams, Preconditions};
use kube::core::NamespaceResourceScope;
use serde::Serialize;

use super::error::{Answer, answer};
use super::placements::assignment_of;
use super::reports::{of_kinds, reason_of, truth};
use super::{Applier, ApplyError};
use crate::context::now;
use crate::observe::Observed;

/// What became of a transfer.
pub(super) struct TransferReport<'r> {
    pub state: TransferState,
    pub reason: Reason,
    pub message: &'r str,
    pub reserved: bool,
}

/// The fields of a transfer's status that the operator owns.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct TransferFields<S> {
    state: Option<S>,
    conditions: Vec<Condition>,
}

/// A kind of object that asks for a transfer.
trait Asks: Observed<Scope = NamespaceResourceScope> + Serialize {
    /// Its states, as the API names them.
    type State: Copy + PartialEq + Debug + Serialize + Send + Sync;
    /// What keeps it until its node has taken back what it did.
    const FINALIZER: &'static str;
    /// The condition that tells how it ended.
    const ENDS: ConditionType;

    /// Its state by the API's name; `None` for one that it is never in.
    fn named(state: TransferState) -> Option<Self::State>;
    /// Its state and conditions.
    fn told(&self) -> (Option<Self::State>, Vec<Condition>);
    /// Whether it has ended well, where it is in this state.
    fn ended_well(state: TransferState) -> Truth;
    /// Puts it on a node. If it is tried again, what asked for that is recorded, and it has not failed any more.
    fn place(&mut self, assignment: Assignment, retried: Option<&str>);
}

impl Asks for TemplateImport {
    type State = ImportState;
    const FINALIZER: &'static str = IMPORT_FINALIZER;
    const ENDS: ConditionType = ConditionType::Ready;

    fn named(state: TransferState) -> Option<ImportState> {
        parse::to_import_state(state)
    }

    fn told(&self) -> (Option<ImportState>, Vec<Condition>) {
        let status = self.status.clone().unwrap_or_default();
        (status.state, status.conditions)
    }

    /// A template can be used, or it cannot.
    fn ended_well(state: TransferState) -> Truth {
        truth(state == TransferState::Done)
    }

    fn place(&mut self, assignment: Assignment, retried: Option<&str>) {
        let status = self.status.get_or_insert_default();
        status.assignment = Some(assignment);
        if let Some(value) = retried {
            (status.retried, status.state) = (Some(value.to_owned()), Some(ImportState::Pending));
        }
    }
}

impl Asks for ImageTransfer {
    type State = ApiTransferState;
    const FINALIZER: &'static str = TRANSFER_FINALIZER;
    const ENDS: ConditionType = ConditionType::Succeeded;

    fn named(state: TransferState) -> Option<ApiTransferState> {
        Some(parse::to_transfer_state(state))
    }

    fn told(&self) -> (Option<ApiTransferState>, Vec<Condition>) {
        let status = self.status.clone().unwrap_or_default();
        (status.state, status.conditions)
    }

    /// Nobody knows before it has ended, and when that was told is when it ended.
    fn ended_well(state: TransferState) -> Truth {
        match state {
            TransferState::Done => Truth::True,
            TransferState::Failed => Truth::False,
            _ => Truth::Unknown,
        }
    }

    fn place(&mut self, assignment: Assignment, retried: Option<&str>) {
        let status = self.status.get_or_insert_default();
        status.assignment = Some(assignment);
        if let Some(value) = retried {
            (status.retried, status.state) = (Some(value.to_owned()), Some(ApiTransferState::Pending));
            // The time of its next end counts, not that of this one.
            status.conditions.retain(|told| told.type_ != Self::ENDS.as_str());
        }
    }
}

impl Applier {
    /// Puts the finalizer on, or takes it off.
    pub(super) async fn guard_transfer(&self, id: &TransferId, wanted: bool) -> Result<bool, ApplyError> {
        match id.kind {
            TransferKind::Import => self.guard::<TemplateImport>(id, wanted).await,
            TransferKind::Transfer => self.guard::<ImageTransfer>(id, wanted).await,
        }
    }

    async fn guard<K: Asks>(&self, id: &TransferId, wanted: bool) -> Result<bool, ApplyError> {
        self.finalizer(self.namespaced::<K>(&id.name), &id.name, &id.uid, K::FINALIZER, wanted).await
    }

    /// Which node works on it.
    pub(super) async fn assign_transfer(
        &self,
        id: &TransferId,
        version: &ObjectVersion,
        placement: &Placement,
        retried: Option<&str>,
    ) -> Result<bool, ApplyError> {
        match id.kind {
            TransferKind::Import => self.put::<TemplateImport>(id, version, placement, retried).await,
            TransferKind::Transfer => self.put::<ImageTransfer>(id, version, placement, retried).await,
        }
    }

    async fn put<K: Asks>(
        &self,
        id: &TransferId,
        version: &ObjectVersion,
        placement: &Placement,
        retried: Option<&str>,
    ) -> Result<bool, ApplyError> {
        self.assign(&id.name, version, |object: &mut K| object.place(assignment_of(placement), retried))
            .await?;
        tracing::info!(kind = %id.kind, name = %id.name, node = %placement.node, generation = %placement.generation,
            "assigned");
        Ok(true)
    }

    pub(super) async fn report_transfer(
        &self,
        id: &TransferId,
        version: &ObjectVersion,
        report: &TransferReport<'_>,
    ) -> Result<bool, ApplyError> {
        match id.kind {
            TransferKind::Import => self.tell::<TemplateImport>(id, version, report).await,
            TransferKind::Transfer => self.tell::<ImageTransfer>(id, version, report).await,
        }
    }

    async fn tell<K: Asks>(
        &self,
        id: &TransferId,
        version: &ObjectVersion,
        report: &TransferReport<'_>,
    ) -> Result<bool, ApplyError> {
        let Some(seen) = self.seen::<K>(&id.name, Some(&id.uid)) else { return Ok(false) };
        if seen.resource_version().as_deref() != Some(version.0.as_str()) {
            return Err(ApplyError::Conflict { operation: "report on", object: id.to_string() });
        }
        let (state, conditions) = seen.told();
        let generation = seen.meta().generation;
        let write = |kind, truth| {
            condition(&conditions, kind, truth, report.reason, report.message, generation, now())
        };
        let wanted = TransferFields {
            state: K::named(report.state).or(state),
            conditions: vec![
                write(K::ENDS, K::ended_well(report.state)),
                write(ConditionType::Reserved, truth(report.reserved)),
            ],
        };
        let kinds = [K::ENDS, ConditionType::Reserved];
        let is = TransferFields { state, conditions: of_kinds(&conditions, &kinds) };
        if is == wanted {
            return Ok(false);
        }
        let written = self.report(self.namespaced::<K>(&id.name), &*seen, Some(version), &wanted).await?;
        let Some(written) = written else { return Ok(false) };
        self.observer.absorb(written);
        if is.state != wanted.state || reason_of(&is.conditions) != reason_of(&wanted.conditions) {
            let action = id.kind.name_of(report.state).unwrap_or_default();
            tracing::info!(kind = %id.kind, name = %id.name, state = action, reason = %report.reason,
                message = report.message, "reported");
            self.events.say(&*seen, action, report.reason, report.message);
        }
        Ok(true)
    }

    /// Deletes one that ended as long ago as it says, if it is still what the decision saw.
    pub(super) async fn delete_transfer(
        &self,
        id: &TransferId,
        version: &ObjectVersion,
    ) -> Result<bool, ApplyError> {
        let this_one =
            Preconditions { uid: Some(id.uid.0.clone()), resource_version: Some(version.0.clone()) };
        let params = DeleteParams { preconditions: Some(this_one), ..DeleteParams::default() };
        let name = &id.name.name;
        let gone = match id.kind {
            TransferKind::Import => {
                self.namespaced::<TemplateImport>(&id.name).delete(name, &params).await.map(drop)
            }
            TransferKind::Transfer => {
                self.namespaced::<ImageTransfer>(&id.name).delete(name, &params).await.map(drop)
            }
        };
        if let Answer::Done(()) = answer("delete", id.to_string(), gone)? {
            tracing::info!(kind = %id.kind, name = %id.name, "deleted: it ended as long ago as it says");
        }
        Ok(false)
    }
}
