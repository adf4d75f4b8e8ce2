//! What a reservation's status says of its file.

use berth_api::StagingReservation;
use berth_api::conditions::{ConditionType, Truth, condition};
use berth_api::defaults::ANNOTATION_DISCARD;
use berth_api::fields::Progress;
use berth_api::staging_reservation::FileResult;
use berth_core::ids::Uid;
use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_record::{FileEntry, FileFetch};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use serde_json::{Map, Value, json};

use crate::agent::files::{FileDir, directory};
use crate::agent::news::{FileNews, last_error};
use crate::agent::pools::OpenPool;
use crate::node::now;

/// Fields that a reservation's status has for a file.
pub(super) const FIELDS: [&str; 3] = ["progress", "result", "lastError"];

/// What there is to say.
pub(super) struct FileReport {
    /// `Staged` and, once a pod might have changed the file, `Durable`.
    pub conditions: Vec<Condition>,
    /// The other fields.
    pub fields: Map<String, Value>,
    /// The file's name in a pod's volume, once it is all there.
    pub name: Option<String>,
}

/// What the record and the work under way tell of a file. A record that cannot be read tells nothing now.
pub(super) fn report(pool: &OpenPool, uid: &Uid, object: &StagingReservation, news: &FileNews) -> FileReport {
    let (entry, dir) = recorded(pool, uid);
    let mut fields = Map::new();
    if let Some((done, total)) = news.progress {
        fields.insert("progress".to_owned(), json!(progress(done, total)));
    }
    if let Some((reason, message, again)) = &news.error {
        // The time is that of what is shown already, if that is the same: a report alone is no news.
        let shown = object.status.as_ref().and_then(|status| status.last_error.clone());
        let told = last_error(*reason, message, *again);
        let same = shown.filter(|shown| {
            (&shown.reason, &shown.message, shown.retryable) == (&told.reason, &told.message, told.retryable)
        });
        fields.insert("lastError".to_owned(), json!(same.unwrap_or(told)));
    }
    if let Some(sent) = entry.as_ref().and_then(|entry| entry.sent.as_ref()) {
        let result = FileResult {
            etag: sent.etag.clone(),
            version_id: sent.version.clone(),
            digest: sent.sha256.to_string(),
            size: sent.size.as_i64(),
        };
        fields.insert("result".to_owned(), json!(result));
    }
    let previous = object.status.as_ref().map(|status| status.conditions.clone()).unwrap_or_default();
    let make = |kind, (truth, reason, message): (Truth, Reason, String)| {
        condition(&previous, kind, truth, reason, message, object.metadata.generation, now())
    };
    let mut conditions = vec![make(ConditionType::Staged, staged(entry.as_ref(), dir, news))];
    let durable = entry.as_ref().and_then(|entry| durable(entry, dir, news));
    conditions.extend(durable.map(|durable| make(ConditionType::Durable, durable)));
    let complete = entry.filter(|entry| entry.fetch == FileFetch::Complete);
    FileReport { conditions, fields, name: complete.map(|entry| entry.name) }
}

/// What is recorded of a file, and what there is of its directory. What cannot be read tells nothing now.
pub(super) fn recorded(pool: &OpenPool, uid: &Uid) -> (Option<FileEntry>, FileDir) {
    let entry = pool.record.file(uid).ok().flatten();
    let dir = entry.as_ref().and_then(|entry| directory(pool, uid, entry).ok());
    (entry, dir.unwrap_or(FileDir::Hidden))
}

fn progress(done: Bytes, total: Bytes) -> Progress {
    let percent = done.0.saturating_mul(100).checked_div(total.0).unwrap_or(100);
    Progress {
        percent: i32::try_from(percent).ok(),
        bytes_done: done.as_i64(),
        bytes_total: Some(total.as_i64()),
        bytes_on_wire: done.as_i64(),
        ..Progress::default()
    }
}

/// Whether all of the object is in its file; if not, what stands in the way.
pub(super) fn staged(entry: Option<&FileEntry>, dir: FileDir, news: &FileNews) -> (Truth, Reason, String) {
    match (entry, &news.error) {
        (Some(entry), _) if dir == FileDir::Lost => {
            let message = format!("the directory of `{}` is gone, and is not made again", entry.name);
            (Truth::False, Reason::FileLost, message)
        }
        (Some(entry), _) if entry.made && dir == FileDir::Hidden => {
            let message = format!("the directory of `{}` cannot be shown on this node", entry.name);
            (Truth::False, Reason::PoolAreaFailed, message)
        }
        (Some(FileEntry { fetch: FileFetch::Complete, .. }), _) => {
            (Truth::True, Reason::Staged, String::new())
        }
        (_, Some((reason, message, _))) => {
            (Truth::False, *reason, last_error(*reason, message, true).message)
        }
        (_, None) => (Truth::False, Reason::Fetching, how_far(news, "is to be fetched", "are here")),
    }
}

/// Whether what pods wrote is in its object store. Nothing to say before any might have written.
fn durable(entry: &FileEntry, dir: FileDir, news: &FileNews) -> Option<(Truth, Reason, String)> {
    let (target, name) = (entry.target.as_ref()?, &entry.name);
    let place = format!("s3://{}/{}", target.bucket, target.key);
    if !entry.is_only_copy() {
        return entry.sent.as_ref().map(|_| (Truth::True, Reason::Durable, place));
    }
    if dir == FileDir::Lost {
        let message = format!(
            "`{name}` was the only copy of what a pod wrote, and is lost with its directory: it never came to {place}; \
             the annotation {ANNOTATION_DISCARD}=true lets it go"
        );
        return Some((Truth::False, Reason::FileLost, message));
    }
    let written = entry.published.values().any(|publication| publication.writer);
    let message = match (&news.error, written) {
        (_, true) => format!("`{name}` is open to a pod that may write; it goes to {place} after that"),
        (Some((reason, message, _)), false) => {
            let message = last_error(*reason, message, true).message;
            format!("`{name}` is not yet at {place}: {reason}: {message}")
        }
        (None, false) => {
            format!("`{name}` is being sent to {place}: {}", how_far(news, "it begins", "are there"))
        }
    };
    Some((Truth::False, Reason::OnlyCopy, message))
}

fn how_far(news: &FileNews, nothing: &str, some: &str) -> String {
    match news.progress {
        None => nothing.to_owned(),
        Some((done, total)) => format!("{done} of {total} {some}"),
    }
}
