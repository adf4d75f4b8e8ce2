//! Sockets that this program listens on.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::Path;

use tokio::net::UnixListener;

/// Listens on a socket, in place of what an earlier process left there. Anything else there is left alone.
///
/// # Errors
/// If something else than a socket lies there, or the socket cannot be made.
pub fn listen(socket: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = socket.parent() {
        fs::create_dir_all(parent)?;
    }
    match fs::symlink_metadata(socket) {
        Ok(metadata) if metadata.file_type().is_socket() => fs::remove_file(socket)?,
        Ok(_) => {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "something else than a socket lies there",
            ));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    UnixListener::bind(socket)
}

/// The same, with mode 0600. Whoever connects before the mode is set must be told by its credentials.
///
/// # Errors
/// As [`listen`].
pub fn listen_privately(socket: &Path) -> io::Result<UnixListener> {
    let listener = listen(socket)?;
    fs::set_permissions(socket, Permissions::from_mode(0o600))?;
    Ok(listener)
}
