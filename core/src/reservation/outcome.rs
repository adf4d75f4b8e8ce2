//! What an operator would do with a request if it were made now: the decision itself, asked without consequences.

use crate::change::{Change, ReservationReport};
use crate::ids::Uid;
use crate::reason::{Reason, ReasonClass};
use crate::units::Timestamp;
use crate::view::{ReservationState, ReservationView, View};

use super::decide::decide;

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is promised at once.
    Promised,
    /// It waits.
    Waits(Told),
    /// It is refused.
    Refused(Told),
}

/// What is said of a request that is not promised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// The documented reason.
    pub reason: Reason,
    /// For people, with numbers.
    pub message: String,
}

/// What the leading operator would do with `request` as a new one, made at `now`.
pub fn outcome(view: &View, request: &ReservationView, now: Timestamp) -> Outcome {
    let mut asked = view.clone();
    asked.leader = true;
    // Later than every other, and with nothing left to do before it is promised.
    let uid = Uid::from("~");
    let request = ReservationView {
        uid: uid.clone(),
        created: now,
        has_finalizer: true,
        dry_run: false,
        state: ReservationState::Pending,
        assignment: None,
        ..request.clone()
    };
    asked.reservations.insert(uid.clone(), request);
    for change in decide(&asked, &uid, now) {
        match change {
            Change::CreateImage { .. } | Change::WriteLedger { .. } => return Outcome::Promised,
            Change::ReportReservation { report, .. } => return of(report),
            _ => {}
        }
    }
    let message = "something earlier has to be decided first".to_owned();
    Outcome::Waits(Told { reason: Reason::Pending, message })
}

/// What is refused after a short time of grace counts as refused.
fn of(report: ReservationReport) -> Outcome {
    let refused = report.state == ReservationState::Refused || report.reason.class() == ReasonClass::Terminal;
    let told = Told { reason: report.reason, message: report.message };
    if refused { Outcome::Refused(told) } else { Outcome::Waits(told) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{add, hold, reservation, view};
    use crate::ids::ObjectName;
    use crate::ledger::Class;
    use crate::view::{Access, WhenFull};

    const NOW: Timestamp = Timestamp(1_000);

    fn reason(outcome: &Outcome) -> Option<Reason> {
        match outcome {
            Outcome::Promised => None,
            Outcome::Waits(told) | Outcome::Refused(told) => Some(told.reason),
        }
    }

    #[test]
    fn it_is_what_the_operator_decides_of_the_same_request() {
        let mut view = view(&[("a", 100)]);
        let request = reservation("r", 40, 0);
        assert_eq!(outcome(&view, &request, NOW), Outcome::Promised);
        hold(&mut view, "a", "x", Class::Images, 70);
        let waits = outcome(&view, &request, NOW);
        assert!(
            matches!(&waits, Outcome::Waits(told) if told.reason == Reason::InsufficientCapacity),
            "{waits:?}"
        );
        let mut strict = request.clone();
        strict.when_full = Some(WhenFull::Reject);
        let refused = outcome(&view, &strict, NOW);
        assert!(
            matches!(&refused, Outcome::Refused(told) if told.reason == Reason::CapacityRefused),
            "{refused:?}"
        );
        let large = outcome(&view, &reservation("r", 400, 0), NOW);
        assert!(
            matches!(&large, Outcome::Refused(told) if told.reason == Reason::LargerThanPool),
            "{large:?}"
        );
    }

    #[test]
    fn earlier_ones_are_ahead_and_the_view_stays_as_it_is() {
        let mut view = view(&[("a", 100)]);
        let mut earlier = reservation("earlier", 90, 1);
        earlier.state = ReservationState::Queued;
        add(&mut view, earlier);
        view.leader = false;
        let before = view.clone();
        let waits = outcome(&view, &reservation("r", 40, 0), NOW);
        assert_eq!(reason(&waits), Some(Reason::Queued), "{waits:?}");
        assert_eq!(view, before);
    }

    #[test]
    fn a_template_that_is_not_there_is_a_refusal_though_a_new_request_has_a_time_of_grace() {
        let mut request = reservation("r", 40, 0);
        request.access = Access::Block;
        request.template = Some(ObjectName::new("ns", "none"));
        let refused = outcome(&view(&[("a", 100)]), &request, NOW);
        assert!(
            matches!(&refused, Outcome::Refused(told) if told.reason == Reason::TemplateNotFound),
            "{refused:?}"
        );
    }
}
