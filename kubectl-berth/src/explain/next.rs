//! The step that a reservation waits for, and who has to take it.

use berth_api::defaults::OPERATOR_LEASE;
use berth_core::reservation::{Candidate, Verdict};
use berth_core::view::{Placement, ReservationState, ReservationView, View};

use super::facts::Explanation;
use crate::observe::Seen;
use crate::text::span;

/// One or two plain sentences.
pub fn next_step(
    seen: &Seen,
    view: &View,
    request: &ReservationView,
    told: &Explanation,
    places: &[Candidate],
) -> String {
    let lost = |step: String| {
        let running = seen.fresh_leases.contains(OPERATOR_LEASE);
        if running {
            step
        } else {
            format!("{step} No operator renews the Lease {OPERATOR_LEASE}: start one.")
        }
    };
    if request.deleting {
        return lost(release(view, request));
    }
    if request.state == ReservationState::Refused {
        return "Nothing more happens. Delete it, and make another that can be met.".to_owned();
    }
    if request.dry_run {
        return "Nothing: a dry run is never promised. Delete it when it is read.".to_owned();
    }
    match &request.assignment {
        Some(place) if request.prepared == Some(place.generation) => {
            format!("Nothing: it is ready on node {}.", place.node)
        }
        Some(place) => make(view, place, told),
        None if !told.promises.is_empty() => {
            lost("The space is promised; an operator assigns the reservation to it.".to_owned())
        }
        None if request.state == ReservationState::Pending => lost("An operator looks at it.".to_owned()),
        None => lost(wait(view, request, told, places)),
    }
}

fn release(view: &View, request: &ReservationView) -> String {
    let Some(Placement { pool, node, generation }) = &request.assignment else {
        return "An operator removes what is left of it in ledgers, and then its finalizer.".to_owned();
    };
    let report = view.report_of(pool, node);
    if report.is_some_and(|report| report.released.get(&request.uid).is_some_and(|gone| gone >= generation)) {
        return "The bytes are gone; an operator removes the promise, and then the finalizer.".to_owned();
    }
    if view.nodes.get(node).is_none_or(|node| !node.live) {
        return format!(
            "Node {node} has to come back: it alone can say that the bytes in pool {pool} are gone."
        );
    }
    if report.is_some_and(|report| report.in_use.contains(&request.uid)) {
        return format!("Something on node {node} still uses it: end that, and the node removes the bytes.");
    }
    format!("Node {node} removes the bytes in pool {pool} and says so; then the promise goes.")
}

fn make(view: &View, place: &Placement, told: &Explanation) -> String {
    let Placement { pool, node, .. } = place;
    if view.nodes.get(node).is_none_or(|node| !node.live) {
        return format!("Node {node} has to come back; the space in pool {pool} stays promised.");
    }
    if let Some(behind) = view.ledger_at(place).and_then(|ledger| view.behind(ledger)) {
        return format!("The ledger of pool {pool} on node {node} has to be put right first: {behind}.");
    }
    if let Some(problem) = told.node.as_ref().and_then(|node| node.message.as_ref()) {
        return format!("Pool {pool} has to be usable on node {node} again: {problem}.");
    }
    if told.promises.iter().all(|promise| !promise.obeyed) {
        return format!("Node {node} records the promise, and then makes what is asked for.");
    }
    match &told.image {
        Some(image) if image.state == "Failed" => {
            let why = image.message.as_deref().unwrap_or("its condition says why");
            format!("Node {node} cannot fetch the image: {why}.")
        }
        Some(image) if image.state != "Ready" => {
            let percent = image.percent.map(|percent| format!(" ({percent} % so far)")).unwrap_or_default();
            format!("Node {node} fetches the image{percent}, and then makes the volume.")
        }
        _ => format!("Node {node} makes what is asked for, and says so."),
    }
}

fn wait(view: &View, request: &ReservationView, told: &Explanation, places: &[Candidate]) -> String {
    let until = told.queue.as_ref().and_then(|queue| {
        let left = queue.at_most_seconds?.saturating_sub(queue.waited_seconds);
        Some(format!(" It is refused if that has not happened in {}.", span(left.saturating_mul(1000))))
    });
    let until = until.unwrap_or_default();
    if !view.pools.values().any(|pool| request.pools.allows(pool)) {
        return format!("A pool of this name, or with these labels, has to be made.{until}");
    }
    if places.is_empty() {
        let template = told.image.as_ref().and_then(|image| image.message.clone());
        return template.map_or_else(
            || format!("A node that it may go to has to carry the pool.{until}"),
            |why| format!("The template has to be ready: {why}.{until}"),
        );
    }
    if places.iter().any(|place| matches!(place.verdict, Verdict::Fits { .. })) {
        return format!("The requests before it are decided first; there is space for it.{until}");
    }
    let short = places.iter().filter_map(|place| match &place.verdict {
        Verdict::Short(shortfall) => Some((shortfall.bytes, place)),
        _ => None,
    });
    match short.min_by_key(|(bytes, _)| *bytes) {
        Some((bytes, place)) => format!(
            "{bytes} must be given back in pool {} on node {}, or elsewhere.{until}",
            place.pool, place.node
        ),
        None => format!("One of its places has to become usable: {}.{until}", places[0]),
    }
}
