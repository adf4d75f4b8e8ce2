//! Deliberate defects that the safety commands must notice. Compiled in by the feature `sabotage` only.

/// Work begins on an assignment alone, whatever the ledger says.
pub const OBEY_WITHOUT_LEDGER: &str = "obey-without-ledger";
/// A release is reported while the bytes are still there.
pub const RELEASE_WITHOUT_DELETE: &str = "release-without-delete";
/// Promises are obeyed without being recorded.
pub const NO_RECORD: &str = "no-record";

/// Every defect of the agent.
pub const AGENT: &[&str] = &[OBEY_WITHOUT_LEDGER, RELEASE_WITHOUT_DELETE, NO_RECORD];

/// A thin device is made before it is recorded.
pub const NO_INTENT: &str = "no-intent";
/// Changes of a record are answered before they are on stable storage; in the record's own crate.
pub const ACK_BEFORE_SYNC: &str = "ack-before-sync";
/// Kernel pools are not told of transactions.
pub const SKIP_TRANSACTION: &str = "skip-transaction";
/// A thin device is forgotten before it is deleted.
pub const FORGET_BEFORE_DELETE: &str = "forget-before-delete";
/// A thin device that was half made counts as made.
pub const TRUST_HALF_MADE: &str = "trust-half-made";
/// A volume is attached without being recorded so.
pub const ATTACH_UNRECORDED: &str = "attach-unrecorded";

/// Every defect that a power cut brings to light, or a look after one.
pub const CRASH: &[&str] =
    &[NO_INTENT, ACK_BEFORE_SYNC, SKIP_TRANSACTION, FORGET_BEFORE_DELETE, TRUST_HALF_MADE, ATTACH_UNRECORDED];

/// Waits where this defect, if it is active, leaves something half done, so that it is met there.
pub fn linger(name: &str) {
    if active(name) {
        std::thread::sleep(std::time::Duration::from_millis(1500));
    }
}

/// True if the environment variable `BERTH_SABOTAGE` names this defect.
#[cfg(feature = "sabotage")]
pub fn active(name: &str) -> bool {
    std::env::var("BERTH_SABOTAGE").is_ok_and(|asked| asked == name)
}

/// False: this build has no defects to choose.
#[cfg(not(feature = "sabotage"))]
pub const fn active(_name: &str) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_active_unless_asked_for() {
        assert!(AGENT.iter().chain(CRASH).all(|name| !active(name)));
    }
}
