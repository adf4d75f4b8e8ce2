//! `kubectl berth status`: pools, nodes, imports, transfers and reservations in one table.

use std::process::ExitCode;

use berth_api::conditions::{ConditionType, Truth, find};
use berth_api::fields::{Assignment, LastError, Progress, Stage};
use berth_api::{ImageTransfer, StagingNode, StagingPool, StagingReservation, TemplateImport, parse};
use berth_core::budget::{Area, Sums};
use berth_core::ids::{ObjectName, PoolName, Uid};
use berth_core::units::Bytes;
use berth_core::view::{LedgerView, View};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{Client, ResourceExt as _};
use serde::Serialize;

use crate::args::{Output, StatusArgs};
use crate::observe::{Scope, Seen, look};
use berth_core::table::Table;

/// One row. Sizes in bytes; what does not apply is left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    kind: &'static str,
    name: String,
    state: String,
    reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pool: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<String>,
    /// What there is to promise, what was asked for, or the size of the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<Bytes>,
    /// What of it is promised.
    #[serde(skip_serializing_if = "Option::is_none")]
    promised: Option<Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    progress: Option<String>,
    message: String,
}

/// Prints the table.
///
/// # Errors
/// If the objects cannot be read.
pub async fn run(client: &Client, scope: &Scope, args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let seen = look(client, scope).await?;
    let rows = rows(&seen, args.namespace.as_deref());
    match args.output {
        Output::Table => print!("{}", as_text(&rows)),
        Output::Json => println!("{}", serde_json::to_string_pretty(&rows)?),
    }
    for bad in &seen.unreadable {
        eprintln!("warning: {} {} cannot be read: {}", bad.kind, bad.name, bad.problem);
    }
    Ok(ExitCode::SUCCESS)
}

fn rows(seen: &Seen, namespace: Option<&str>) -> Vec<Row> {
    let view = seen.view();
    let shown = |other: Option<String>| namespace.is_none_or(|name| other.as_deref() == Some(name));
    let mut rows: Vec<Row> = seen.pools.iter().map(|pool| pool_row(pool, &view)).collect();
    rows.extend(seen.nodes.iter().flat_map(|node| node_rows(node, seen, &view)));
    rows.extend(seen.imports.iter().filter(|i| shown(i.namespace())).map(import_row));
    rows.extend(seen.transfers.iter().filter(|t| shown(t.namespace())).map(transfer_row));
    rows.extend(seen.reservations.iter().filter(|r| shown(r.namespace())).map(|r| reservation_row(r, &view)));
    rows
}

fn pool_row(pool: &StagingPool, view: &View) -> Row {
    let name = PoolName(pool.name_any());
    let ledgers = || view.ledgers.values().filter(|ledger| ledger.pool == name);
    let ready = pool.status.as_ref().and_then(|status| find(&status.conditions, ConditionType::Ready));
    let state = match ready {
        Some(ready) if holds(ready) => "Ready",
        Some(_) => "NotReady",
        None => "Pending",
    };
    Row {
        kind: "pool",
        name: pool.name_any(),
        state: state.to_owned(),
        size: Some(ledgers().map(|ledger| ledger.capacity.total.data).sum()),
        promised: Some(ledgers().map(promised_in).sum()),
        ..explained(ready)
    }
}

/// One row for each pool on the node, and one for a node without any.
fn node_rows(node: &StagingNode, seen: &Seen, view: &View) -> Vec<Row> {
    let state = parse::node_state(node);
    let live = if seen.is_live(&state.name) { "Live" } else { "Silent" };
    let row = || Row { kind: "node", name: state.name.to_string(), state: live.to_owned(), ..Row::default() };
    if state.pools.is_empty() {
        let ready = node.status.as_ref().and_then(|status| find(&status.conditions, ConditionType::Ready));
        let Row { reason, message, .. } = explained(ready);
        return vec![Row { reason, message, ..row() }];
    }
    let of_pool = |(name, pool): (&PoolName, &berth_core::view::NodePoolState)| {
        let ledger = view.ledgers.get(&(name.clone(), state.name.clone()));
        Row {
            pool: Some(name.to_string()),
            node: Some(state.name.to_string()),
            reason: pool.reason.as_str().to_owned(),
            size: Some(ledger.map_or(pool.total, |ledger| ledger.capacity.total.data)),
            promised: ledger.map(promised_in),
            message: if pool.message.is_empty() {
                format!("{} written", pool.used)
            } else {
                pool.message.clone()
            },
            ..row()
        }
    };
    state.pools.iter().map(of_pool).collect()
}

