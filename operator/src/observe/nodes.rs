//! Which nodes are live, and whose reports may be trusted.
//!
//! A node is live while its Lease is seen to change, on this process's own clock: clocks are never compared. A node has
//! *reported* once its Lease was seen to be renewed since this operator began to watch, and its report was read again,
//! from the API server's current state, after that. A node writes its report before it renews its Lease, so what is
//! read then is at least as new as this operator's start.
//!
//! A node falls silent only while this operator listens: see [`Listening`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_api::StagingNode;
use berth_api::defaults::NODE_LEASE_DURATION_SECONDS;
use berth_core::ids::{NodeName, node_lease_name};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::watcher::Event;
use kube::{Api, ResourceExt as _};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::kind::Source;
use super::{Confirmations, Observer, State, Touched, history, kind};
use crate::telemetry::chain;

/// What all node Leases' names begin with.
const PREFIX: &str = "berth-node-";
/// How long one request may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many reports are read at once.
const READS: usize = 16;
/// How often it is checked whether a node fell silent.
const CHECK: Duration = Duration::from_secs(1);

/// For how long no Lease may change before this operator is taken to hear nothing. The operators' own Lease, which is
/// among them, changes every 4 s; half of what a node's Lease lasts is left.
const QUIET: Duration = Duration::from_secs(20);

/// The clock that nodes' silence is measured by. It stands still while no Lease at all is seen to change, not even the
/// operators' own: then the API server is away, or the way to it, and no node is lost by that.
#[derive(Clone, Copy, Debug, Default)]
pub struct Listening {
    last: Option<Instant>,
    deaf: Duration,
}

impl Listening {
    /// `now`, less the time in which nothing was heard.
    fn at(&self, now: Instant) -> Instant {
        let heard_until = self.last.map_or(now, |last| now.min(last + QUIET));
        heard_until.checked_sub(self.deaf).unwrap_or(heard_until)
    }

    /// A Lease was seen.
    fn hear(&mut self, now: Instant) {
        let silence = self.last.map_or(Duration::ZERO, |last| now.duration_since(last));
        self.deaf += silence.saturating_sub(QUIET);
        self.last = Some(now);
    }
}

/// A node's Lease, as it was heard, by the clock of [`Listening`].
#[derive(Clone, Debug)]
pub struct Heard {
    renewed: Option<Timestamp>,
    lasts: Duration,
    /// When the renewal was seen; `None` while only its first form is known, which may be of any age.
    at: Option<Instant>,
    /// Since when nothing else was heard.
    since: Instant,
}

impl Heard {
    fn is_live(&self, now: Instant) -> bool {
        self.at.is_some_and(|at| now.duration_since(at) < self.lasts)
    }

    /// True if it was listened for as long as the Lease lasts, and nothing came.
    fn is_silent(&self, now: Instant) -> bool {
        !self.is_live(now) && now.duration_since(self.since) >= self.lasts
    }

    /// `lease` after this, seen at `now`. A form never seen before proves life only if it was not there at the start.
    fn next(before: Option<&Self>, lease: &Lease, listed: bool, now: Instant) -> Self {
        let spec = lease.spec.clone().unwrap_or_default();
        let renewed = spec.renew_time.map(|time| time.0);
        let seconds = spec.lease_duration_seconds.unwrap_or(NODE_LEASE_DURATION_SECONDS).clamp(1, 300);
        let lasts = Duration::from_secs(u64::from(seconds.unsigned_abs()));
        let at = match before {
            Some(before) if before.renewed == renewed => before.at,
            Some(_) => Some(now),
            None => (!listed).then_some(now),
        };
        let since = before.filter(|before| before.renewed == renewed).map_or(now, |before| before.since);
        Self { renewed, lasts, at, since }
    }
}

