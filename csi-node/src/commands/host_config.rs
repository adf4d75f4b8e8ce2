//! `berth-node host-config`: files for the host's `/etc`.

use std::io::{self, Write};

use berth_device::host_config::{self, HostConfigError};
use thiserror::Error;

use crate::args::HostConfigArgs;

/// Why not all files were written.
#[derive(Debug, Error)]
pub enum HostConfigCommandError {
    /// A file.
    #[error(transparent)]
    File(#[from] HostConfigError),
    /// Standard output is closed.
    #[error("failed to print what was written")]
    Print(#[from] io::Error),
}

/// Writes them, and prints which, and what is left to do.
///
/// # Errors
/// If a file of that name is there and not ours; what was written before stays.
pub fn run(args: &HostConfigArgs) -> Result<(), HostConfigCommandError> {
    let written = host_config::write(&args.dir)?;
    let mut out = io::stdout().lock();
    for path in written {
        writeln!(out, "{}", path.display())?;
    }
    writeln!(
        out,
        "Those of lvm and mdadm are fragments: put their lines into the configuration of the host. Then run udevadm control \
         --reload, and load the module nbd anew; berth-node preflight tells what is missing."
    )?;
    Ok(())
}
