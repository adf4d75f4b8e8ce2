//! What there is to say of one reservation: nothing is guessed that a view does not show.

use berth_api::conditions::{ConditionType, Truth, find};
use berth_api::staging_reservation::{CandidatePlace, StagingReservationStatus};
use berth_api::{StagedImage, StagingReservation};
use berth_core::ids::{ObjectName, Uid};
use berth_core::ledger::{Class, LedgerRecord as _};
use berth_core::overcommit::Percent;
use berth_core::reservation::{Candidate, Need, candidates, is_waiting};
use berth_core::units::{Bytes, Timestamp};
use berth_core::view::{Placement, PoolChoice, ReservationView, View};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt as _;
use serde::Serialize;

use super::next::next_step;
use crate::observe::Seen;
use crate::pods::PodsOfClaims;
use crate::server::rfc3339;
use crate::text::span;

/// How many that share an image are named.
const NAMED: usize = 8;

/// Everything that is known of a reservation. Sizes in bytes, times in RFC 3339; what does not apply is left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// Namespace and name.
    pub name: String,
    /// Its UID: the holder of its promise.
    pub uid: String,
    /// Its recorded state.
    pub state: String,
    /// The documented reason.
    pub reason: String,
    /// The reason in words, with numbers.
    pub message: String,
    /// What it asks for.
    pub asks: Asks,
    /// Its place in the queue.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue: Option<Queue>,
    /// The places that its fields allow: as they are now while it has none, otherwise as they were when it got its own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<Place>,
    /// What is promised to it, in which ledgers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub promises: Vec<PromiseLine>,
    /// The image that it starts from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<Image>,
    /// The node that it is on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<Node>,
    /// Where on that node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Who keeps it.
    pub held_by: Vec<String>,
    /// True or false as its node says; absent if no live node does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_use: Option<bool>,
    /// What ends it.
    pub ends: String,
    /// When it ends if nothing uses it until then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<String>,
    /// What Berth waits for now, and who has to do it.
    pub next: String,
}

/// What a reservation asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Asks {
    /// The most that will be written, as the reservation has it.
    pub size: String,
    /// `File`, `Block` or `Stream`.
    pub access: String,
    /// The pool's name, or the labels that it must carry.
    pub pools: String,
    /// This node only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// This zone only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// The template.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// Higher ones come first.
    pub priority: i32,
}

/// A place in the queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Queue {
    /// 1 is next.
    pub position: i32,
    /// What those before it ask for.
    pub bytes_ahead: i64,
    /// How long it has waited.
    pub waited_seconds: u64,
    /// How long it may wait.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at_most_seconds: Option<u64>,
}

/// A pool on a node, and what speaks against it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Place {
    /// The pool.
    pub pool: String,
    /// The node.
    pub node: String,
    /// True for the place that it was given.
    pub chosen: bool,
    /// The documented reason for or against it; `Queued` if only earlier requests speak against it.
    pub reason: String,
    /// What is missing there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shortfall_bytes: Option<Bytes>,
    /// The same in words.
    pub message: String,
}

/// One promise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PromiseLine {
    /// The ledger.
    pub ledger: String,
    /// Its pool.
    pub pool: String,
    /// Its node.
    pub node: String,
    /// `Images` or `Volumes`.
    pub class: String,
    /// Bytes of data.
    pub data_bytes: Bytes,
    /// Bytes of metadata.
    pub metadata_bytes: Bytes,
    /// Of the assignment.
    pub generation: u64,
    /// True if the node says that it has recorded it, and not given it back.
    pub obeyed: bool,
    /// In how many percent of what is there volumes are promised space, where that is more than all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overcommitted_percent: Option<u32>,
}