/// Starts the watch of node Leases, the check for silent nodes, and the confirmation of reports.
pub fn spawn(
    observer: &Arc<Observer>,
    confirmations: Confirmations,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) {
    let (one, token) = (observer.clone(), stop.clone());
    tasks.spawn(async move { token.run_until_cancelled(watch(&one)).await });
    let (one, token) = (observer.clone(), stop.clone());
    tasks.spawn(async move { token.run_until_cancelled(check(&one)).await });
    let (one, token) = (observer.clone(), stop.clone());
    tasks.spawn(async move { token.run_until_cancelled(confirm(&one, confirmations)).await });
}

/// Brings `live` and `reported` of a node that has just been entered up to date.
pub fn judge(state: &mut State, node: &NodeName) {
    let now = state.listening.at(Instant::now());
    let State { view, heard, confirmed, .. } = state;
    let heard = heard.get(&node_lease_name(node));
    if let Some(entry) = view.nodes.get_mut(node) {
        entry.live = heard.is_some_and(|heard| heard.is_live(now));
        entry.silent = heard.is_some_and(|heard| heard.is_silent(now));
        entry.reported = confirmed.contains(node);
    }
}

/// After the API server went back in time: no report counts until it was made anew.
pub fn forget_reports(state: &mut State) {
    state.confirmed.clear();
    state.view.kube_nodes = None;
    state.view.unheard = true;
    // A Lease that a list shows proves nothing then, though it is not the one that was heard last.
    state.heard.clear();
    for node in state.view.nodes.values_mut() {
        (node.live, node.reported, node.silent) = (false, false, false);
    }
}

async fn watch(observer: &Observer) {
    let api: Api<Lease> = Api::namespaced(observer.client.clone(), &observer.namespace);
    let events = history::events(observer, api);
    let mut events = std::pin::pin!(events);
    let (mut first, mut listing) = (true, Vec::new());
    loop {
        match events.try_next().await {
            Ok(Some(Event::Init)) => listing.clear(),
            Ok(Some(Event::InitApply(lease))) => listing.push(lease),
            Ok(Some(Event::InitDone)) => {
                observer
                    .write()
                    .heard
                    .retain(|name, _| listing.iter().any(|lease| lease.name_any() == *name));
                // A list is heard, too, also an empty one.
                observer.write().listening.hear(Instant::now());
                listing.drain(..).for_each(|lease| hear(observer, &lease, true));
                if std::mem::take(&mut first) {
                    observer.one_synced();
                }
            }
            Ok(Some(Event::Apply(lease))) => hear(observer, &lease, false),
            Ok(Some(Event::Delete(lease))) => {
                observer.write().heard.remove(&lease.name_any());
            }
            Ok(None) => return,
            Err(error) => tracing::warn!(kind = "Lease", error = chain(&error), "watch interrupted"),
        }
    }
}

fn hear(observer: &Observer, lease: &Lease, listed: bool) {
    let name = lease.name_any();
    {
        let now = Instant::now();
        let mut state = observer.write();
        state.listening.hear(now);
        if !name.starts_with(PREFIX) {
            return;
        }
        let now = state.listening.at(now);
        let heard = Heard::next(state.heard.get(&name), lease, listed, now);
        state.heard.insert(name, heard);
    }
    if let Some(node) = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()) {
        settle(observer, Some(&NodeName::from(node)));
    }
}

/// Compares nodes with their Leases, all or one; tells what changed, and asks for reports to be confirmed.
fn settle(observer: &Observer, only: Option<&NodeName>) {
    let mut changed = Vec::new();
    {
        let mut state = observer.write();
        let now = state.listening.at(Instant::now());
        let State { view, heard, confirmed, confirming, .. } = &mut *state;
        for (name, node) in view.nodes.iter_mut().filter(|(name, _)| only.is_none_or(|only| only == *name)) {
            let heard = heard.get(&node_lease_name(name));
            let live = heard.is_some_and(|heard| heard.is_live(now));
            let silent = heard.is_some_and(|heard| heard.is_silent(now));
            let asks = live && !confirmed.contains(name) && !confirming.contains(name);
            if asks && observer.confirm.try_send(name.clone()).is_ok() {
                confirming.insert(name.clone());
            }
            if (node.live, node.silent) != (live, silent) {
                (node.live, node.silent) = (live, silent);
                tracing::info!(node = %name, live, silent, "node liveness changed");
                changed.push(name.clone());
            }
        }
    }
    for node in changed {
        observer.touch(&Touched::Node(node));
    }
}

