//! A record survives its process: what was acknowledged is there, what was not is there as a whole or not at all.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use berth_core::ids::{NodeName, Uid};
use berth_core::units::{Generation, Timestamp};
use berth_record::{ChangeError, JobEntry, NodeRecord, tables};
use serde_json::json;

const CHILD: &str = "BERTH_RECORD_CHILD";

fn node() -> NodeName {
    NodeName::from("n1")
}

fn job(number: u64) -> JobEntry {
    JobEntry {
        generation: Generation(number + 1),
        kind: "ImageTransfer".into(),
        stage: "Fetch".into(),
        payload: json!({"number": number, "filler": "x".repeat(usize::try_from(number % 7).unwrap() * 700)}),
        updated: Timestamp(number),
    }
}

/// Each commit writes two entries, so that half of one would show.
fn commit_pair(record: &NodeRecord, number: u64) {
    let pair = ["a", "b"].map(|half| Uid::from(format!("{number:08}-{half}")));
    record
        .record()
        .commit(|change| {
            pair.iter().try_for_each(|uid| change.put(tables::JOBS, uid, &job(number)))?;
            change.put(tables::JOBS, &Uid::from("last"), &job(number))?;
            Ok::<_, ChangeError>(())
        })
        .unwrap();
}

/// Not a test: what the killed process runs.
#[test]
fn child_commits_until_killed() {
    let Ok(path) = std::env::var(CHILD) else { return };
    let record = NodeRecord::open(Path::new(&path), &node()).unwrap();
    let first = next_number(&record);
    let mut out = std::io::stdout();
    for number in first..first + 100_000 {
        commit_pair(&record, number);
        writeln!(out, "acknowledged {number}").unwrap();
        out.flush().unwrap();
    }
}

fn next_number(record: &NodeRecord) -> u64 {
    record.job(&Uid::from("last")).unwrap().map_or(0, |last| last.updated.0 + 1)
}

#[test]
fn killed_in_the_middle_of_commits_it_holds_the_acknowledged_ones() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("record");
    drop(NodeRecord::create(&path, &node()).unwrap());
    let mut expected = 0;
    for round in 0..12_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_commits_until_killed", "--nocapture"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let wanted = 5 + round * 3;
        let mut acknowledged: Vec<u64> = Vec::new();
        for line in lines.by_ref() {
            acknowledged.extend(line.strip_prefix("acknowledged ").map(|n| n.parse::<u64>().unwrap()));
            if acknowledged.len() as u64 >= wanted {
                break;
            }
        }
        thread::sleep(Duration::from_micros(round * 370));
        child.kill().unwrap();
        child.wait().unwrap();
        acknowledged.extend(lines.filter_map(|line| line.strip_prefix("acknowledged ")?.parse::<u64>().ok()));
        let last = *acknowledged.last().expect("the child committed");
        assert_eq!(acknowledged, (expected..=last).collect::<Vec<_>>(), "round {round}");

        let record = NodeRecord::open(&path, &node()).unwrap();
        let next = next_number(&record);
        assert!(
            next == last + 1 || next == last + 2,
            "acknowledged up to {last}, found up to {next} (exclusive)"
        );
        for number in 0..next {
            for half in ["a", "b"] {
                let uid = Uid::from(format!("{number:08}-{half}"));
                assert_eq!(record.job(&uid).unwrap(), Some(job(number)), "round {round}");
            }
        }
        assert_eq!(record.jobs().unwrap().len() as u64, next * 2 + 1, "half a commit is there");
        expected = next;
    }
    assert!(expected >= 12 * 5);
}

#[test]
fn dropped_without_a_word_it_reopens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("record");
    let record = NodeRecord::create(&path, &node()).unwrap();
    commit_pair(&record, 0);
    // The state that a crash leaves: a copy of the open file.
    let copy = dir.path().join("copy");
    std::fs::copy(&path, &copy).unwrap();
    let crashed = NodeRecord::open(&copy, &node()).unwrap();
    assert_eq!(crashed.jobs().unwrap(), record.jobs().unwrap());
    let refused = record.record().commit(|change| {
        change.remove(tables::JOBS, &Uid::from("last"))?;
        change.require(tables::JOBS, &Uid::from("absent")).map(drop)
    });
    assert!(matches!(refused, Err(ChangeError::Missing { .. })));
    drop(record);
    assert_eq!(
        NodeRecord::open(&path, &node()).unwrap().jobs().unwrap().len(),
        3,
        "a refused change left a trace"
    );
}
