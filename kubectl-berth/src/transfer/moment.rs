//! How far an import or a transfer is at one moment.

use std::fmt;

use berth_api::conditions::{ConditionType, find};
use berth_api::fields::{LastError, Progress, Stage};
use berth_api::{ImageTransfer, TemplateImport, parse};
use berth_core::units::Bytes;
use berth_core::view::{TransferState, TransferView};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use serde::Serialize;

/// How it has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum End {
    /// All of it is at its destination.
    Succeeded,
    /// It failed.
    Failed,
}

/// How far it is. Sizes in bytes; what is not known is left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Moment {
    /// Its state, by the API's name.
    pub state: &'static str,
    /// If it has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end: Option<End>,
    /// 0 to 100, over all stages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub percent: Option<i32>,
    /// Which stage it is in, as `2/4 Upload`.
    #[serde(skip_serializing_if = "Option::is_none")]
    stage: Option<String>,
    /// In that stage.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<(Bytes, Bytes)>,
    /// Bytes per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    rate: Option<Bytes>,
    /// What it waits for, or what went wrong last.
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
}

impl Moment {
    /// Of an import.
    pub fn of_import(import: &TemplateImport) -> Self {
        let status = import.status.clone().unwrap_or_default();
        let told = find(&status.conditions, ConditionType::Ready).cloned();
        Self::new(&parse::import_view(import), status.stage, status.progress, told, status.last_error)
    }

    /// Of a transfer.
    pub fn of_transfer(transfer: &ImageTransfer) -> Self {
        let status = transfer.status.clone().unwrap_or_default();
        let told = find(&status.conditions, ConditionType::Succeeded).cloned();
        Self::new(&parse::transfer_view(transfer), status.stage, status.progress, told, status.last_error)
    }

    fn new(
        view: &TransferView,
        stage: Option<Stage>,
        progress: Option<Progress>,
        told: Option<Condition>,
        error: Option<LastError>,
    ) -> Self {
        let end = match view.state {
            TransferState::Done => Some(End::Succeeded),
            TransferState::Failed => Some(End::Failed),
            _ => None,
        };
        let works = view.state == TransferState::Working;
        let progress = progress.filter(|_| works || view.state == TransferState::Suspended);
        let error = error.map(|error| format!("{}: {}", error.reason, error.message));
        let waits = told.map(|told| match told.message.as_str() {
            "" => told.reason,
            message => format!("{}: {message}", told.reason),
        });
        let why = match (end, works) {
            (Some(End::Succeeded), _) => None,
            (Some(End::Failed), _) | (None, true) => error,
            (None, false) => waits,
        };
        let moved = progress.as_ref();
        Self {
            state: view.kind.name_of(view.state).unwrap_or("in no state"),
            end,
            percent: moved.and_then(|progress| progress.percent),
            stage: stage.filter(|_| works).map(|s| format!("{}/{} {}", s.index, s.total, s.name)),
            bytes: moved.and_then(|progress| {
                Some((Bytes::from_i64(progress.bytes_done), Bytes::from_i64(progress.bytes_total?)))
            }),
            rate: moved.map(|progress| Bytes::from_i64(progress.rate)).filter(|rate| *rate > Bytes::ZERO),
            why,
        }
    }

    /// What a line is worth that is not on a terminal: its state, its stage, and why it stands.
    pub fn heading(&self) -> String {
        [Some(self.state), self.stage.as_deref(), self.why.as_deref()]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join(" ")
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.state)?;
        if let Some(stage) = &self.stage {
            write!(f, " {stage}")?;
        }
        if let Some(percent) = self.percent {
            write!(f, " {percent} %")?;
        }
        if let Some((done, total)) = self.bytes {
            write!(f, ", {done} of {total}")?;
        }
        if let Some(rate) = self.rate {
            write!(f, ", {rate}/s")?;
        }
        match &self.why {
            Some(why) => write!(f, ": {why}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn transfer(status: &Value) -> Moment {
        let object: ImageTransfer = serde_json::from_value(json!({
            "apiVersion": "staging.berth.dev/v1alpha1", "kind": "ImageTransfer",
            "metadata": {"name": "t", "namespace": "ns", "uid": "u"},
            "spec": {
                "source": {"storeImage": {"store": "s", "image": "i"}},
                "destination": {"storeImage": {"store": "s", "image": "copy"}},
            },
            "status": status,
        }))
        .expect("readable");
        Moment::of_transfer(&object)
    }

    fn condition(reason: &str, message: &str) -> Value {
        json!([{
            "type": "Succeeded", "status": "False", "reason": reason, "message": message,
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }])
    }

    #[test]
    fn work_is_told_with_its_stage_bytes_and_rate() {
        let now = transfer(&json!({
            "state": "Transferring", "stage": {"index": 2, "total": 4, "name": "Upload"},
            "progress": {"percent": 45, "bytesDone": 1 << 30, "bytesTotal": 3i64 << 30, "rate": 120 << 20},
            "conditions": condition("Progressing", ""),
        }));
        assert_eq!(now.to_string(), "Transferring 2/4 Upload 45 %, 1 GiB of 3 GiB, 120 MiB/s");
        assert_eq!((now.heading().as_str(), now.end), ("Transferring 2/4 Upload", None));
    }

    #[test]
    fn what_stands_says_why_and_what_has_ended_how() {
        let queued =
            transfer(&json!({"state": "Queued", "conditions": condition("PoolFull", "lacks 1 GiB")}));
        assert_eq!(queued.to_string(), "Queued: PoolFull: lacks 1 GiB");
        let failed = transfer(&json!({
            "state": "Failed", "conditions": condition("SourceChanged", "x"),
            "lastError": {"reason": "SourceChanged", "message": "another version", "time": "2026-01-01T00:00:00Z", "retryable": false},
        }));
        assert_eq!(
            (failed.to_string().as_str(), failed.end),
            ("Failed: SourceChanged: another version", Some(End::Failed))
        );
        let done = transfer(&json!({"state": "Succeeded", "progress": {"percent": 100}, "conditions": []}));
        assert_eq!((done.to_string().as_str(), done.end), ("Succeeded", Some(End::Succeeded)));
        assert_eq!(transfer(&json!({"conditions": []})).to_string(), "Pending");
    }
}
