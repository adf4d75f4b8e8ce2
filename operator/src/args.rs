//! The command line. Every flag also reads an environment variable.

use std::net::SocketAddr;
use std::path::PathBuf;

use berth_api::defaults::SYSTEM_NAMESPACE;
use clap::{Parser, ValueEnum};

/// Promises space for disk images on Kubernetes nodes, places work, and says why something waits.
#[derive(Clone, Debug, Parser)]
#[command(name = "berth-operator", version)]
pub struct Args {
    /// What this replica is called in Leases and field managers. Default: host name and process id.
    #[arg(long, env = "BERTH_IDENTITY", value_parser = identity, default_value_t = default_identity())]
    pub identity: String,

    /// Where `/metrics`, `/healthz` and `/readyz` are served. Port 0 takes a free one.
    #[arg(long, env = "BERTH_METRICS_ADDR", default_value = "0.0.0.0:8080")]
    pub metrics_addr: SocketAddr,

    /// The namespace of Berth's own objects.
    #[arg(long, env = "BERTH_NAMESPACE", default_value = SYSTEM_NAMESPACE)]
    pub namespace: String,

    /// How old a volume is at least, in seconds, before it may go because its claim is gone or on another node.
    #[arg(long, env = "BERTH_CLAIM_GRACE_SECONDS", default_value_t = 600)]
    pub claim_grace_seconds: u64,

    /// How log lines look.
    #[arg(long, env = "BERTH_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// A kubeconfig file. Default: the service account of the pod, or the usual places.
    #[arg(long, env = "KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,

    /// Prints the defects that `BERTH_SABOTAGE` may name, and ends.
    #[cfg(feature = "sabotage")]
    #[arg(long, hide = true)]
    pub list_sabotages: bool,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// At most 100 characters, so that a field manager made of it stays below the API server's 128.
fn identity(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > 100 || text.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err("1 to 100 characters without white space".to_owned());
    }
    Ok(text.to_owned())
}

fn default_identity() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host: String = host.trim().chars().take(80).collect();
    let host = if host.is_empty() { "operator" } else { &host };
    format!("{host}-{}", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn identities_that_no_field_manager_may_hold_are_refused() {
        assert!(identity("").is_err());
        assert!(identity("two words").is_err());
        assert!(identity(&"x".repeat(101)).is_err());
        assert_eq!(identity("host-7"), Ok("host-7".to_owned()));
        assert!(identity(&default_identity()).is_ok());
    }
}
