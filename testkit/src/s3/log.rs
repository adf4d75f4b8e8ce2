//! The request log of the test servers: what really arrived and what was really answered.
//!
//! One JSON object per line, in the order in which requests ended. Guarantees: the line of a mutating request is on disk
//! before the request is answered; a line cut short by a crash is dropped when the log is opened again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// One request, as the server saw it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Entry {
    /// Position in the log, from 1, without gaps, also across restarts.
    pub seq: u64,
    /// Time of the end of the request: milliseconds since 1970.
    pub time_ms: u64,
    /// Milliseconds from the request's head to its end.
    pub took_ms: u64,
    /// HTTP method.
    pub method: String,
    /// S3 operation (`PutObject`), `Refused` if the request failed before it was known, the switch for an HTTP source.
    pub op: String,
    /// Bucket; empty for an HTTP source.
    pub bucket: String,
    /// Object key, or file path for an HTTP source.
    pub key: String,
    /// Keys named in the body of a `DeleteObjects`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
    /// `Range` header.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub range: Option<String>,
    /// Body bytes received on the wire, with chunk framing and trailers.
    pub received: u64,
    /// Object bytes received, without framing. Absent if the body was not received to its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payload: Option<u64>,
    /// Body bytes handed to the connection.
    pub sent: u64,
    /// HTTP status of the answer, sent or lost (see `complete`); 0 if the request was cut before there was one.
    pub status: u16,
    /// Multipart upload.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upload_id: Option<String>,
    /// Part number, 1 to 10,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub part: Option<u32>,
    /// Whether the object (or part) was there before a request that writes or deletes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub existed: Option<bool>,
    /// Fault rule that was applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
    /// Whether the answer was handed over to its last byte.
    pub complete: bool,
}

impl Entry {
    /// Whether the request was performed: its answer, sent or lost, has a 2xx status.
    pub fn succeeded(&self) -> bool {
        (200..300).contains(&self.status)
    }
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Why a request log could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file could not be opened, read or written.
    #[error("request log {path} failed")]
    Io {
        /// The log.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A line in the middle is not an entry.
    #[error("request log {path} line {line} is not an entry")]
    Line {
        /// The log.
        path: PathBuf,
        /// Line number from 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// The writing side. Lines are written at once and synced in groups.
#[derive(Debug)]
pub(crate) struct LogWriter {
    path: PathBuf,
    state: Mutex<WriteState>,
    /// The last sequence number known to be on disk; the lock is held while syncing, which groups waiters.
    synced: Mutex<u64>,
    fsync: bool,
}

#[derive(Debug)]
struct WriteState {
    file: File,
    seq: u64,
}

impl LogWriter {
    /// Opens or creates the log at `path`, cutting off a torn last line.
    pub(crate) fn open(path: &Path, fsync: bool) -> Result<Self, LogError> {
        let fail = |source| LogError::Io { path: path.to_owned(), source };
        let log = if path.exists() { RequestLog::read(path)? } else { RequestLog::default() };
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path)
            .map_err(fail)?;
        file.set_len(log.intact_bytes).map_err(fail)?;
        file.seek(SeekFrom::End(0)).map_err(fail)?;
        let seq = log.entries.last().map_or(0, |e| e.seq);
        Ok(Self {
            path: path.to_owned(),
            state: Mutex::new(WriteState { file, seq }),
            synced: Mutex::new(seq),
            fsync,
        })
    }

    /// Writes `entry` with the next sequence number and returns that number.
    pub(crate) fn append(&self, entry: &mut Entry) -> Result<u64, LogError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        entry.seq = state.seq + 1;
        entry.time_ms = now_ms();
        let mut line = serde_json::to_vec(entry).expect("an entry has string keys only");
        line.push(b'\n');
        state.file.write_all(&line).map_err(|source| LogError::Io { path: self.path.clone(), source })?;
        state.seq = entry.seq;
        Ok(entry.seq)
    }

    /// Returns once everything up to `seq` is on disk. Blocks; one sync serves all who wait.
    pub(crate) fn sync(&self, seq: u64) -> Result<(), LogError> {
        if !self.fsync {
            return Ok(());
        }
        let fail = |source| LogError::Io { path: self.path.clone(), source };
        let mut synced = self.synced.lock().unwrap_or_else(PoisonError::into_inner);
        if *synced >= seq {
            return Ok(());
        }
        let (file, written) = {
            let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            (state.file.try_clone().map_err(fail)?, state.seq)
        };
        file.sync_data().map_err(fail)?;
        *synced = written;
        Ok(())
    }

    /// Where the log is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// How often, and with how many bytes, something was received again after its first time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Repeats {
    /// Receipts after the first.
    pub times: u64,
    /// Object bytes of those.
    pub bytes: u64,
}

/// The reading side: a snapshot of a log, with the totals that tests compare a program's claims against.
#[derive(Debug, Clone, Default)]
pub struct RequestLog {
    entries: Vec<Entry>,
    intact_bytes: u64,
}

impl RequestLog {
    /// Reads the log at `path`. A last line without a newline is ignored.
    pub fn read(path: &Path) -> Result<Self, LogError> {
        let fail = |source| LogError::Io { path: path.to_owned(), source };
        let mut reader = BufReader::new(File::open(path).map_err(fail)?);
        let mut log = Self::default();
        let mut line = Vec::new();
        loop {
            line.clear();
            let n = reader.read_until(b'\n', &mut line).map_err(fail)?;
            if n == 0 || line.last() != Some(&b'\n') {
                return Ok(log);
            }
            let entry = serde_json::from_slice(&line).map_err(|source| LogError::Line {
                path: path.to_owned(),
                line: log.entries.len() + 1,
                source,
            })?;
            log.entries.push(entry);
            log.intact_bytes += n as u64;
        }
    }

