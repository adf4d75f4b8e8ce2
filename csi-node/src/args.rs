//! The command line. Every flag of the agent also reads an environment variable.

use std::net::SocketAddr;
use std::path::PathBuf;

use berth_api::defaults::SYSTEM_NAMESPACE;
use berth_core::ids::NodeName;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::commands::template::TemplateArgs;
use crate::telemetry::LogFormat;

/// Stages disk images on this node, and gives volumes made of them to kubelet.
#[derive(Clone, Debug, Parser)]
#[command(name = "berth-node", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// How log lines look.
    #[arg(long, global = true, env = "BERTH_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// The commands.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Runs the node's agent and its CSI services.
    Agent(Box<AgentArgs>),
    /// Works with templates, without Kubernetes.
    Template(TemplateArgs),
    /// Says what this node has and lacks.
    Preflight(PreflightArgs),
    /// Writes the files that keep udev, LVM, mdadm and multipath of a host away from the disks of guests.
    HostConfig(HostConfigArgs),
}

/// Flags of `berth-node agent`.
#[derive(Clone, Debug, Args)]
pub struct AgentArgs {
    /// The name of the Kubernetes node.
    #[arg(long, env = "BERTH_NODE_NAME", value_parser = node_name)]
    pub node_name: NodeName,
    /// Where the agent keeps its own record.
    #[arg(long, env = "BERTH_STATE_DIR", default_value = "/var/lib/berth")]
    pub state_dir: PathBuf,
    /// The socket that the CSI services listen on.
    #[arg(long, env = "BERTH_CSI_SOCKET", default_value = "/csi/csi.sock")]
    pub csi_socket: PathBuf,
    /// The same socket as kubelet sees it. Default: as above.
    #[arg(long, env = "BERTH_KUBELET_SOCKET")]
    pub kubelet_socket: Option<PathBuf>,
    /// Kubelet's directory of plugin sockets. Without it, something else registers the plugin.
    #[arg(long, env = "BERTH_REGISTRATION_DIR")]
    pub registration_dir: Option<PathBuf>,
    /// Where pools are mounted.
    #[arg(long, env = "BERTH_MOUNT_ROOT", default_value = "/var/lib/berth/pools")]
    pub mount_root: PathBuf,
    /// Where the root of the host is, for its configuration.
    #[arg(long, env = "BERTH_HOST_ROOT", default_value = "/")]
    pub host_root: PathBuf,
    /// Where `/metrics`, `/healthz` and `/readyz` are served. Port 0 takes a free one.
    #[arg(long, env = "BERTH_METRICS_ADDR", default_value = "0.0.0.0:8081")]
    pub metrics_addr: SocketAddr,
    /// A kubeconfig file. Default: the service account of the pod, or the usual places.
    #[arg(long, env = "KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// The namespace of Berth's own objects.
    #[arg(long, env = "BERTH_NAMESPACE", default_value = SYSTEM_NAMESPACE)]
    pub system_namespace: String,
    /// Addresses that sources may have though they would be refused, such as `10.0.0.0/8`. May be repeated.
    #[arg(long = "allow-source-cidr", env = "BERTH_ALLOW_SOURCE_CIDR", value_delimiter = ',')]
    pub allow_source_cidrs: Vec<String>,
}

/// Flags of `berth-node preflight`.
#[derive(Clone, Debug, Args)]
pub struct PreflightArgs {
    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
    /// Where the root of the host is, for its configuration.
    #[arg(long, env = "BERTH_HOST_ROOT", default_value = "/")]
    pub host_root: PathBuf,
}

/// Flags of `berth-node host-config`.
#[derive(Clone, Debug, Args)]
pub struct HostConfigArgs {
    /// The folder that stands for `/etc`.
    #[arg(long)]
    pub dir: PathBuf,
}

/// How a command prints its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

fn node_name(text: &str) -> Result<NodeName, String> {
    let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    if text.is_empty() || text.len() > 253 || !text.chars().all(valid) {
        return Err("1 to 253 lower-case letters, digits, dashes and dots".to_owned());
    }
    Ok(NodeName::from(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn names_that_no_node_has_are_refused() {
        assert!(node_name("").is_err() && node_name("a b").is_err() && node_name("N1").is_err());
        assert_eq!(node_name("n-1.example"), Ok(NodeName::from("n-1.example")));
    }
}
