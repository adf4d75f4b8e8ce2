//! A pool of one test, as the agent opens it.
#![allow(missing_docs)]

use std::path::Path;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use berth_core::ids::PoolName;
use berth_core::units::Bytes;
use berth_node::agent::pools::{OpenPool, PoolSpec, Pools};
use berth_node::area::Backend;

/// The UID is another one for each test: no two file systems with one UUID can be mounted at once.
pub fn spec(dir: &Path, prefix: &str) -> PoolSpec {
    let uid = format!("{prefix}-{}", dir.file_name().unwrap().display());
    let backend = Backend::Filesystem { path: dir.join("area"), size: Bytes::mib(512) };
    PoolSpec::new(uid.into(), backend)
}

pub fn pools(dir: &Path) -> Pools {
    Pools::new("n1".into(), dir.join("mnt"), dir)
}

/// An area is an XFS image where this machine can make one, and a plain directory where it cannot; both are meant here.
pub fn open(dir: &Path) -> (Pools, Arc<OpenPool>) {
    let pools = pools(dir);
    let name = PoolName::from("fast");
    pools.prepare(&name, &spec(dir, "pool-uid")).unwrap();
    let pool = pools.get(&name).unwrap();
    (pools, pool)
}

pub fn close(pool: Arc<OpenPool>, pools: Pools) {
    drop(pools);
    let pool = Arc::into_inner(pool).expect("the last one");
    let OpenPool { area, record, .. } = pool;
    drop(record);
    area.close().unwrap();
}

/// Bytes that nobody has in the file system of an area.
pub fn free(pool: &OpenPool) -> u64 {
    let stat = nix::sys::statvfs::statvfs(pool.area.root()).unwrap();
    stat.blocks_free() * stat.fragment_size()
}

/// Waits until more than `least` bytes are free: the kernel counts what a removed file had a moment later.
pub fn wait_free(pool: &OpenPool, least: u64) {
    let begun = Instant::now();
    while free(pool) <= least {
        assert!(begun.elapsed() < Duration::from_secs(5), "{} bytes are free, not {least}", free(pool));
        sleep(Duration::from_millis(10));
    }
}
