//! Imports and transfers as Kubernetes asks for them: the object into a job, the job's progress and end into its status.

mod destination;
mod error;
mod plan;
mod subject;
mod teller;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use berth_api::defaults;
use berth_api::image_transfer::TransferResult;
use berth_api::parse::{Asked, AskedDestination};
use berth_api::template_import::DurableImage;
use berth_core::ids::{Digest, ObjectName, Uid, transfer_reservation_name};
use berth_core::reason::Reason;
use berth_core::retry::{Failures, Fault, Next};
use berth_core::transfer::TransferKind;
use berth_core::units::{Bytes, Generation};
use berth_objectstore::chunks::store::OpenError;
use kube::ResourceExt as _;
use tokio_util::sync::CancellationToken;

use self::destination::Destination;
use self::teller::{Ours, Teller};
use super::news::last_error;
use super::pools::OpenPool;
use super::space;
use super::stores::{self, AccessError};
use crate::node::Node;
use crate::telemetry::chain;
use crate::transfer::{
    self, CONVERSION_WINDOW, Direct, Durable, Journal, Limits, ObjectAttempt, Reporter, SentObject, Source,
    TransferError, TransferJob, journal,
};

pub use self::error::WorkError;
pub use self::subject::{Outcome, Subject};

/// Where the work may put what it stages: a pool, a reservation there, and the bytes that are promised to it.
type Place<'a> = (&'a OpenPool, &'a Uid, Bytes);

fn limits(asked: &Asked) -> Limits {
    Limits {
        virtual_size: asked.limits.virtual_size,
        bytes: asked.limits.bytes,
        stall: Duration::from_secs(asked.limits.stall_timeout),
        retries: asked.limits.retries,
        conversion_window: CONVERSION_WINDOW,
    }
}

fn retries(subject: &Subject) -> u32 {
    subject.asked().map_or(defaults::RETRY_LIMIT, |asked| asked.limits.retries)
}

/// Reads the head of the source, until that went well or cannot.
pub async fn probe(node: Arc<Node>, uid: Uid, cancel: CancellationToken) {
    let (mut failures, mut attempts) = (Failures::default(), 0);
    loop {
        let Ok(subject) = Subject::find(&node, &uid) else { return };
        let Some(outcome) = cancel.run_until_cancelled(plan::plan(&node, &subject)).await else { return };
        let error = match outcome {
            Ok(plan) => {
                return node.news.edit_transfer(&uid, &subject, |news| {
                    news.plan = Some(plan);
                    news.last_error = None;
                    news.waiting = None;
                });
            }
            Err(error) => error,
        };
        attempts += 1;
        let next = failures.note(error.fault(), false, retries(&subject));
        if !pause_or_end(&node, &subject, (&error, next, attempts), &cancel).await {
            return;
        }
    }
}

/// Tells of a failure, what comes next, and how many attempts there were; true if the same is to be tried again, after
/// the pause that this has made.
async fn pause_or_end(
    node: &Node,
    subject: &Subject,
    (error, next, attempts): (&WorkError, Next, u32),
    cancel: &CancellationToken,
) -> bool {
    let (kind, name) = (subject.kind(), subject.name());
    tracing::warn!(%kind, %name, error = chain(error), ?next, attempts, "work failed");
    let ended = match next {
        Next::Again(millis) => {
            tell_waiting(node, subject, error);
            let pause = tokio::time::sleep(Duration::from_millis(millis));
            return cancel.run_until_cancelled(pause).await.is_some();
        }
        Next::Exhausted => {
            let message = format!("given up after {attempts} attempts: {}", chain(error));
            last_error(Reason::RetriesExhausted, &message, false)
        }
        Next::Ended => last_error(error.reason(), &chain(error), false),
    };
    node.news.edit_transfer(&subject.uid(), subject, |news| news.failed(ended, subject));
    false
}

/// Tells that this is waited for to pass.
fn tell_waiting(node: &Node, subject: &Subject, error: &WorkError) {
    node.news.edit_transfer(&subject.uid(), subject, |news| {
        news.last_error = Some(last_error(error.reason(), &chain(error), true));
        news.waiting = Some(error.waiting());
        news.publish_resume();
    });
    node.wake.notify_one();
}

/// The job that an object is on this node.
fn job(
    node: &Node,
    subject: &Subject,
    asked: &Asked,
    generation: Generation,
    place: Option<Place<'_>>,
) -> TransferJob {
    let (dir, promised) = place.map_or_else(
        || (node.config.state_dir.join("nowhere"), Bytes::ZERO),
        |(pool, reservation, promised)| (pool.area.work_dir(reservation), promised),
    );
    let name = match &asked.destination {
        AskedDestination::StoreImage { image, .. } => image.clone(),
        AskedDestination::Object { .. } => subject.name(),
    };
    TransferJob {
        uid: subject.uid(),
        generation,
        name,
        node: node.name.clone(),
        limits: limits(asked),
        format: asked.source_format.map(plan::image_format),
        checksum: asked.checksum,
        dir,
        promised,
    }
}

