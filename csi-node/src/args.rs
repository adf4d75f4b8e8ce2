//! The command line. Every flag of the agent also reads an environment variable.

use std::net::SocketAddr;
use std::path::PathBuf;

use berth_api::defaults::SYSTEM_NAMESPACE;
use berth_core::ids::NodeName;
use berth_core::transfer::Staging;
use berth_core::units::Bytes;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::commands::batch::BatchArgs;
use crate::commands::file::FileArgs;
use crate::commands::pages::{CompletionsArgs, ManArgs};
use crate::commands::pool::PoolArgs;
use crate::commands::serve_store::ServeStoreArgs;
use crate::commands::template::TemplateArgs;
use crate::commands::transfer::TransferArgs;
use crate::commands::volume::VolumeArgs;
use crate::telemetry::LogFormat;
use crate::values::{self, node_name};

/// Stages disk images on this node, and gives volumes made of them to kubelet.
///
/// The commands beside `agent` work on the node that they run on, as root. While the agent runs, they ask it through its
/// socket; without it, they open the node's pools themselves, one command at a time.
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
    /// Makes, lists and removes pools of this node, with or without Kubernetes.
    Pool(PoolArgs),
    /// Works with volumes and snapshots, with or without Kubernetes.
    Volume(VolumeArgs),
    /// Runs the small process beside the agent that suspends devices and serves images.
    Supervise(SuperviseArgs),
    /// Serves an image of an image store for the process that keeps servers, which alone runs this.
    #[command(hide = true)]
    ServeStore(ServeStoreArgs),
    /// Works with templates, without Kubernetes.
    Template(TemplateArgs),
    /// Fetches objects of a store into files, and sends files to a store, without Kubernetes.
    File(FileArgs),
    /// Makes one object of an image, in the format of another tool, without Kubernetes. Stopped at any moment, the same command
    /// goes on where it was.
    ///
    /// Credentials come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, …).
    Transfer(Box<TransferArgs>),
    /// Carries out operations from a file or from standard input.
    ///
    /// Each line is one operation as JSON, and has one answer as a line of JSON, written at once; empty lines are ignored. The
    /// pools are opened once. Ends at the end of the file, with 1 if anything was refused.
    Batch(BatchArgs),
    /// Says what this node has and lacks.
    Preflight(PreflightArgs),
    /// Writes the files that keep udev, LVM, mdadm and multipath of a host away from the disks of guests.
    HostConfig(HostConfigArgs),
    /// Writes a man page for each command.
    Man(ManArgs),
    /// Prints the completions for a shell.
    Completions(CompletionsArgs),
}

/// The directories of this node.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct Directories {
    /// The node's own directory: its record, the list of its pools, its lock and the agent's socket.
    #[arg(
        long,
        env = "BERTH_STATE_DIR",
        value_name = "DIR",
        default_value = "/var/lib/berth",
        global = true,
        help_heading = "Node"
    )]
    pub state_dir: PathBuf,
    /// Where pools are mounted.
    #[arg(
        long,
        env = "BERTH_MOUNT_ROOT",
        value_name = "DIR",
        default_value = "/var/lib/berth/pools",
        global = true,
        help_heading = "Node"
    )]
    pub mount_root: PathBuf,
}

/// Flags of every command that works with pools.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct NodeArgs {
    /// The node's directories.
    #[command(flatten)]
    pub directories: Directories,
    /// The name of this node, which its pools remember. Default: the host name.
    #[arg(long, env = "BERTH_NODE_NAME", value_name = "NAME", value_parser = node_name, global = true, help_heading = "Node")]
    pub node_name: Option<NodeName>,
    /// The socket of `berth-node supervise`, where one runs: only that may suspend devices then.
    #[arg(
        long,
        env = "BERTH_SUPERVISOR_SOCKET",
        value_name = "SOCKET",
        global = true,
        help_heading = "Node"
    )]
    pub supervisor_socket: Option<PathBuf>,
    /// How the result is printed.
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value_t = Output::Text, global = true, help_heading = "Node")]
    pub output: Output,
}

