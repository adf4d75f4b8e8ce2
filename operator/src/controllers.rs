//! One file per kind: which changes concern its objects, and which decision is asked. Nothing else.

mod image_store;
mod image_transfer;
mod pool;
mod reservation;
mod staged_image;
mod staging_ledger;
mod template_import;
mod transfers;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use berth_api::{
    ImageStore, ImageTransfer, StagedImage, StagingLedger, StagingPool, StagingReservation, TemplateImport,
};
use berth_core::change::Change;
use berth_core::ids::{PoolName, Uid};
use berth_core::metric::Metric;
use berth_core::units::Timestamp;
use berth_core::view::View;
use futures::{FutureExt as _, StreamExt as _};
use kube::runtime::controller::{Action, Config, Error, applier};
use kube::runtime::reflector::ObjectRef;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission;
use crate::apply::{ApplyError, Outcome};
use crate::context::{Context, now};
use crate::observe::{Observed, Observer, Touched, name_of};
use crate::telemetry::chain;

/// How many objects of one kind are worked on at once.
const CONCURRENCY: u16 = 8;
/// Everything is looked at again after this long, whatever happens.
const SLOW: Duration = Duration::from_mins(1);
/// How often one pass may look again at once, after writes of its own.
const ROUNDS: usize = 8;
/// The longest pause after faults in a row.
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

/// A kind whose objects are decided about.
pub trait Controlled: Observed {
    /// Its name in logs and metrics.
    const KIND: &'static str;
    /// How many objects are worked on at once.
    const AT_ONCE: u16 = CONCURRENCY;
    /// How long to wait with the next look at it, of which there may be so many only.
    fn pause(&self, _: &Context) -> Option<Duration> {
        None
    }
    /// Set if it waits for a place: its UID, and the pools that it may go to.
    fn asks(&self, _: &View) -> Option<(Uid, BTreeSet<PoolName>)> {
        None
    }
    /// The writes that the view calls for.
    fn decide(&self, view: &View, now: Timestamp) -> Vec<Change>;
    /// Its objects that a change of something concerns.
    fn affected(view: &View, touched: &Touched) -> Vec<ObjectRef<Self>>;
}

/// Queues every object of every kind that this concerns.
pub fn queue_affected(observer: &Observer, view: &View, touched: &Touched) {
    queue::<StagingPool>(observer, view, touched);
    queue::<StagingReservation>(observer, view, touched);
    queue::<TemplateImport>(observer, view, touched);
    queue::<StagedImage>(observer, view, touched);
    queue::<ImageStore>(observer, view, touched);
    queue::<ImageTransfer>(observer, view, touched);
    queue::<StagingLedger>(observer, view, touched);
}

fn queue<K: Controlled>(observer: &Observer, view: &View, touched: &Touched) {
    let objects = match touched {
        Touched::Everything => {
            K::objects(observer).all().iter().map(|object| ObjectRef::from_obj(&**object)).collect()
        }
        _ => K::affected(view, touched),
    };
    for object in objects {
        K::objects(observer).queue(object);
    }
}

/// Starts every controller. On `stop` they finish what they are at and take nothing new.
pub fn start(context: &Arc<Context>, tasks: &TaskTracker, stop: &CancellationToken) {
    for _ in 0..admission::LANES {
        let (context, stop) = (context.clone(), stop.clone());
        tasks.spawn(async move { admission::run(&context, &stop).await });
    }
    spawn::<StagingPool>(context, tasks, stop);
    spawn::<StagingReservation>(context, tasks, stop);
    spawn::<TemplateImport>(context, tasks, stop);
    spawn::<StagedImage>(context, tasks, stop);
    spawn::<ImageStore>(context, tasks, stop);
    spawn::<ImageTransfer>(context, tasks, stop);
    spawn::<StagingLedger>(context, tasks, stop);
}

