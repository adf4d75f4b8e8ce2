//! Real `qemu-nbd`, and real kernel NBD where the kernel has it: devices that outlive their servers.
//!
//! What needs the kernel says so and passes where there is none. What needs a disk that may be wiped, of 512 MiB at least,
//! takes the first one named in `BERTH_TEST_DISKS` (separated by a comma), or the first of a user-mode Linux.
//!
//! Every test ends with the proof that no device of ours is left.

#![allow(clippy::unwrap_used)]

mod clones;
mod devices;
mod failures;
mod servers;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use berth_core::ids::Uid;
use berth_core::units::Bytes;
use berth_device::nbd::{
    self, AttachConfig, AttachError, Attachment, BackendId, Nbd, NbdServer, ServedFormat, ServerConfig,
    ServerError, Slots,
};

/// How long anything may take that takes a moment on an idle machine.
const SOON: Duration = Duration::from_secs(30);
const SIZE: Bytes = Bytes::mib(8);
const BLOCK: usize = 64 << 10;

/// The kernel's devices, for one test at a time.
struct Bench {
    nbd: Nbd,
    slots: Slots,
    dir: tempfile::TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Bench {
    /// `None`, with the reason printed, where this machine cannot run the test.
    fn new(test: &str) -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = nbd::missing();
        if !missing.is_empty() {
            println!("SKIPPED {test}: {}", missing.join("; "));
            return None;
        }
        let (nbd, slots, dir) = (Nbd::open().unwrap(), Slots::default(), tempfile::tempdir().unwrap());
        let mut bench = Self { nbd, slots, dir, _alone: alone };
        assert_eq!(Attachment::list(&mut bench.nbd).unwrap(), [], "before the test");
        Some(bench)
    }

    /// A server of a new raw image.
    fn served(&self, name: &str, seed: u8) -> Served {
        let image = self.dir.path().join(format!("{name}.raw"));
        write_image(&image, seed);
        Served::start(&image, ServedFormat::Raw, &self.dir.path().join(name)).unwrap()
    }

    fn attach(&mut self, id: &BackendId, socket: &Path, dead: Duration) -> Result<Attachment, AttachError> {
        let config = AttachConfig { id, socket, size: SIZE, dead_connection: dead, limit: SOON };
        Attachment::attach(&mut self.nbd, &mut self.slots, &config)
    }

    fn detach(&mut self, attachment: Attachment) {
        attachment.detach(&mut self.nbd, &mut self.slots).unwrap();
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let left = Attachment::list(&mut self.nbd);
        if std::thread::panicking() {
            // So that the next test begins without devices: pools go after what lies on them.
            for _ in 0..2 {
                for info in berth_device::thin::list_ours().unwrap_or_default() {
                    let _ = Command::new("dmsetup").args(["remove", "--retry", &info.name]).status();
                }
            }
            for attachment in left.unwrap_or_default() {
                let _ = self.nbd.disconnect(attachment.index());
            }
        } else {
            assert_eq!(left.unwrap(), [], "after the test");
        }
    }
}

/// A server that does not outlive the test.
struct Served(Option<NbdServer>);

impl Served {
    fn start(image: &Path, format: ServedFormat, folder: &Path) -> Result<Self, ServerError> {
        let config =
            ServerConfig { image, format, folder, user: 65534, connections: 20, group: None, limit: SOON };
        NbdServer::start(&config).map(|server| Self(Some(server)))
    }

    fn server(&mut self) -> &mut NbdServer {
        self.0.as_mut().unwrap()
    }

    fn socket(&self) -> PathBuf {
        self.0.as_ref().unwrap().socket().to_owned()
    }

    fn kill(&mut self) {
        signal(self.server().id(), "KILL");
        let deadline = std::time::Instant::now() + SOON;
        while self.server().ended().is_none() {
            assert!(std::time::Instant::now() < deadline, "it does not die");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(server) = self.0.take() {
            let stopped = server.stop();
            if !std::thread::panicking() {
                stopped.unwrap();
            }
        }
    }
}

fn signal(process: u32, name: &str) {
    run("sh", &["-c", &format!("kill -{name} {process}")]);
}

/// Runs a program of the test's own and fails with what it printed.
fn run(program: &str, arguments: &[&str]) -> String {
    let path = berth_device::find_program(program).unwrap_or_else(|| panic!("{program} is not installed"));
    let output = Command::new(path).args(arguments).env("DM_DISABLE_UDEV", "1").output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// A raw image of [`SIZE`]: block n is filled with `seed + n`, and every third one is a hole.
fn write_image(path: &Path, seed: u8) {
    let file = File::create(path).unwrap();
    file.set_len(SIZE.0).unwrap();
    for block in 0..blocks() {
        if block % 3 != 2 {
            file.write_all_at(&vec![byte(seed, block); BLOCK], (block * BLOCK) as u64).unwrap();
        }
    }
}

fn blocks() -> usize {
    usize::try_from(SIZE.0).unwrap() / BLOCK
}

/// What [`write_image`] writes to a block.
fn byte(seed: u8, block: usize) -> u8 {
    if block % 3 == 2 { 0 } else { seed.wrapping_add(block.to_le_bytes()[0]) }
}

/// The one byte that a block is made of, past memory.
fn read_block(device: &Path, block: usize) -> io::Result<u8> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let file = fs::OpenOptions::new().read(true).custom_flags(nix::libc::O_DIRECT).open(device)?;
    let mut buffer = vec![0; BLOCK + 4096];
    let start = buffer.as_ptr().align_offset(4096);
    let bytes = &mut buffer[start..start + BLOCK];
    file.read_exact_at(bytes, (block * BLOCK) as u64)?;
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "block {block} of {} is mixed", device.display());
    Ok(bytes[0])
}

/// The identifier of the n-th holder.
fn id(n: u32) -> BackendId {
    BackendId::new(&Uid::from(format!("{n:08x}-1111-4222-8333-444455556666"))).unwrap()
}
