//! What this node knows of imports and transfers → their status.

use berth_api::conditions::{ConditionType, Truth, condition};
use berth_api::fields::PlannedStaging;
use berth_core::ids::Uid;
use berth_core::node::NodeView;
use berth_core::reason::Reason;
use berth_core::stages::Stage;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use serde_json::{Map, Value, json};

use super::super::news::TransferNews;
use super::super::transfers::{Outcome, Subject};
use super::{ReportError, Wanted, apply, namespaced, shown};
use crate::node::{Node, now};

const IMPORT_FIELDS: &[&str] = &[
    "plan",
    "stage",
    "progress",
    "attempts",
    "lastError",
    "failedGeneration",
    "durable",
    "releasedGeneration",
];

const TRANSFER_FIELDS: &[&str] = &[
    "plan",
    "stage",
    "progress",
    "attempts",
    "lastError",
    "failedGeneration",
    "resume",
    "result",
    "releasedGeneration",
];

const IMPORT_CONDITIONS: &[ConditionType] = &[ConditionType::Durable, ConditionType::Progressing];
const TRANSFER_CONDITIONS: &[ConditionType] =
    &[ConditionType::Staged, ConditionType::Durable, ConditionType::Progressing];

/// Reports what is known of one.
pub(super) async fn report(node: &Node, view: &NodeView, subject: &Subject) -> Result<(), ReportError> {
    let uid = subject.uid();
    if !view.transfers.contains_key(&uid) {
        return Ok(());
    }
    let news = node.news.transfer(&uid, subject);
    let mut status = fields(&news);
    let mut conditions = progress_conditions(view, &uid, &news, subject).to_vec();
    match subject {
        Subject::Import(import) => {
            status.insert("conditions".to_owned(), json!(conditions));
            let status = Value::Object(status);
            let wanted = Wanted { status, owned: IMPORT_FIELDS, conditions: IMPORT_CONDITIONS };
            let api = namespaced(node, &**import);
            apply(node, api, &**import, shown(import.status.as_ref())?, wanted).await
        }
        Subject::Transfer(transfer) => {
            conditions.extend(staged(&news, subject));
            status.insert("conditions".to_owned(), json!(conditions));
            let status = Value::Object(status);
            let wanted = Wanted { status, owned: TRANSFER_FIELDS, conditions: TRANSFER_CONDITIONS };
            let api = namespaced(node, &**transfer);
            apply(node, api, &**transfer, shown(transfer.status.as_ref())?, wanted).await
        }
    }
}

fn fields(news: &TransferNews) -> Map<String, Value> {
    let outcome = match &news.outcome {
        Some(Outcome::Image(image)) => ("durable", json!(image)),
        Some(Outcome::Result(result)) => ("result", json!(result)),
        None => ("result", Value::Null),
    };
    let all = [
        ("plan", json!(news.plan)),
        ("stage", json!(news.stage)),
        ("progress", json!(news.progress)),
        ("attempts", json!(news.attempts)),
        ("lastError", json!(news.last_error)),
        ("failedGeneration", json!(news.failed_generation)),
        ("resume", json!(news.resume)),
        ("releasedGeneration", json!(news.released_generation)),
        outcome,
    ];
    all.into_iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

/// `Staged`, of a transfer whose source comes into a pool first.
fn staged(news: &TransferNews, subject: &Subject) -> Option<Condition> {
    let planned = news.plan.as_ref()?.staging?;
    if planned == PlannedStaging::Direct {
        return None;
    }
    let is_here = |name: &str| name != Stage::Fetch.as_str() && name != Stage::Convert.as_str();
    let here = news.stage.as_ref().is_some_and(|stage| is_here(&stage.name));
    let (truth, reason) = if here { (Truth::True, Reason::Staged) } else { (Truth::False, Reason::Fetching) };
    Some(make(subject, ConditionType::Staged, (truth, reason, "")))
}

fn progress_conditions(view: &NodeView, uid: &Uid, news: &TransferNews, subject: &Subject) -> [Condition; 2] {
    let error = news.last_error.as_ref();
    let told = error.map(|error| (Reason::from_name(&error.reason).unwrap_or(Reason::Retrying), error));
    let runs = view.jobs.iter().any(|job| job.uid == *uid);
    let (durable, progressing) = match (&news.outcome, told) {
        (Some(_), _) => ((Truth::True, Reason::Durable, ""), (Truth::False, Reason::Durable, "")),
        (None, Some((reason, error))) if !error.retryable => {
            let message = error.message.as_str();
            ((Truth::False, reason, message), (Truth::False, reason, message))
        }
        (None, _) if subject.is_suspended() => {
            ((Truth::False, Reason::Suspended, ""), (Truth::False, Reason::Suspended, ""))
        }
        (None, told) => {
            let message = told.map_or("", |(_, error)| error.message.as_str());
            let reason = match (news.waiting, &news.plan, runs) {
                (Some(waiting), ..) => (Truth::True, waiting, message),
                (None, None, _) => (Truth::True, Reason::Probing, ""),
                (None, Some(_), true) => (Truth::True, Reason::Progressing, ""),
                (None, Some(_), false) => (Truth::False, Reason::WaitingForReservation, ""),
            };
            ((Truth::False, Reason::Progressing, ""), reason)
        }
    };
    [make(subject, ConditionType::Durable, durable), make(subject, ConditionType::Progressing, progressing)]
}

fn make(
    subject: &Subject,
    kind: ConditionType,
    (truth, reason, message): (Truth, Reason, &str),
) -> Condition {
    condition(&subject.conditions(), kind, truth, reason, message, subject.meta().generation, now())
}
