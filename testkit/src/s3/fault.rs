//! Faults that the S3 server commits on request.
//!
//! Rules are a JSON array in `faults.json` of the data directory. The file is looked at before every request, so that any
//! process can change the rules of a running server. The first rule that matches and fires decides.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

/// The rules' file name in the data directory.
pub const FAULTS_FILE: &str = "faults.json";

/// What happens to a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum FaultAction {
    /// 503 `SlowDown`; nothing is performed.
    SlowDown,
    /// 403 `AccessDenied`; nothing is performed.
    Deny,
    /// RST: of a PUT or POST once this many body bytes have arrived (nothing is performed; a shorter body is not
    /// affected), of any other request once this many body bytes were sent.
    Reset {
        /// Body bytes before the reset.
        after_bytes: u64,
    },
    /// The answer's body ends after this many bytes with an orderly close; the announced length stays.
    Truncate {
        /// Body bytes that are sent.
        after_bytes: u64,
    },
    /// The answer stops after this many bytes and the connection stays open.
    Stall {
        /// Body bytes that are sent.
        after_bytes: u64,
    },
    /// All bits of one byte of the answer's body are flipped.
    Corrupt {
        /// Offset in the body.
        at: u64,
    },
    /// The request is performed at once, its answer comes late.
    Delay {
        /// Milliseconds.
        ms: u64,
    },
    /// The request is performed and logged, its answer is never sent: the connection is reset.
    LostResponse,
    /// A `PutObject` is received, answered and logged as if it had been performed, and nothing of it is stored. An object
    /// that is there already stays as it is.
    Lose,
    /// A listing shows the bucket as it was: without keys created, and with keys deleted, in this time. At most the last
    /// 4,096 deletions since the server's start are remembered.
    StaleList {
        /// Milliseconds.
        age_ms: u64,
    },
}

/// Which requests a fault happens to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FaultRule {
    /// Names the rule in the request log; its `count` is kept by this name, also across restarts.
    pub id: String,
    /// S3 operation, for example `UploadPart`; absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub op: Option<String>,
    /// Start of the object key; absent: all. A listing's key is its prefix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_prefix: Option<String>,
    /// Matching requests that are left alone first, since the server's start.
    #[serde(default)]
    pub skip: u64,
    /// How often the rule fires; absent: without end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
    /// Share of matching requests it fires on, 0 to 100 percent; absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<u8>,
    /// Chooses which ones: the same seed chooses the same positions.
    #[serde(default)]
    pub seed: u64,
    /// What happens.
    pub action: FaultAction,
}

impl FaultRule {
    /// A rule with a new id that fires on every request.
    pub fn new(action: FaultAction) -> Self {
        let id = uuid::Uuid::new_v4().simple().to_string();
        Self { id, op: None, key_prefix: None, skip: 0, count: None, percent: None, seed: 0, action }
    }

    /// Only requests of this S3 operation.
    #[must_use]
    pub fn op(mut self, op: &str) -> Self {
        self.op = Some(op.to_owned());
        self
    }

    /// Only keys that start with `prefix`.
    #[must_use]
    pub fn key_prefix(mut self, prefix: &str) -> Self {
        self.key_prefix = Some(prefix.to_owned());
        self
    }

    /// Only after `requests` matching ones.
    #[must_use]
    pub fn skip(mut self, requests: u64) -> Self {
        self.skip = requests;
        self
    }

    /// At most `count` times.
    #[must_use]
    pub fn times(mut self, count: u64) -> Self {
        self.count = Some(count);
        self
    }

    /// On `percent` of the matching requests, chosen by `seed`.
    #[must_use]
    pub fn percent(mut self, percent: u8, seed: u64) -> Self {
        (self.percent, self.seed) = (Some(percent), seed);
        self
    }

    fn matches(&self, op: &str, key: &str) -> bool {
        self.op.as_ref().is_none_or(|o| o == op)
            && self.key_prefix.as_ref().is_none_or(|p| key.starts_with(p))
    }

    /// Whether it fires on its `nth` match (from 0) after having fired `fired` times.
    fn fires(&self, nth: u64, fired: u64) -> bool {
        nth >= self.skip
            && self.count.is_none_or(|count| fired < count)
            && self
                .percent
                .is_none_or(|percent| mix(self.seed ^ nth.rotate_left(32)) % 100 < u64::from(percent))
    }
}

/// The finalizer of splitmix64: every input bit changes half of the output bits.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Why rules could not be stored or read.
#[derive(Debug, thiserror::Error)]
pub enum FaultsError {
    /// The file could not be read or replaced.
    #[error("fault rules {path} failed")]
    Io {
        /// The rules.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not an array of rules.
    #[error("fault rules {path} are not valid")]
    Invalid {
        /// The rules.
        path: PathBuf,
        /// What is wrong with them.
        source: serde_json::Error,
    },
}

/// Replaces the rules of the server that uses `data_dir`; they hold from the next request on.
pub fn write_rules(data_dir: &Path, rules: &[FaultRule]) -> Result<(), FaultsError> {
    let path = data_dir.join(FAULTS_FILE);
    let temp = data_dir.join(format!(".faults-{}", uuid::Uuid::new_v4().simple()));
    let invalid = |source| FaultsError::Invalid { path: path.clone(), source };
    let text = serde_json::to_vec_pretty(rules).map_err(invalid)?;
    // A rename gives the file another inode, so that a change within one clock tick is seen.
    File::create(&temp)
        .and_then(|mut file| file.write_all(&text))
        .and_then(|()| fs::rename(&temp, &path))
        .map_err(|source| FaultsError::Io { path, source })
}

/// Decides about every request; knows how often each rule has matched and fired.
#[derive(Debug)]
pub(crate) struct FaultEngine {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Modification time, length and inode of what was read last.
    stamp: Option<(i64, i64, u64, u64)>,
    rules: Vec<FaultRule>,
    matched: HashMap<String, u64>,
    fired: BTreeMap<String, u64>,
}

impl FaultEngine {
    /// Reads rules in `data_dir`; `fired` is how often each rule fired in earlier runs.
    pub(crate) fn new(data_dir: &Path, fired: BTreeMap<String, u64>) -> Self {
        Self { path: data_dir.join(FAULTS_FILE), state: Mutex::new(State { fired, ..State::default() }) }
    }

