//! No server outlives the tests, however they end.

use std::env;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use berth_e2e::process::Program;
use berth_e2e::wait::{self, Look};

use crate::scenario::{Need, Scenario};

/// Set for a copy of this program that is to start a child, say its id and wait to be killed; its value is a folder.
const PARENT: &str = "BERTH_E2E_PLAY_PARENT";

pub fn scenarios() -> Vec<Scenario> {
    vec![Scenario::new(
        "process::a_killed_parent_takes_its_children_along",
        &[Need::Command("setpriv")],
        a_killed_parent_takes_its_children_along,
    )]
}

/// Plays the parent if this program was started as one.
pub fn play_parent() -> Option<ExitCode> {
    let dir = env::var_os(PARENT)?;
    let dir = Path::new(&dir);
    let child = Program::new("sleep", Path::new("sleep"), &dir.join("log")).args(["120"]).spawn();
    let Ok(child) = child else { return Some(ExitCode::FAILURE) };
    if fs::write(dir.join("pid"), format!("{}\n", child.pid())).is_err() {
        return Some(ExitCode::FAILURE);
    }
    thread::sleep(Duration::from_secs(120));
    Some(ExitCode::SUCCESS)
}

async fn a_killed_parent_takes_its_children_along() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let limit = Duration::from_secs(20);
    let mut parent = Command::new(env::current_exe()?);
    let mut parent = parent.env(PARENT, dir.path()).stdin(Stdio::null()).spawn()?;
    let child = wait::until::<u32, std::io::Error, _, _>("the parent to start a child", limit, || async {
        match fs::read_to_string(dir.path().join("pid")).map(|text| text.trim_end().parse()) {
            Ok(Ok(pid)) if running(pid) => Look::Done(pid),
            seen => Look::NotYet(format!("{seen:?}")),
        }
    })
    .await;
    parent.kill().context("kill -9 of the parent")?;
    parent.wait()?;
    let child = child?;
    wait::until::<(), std::io::Error, _, _>("the child to be gone", limit, || async {
        if running(child) { Look::NotYet("it runs".to_owned()) } else { Look::Done(()) }
    })
    .await?;
    Ok(())
}

/// Whether `pid` is a `sleep` that runs; a zombie does not.
fn running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| stat.contains("(sleep)") && !stat.contains(") Z "))
}
