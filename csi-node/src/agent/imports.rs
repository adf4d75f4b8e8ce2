//! Imports as Kubernetes asks for them: the object into a job, the job's progress and end into its status.

mod error;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use berth_api::fields::{PlannedStaging, Progress, Stage as ApiStage, TransferPlan};
use berth_api::parse::{self, InvalidField};
use berth_api::template_import::DurableImage;
use berth_api::{TemplateImport, defaults};
use berth_core::ids::{Digest, ObjectName, Uid};
use berth_core::reason::Reason;
use berth_core::retry::{Failures, Fault, Next};
use berth_core::stages::{Shape, Stage};
use berth_core::units::{Bytes, Generation};
use berth_objectstore::chunks::store::OpenError;
use kube::{Api, ResourceExt as _};
use tokio_util::sync::CancellationToken;

use super::news::{ImportNews, last_error};
use super::pools::OpenPool;
use super::sources;
use super::space;
use super::stores::{self, AccessError};
use crate::node::{Node, now};
use crate::telemetry::chain;
use crate::transfer::{
    self, Durable, Journal, Limits, Origin, Probed, Reporter, Snapshot, Source, TransferError, TransferJob,
    journal, probe_source,
};

pub use error::WorkError;

/// The object with this UID.
fn find(node: &Node, uid: &Uid) -> Result<Arc<TemplateImport>, WorkError> {
    let found = node.watches.imports.find(|import| import.metadata.uid.as_deref() == Some(uid.as_str()));
    found.ok_or_else(|| WorkError::Gone(uid.clone()))
}

fn name_of(import: &TemplateImport) -> ObjectName {
    ObjectName::new(import.namespace().unwrap_or_default(), import.name_any())
}

fn limits(import: &TemplateImport) -> Result<Limits, InvalidField> {
    let limits = parse::transfers::transfer_limits(&import.spec.limits)?;
    Ok(Limits {
        virtual_size: limits.virtual_size,
        bytes: limits.bytes,
        stall: Duration::from_secs(limits.stall_timeout),
        retries: limits.retries,
    })
}

fn retries(object: &TemplateImport) -> u32 {
    limits(object).map_or(defaults::RETRY_LIMIT, |limits| limits.retries)
}

/// Reads the head of an import's source, until that went well or cannot.
pub async fn probe(node: Arc<Node>, uid: Uid, cancel: CancellationToken) {
    let (mut failures, mut attempts) = (Failures::default(), 0);
    loop {
        let Ok(object) = find(&node, &uid) else { return };
        let Some(outcome) = cancel.run_until_cancelled(probe_once(&node, &object)).await else { return };
        let error = match outcome {
            Ok(plan) => {
                return node.news.edit_import(&uid, &object, |news| {
                    news.plan = Some(plan);
                    news.last_error = None;
                    news.waiting = None;
                });
            }
            Err(error) => error,
        };
        attempts += 1;
        let next = failures.note(error.fault(), false, retries(&object));
        if !pause_or_end(&node, &uid, &object, (&error, next, attempts), &cancel).await {
            return;
        }
    }
}

async fn probe_once(node: &Node, object: &TemplateImport) -> Result<TransferPlan, WorkError> {
    let limits = limits(object)?;
    checksum(object)?;
    let store =
        stores::find(node, &ObjectName::new(name_of(object).namespace, object.spec.store.name.clone()))?;
    let chunk_size = stores::chunk_size(store.spec.chunk_size.as_ref())?;
    let source = sources::open(node, object, limits.stall).await?;
    let probed = probe_source(&source, &limits).await?;
    Ok(plan(&probed, chunk_size))
}

fn plan(probed: &Probed, chunk_size: Bytes) -> TransferPlan {
    let shape = probed.shape(Some(chunk_size));
    let why = if probed.converted {
        "a tool converts this format to raw beside the fetched source"
    } else {
        "the fetched source is read as it is"
    };
    TransferPlan {
        format: format!("{:?}", probed.format),
        source_bytes: probed.source_bytes.as_i64(),
        virtual_size: probed.virtual_size.as_i64(),
        peak_bytes: shape.peak_bytes().as_i64(),
        steps: shape.stages().iter().map(|stage| stage.as_str().to_owned()).collect(),
        why: why.to_owned(),
        staging: Some(PlannedStaging::Staged),
    }
}

