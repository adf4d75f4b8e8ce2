//! `kubectl berth drain`, `cordon` and `uncordon`: what a pool may take, and what still holds it.

mod holders;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use berth_api::StagingPool;
use berth_api::staging_pool::Service;
use berth_core::ids::{NodeName, PoolName};
use berth_core::table::Table;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use thiserror::Error;

use crate::args::{DrainArgs, Output, PoolArgs};
use crate::observe::{LookError, Scope, Seen, look};
use crate::pods;
use crate::text::wrapped;
use holders::{Holder, Left, claim_namespaces, holders};

/// Who writes, as the API server records it.
const MANAGER: &str = "kubectl-berth";
/// How often a write is tried that others were faster with.
const TRIES: usize = 5;
/// Between two looks of `--wait`.
const PAUSE: Duration = Duration::from_secs(2);

/// Why a pool was not changed.
#[derive(Debug, Error)]
pub enum ChangeError {
    /// There is no such pool.
    #[error("there is no StagingPool {0}")]
    NotFound(String),
    /// The pool is not on this node.
    #[error("node {node} does not carry pool {pool}; {}", carriers(.nodes))]
    NotCarried {
        /// The node.
        node: String,
        /// The pool.
        pool: String,
        /// The nodes that do.
        nodes: Vec<String>,
    },
    /// It was not being drained there.
    #[error(
        "pool {pool} is not being drained on node {node} alone; what drains it there is spec.service or nothing"
    )]
    NotDrained {
        /// The node.
        node: String,
        /// The pool.
        pool: String,
    },
    /// Others were faster each time.
    #[error("StagingPool {0} was changed by others {TRIES} times meanwhile; try again")]
    Contended(String),
    /// It could not be read or written.
    #[error("could not change StagingPool {pool}")]
    Api {
        /// The pool.
        pool: String,
        /// Why.
        source: kube::Error,
    },
}

fn carriers(nodes: &[String]) -> String {
    if nodes.is_empty() { "no node does".to_owned() } else { format!("these do: {}", nodes.join(", ")) }
}

/// What is to become of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted {
    Service(Service),
    DrainOn(BTreeSet<String>),
    NoLongerOn(BTreeSet<String>),
}

