//! A node that is a mount namespace on the kernel of this machine.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{Layout, SiteError, Started};
use crate::csi::Address;
use crate::ports::free_port;
use crate::process::{Process, Program};
use crate::site::READY_LIMIT;

/// Gives the node a disk of its own at the path that all nodes share, then stays to hold the namespace.
const HOLD: &str = r#"mount --bind "$1" "$2" && echo held && exec sleep infinity"#;

/// The namespace. Dropping it makes all its mounts vanish.
pub struct Namespace {
    node: String,
    holder: Process,
}

impl Namespace {
    /// Makes it, and the folders of the node.
    pub async fn start(name: &str, dir: &Path, site: &Path) -> Result<(Self, Layout), SiteError> {
        let shared = site.join("disk");
        for path in [dir.join("disk"), dir.join("state"), dir.join("mounts"), shared.clone()] {
            fs::create_dir_all(&path).map_err(|source| SiteError::Folder { path, source })?;
        }
        let log = site.join(format!("logs/{name}.namespace.log"));
        let holder = Program::new(name, Path::new("unshare"), &log)
            .args(["--mount", "--propagation", "private", "sh", "-c", HOLD, "sh"])
            .args([dir.join("disk"), shared])
            .spawn()?;
        let held = || {
            let held = holder.log_tail().ends_with("held");
            std::future::ready(held.then_some(()).ok_or_else(|| "not held".to_owned()))
        };
        holder.wait_ready(READY_LIMIT, held).await?;
        let address = format!("127.0.0.1:{}", free_port().map_err(SiteError::Port)?);
        let layout = Layout {
            state: dir.join("state"),
            mounts: dir.join("mounts"),
            csi_socket: dir.join("csi.sock"),
            csi: Address::Socket(dir.join("csi.sock")),
            health: format!("http://{address}/readyz"),
            metrics: address,
            servers: "127.0.0.0/8",
        };
        Ok((Self { node: name.to_owned(), holder }, layout))
    }

    /// What `nsenter` is to be told to go there.
    pub fn argument(&self) -> String {
        format!("--mount=/proc/{}/ns/mnt", self.holder.pid())
    }

    /// Starts a program there.
    pub fn start_program(&self, program: &Program) -> Result<Started, SiteError> {
        let program = program.clone().through(Path::new("nsenter"), [self.argument(), "--".to_owned()]);
        Ok(Started::Process(program.spawn()?))
    }

    /// Runs a command there to its end.
    pub fn run(&self, words: &[OsString], input: &[u8]) -> Result<Vec<u8>, SiteError> {
        let command = words.join(OsStr::new(" ")).to_string_lossy().into_owned();
        let failed =
            |said: String| SiteError::Run { node: self.node.clone(), command: command.clone(), said };
        let mut nsenter = Command::new("nsenter");
        nsenter.args([self.argument(), "--".to_owned()]).args(words);
        nsenter.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = nsenter.spawn().map_err(|error| failed(format!("nsenter: {error}")))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A command that does not read it to its end says what it thinks of that by its status.
            stdin.write_all(input).ok();
        }
        let output = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            return Err(failed(format!(
                "{}: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            )));
        }
        Ok(output.stdout)
    }
}
