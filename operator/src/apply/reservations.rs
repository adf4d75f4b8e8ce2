//! What is said of reservations: their states, and their end.

use berth_api::StagingReservation;
use berth_api::conditions::{ConditionType, condition, time};
use berth_api::staging_reservation::{
    CandidatePlace, DryRunAnswer, QueuePlace, ReservationState as ApiReservationState,
};
use berth_core::change::{Considered, DryRun, ReservationReport};
use berth_core::ids::{ObjectName, PoolName, Uid};
use berth_core::metric::Metric;
use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_core::view::{ObjectVersion, ReservationState};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::ResourceExt as _;
use kube::api::{DeleteParams, Preconditions};
use serde::Serialize;

use super::error::{Answer, answer};
use super::reports::{of_kinds, reason_of, truth};
use super::{Applier, ApplyError};
use crate::context::now;

/// The fields of a reservation's status that the operator owns. Absent ones are taken back.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct ReservationFields {
    state: Option<ApiReservationState>,
    #[serde(skip_serializing_if = "Option::is_none")]
    queue: Option<QueuePlace>,
    #[serde(skip_serializing_if = "Option::is_none")]
    shortfall_bytes: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    candidates: Option<Vec<CandidatePlace>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dry_run: Option<DryRunAnswer>,
    conditions: Vec<Condition>,
}

impl ReservationFields {
    /// What a report says; the places that were looked at only if they are to be told.
    fn of(report: &ReservationReport, places: bool, conditions: Vec<Condition>) -> Self {
        Self {
            state: Some(reservation_state(report.state)),
            queue: report.queue.map(|(position, ahead)| QueuePlace {
                position: position.try_into().unwrap_or(i32::MAX),
                bytes_ahead: ahead.as_i64(),
                reason: report.reason.as_str().to_owned(),
            }),
            shortfall_bytes: report.shortfall.map(Bytes::as_i64),
            candidates: places.then(|| report.considered.iter().map(candidate_place).collect()),
            expires_at: report.expires.map(time),
            dry_run: report.dry_run.as_ref().map(dry_run_answer),
            conditions,
        }
    }
}

impl Applier {
    /// `Promised` is the operator's for ever; `Ready` only until the reservation has a place: then it is the node's.
    pub(super) async fn report_reservation(
        &self,
        name: &ObjectName,
        uid: &Uid,
        version: &ObjectVersion,
        report: &ReservationReport,
    ) -> Result<bool, ApplyError> {
        let Some(seen) = self.seen::<StagingReservation>(name, Some(uid)) else { return Ok(false) };
        if seen.resource_version().as_deref() != Some(version.0.as_str()) {
            let object = format!("StagingReservation {name}");
            return Err(ApplyError::Conflict { operation: "report on", object });
        }
        let status = seen.status.clone().unwrap_or_default();
        let generation = seen.metadata.generation;
        let write = |kind, holds| {
            condition(
                &status.conditions,
                kind,
                truth(holds),
                report.reason,
                &report.message,
                generation,
                now(),
            )
        };
        let promised = matches!(report.state, ReservationState::Promised | ReservationState::Ready);
        let mut kinds = vec![ConditionType::Promised];
        let mut conditions = vec![write(ConditionType::Promised, promised)];
        if status.assignment.is_none() && !promised {
            kinds.push(ConditionType::Ready);
            conditions.push(write(ConditionType::Ready, false));
        }
        // With a place they were told together with that.
        let told = status.assignment.is_none();
        let wanted = ReservationFields::of(report, told, conditions);
        let is = ReservationFields {
            state: status.state,
            queue: status.queue,
            shortfall_bytes: status.shortfall_bytes,
            candidates: told.then_some(status.candidates),
            expires_at: status.expires_at,
            dry_run: status.dry_run,
            conditions: of_kinds(&status.conditions, &kinds),
        };
        if is == wanted {
            return Ok(false);
        }
        let written = self.report(self.namespaced(name), &*seen, Some(version), &wanted).await?;
        let Some(written) = written else { return Ok(false) };
        self.observer.absorb(written);
        if is.state != wanted.state || reason_of(&is.conditions) != reason_of(&wanted.conditions) {
            self.say_reservation(&seen, name, report);
        }
        Ok(true)
    }

    /// Tells of a reservation that came to another state, or came there for another reason.
    fn say_reservation(&self, seen: &StagingReservation, name: &ObjectName, report: &ReservationReport) {
        let action = format!("{:?}", report.state);
        tracing::info!(reservation = %name, state = action, reason = %report.reason, message = report.message,
            "reservation reported");
        self.events.say(seen, &action, report.reason, &report.message);
        if report.state == ReservationState::Refused {
            self.metrics.add(Metric::RefusalsTotal, &[("reason", report.reason.as_str())], 1);
        }
    }

    /// Ends a reservation that nothing uses, unless it is another one by now: it may have been renewed.
    pub(super) async fn expire_reservation(
        &self,
        name: &ObjectName,
        uid: &Uid,
        version: &ObjectVersion,
        pool: &PoolName,
        message: &str,
    ) -> Result<bool, ApplyError> {
        let Some(seen) = self.seen::<StagingReservation>(name, Some(uid)) else { return Ok(false) };
        let this_one = Preconditions { uid: Some(uid.0.clone()), resource_version: Some(version.0.clone()) };
        let params = DeleteParams { preconditions: Some(this_one), ..DeleteParams::default() };
        let result = self.namespaced::<StagingReservation>(name).delete(&name.name, &params).await;
        if let Answer::Done(_) = answer("expire", format!("StagingReservation {name}"), result)? {
            tracing::info!(reservation = %name, message, "reservation expired");
            self.events.say(&*seen, "Expired", Reason::Expired, message);
            self.metrics.add(Metric::ExpiriesTotal, &[("pool", pool.as_str())], 1);
        }
        Ok(false)
    }
}

/// A place that was looked at, as it stands in a status.
pub(super) fn candidate_place(considered: &Considered) -> CandidatePlace {
    CandidatePlace {
        pool: considered.pool.0.clone(),
        node: considered.node.0.clone(),
        reason: considered.reason.as_str().to_owned(),
        message: considered.message.clone(),
        shortfall_bytes: considered.shortfall.map(Bytes::as_i64),
        chosen: considered.chosen,
    }
}

fn dry_run_answer(answer: &DryRun) -> DryRunAnswer {
    let (pool, node) = answer.place.clone().unzip();
    DryRunAnswer {
        fits: answer.fits,
        pool: pool.map(|pool| pool.0),
        node: node.map(|node| node.0),
        position: answer.position.map(|position| position.try_into().unwrap_or(i32::MAX)),
        peak_bytes: answer.peak.as_i64(),
        shortfall_bytes: answer.shortfall.map(Bytes::as_i64),
        reclaims: answer.reclaims.clone(),
    }
}

const fn reservation_state(state: ReservationState) -> ApiReservationState {
    match state {
        ReservationState::Pending => ApiReservationState::Pending,
        ReservationState::Queued => ApiReservationState::Queued,
        ReservationState::Promised => ApiReservationState::Promised,
        ReservationState::Ready => ApiReservationState::Ready,
        ReservationState::Releasing => ApiReservationState::Releasing,
        ReservationState::Refused => ApiReservationState::Refused,
    }
}