/// Flags of `berth-node agent`.
#[derive(Clone, Debug, Args)]
pub struct AgentArgs {
    /// The name of the Kubernetes node.
    #[arg(long, env = "BERTH_NODE_NAME", value_parser = node_name)]
    pub node_name: NodeName,
    /// The node's directories.
    #[command(flatten)]
    pub directories: Directories,
    /// The socket that the CSI services listen on.
    #[arg(long, env = "BERTH_CSI_SOCKET", default_value = "/csi/csi.sock")]
    pub csi_socket: PathBuf,
    /// The same socket as kubelet sees it. Default: as above.
    #[arg(long, env = "BERTH_KUBELET_SOCKET")]
    pub kubelet_socket: Option<PathBuf>,
    /// Kubelet's directory of plugin sockets. Without it, something else registers the plugin.
    #[arg(long, env = "BERTH_REGISTRATION_DIR")]
    pub registration_dir: Option<PathBuf>,
    /// The socket of `berth-node supervise`, which suspends devices and serves images. Without it, the agent does that
    /// itself; a device that is suspended when the agent is killed stays so until its next start then.
    #[arg(long, env = "BERTH_SUPERVISOR_SOCKET")]
    pub supervisor_socket: Option<PathBuf>,
    /// How much of each image that volumes start from already is fetched a second while nobody waits for it.
    #[arg(long, env = "BERTH_HYDRATION_RATE", value_name = "SIZE", default_value = "64Mi", value_parser = values::size)]
    pub hydration_rate: Bytes,
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
    /// Whether the source of an import or a transfer comes into a pool first, where its own `spec.staging` does not say.
    #[arg(long, env = "BERTH_DEFAULT_STAGING", value_enum, default_value_t = DefaultStaging::Auto)]
    pub default_staging: DefaultStaging,
}

/// Whether sources are staged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DefaultStaging {
    /// Only if they have to be.
    Auto,
    /// Never: what would have to be is refused.
    Never,
    /// Always, but for images of an image store.
    Required,
}

impl From<DefaultStaging> for Staging {
    fn from(asked: DefaultStaging) -> Self {
        match asked {
            DefaultStaging::Auto => Self::Auto,
            DefaultStaging::Never => Self::Never,
            DefaultStaging::Required => Self::Required,
        }
    }
}

/// Flags of `berth-node supervise`.
#[derive(Clone, Debug, Args)]
pub struct SuperviseArgs {
    /// The socket that it listens on, for root only.
    #[arg(long, env = "BERTH_SUPERVISOR_SOCKET", default_value = crate::supervisor::SOCKET)]
    pub socket: PathBuf,
    /// Where it keeps what it serves, for its next start. Needs to last no longer than the kernel's devices.
    #[arg(long, env = "BERTH_SUPERVISOR_DIR", default_value = "/run/berth/supervisor")]
    pub run_dir: PathBuf,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::asking::Asking;
    use crate::commands::template::TemplateCommand;
    use crate::operation::Operation;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
    fn asked(line: &str) -> Result<Asking, String> {
        let words = ["berth-node"].into_iter().chain(line.split_whitespace());
        match Cli::try_parse_from(words).map_err(|error| error.to_string())?.command {
            Command::Pool(args) => Ok(args.command.asking()),
            Command::Volume(args) => Ok(args.command.asking()),
            Command::Template(TemplateArgs { command }) => match command {
                TemplateCommand::Attach(args) => Ok(args.asking()),
                TemplateCommand::Detach(args) => Ok(args.asking()),
                TemplateCommand::Import(_) => Err("import".to_owned()),
                TemplateCommand::Serve(args) => Err(format!("{args:?}")),
            },
            other => Err(format!("{other:?}")),
        }
    }

