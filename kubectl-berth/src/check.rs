//! `kubectl berth check`: findings of [`berth_core::check`] in what the API server shows.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use berth_core::check::{Finding, check};
use berth_core::view::Placement;
use kube::Client;
use serde_json::{Value, json};

use crate::args::{CheckArgs, Output};
use crate::observe::{LookError, Scope, Seen, Unreadable, look};
use berth_core::table::Table;

/// Between two looks.
const PAUSE: Duration = Duration::from_secs(1);

/// What one look has shown.
#[derive(Clone, Debug, Default)]
struct Look {
    findings: Vec<Finding>,
    unreadable: Vec<Unreadable>,
    /// How many objects of each kind.
    objects: [(&'static str, usize); 7],
}

/// One line of the result.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    kind: &'static str,
    object: String,
    message: String,
}

/// Looks, prints the findings, and says by its code whether there are any.
///
/// # Errors
/// [`LookError`] if the objects cannot be read; nothing is printed then.
pub async fn run(client: &Client, scope: &Scope, args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let looks = look_repeatedly(client, scope, args.looks).await?;
    let lines = judge(&looks);
    let objects = looks.last().map(|look| look.objects).unwrap_or_default();
    match args.output {
        Output::Table => print!("{}", as_text(&lines, &objects)),
        Output::Json => println!("{:#}", as_json(&lines, &objects)),
    }
    Ok(if lines.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Stops early once nothing is left that could be a finding.
async fn look_repeatedly(client: &Client, scope: &Scope, times: u32) -> Result<Vec<Look>, LookError> {
    let mut looks = Vec::new();
    for turn in 1..=times {
        looks.push(Look::at(&look(client, scope).await?));
        if turn == times || judge(&looks).is_empty() {
            break;
        }
        tokio::time::sleep(PAUSE).await;
    }
    Ok(looks)
}

impl Look {
    fn at(seen: &Seen) -> Self {
        Self {
            findings: check(&seen.view()),
            unreadable: seen.unreadable.clone(),
            objects: [
                ("pools", seen.pools.len()),
                ("nodes", seen.nodes.len()),
                ("ledgers", seen.ledgers.len()),
                ("reservations", seen.reservations.len()),
                ("stagedImages", seen.images.len()),
                ("imports", seen.imports.len()),
                ("transfers", seen.transfers.len()),
            ],
        }
    }
}

/// What is wrong for certain: a defect within one object seen once, or one between objects seen every time. The lists of
/// one look are not of one instant, so the latter may be nothing but a write that fell between two of them.
fn judge(looks: &[Look]) -> Vec<Line> {
    let mut counts: BTreeMap<(&'static str, String), (usize, &Finding)> = BTreeMap::new();
    for finding in looks.iter().flat_map(|look| &look.findings) {
        let (times, latest) = counts.entry((kind(finding), object(finding))).or_insert((0, finding));
        *times += 1;
        *latest = finding;
    }
    let certain = |times: usize, finding: &Finding| times >= looks.len() || within_one_object(finding);
    let mut lines: Vec<Line> = counts
        .into_iter()
        .filter(|(_, (times, finding))| certain(*times, finding))
        .map(|((kind, object), (_, finding))| Line { kind, object, message: finding.to_string() })
        .collect();
    for bad in looks.last().into_iter().flat_map(|look| &look.unreadable) {
        let object = format!("{} {}", bad.kind, bad.name);
        lines.push(Line { kind: "Unreadable", object, message: bad.problem.clone() });
    }
    lines
}

const fn within_one_object(finding: &Finding) -> bool {
    match finding {
        Finding::OverCapacity { .. }
        | Finding::TooManyPromises { .. }
        | Finding::Misnamed { .. }
        | Finding::Unguarded { .. }
        | Finding::RefusedAndAssigned { .. } => true,
        Finding::Unpromised { .. }
        | Finding::TwoPromises { .. }
        | Finding::Orphan { .. }
        | Finding::LedgerBehind { .. } => false,
    }
}

const fn kind(finding: &Finding) -> &'static str {
    match finding {
        Finding::OverCapacity { .. } => "OverCapacity",
        Finding::TooManyPromises { .. } => "TooManyPromises",
        Finding::Misnamed { .. } => "Misnamed",
        Finding::Unpromised { .. } => "Unpromised",
        Finding::Unguarded { .. } => "Unguarded",
        Finding::RefusedAndAssigned { .. } => "RefusedAndAssigned",
        Finding::TwoPromises { .. } => "TwoPromises",
        Finding::Orphan { .. } => "Orphan",
        Finding::LedgerBehind { .. } => "LedgerBehind",
    }
}

/// What the finding is about; with the kind, what makes it the same finding at another look.
fn object(finding: &Finding) -> String {
    match finding {
        Finding::OverCapacity { ledger, .. }
        | Finding::TooManyPromises { ledger, .. }
        | Finding::Misnamed { ledger }
        | Finding::LedgerBehind { ledger, .. } => format!("StagingLedger {ledger}"),
        Finding::Unguarded { reservation } | Finding::RefusedAndAssigned { reservation } => {
            format!("StagingReservation {reservation}")
        }
        Finding::Unpromised { reservation, place: Placement { generation, .. } } => {
            format!("StagingReservation {reservation} generation {generation}")
        }
        Finding::TwoPromises { uid, .. } => format!("holder {uid}"),
        Finding::Orphan { uid, ledger } => format!("StagingLedger {ledger} holder {uid}"),
    }
}

fn as_text(lines: &[Line], objects: &[(&'static str, usize)]) -> String {
    let looked: Vec<String> = objects.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let looked = looked.join(", ");
    if lines.is_empty() {
        return format!("no findings in {looked}\n");
    }
    let mut table = Table::new(["FINDING", "OBJECT", "MESSAGE"]);
    for line in lines {
        table.push([line.kind.to_owned(), line.object.clone(), line.message.clone()]);
    }
    format!("{table}{} findings in {looked}\n", lines.len())
}

fn as_json(lines: &[Line], objects: &[(&'static str, usize)]) -> Value {
    let findings: Vec<Value> = lines
        .iter()
        .map(|line| json!({"finding": line.kind, "object": line.object, "message": line.message}))
        .collect();
    let looked: serde_json::Map<String, Value> =
        objects.iter().map(|(kind, count)| ((*kind).to_owned(), json!(count))).collect();
    json!({"findings": findings, "looked": looked})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::seen;

    fn unpromised() -> Look {
        let mut seen = seen();
        seen.ledgers[0].spec.promises.clear();
        seen.nodes.clear();
        Look::at(&seen)
    }

    #[test]
    fn a_sound_cluster_has_no_findings() {
        let look = Look::at(&seen());
        assert_eq!(judge(std::slice::from_ref(&look)), []);
        assert_eq!(
            as_text(&[], &look.objects),
            "no findings in 1 pools, 1 nodes, 1 ledgers, 2 reservations, 0 stagedImages, 1 imports, 0 transfers\n"
        );
    }

    #[test]
    fn what_concerns_two_objects_must_be_seen_every_time() {
        let sound = Look::at(&seen());
        assert_eq!(judge(&[unpromised(), sound]), []);
        let lines = judge(&[unpromised(), unpromised()]);
        assert_eq!(lines.len(), 1);
        assert_eq!(
            (lines[0].kind, lines[0].object.as_str()),
            ("Unpromised", "StagingReservation team/ready generation 1")
        );
        let text = as_text(&lines, &unpromised().objects);
        assert!(text.starts_with("FINDING      OBJECT"), "{text}");
        assert!(
            text.contains(
                "Unpromised   StagingReservation team/ready generation 1   reservation team/ready is"
            ),
            "{text}"
        );
        assert!(text.contains("\n1 findings in 1 pools, 0 nodes"), "{text}");
    }

    #[test]
    fn what_is_wrong_within_one_object_counts_even_if_it_passed() {
        let mut over = seen();
        over.ledgers[0].spec.capacity.total.data_bytes = 1 << 30;
        let lines = judge(&[Look::at(&over), Look::at(&seen())]);
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0].kind, "OverCapacity");
        assert!(lines[0].message.contains("2 GiB"), "{}", lines[0].message);
    }

    #[test]
    fn an_object_that_cannot_be_read_is_a_finding() {
        let mut seen = seen();
        let (kind, name) = ("StagingPool".to_owned(), "p".to_owned());
        seen.unreadable.push(Unreadable { kind, name, problem: "missing field `spec`".to_owned() });
        let look = Look::at(&seen);
        let json = as_json(&judge(std::slice::from_ref(&look)), &look.objects);
        assert_eq!(
            json["findings"],
            json!([{"finding": "Unreadable", "object": "StagingPool p", "message": "missing field `spec`"}])
        );
        assert_eq!(json["looked"]["reservations"], 2);
    }
}
