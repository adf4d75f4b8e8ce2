//! The S3 test server, and curl as its client.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, bail};
use berth_core::units::Bytes;
use serde_json::Value;

/// The only bucket.
pub const BUCKET: &str = "bench";
/// The server's keys: it listens on loopback only and holds test data only.
pub const KEYS: (&str, &str) = ("AKIATEST", "SECRETTEST");
/// How long it may take to listen.
const START: Duration = Duration::from_secs(30);
/// Clock ticks per second in `/proc/PID/stat`: 100 on every Linux that Rust runs on.
const TICKS: u32 = 100;

/// A running server; it ends when this is dropped.
pub struct Server {
    child: Child,
    data: PathBuf,
    /// `http://127.0.0.1:PORT`.
    pub endpoint: String,
}

/// What has arrived since some moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrived {
    /// Bytes of objects and parts.
    pub bytes: Bytes,
    /// Requests of every kind.
    pub requests: u64,
}

impl Server {
    /// Starts a server with its objects in `data`. It does not sync: clients are measured, not its disk.
    pub fn start(program: &Path, data: &Path) -> anyhow::Result<Self> {
        let mut child = Command::new(program)
            .arg("--data")
            .arg(data)
            .args(["--bucket", BUCKET, "--access-key", KEYS.0, "--secret-key", KEYS.1, "--no-fsync"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("running {}", program.display()))?;
        let stdout = child.stdout.take();
        let mut server = Self { child, data: data.to_owned(), endpoint: String::new() };
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            let mut line = String::new();
            let read = stdout.map(|stdout| BufReader::new(stdout).read_line(&mut line));
            // Nobody listens any more if it took too long.
            tell.send(read.map(|_| line)).ok();
        });
        let line = told.recv_timeout(START).context("the S3 server did not start in time")?;
        let line = line.context("the S3 server has no output")?;
        let Some(endpoint) = line.trim().strip_prefix("listening ") else {
            bail!("the S3 server did not start")
        };
        endpoint.clone_into(&mut server.endpoint);
        Ok(server)
    }

    /// How many requests it has logged.
    pub fn position(&self) -> anyhow::Result<usize> {
        Ok(self.log()?.len())
    }

    /// What arrived after `position`.
    pub fn arrived(&self, position: usize) -> anyhow::Result<Arrived> {
        Ok(add_up(self.log()?.get(position..).unwrap_or_default()))
    }

    /// Keys that were written after `position` and begin with `prefix`.
    pub fn written(&self, position: usize, prefix: &str) -> anyhow::Result<BTreeSet<String>> {
        let log = self.log()?;
        let wrote =
            |entry: &&Value| matches!(entry["op"].as_str(), Some("PutObject" | "CompleteMultipartUpload"));
        let keys = log.iter().skip(position).filter(wrote).filter_map(|entry| entry["key"].as_str());
        Ok(keys.filter(|key| key.starts_with(prefix)).map(str::to_owned).collect())
    }

    fn log(&self) -> anyhow::Result<Vec<Value>> {
        let path = self.data.join("requests.jsonl");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        text.lines().map(|line| serde_json::from_str(line).context("a line of the S3 server's log")).collect()
    }

    /// The CPU time that it has used.
    pub fn cpu(&self) -> anyhow::Result<Duration> {
        let path = format!("/proc/{}/stat", self.child.id());
        let stat = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        ticks(&stat)
            .map(|ticks| Duration::from_secs(ticks) / TICKS)
            .context("/proc/PID/stat is not as expected")
    }

    /// curl, signing for a server. It fails where the server refuses.
    pub fn curl() -> Command {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--fail", "--aws-sigv4", "aws:amz:us-east-1:s3"]).args([
            "--user",
            &format!("{}:{}", KEYS.0, KEYS.1),
            "--header",
            "x-amz-content-sha256: UNSIGNED-PAYLOAD",
        ]);
        curl
    }

    /// Where an object is.
    pub fn url(&self, key: &str) -> String {
        format!("{}/{BUCKET}/{key}", self.endpoint)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn add_up(entries: &[Value]) -> Arrived {
    let bytes = entries.iter().filter_map(|entry| entry["payload"].as_u64()).map(Bytes).sum();
    Arrived { bytes, requests: entries.len().try_into().unwrap_or(u64::MAX) }
}

/// User and system time: fields 14 and 15, after a name that may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ').skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_log_tells_what_arrived() {
        let log = [
            json!({"op": "PutObject", "key": "a", "payload": 5, "received": 90}),
            json!({"op": "HeadObject", "key": "a"}),
            json!({"op": "UploadPart", "key": "b", "payload": 7}),
        ];
        assert_eq!(add_up(&log), Arrived { bytes: Bytes(12), requests: 3 });
    }

    #[test]
    fn the_cpu_time_in_proc() {
        let stat = "12 (a ) b) S 1 2 3 4 5 6 7 8 9 10 30 12 0 0 20 0 1 0 5 6 7";
        assert_eq!(ticks(stat), Some(42));
        assert_eq!(ticks("12 (a) S 1"), None);
    }
}
