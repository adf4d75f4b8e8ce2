//! A server that runs as a process of its own, and what it says.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use super::bed::{Bed, text};

fn program(bed: &Bed, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth-node"));
    command
        .args(arguments)
        .args(["--bucket", "test", "--prefix", "p", "-o", "json", "--store-endpoint", &bed.s3.endpoint()])
        .env("AWS_ACCESS_KEY_ID", bed.s3.access_key())
        .env("AWS_SECRET_ACCESS_KEY", bed.s3.secret_key())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// Imports a file under `images/NAME`. Returns its digest.
pub async fn import(bed: &Bed, file: &str) -> String {
    let (path, name) = (bed.file(file), format!("images/{file}"));
    let output = program(bed, &["template", "import", text(&path), "--name", &name]).output().await.unwrap();
    assert!(output.status.success());
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    told["digest"].as_str().unwrap().to_owned()
}

/// A server.
pub struct Served {
    child: Child,
    lines: Arc<Mutex<Vec<Value>>>,
    pub socket: PathBuf,
}

impl Served {
    /// Starts one, and waits until it listens.
    pub async fn start(bed: &Bed, image: &str, more: &[&str]) -> Self {
        let socket = bed.dir.path().join("nbd.sock");
        let arguments = ["template", "serve", image, "--socket", text(&socket), "--status-interval", "1"];
        let mut child = program(bed, &[&arguments[..], more].concat()).spawn().unwrap();
        let (lines, mut out) = (Arc::default(), BufReader::new(child.stdout.take().unwrap()).lines());
        let keep: Arc<Mutex<Vec<Value>>> = Arc::clone(&lines);
        tokio::spawn(async move {
            while let Ok(Some(line)) = out.next_line().await {
                keep.lock().unwrap().push(serde_json::from_str(&line).unwrap());
            }
        });
        let served = Self { child, lines, socket };
        served.line("listening").await;
        served
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", text(&self.socket))
    }

    /// The first line that tells of this.
    pub async fn line(&self, event: &str) -> Value {
        self.until(event, |line| line["event"] == event).await
    }

    /// Waits until the last line about the state says this.
    pub async fn state(&self, state: &str) -> Value {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let last = self.lines.lock().unwrap().iter().rfind(|line| line["event"] == "status").cloned();
            match last {
                Some(line) if line["health"]["state"] == state => return line,
                last => assert!(Instant::now() < until, "never {state}: {last:?}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn until(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(line) = self.lines.lock().unwrap().iter().find(|line| wanted(line)) {
                return line.clone();
            }
            assert!(Instant::now() < until, "never {what}: {:?}", self.lines.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The most memory that it has had, in bytes.
    pub fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id().unwrap())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }

    /// Asks it to end, which it does well and soon. Returns its last line.
    pub async fn end(mut self) -> Value {
        let id = i32::try_from(self.child.id().unwrap()).unwrap();
        kill(Pid::from_raw(id), Signal::SIGTERM).unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(10), self.child.wait()).await;
        assert!(ended.expect("it ends").unwrap().success());
        assert!(!self.socket.exists(), "the socket stays");
        self.line("ended").await
    }
}
