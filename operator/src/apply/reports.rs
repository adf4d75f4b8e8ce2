//! States and conditions: by server-side apply, only where they differ from what was seen, with an event on each change.

use berth_api::conditions::{ConditionType, Truth, condition, find};
use berth_api::staging_pool::PoolCapacity;
use berth_api::template_import::ImportState as ApiImportState;
use berth_api::{ImageTransfer, StagingPool, TemplateImport};
use berth_core::change::PoolReport;
use berth_core::ids::{ObjectName, PoolName, Uid};
use berth_core::reason::Reason;
use berth_core::transfer::TransferKind;
use berth_core::view::{ObjectVersion, TransferState};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::Patch;
use kube::{Api, ResourceExt as _};
use serde::Serialize;
use serde_json::json;

use super::error::{Answer, answer};
use super::{Applier, ApplyError};
use crate::context::now;
use crate::observe::Observed;

/// What became of an import.
pub(super) struct ImportReport<'r> {
    pub state: TransferState,
    pub reason: Reason,
    pub message: &'r str,
    pub reserved: bool,
}

/// The fields of an import's status that the operator owns.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct ImportFields {
    state: Option<ApiImportState>,
    conditions: Vec<Condition>,
}

/// A pool's status: all of it is the operator's.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct PoolFields {
    nodes: i32,
    capacity: PoolCapacity,
    queued: i32,
    constraints: Vec<String>,
    conditions: Vec<Condition>,
}

impl Applier {
    pub(super) async fn report_import(
        &self,
        name: &ObjectName,
        uid: &Uid,
        version: &ObjectVersion,
        report: &ImportReport<'_>,
    ) -> Result<bool, ApplyError> {
        let Some(seen) = self.seen::<TemplateImport>(name, Some(uid)) else { return Ok(false) };
        if seen.resource_version().as_deref() != Some(version.0.as_str()) {
            let object = format!("TemplateImport {name}");
            return Err(ApplyError::Conflict { operation: "report on", object });
        }
        let status = seen.status.clone().unwrap_or_default();
        let generation = seen.metadata.generation;
        let ready = report.state == TransferState::Done;
        let write = |kind, holds| {
            condition(
                &status.conditions,
                kind,
                truth(holds),
                report.reason,
                report.message,
                generation,
                now(),
            )
        };
        let wanted = ImportFields {
            state: import_state(report.state).or(status.state),
            conditions: vec![
                write(ConditionType::Ready, ready),
                write(ConditionType::Reserved, report.reserved),
            ],
        };
        let kinds = [ConditionType::Ready, ConditionType::Reserved];
        let is = ImportFields { state: status.state, conditions: of_kinds(&status.conditions, &kinds) };
        if is == wanted {
            return Ok(false);
        }
        let written = self.report(self.namespaced(name), &*seen, Some(version), &wanted).await?;
        let Some(written) = written else { return Ok(false) };
        self.observer.absorb(written);
        if is.state != wanted.state || reason_of(&is.conditions) != reason_of(&wanted.conditions) {
            let action = TransferKind::Import.name_of(report.state).unwrap_or_default();
            tracing::info!(import = %name, state = action, reason = %report.reason, message = report.message,
                "import reported");
            self.events.say(&*seen, action, report.reason, report.message);
        }
        Ok(true)
    }

    pub(super) async fn report_pool(&self, name: &PoolName, report: &PoolReport) -> Result<bool, ApplyError> {
        let Some(seen) = self.seen::<StagingPool>(&ObjectName::new("", name.as_str()), None) else {
            return Ok(false);
        };
        let status = seen.status.clone().unwrap_or_default();
        let ready = condition(
            &status.conditions,
            ConditionType::Ready,
            truth(report.ready),
            report.reason,
            &report.message,
            seen.metadata.generation,
            now(),
        );
        let wanted = PoolFields {
            nodes: report.nodes.try_into().unwrap_or(i32::MAX),
            capacity: PoolCapacity {
                total: report.total.as_i64(),
                promised: report.promised.as_i64(),
                promised_to_volumes: report.volumes.as_i64(),
                used: report.used.as_i64(),
                unreferenced: report.unreferenced.as_i64(),
                available: report.total.saturating_sub(report.promised).as_i64(),
            },
            queued: report.queued.try_into().unwrap_or(i32::MAX),
            constraints: report.constraints.iter().map(|reason| reason.as_str().to_owned()).collect(),
            conditions: vec![ready],
        };
        let is = PoolFields {
            nodes: status.nodes,
            capacity: status.capacity,
            queued: status.queued,
            constraints: status.constraints,
            conditions: of_kinds(&status.conditions, &[ConditionType::Ready]),
        };
        if is == wanted {
            return Ok(false);
        }
        let api: Api<StagingPool> = Api::all(self.client.clone());
        let Some(written) = self.report(api, &*seen, None, &wanted).await? else { return Ok(false) };
        self.observer.absorb(written);
        if reason_of(&is.conditions) != reason_of(&wanted.conditions) {
            tracing::info!(pool = %name, ready = report.ready, reason = %report.reason, message = report.message,
                "pool reported");
            self.events.say(&*seen, "Observed", report.reason, &report.message);
        }
        Ok(true)
    }

