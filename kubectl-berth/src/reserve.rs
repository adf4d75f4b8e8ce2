//! `kubectl berth reserve`: a reservation is made, and waited for.

use std::fmt;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use berth_api::StagingReservation;
use berth_api::conditions::{ConditionType, find};
use berth_api::fields::{Span, WhenFull};
use berth_api::staging_reservation::{ReservationState, StagingReservationStatus};
use berth_core::units::Bytes;
use kube::api::PostParams;
use kube::{Api, Client, ResourceExt as _};
use serde::Serialize;
use serde_json::json;

use crate::args::{self, Output, ReserveArgs};
use crate::fit::request::spec;

/// Who writes, as the API server records it.
const MANAGER: &str = "kubectl-berth";
/// Between two looks of `--wait`.
const PAUSE: Duration = Duration::from_millis(500);

/// How far a reservation is. What is not known is left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Progress {
    state: ReservationState,
    #[serde(skip_serializing_if = "Option::is_none")]
    pool: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<String>,
    /// Its position among those that wait, from 1, and the bytes before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    queue: Option<(i32, Bytes)>,
    /// How much of its file is there, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    percent: Option<i32>,
    reason: String,
    message: String,
}

impl Progress {
    fn of(status: &StagingReservationStatus) -> Self {
        let state = status.state.unwrap_or(ReservationState::Pending);
        let told = |kind| find(&status.conditions, kind).filter(|condition| condition.status != "True");
        // The node speaks last, once there is a place.
        let told = told(ConditionType::Promised).or_else(|| told(ConditionType::Ready));
        let told = told.filter(|_| state != ReservationState::Ready);
        let place = status.assignment.as_ref();
        Self {
            state,
            pool: place.and_then(|place| place.pool.clone()),
            node: place.map(|place| place.node.clone()),
            queue: status.queue.as_ref().map(|queue| (queue.position, Bytes::from_i64(queue.bytes_ahead))),
            percent: status.progress.as_ref().and_then(|progress| progress.percent),
            reason: told.map(|condition| condition.reason.clone()).unwrap_or_default(),
            message: told.map(|condition| condition.message.clone()).unwrap_or_default(),
        }
    }

    const fn is_over(&self) -> bool {
        matches!(
            self.state,
            ReservationState::Ready | ReservationState::Refused | ReservationState::Releasing
        )
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.state)?;
        if let (Some(pool), Some(node)) = (&self.pool, &self.node) {
            write!(f, " in pool {pool} on node {node}")?;
        }
        if let Some((position, ahead)) = self.queue {
            write!(f, ", no. {position} in line, {ahead} ahead")?;
        }
        if let Some(percent) = self.percent {
            write!(f, ", {percent} %")?;
        }
        match (self.reason.as_str(), self.message.as_str()) {
            ("", _) => Ok(()),
            (reason, "") => write!(f, ": {reason}"),
            (reason, message) => write!(f, ": {reason}: {message}"),
        }
    }
}

/// Makes the reservation; with `--wait` says how it goes on, on standard error, until it is over.
///
/// # Errors
/// If it cannot be made or read, or somebody else removes it while it is waited for.
pub async fn run(client: &Client, args: &ReserveArgs) -> anyhow::Result<ExitCode> {
    let namespace = args.namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
    let api = Api::<StagingReservation>::namespaced(client.clone(), &namespace);
    let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
    let name = format!("{namespace}/{}", args.name);
    let made = api.create(&params, &reservation(args)).await;
    let made = made.with_context(|| format!("could not make StagingReservation {name}"))?;
    if !args.waiting.wait {
        match args.output {
            Output::Table => {
                println!("reservation {name} is made; `kubectl berth explain` says how it goes on");
            }
            Output::Json => println!("{:#}", json!({"name": name})),
        }
        return Ok(ExitCode::SUCCESS);
    }
    let progress = follow(&api, &made, args.waiting.at_most()).await?;
    match args.output {
        Output::Table => println!("reservation {name} is {progress}"),
        Output::Json => println!("{:#}", json!({"name": name, "progress": progress})),
    }
    Ok(match progress.state {
        ReservationState::Ready => ExitCode::SUCCESS,
        ReservationState::Refused => ExitCode::from(2),
        _ => ExitCode::from(1),
    })
}