/// Tells of a failure, what comes next, and how many attempts there were; true if the same is to be tried again, after
/// the pause that this has made.
async fn pause_or_end(
    node: &Node,
    uid: &Uid,
    object: &TemplateImport,
    (error, next, attempts): (&WorkError, Next, u32),
    cancel: &CancellationToken,
) -> bool {
    tracing::warn!(import = %name_of(object), error = chain(error), ?next, attempts, "import failed");
    let ended = match next {
        Next::Again(millis) => {
            tell_waiting(node, uid, object, error);
            let pause = tokio::time::sleep(Duration::from_millis(millis));
            return cancel.run_until_cancelled(pause).await.is_some();
        }
        Next::Exhausted => {
            let message = format!("given up after {attempts} attempts: {}", chain(error));
            last_error(Reason::RetriesExhausted, &message, false)
        }
        Next::Ended => last_error(error.reason(), &chain(error), false),
    };
    node.news.edit_import(uid, object, |news| news.failed(ended, object));
    false
}

/// Tells that this is waited for to pass.
fn tell_waiting(node: &Node, uid: &Uid, object: &TemplateImport, error: &WorkError) {
    node.news.edit_import(uid, object, |news| {
        news.last_error = Some(last_error(error.reason(), &chain(error), true));
        news.waiting = Some(error.waiting());
    });
    node.wake.notify_one();
}

fn checksum(object: &TemplateImport) -> Result<Option<Digest>, WorkError> {
    let asked = object.spec.checksum.as_ref();
    asked.map(|text| text.parse().map_err(|_| WorkError::Checksum(text.clone()))).transpose()
}

/// The job that an import is on this node.
fn job(
    node: &Node,
    object: &TemplateImport,
    uid: &Uid,
    generation: Generation,
    place: Option<(&OpenPool, &Uid, Bytes)>,
) -> Result<TransferJob, WorkError> {
    let (dir, promised) = place.map_or_else(
        || (node.config.state_dir.join("nowhere"), Bytes::ZERO),
        |(pool, reservation, promised)| (pool.area.work_dir(reservation), promised),
    );
    Ok(TransferJob {
        uid: uid.clone(),
        generation,
        name: name_of(object),
        node: node.name.clone(),
        limits: limits(object)?,
        checksum: checksum(object)?.map(|digest| digest.0),
        dir,
        promised,
    })
}

/// What a running import needs to be told of.
struct Teller {
    node: Arc<Node>,
    uid: Uid,
    object: Arc<TemplateImport>,
}

impl Teller {
    fn edit(&self, edit: impl FnOnce(&mut ImportNews)) {
        self.node.news.edit_import(&self.uid, &self.object, edit);
        self.node.wake.notify_one();
    }

    /// An attempt begins. One that waited for its store shows that until it is known to be there: trying takes time too.
    fn attempt(&self) {
        self.edit(|news| {
            news.attempts = Some(news.attempts.unwrap_or_default().saturating_add(1));
            news.waiting = news.waiting.filter(|reason| *reason == Reason::ObjectStoreUnavailable);
        });
    }
}

impl Reporter for Teller {
    fn progress(&self, shape: &Shape, at: Snapshot) {
        let percent = shape.percent(at.stage, at.done, at.total);
        let mut news = false;
        self.node.news.edit_import(&self.uid, &self.object, |import| {
            // No attempt gets so far before its store has answered.
            news = import.waiting.take().is_some();
            let Some(said) = import.said.next(percent, at.stage, now()) else { return };
            news = true;
            import.said = said;
            let (index, total) = shape.position(at.stage);
            import.stage =
                Some(ApiStage { index: index.into(), total: total.into(), name: at.stage.to_string() });
            let rate = rate(import, at.on_wire);
            import.progress = Some(Progress {
                percent: Some(said.percent.into()),
                bytes_done: at.done.as_i64(),
                bytes_total: Some(at.total.as_i64()),
                bytes_skipped: at.skipped.as_i64(),
                bytes_on_wire: at.on_wire.as_i64(),
                rate,
            });
        });
        if news {
            self.node.wake.notify_one();
        }
    }
}

