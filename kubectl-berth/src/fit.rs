//! `kubectl berth fit`: what would become of a request, by the operator's own code over the live objects.

pub mod request;

use std::process::ExitCode;

use berth_api::parse::reservation_view;
use berth_core::reservation::{Outcome, fit};
use berth_core::table::Table;
use berth_core::units::{Bytes, Timestamp};
use berth_core::view::{ReservationView, View};
use kube::Client;
use serde::Serialize;

use crate::args::{FitArgs, Output};
use crate::observe::{Scope, look, namespaces};
use crate::server;
use crate::text::{fact, wrapped};
use request::request;

/// What would become of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
enum Verdict {
    /// It would be promised now.
    Fits,
    /// It would wait.
    Waits,
    /// It would be refused.
    Refused,
}

/// The answer. Sizes in bytes; what does not apply is left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    result: Verdict,
    reason: String,
    message: String,
    /// Where it would be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pool: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<String>,
    /// The most that would be promised, the image included where it is not there yet.
    peak_bytes: Bytes,
    /// Its position among those that wait, from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    position: Option<u32>,
    /// What those before it ask for.
    bytes_ahead: Bytes,
    /// What is missing where least is.
    #[serde(skip_serializing_if = "Option::is_none")]
    shortfall_bytes: Option<Bytes>,
    /// Staged images that would go first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    reclaims: Vec<String>,
    candidates: Vec<Place>,
}

/// A place that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Place {
    pool: String,
    node: String,
    chosen: bool,
    reason: String,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    shortfall_bytes: Option<Bytes>,
}

/// Prints the answer, and gives it by its code.
///
/// # Errors
/// If there is no request, or the objects cannot be read.
pub async fn run(client: &Client, scope: &Scope, args: &FitArgs) -> anyhow::Result<ExitCode> {
    let asked = request(args, client.default_namespace())?;
    let mut view = look(client, scope).await?.view();
    view.namespaces = namespaces(client, scope).await;
    let now = server::ask(client, scope.timeout).await?.now;
    let answer = answer(&view, &reservation_view(&asked), now);
    match args.output {
        Output::Table => print!("{}", as_text(&answer)),
        Output::Json => println!("{}", serde_json::to_string_pretty(&answer)?),
    }
    Ok(match answer.result {
        Verdict::Fits => ExitCode::SUCCESS,
        Verdict::Waits => ExitCode::from(1),
        Verdict::Refused => ExitCode::from(2),
    })
}

fn answer(view: &View, request: &ReservationView, now: Timestamp) -> Answer {
    let fit = fit(view, request, now);
    let result = match fit.outcome {
        Outcome::Promised => Verdict::Fits,
        Outcome::Waits => Verdict::Waits,
        Outcome::Refused => Verdict::Refused,
    };
    let (pool, node) = fit.place.map(|(pool, node)| (pool.to_string(), node.to_string())).unzip();
    let places = fit.considered.into_iter().map(|place| Place {
        pool: place.pool.to_string(),
        node: place.node.to_string(),
        chosen: place.chosen,
        reason: place.reason.as_str().to_owned(),
        message: place.message,
        shortfall_bytes: place.shortfall,
    });
    Answer {
        result,
        reason: fit.reason.as_str().to_owned(),
        message: fit.message,
        pool,
        node,
        peak_bytes: fit.peak,
        position: fit.position,
        bytes_ahead: fit.bytes_ahead,
        shortfall_bytes: fit.shortfall,
        reclaims: fit.reclaims,
        candidates: places.collect(),
    }
}

fn as_text(answer: &Answer) -> String {
    let mut text = match (&answer.result, &answer.pool, &answer.node) {
        (Verdict::Fits, Some(pool), Some(node)) => format!("fits now: pool {pool} on node {node}\n"),
        (Verdict::Fits, ..) => "fits now\n".to_owned(),
        (Verdict::Waits, ..) => "would wait\n".to_owned(),
        (Verdict::Refused, ..) => "would be refused\n".to_owned(),
    };
    text.push_str(&fact("why", &format!("{}: {}", answer.reason, answer.message)));
    text.push_str(&fact("peak", &answer.peak_bytes.to_string()));
    if let Some(position) = answer.position {
        text.push_str(&fact("queue", &format!("no. {position}, {} ahead", answer.bytes_ahead)));
    }
    if let Some(shortfall) = answer.shortfall_bytes {
        text.push_str(&fact("short of", &shortfall.to_string()));
    }
    if !answer.reclaims.is_empty() {
        text.push_str(&fact("reclaims", &answer.reclaims.join(", ")));
    }
    if answer.candidates.is_empty() {
        return text;
    }
    let mut table = Table::new(["POOL", "NODE", "VERDICT", "SHORT OF"]);
    for place in &answer.candidates {
        let verdict = if place.chosen { "Chosen".to_owned() } else { place.reason.clone() };
        let short = place.shortfall_bytes.map(|bytes| bytes.to_string()).unwrap_or_default();
        table.push([place.pool.clone(), place.node.clone(), verdict, short]);
    }
    text.push('\n');
    text.push_str(&table.to_string());
    for place in &answer.candidates {
        text.push_str(&wrapped("  ", &place.message));
    }
    text
}

#[cfg(test)]
mod tests;