/// The image that a volume starts from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[allow(clippy::struct_field_names)] // `stagedImage` names an object of that kind
#[serde(rename_all = "camelCase")]
pub struct Image {
    /// Its identity; absent until a place is assigned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// The `StagedImage`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub staged_image: Option<String>,
    /// `NotStaged`, `Filling`, `Usable`, `Ready` or `Failed`.
    pub state: String,
    /// How far filling is, 0 to 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub percent: Option<i32>,
    /// True if it was promised before this reservation came, so that it costs this one nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reused: Option<bool>,
    /// How many other reservations refer to it.
    pub shared_with: usize,
    /// The first of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<String>,
    /// What went wrong with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// The node that a reservation is on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Node {
    /// Its name.
    pub name: String,
    /// True if its Lease has not run out.
    pub live: bool,
    /// How long ago it was renewed, by the node's own clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub renewed_seconds_ago: Option<u64>,
    /// True if the pool can be used there.
    pub usable: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// What is known of a reservation at this time.
pub fn explain(
    seen: &Seen,
    reservation: &StagingReservation,
    pods: &PodsOfClaims,
    now: Timestamp,
) -> Explanation {
    let view = seen.view();
    let request = berth_api::parse::reservation_view(reservation);
    let status = reservation.status.clone().unwrap_or_default();
    let condition = telling(&status);
    let places = places(&view, &request, now);
    let expiry = Expiry::of(&view, &request, now);
    let mut explanation = Explanation {
        name: request.name.to_string(),
        uid: request.uid.to_string(),
        state: format!("{:?}", request.state),
        reason: condition.map(|condition| condition.reason.clone()).unwrap_or_default(),
        message: condition.map(|condition| condition.message.clone()).unwrap_or_default(),
        asks: asks(reservation, &request),
        queue: queue(&view, &request, &status, now),
        candidates: if places.is_empty() {
            status.candidates.iter().map(told).collect()
        } else {
            places.iter().map(place).collect()
        },
        promises: promises(&view, &request.uid),
        image: image(seen, &view, &request, &status),
        node: request.assignment.as_ref().map(|at| node(seen, &view, at, now)),
        path: status.path,
        held_by: held_by(reservation, pods),
        in_use: in_use(&view, &request),
        ends: expiry.ends,
        expires_at: expiry.at.map(rfc3339),
        next: String::new(),
    };
    explanation.next = next_step(seen, &view, &request, &explanation, &places);
    explanation
}

/// The condition that says most: the first that does not hold, otherwise the last.
fn telling(status: &StagingReservationStatus) -> Option<&Condition> {
    let all = [ConditionType::Promised, ConditionType::Ready].map(|kind| find(&status.conditions, kind));
    let unmet = all.iter().flatten().find(|condition| condition.status != Truth::True.as_str());
    unmet.copied().or(all[1]).or(all[0])
}

fn asks(reservation: &StagingReservation, request: &ReservationView) -> Asks {
    Asks {
        size: reservation.spec.max_size.0.clone(),
        access: format!("{:?}", request.access),
        pools: match &request.pools {
            PoolChoice::Named(name) => name.to_string(),
            PoolChoice::Labelled(labels) if labels.is_empty() => "any".to_owned(),
            PoolChoice::Labelled(labels) => {
                let pairs: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
                pairs.join(",")
            }
        },
        node: request.node.as_ref().map(ToString::to_string),
        zone: request.zone.clone(),
        template: request.template.as_ref().map(ToString::to_string),
        priority: request.priority,
    }
}

fn queue(
    view: &View,
    request: &ReservationView,
    status: &StagingReservationStatus,
    now: Timestamp,
) -> Option<Queue> {
    let (place, since) = (status.queue.as_ref()?, request.queued_since?);
    let allowed = view.pools.values().filter(|pool| request.pools.allows(pool));
    Some(Queue {
        position: place.position,
        bytes_ahead: place.bytes_ahead,
        waited_seconds: now.millis_since(since) / 1000,
        at_most_seconds: allowed.map(|pool| pool.max_queue_millis / 1000).max(),
    })
}

/// Every place with what speaks against it, while the reservation has none; none if it cannot be told what it needs.
fn places(view: &View, request: &ReservationView, now: Timestamp) -> Vec<Candidate> {
    if !is_waiting(view, request) {
        return Vec::new();
    }
    Need::of(view, request, now).map(|need| candidates(view, request, &need)).unwrap_or_default()
}

fn place(candidate: &Candidate) -> Place {
    Place {
        pool: candidate.pool.to_string(),
        node: candidate.node.to_string(),
        chosen: false,
        reason: candidate.verdict.reason().as_str().to_owned(),
        shortfall_bytes: candidate.verdict.shortfall(),
        message: candidate.to_string(),
    }
}

/// A place as the operator has told of it.
fn told(place: &CandidatePlace) -> Place {
    Place {
        pool: place.pool.clone(),
        node: place.node.clone(),
        chosen: place.chosen,
        reason: place.reason.clone(),
        shortfall_bytes: place.shortfall_bytes.map(Bytes::from_i64),
        message: place.message.clone(),
    }
}

fn promises(view: &View, uid: &Uid) -> Vec<PromiseLine> {
    let held = view.ledgers_of(uid).filter_map(|ledger| Some((ledger, ledger.promises.get(uid)?)));
    held.map(|(ledger, promise)| {
        let report = view.report_of(&ledger.pool, &ledger.node);
        let obeyed = report.is_some_and(|report| report.held().any(|(held, _)| held == uid));
        let percent = ledger.capacity.overcommit.percent;
        let over = promise.class == Class::Volumes && percent > Percent::WHOLE;
        PromiseLine {
            ledger: ledger.name.clone(),
            pool: ledger.pool.to_string(),
            node: ledger.node.to_string(),
            class: format!("{:?}", promise.class),
            data_bytes: promise.charge.data,
            metadata_bytes: promise.charge.metadata,
            generation: promise.generation.0,
            obeyed,
            overcommitted_percent: over.then(|| percent.get()),
        }
    })
    .collect()
}

fn image(
    seen: &Seen,
    view: &View,
    request: &ReservationView,
    status: &StagingReservationStatus,
) -> Option<Image> {
    let template = request.template.as_ref()?;
    let Some(assigned) = &request.assigned_image else {
        let import = view.imports.get(template);
        let durable = import.and_then(|import| import.durable.as_ref());
        return Some(Image {
            digest: durable.map(|durable| durable.digest.to_string()),
            staged_image: None,
            state: "NotStaged".to_owned(),
            percent: None,
            reused: None,
            shared_with: 0,
            others: Vec::new(),
            message: durable.is_none().then(|| {
                import.map_or_else(
                    || format!("there is no TemplateImport {template}"),
                    |import| {
                        let state = import.kind.name_of(import.state).unwrap_or("in no state");
                        format!("TemplateImport {template} is {state}")
                    },
                )
            }),
        });
    };
    let staged = seen.images.iter().find(|image| image.name_any() == assigned.staged_image);
    let others: Vec<String> = view
        .reservations
        .values()
        .filter(|other| other.uid != request.uid && !other.deleting)
        .filter(|other| {
            other.assigned_image.as_ref().is_some_and(|image| image.staged_image == assigned.staged_image)
        })
        .map(|other| other.name.to_string())
        .collect();
    let (state, percent, message) = staged.map_or(("NotStaged".to_owned(), None, None), filling);
    Some(Image {
        digest: Some(assigned.digest.to_string()),
        staged_image: Some(assigned.staged_image.clone()),
        state,
        percent,
        reused: status.reused,
        shared_with: others.len(),
        others: others.into_iter().take(NAMED).collect(),
        message,
    })
}

fn filling(image: &StagedImage) -> (String, Option<i32>, Option<String>) {
    let status = image.status.clone().unwrap_or_default();
    let state = status.state.map_or_else(|| "NotStaged".to_owned(), |state| format!("{state:?}"));
    let unmet =
        find(&status.conditions, ConditionType::Ready).filter(|ready| ready.status != Truth::True.as_str());
    (state, status.progress.and_then(|progress| progress.percent), unmet.map(|ready| ready.message.clone()))
}

fn node(seen: &Seen, view: &View, at: &Placement, now: Timestamp) -> Node {
    let report = view.report_of(&at.pool, &at.node);
    let problem = match report {
        None => Some(format!("it reports no pool {}", at.pool)),
        Some(report) => (!report.usable).then(|| format!("{}: {}", report.reason, report.message)),
    };
    Node {
        name: at.node.to_string(),
        live: seen.is_live(&at.node),
        renewed_seconds_ago: seen.renewed(&at.node).map(|renewed| now.millis_since(renewed) / 1000),
        usable: problem.is_none(),
        message: problem,
    }
}

/// Owners, claims and pods, in plain words.
fn held_by(reservation: &StagingReservation, pods: &PodsOfClaims) -> Vec<String> {
    let owners = reservation.owner_references().iter().map(|owner| format!("{} {}", owner.kind, owner.name));
    let mut all: Vec<String> = owners.collect();
    if let Some(claim) = claim(reservation) {
        all.push(format!("claim {claim}"));
        all.extend(
            pods.get(&claim).into_iter().flatten().map(|pod| format!("pod {}/{pod}", claim.namespace)),
        );
    }
    all
}

/// The claim behind a CSI volume's reservation.
pub fn claim(reservation: &StagingReservation) -> Option<ObjectName> {
    use berth_api::defaults::{LABEL_CLAIM_NAME, LABEL_CLAIM_NAMESPACE};
    let labels = reservation.labels();
    Some(ObjectName::new(labels.get(LABEL_CLAIM_NAMESPACE)?, labels.get(LABEL_CLAIM_NAME)?))
}

/// As its node says, if that is live.
fn in_use(view: &View, request: &ReservationView) -> Option<bool> {
    let at = request.assignment.as_ref()?;
    view.nodes.get(&at.node).filter(|node| node.live)?;
    Some(view.report_of(&at.pool, &at.node)?.in_use.contains(&request.uid))
}

/// What ends a reservation, and when.
struct Expiry {
    ends: String,
    at: Option<Timestamp>,
}

impl Expiry {
    fn of(view: &View, request: &ReservationView, now: Timestamp) -> Self {
        let Some(ttl) = request.ttl_millis else {
            return Self { ends: "only when it is deleted, by what it belongs to".to_owned(), at: None };
        };
        let after = span(ttl);
        let ends = match (in_use(view, request), request.expires, request.ready_since) {
            (Some(true), ..) => format!("{after} after it was last in use, or when it is deleted"),
            (_, Some(at), _) => {
                let left = span(at.millis_since(now));
                let ends = format!("in {left}, unless something uses it until then or it is renewed");
                return Self { ends, at: Some(at) };
            }
            (None, None, Some(_)) => {
                format!("{after} after its last use; not while its node does not say whether it is in use")
            }
            (Some(false), None, Some(_)) => {
                format!(
                    "{after} after an operator has first seen that nothing uses it, or when it is deleted"
                )
            }
            (_, None, None) => {
                format!("{after} after it is ready and nothing uses it, or when it is deleted")
            }
        };
        Self { ends, at: None }
    }
}
