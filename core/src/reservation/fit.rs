//! What would become of a request, without anything being promised: the answer of `spec.dryRun` and of `kubectl berth fit`.

use crate::change::{Change, Considered, DryRun, ReservationReport};
use crate::ids::{NodeName, PoolName};
use crate::reason::Reason;
use crate::units::{Bytes, Timestamp};
use crate::view::{ReservationState, ReservationView, View};

use super::decide::{report, why};
use super::need::{Need, Unmet};
use super::place::{Candidate, candidates, choose, consider, everything, least_shortfall, promises_at};
use super::queue::Backlog;
use super::room;

/// How often a dry run is answered anew, in milliseconds.
const AGAIN_MILLIS: u64 = 5_000;

/// What would become of a request at this moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Where it would be promised now; `None` if it would have to wait or be refused.
    pub place: Option<(PoolName, NodeName)>,
    /// Why, or why not.
    pub reason: Reason,
    /// For people, with numbers.
    pub message: String,
    /// The most that would be promised for it, the image that it starts from included where it is not there yet.
    pub peak: Bytes,
    /// Its position among those that wait, from 1, if it would have to wait.
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

/// What would become of `request` now. The view need not hold it.
pub fn fit(view: &View, request: &ReservationView, now: Timestamp) -> Fit {
    let need = match Need::of(view, request, now) {
        Ok(need) => need,
        Err(unmet) => return Fit::unmet(request, unmet),
    };
    let all = candidates(view, request, &need);
    let ahead = Backlog::around(view, request, now).ahead(view, request, &all);
    let best = choose(&all, |at| !ahead.iter().any(|earlier| earlier.places.contains(&at)));
    let room = if best.is_none() { room::best(view, request, &need, &all, &ahead, now) } else { None };
    let (reason, message) = match (best, &room) {
        (Some(at), _) => (Reason::Promised, format!("{} fit: {}", need.bytes(), all[at].chosen_because())),
        (None, Some((ledger, room))) => (Reason::Reclaiming, room::message(ledger, room, need.bytes())),
        (None, None) => why(view, request, &need, &all),
    };
    let reclaims = room.iter().flat_map(|(_, room)| room.leaving.iter().chain(&room.next));
    let waits = best.is_none();
    Fit {
        place: best.map(|at| (all[at].pool.clone(), all[at].node.clone())),
        reason,
        message,
        peak: peak(view, request, &need, &all, best),
        position: waits.then(|| u32::try_from(ahead.len()).unwrap_or(u32::MAX).saturating_add(1)),
        bytes_ahead: ahead.iter().map(|earlier| earlier.bytes).sum(),
        shortfall: if waits { least_shortfall(&all) } else { None },
        reclaims: reclaims.map(|image| image.name.clone()).collect(),
        considered: consider(&all, best),
    }
}

impl Fit {
    fn unmet(request: &ReservationView, unmet: Unmet) -> Self {
        Self {
            place: None,
            reason: unmet.reason,
            message: unmet.message,
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
