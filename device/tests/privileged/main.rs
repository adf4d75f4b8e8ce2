//! Real loop devices, file systems, mounts and `qemu-img`. Needs root; says so and passes where it is not.
//!
//! Each test works below a directory of its own ([`Bench`]) and proves at its end that the kernel holds no mount and
//! no loop device below it any more.

#![allow(clippy::unwrap_used)]

mod devices;
mod groups;
mod pool;
mod qemu;

use std::path::{Path, PathBuf};

use berth_core::units::Bytes;
use berth_device::{loop_device, mounts, preflight::Preflight};

/// A directory for one test, and the proof that nothing of it is left in the kernel.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    /// `None`, with the reason printed, where this machine cannot run the test.
    fn new(test: &str) -> Option<Self> {
        let preflight = Preflight::run();
        let missing: Vec<_> =
            preflight.failures().filter(|check| check.required).map(|check| check.detail.clone()).collect();
        if !missing.is_empty() {
            println!("SKIPPED {test}: {}", missing.join("; "));
            return None;
        }
        Some(Self { dir: tempfile::tempdir().expect("a temporary directory") })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Mounts and loop devices below the directory.
    fn left(&self) -> (Vec<PathBuf>, Vec<PathBuf>) {
        let root = self.dir.path().canonicalize().unwrap();
        let mounts = mounts::list().unwrap().into_iter().map(|mount| mount.mount_point);
        let loops = loop_device::list_below(&root).unwrap().into_iter().map(|(device, _)| device.path);
        (mounts.filter(|point| point.starts_with(&root)).collect(), loops.collect())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let (mounts, loops) = self.left();
        for mount in mounts.iter().rev() {
            let _ = mounts::unmount(mount);
        }
        for device in loops.iter().filter_map(|path| loop_device::examine(path).ok().flatten()) {
            let _ = loop_device::detach(&device);
        }
        if !std::thread::panicking() {
            assert!(mounts.is_empty() && loops.is_empty(), "left behind: {mounts:?} {loops:?}");
        }
    }
}

/// `length` bytes that do not repeat or compress, the same for the same seed.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Runs a program of the test's own and fails with what it printed.
fn tool(program: &str, arguments: &[&str], input: &str) {
    use std::io::Write as _;
    use std::process::{Command, Stdio};
    let path = berth_device::find_program(program).unwrap_or_else(|| panic!("{program} is not installed"));
    let mut child = Command::new(path)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A name for a control group that two runs of these tests do not share.
fn group(test: &str) -> String {
    format!("test-{test}-{}", std::process::id())
}

fn sparse(path: &Path, size: Bytes) {
    berth_device::files::create_sparse(path, size).unwrap();
}