/// Bytes per second since the last report.
fn rate(import: &mut ImportNews, on_wire: Bytes) -> i64 {
    let now = now();
    let before = import.wire.replace((now, on_wire));
    let Some((then, bytes)) = before else { return 0 };
    let millis = now.millis_since(then).max(1);
    Bytes(on_wire.saturating_sub(bytes).0.saturating_mul(1000) / millis).as_i64()
}

/// Imports until the image is durable or cannot be.
pub async fn run(
    node: Arc<Node>,
    uid: Uid,
    generation: Generation,
    pool: Arc<OpenPool>,
    reservation: Uid,
    promised: Bytes,
    cancel: CancellationToken,
) {
    let journal = Journal::new(Arc::clone(&node.record), uid.clone(), generation);
    let (mut failures, mut attempts) = (Failures::default(), 0);
    loop {
        let Ok(object) = find(&node, &uid) else { return };
        let teller =
            Arc::new(Teller { node: Arc::clone(&node), uid: uid.clone(), object: Arc::clone(&object) });
        let (place, before) = ((&*pool, &reservation, promised), journal.reached());
        let error = match run_once(&teller, &journal, generation, place, &cancel).await {
            Ok(durable) => {
                teller.edit(|news| finish(news, &durable));
                if let Ok(store) = stores::find(&node, &store_name(&object)) {
                    node.news.store_changed(&store.uid().unwrap_or_default().into());
                }
                return tracing::info!(import = %name_of(&object), digest = %durable.digest, "import is durable");
            }
            Err(WorkError::Import(TransferError::Cancelled)) => return,
            Err(error) => error,
        };
        let superseded = matches!(&error, WorkError::Import(error) if error.is_superseded());
        if superseded && !is_ours(&node, &object, generation).await {
            tracing::warn!(import = %name_of(&object), error = chain(&error), "import goes on elsewhere");
            // The assignment that says so is on its way; until it comes, beginning again would change nothing.
            cancel.run_until_cancelled(tokio::time::sleep(Duration::from_secs(10))).await;
            return;
        }
        let defect = if space::is_out_of_space(&error) {
            let path = pool.area.work_dir(&reservation);
            space::defect(&node, &pool, &reservation, promised, path).await
        } else {
            None
        };
        let error = defect.map_or(error, WorkError::Space);
        if matches!(&error, WorkError::Import(error) if error.is_session_gone()) {
            begin_anew(&journal, &object).await;
        }
        attempts += 1;
        let fault = if superseded { Fault::Passing } else { error.fault() };
        let next = failures.note(fault, journal.reached() > before, retries(&object));
        if !matches!(next, Next::Again(_)) {
            clean_up(&node, &object, &uid, generation, place).await;
        }
        if !pause_or_end(&node, &uid, &object, (&error, next, attempts), &cancel).await {
            return;
        }
    }
}

/// True if the API server itself says that this generation of an import is this node's to do: a watch may lag, and what was
/// given up is not to be begun again. False where it does not answer.
async fn is_ours(node: &Node, object: &TemplateImport, generation: Generation) -> bool {
    let api = Api::<TemplateImport>::namespaced(node.client.clone(), &name_of(object).namespace);
    match api.get_opt(&object.name_any()).await {
        Ok(found) => found.is_some_and(|found| {
            found.uid() == object.uid() && is_assigned(&found, node.name.as_str(), generation)
        }),
        Err(error) => {
            tracing::warn!(import = %name_of(object), error = chain(&error), "whose it is could not be read");
            false
        }
    }
}

/// True if this generation of an import is to be done on this node, and it is not being deleted.
fn is_assigned(import: &TemplateImport, node: &str, generation: Generation) -> bool {
    let assignment = import.status.as_ref().and_then(|status| status.assignment.as_ref());
    let ours = assignment.is_some_and(|assignment| {
        assignment.node == node && parse::generation(assignment.generation) == generation
    });
    ours && import.metadata.deletion_timestamp.is_none()
}

