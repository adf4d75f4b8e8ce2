//! Control groups of tools.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use berth_core::units::Bytes;
use berth_device::cgroup::{ToolGroup, Version, probe};

use crate::group;

/// A process that would stay for a minute, in this group.
fn sleeper(group: &ToolGroup) -> Child {
    let child = Command::new("sleep").arg("60").spawn().unwrap();
    fs::write(group.path().join("cgroup.procs"), child.id().to_string()).unwrap();
    assert_eq!(group.processes().unwrap(), [child.id().cast_signed()]);
    child
}

/// Waits for at most ten seconds, and fails unless it was killed.
fn was_killed(mut child: Child) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            None => {
                child.kill().unwrap();
                panic!("the process was left alone");
            }
        }
    };
    assert_eq!(status.signal(), Some(9));
}

#[test]
fn whatever_is_in_a_group_dies_with_it() {
    if let Err(error) = probe() {
        println!("SKIPPED whatever_is_in_a_group_dies_with_it: {error}");
        return;
    }
    let name = group("dies");
    let first = ToolGroup::create(&name, Bytes::mib(64)).unwrap();
    let path = first.path().to_owned();
    let left = sleeper(&first);
    std::mem::forget(first); // as if this program had been killed

    let second = ToolGroup::create(&name, Bytes::mib(64)).unwrap();
    was_killed(left);
    assert_eq!(second.processes().unwrap(), [0_i32; 0]);
    if second.memory_bounded() {
        let file = if second.version() == Version::V1 { "memory.limit_in_bytes" } else { "memory.max" };
        assert_eq!(fs::read_to_string(path.join(file)).unwrap().trim(), "67108864");
    }
    let removed = sleeper(&second);
    second.remove().unwrap();
    was_killed(removed);

    let third = ToolGroup::create(&name, Bytes::mib(64)).unwrap();
    let dropped = sleeper(&third);
    drop(third);
    was_killed(dropped);
    assert!(!path.exists());
}
