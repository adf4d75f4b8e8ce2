//! Disk images for the tests and the demonstration: made by the usual tools, without mounts.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where the only partition of an image starts, in bytes.
pub const PARTITION_START: u64 = 1 << 20;

/// The commands that making an image needs, and the Debian package of each.
pub const COMMANDS: [(&str, &str); 4] =
    [("sfdisk", "fdisk"), ("mke2fs", "e2fsprogs"), ("qemu-img", "qemu-utils"), ("dd", "coreutils")];

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file or folder.
    #[error("failed to write {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A tool could not be started.
    #[error("failed to run {tool}")]
    Start {
        /// The tool.
        tool: String,
        /// What the system said.
        source: io::Error,
    },
    /// A tool failed.
    #[error("{tool} failed ({status}): {output}")]
    Tool {
        /// The tool.
        tool: String,
        /// How it ended.
        status: String,
        /// What it said.
        output: String,
    },
}

/// Makes a raw, sparse disk of `bytes` with a partition table and one ext4 partition that holds a copy of `tree`.
///
/// # Errors
/// [`ImageError`].
pub fn make_disk(raw: &Path, bytes: u64, tree: &Path) -> Result<(), ImageError> {
    let error = |source| ImageError::File { path: raw.to_owned(), source };
    File::create(raw).and_then(|file| file.set_len(bytes)).map_err(error)?;
    let script = raw.with_extension("sfdisk");
    fs::write(&script, format!("label: dos\nstart={}, type=83, bootable\n", PARTITION_START / 512))
        .map_err(|source| ImageError::File { path: script.clone(), source })?;
    let table = File::open(&script).map_err(|source| ImageError::File { path: script.clone(), source })?;
    run(Command::new("sfdisk").args(["--quiet", "--no-reread", "--no-tell-kernel"]).arg(raw).stdin(table))?;
    fs::remove_file(&script).map_err(|source| ImageError::File { path: script.clone(), source })?;
    let blocks = (bytes - PARTITION_START) / 4096;
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-b", "4096", "-L", "root", "-d"]).arg(tree);
    run(mke2fs.args(["-E", &format!("offset={PARTITION_START}")]).arg(raw).arg(blocks.to_string()))
}

/// Converts a raw disk to compressed qcow2.
///
/// # Errors
/// [`ImageError`].
pub fn to_qcow2(raw: &Path, qcow2: &Path) -> Result<(), ImageError> {
    run(Command::new("qemu-img").args(["convert", "-q", "-c", "-f", "raw", "-O", "qcow2"]).args([raw, qcow2]))
}

/// Converts an image of a stated format to a raw disk, by qemu-img: what ours is compared to.
///
/// # Errors
/// [`ImageError`].
pub fn to_raw(image: &Path, format: &str, raw: &Path) -> Result<(), ImageError> {
    run(Command::new("qemu-img").args(["convert", "-q", "-f", format, "-O", "raw"]).args([image, raw]))
}

/// Runs a tool to its end.
///
/// # Errors
/// [`ImageError`], with what the tool said.
pub fn run(command: &mut Command) -> Result<(), ImageError> {
    let tool = command.get_program().to_string_lossy().into_owned();
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin")).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().map_err(|source| ImageError::Start { tool: tool.clone(), source })?;
    let output =
        child.wait_with_output().map_err(|source| ImageError::Start { tool: tool.clone(), source })?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    let output_text = String::from_utf8_lossy(&said).trim().to_owned();
    Err(ImageError::Tool { tool, status: output.status.to_string(), output: output_text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_that_fails_is_told_with_what_it_said() {
        let error = run(Command::new("sh").args(["-c", "echo broken >&2; exit 4"])).unwrap_err().to_string();
        assert!(error.contains("broken") && error.contains('4'), "{error}");
    }
}
