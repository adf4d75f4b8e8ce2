//! What long work has to say, between its happening and its being reported.
//!
//! After a restart it begins with what was reported before, so nothing that was said is taken back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use berth_api::StagingReservation;
use berth_api::conditions::time;
use berth_api::fields::{LastError, Progress, Stage, TransferPlan};
use berth_api::image_store::StoreCapabilities;
use berth_core::ids::{PoolName, Uid};
use berth_core::progress::Said;
use berth_core::reason::Reason;
use berth_core::stages::Stage::Publish;
use berth_core::units::{Bytes, Generation, Timestamp};

use super::transfers::{Outcome, Subject};
use crate::node::now;

/// How often at most another node is told anew what it needs to go on, in milliseconds.
const RESUME_MILLIS: u64 = 2_000;

/// What a node knows of an import or a transfer: everything in its status that the node writes.
#[derive(Clone, Debug, Default)]
pub struct TransferNews {
    /// What will be done.
    pub plan: Option<TransferPlan>,
    /// What is being done.
    pub stage: Option<Stage>,
    /// How far.
    pub progress: Option<Progress>,
    /// How often it was begun.
    pub attempts: Option<i32>,
    /// What went wrong last.
    pub last_error: Option<LastError>,
    /// The generation whose work that has ended.
    pub failed_generation: Option<i64>,
    /// What another node needs to go on, as it is told.
    pub resume: Option<String>,
    /// The same as it is, and when it was told last.
    next_resume: (Option<String>, Option<Timestamp>),
    /// What came of it.
    pub outcome: Option<Outcome>,
    /// The generation whose traces are gone.
    pub released_generation: Option<i64>,
    /// While it waits for a fault to pass: what that is called, `Retrying` or `ObjectStoreUnavailable`.
    pub waiting: Option<Reason>,
    /// What was said of its progress.
    pub said: Said,
    /// Bytes on the wire when that was said, for the rate.
    pub wire: Option<(Timestamp, Bytes)>,
}

impl TransferNews {
    /// The same, or nothing if it has failed and is to be tried again: attempts count anew, and the source is looked at anew.
    fn of_assignment(self, subject: &Subject) -> Self {
        let assigned = subject.assignment();
        let past = self
            .failed_generation
            .is_some_and(|failed| assigned.is_some_and(|assigned| assigned.generation > failed));
        if past { Self { released_generation: self.released_generation, ..Self::default() } } else { self }
    }

    /// Takes note of the error that ends the work of this assignment.
    pub fn failed(&mut self, error: LastError, subject: &Subject) {
        self.failed_generation = subject.assignment().map(|assigned| assigned.generation);
        self.last_error = Some(error);
        self.waiting = None;
        self.resume = None;
    }

    /// Takes note of what came of it.
    pub fn succeeded(&mut self, outcome: Outcome) {
        self.last_error = None;
        self.waiting = None;
        self.resume = None;
        if let Some(progress) = &mut self.progress {
            progress.percent = Some(100);
        }
        if let Some(stage) = &mut self.stage {
            *stage = Stage { index: stage.total, total: stage.total, name: Publish.to_string() };
        }
        self.outcome = Some(outcome);
    }

    /// Takes note of what another node needs to go on; true if that is to be told now.
    pub fn note_resume(&mut self, text: String, now: Timestamp) -> bool {
        let (next, told) = &mut self.next_resume;
        *next = Some(text);
        let due = told.is_none_or(|told| now.millis_since(told) >= RESUME_MILLIS);
        if due {
            *told = Some(now);
            self.publish_resume();
        }
        due
    }

    /// Tells what another node needs to go on, as it is now.
    pub fn publish_resume(&mut self) {
        if let Some(next) = self.next_resume.0.take() {
            self.resume = Some(next);
        }
    }
}

/// What a node knows of an image that it fills.
#[derive(Clone, Debug, Default)]
pub struct FillNews {
    /// How much of the image is here, in percent.
    pub percent: u8,
    /// Bytes of the image, from its start, that are here.
    pub done: Bytes,
    /// Why it does not go on.
    pub error: Option<(Reason, String)>,
}

/// What a node knows of a file for pods that it fetches or sends; nothing once that has ended well.
#[derive(Clone, Debug, Default)]
pub struct FileNews {
    /// Bytes that are done, of how many.
    pub progress: Option<(Bytes, Bytes)>,
    /// Why it does not go on, and whether it is tried again.
    pub error: Option<(Reason, String, bool)>,
}

/// What a node found in an image store.
#[derive(Clone, Debug)]
pub struct StoreNews {
    /// The object's generation that it was found for.
    pub observed: Option<i64>,
    /// When to look again.
    pub due: Timestamp,
    /// What it can do.
    pub capabilities: Option<StoreCapabilities>,
    /// Images, their chunks' bytes, and bytes that no image names.
    pub usage: Option<(i64, i64, i64)>,
    /// Why it cannot be used.
    pub error: Option<(Reason, String)>,
    /// How often in a row it could not.
    pub failures: u32,
}

