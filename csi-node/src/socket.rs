//! Sockets of our own on this node: made in place of what an earlier process left, and lines of bounded length on them.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::Path;

use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _};
use tokio::net::UnixListener;

/// Listens on a socket, in place of what an earlier process left there. Anything else there is left alone.
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

/// The same, for this user only. Until its mode is set, whoever connects is still to be asked who it is
/// ([`is_trusted`]).
pub fn listen_alone(socket: &Path) -> io::Result<UnixListener> {
    let listener = listen(socket)?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// True if the peer is root, or who we are.
pub fn is_trusted(stream: &tokio::net::UnixStream) -> bool {
    stream.peer_cred().is_ok_and(|peer| may_connect(peer.uid()))
}

/// Tests run without being root, and talk to themselves.
fn may_connect(uid: u32) -> bool {
    uid == 0 || uid == nix::unistd::geteuid().as_raw()
}

/// The next line, without its end; `None` at the end of the stream.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] for a line of more than `most` bytes, or one that is not text: nothing that follows can
/// be told from it.
pub async fn read_line(stream: &mut (impl AsyncBufRead + Unpin), most: usize) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    let limit = u64::try_from(most).unwrap_or(u64::MAX).saturating_add(1);
    stream.take(limit).read_until(b'\n', &mut line).await?;
    let ended = line.pop_if(|last| *last == b'\n').is_some();
    if !ended {
        if line.is_empty() {
            return Ok(None);
        }
        let what = if line.len() > most { "a line is too long" } else { "the stream ends within a line" };
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    String::from_utf8(line).map(Some).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn root_and_we_ourselves_are_trusted_and_nobody_else() {
        let own = nix::unistd::geteuid().as_raw();
        assert!(may_connect(0) && may_connect(own) && !may_connect(own + 1));
    }

    #[tokio::test]
    async fn lines_are_bounded() {
        let mut good = &b"one\n\nthree\n"[..];
        assert_eq!(read_line(&mut good, 5).await.unwrap().as_deref(), Some("one"));
        assert_eq!(read_line(&mut good, 5).await.unwrap().as_deref(), Some(""));
        assert_eq!(read_line(&mut good, 5).await.unwrap().as_deref(), Some("three"));
        assert_eq!(read_line(&mut good, 5).await.unwrap(), None);
        for bad in [&b"longer\n"[..], b"cut", b"\xff\n"] {
            assert!(read_line(&mut &*bad, 5).await.is_err(), "{bad:?}");
        }
    }

    #[tokio::test]
    async fn a_socket_replaces_an_old_one_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("below").join("socket");
        for _ in 0..2 {
            drop(listen_alone(&path).unwrap());
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        }
        fs::remove_file(&path).unwrap();
        fs::write(&path, "theirs").unwrap();
        listen(&path).unwrap_err();
        assert_eq!(fs::read_to_string(&path).unwrap(), "theirs");
    }
}