fn spawn<K: Controlled>(context: &Arc<Context>, tasks: &TaskTracker, stop: &CancellationToken) {
    let Some(queued) = K::objects(&context.observer).take_queue() else { return };
    let queue = queued.map(Ok::<_, std::convert::Infallible>).take_until(stop.clone().cancelled_owned());
    let (context, stop) = (context.clone(), stop.clone());
    tasks.spawn(async move {
        if stop.run_until_cancelled(context.observer.wait_until_synced()).await.is_none() {
            return;
        }
        let store = K::objects(&context.observer).reader.clone();
        let config = Config::default().concurrency(K::AT_ONCE);
        applier(
            |object, context| reconcile(object, context).boxed(),
            after_error,
            context.clone(),
            store,
            queue,
            config,
        )
        .for_each(|result| {
            report(K::KIND, &context, result.map(drop));
            futures::future::ready(())
        })
        .await;
    });
}

fn report<Q: std::error::Error + 'static>(
    kind: &str,
    context: &Context,
    result: Result<(), Error<ApplyError, Q>>,
) {
    let outcome = match &result {
        Ok(()) => "ok",
        Err(Error::ReconcilerFailed(ApplyError::Conflict { .. }, _)) => "conflict",
        Err(Error::ObjectNotFound(_)) => return,
        Err(_) => "error",
    };
    context.metrics.add(Metric::ReconcileTotal, &[("kind", kind), ("outcome", outcome)], 1);
    match result {
        Err(Error::ReconcilerFailed(error @ ApplyError::Conflict { .. }, _)) => {
            tracing::debug!(kind, error = chain(&error), "looked at again");
        }
        Err(error) => tracing::warn!(kind, error = chain(&error), "could not be carried out; tried again"),
        Ok(()) => {}
    }
}

/// Decides and applies until nothing more is to be written, or somebody else was faster.
async fn reconcile<K: Controlled>(object: Arc<K>, context: Arc<Context>) -> Result<Action, ApplyError> {
    if context.observer.view(|view| view.unreadable_object(&uid_of(&*object)).is_some()) {
        return Ok(Action::await_change()); // what is known of it is not what it is
    }
    if let Some(pause) = object.pause(&context) {
        return Ok(Action::requeue(pause));
    }
    let mut after = SLOW;
    for _ in 0..ROUNDS {
        let outcome = pass(&*object, &context).await?;
        after = outcome.retry.map_or(SLOW, |millis| Duration::from_millis(millis).min(SLOW));
        if !outcome.wrote {
            break;
        }
    }
    context.forget_failures(K::KIND, &name_of(object.meta()));
    Ok(Action::requeue(after))
}

fn uid_of<K: Controlled>(object: &K) -> Uid {
    Uid(object.meta().uid.clone().unwrap_or_default())
}

/// One pass: what waits for a place is decided about together with others.
async fn pass<K: Controlled>(object: &K, context: &Context) -> Result<Outcome, ApplyError> {
    if let Some((uid, pools)) = context.observer.view(|view| object.asks(view)) {
        return context.admission.ask(uid, pools).await.unwrap_or(Ok(Outcome::default()));
    }
    context.decide_and_apply(|view, now| object.decide(view, now)).await
}

/// A conflict is looked at again at once, with a little jitter; anything else after pauses that double.
#[allow(clippy::needless_pass_by_value)] // the signature that the controller asks for
fn after_error<K: Controlled>(object: Arc<K>, error: &ApplyError, context: Arc<Context>) -> Action {
    let jitter = Duration::from_millis(5 + now().0 % 40);
    if matches!(error, ApplyError::Conflict { .. }) {
        return Action::requeue(jitter);
    }
    let failures = context.count_failure(K::KIND, &name_of(object.meta()));
    let pause = Duration::from_millis(500).saturating_mul(1 << failures.min(8));
    Action::requeue(pause.min(LONGEST_PAUSE) + jitter)
}

/// A reference to a namespaced object, or, without a namespace, to a cluster-scoped one.
fn reference<K: Controlled>(name: &berth_core::ids::ObjectName) -> ObjectRef<K> {
    let reference = ObjectRef::new(&name.name);
    if name.namespace.is_empty() { reference } else { reference.within(&name.namespace) }
}