/// Forgets how far an import is whose session somebody has removed from its store: nothing protects any more what that
/// relies on.
async fn begin_anew(journal: &Journal, object: &TemplateImport) {
    match journal.forget().await {
        Ok(()) => {
            tracing::warn!(import = %name_of(object), "its session is gone from the store: it begins anew");
        }
        Err(error) => {
            tracing::warn!(import = %name_of(object), error = chain(&error), "cannot begin anew yet");
        }
    }
}

fn store_name(object: &TemplateImport) -> ObjectName {
    ObjectName::new(name_of(object).namespace, object.spec.store.name.clone())
}

/// One attempt. Source, store and credentials are looked up anew for each: while an import waits, people may change them.
async fn run_once(
    teller: &Arc<Teller>,
    journal: &Journal,
    generation: Generation,
    place: (&OpenPool, &Uid, Bytes),
    cancel: &CancellationToken,
) -> Result<Durable, WorkError> {
    let (node, object) = (&teller.node, &teller.object);
    let job = job(node, object, &teller.uid, generation, Some(place))?;
    let source = sources::open(node, object, job.limits.stall).await?;
    let chunks = stores::open_or_create(node, &store_name(object)).await?;
    let reporter: Arc<dyn Reporter> = Arc::clone(teller) as _;
    teller.attempt();
    let source = Source::Staged(Origin::Remote(source));
    Ok(transfer::attempt(&job, &source, &chunks, journal, &reporter, cancel).await?)
}

fn finish(news: &mut ImportNews, durable: &Durable) {
    news.last_error = None;
    news.waiting = None;
    if let Some(progress) = &mut news.progress {
        progress.percent = Some(100);
    }
    if let Some(stage) = &mut news.stage {
        *stage = ApiStage { index: stage.total, total: stage.total, name: Stage::Publish.to_string() };
    }
    news.durable = Some(DurableImage {
        digest: durable.digest.to_string(),
        source_digest: durable.source_digest.map(|digest| digest.to_string()).unwrap_or_default(),
        size: durable.stored_bytes.as_i64(),
        virtual_size: durable.virtual_size.as_i64(),
        real_size: durable.real_size.as_i64(),
        chunks: i64::try_from(durable.chunks).unwrap_or(i64::MAX),
    });
}

/// Takes back what a failed import has left. What cannot be taken back now is taken back when the import is deleted.
async fn clean_up(
    node: &Arc<Node>,
    object: &TemplateImport,
    uid: &Uid,
    generation: Generation,
    place: (&OpenPool, &Uid, Bytes),
) {
    if let Err(error) = take_back(node, object, uid, generation, Some(place), false).await {
        tracing::warn!(import = %name_of(object), error = chain(&error), "traces of a failed import stay for now");
    }
}

async fn take_back(
    node: &Arc<Node>,
    object: &TemplateImport,
    uid: &Uid,
    generation: Generation,
    place: Option<(&OpenPool, &Uid, Bytes)>,
    published: bool,
) -> Result<(), WorkError> {
    let job = job(node, object, uid, generation, place)?;
    let chunks = stores::open(node, &store_name(object)).await?;
    let journal = Journal::new(Arc::clone(&node.record), uid.clone(), generation);
    Ok(transfer::abandon(&job, &chunks, &journal, published).await?)
}

/// Forgets how far imports are that are not this node's any more: they have moved, or went while it was away.
pub async fn forget_others(node: &Arc<Node>) {
    let ours: BTreeSet<Uid> =
        node.watches.imports.state().iter().filter_map(|import| Some(import.uid()?.into())).collect();
    let record = Arc::clone(&node.record);
    let forget = move || -> Result<(), TransferError> {
        let jobs = record.jobs()?.into_iter().filter(|(_, job)| job.kind == journal::KIND);
        for (uid, _) in jobs.filter(|(uid, _)| !ours.contains(uid)) {
            record.forget_job(&uid)?;
            tracing::info!(import = %uid, "forgotten: it is not this node's any more");
        }
        Ok(())
    };
    match tokio::task::spawn_blocking(forget).await.map_err(TransferError::from).flatten() {
        Ok(()) => {}
        Err(error) => tracing::warn!(error = chain(&error), "what is recorded of others' imports stays"),
    }
}

