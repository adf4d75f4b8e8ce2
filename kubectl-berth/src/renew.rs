//! `kubectl berth renew`: a reservation that nothing uses is kept for another while.

use std::process::ExitCode;

use anyhow::Context as _;
use berth_api::defaults::ANNOTATION_RENEWED;
use berth_api::{StagingReservation, parse};
use berth_core::units::Timestamp;
use berth_core::view::{ReservationState, ReservationView};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use thiserror::Error;

use crate::args::{Output, RenewArgs};
use crate::observe::Scope;
use crate::server::{self, rfc3339};
use crate::text::span;

/// Why a reservation cannot be renewed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NotRenewable {
    /// It has no end of its own.
    #[error("reservation {0} has no end of its own: it ends with what it belongs to, and needs no renewal")]
    NoEnd(String),
    /// It is being deleted.
    #[error("reservation {0} is being deleted")]
    Deleted(String),
    /// It was refused.
    #[error("reservation {0} was refused and holds nothing; make another")]
    Refused(String),
    /// It asks only.
    #[error("reservation {0} is a dry run and holds nothing")]
    DryRun(String),
    /// It waits.
    #[error(
        "reservation {0} has no place yet: what ends its waiting is `admission.maxQueueTime` of its pool, which cannot be renewed"
    )]
    Waiting(String),
    /// A field cannot be used.
    #[error("reservation {name} cannot be used: {problem}")]
    Invalid {
        /// Which.
        name: String,
        /// The field and its value.
        problem: String,
    },
}

/// Renews it, and says until when it is kept.
///
/// # Errors
/// If it is not there, if it cannot be renewed, or if it cannot be read or written.
pub async fn run(client: &Client, scope: &Scope, args: &RenewArgs) -> anyhow::Result<ExitCode> {
    let namespace = args.namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
    let reservations = Api::<StagingReservation>::namespaced(client.clone(), &namespace);
    let name = &args.name;
    let found = reservations
        .get_opt(name)
        .await
        .with_context(|| format!("could not read StagingReservation {namespace}/{name}"))?;
    let found =
        found.with_context(|| format!("there is no StagingReservation {name} in namespace {namespace}"))?;
    let view = parse::reservation_view(&found);
    // The operator compares it with times of its own: nobody's clock but the API server's enters.
    let now = server::ask(client, scope.timeout).await?.now;
    let until = kept_until(&view, now)?;
    let renewed = rfc3339(now);
    // With the UID, so that another reservation that got its name meanwhile is not renewed.
    let body = json!({"metadata": {"uid": view.uid.as_str(), "annotations": {ANNOTATION_RENEWED: renewed}}});
    let params = PatchParams { field_manager: Some("kubectl-berth".to_owned()), ..PatchParams::default() };
    let written = reservations.patch(name, &params, &Patch::Merge(body)).await;
    written.with_context(|| format!("could not renew StagingReservation {namespace}/{name}"))?;
    match args.output {
        Output::Table => println!(
            "reservation {} is kept until {} (for {}), and for as long as it is in use",
            view.name,
            rfc3339(until),
            span(until.millis_since(now))
        ),
        Output::Json => println!(
            "{:#}",
            json!({"name": view.name.to_string(), "renewedAt": renewed, "keptUntil": rfc3339(until)})
        ),
    }
    Ok(ExitCode::SUCCESS)
}

/// Until when it is kept if it is renewed now and nothing uses it.
fn kept_until(reservation: &ReservationView, now: Timestamp) -> Result<Timestamp, NotRenewable> {
    let name = reservation.name.to_string();
    if reservation.deleting {
        return Err(NotRenewable::Deleted(name));
    }
    if let Some(problem) = reservation.invalid.clone() {
        return Err(NotRenewable::Invalid { name, problem });
    }
    if reservation.dry_run {
        return Err(NotRenewable::DryRun(name));
    }
    let Some(ttl) = reservation.ttl_millis else { return Err(NotRenewable::NoEnd(name)) };
    match reservation.state {
        ReservationState::Refused => Err(NotRenewable::Refused(name)),
        ReservationState::Releasing => Err(NotRenewable::Deleted(name)),
        ReservationState::Pending | ReservationState::Queued => Err(NotRenewable::Waiting(name)),
        ReservationState::Promised | ReservationState::Ready => {
            let renewed = Timestamp(now.0.saturating_add(ttl));
            Ok(reservation.expires.map_or(renewed, |expires| expires.max(renewed)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::seen;

    const NOW: Timestamp = Timestamp(1_000_000);

    #[test]
    fn what_is_held_is_kept_for_its_ttl() {
        let ready = parse::reservation_view(&seen().reservations[0]);
        assert_eq!(kept_until(&ready, NOW), Ok(Timestamp(NOW.0 + 3_600_000)));
        let later = Timestamp(NOW.0 + 5_000_000);
        let longer = ReservationView { expires: Some(later), ..ready };
        assert_eq!(kept_until(&longer, NOW), Ok(later), "it never ends earlier than it would have");
    }

    #[test]
    fn what_cannot_be_renewed_says_why() {
        let refusal = |change: fn(&mut ReservationView)| {
            let mut ready = parse::reservation_view(&seen().reservations[0]);
            change(&mut ready);
            kept_until(&ready, NOW).expect_err("refused").to_string()
        };
        assert!(refusal(|r| r.ttl_millis = None).contains("team/ready has no end of its own"));
        assert!(refusal(|r| r.deleting = true).contains("is being deleted"));
        assert!(refusal(|r| r.dry_run = true).contains("is a dry run"));
        assert!(refusal(|r| r.state = ReservationState::Refused).contains("was refused"));
        assert!(refusal(|r| r.state = ReservationState::Queued).contains("maxQueueTime"));
        let invalid = refusal(|r| r.invalid = Some("spec.ttl: `1d` is not a span".to_owned()));
        assert!(invalid.contains("spec.ttl: `1d`"), "{invalid}");
    }
}