async fn check(observer: &Observer) {
    let mut ticks = tokio::time::interval(CHECK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        settle(observer, None);
    }
}

async fn confirm(observer: &Observer, confirmations: Confirmations) {
    let waiting = stream::unfold(confirmations, async |mut waiting| Some((waiting.recv().await?, waiting)));
    waiting
        .for_each_concurrent(READS, async |node| {
            confirm_one(observer, &node).await;
            observer.write().confirming.remove(&node);
        })
        .await;
}

/// Reads a node's report from the API server itself: it is no older than the renewal that was heard.
async fn confirm_one(observer: &Observer, node: &NodeName) {
    let api: Api<StagingNode> = Api::all(observer.client.clone());
    let times = *observer.restarts.borrow();
    let answer = match tokio::time::timeout(PATIENCE, api.get(node.as_str())).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => {
            return tracing::warn!(%node, error = chain(&error), "the node's report could not be read again");
        }
        Err(_) => return tracing::warn!(%node, "the API server did not answer about the node's report"),
    };
    kind::enter(observer, answer, Source::Answer);
    {
        let mut state = observer.write();
        if *observer.restarts.borrow() != times {
            return; // the answer may be of before a restore
        }
        state.confirmed.insert(node.clone());
        judge(&mut state, node);
    }
    tracing::info!(%node, "node has reported");
    observer.touch(&Touched::Node(node.clone()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::coordination::v1::LeaseSpec;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;

    fn lease(second: i64) -> Lease {
        let renew_time = Some(MicroTime(Timestamp::from_second(second).expect("in range")));
        Lease {
            spec: Some(LeaseSpec { renew_time, lease_duration_seconds: Some(40), ..LeaseSpec::default() }),
            ..Lease::default()
        }
    }

    #[test]
    fn a_lease_found_at_the_start_proves_nothing_until_it_changes() {
        let start = Instant::now();
        let found = Heard::next(None, &lease(100), true, start);
        assert!(!found.is_live(start) && !found.is_silent(start + Duration::from_secs(39)));
        assert!(
            found.is_silent(start + Duration::from_secs(40)),
            "it was listened to for as long as it lasts"
        );
        let again = Heard::next(Some(&found), &lease(100), false, start);
        assert!(!again.is_live(start), "the same renewal seen twice is no renewal");
        let renewed = Heard::next(Some(&again), &lease(50), false, start);
        assert!(renewed.is_live(start), "a change counts, whatever the node's clock says");
        assert!(renewed.is_live(start + Duration::from_secs(39)));
        assert!(!renewed.is_live(start + Duration::from_secs(40)));
        let late = start + Duration::from_secs(50);
        assert!(
            renewed.is_silent(late) && !Heard::next(Some(&renewed), &lease(60), false, late).is_silent(late)
        );
    }

    #[test]
    fn nobody_falls_silent_while_nothing_is_heard() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut listening = Listening::default();
        listening.hear(start);
        let node = Heard::next(None, &lease(1), false, listening.at(start));
        assert!(node.is_live(listening.at(after(1000))), "the API server is away");
        listening.hear(after(1000));
        assert!(node.is_live(listening.at(after(1000))), "it is back, and the node had no time to say so");
        for second in (1004..1020).step_by(4) {
            listening.hear(after(second));
        }
        assert!(node.is_live(listening.at(after(1019))));
        assert!(!node.is_live(listening.at(after(1020))) && node.is_silent(listening.at(after(1020))));
    }

    #[test]
    fn a_lease_made_while_we_watch_proves_life() {
        let now = Instant::now();
        assert!(Heard::next(None, &lease(1), false, now).is_live(now));
    }
}
