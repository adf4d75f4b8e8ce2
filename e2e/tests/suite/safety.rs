//! The safety commands as trials: each shows what it is for, and each of its sabotages makes it fail.
//!
//! `BERTH_E2E_LONG=1` asks for the long versions.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use berth_e2e::ours::{NODE, NODE_SABOTAGE, OPERATOR, OPERATOR_SABOTAGE, RECORD_DUMP};
use tokio::process::Command;

use crate::scenario::{CONTROL_PLANE, Need, Scenario};

const ADMISSION_RACE: &str = env!("CARGO_BIN_EXE_admission-race");
const CRASH: &str = env!("CARGO_BIN_EXE_crash");
const KILL_IMPORT: &str = env!("CARGO_BIN_EXE_kill-import");
const KILL_TRANSFERS: &str = env!("CARGO_BIN_EXE_kill-transfers");

/// How long a command may take in its short version, alone on two cores.
const SHORT: Duration = Duration::from_mins(12);
/// The same for the cuts, each of which takes two starts and some forty commands of LVM in a guest.
const CUTS: Duration = Duration::from_mins(40);
/// The same for the long version.
const LONG: Duration = Duration::from_mins(60);

pub fn scenarios() -> Vec<Scenario> {
    let race = [CONTROL_PLANE, &[Need::Program(OPERATOR)]].concat();
    let sabotaged_race = [CONTROL_PLANE, &[Need::Program(OPERATOR_SABOTAGE)]].concat();
    let kill = [Need::SITE, &[Need::Command("qemu-img"), Need::Command("casync"), Need::Command("mkfs.xfs")]]
        .concat();
    let sabotaged_kill = [&kill[..], &[Need::Program(NODE_SABOTAGE)]].concat();
    let thin = ["dmsetup", "lvm", "thin_check", "thin_dump", "qemu-nbd"].map(Need::Command);
    let crash = [&[Need::Kernel, Need::Program(NODE), Need::Program(RECORD_DUMP)], &thin[..]].concat();
    let sabotaged_crash = [&crash[..], &[Need::Program(NODE_SABOTAGE)]].concat();
    let limit = if long() { LONG } else { SHORT };
    vec![
        Scenario::new("race::two_operators_never_promise_too_much", &race, admission_race).limited(limit),
        Scenario::new("race::every_sabotage_is_noticed", &sabotaged_race, race_sabotages).limited(limit),
        Scenario::new("kill::an_import_survives_every_kill", &kill, kill_import).limited(limit),
        Scenario::new("kill::every_sabotage_is_noticed", &sabotaged_kill, kill_sabotages).limited(limit),
        Scenario::new("kill::a_transfer_survives_every_kill", &kill, kill_transfers).limited(limit),
        Scenario::new("kill::every_sabotage_of_transfers_is_noticed", &sabotaged_kill, transfer_sabotages)
            .limited(limit),
        Scenario::new("crash::a_pool_survives_every_cut", &crash, crash_cuts).limited(limit.max(CUTS)),
        Scenario::new("crash::every_sabotage_is_noticed", &sabotaged_crash, crash_sabotages)
            .limited(limit.max(CUTS)),
    ]
}

/// Whether the long versions are asked for.
pub fn long() -> bool {
    std::env::var_os("BERTH_E2E_LONG").is_some_and(|value| value == "1")
}

/// How a command ended: its exit code, and what it said.
async fn run(program: &str, args: &[&str]) -> anyhow::Result<(i32, String)> {
    let mut command = Command::new(program);
    // Ends it, and with it all it started, when the trial is cut off.
    command.args(args).stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.with_context(|| format!("running {program}"))?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned()))
}

/// Runs a command that must find everything right, and shows its coverage.
async fn must_pass(program: &str, args: &[&str]) -> anyhow::Result<()> {
    let (code, said) = run(program, args).await?;
    // First what does not hold: of what a test says, often only the beginning is kept.
    let wrong = |line: &&str| line.starts_with("FAILED ") || line.starts_with("Error: ");
    let wrong: Vec<&str> = said.lines().filter(wrong).collect();
    ensure!(code == 0, "exit status {code}: {}\n{said}", wrong.join("\n"));
    println!("{said}");
    Ok(())
}

/// Runs a command once for each of its sabotages, which it must notice by naming what does not hold.
async fn must_notice_all(program: &str, args: &[&str], least: usize) -> anyhow::Result<()> {
    let (code, names) = run(program, &["--list-sabotages"]).await?;
    ensure!(code == 0, "no list of sabotages: {names}");
    let names: Vec<&str> = names.lines().collect();
    ensure!(names.len() >= least, "only these sabotages: {names:?}");
    for name in names {
        let (code, said) = run(program, &[args, &["--sabotage", name]].concat()).await?;
        let Some(failure) = said.lines().find(|line| line.starts_with("FAILED ")) else {
            bail!("sabotage {name}: exit status {code}, and nothing that does not hold:\n{said}");
        };
        ensure!(code == 1, "sabotage {name}: exit status {code}");
        println!("sabotage {name}: {failure}");
    }
    Ok(())
}

async fn admission_race() -> anyhow::Result<()> {
    must_pass(ADMISSION_RACE, &["--histories", "200", "--lanes", "20"]).await
}

async fn race_sabotages() -> anyhow::Result<()> {
    must_notice_all(ADMISSION_RACE, &["--histories", "120", "--lanes", "20"], 3).await
}

async fn kill_import() -> anyhow::Result<()> {
    must_pass(KILL_IMPORT, &["--kills-per-stage", if long() { "10" } else { "5" }]).await
}

async fn kill_sabotages() -> anyhow::Result<()> {
    must_notice_all(KILL_IMPORT, &["--data-mib", "256", "--kills-per-stage", "1"], 6).await
}

async fn kill_transfers() -> anyhow::Result<()> {
    must_pass(KILL_TRANSFERS, &["--kills", if long() { "100" } else { "24" }]).await
}

async fn transfer_sabotages() -> anyhow::Result<()> {
    must_notice_all(KILL_TRANSFERS, &["--data-mib", "128", "--kills", "12"], 4).await
}

/// Two of each of the 16 operations in the short version.
async fn crash_cuts() -> anyhow::Result<()> {
    must_pass(CRASH, &["--cuts", if long() { "100" } else { "32" }]).await
}

async fn crash_sabotages() -> anyhow::Result<()> {
    must_notice_all(CRASH, &["--cuts", "24"], 6).await
}
