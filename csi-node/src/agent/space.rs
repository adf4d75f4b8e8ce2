//! Space that was promised and is not there. That a write finds no space although its holder has not used what was promised
//! to it is a defect of Berth, and told as one: with its own reason, with numbers, and counted.

use std::error::Error;
use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_core::ids::Uid;
use berth_core::units::Bytes;
use berth_device::files::FileError;
use nix::errno::Errno;

use super::pools::OpenPool;
use crate::node::Node;

/// A promise that did not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpaceDefect {
    /// What was promised to the holder.
    pub promised: Bytes,
    /// What it has written.
    pub used: Bytes,
    /// What may be promised in the pool.
    pub pool_total: Bytes,
    /// What is written in the pool, by whomever.
    pub pool_used: Bytes,
}

impl fmt::Display for SpaceDefect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let free = self.pool_total.saturating_sub(self.pool_used);
        write!(
            f,
            "no space was left for what is promised: {} promised, {} of them used; the pool has {} in all, {} used, {free} free",
            self.promised, self.used, self.pool_total, self.pool_used
        )
    }
}

/// The defect, if a write for the holder `uid` at `path` found no space before it had used the `promised` bytes: logged and
/// counted. To be asked after an error that [`is_out_of_space`].
pub async fn defect(
    node: &Arc<Node>,
    pool: &Arc<OpenPool>,
    uid: &Uid,
    promised: Bytes,
    path: PathBuf,
) -> Option<SpaceDefect> {
    let measured = Arc::clone(pool);
    let measure = move || SpaceDefect {
        promised,
        used: written(&path),
        pool_total: measured.area.total(),
        pool_used: measured.area.used(),
    };
    let found = tokio::task::spawn_blocking(measure).await.ok()?;
    if found.used >= promised {
        return None; // it has had what was promised to it
    }
    tracing::error!(pool = %pool.name, holder = %uid, %found, "a promise of space did not hold");
    node.metrics.space_defect(pool.name.as_str());
    Some(found)
}

/// True if the system said so, somewhere down the chain; a bound of our own is no error of the system.
pub fn is_out_of_space(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let code = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
        if code.is_some_and(|code| matches!(Errno::from_raw(code), Errno::ENOSPC | Errno::EDQUOT))
            || matches!(error.downcast_ref(), Some(FileError::NoSpace { .. }))
        {
            return true;
        }
        next = error.source();
    }
    false
}

/// Bytes of blocks that a file, or everything in a directory, takes. What cannot be looked at counts as nothing.
fn written(path: &Path) -> Bytes {
    let Ok(meta) = path.symlink_metadata() else { return Bytes::ZERO };
    if !meta.is_dir() {
        return Bytes(meta.blocks().saturating_mul(512));
    }
    let Ok(entries) = path.read_dir() else { return Bytes::ZERO };
    entries.flatten().map(|entry| written(&entry.path())).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] io::Error);

    #[test]
    fn only_what_the_system_says_is_out_of_space() {
        assert!(is_out_of_space(&Outer(io::Error::from_raw_os_error(Errno::ENOSPC as i32))));
        assert!(is_out_of_space(&io::Error::from_raw_os_error(Errno::EDQUOT as i32)));
        assert!(!is_out_of_space(&Outer(io::Error::from_raw_os_error(Errno::EIO as i32))));
        let (path, action) = (PathBuf::from("x"), "preallocate");
        assert!(is_out_of_space(&FileError::NoSpace { path, action, bytes: Bytes(5) }));
        let own = io::Error::new(io::ErrorKind::StorageFull, "5 bytes are left of what was promised");
        assert!(!is_out_of_space(&Outer(own)), "a bound of our own");
    }

    #[test]
    fn what_is_written_is_counted_in_blocks_and_the_message_has_every_number() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        std::fs::write(dir.path().join("sub/file"), vec![1; 100_000]).unwrap();
        std::fs::File::create(dir.path().join("sparse")).unwrap().set_len(1 << 30).unwrap();
        std::fs::File::open(dir.path().join("sub/file")).unwrap().sync_all().unwrap();
        let found = written(dir.path());
        assert!((Bytes(100_000)..Bytes::mib(1)).contains(&found), "{found}");
        assert_eq!(written(&dir.path().join("absent")), Bytes::ZERO);
        let told =
            SpaceDefect { promised: Bytes(10), used: Bytes(4), pool_total: Bytes(100), pool_used: Bytes(99) };
        assert_eq!(
            told.to_string(),
            "no space was left for what is promised: 10 bytes promised, 4 bytes of them used; the pool has 100 bytes in \
             all, 99 bytes used, 1 bytes free"
        );
    }
}
