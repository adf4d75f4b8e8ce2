//! `kubectl berth explain`: one reservation in plain sentences.

mod facts;
mod next;

use std::collections::BTreeSet;
use std::process::ExitCode;

use anyhow::Context as _;
use berth_core::table::Table;
use berth_core::units::Bytes;
use kube::{Client, ResourceExt as _};

use crate::args::{ExplainArgs, Output};
use crate::observe::{Scope, look};
use crate::pods;
use crate::server;
use crate::text::{count, fact, span, wrapped};

pub use facts::claim;
use facts::{Explanation, Image, Node, PromiseLine, Queue, explain};

/// Prints what is known of the reservation.
///
/// # Errors
/// If the objects cannot be read, or the reservation is not among them.
pub async fn run(client: &Client, scope: &Scope, args: &ExplainArgs) -> anyhow::Result<ExitCode> {
    let namespace = args.namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
    let seen = look(client, scope).await?;
    let now = server::ask(client, scope.timeout).await?.now;
    let is_it = |reservation: &&berth_api::StagingReservation| {
        reservation.name_any() == args.name && reservation.namespace().as_deref() == Some(&namespace)
    };
    let reservation =
        seen.reservations.iter().find(is_it).with_context(|| {
            format!("there is no StagingReservation {} in namespace {namespace}", args.name)
        })?;
    let namespaces: BTreeSet<String> = claim(reservation).into_iter().map(|claim| claim.namespace).collect();
    let pods = pods::of_claims(client, &namespaces).await;
    let explanation = explain(&seen, reservation, &pods, now);
    match args.output {
        Output::Table => print!("{}", as_text(&explanation)),
        Output::Json => println!("{}", serde_json::to_string_pretty(&explanation)?),
    }
    Ok(ExitCode::SUCCESS)
}

fn as_text(told: &Explanation) -> String {
    let mut text = format!("StagingReservation {}\n", told.name);
    let mut say = |label: &str, value: &str| text.push_str(&fact(label, value));
    let reason = if told.reason.is_empty() || told.reason == told.state {
        String::new()
    } else {
        format!(", {}", told.reason)
    };
    say("state", &format!("{}{reason}", told.state));
    say("why", if told.message.is_empty() { "nothing has been said of it yet" } else { &told.message });
    say("asks for", &asked(told));
    if let Some(queue) = &told.queue {
        say("queue", &of_queue(queue));
    }
    for promise in &told.promises {
        say("promise", &of_promise(promise));
    }
    if let Some(image) = &told.image {
        say("image", &of_image(image, told.asks.template.as_deref().unwrap_or_default()));
    }
    if let Some(node) = &told.node {
        say("node", &of_node(node));
    }
    if let Some(path) = &told.path {
        say("path", path);
    }
    say(
        "held by",
        &if told.held_by.is_empty() { "nobody that is known".to_owned() } else { told.held_by.join(", ") },
    );
    if told.node.is_some() {
        let node_says = told.in_use.map(|used| if used { "yes, says its node" } else { "no, says its node" });
        say("in use", node_says.unwrap_or("unknown: no live node says so"));
    }
    say(
        "ends",
        &told.expires_at.as_ref().map_or_else(|| told.ends.clone(), |at| format!("{} ({at})", told.ends)),
    );
    say("next", &told.next);
    text + &places(told)
}

fn of_queue(queue: &Queue) -> String {
    let place = if queue.position == 1 { "next".to_owned() } else { format!("no. {}", queue.position) };
    let ahead = Bytes::from_i64(queue.bytes_ahead);
    let limit = queue.at_most_seconds.map(|most| format!(" of at most {}", span(most * 1000)));
    let waited = span(queue.waited_seconds * 1000);
    format!("{place}, {ahead} ahead; has waited {waited}{}", limit.unwrap_or_default())
}

fn of_promise(promise: &PromiseLine) -> String {
    let metadata = if promise.metadata_bytes == Bytes::ZERO {
        String::new()
    } else {
        format!(" and {} of metadata", promise.metadata_bytes)
    };
    let over = promise.overcommitted_percent.map_or_else(String::new, |percent| {
        format!("; overcommitted to {percent} %: that all of it can be written is not promised")
    });
    let obeyed = if promise.obeyed { "obeyed by the node" } else { "not recorded by the node yet" };
    format!(
        "{}{metadata} of {} in pool {} on node {}, generation {}, {obeyed}; ledger {}{over}",
        promise.data_bytes,
        promise.class.to_lowercase(),
        promise.pool,
        promise.node,
        promise.generation,
        promise.ledger
    )
}

fn of_node(node: &Node) -> String {
    let renewed = node.renewed_seconds_ago.map(|ago| format!(", renewed its Lease {} ago", span(ago * 1000)));
    let state = if node.live { "live" } else { "silent" };
    let problem = node.message.as_ref().map(|problem| format!("; {problem}")).unwrap_or_default();
    format!("{} is {state}{}{problem}", node.name, renewed.unwrap_or_default())
}

fn asked(told: &Explanation) -> String {
    let asks = &told.asks;
    let how = match asks.access.as_str() {
        "Block" => "as a volume",
        "Stream" => "without writing anything",
        _ => "as a directory",
    };
    let node = asks.node.as_ref().map(|node| format!(" on node {node}")).unwrap_or_default();
    let zone = asks.zone.as_ref().map(|zone| format!(" in zone {zone}")).unwrap_or_default();
    let template =
        asks.template.as_ref().map(|template| format!(", from template {template}")).unwrap_or_default();
    let priority = if asks.priority == 0 { String::new() } else { format!(", priority {}", asks.priority) };
    format!("{} {how}, pool {}{node}{zone}{template}{priority}", asks.size, asks.pools)
}

fn of_image(image: &Image, template: &str) -> String {
    let percent = image
        .percent
        .filter(|_| matches!(image.state.as_str(), "Filling" | "Usable"))
        .map(|percent| format!(" {percent} %"))
        .unwrap_or_default();
    let staged = image.staged_image.as_ref().map(|name| format!(" as {name}")).unwrap_or_default();
    let shared = match image.shared_with {
        0 => ", shared with no other reservation".to_owned(),
        others => {
            let named = image.others.join(", ");
            let more = if others > image.others.len() { " and more" } else { "" };
            format!(", shared with {} ({named}{more})", count(others, "other reservation"))
        }
    };
    let why = image.message.as_ref().map(|message| format!(": {message}")).unwrap_or_default();
    match &image.staged_image {
        None => format!("of template {template}, not staged for it{why}"),
        Some(_) => format!("of template {template}, {}{percent}{staged}{shared}{why}", image.state),
    }
}

fn places(told: &Explanation) -> String {
    if told.candidates.is_empty() {
        return String::new();
    }
    let mut table = Table::new(["POOL", "NODE", "VERDICT", "SHORT OF"]);
    for place in &told.candidates {
        let verdict = if place.chosen { "Chosen".to_owned() } else { place.reason.clone() };
        let short = place.shortfall_bytes.map(|bytes| bytes.to_string()).unwrap_or_default();
        table.push([place.pool.clone(), place.node.clone(), verdict, short]);
    }
    let mut text = format!("\n{table}");
    for place in told.candidates.iter().filter(|place| place.shortfall_bytes.is_none()) {
        text.push_str(&wrapped("  ", &place.message));
    }
    text
}

#[cfg(test)]
mod tests;