fn reservation(args: &ReserveArgs) -> StagingReservation {
    let when_full = args.when_full.map(|when_full| match when_full {
        args::WhenFull::Queue => WhenFull::Queue,
        args::WhenFull::Reject => WhenFull::Reject,
    });
    let mut spec = spec(&args.flags);
    (spec.when_full, spec.ttl) = (when_full, args.ttl.clone().map(Span));
    StagingReservation::new(&args.name, spec)
}

/// Looks until it is over or the time is, and tells each change.
async fn follow(
    api: &Api<StagingReservation>,
    made: &StagingReservation,
    at_most: Option<Duration>,
) -> anyhow::Result<Progress> {
    let (name, begun) = (made.name_any(), Instant::now());
    let mut told = None;
    loop {
        let found = api.get_opt(&name).await.with_context(|| format!("could not read {name}"))?;
        let found = found.filter(|found| found.uid() == made.uid());
        let found = found.with_context(|| format!("reservation {name} was removed meanwhile"))?;
        let progress = Progress::of(&found.status.unwrap_or_default());
        if progress.is_over() || at_most.is_some_and(|most| begun.elapsed() >= most) {
            return Ok(progress);
        }
        if told.as_ref() != Some(&progress) {
            eprintln!("{progress}");
            told = Some(progress);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Args, ClusterCommand, Command};
    use clap::Parser as _;

    #[test]
    fn a41_the_reservation_is_what_the_flags_say() {
        let words = "kubectl-berth reserve room --size 5Gi --pool fast --when-full Reject --ttl 2h --node n1";
        let parsed = Args::try_parse_from(words.split(' ')).expect("valid");
        let Command::Cluster(ClusterCommand::Reserve(args)) = parsed.command else {
            panic!("another command")
        };
        let made = serde_json::to_value(reservation(&args)).expect("an object");
        assert_eq!(made["metadata"]["name"], "room");
        assert_eq!(
            made["spec"],
            json!({
                "poolName": "fast", "maxSize": "5Gi", "access": "File", "nodeName": "n1", "whenFull": "Reject",
                "ttl": "2h", "dryRun": false,
            })
        );
    }

    #[test]
    fn it_says_what_it_waits_for_and_where_it_is() {
        let status = |status| Progress::of(&serde_json::from_value(status).expect("a status"));
        let condition = |kind: &str, truth: &str, reason: &str| {
            json!({
                "type": kind, "status": truth, "reason": reason, "message": "so it is",
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            })
        };
        let waits = status(json!({
            "state": "Queued", "queue": {"position": 2, "bytesAhead": 1 << 30, "reason": "PoolFull"},
            "conditions": [condition("Promised", "False", "PoolFull")],
        }));
        assert_eq!(waits.to_string(), "Queued, no. 2 in line, 1 GiB ahead: PoolFull: so it is");
        assert!(!waits.is_over());
        let filling = status(json!({
            "state": "Promised", "assignment": {"pool": "fast", "node": "n1", "generation": 1},
            "conditions": [condition("Promised", "True", "Promised"), condition("Ready", "False", "Progressing")],
        }));
        assert_eq!(filling.to_string(), "Promised in pool fast on node n1: Progressing: so it is");
        let ready = status(json!({
            "state": "Ready", "assignment": {"pool": "fast", "node": "n1", "generation": 1},
            "conditions": [condition("Promised", "True", "Promised"), condition("Ready", "False", "Progressing")],
        }));
        assert_eq!((ready.to_string().as_str(), ready.is_over()), ("Ready in pool fast on node n1", true));
        assert_eq!(status(json!({"conditions": []})).to_string(), "Pending");
    }
}