/// Removes every trace of an import that is being deleted, and says so. While its store does not answer, the object stays
/// and says why: a name that stayed behind in the store could not be given again. Only a store whose own object is gone
/// keeps nobody waiting.
pub async fn abandon(node: &Arc<Node>, uid: &Uid, generation: Generation) -> Result<(), WorkError> {
    let object = find(node, uid)?;
    let name = name_of(&object);
    let reservation_name = berth_core::ids::transfer_reservation_name(
        berth_core::transfer::TransferKind::Import,
        &name.name,
        uid,
    );
    let reservation = node.watches.assigned.find(|found| {
        found.name_any() == reservation_name && found.namespace().as_deref() == Some(name.namespace.as_str())
    });
    let place = reservation.as_ref().and_then(|found| {
        let pool = found.status.as_ref()?.assignment.as_ref()?.pool.as_deref()?;
        Some((node.pools.get(&pool.into())?, Uid::from(found.uid()?)))
    });
    let place = place.as_ref().map(|(pool, uid)| (&**pool, uid, Bytes::ZERO));
    let taken_back = take_back(node, &object, uid, generation, place, true).await;
    let journal = Journal::new(Arc::clone(&node.record), uid.clone(), generation);
    let began = node.news.import(uid, &object).attempts.is_some();
    if let Err(error) = nothing_left(taken_back, began) {
        tell_waiting(node, uid, &object, &error);
        return Err(error);
    }
    journal.forget().await?;
    node.news.edit_import(uid, &object, |news| {
        news.released_generation = Some(i64::try_from(generation.0).unwrap_or(i64::MAX));
    });
    Ok(())
}

/// What stands in the way of letting a deleted import go, after its traces were to be taken back.
fn nothing_left(taken_back: Result<(), WorkError>, began: bool) -> Result<(), WorkError> {
    match taken_back {
        Err(WorkError::Store(
            AccessError::Missing(_) | AccessError::Open { source: OpenError::Absent { .. }, .. },
        )) => Ok(()),
        // Nothing was written to any store, by whichever node.
        Err(_) if !began => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_objectstore::{Place, StoreError};

    #[test]
    fn what_was_superseded_is_ours_only_at_our_generation_and_while_it_is_not_deleted() {
        let import = |node: &str, generation: u64, deleted: bool| -> TemplateImport {
            let mut import = serde_json::json!({
                "apiVersion": "staging.berth.dev/v1alpha1", "kind": "TemplateImport",
                "metadata": {"name": "t", "namespace": "ns", "uid": "u"},
                "spec": {"source": {"http": {"url": "https://example.org/a"}}, "store": {"name": "s"}},
                "status": {"assignment": {"pool": "p", "node": node, "generation": generation}},
            });
            if deleted {
                import["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
            }
            serde_json::from_value(import).unwrap()
        };
        let is_ours = |import: &TemplateImport| is_assigned(import, "n1", Generation(2));
        assert!(is_ours(&import("n1", 2, false)));
        assert!(!is_ours(&import("n2", 2, false)) && !is_ours(&import("n1", 3, false)));
        assert!(!is_ours(&import("n1", 2, true)), "its session is being removed");
    }

    #[test]
    fn a_deleted_import_waits_for_its_store_but_not_for_one_that_is_gone() {
        let store = || ObjectName::new("ns", "store");
        let place = || Place { bucket: "b".to_owned(), key: "k".to_owned() };
        let denied = || StoreError::AccessDenied { place: place(), said: String::new() };
        let open = |source| Err(WorkError::Store(AccessError::Open { store: store(), source }));
        let denied_open = || open(OpenError::Store { at: "k".to_owned(), source: denied() });
        assert!(nothing_left(Err(TransferError::Store(denied()).into()), true).is_err());
        assert!(nothing_left(denied_open(), true).is_err());
        assert!(nothing_left(denied_open(), false).is_ok(), "it never wrote there");
        assert!(nothing_left(Err(AccessError::Missing(store()).into()), true).is_ok());
        assert!(nothing_left(Ok(()), true).is_ok());
    }
}