    /// The fault for this request, with the id of its rule.
    pub(crate) fn decide(&self, op: &str, key: &str) -> Result<Option<(String, FaultAction)>, FaultsError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.refresh(&mut state)?;
        let State { rules, matched, fired, .. } = &mut *state;
        for rule in rules.iter().filter(|r| r.matches(op, key)) {
            let nth = matched.entry(rule.id.clone()).or_default();
            let fired = fired.entry(rule.id.clone()).or_default();
            let fires = rule.fires(*nth, *fired);
            *nth += 1;
            if fires {
                *fired += 1;
                return Ok(Some((rule.id.clone(), rule.action.clone())));
            }
        }
        Ok(None)
    }

    fn refresh(&self, state: &mut State) -> Result<(), FaultsError> {
        let fail = |source| FaultsError::Io { path: self.path.clone(), source };
        let stamp = match fs::metadata(&self.path) {
            Ok(m) => Some((m.mtime(), m.mtime_nsec(), m.size(), m.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(fail(error)),
        };
        if stamp == state.stamp {
            return Ok(());
        }
        state.rules = if stamp.is_some() {
            let text = fs::read(&self.path).map_err(fail)?;
            serde_json::from_slice(&text)
                .map_err(|source| FaultsError::Invalid { path: self.path.clone(), source })?
        } else {
            Vec::new()
        };
        state.stamp = stamp;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fired(engine: &FaultEngine, op: &str, key: &str, n: usize) -> Vec<bool> {
        (0..n).map(|_| engine.decide(op, key).unwrap().is_some()).collect()
    }

    #[test]
    fn rules_choose_by_operation_prefix_skip_and_count() {
        let dir = tempfile::tempdir().unwrap();
        let engine = FaultEngine::new(dir.path(), BTreeMap::new());
        assert_eq!(engine.decide("GetObject", "a").unwrap(), None);
        let rule =
            FaultRule::new(FaultAction::SlowDown).op("GetObject").key_prefix("chunks/").skip(1).times(2);
        write_rules(dir.path(), std::slice::from_ref(&rule)).unwrap();
        assert_eq!(fired(&engine, "PutObject", "chunks/x", 3), [false; 3]);
        assert_eq!(fired(&engine, "GetObject", "other", 3), [false; 3]);
        assert_eq!(fired(&engine, "GetObject", "chunks/x", 5), [false, true, true, false, false]);
        // A rule that used up its count in an earlier run stays silent.
        let engine = FaultEngine::new(dir.path(), BTreeMap::from([(rule.id, 2)]));
        assert_eq!(fired(&engine, "GetObject", "chunks/x", 5), [false; 5]);
    }

    #[test]
    fn percentages_are_reproducible_and_about_right() {
        let dir = tempfile::tempdir().unwrap();
        write_rules(dir.path(), &[FaultRule::new(FaultAction::Deny).percent(20, 7)]).unwrap();
        let run = || fired(&FaultEngine::new(dir.path(), BTreeMap::new()), "GetObject", "k", 1000);
        let first = run();
        assert_eq!(first, run());
        let share = first.iter().filter(|f| **f).count();
        assert!((150..250).contains(&share), "{share} of 1000");
    }

    #[test]
    fn every_change_of_the_file_is_seen_and_a_bad_one_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let engine = FaultEngine::new(dir.path(), BTreeMap::new());
        for _ in 0..50 {
            write_rules(dir.path(), &[FaultRule::new(FaultAction::SlowDown)]).unwrap();
            assert_eq!(engine.decide("A", "").unwrap().unwrap().1, FaultAction::SlowDown);
            write_rules(dir.path(), &[FaultRule::new(FaultAction::LostResponse)]).unwrap();
            assert_eq!(engine.decide("A", "").unwrap().unwrap().1, FaultAction::LostResponse);
        }
        fs::write(dir.path().join(FAULTS_FILE), r#"[{"id":"x","action":{"kind":"explode"}}]"#).unwrap();
        assert!(matches!(engine.decide("A", ""), Err(FaultsError::Invalid { .. })));
        fs::write(dir.path().join(FAULTS_FILE), r#"[{"id":"x","action":{"kind":"reset","afterBytes":5}}]"#)
            .unwrap();
        assert_eq!(engine.decide("A", "").unwrap().unwrap().1, FaultAction::Reset { after_bytes: 5 });
        fs::remove_file(dir.path().join(FAULTS_FILE)).unwrap();
        assert_eq!(engine.decide("A", "").unwrap(), None);
    }
}
