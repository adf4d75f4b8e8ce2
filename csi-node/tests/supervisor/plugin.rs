//! A plugin to be killed: this program again, which does one thing and then waits.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use berth_core::ledger::Class;
use berth_device::thin::{InProcess, KernelPool, Suspender, ThinId};
use berth_node::area::templates;
use berth_node::supervisor::DataPlane;
use berth_node::supervisor::client::Client;

use super::{Process, SOON, Stage, uid, wait_until};

/// Set for the plugin; its value is the stage's folder.
const DIR: &str = "BERTH_TEST_PLUGIN_DIR";
/// What it does.
const DO: &str = "BERTH_TEST_PLUGIN_DO";

/// What a plugin does.
#[derive(Clone, Copy, Debug)]
pub enum Deed {
    /// A snapshot through the supervisor.
    Snapshot,
    /// A snapshot in its own process.
    SnapshotAlone,
    /// A template, attached.
    Template,
}

/// Starts a plugin, which waits until it is told to go on ([`go`]).
pub fn start(stage: &Stage, deed: Deed) -> Process {
    let mut program = Command::new(std::env::current_exe().unwrap());
    program.args(["--exact", "plugin::play", "--nocapture", "--test-threads=1"]);
    program.env(DIR, stage.dir.path()).env(DO, format!("{deed:?}")).env("PATH", stage.search());
    Process(program.spawn().unwrap())
}

/// Lets it go on.
pub fn go(stage: &Stage) {
    fs::write(stage.path("go"), "").unwrap();
}

/// Waits until it has done its deed.
pub fn await_done(stage: &Stage) -> String {
    wait_until("the plugin is done", SOON, || stage.path("done").exists());
    fs::read_to_string(stage.path("done")).unwrap()
}

/// Does nothing unless it is told to.
#[test]
fn play() {
    let Some(dir) = std::env::var_os(DIR).map(PathBuf::from) else { return };
    let deed = std::env::var(DO).unwrap();
    wait_until("it is let go on", SOON, || dir.join("go").exists());
    let done = match deed.as_str() {
        "Snapshot" => snapshot(&Client::new(&dir.join("run/supervisor.sock"))),
        "SnapshotAlone" => snapshot(&InProcess),
        _ => template(&dir),
    };
    fs::write(dir.join("done.new"), done).unwrap();
    fs::rename(dir.join("done.new"), dir.join("done")).unwrap();
    std::thread::sleep(Duration::from_secs(600));
}

fn snapshot(suspender: &dyn Suspender) -> String {
    let pool = KernelPool::find(&uid(1), Class::Volumes).unwrap().unwrap();
    let made = pool.create_snap(ThinId::new(2).unwrap(), ThinId::new(1).unwrap(), suspender);
    format!("{made:?}")
}

/// The socket is that of the supervisor; the pool stays open until the end of the plugin.
fn template(dir: &Path) -> String {
    let (pools, pool) = super::templates::open(dir);
    let data_plane = DataPlane::supervised(&dir.join("run/supervisor.sock"));
    let image = dir.join("mnt/image.qcow2");
    let device = templates::attach(&pool, &data_plane, &uid(7), &image, None).unwrap();
    std::mem::forget((pools, pool));
    device.display().to_string()
}
