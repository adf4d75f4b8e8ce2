//! Deliberate defects that the safety commands must notice. Compiled in by the feature `sabotage` only.

/// Ledgers are written over whatever is there, with promises that may be old.
pub const NO_COMPARE_AND_SWAP: &str = "no-compare-and-swap";
/// Promises are taken back before the node has reported their bytes gone.
pub const EARLY_RELEASE: &str = "early-release";
/// Placements are written over whatever is there.
pub const ASSIGN_WITHOUT_VERSION: &str = "assign-without-version";

/// Every defect.
pub const ALL: &[&str] = &[NO_COMPARE_AND_SWAP, EARLY_RELEASE, ASSIGN_WITHOUT_VERSION];

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

/// Prints every defect, one a line.
///
/// # Errors
/// If standard output is closed.
#[cfg(feature = "sabotage")]
pub fn print_all() -> anyhow::Result<()> {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    for name in ALL {
        writeln!(out, "{name}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_active_unless_asked_for() {
        assert!(ALL.iter().all(|name| !active(name)));
    }
}
