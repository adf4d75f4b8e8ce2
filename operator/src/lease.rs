//! The Lease `berth-operator`: it gates sweeps and reclaim. Every replica admits, with it or without.
//!
//! Another holder counts as gone when its Lease did not change for its duration on this process's own clock; clocks of
//! two machines are never compared. Nothing that must be true rests on there being one leader only.
//!
//! It also tells every replica that the API server went back in time, as after an etcd restore: a Lease that is older than
//! when this replica last saw or wrote it cannot be explained otherwise. The holder takes it anew then, and who sees it taken
//! anew counts that the same, since the older Lease may have been written over before it could look. What is missed is a
//! restore to a state of less than one renewal ago.

use std::time::{Duration, Instant};

use berth_api::defaults::OPERATOR_LEASE;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client, Error};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::observe::version;
use crate::telemetry::chain;

/// For how long a Lease holds that is not renewed.
const DURATION: Duration = Duration::from_secs(15);
/// How often the holder renews, and the others look.
const RENEW: Duration = Duration::from_secs(4);
/// A holder that could not renew for this long counts itself out, before others count it out.
const DEADLINE: Duration = Duration::from_secs(10);
/// How long one request may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// A candidate.
pub struct Candidate {
    leases: Api<Lease>,
    identity: String,
    leader: watch::Sender<bool>,
    /// The Lease as it was last seen, and since when it looks like that.
    seen: Option<(Lease, Instant)>,
    renewed: Option<Instant>,
    /// The API server went back in time since the Lease was last written.
    set_back: bool,
}

impl Candidate {
    /// A candidate of this name, and whether it leads.
    pub fn new(client: Client, namespace: &str, identity: &str) -> (Self, watch::Receiver<bool>) {
        let (leader, is_leader) = watch::channel(false);
        let leases = Api::namespaced(client, namespace);
        let identity = identity.to_owned();
        (Self { leases, identity, leader, seen: None, renewed: None, set_back: false }, is_leader)
    }

    /// Runs until `stop`, then gives the Lease back. Calls `went_back` whenever the API server went back in time.
    pub async fn run(mut self, stop: CancellationToken, went_back: impl Fn()) {
        let mut ticks = tokio::time::interval(RENEW);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            match tokio::time::timeout(PATIENCE, self.round(&went_back)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::warn!(error = chain(&error), "the Lease could not be read or renewed");
                }
                Err(_) => tracing::warn!("the API server did not answer about the Lease in time"),
            }
            let holds = self.renewed.is_some_and(|at| at.elapsed() < DEADLINE);
            self.lead(holds);
        }
        self.give_back().await;
    }

    fn lead(&self, leads: bool) {
        let changed = self.leader.send_if_modified(|is| std::mem::replace(is, leads) != leads);
        if changed {
            tracing::info!(leader = leads, "leadership changed");
        }
    }

    /// Looks, and takes or renews the Lease if that is due.
    async fn round(&mut self, went_back: impl Fn()) -> Result<(), Error> {
        let found = self.leases.get_opt(OPERATOR_LEASE).await?;
        let now = Instant::now();
        if self.seen.as_ref().is_some_and(|(seen, _)| was_set_back(seen, found.as_ref(), &self.identity)) {
            went_back();
            (self.set_back, self.seen) = (true, None);
        }
        let Some(found) = found else {
            let lease = Lease {
                metadata: ObjectMeta { name: Some(OPERATOR_LEASE.to_owned()), ..ObjectMeta::default() },
                spec: Some(self.held(None)),
            };
            return self.written(self.leases.create(&PostParams::default(), &lease).await);
        };
        let unchanged = self
            .seen
            .as_ref()
            .filter(|(lease, _)| lease.metadata.resource_version == found.metadata.resource_version);
        let since = unchanged.map_or(now, |(_, since)| *since);
        self.seen = Some((found.clone(), since));
        let spec = found.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        let seconds = spec.lease_duration_seconds.map_or(DURATION.as_secs(), |s| u64::from(s.unsigned_abs()));
        let lapsed = now.duration_since(since) >= Duration::from_secs(seconds.min(300));
        if holder != self.identity {
            self.renewed = None;
        }
        if holder.is_empty() || holder == self.identity || lapsed {
            let lease = Lease { metadata: found.metadata, spec: Some(self.held(Some(&spec))) };
            let result = self.leases.replace(OPERATOR_LEASE, &PostParams::default(), &lease).await;
            return self.written(result);
        }
        Ok(())
    }

    /// Losing the race for the Lease is no fault.
    fn written(&mut self, result: Result<Lease, Error>) -> Result<(), Error> {
        match result {
            Ok(lease) => {
                self.renewed = Some(Instant::now());
                self.seen = Some((lease, Instant::now()));
                self.set_back = false;
                Ok(())
            }
            Err(Error::Api(status)) if status.code == 409 => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn held(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let time = MicroTime(Timestamp::now());
        let ours = before
            .filter(|spec| !self.set_back && spec.holder_identity.as_deref() == Some(self.identity.as_str()));
        let turns = before.and_then(|spec| spec.lease_transitions).unwrap_or_default();
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: ours.and_then(|spec| spec.acquire_time.clone()).or_else(|| Some(time.clone())),
            renew_time: Some(time),
            lease_transitions: Some(if ours.is_some() { turns } else { turns.saturating_add(1) }),
            ..LeaseSpec::default()
        }
    }

    /// So that the next one need not wait.
    async fn give_back(&mut self) {
        self.lead(false);
        let Some((mut lease, _)) = self.seen.take().filter(|_| self.renewed.is_some()) else { return };
        if let Some(spec) = lease.spec.as_mut() {
            spec.holder_identity = Some(String::new());
            spec.lease_duration_seconds = Some(1);
        }
        let params = PostParams::default();
        let release = self.leases.replace(OPERATOR_LEASE, &params, &lease);
        match tokio::time::timeout(Duration::from_secs(3), release).await {
            Ok(Ok(_)) => tracing::info!("the Lease was given back"),
            Ok(Err(error)) => tracing::warn!(error = chain(&error), "the Lease could not be given back"),
            Err(_) => tracing::warn!("the Lease could not be given back in time"),
        }
    }
}