    /// All entries, oldest first.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The entries after sequence number `seq`, to look at one phase of a test.
    #[must_use]
    pub fn after(&self, seq: u64) -> Self {
        let entries = self.entries.iter().filter(|e| e.seq > seq).cloned().collect();
        Self { entries, intact_bytes: self.intact_bytes }
    }

    /// The last sequence number; 0 for an empty log.
    pub fn last_seq(&self) -> u64 {
        self.entries.last().map_or(0, |e| e.seq)
    }

    /// The performed requests of operation `op`.
    pub fn succeeded<'a>(&'a self, op: &'a str) -> impl Iterator<Item = &'a Entry> {
        self.entries.iter().filter(move |e| e.op == op && e.succeeded())
    }

    /// Number of requests by operation, whatever their outcome.
    pub fn counts_by_op(&self) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for entry in &self.entries {
            *counts.entry(entry.op.clone()).or_default() += 1;
        }
        counts
    }

    /// Number of requests by status; 0 stands for requests without an answer.
    pub fn counts_by_status(&self) -> BTreeMap<u16, u64> {
        let mut counts = BTreeMap::new();
        for entry in &self.entries {
            *counts.entry(entry.status).or_default() += 1;
        }
        counts
    }

    /// Object bytes received per key by successful `PutObject` requests.
    pub fn put_bytes_by_key(&self) -> BTreeMap<String, u64> {
        let mut bytes = BTreeMap::new();
        for entry in self.succeeded("PutObject") {
            *bytes.entry(entry.key.clone()).or_default() += entry.payload.unwrap_or(0);
        }
        bytes
    }

    /// Keys that `PutObject` delivered more than once, with the surplus. A put that was performed but whose answer was
    /// lost counts as delivered.
    pub fn repeated_puts(&self) -> BTreeMap<String, Repeats> {
        Self::repeats(self.entries.iter().filter(|e| e.op == "PutObject").map(|e| (e.key.clone(), e)))
    }

    /// Parts that `UploadPart` delivered more than once, by upload and part number, with the surplus.
    pub fn repeated_parts(&self) -> BTreeMap<(String, u32), Repeats> {
        Self::repeats(
            self.entries
                .iter()
                .filter(|e| e.op == "UploadPart")
                .filter_map(|e| Some(((e.upload_id.clone()?, e.part?), e))),
        )
    }