/// Works until the image is where it is to go, or cannot be.
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
        let Ok(subject) = Subject::find(&node, &uid) else { return };
        let teller = Arc::new(Teller::new(&node, &subject));
        let (place, before) = ((&*pool, &reservation, promised), journal.reached());
        let error = match run_once(&teller, &journal, generation, place, &cancel).await {
            Ok(outcome) => return tell_end(&teller, outcome),
            Err(WorkError::Transfer(TransferError::Cancelled)) => return,
            Err(error) => error,
        };
        let name = subject.name();
        let superseded = matches!(&error, WorkError::Transfer(error) if error.is_superseded());
        let lost = superseded || matches!(error, WorkError::Transfer(TransferError::NotOurs));
        if lost && !subject.is_ours(&node, generation).await {
            tracing::warn!(%name, error = chain(&error), "the work goes on elsewhere");
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
        if matches!(&error, WorkError::Transfer(error) if error.is_session_gone()) {
            begin_anew(&journal, &name).await;
        }
        attempts += 1;
        let fault = if superseded { Fault::Passing } else { error.fault() };
        let next = failures.note(fault, journal.reached() > before, retries(&subject));
        if !matches!(next, Next::Again(_))
            && let Err(error) = take_back(&node, &subject, generation, Some(place), false).await
        {
            // What cannot be taken back now is taken back when the object is deleted.
            tracing::warn!(%name, error = chain(&error), "traces of failed work stay for now");
        }
        if !pause_or_end(&node, &subject, (&error, next, attempts), &cancel).await {
            return;
        }
    }
}

/// Forgets how far work is whose session somebody has removed from its store: nothing protects any more what that relies on.
async fn begin_anew(journal: &Journal, name: &ObjectName) {
    match journal.forget().await {
        Ok(()) => tracing::warn!(%name, "its session is gone from the store: it begins anew"),
        Err(error) => tracing::warn!(%name, error = chain(&error), "cannot begin anew yet"),
    }
}

/// One attempt. Source, destination and credentials are looked up anew for each: while the work waits, people may change them.
async fn run_once(
    teller: &Arc<Teller>,
    journal: &Journal,
    generation: Generation,
    place: Place<'_>,
    cancel: &CancellationToken,
) -> Result<Outcome, WorkError> {
    let (node, subject) = (&teller.node, &teller.subject);
    let asked = subject.asked()?;
    let job = job(node, subject, &asked, generation, Some(place));
    let namespace = subject.name().namespace;
    let source = plan::source(node, &namespace, &asked, teller.planned()).await?;
    let destination = destination::open(node, &namespace, &asked.destination).await?;
    let reporter: Arc<dyn Reporter> = Arc::clone(teller) as _;
    teller.attempt();
    Ok(match destination {
        Destination::Image(chunks) => {
            let durable = transfer::attempt(&job, &source, &chunks, journal, &reporter, cancel).await?;
            image_outcome(subject.kind(), &source, &durable)
        }
        Destination::Object(target) => {
            let (resume, claim) = (teller.resume(), Ours { node, subject, generation });
            let attempt = ObjectAttempt {
                job: &job,
                source: &source,
                target: &target,
                journal,
                reporter: &reporter,
                resume: resume.as_deref(),
                claim: &claim,
            };
            object_outcome(&source, transfer::send(&attempt, cancel).await?)
        }
    })
}

/// The identity of what was read: of an image of an image store it is its digest.
fn source_digest(source: &Source, read: Option<Digest>) -> Option<String> {
    match source {
        Source::Direct(Direct::Stored { digest, .. }) => Some(digest.to_string()),
        _ => read.map(|digest| digest.to_string()),
    }
}

fn image_outcome(kind: TransferKind, source: &Source, durable: &Durable) -> Outcome {
    let (digest, source_digest) = (durable.digest.to_string(), source_digest(source, durable.source_digest));
    let (size, virtual_size) = (durable.stored_bytes.as_i64(), durable.virtual_size.as_i64());
    match kind {
        TransferKind::Import => Outcome::Image(DurableImage {
            digest,
            source_digest: source_digest.unwrap_or_default(),
            size,
            virtual_size,
            real_size: durable.real_size.as_i64(),
            chunks: i64::try_from(durable.chunks).unwrap_or(i64::MAX),
        }),
        TransferKind::Transfer => Outcome::Result(TransferResult {
            digest: Some(digest),
            source_digest,
            size,
            virtual_size,
            etag: None,
            version_id: None,
        }),
    }
}

