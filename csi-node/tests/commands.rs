//! The commands that need no cluster, as people and scripts run them.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_core::reason::Reason;
use berth_node::agent::asked;
use berth_node::operation::{Answer, Operation, Outcome, PoolLineState, Refusal, VolumeKind};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

fn berth_node(dir: &Path, arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth-node"));
    command.args(arguments.split_whitespace());
    command
        .env("BERTH_STATE_DIR", dir.join("state"))
        .env("BERTH_MOUNT_ROOT", dir.join("mnt"))
        .env("BERTH_NODE_NAME", "n1")
        .env("RUST_LOG", "error") // a machine may lack what other pools need, and say so
        .stdin(Stdio::null());
    command
}

fn run(dir: &Path, arguments: &str) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = berth_node(dir, arguments).output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

/// A batch that has the pools open, and can be spoken with.
struct Batch {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Batch {
    fn start(dir: &Path) -> Self {
        let mut command = berth_node(dir, "batch");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, input, output }
    }

    fn ask(&mut self, line: &str) -> Answer {
        let input = self.input.as_mut().unwrap();
        input.write_all(format!("{line}\n").as_bytes()).unwrap();
        input.flush().unwrap();
        let mut answer = String::new();
        self.output.read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    fn end(mut self) -> Option<i32> {
        drop(self.input.take());
        self.child.wait().unwrap().code()
    }
}

#[test]
fn a_batch_answers_each_line_at_once_and_ends_with_1_if_one_was_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut batch = Batch::start(dir.path());
    // Each answer is awaited before the next line is written: none is held back.
    assert_eq!(batch.ask(r#"{"do":"poolList"}"#), Answer::Done(Outcome::Pools(Vec::new())));
    assert_eq!(batch.end(), Some(0));

    let mut batch = Batch::start(dir.path());
    let refused = batch.ask(r#"{"do":"poolForget","pool":"../x"}"#);
    assert!(matches!(&refused, Answer::Refused(why) if why.reason == Reason::InvalidSpec), "{refused:?}");
    assert_eq!(batch.ask(r#"{"do":"poolList"}"#), Answer::Done(Outcome::Pools(Vec::new())));
    assert_eq!(batch.end(), Some(1));

    let file = dir.path().join("operations");
    std::fs::write(&file, "{\"do\":\"poolList\"}\n").unwrap();
    let (code, out, _) = run(dir.path(), &format!("batch {}", file.display()));
    assert_eq!((code, out.lines().count()), (Some(0), 1));
    let (code, _, err) = run(dir.path(), "batch /nothing/there");
    assert!(code == Some(1) && err.contains("/nothing/there"), "{err}");
}

#[test]
fn two_processes_never_have_the_pools_open_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut batch = Batch::start(dir.path());
    batch.ask(r#"{"do":"poolList"}"#);
    let (code, out, err) = run(dir.path(), "pool list -o json");
    let holder = format!("process {} (berth-node batch)", batch.child.id());
    assert!(code == Some(1) && err.starts_with("InUse: ") && err.contains(&holder), "{err}");
    assert!(matches!(serde_json::from_str(&out), Ok(Answer::Refused(why)) if why.reason == Reason::InUse));

    // It waits for a short while, and a process that was killed holds nothing.
    let waiting = berth_node(dir.path(), "pool list").stdout(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    batch.child.kill().unwrap();
    let waited = waiting.wait_with_output().unwrap();
    assert!(waited.status.success() && waited.stdout.starts_with(b"NAME "), "{waited:?}");
    batch.child.wait().unwrap();
}

/// Stands for the agent: says which operation it was asked.
struct Echo;

impl asked::Carrier for Echo {
    async fn carry(&self, operation: Operation) -> Result<Outcome, Refusal> {
        match operation {
            Operation::PoolForget { .. } => {
                Err(Refusal { reason: Reason::InUse, message: "asked the agent".to_owned() })
            }
            other => Ok(Outcome::Device(PathBuf::from(format!("/{}", other.name())))),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_ask_the_agent_while_it_runs() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, stop) = (asked::socket(&dir.path().join("state")), CancellationToken::new());
    let serving = tokio::spawn(asked::serve(Arc::new(Echo), socket.clone(), stop.clone()));
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let path = dir.path().to_owned();
    let ask = move || {
        assert_eq!(run(&path, "volume attach fast v"), (Some(0), "/VolumeAttach\n".into(), String::new()));
        let forget = run(&path, "pool forget fast");
        assert_eq!(forget, (Some(1), String::new(), "InUse: asked the agent\n".into()));
        let (code, out, _) = run(&path, "volume create fast --size 1Gi");
        let (uid, device) = out.split_once('\n').unwrap();
        assert!(code == Some(0) && uid.len() == 36 && device == "/VolumeCreate\n", "{out}");
        let mut batch = Batch::start(&path);
        let answer = batch.ask(r#"{"do":"poolCheck","pool":"fast"}"#);
        assert_eq!(answer, Answer::Done(Outcome::Device("/PoolCheck".into())));
        assert_eq!(batch.end(), Some(0));
        assert!(!path.join("state/node.lock").exists(), "it needs no lock");
    };
    tokio::task::spawn_blocking(ask).await.unwrap();
    stop.cancel();
    serving.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_not_root_is_turned_away_even_if_it_can_connect() {
    let (dir, nobody) = (tempfile::tempdir().unwrap(), 65534);
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: changing the user needs root");
        return;
    }
    let program = dir.path().join("berth-node");
    std::fs::copy(env!("CARGO_BIN_EXE_berth-node"), &program).unwrap();
    let (socket, stop) = (asked::socket(&dir.path().join("state")), CancellationToken::new());
    tokio::spawn(asked::serve(Arc::new(Echo), socket.clone(), stop.clone()));
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let open = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    open(dir.path(), 0o755);
    let state = dir.path().join("state");
    let ask = move || {
        let mut command = Command::new(program);
        command.args(["pool", "list", "--state-dir"]).arg(state).uid(nobody).gid(nobody).output().unwrap()
    };
    let denied = tokio::task::spawn_blocking(ask.clone()).await.unwrap();
    let text = String::from_utf8_lossy(&denied.stderr).into_owned();
    assert!(denied.status.code() == Some(1) && text.contains("Permission denied"), "{text}");
    open(&socket, 0o666);
    let denied = tokio::task::spawn_blocking(ask).await.unwrap();
    let text = String::from_utf8_lossy(&denied.stderr).into_owned();
    assert!(denied.status.code() == Some(1) && text.contains("has ended the conversation"), "{text}");
    stop.cancel();
}

/// The real agent, whose API server is away.
#[test]
fn the_agent_answers_commands_and_no_second_one_starts_beside_it() {
    struct Running(Child);
    impl Drop for Running {
        fn drop(&mut self) {
            drop(self.0.kill());
            drop(self.0.wait());
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let kubeconfig = dir.path().join("kubeconfig");
    let config = "{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c, user: u}}], \
                  clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}], users: [{name: u, user: {}}]}";
    std::fs::write(&kubeconfig, config).unwrap();
    let agent = |number| {
        let mut command = berth_node(&path, "agent --metrics-addr 127.0.0.1:0");
        command.env("KUBECONFIG", &kubeconfig).arg("--csi-socket");
        command.arg(path.join(format!("csi{number}.sock"))).stderr(Stdio::null());
        command
    };
    let running = Running(agent(1).spawn().unwrap());
    let socket = asked::socket(&dir.path().join("state"));
    let until = Instant::now() + Duration::from_secs(60);
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < until, "the agent listens");
        std::thread::sleep(Duration::from_millis(20));
    }
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let (code, out, err) = run(dir.path(), "pool list");
    assert!(code == Some(0) && out.starts_with("NAME "), "{err}");
    let root = nix::unistd::geteuid().is_root();
    let bed = Bed(dir);
    let volume = root.then(|| {
        bed.ok(&format!("pool create fast {}", bed.place()));
        bed.ok("volume create fast --size 8Mi")
    });
    let second = agent(2).stderr(Stdio::piped()).output().unwrap();
    let told = String::from_utf8_lossy(&second.stderr).into_owned();
    let holder = format!("process {} (berth-node agent)", running.0.id());
    assert!(second.status.code() == Some(1) && told.contains(&holder), "{told}");
    drop(running);
    // It was killed, so its socket is still there: the command opens the pools itself, and finds what the agent has made.
    assert!(socket.exists());
    match volume {
        Some(volume) => assert!(bed.ok("volume list fast").contains(volume.trim())),
        None => println!("without root, no pool is made"),
    }
}

#[test]
fn pages_and_completions_are_written_by_the_program() {
    let dir = tempfile::tempdir().unwrap();
    let pages = dir.path().join("man");
    assert_eq!(run(dir.path(), &format!("man --dir {}", pages.display())).0, Some(0));
    assert!(std::fs::read_to_string(pages.join("berth-node-pool-create.1")).unwrap().contains("wipe"));
    let (code, out, _) = run(dir.path(), "completions bash");
    assert!(code == Some(0) && out.contains("berth-node"));
    assert_eq!(run(dir.path(), "completions cmd.exe").0, Some(2));
}

/// A directory pool's state and its mounts, gone again however a test ends.
struct Bed(TempDir);

impl Bed {
    /// `None`, with the reason, where loop devices and mounts are not allowed.
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: mounts and loop devices need root");
            return None;
        }
        Some(Self(tempfile::tempdir().unwrap()))
    }

    /// Runs a command that has to succeed, and returns what it prints.
    fn ok(&self, arguments: &str) -> String {
        let (code, out, err) = run(self.0.path(), arguments);
        assert_eq!(code, Some(0), "{arguments}: {out}{err}");
        out
    }

    fn refused(&self, arguments: &str, reason: Reason) -> String {
        let (code, out, err) = run(self.0.path(), arguments);
        assert_eq!(code, Some(1), "{arguments}: {out}{err}");
        assert!(err.starts_with(&format!("{reason}: ")), "{arguments}: {err}");
        err
    }

    fn done(&self, arguments: &str) -> Outcome {
        let answer = self.ok(&format!("{arguments} -o json"));
        match serde_json::from_str(&answer).unwrap() {
            Answer::Done(outcome) => outcome,
            Answer::Refused(why) => panic!("{arguments}: {why}"),
        }
    }

    fn pools(&self) -> Vec<(Option<String>, PoolLineState)> {
        let Outcome::Pools(pools) = self.done("pool list") else { panic!("pools") };
        pools.into_iter().map(|line| (line.pool.map(|name| name.to_string()), line.state)).collect()
    }

    fn place(&self) -> String {
        format!("--path {} --size 512Mi", self.0.path().join("area").display())
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let dir = self.0.path();
        if let Ok(Answer::Done(Outcome::Volumes(volumes))) =
            serde_json::from_str(&run(dir, "volume list fast -o json").1)
        {
            for volume in volumes {
                run(dir, &format!("volume detach fast {}", volume.uid));
            }
            run(dir, "pool destroy fast --with-contents");
        }
    }
}

#[test]
fn a_pool_lives_its_whole_life_by_commands() {
    let Some(bed) = Bed::new() else { return };
    let uid = bed.ok(&format!("pool create fast {}", bed.place()));
    let uid = uid.trim();
    assert_eq!(bed.pools(), [(Some("fast".to_owned()), PoolLineState::Open)]);
    // Under its name and UID it is made once.
    bed.ok(&format!("pool create fast {} --uid {uid}", bed.place()));
    bed.refused(
        &format!("pool create other {} --uid 0f8fad5b-d9cb-469f-a165-70867728950e", bed.place()),
        Reason::InUseByPool,
    );
    assert_eq!(bed.done("pool check fast"), Outcome::Findings(Vec::new()));

    let volume = bed.ok("volume create fast --size 8Mi");
    bed.ok("pool forget fast");
    assert!(!bed.pools().contains(&(Some("fast".to_owned()), PoolLineState::Open)));
    bed.ok(&format!("pool introduce fast --area {uid} {}", bed.place()));
    assert!(bed.ok("volume list fast").contains(volume.trim()));

    let lost = bed.refused("pool destroy fast", Reason::InUse);
    assert!(lost.contains("What would be destroyed:") && lost.contains(volume.trim()), "{lost}");
    bed.ok("pool destroy fast --with-contents");
    assert_eq!(bed.pools(), []);
    bed.refused("pool check fast", Reason::PoolNotFound);
}

#[test]
fn a_volume_lives_its_whole_life_by_commands() {
    let Some(bed) = Bed::new() else { return };
    bed.ok(&format!("pool create fast {}", bed.place()));
    let volume = bed.ok("volume create fast --size 8Mi --label app=db");
    let volume = volume.trim();
    // By the same name it is made once, and not in another way.
    bed.ok(&format!("volume create fast --size 8Mi --label app=db --uid {volume}"));
    bed.refused(&format!("volume create fast --size 9Mi --uid {volume}"), Reason::AlreadyDifferent);
    let device = bed.ok(&format!("volume attach fast {volume}"));
    assert_eq!(bed.ok(&format!("volume attach fast {volume}")), device, "attached once");
    // The device outlives the command that made it.
    std::fs::write(device.trim(), b"a guest's data").unwrap();
    let Outcome::Volumes(listed) = bed.done("volume list fast") else { panic!("volumes") };
    assert_eq!((listed.len(), listed[0].kind), (1, VolumeKind::Volume));
    assert_eq!(listed[0].device.as_deref(), Some(Path::new(device.trim())));
    assert_eq!(listed[0].labels.get("app").map(String::as_str), Some("db"));

    let lost = bed.refused(&format!("volume destroy fast {volume}"), Reason::InUse);
    assert!(lost.contains("What would be destroyed:") && lost.contains("app=db"), "{lost}");
    let snapshot = bed.ok(&format!("volume snapshot fast {volume}"));
    bed.refused(&format!("volume resize fast {} --size 1Gi", snapshot.trim()), Reason::IsSnapshot);
    bed.ok(&format!("volume resize fast {volume} --size 16Mi"));
    let clone = bed.ok(&format!("volume clone fast {}", snapshot.trim()));
    assert!(bed.ok(&format!("volume map fast {}", clone.trim())).contains("own "));
    bed.ok(&format!("volume detach fast {volume}"));
    for uid in [volume, snapshot.trim(), clone.trim()] {
        bed.ok(&format!("volume destroy fast {uid}"));
    }
    assert_eq!(bed.done("volume list fast"), Outcome::Volumes(Vec::new()));
    bed.ok("pool destroy fast");
}
