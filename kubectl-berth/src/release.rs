//! `kubectl berth release`: a reservation ends, and its space is given back.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use berth_api::StagingReservation;
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;

use crate::args::{Output, ReleaseArgs};

/// Between two looks of `--wait`.
const PAUSE: Duration = Duration::from_millis(500);

/// Deletes the reservation; with `--wait` until it is gone, which is after its node has given the bytes back.
///
/// # Errors
/// If it is not there, or cannot be read or deleted.
pub async fn run(client: &Client, args: &ReleaseArgs) -> anyhow::Result<ExitCode> {
    let namespace = args.namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
    let api = Api::<StagingReservation>::namespaced(client.clone(), &namespace);
    let name = format!("{namespace}/{}", args.name);
    let failed = || format!("could not read StagingReservation {name}");
    let found = api.get_opt(&args.name).await.with_context(failed)?;
    let found = found
        .with_context(|| format!("there is no StagingReservation {} in namespace {namespace}", args.name))?;
    // With the UID, so that another reservation that got its name meanwhile stays.
    let preconditions = Some(Preconditions { uid: found.uid(), resource_version: None });
    let params = DeleteParams { preconditions, ..DeleteParams::default() };
    let deleted = api.delete(&args.name, &params).await;
    deleted.with_context(|| format!("could not delete StagingReservation {name}"))?;
    let gone = args.waiting.wait && wait(&api, &found, args.waiting.at_most()).await?;
    match args.output {
        Output::Table if gone => println!("reservation {name} is gone, and its space is free"),
        Output::Table => println!("reservation {name} goes once its node has given the space back"),
        Output::Json => println!("{:#}", json!({"name": name, "gone": gone})),
    }
    Ok(if args.waiting.wait && !gone { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

/// Whether it is gone in time. Says what it waits for, on standard error, whenever that changes.
async fn wait(
    api: &Api<StagingReservation>,
    deleted: &StagingReservation,
    at_most: Option<Duration>,
) -> anyhow::Result<bool> {
    let (name, begun) = (deleted.name_any(), Instant::now());
    let mut told = String::new();
    loop {
        let found = api.get_opt(&name).await.with_context(|| format!("could not read {name}"))?;
        let Some(found) = found.filter(|found| found.uid() == deleted.uid()) else { return Ok(true) };
        if at_most.is_some_and(|most| begun.elapsed() >= most) {
            return Ok(false);
        }
        let now = told_by(&found);
        if now != told {
            eprintln!("{now}");
            told = now;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Its state, and what does not hold of it.
fn told_by(reservation: &StagingReservation) -> String {
    let status = reservation.status.clone().unwrap_or_default();
    let state = status.state.map_or("Pending".to_owned(), |state| format!("{state:?}"));
    let waits = status.conditions.iter().filter(|condition| condition.status != "True");
    let waits: Vec<String> = waits
        .filter(|condition| !condition.message.is_empty())
        .map(|condition| format!("{}: {}", condition.reason, condition.message))
        .collect();
    if waits.is_empty() { state } else { format!("{state}: {}", waits.join("; ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a41_what_a_release_waits_for_is_told() {
        let mut reservation: StagingReservation = serde_json::from_value(json!({
            "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation",
            "metadata": {"name": "r", "namespace": "ns"}, "spec": {"maxSize": "1Gi"},
        }))
        .expect("readable");
        assert_eq!(told_by(&reservation), "Pending");
        reservation.status = serde_json::from_value(json!({
            "state": "Releasing",
            "conditions": [{
                "type": "Ready", "status": "False", "reason": "InUse", "message": "pod a/b uses it",
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }],
        }))
        .expect("a status");
        assert_eq!(told_by(&reservation), "Releasing: InUse: pod a/b uses it");
    }
}
