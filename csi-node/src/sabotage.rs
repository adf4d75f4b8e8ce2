//! Deliberate defects that the safety commands must notice. Compiled in by the feature `sabotage` only.

/// Work begins on an assignment alone, whatever the ledger says.
pub const OBEY_WITHOUT_LEDGER: &str = "obey-without-ledger";
/// A release is reported while the bytes are still there.
pub const RELEASE_WITHOUT_DELETE: &str = "release-without-delete";
/// Promises are obeyed without being recorded.
pub const NO_RECORD: &str = "no-record";

/// Every defect of the agent.
pub const AGENT: &[&str] = &[OBEY_WITHOUT_LEDGER, RELEASE_WITHOUT_DELETE, NO_RECORD];

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
        assert!(AGENT.iter().all(|name| !active(name)));
    }
}