    /// Says of a transfer that this version carries out none.
    ///
    /// # Errors
    /// If the API server does not take it.
    pub async fn refuse(&self, name: &ObjectName) -> Result<(), ApplyError> {
        let Some(seen) = self.seen::<ImageTransfer>(name, None) else { return Ok(()) };
        let is = seen.status.clone().unwrap_or_default().conditions;
        let reason = Reason::NotImplemented;
        let message = "this version carries out no image transfers; use a TemplateImport";
        let generation = seen.metadata.generation;
        let wanted =
            condition(&is, ConditionType::Succeeded, Truth::False, reason, message, generation, now());
        if find(&is, ConditionType::Succeeded) == Some(&wanted) {
            return Ok(());
        }
        let wanted = json!({"conditions": [wanted]});
        if self.report(self.namespaced::<ImageTransfer>(name), &*seen, None, &wanted).await?.is_some() {
            self.events.say(&*seen, "Refused", reason, message);
        }
        Ok(())
    }

    pub(super) fn seen<K: Observed>(
        &self,
        name: &ObjectName,
        uid: Option<&Uid>,
    ) -> Option<std::sync::Arc<K>> {
        let seen = self.observer.stored::<K>(name)?;
        uid.is_none_or(|uid| seen.uid().as_deref() == Some(uid.as_str())).then_some(seen)
    }

    /// Applies the operator's fields of a status, if it is still at `version` where one is given; `None` if the object
    /// is gone.
    pub(super) async fn report<K: Observed>(
        &self,
        api: Api<K>,
        seen: &K,
        version: Option<&ObjectVersion>,
        status: &(impl Serialize + Sync),
    ) -> Result<Option<K>, ApplyError> {
        let name = seen.name_any();
        let mut body = json!({
            "apiVersion": K::api_version(&()),
            "kind": K::kind(&()),
            "metadata": {"name": name, "namespace": seen.namespace(), "uid": seen.uid()},
            "status": status,
        });
        if let Some(version) = version {
            body["metadata"]["resourceVersion"] = json!(version.0);
        }
        let result = api.patch_status(&name, &Self::as_operator(), &Patch::Apply(body)).await;
        match answer("report on", format!("{} {name}", K::kind(&())), result)? {
            Answer::Done(object) => Ok(Some(object)),
            Answer::Gone | Answer::Exists => Ok(None),
        }
    }
}

pub(super) const fn truth(holds: bool) -> Truth {
    if holds { Truth::True } else { Truth::False }
}

/// The conditions of these types, in the order of the types.
pub(super) fn of_kinds(conditions: &[Condition], kinds: &[ConditionType]) -> Vec<Condition> {
    kinds.iter().filter_map(|kind| find(conditions, *kind)).cloned().collect()
}

pub(super) fn reason_of(conditions: &[Condition]) -> Option<&str> {
    conditions.first().map(|condition| condition.reason.as_str())
}

/// `None` for a state that no import is ever in.
const fn import_state(state: TransferState) -> Option<ApiImportState> {
    Some(match state {
        TransferState::Pending => ApiImportState::Pending,
        TransferState::Probing => ApiImportState::Probing,
        TransferState::Queued => ApiImportState::Queued,
        TransferState::Working => ApiImportState::Importing,
        TransferState::Done => ApiImportState::Ready,
        TransferState::Suspended => return None,
        TransferState::Failed => ApiImportState::Failed,
    })
}