fn import_row(import: &TemplateImport) -> Row {
    let status = import.status.clone().unwrap_or_default();
    let planned = status.plan.as_ref().map(|plan| plan.virtual_size);
    let size = status.durable.as_ref().map(|durable| durable.virtual_size).or(planned);
    Row {
        kind: "import",
        name: full_name(import.namespace(), import.name_any()),
        state: status.state.map_or_else(|| "Pending".to_owned(), |state| format!("{state:?}")),
        size: size.map(Bytes::from_i64),
        progress: progress(status.stage.as_ref(), status.progress.as_ref()),
        ..placed(
            find(&status.conditions, ConditionType::Ready),
            status.assignment.as_ref(),
            status.last_error.as_ref(),
        )
    }
}

fn transfer_row(transfer: &ImageTransfer) -> Row {
    let status = transfer.status.clone().unwrap_or_default();
    let planned = status.plan.as_ref().map(|plan| plan.virtual_size);
    let size = status.result.as_ref().map(|result| result.virtual_size).or(planned);
    Row {
        kind: "transfer",
        name: full_name(transfer.namespace(), transfer.name_any()),
        state: status.state.map_or_else(|| "Pending".to_owned(), |state| format!("{state:?}")),
        size: size.map(Bytes::from_i64),
        progress: progress(status.stage.as_ref(), status.progress.as_ref()),
        ..placed(
            find(&status.conditions, ConditionType::Succeeded),
            status.assignment.as_ref(),
            status.last_error.as_ref(),
        )
    }
}

/// Where a piece of work is, and what is said of it: what went wrong last, if something did.
fn placed(told: Option<&Condition>, place: Option<&Assignment>, error: Option<&LastError>) -> Row {
    let row = explained(told);
    Row {
        pool: place.and_then(|place| place.pool.clone()),
        node: place.map(|place| place.node.clone()),
        message: error.map_or(row.message, |error| error.message.clone()),
        ..row
    }
}

/// Which stage of how many, and how much of all of them.
fn progress(stage: Option<&Stage>, progress: Option<&Progress>) -> Option<String> {
    let stage = stage?;
    let percent = progress.and_then(|progress| progress.percent);
    let percent = percent.map(|percent| format!(" {percent} %")).unwrap_or_default();
    Some(format!("{}/{} {}{percent}", stage.index, stage.total, stage.name))
}

fn reservation_row(reservation: &StagingReservation, view: &View) -> Row {
    let status = reservation.status.clone().unwrap_or_default();
    let uid = Uid(reservation.uid().unwrap_or_default());
    let promised = view.ledgers_of(&uid).filter_map(|ledger| ledger.promises.get(&uid));
    let promised: Vec<Bytes> = promised.map(|promise| promise.charge.data).collect();
    let conditions =
        [ConditionType::Promised, ConditionType::Ready].map(|kind| find(&status.conditions, kind));
    let unmet = conditions.iter().flatten().find(|condition| !holds(condition));
    Row {
        kind: "reservation",
        name: full_name(reservation.namespace(), reservation.name_any()),
        state: status.state.map_or_else(|| "Pending".to_owned(), |state| format!("{state:?}")),
        pool: status
            .assignment
            .as_ref()
            .and_then(|place| place.pool.clone())
            .or(reservation.spec.pool_name.clone()),
        node: status.assignment.map(|place| place.node).or(reservation.spec.node_name.clone()),
        size: parse::bytes("spec.maxSize", &reservation.spec.max_size).ok(),
        promised: (!promised.is_empty()).then(|| promised.into_iter().sum()),
        progress: status.queue.map(|queue| format!("{} in queue", ordinal(queue.position))),
        ..explained(unmet.copied().or(conditions[1]).or(conditions[0]))
    }
}

fn promised_in(ledger: &LedgerView) -> Bytes {
    Sums::of(ledger.promises.values()).data(Area::Total, ledger.capacity.overcommit.percent)
}

fn holds(condition: &Condition) -> bool {
    condition.status == Truth::True.as_str()
}

/// Reason and message of a condition; nothing else.
fn explained(condition: Option<&Condition>) -> Row {
    Row {
        reason: condition.map(|condition| condition.reason.clone()).unwrap_or_default(),
        message: condition.map(|condition| condition.message.clone()).unwrap_or_default(),
        ..Row::default()
    }
}

fn full_name(namespace: Option<String>, name: String) -> String {
    ObjectName::new(namespace.unwrap_or_default(), name).to_string()
}

fn ordinal(position: i32) -> String {
    match position {
        1 => "next".to_owned(),
        position => format!("no. {position}"),
    }
}