fn object_outcome(source: &Source, object: SentObject) -> Outcome {
    Outcome::Result(TransferResult {
        digest: None,
        source_digest: source_digest(source, object.source_digest),
        size: object.size.as_i64(),
        virtual_size: object.virtual_size.as_i64(),
        etag: object.etag,
        version_id: object.version,
    })
}

fn tell_end(teller: &Teller, outcome: Outcome) {
    let (node, subject) = (&teller.node, &teller.subject);
    tracing::info!(kind = %subject.kind(), name = %subject.name(), ?outcome, "durable");
    teller.edit(|news| news.succeeded(outcome));
    let stores = subject.asked().map(|asked| asked.stores()).unwrap_or_default();
    for store in stores.iter().filter_map(|name| stores::find(node, name).ok()) {
        node.news.store_changed(&store.uid().unwrap_or_default().into());
    }
}

/// Takes back what the work has left: its session or upload, its files, its place in the record, its pin in the source's store.
async fn take_back(
    node: &Arc<Node>,
    subject: &Subject,
    generation: Generation,
    place: Option<Place<'_>>,
    published: bool,
) -> Result<(), WorkError> {
    let asked = subject.asked()?;
    let job = job(node, subject, &asked, generation, place);
    let journal = Journal::new(Arc::clone(&node.record), subject.uid(), generation);
    let source = plan::let_go(node, &asked.source, &job).await;
    match destination::open_again(node, &subject.name().namespace, &asked.destination).await? {
        Destination::Image(chunks) => transfer::abandon(&job, &chunks, &journal, published).await?,
        Destination::Object(target) => {
            let resume = node.news.transfer(&subject.uid(), subject).resume;
            transfer::abandon_object(&job, &target, &journal, resume.as_deref()).await?;
        }
    }
    source
}

/// Forgets how far work is that is not this node's any more: it has moved, or went while the node was away.
pub async fn forget_others(node: &Arc<Node>) {
    let ours: BTreeSet<Uid> = Subject::all(node).iter().map(Subject::uid).collect();
    let record = Arc::clone(&node.record);
    let forget = move || -> Result<(), TransferError> {
        let jobs = record.jobs()?.into_iter().filter(|(_, job)| job.kind == journal::KIND);
        for (uid, _) in jobs.filter(|(uid, _)| !ours.contains(uid)) {
            record.forget_job(&uid)?;
            tracing::info!(work = %uid, "forgotten: it is not this node's any more");
        }
        Ok(())
    };
    match tokio::task::spawn_blocking(forget).await.map_err(TransferError::from).flatten() {
        Ok(()) => {}
        Err(error) => tracing::warn!(error = chain(&error), "what is recorded of others' work stays"),
    }
}

/// Removes every trace of an object that is being deleted, and says so. While its store does not answer, the object stays
/// and says why: a name that stayed behind in the store could not be given again. Only a store whose own object is gone
/// keeps nobody waiting. What a transfer has brought to its destination stays there; an import takes its name back.
pub async fn abandon(node: &Arc<Node>, uid: &Uid, generation: Generation) -> Result<(), WorkError> {
    let subject = Subject::find(node, uid)?;
    let name = subject.name();
    let reservation_name = transfer_reservation_name(subject.kind(), &name.name, uid);
    let reservation = node.watches.assigned.find(|found| {
        found.name_any() == reservation_name && found.namespace().as_deref() == Some(name.namespace.as_str())
    });
    let place = reservation.as_ref().and_then(|found| {
        let pool = found.status.as_ref()?.assignment.as_ref()?.pool.as_deref()?;
        Some((node.pools.get(&pool.into())?, Uid::from(found.uid()?)))
    });
    let place = place.as_ref().map(|(pool, uid)| (&**pool, uid, Bytes::ZERO));
    let journal = Journal::new(Arc::clone(&node.record), uid.clone(), generation);
    let known = node.news.transfer(uid, &subject);
    let is_import = subject.kind() == TransferKind::Import;
    // What a transfer has left was gone before it was said to be done.
    if is_import || known.outcome.is_none() {
        let taken_back = take_back(node, &subject, generation, place, is_import).await;
        if let Err(error) = nothing_left(taken_back, known.attempts.is_some()) {
            tell_waiting(node, &subject, &error);
            return Err(error);
        }
    }
    journal.forget().await?;
    node.news.edit_transfer(uid, &subject, |news| {
        news.released_generation = Some(i64::try_from(generation.0).unwrap_or(i64::MAX));
    });
    Ok(())
}

/// What stands in the way of letting a deleted object go, after its traces were to be taken back.
fn nothing_left(taken_back: Result<(), WorkError>, began: bool) -> Result<(), WorkError> {
    match taken_back {
        Err(WorkError::Store(
            AccessError::Missing(_) | AccessError::Open { source: OpenError::Absent { .. }, .. },
        )) => Ok(()),
        // What names its credentials went before it, as in a namespace that goes.
        Err(WorkError::Credentials(error)) if error.is_gone() => Ok(()),
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
