//! What would become of a request, without anything being promised: the answer of `spec.dryRun` and of `kubectl berth fit`.

use crate::change::{Change, Considered, DryRun, ReservationReport};
use crate::ids::{NodeName, PoolName};
use crate::reason::Reason;
use crate::units::{Bytes, Timestamp};
use crate::view::{ReservationState, ReservationView, View};

use super::decide::report;
use super::need::Need;
use super::outcome::{Outcome, as_new, outcome};
use super::place::{Candidate, candidates, choose, consider, everything, least_shortfall, promises_at};
use super::queue::Backlog;
use super::room;

/// How often a dry run is answered anew, in milliseconds.
const AGAIN_MILLIS: u64 = 5_000;

/// What would become of a request at this moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Whether it would be promised, wait, or be refused.
    pub outcome: Outcome,
    /// Where it would be promised now; `None` if it would have to wait or be refused.
    pub place: Option<(PoolName, NodeName)>,
    /// Why, or why not.
    pub reason: Reason,
    /// For people, with numbers.
    pub message: String,
    /// The most that would be promised for it, the image that it starts from included where it is not there yet.
    pub peak: Bytes,
    /// Its position among those that wait, from 1, if it would wait.
    pub position: Option<u32>,
    /// Bytes that those before it ask for.
    pub bytes_ahead: Bytes,
    /// How many bytes are missing where least are, if it is bytes that are missing.
    pub shortfall: Option<Bytes>,
    /// Names of the staged images that would go first, so that it fits.
    pub reclaims: Vec<String>,
    /// Every place that its fields allow, in order of pool and node.
    pub considered: Vec<Considered>,
}

/// What the leading operator would do with `request` as a new one, made at `now`. The view need not hold it.
pub fn fit(view: &View, request: &ReservationView, now: Timestamp) -> Fit {
    let mut view = View { leader: true, ..view.clone() };
    view.remove_reservation(&request.uid);
    let request = as_new(request, now);
    let (outcome, told) = outcome(&mut view, &request, now);
    let Ok(need) = Need::of(&view, &request, now) else { return Fit::without_need(&request, outcome, told) };
    let all = candidates(&view, &request, &need);
    let ahead = Backlog::around(&view, &request, now).ahead(&view, &request, &need, &all);
    let best = choose(&all, |at| !ahead.iter().any(|earlier| earlier.places.contains(&at)));
    let room = if best.is_none() { room::best(&view, &request, &need, &all, &ahead, now) } else { None };
    let fits = || best.map(|at| format!("{} fit: {}", need.bytes(), all[at].chosen_because()));
    let (reason, message) = told.unwrap_or_else(|| (Reason::Promised, fits().unwrap_or_default()));
    let reclaims = room.iter().flat_map(|(_, room)| room.names());
    let position = u32::try_from(ahead.len()).unwrap_or(u32::MAX).saturating_add(1);
    Fit {
        outcome,
        place: best.map(|at| (all[at].pool.clone(), all[at].node.clone())),
        reason,
        message,
        peak: peak(&view, &request, &need, &all, best),
        position: (outcome == Outcome::Waits).then_some(position),
        bytes_ahead: ahead.iter().map(|earlier| earlier.bytes).sum(),
        shortfall: if best.is_none() { least_shortfall(&all) } else { None },
        reclaims: reclaims.map(str::to_owned).collect(),
        considered: consider(&all, best),
    }
}

impl Fit {
    /// It cannot be told yet what it needs.
    fn without_need(request: &ReservationView, outcome: Outcome, told: Option<(Reason, String)>) -> Self {
        let (reason, message) = told.unwrap_or((Reason::Pending, String::new()));
        Self {
            outcome,
            place: None,
            reason,
            message,
            peak: request.max_size,
            position: None,
            bytes_ahead: Bytes::ZERO,
            shortfall: None,
            reclaims: Vec::new(),
            considered: Vec::new(),
        }
    }
}

