//! States and conditions: by server-side apply, only where they differ from what was seen, with an event on each change.

use berth_api::StagingPool;
use berth_api::conditions::{ConditionType, Truth, condition, find};
use berth_api::staging_pool::PoolCapacity;
use berth_core::change::PoolReport;
use berth_core::ids::{ObjectName, PoolName, Uid};
use berth_core::view::ObjectVersion;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::Patch;
use kube::{Api, ResourceExt as _};
use serde::Serialize;
use serde_json::json;

use super::error::{Answer, answer};
use super::{Applier, ApplyError};
use crate::context::now;
use crate::observe::Observed;

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