/// A promise that the API server was told of: its pool, its holder, its generation, and its bytes of data.
pub type ToldPromise = (PoolName, Uid, Generation, Bytes);

/// All of it.
#[derive(Default)]
pub struct News {
    transfers: Mutex<BTreeMap<Uid, TransferNews>>,
    fills: Mutex<BTreeMap<Uid, FillNews>>,
    files: Mutex<BTreeMap<Uid, FileNews>>,
    stores: Mutex<BTreeMap<Uid, StoreNews>>,
    obeyed: Mutex<BTreeSet<ToldPromise>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An error as it is told to users: a namespaced object names no path of the node.
pub fn last_error(reason: Reason, message: &str, retryable: bool) -> LastError {
    let message = without_host_paths(message);
    LastError { reason: reason.as_str().to_owned(), message, time: time(now()), retryable }
}

/// Words that are absolute paths, quoted or not, are cut to their last part.
pub fn without_host_paths(message: &str) -> String {
    const QUOTES: [char; 5] = ['`', '"', '\'', '(', '='];
    let words = message.split(' ').map(|word| {
        let begin = word.len() - word.trim_start_matches(QUOTES).len();
        match word[begin..].strip_prefix('/') {
            Some(path) => [&word[..begin], path.rsplit('/').next().unwrap_or_default()].concat(),
            None => word.to_owned(),
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

impl News {
    /// True if the API server has been told that this promise is obeyed, of so many bytes of data.
    pub fn is_obeyed(&self, pool: &PoolName, holder: &Uid, generation: Generation, data: Bytes) -> bool {
        lock(&self.obeyed).contains(&(pool.clone(), holder.clone(), generation, data))
    }

    /// Notes which promises the API server has been told of; true if some are new.
    pub fn set_obeyed(&self, told: BTreeSet<ToldPromise>) -> bool {
        let mut known = lock(&self.obeyed);
        let news = !told.is_subset(&known);
        *known = told;
        news
    }

    /// What is known of an import or a transfer. What ended an earlier assignment of it is over.
    pub fn transfer(&self, uid: &Uid, subject: &Subject) -> TransferNews {
        let news = lock(&self.transfers).get(uid).cloned().unwrap_or_else(|| reported(subject));
        news.of_assignment(subject)
    }

    /// Changes what is known of an import or a transfer.
    pub fn edit_transfer(&self, uid: &Uid, subject: &Subject, edit: impl FnOnce(&mut TransferNews)) {
        let mut transfers = lock(&self.transfers);
        let news = transfers.entry(uid.clone()).or_insert_with(|| reported(subject));
        *news = std::mem::take(news).of_assignment(subject);
        edit(news);
    }

    /// What is known of a fill.
    pub fn fill(&self, uid: &Uid) -> Option<FillNews> {
        lock(&self.fills).get(uid).cloned()
    }

    /// Changes what is known of a fill.
    pub fn edit_fill(&self, uid: &Uid, edit: impl FnOnce(&mut FillNews)) {
        edit(lock(&self.fills).entry(uid.clone()).or_default());
    }

    /// What is known of a file; at first what was reported of its fetching before this process began.
    pub fn file(&self, uid: &Uid, object: &StagingReservation) -> FileNews {
        lock(&self.files).get(uid).cloned().unwrap_or_else(|| reported_file(object))
    }

    /// Changes what is known of a file.
    pub fn edit_file(&self, uid: &Uid, edit: impl FnOnce(&mut FileNews)) {
        edit(lock(&self.files).entry(uid.clone()).or_default());
    }

    /// Forgets that there was no space for the directory of a reservation: it is there.
    pub fn has_directory(&self, uid: &Uid) {
        let broken = |news: &FileNews| matches!(news.error, Some((Reason::SpacePromiseBroken, ..)));
        if let Some(news) = lock(&self.files).get_mut(uid).filter(|news| broken(news)) {
            news.error = None;
        }
    }

    /// Forgets files whose reservations are gone.
    pub fn retain_files(&self, reservations: impl Fn(&Uid) -> bool) {
        lock(&self.files).retain(|uid, _| reservations(uid));
    }

    /// What is known of an image store.
    pub fn store(&self, uid: &Uid) -> Option<StoreNews> {
        lock(&self.stores).get(uid).cloned()
    }

    /// Notes what was found in an image store.
    pub fn set_store(&self, uid: &Uid, news: StoreNews) {
        lock(&self.stores).insert(uid.clone(), news);
    }

    /// When an image store is to be looked at: at once if never, or if its object has changed since.
    pub fn store_due(&self, uid: &Uid, generation: Option<i64>) -> Timestamp {
        let stores = lock(&self.stores);
        stores.get(uid).filter(|news| news.observed == generation).map_or(Timestamp(0), |news| news.due)
    }

    /// Lets an image store be looked at soon, after it was written to.
    pub fn store_changed(&self, uid: &Uid) {
        if let Some(news) = lock(&self.stores).get_mut(uid) {
            news.due = Timestamp(0);
        }
    }

    /// Forgets objects that are gone.
    pub fn retain(&self, transfers: &BTreeSet<Uid>, images: &BTreeSet<Uid>, stores: &BTreeSet<Uid>) {
        lock(&self.transfers).retain(|uid, _| transfers.contains(uid));
        lock(&self.fills).retain(|uid, _| images.contains(uid));
        lock(&self.stores).retain(|uid, _| stores.contains(uid));
    }
}

/// Only what has ended counts: whatever passes is found out anew.
fn reported_file(object: &StagingReservation) -> FileNews {
    let last = object.status.as_ref().and_then(|status| status.last_error.as_ref());
    let ended = last.filter(|error| !error.retryable);
    let reason =
        ended.and_then(|error| Some((Reason::from_name(&error.reason)?, error.message.clone(), false)));
    FileNews { progress: None, error: reason }
}

/// What was reported before this process began.
fn reported(subject: &Subject) -> TransferNews {
    let told = subject.reported();
    let percent = told.progress.as_ref().and_then(|progress| progress.percent);
    let percent = percent.and_then(|percent| u8::try_from(percent).ok()).unwrap_or_default();
    TransferNews {
        plan: told.plan,
        stage: told.stage,
        progress: told.progress,
        attempts: told.attempts,
        last_error: told.last_error,
        failed_generation: told.failed_generation,
        resume: told.resume,
        outcome: told.outcome,
        released_generation: told.released_generation,
        said: Said { percent, ..Said::default() },
        ..TransferNews::default()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a54_what_ended_an_earlier_assignment_is_over_and_stays_so_after_a_restart() {
        let import = |assigned: i64, failed: Option<i64>| {
            let mut import = serde_json::json!({
                "apiVersion": "staging.berth.dev/v1alpha1", "kind": "TemplateImport",
                "metadata": {"name": "t", "namespace": "ns", "uid": "u"},
                "spec": {"source": {"http": {"url": "https://example.org/a"}}, "store": {"name": "s"}},
                "status": {
                    "assignment": {"pool": "p", "node": "n", "generation": assigned}, "attempts": 11,
                    "lastError": {"reason": "RetriesExhausted", "message": "m", "time": "2026-01-01T00:00:00Z",
                        "retryable": false},
                },
            });
            if let Some(failed) = failed {
                import["status"]["failedGeneration"] = failed.into();
            }
            Subject::Import(Arc::new(serde_json::from_value(import).unwrap()))
        };
        let uid = Uid::from("u");
        let news = News::default();
        let failed = |news: &News, import: &Subject| {
            let known = news.transfer(&uid, import);
            (known.attempts, known.last_error.is_some(), known.failed_generation)
        };
        assert_eq!(failed(&news, &import(2, Some(2))), (Some(11), true, Some(2)), "it has failed");
        assert_eq!(failed(&news, &import(3, Some(2))), (None, false, None), "it is to be tried again");
        let again = import(3, Some(2));
        news.edit_transfer(&uid, &again, |news| news.attempts = Some(1));
        assert_eq!(failed(&news, &again), (Some(1), false, None), "it is counted anew");
        news.edit_transfer(&uid, &again, |news| {
            news.failed(last_error(Reason::SourceChanged, "m", false), &again);
        });
        assert_eq!(failed(&news, &again), (Some(1), true, Some(3)));
        assert_eq!(failed(&News::default(), &import(3, None)), (Some(11), true, None));
    }

    #[test]
    fn what_others_need_to_go_on_is_told_in_time_and_not_for_each_part() {
        let mut news = TransferNews::default();
        assert!(news.note_resume("1".to_owned(), Timestamp(10_000)));
        assert!(!news.note_resume("2".to_owned(), Timestamp(11_000)));
        assert_eq!(news.resume.as_deref(), Some("1"));
        assert!(news.note_resume("3".to_owned(), Timestamp(12_000)));
        assert_eq!(news.resume.as_deref(), Some("3"));
        news.note_resume("4".to_owned(), Timestamp(12_001));
        news.publish_resume();
        assert_eq!(news.resume.as_deref(), Some("4"), "before a pause it is told whatever the time");
    }

    #[test]
    fn users_are_told_no_path_of_the_node() {
        let said = "failed to read the image: image /var/lib/berth/pools/a/staging/u-1/source is truncated: http://h/x";
        let error = last_error(Reason::ImageTruncated, said, false);
        assert_eq!(error.message, "failed to read the image: image source is truncated: http://h/x");
    }
}
