//! curl as the client: it signs by itself and shares no code with the servers.

#![allow(dead_code, missing_docs, clippy::unwrap_used)] // each test program uses its part

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The answer to one request.
#[derive(Debug)]
pub struct Answer {
    /// curl's exit status: 0, 18 (short body), 28 (time is up), 52 (no answer), 56 (reset) ...
    pub exit: i32,
    /// HTTP status, 0 without an answer.
    pub status: u16,
    /// Header names in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The content of the first XML element `name`.
    pub fn xml(&self, name: &str) -> String {
        self.xml_all(name).into_iter().next().unwrap_or_default()
    }

    /// The contents of all XML elements `name`.
    pub fn xml_all(&self, name: &str) -> Vec<String> {
        let (open, close) = (format!("<{name}>"), format!("</{name}>"));
        let text = self.text();
        text.split(&open).skip(1).filter_map(|p| p.split_once(&close)).map(|(v, _)| v.to_owned()).collect()
    }

    pub fn etag(&self) -> String {
        self.headers.get("etag").cloned().unwrap_or_default()
    }

    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "curl {}: {}", self.exit, self.text());
        self
    }
}

/// Where to send requests, and how to sign them.
#[derive(Debug, Clone)]
pub struct Curl {
    pub endpoint: String,
    /// `access:secret`; `None` does not sign.
    pub user: Option<String>,
}

impl Curl {
    pub fn signed(endpoint: &str) -> Self {
        Self { endpoint: endpoint.to_owned(), user: Some("AKIATEST:SECRETTEST".to_owned()) }
    }

    /// The command for `args`; S3 query parameters must come in order of their names.
    pub fn command(&self, target: &str, args: &[&str]) -> Command {
        let mut command = Command::new("curl");
        command.args(["--silent", "--max-time", "60", "--path-as-is"]).args(args);
        if let Some(user) = &self.user {
            command.args(["--aws-sigv4", "aws:amz:us-east-1:s3", "--user", user]);
            if !args.iter().any(|a| a.starts_with("x-amz-content-sha256")) {
                command.args(["-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD"]);
            }
        }
        let url = if target.starts_with("http://") {
            target.to_owned()
        } else {
            format!("{}{target}", self.endpoint)
        };
        command.arg(url).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    pub fn send(&self, target: &str, args: &[&str]) -> Answer {
        let dir = tempfile::tempdir().unwrap();
        let (head, body) = (dir.path().join("head"), dir.path().join("body"));
        let exit = self
            .command(target, args)
            .args(["-D", head.to_str().unwrap(), "-o", body.to_str().unwrap()])
            .status()
            .expect("curl is installed")
            .code()
            .unwrap_or(-1);
        let head = fs::read_to_string(head).unwrap_or_default();
        // An interim "100 Continue" is not the answer.
        let heads = head.split("\r\n\r\n").filter(|h| !h.trim().is_empty() && !h.starts_with("HTTP/1.1 100"));
        let last = heads.last().unwrap_or("");
        let status = last.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        let pairs = last.lines().filter_map(|l| l.split_once(": "));
        let headers = pairs.map(|(n, v)| (n.to_ascii_lowercase(), v.trim().to_owned())).collect();
        Answer { exit, status, headers, body: fs::read(body).unwrap_or_default() }
    }

    pub fn get(&self, target: &str) -> Answer {
        self.send(target, &[])
    }

    pub fn head(&self, target: &str) -> Answer {
        self.send(target, &["--head"])
    }

    pub fn delete(&self, target: &str) -> Answer {
        self.send(target, &["-X", "DELETE"])
    }

    pub fn post(&self, target: &str, body: &str) -> Answer {
        self.send(target, &["-X", "POST", "--data-binary", body, "-H", "content-type: application/xml"])
    }

    pub fn put(&self, target: &str, body: &[u8], headers: &[&str]) -> Answer {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), body).unwrap();
        self.put_file(target, file.path(), headers)
    }

    pub fn put_file(&self, target: &str, file: &Path, headers: &[&str]) -> Answer {
        let mut args = vec!["-T", file.to_str().unwrap()];
        args.extend(headers.iter().flat_map(|h| ["-H", *h]));
        self.send(target, &args)
    }

    /// Starts a PUT and does not wait for it.
    pub fn spawn_put(&self, target: &str, file: &Path, extra: &[&str]) -> Child {
        let mut args = vec!["-T", file.to_str().unwrap()];
        args.extend(extra);
        self.command(target, &args).spawn().expect("curl is installed")
    }
}