    fn repeats<'a, K: Ord>(deliveries: impl Iterator<Item = (K, &'a Entry)>) -> BTreeMap<K, Repeats> {
        let mut seen: BTreeMap<K, Option<Repeats>> = BTreeMap::new();
        for (key, entry) in deliveries {
            let Some(bytes) = entry.payload else { continue };
            seen.entry(key)
                .and_modify(|r| {
                    let r = r.get_or_insert_default();
                    r.times += 1;
                    r.bytes += bytes;
                })
                .or_insert(None);
        }
        seen.into_iter().filter_map(|(k, r)| Some((k, r?))).collect()
    }

    /// Uploads that were created and neither completed nor aborted, by what was performed.
    pub fn open_uploads(&self) -> BTreeSet<String> {
        let mut open = BTreeSet::new();
        for entry in self.entries.iter().filter(|e| e.succeeded()) {
            let Some(id) = &entry.upload_id else { continue };
            match entry.op.as_str() {
                "CreateMultipartUpload" => drop(open.insert(id.clone())),
                "CompleteMultipartUpload" | "AbortMultipartUpload" => drop(open.remove(id)),
                _ => {}
            }
        }
        open
    }

    /// Body bytes received by all requests, failed and aborted ones included.
    pub fn bytes_received(&self) -> u64 {
        self.entries.iter().map(|e| e.received).sum()
    }

    /// Body bytes sent by all requests.
    pub fn bytes_sent(&self) -> u64 {
        self.entries.iter().map(|e| e.sent).sum()
    }

    /// How often each fault rule was applied.
    pub fn faults(&self) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for fault in self.entries.iter().filter_map(|e| e.fault.as_ref()) {
            *counts.entry(fault.clone()).or_default() += 1;
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, status: u16, payload: Option<u64>) -> Entry {
        Entry { op: "PutObject".into(), key: key.into(), status, payload, received: 10, ..Entry::default() }
    }

    fn log_of(entries: Vec<Entry>) -> (tempfile::TempDir, PathBuf, LogWriter) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("requests.jsonl");
        let writer = LogWriter::open(&path, true).unwrap();
        for mut entry in entries {
            let seq = writer.append(&mut entry).unwrap();
            writer.sync(seq).unwrap();
        }
        (dir, path, writer)
    }

    #[test]
    fn repeats_count_what_came_after_the_first_delivery() {
        let (_dir, path, _) = log_of(vec![
            put("a", 200, Some(7)),
            put("a", 0, Some(7)),
            put("a", 503, None),
            put("b", 200, Some(3)),
            put("b", 412, Some(3)),
        ]);
        let log = RequestLog::read(&path).unwrap();
        assert_eq!(log.put_bytes_by_key(), BTreeMap::from([("a".into(), 7), ("b".into(), 3)]));
        let surplus = |bytes| Repeats { times: 1, bytes };
        assert_eq!(log.repeated_puts(), BTreeMap::from([("a".into(), surplus(7)), ("b".into(), surplus(3))]));
        assert_eq!(log.counts_by_op()["PutObject"], 5);
        assert_eq!(log.counts_by_status()[&0], 1);
        assert_eq!(log.bytes_received(), 50);
        assert_eq!(log.after(3).entries().len(), 2);
    }

    #[test]
    fn open_uploads_are_those_without_an_answered_end() {
        let step = |op: &str, id: &str, status| Entry {
            op: op.into(),
            upload_id: Some(id.into()),
            status,
            ..Entry::default()
        };
        let (_dir, path, _) = log_of(vec![
            step("CreateMultipartUpload", "u1", 200),
            step("CreateMultipartUpload", "u2", 200),
            step("CreateMultipartUpload", "u3", 200),
            step("CompleteMultipartUpload", "u1", 200),
            step("AbortMultipartUpload", "u2", 204),
            step("AbortMultipartUpload", "u3", 503),
        ]);
        assert_eq!(RequestLog::read(&path).unwrap().open_uploads(), BTreeSet::from(["u3".to_owned()]));
    }

    #[test]
    fn a_torn_last_line_is_dropped_and_numbers_go_on() {
        let (_dir, path, writer) = log_of(vec![put("a", 200, Some(1)), put("b", 200, Some(1))]);
        drop(writer);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"seq\":3,\"op\":\"Pu").unwrap();
        let writer = LogWriter::open(&path, true).unwrap();
        assert_eq!(writer.append(&mut put("c", 200, Some(1))).unwrap(), 3);
        let keys: Vec<_> = RequestLog::read(&path).unwrap().entries.into_iter().map(|e| e.key).collect();
        assert_eq!(keys, ["a", "b", "c"]);
    }

    #[test]
    fn a_damaged_line_in_the_middle_is_an_error() {
        let (_dir, path, _) = log_of(vec![put("a", 200, Some(1))]);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"garbage\n").unwrap();
        assert!(matches!(RequestLog::read(&path), Err(LogError::Line { line: 2, .. })));
    }
}
