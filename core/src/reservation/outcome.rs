//! What an operator would do with a request if it were made now: the decision itself, asked without consequences.

use crate::change::{Change, ReservationReport};
use crate::ids::Uid;
use crate::reason::{Reason, ReasonClass};
use crate::units::Timestamp;
use crate::view::{ReservationState, ReservationView, View};

use super::decide::decide;

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is promised at once.
    Promised,
    /// It waits.
    Waits,
    /// It is refused.
    Refused,
}

/// The request as a new one, made at `now`: later than every other, and with nothing left to do before it is promised.
pub(super) fn as_new(request: &ReservationView, now: Timestamp) -> ReservationView {
    ReservationView {
        uid: Uid::from("~"),
        created: now,
        has_finalizer: true,
        dry_run: false,
        state: ReservationState::Pending,
        assignment: None,
        ..request.clone()
    }
}

/// What is done with a new request that the view does not hold, and what is said of it if it is not promised.
pub(super) fn outcome(
    view: &mut View,
    request: &ReservationView,
    now: Timestamp,
) -> (Outcome, Option<(Reason, String)>) {
    view.enter_reservation(request.clone());
    let changes = decide(view, &request.uid, now);
    view.remove_reservation(&request.uid);
    for change in changes {
        match change {
            Change::CreateImage { .. } | Change::WriteLedger { .. } => return (Outcome::Promised, None),
            Change::ReportReservation { report, .. } => return of(report),
            _ => {}
        }
    }
    let message = "something earlier has to be decided first".to_owned();
    (Outcome::Waits, Some((Reason::Pending, message)))
}

/// What is refused after a short time of grace counts as refused.
fn of(report: ReservationReport) -> (Outcome, Option<(Reason, String)>) {
    let refused = report.state == ReservationState::Refused || report.reason.class() == ReasonClass::Terminal;
    let outcome = if refused { Outcome::Refused } else { Outcome::Waits };
    (outcome, Some((report.reason, report.message)))
}