/// True if the API server went back in time since the Lease was `seen`, or if its holder may have noticed that it did.
fn was_set_back(seen: &Lease, found: Option<&Lease>, identity: &str) -> bool {
    let Some(found) = found else { return true };
    let acquired = |lease: &Lease| lease.spec.as_ref().and_then(|spec| spec.acquire_time.clone());
    let held_by_us = found.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()) == Some(identity);
    found.metadata.uid != seen.metadata.uid
        || version(&found.metadata) < version(&seen.metadata)
        || (!held_by_us && acquired(found) != acquired(seen))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(uid: &str, version: u32, holder: &str, acquired: i64) -> Lease {
        let time = Timestamp::from_second(acquired).map(MicroTime).ok();
        let spec = LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            acquire_time: time,
            ..LeaseSpec::default()
        };
        let metadata = ObjectMeta {
            uid: Some(uid.to_owned()),
            resource_version: Some(version.to_string()),
            ..ObjectMeta::default()
        };
        Lease { metadata, spec: Some(spec) }
    }

    #[test]
    fn a_lease_that_is_older_than_it_was_shows_a_restore() {
        let seen = lease("a", 10, "us", 1);
        let shows = |found: Option<Lease>| was_set_back(&seen, found.as_ref(), "us");
        assert!(!shows(Some(lease("a", 10, "us", 1))));
        assert!(!shows(Some(lease("a", 11, "us", 1))), "renewed");
        assert!(shows(Some(lease("a", 9, "us", 1))), "older");
        assert!(shows(Some(lease("a", 9, "other", 0))), "older, and of a holder before us");
        assert!(shows(Some(lease("b", 11, "us", 1))), "another one");
        assert!(shows(None), "from before it was made");
    }

    #[test]
    fn who_does_not_hold_it_follows_the_holder() {
        let seen = lease("a", 10, "other", 1);
        let shows = |found: Lease| was_set_back(&seen, Some(&found), "us");
        assert!(!shows(lease("a", 12, "other", 1)), "renewed");
        assert!(shows(lease("a", 12, "other", 2)), "taken anew");
        assert!(!shows(lease("a", 12, "us", 2)), "taken by us");
    }
}