fn as_text(rows: &[Row]) -> String {
    if rows.is_empty() {
        return "no pools, nodes, imports, transfers or reservations\n".to_owned();
    }
    let size = |bytes: Option<Bytes>| bytes.map(|bytes| bytes.to_string()).unwrap_or_default();
    let mut table = Table::new([
        "KIND", "NAME", "STATE", "REASON", "POOL", "NODE", "SIZE", "PROMISED", "PROGRESS", "MESSAGE",
    ]);
    for row in rows.iter().cloned() {
        table.push([
            row.kind.to_owned(),
            row.name,
            row.state,
            row.reason,
            row.pool.unwrap_or_default(),
            row.node.unwrap_or_default(),
            size(row.size),
            size(row.promised),
            row.progress.unwrap_or_default(),
            row.message,
        ]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::seen;

    #[test]
    fn one_table_shows_what_is_promised_and_what_waits() {
        let text = as_text(&rows(&seen(), None));
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split("   ").map(str::trim).filter(|cell| !cell.is_empty()).collect())
            .collect();
        assert_eq!(
            lines[1],
            ["pool", "fast", "Ready", "Ready", "-", "-", "10 GiB", "3 GiB", "-", "usable on 1 node"]
        );
        assert_eq!(
            lines[2],
            ["node", "n1", "Live", "Ready", "fast", "n1", "10 GiB", "3 GiB", "-", "1 GiB written"]
        );
        let import = [
            "import",
            "images/debian",
            "Importing",
            "Importing",
            "fast",
            "n1",
            "2 GiB",
            "-",
            "3/5 Upload 37 %",
        ];
        assert_eq!(lines[3][..9], import);
        let ready =
            ["reservation", "team/ready", "Ready", "Ready", "fast", "n1", "3 GiB", "3 GiB", "-", "prepared"];
        assert_eq!(lines[4], ready);
        let waits = [
            "reservation",
            "team/waits",
            "Queued",
            "InsufficientSpace",
            "fast",
            "-",
            "8 GiB",
            "-",
            "next in queue",
        ];
        assert_eq!(lines[5][..9], waits);
        assert_eq!(lines[5][9], "lacks 1 GiB in all");
        assert_eq!(lines.len(), 6);
    }

    #[test]
    fn a_transfer_is_shown_as_an_import_is() {
        let mut seen = seen();
        seen.transfers = vec![crate::fixture::transfer()];
        let row = rows(&seen, Some("images")).pop().expect("the last one");
        assert_eq!(
            (row.kind, row.name.as_str(), row.state.as_str()),
            ("transfer", "images/copy", "Suspended")
        );
        assert_eq!((row.node.as_deref(), row.size), (Some("n1"), Some(Bytes::gib(2))));
        assert_eq!((row.reason.as_str(), row.progress.as_deref()), ("Suspended", Some("1/3 Upload 40 %")));
    }

    #[test]
    fn a_namespace_shows_its_own_and_the_shared() {
        let names: Vec<String> = rows(&seen(), Some("images")).into_iter().map(|row| row.name).collect();
        assert_eq!(names, ["fast", "n1", "images/debian"]);
    }

    #[test]
    fn a_node_without_lease_is_silent_and_one_without_pools_is_still_shown() {
        let mut seen = seen();
        seen.fresh_leases.clear();
        seen.nodes[0].status = None;
        let row = rows(&seen, None).remove(1);
        assert_eq!(
            (row.kind, row.name.as_str(), row.state.as_str(), row.pool),
            ("node", "n1", "Silent", None)
        );
    }

    #[test]
    fn programs_get_bytes_and_no_empty_fields() {
        let json = serde_json::to_value(rows(&seen(), None)).expect("plain data");
        assert_eq!(json[0]["promised"], 3_u64 << 30);
        assert_eq!((&json[4]["name"], &json[4]["size"]), (&"team/waits".into(), &(8_u64 << 30).into()));
        assert!(json[4].get("promised").is_none() && json[0].get("node").is_none());
    }
    #[test]
    fn d46_volumes_that_are_overcommitted_count_for_their_part_and_the_pool_says_so() {
        let mut seen = crate::fixture::seen_with_volume();
        let said = "1 node carries the pool; promise 1 is not made for volumes: overcommitted to 200 %";
        let over = serde_json::from_str(r#"{"percent": 200, "attainBytes": 0}"#).expect("readable");
        seen.ledgers[0].spec.capacity.volume_overcommit = Some(over);
        seen.pools[0].status.as_mut().expect("it reports").conditions[0].message = said.to_owned();
        let pool = rows(&seen, None).remove(0);
        assert_eq!((pool.promised, pool.message.as_str()), (Some(Bytes::gib(5)), said));
    }
}