/// What would be promised at the place that it would get; without one, the most that any would have to promise.
fn peak(
    view: &View,
    request: &ReservationView,
    need: &Need,
    all: &[Candidate],
    best: Option<usize>,
) -> Bytes {
    let at = |candidate: &Candidate| {
        let key = (candidate.pool.clone(), candidate.node.clone());
        let promises = match view.ledgers.get(&key) {
            Some(ledger) => promises_at(view, ledger, &request.uid, need),
            None => everything(need, &request.uid, view.block_of(&candidate.pool)),
        };
        promises.iter().map(|(_, promise)| promise.charge.data).sum::<Bytes>()
    };
    match best {
        Some(best) => at(&all[best]),
        None => all.iter().map(at).max().unwrap_or_else(|| need.bytes()),
    }
}

/// The answer to a reservation that is only tried. It is given again after a while; a write follows only where it differs.
pub(super) fn dry_run(view: &View, reservation: &ReservationView, now: Timestamp) -> Vec<Change> {
    let fit = fit(view, reservation, now);
    let message = format!("{}: {}", fit.reason, fit.message);
    let told = ReservationReport {
        considered: fit.considered,
        dry_run: Some(DryRun {
            fits: fit.place.is_some(),
            place: fit.place,
            position: fit.position,
            peak: fit.peak,
            shortfall: fit.shortfall,
            reclaims: fit.reclaims,
        }),
        ..ReservationReport::new(ReservationState::Pending, Reason::DryRun, message)
    };
    vec![report(reservation, told), Change::RetryAfter { millis: AGAIN_MILLIS }]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{add, hold, reservation, view};
    use crate::ids::ObjectName;
    use crate::ledger::Class;
    use crate::view::{Access, WhenFull};

    const NOW: Timestamp = Timestamp(1_000);

    fn told(view: &View, request: &ReservationView) -> (Outcome, Reason) {
        let fit = fit(view, request, NOW);
        assert_eq!(fit.outcome == Outcome::Promised, fit.place.is_some(), "{fit:?}");
        assert_eq!(fit.outcome == Outcome::Waits, fit.position.is_some(), "{fit:?}");
        (fit.outcome, fit.reason)
    }

    #[test]
    fn it_is_what_the_operator_decides_of_the_same_request() {
        let mut view = view(&[("a", 100)]);
        let request = reservation("r", 40, 0);
        assert_eq!(told(&view, &request), (Outcome::Promised, Reason::Promised));
        hold(&mut view, "a", "x", Class::Images, 70);
        assert_eq!(told(&view, &request), (Outcome::Waits, Reason::InsufficientCapacity));
        let mut strict = request.clone();
        strict.when_full = Some(WhenFull::Reject);
        assert_eq!(told(&view, &strict), (Outcome::Refused, Reason::CapacityRefused));
        assert_eq!(told(&view, &reservation("r", 400, 0)), (Outcome::Refused, Reason::LargerThanPool));
    }

    #[test]
    fn earlier_ones_are_ahead_and_the_view_stays_as_it_is() {
        let mut view = view(&[("a", 100)]);
        let mut earlier = reservation("earlier", 90, 1);
        earlier.state = ReservationState::Queued;
        add(&mut view, earlier);
        view.leader = false;
        let before = view.clone();
        assert_eq!(told(&view, &reservation("r", 40, 0)), (Outcome::Waits, Reason::Queued));
        assert_eq!(view, before);
    }

    #[test]
    fn a_template_that_is_not_there_is_a_refusal_though_a_new_request_has_a_time_of_grace() {
        let mut request = reservation("r", 40, 0);
        request.access = Access::Block;
        request.template = Some(ObjectName::new("ns", "none"));
        let refused = told(&view(&[("a", 100)]), &request);
        assert_eq!(refused, (Outcome::Refused, Reason::TemplateNotFound));
    }
}
