//! The lock of an area's directory.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use super::ClaimError;

pub(super) const LOCK: &str = "berth-pool.lock";
/// How long is waited for a lock. Mostly it is this process's own: a child that was forked while it was held holds it, too, until its
/// program begins.
const LOCK_LIMIT: Duration = Duration::from_secs(2);
const LOCK_LOOK: Duration = Duration::from_millis(5);

/// Held while the area is opened or left, so that two processes do not make it at once.
pub(super) fn lock(dir: &Path) -> Result<File, ClaimError> {
    let path = dir.join(LOCK);
    let file = File::options()
        .create(true)
        .append(true)
        .open(&path)
        .map_err(|source| ClaimError::Directory { path: path.clone(), source })?;
    let deadline = Instant::now() + LOCK_LIMIT;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(fs::TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(LOCK_LOOK);
            }
            Err(fs::TryLockError::WouldBlock) => return Err(ClaimError::Locked { dir: dir.to_owned() }),
            Err(fs::TryLockError::Error(source)) => return Err(ClaimError::Directory { path, source }),
        }
    }
}