    /// Each command beside the operation that it is, in the form that `batch` takes.
    #[test]
    fn commands_are_operations() {
        for (line, operation) in [
            (
                "pool create fast --device /dev/sdc,/dev/sdb --device /dev/sdc --wipe --uid 0f8fad5b-d9cb-469f-a165-70867728950e",
                r#"{"do":"poolCreate","pool":"fast","uid":"0f8fad5b-d9cb-469f-a165-70867728950e","backend":{"group":{"exclusive":{"devices":["/dev/sdb","/dev/sdc"],"wipe":true}},"block":65536}}"#,
            ),
            (
                "pool create fast --volume-group vg --size 1Gi --block-size 256Ki --uid 0f8fad5b-d9cb-469f-a165-70867728950e",
                r#"{"do":"poolCreate","pool":"fast","uid":"0f8fad5b-d9cb-469f-a165-70867728950e","backend":{"group":{"shared":{"name":"vg","size":1073741824}},"block":262144}}"#,
            ),
            (
                "pool create fast --path /srv/pool --size 1Gi --uid 0f8fad5b-d9cb-469f-a165-70867728950e -o json",
                r#"{"do":"poolCreate","pool":"fast","uid":"0f8fad5b-d9cb-469f-a165-70867728950e","backend":{"path":"/srv/pool","size":1073741824}}"#,
            ),
            (
                "pool introduce fast --area a --uid 0f8fad5b-d9cb-469f-a165-70867728950e --path /srv/pool --size 1Gi",
                r#"{"do":"poolIntroduce","pool":"fast","area":"a","uid":"0f8fad5b-d9cb-469f-a165-70867728950e","backend":{"path":"/srv/pool","size":1073741824}}"#,
            ),
            ("pool forget fast", r#"{"do":"poolForget","pool":"fast"}"#),
            ("pool destroy fast", r#"{"do":"poolDestroy","pool":"fast","withContents":false}"#),
            (
                "pool destroy fast --with-contents",
                r#"{"do":"poolDestroy","pool":"fast","withContents":true}"#,
            ),
            (
                "pool grow fast --class volumes --size 2Ki",
                r#"{"do":"poolGrow","pool":"fast","class":"Volumes","size":2048}"#,
            ),
            ("pool check fast", r#"{"do":"poolCheck","pool":"fast"}"#),
            ("pool list --state-dir /s --mount-root /m --node-name n", r#"{"do":"poolList"}"#),
            (
                "template attach fast /i.qcow2 --format qcow2 --uid 0f8fad5b-d9cb-469f-a165-70867728950e -o json",
                r#"{"do":"templateAttach","pool":"fast","template":"0f8fad5b-d9cb-469f-a165-70867728950e","file":"/i.qcow2","format":"qcow2"}"#,
            ),
            ("template detach fast t", r#"{"do":"templateDetach","pool":"fast","template":"t"}"#),
            (
                "volume create fast --size 1Ki --from-template t --label a=b --label c= --uid 0f8fad5b-d9cb-469f-a165-70867728950e",
                r#"{"do":"volumeCreate","pool":"fast","volume":"0f8fad5b-d9cb-469f-a165-70867728950e","size":1024,"origin":{"template":"t"},"labels":{"a":"b","c":""}}"#,
            ),
            (
                "volume clone fast s --uid 0f8fad5b-d9cb-469f-a165-70867728950e",
                r#"{"do":"volumeClone","pool":"fast","volume":"0f8fad5b-d9cb-469f-a165-70867728950e","source":"s","size":null}"#,
            ),
            (
                "volume snapshot fast s --uid 0f8fad5b-d9cb-469f-a165-70867728950e",
                r#"{"do":"volumeSnapshot","pool":"fast","snapshot":"0f8fad5b-d9cb-469f-a165-70867728950e","source":"s"}"#,
            ),
            (
                "volume attach fast v --read-only",
                r#"{"do":"volumeAttach","pool":"fast","volume":"v","readOnly":true}"#,
            ),
            ("volume detach fast v", r#"{"do":"volumeDetach","pool":"fast","volume":"v"}"#),
            (
                "volume resize fast v --size 3Ki",
                r#"{"do":"volumeResize","pool":"fast","volume":"v","size":3072}"#,
            ),
            ("volume destroy fast v", r#"{"do":"volumeDestroy","pool":"fast","volume":"v"}"#),
            ("volume map fast v", r#"{"do":"volumeMap","pool":"fast","volume":"v"}"#),
            ("volume list fast", r#"{"do":"volumeList","pool":"fast"}"#),
        ] {
            let asking = asked(line).unwrap();
            let wanted: Operation = serde_json::from_str(operation).unwrap();
            assert_eq!(asking, Asking { operation: wanted, made: None }, "{line}");
            assert_eq!(asking.operation.validate(), Ok(()), "{line}");
        }
    }

    #[test]
    fn a_uid_that_is_not_given_is_made_and_told() {
        for line in [
            "pool create fast --path /p --size 1Gi",
            "template attach fast /i",
            "volume create fast --size 1Gi",
            "volume clone fast s",
            "volume snapshot fast s",
        ] {
            let Asking { operation, made } = asked(line).unwrap();
            let made = made.expect(line);
            let text = serde_json::to_string(&operation).unwrap();
            assert!(text.contains(made.as_str()), "{text} names {made}");
        }
    }

    /// A bad value fails before anything starts, and the message names its flag.
    #[test]
    fn bad_values_name_their_flag() {
        for (line, named) in [
            ("pool create FAST --path /p --size 1Gi", "<NAME>"),
            ("pool create fast --path /p --size much", "--size"),
            ("pool create fast --path /p --size 0", "--size"),
            ("pool create fast --path /p", "--size"),
            ("pool create fast --volume-group vg", "--size"),
            ("pool create fast --volume-group -x --size 1Gi", "-x"),
            ("pool create fast --volume-group a/b --size 1Gi", "--volume-group"),
            ("pool create fast --path /a/../b --size 1Gi", "--path"),
            ("pool create fast", "--device"),
            ("pool create fast --device /dev/sdb --path /p --size 1Gi", "--path"),
            ("pool create fast --device /dev/sdb --size 1Gi", "--size"),
            ("pool create fast --path /p --size 1Gi --wipe", "--wipe"),
            ("pool create fast --path /p --size 1Gi --block-size 128Ki", "--block-size"),
            ("pool create fast --device /dev/sdb --block-size 96Ki", "--block-size"),
            ("pool create fast --device /dev/sdb --uid fast", "--uid"),
            ("volume snapshot fast s --uid v", "--uid"),
            ("pool introduce fast --path /p --size 1Gi", "--area"),
            ("pool introduce fast --area a --device /dev/sdb --wipe", "--wipe"),
            ("pool grow fast --class data --size 1Gi", "--class"),
            ("pool check ../fast", "<NAME>"),
            ("pool list --node-name A", "--node-name"),
            ("pool list -o yaml", "--output"),
            ("template attach fast /i --format vdi", "--format"),
            ("template serve debian --bucket b --socket /s", "<IMAGE>"),
            ("template serve sha256:0 --bucket b --socket /s", "<IMAGE>"),
            ("template serve a/b --bucket b", "--socket"),
            ("template serve a/b --bucket b --socket /s --memory much", "--memory"),
            ("template serve a/b --bucket b --socket /s --patience 0", "--patience"),
            ("volume create fast", "--size"),
            ("volume create fast --size 1Gi --from-image md5:0", "--from-image"),
            ("volume create fast --size 1Gi --from-template t --from-image sha256:0", "--from-image"),
            ("volume create fast --size 1Gi --label x", "--label"),
            ("volume resize fast v", "--size"),
            ("volume attach fast V", "<UID>"),
        ] {
            let error = asked(line).expect_err(line);
            assert!(error.contains(named), "{line}: {error}");
        }
    }
}
