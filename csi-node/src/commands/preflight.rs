//! `berth-node preflight`: what this node has and lacks, everything at once.

use std::io::{self, Write};

use berth_device::preflight::Preflight;

use crate::args::{Output, PreflightArgs};

/// Looks, prints, and tells whether nothing that is required is missing.
///
/// # Errors
/// If standard output is closed.
pub fn run(args: &PreflightArgs) -> io::Result<bool> {
    let preflight = Preflight::run_at(&args.host_root);
    let mut out = io::stdout().lock();
    match args.output {
        Output::Text => {
            for check in &preflight.checks {
                let mark = match (check.ok, check.required) {
                    (true, _) => "ok",
                    (false, true) => "MISSING",
                    (false, false) => "degraded",
                };
                writeln!(out, "{mark:<9}{:<14}{}", check.name, check.detail)?;
            }
        }
        Output::Json => {
            let checks: Vec<_> = preflight
                .checks
                .iter()
                .map(|c| serde_json::json!({"name": c.name, "ok": c.ok, "required": c.required, "detail": c.detail}))
                .collect();
            writeln!(out, "{}", serde_json::json!({"passed": preflight.passed(), "checks": checks}))?;
        }
    }
    Ok(preflight.passed())
}