/// Drains the pool, or takes that back, and shows what holds it.
///
/// # Errors
/// [`ChangeError`], or [`LookError`] afterwards: the change has been made then.
pub async fn drain(client: &Client, scope: &Scope, args: &DrainArgs) -> anyhow::Result<ExitCode> {
    let nodes: BTreeSet<String> = args.node.iter().cloned().collect();
    if !args.undo {
        check_carried(client, scope, &args.pool, &nodes).await?;
    }
    let wanted = match (args.undo, nodes.is_empty()) {
        (false, true) => Wanted::Service(Service::Draining),
        (true, true) => Wanted::Service(Service::Open),
        (false, false) => Wanted::DrainOn(nodes.clone()),
        (true, false) => Wanted::NoLongerOn(nodes.clone()),
    };
    let done = change(client, &args.pool, &wanted).await?;
    if args.undo {
        match args.output {
            Output::Table => println!("{done}"),
            Output::Json => println!("{:#}", json!({"pool": args.pool, "done": done})),
        }
        return Ok(ExitCode::SUCCESS);
    }
    if args.output == Output::Table {
        println!("{done}");
    }
    let nodes = nodes.into_iter().map(NodeName).collect();
    let pool = PoolName(args.pool.clone());
    let (left, drained) = follow(client, scope, args, &pool, &nodes).await?;
    match args.output {
        Output::Table => print!("{}", as_text(&left)),
        Output::Json => println!("{:#}", as_json(&args.pool, &done, &left, drained)),
    }
    Ok(if args.wait && !drained { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

/// Cordons the pool.
///
/// # Errors
/// [`ChangeError`].
pub async fn cordon(client: &Client, args: &PoolArgs) -> anyhow::Result<ExitCode> {
    println!("{}", change(client, &args.pool, &Wanted::Service(Service::Cordoned)).await?);
    Ok(ExitCode::SUCCESS)
}

/// Opens the pool.
///
/// # Errors
/// [`ChangeError`].
pub async fn uncordon(client: &Client, args: &PoolArgs) -> anyhow::Result<ExitCode> {
    println!("{}", change(client, &args.pool, &Wanted::Service(Service::Open)).await?);
    Ok(ExitCode::SUCCESS)
}

/// A misspelled node would drain nothing, and nobody would notice.
async fn check_carried(
    client: &Client,
    scope: &Scope,
    pool: &str,
    nodes: &BTreeSet<String>,
) -> anyhow::Result<()> {
    if nodes.is_empty() {
        return Ok(());
    }
    let view = look(client, scope).await?.view();
    let carries = |node: &&berth_core::view::NodeState| node.pools.contains_key(&PoolName::from(pool));
    let all: Vec<String> = view.nodes.values().filter(carries).map(|node| node.name.to_string()).collect();
    match nodes.iter().find(|node| !all.contains(*node)) {
        None => Ok(()),
        Some(node) => {
            Err(ChangeError::NotCarried { node: node.clone(), pool: pool.to_owned(), nodes: all }.into())
        }
    }
}

/// Writes what is wanted over the version that was read, so that nothing that others write meanwhile is lost. Says what
/// is the case now.
async fn change(client: &Client, pool: &str, wanted: &Wanted) -> Result<String, ChangeError> {
    let pools = Api::<StagingPool>::all(client.clone());
    let failed = |source| ChangeError::Api { pool: pool.to_owned(), source };
    for _ in 0..TRIES {
        let found = pools.get_opt(pool).await.map_err(failed)?;
        let found = found.ok_or_else(|| ChangeError::NotFound(pool.to_owned()))?;
        let (spec, done) = patch(pool, &found, wanted)?;
        let Some(spec) = spec else { return Ok(done) };
        let version = found.resource_version();
        let body = json!({"metadata": {"resourceVersion": version, "uid": found.uid()}, "spec": spec});
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        match pools.patch(pool, &params, &Patch::Merge(body)).await {
            Ok(_) => return Ok(done),
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(source) => return Err(failed(source)),
        }
    }
    Err(ChangeError::Contended(pool.to_owned()))
}

/// The part of `spec` to write, if any, and what is the case afterwards.
fn patch(pool: &str, found: &StagingPool, wanted: &Wanted) -> Result<(Option<Value>, String), ChangeError> {
    let service = found.spec.service.unwrap_or(Service::Open);
    let drained: BTreeSet<String> = found.spec.drain_nodes.iter().cloned().collect();
    let with_nodes = |nodes: BTreeSet<String>, done: String| {
        let spec = (nodes != drained).then(|| json!({"drainNodes": nodes}));
        Ok((spec, done))
    };
    match wanted {
        Wanted::Service(wanted) => {
            let was = if service == *wanted { "already".to_owned() } else { format!("was {service:?}") };
            let still = if drained.is_empty() || *wanted != Service::Open {
                String::new()
            } else {
                format!("; still drained on {}", names(&drained))
            };
            let spec = (service != *wanted).then(|| json!({"service": wanted}));
            Ok((spec, format!("pool {pool} is {wanted:?} ({was}){still}")))
        }
        Wanted::DrainOn(nodes) => {
            let done = format!("pool {pool} is Draining on {}", names(nodes));
            with_nodes(drained.union(nodes).cloned().collect(), done)
        }
        Wanted::NoLongerOn(nodes) => {
            if let Some(node) = nodes.iter().find(|node| !drained.contains(*node)) {
                return Err(ChangeError::NotDrained { node: node.clone(), pool: pool.to_owned() });
            }
            with_nodes(
                drained.difference(nodes).cloned().collect(),
                format!("pool {pool} is {service:?} again on {}", names(nodes)),
            )
        }
    }
}

fn names(nodes: &BTreeSet<String>) -> String {
    let all: Vec<&str> = nodes.iter().map(String::as_str).collect();
    let word = if all.len() == 1 { "node" } else { "nodes" };
    format!("{word} {}", all.join(", "))
}

/// What holds the pool, and whether draining is over; with `--wait` once it is, or the time is.
async fn follow(
    client: &Client,
    scope: &Scope,
    args: &DrainArgs,
    pool: &PoolName,
    nodes: &BTreeSet<NodeName>,
) -> Result<(Vec<Holder>, bool), LookError> {
    let begun = Instant::now();
    let mut told = None;
    loop {
        let seen: Seen = look(client, scope).await?;
        let pods = pods::of_claims(client, &claim_namespaces(&seen, pool)).await;
        let left = holders(&seen, pool, nodes, &pods);
        let drained = Left::is_drained(&left);
        let late = args.at_most.is_some_and(|most| begun.elapsed() >= Duration::from_secs(most));
        if !args.wait || drained || late {
            return Ok((left, drained));
        }
        let now = Left::of(&left);
        if told != Some(now) {
            eprintln!("{now}");
            told = Some(now);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn as_text(left: &[Holder]) -> String {
    if left.is_empty() {
        return "nothing holds it\n".to_owned();
    }
    let mut table = Table::new(["NODE", "KIND", "SIZE", "IN USE", "NAME"]);
    for holder in left {
        let kind = format!("{:?}", holder.kind);
        let used = if holder.in_use { "yes" } else { "" };
        table.push([
            holder.node.clone(),
            kind,
            holder.bytes.to_string(),
            used.to_owned(),
            holder.name.clone(),
        ]);
    }
    let mut text = format!("{table}\n");
    for holder in left {
        let held_by = if holder.held_by.is_empty() {
            String::new()
        } else {
            format!("; held by {}", holder.held_by.join(", "))
        };
        text.push_str(&wrapped("", &format!("{} goes {}{held_by}", holder.name, holder.goes)));
    }
    text + &format!("{}\n", Left::of(left))
}

fn as_json(pool: &str, done: &str, left: &[Holder], drained: bool) -> Value {
    json!({"pool": pool, "done": done, "drained": drained, "left": Left::of(left), "holders": left})
}

#[cfg(test)]
mod tests;
