//! Templates as devices, while everything around them is killed.

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use berth_core::ids::PoolName;
use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_device::nbd::{
    self, AttachConfig, AttachError, Attachment, BackendId, Nbd, NbdServer, ServedFormat, ServerConfig, Slots,
};
use berth_node::agent::pools::{OpenPool, PoolSpec, Pools};
use berth_node::area::{Backend, templates};
use berth_node::supervisor::DataPlane;
use berth_node::supervisor::servers::Servers as _;
use berth_node::telemetry::chain;
use nix::sys::signal::Signal;

use super::{SOON, Stage, nbd_servers, plugin, run, signal, text, uid, wait_until};

const SIZE: usize = 16 << 20;
const BLOCK: usize = 64 << 10;

/// A folder on a disk of its own, with an image of which every block is another.
struct Bed<'a> {
    stage: &'a Stage,
    raw: PathBuf,
}

impl<'a> Bed<'a> {
    /// `None`, with the reason printed, where this machine cannot run the test.
    fn new(stage: &'a Stage, test: &str) -> Option<Self> {
        let missing = nbd::missing();
        if !missing.is_empty() {
            println!("SKIPPED {test}: {}", missing.join("; "));
            return None;
        }
        let disk = std::env::var("BERTH_TEST_DISK").unwrap_or_else(|_| "/dev/ubda".to_owned());
        if !Path::new(&disk).exists() {
            println!("SKIPPED {test}: no disk to wipe; name one in BERTH_TEST_DISK");
            return None;
        }
        assert_eq!(Attachment::list(&mut Nbd::open().unwrap()).unwrap(), [], "before the test");
        assert_eq!(nbd_servers(), [0; 0], "before the test");
        let mount = stage.path("mnt");
        fs::create_dir(&mount).unwrap();
        run("mkfs.ext4", &["-q", "-F", &disk]);
        run("mount", &[&disk, text(&mount)]);
        let (raw, image) = (mount.join("image.raw"), mount.join("image.qcow2"));
        let bytes: Vec<u8> = (0..SIZE / BLOCK).flat_map(|block| vec![byte(block); BLOCK]).collect();
        fs::write(&raw, bytes).unwrap();
        run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&image)]);
        Some(Self { stage, raw })
    }

    /// Nothing is left, neither in the kernel nor of servers.
    fn end(self) {
        assert_eq!(Attachment::list(&mut Nbd::open().unwrap()).unwrap(), [], "after the test");
        assert_eq!(nbd_servers(), [0; 0], "after the test");
        run("umount", &[text(&self.stage.path("mnt"))]);
    }
}

/// So that the next test begins without devices and servers.
impl Drop for Bed<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for process in nbd_servers() {
            signal(process, Signal::SIGKILL);
        }
        let Ok(mut nbd) = Nbd::open() else { return };
        for device in Attachment::list(&mut nbd).unwrap_or_default() {
            let _ = nbd.disconnect(device.index());
        }
    }
}

fn byte(block: usize) -> u8 {
    (block % 251).to_le_bytes()[0] ^ 0x5a
}

/// The pool of a stage, whose record knows of the templates.
pub fn open(dir: &Path) -> (Pools, Arc<OpenPool>) {
    let pools = Pools::new("n1".into(), dir.join("pools"), dir);
    let pools = pools.with_data_plane(DataPlane::supervised(&dir.join("run/supervisor.sock")));
    let name = PoolName::from("fast");
    let uid = format!("pool-{}", dir.file_name().unwrap().display());
    let backend = Backend::Filesystem { path: dir.join("mnt/area"), size: Bytes::mib(512) };
    pools.prepare(&name, &PoolSpec::new(uid.into(), backend)).unwrap();
    let pool = pools.get(&name).unwrap();
    (pools, pool)
}

fn close(pools: Pools, pool: Arc<OpenPool>) {
    drop(pools);
    let OpenPool { area, record, .. } = Arc::into_inner(pool).expect("the last one");
    drop(record);
    area.close().unwrap();
}

/// Reads a device past memory without end, and compares every byte.
struct Reader {
    stop: Arc<AtomicBool>,
    reads: Arc<AtomicU64>,
    slowest: Arc<Mutex<Duration>>,
    thread: JoinHandle<io::Result<()>>,
}

impl Reader {
    fn start(device: &Path) -> Self {
        let file = fs::OpenOptions::new().read(true).custom_flags(nix::libc::O_DIRECT).open(device).unwrap();
        let (stop, reads, slowest) =
            (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default(), Arc::<Mutex<Duration>>::default());
        let (ended, counted, longest) = (Arc::clone(&stop), Arc::clone(&reads), Arc::clone(&slowest));
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; BLOCK + 4096];
            let start = buffer.as_ptr().align_offset(4096);
            for round in 0_usize.. {
                if ended.load(Ordering::SeqCst) {
                    break;
                }
                let block = round.wrapping_mul(7919) % (SIZE / BLOCK);
                let begun = Instant::now();
                let bytes = &mut buffer[start..start + BLOCK];
                file.read_exact_at(bytes, (block * BLOCK) as u64)?;
                assert!(bytes.iter().all(|found| *found == byte(block)), "block {block} is another");
                let mut longest = longest.lock().unwrap();
                *longest = longest.max(begun.elapsed());
                drop(longest);
                counted.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(2));
            }
            Ok(())
        });
        Self { stop, reads, slowest, thread }
    }

    /// Waits until it has read on, and says what it had to wait for.
    fn goes_on(&self, after: &str) {
        let before = self.reads.load(Ordering::SeqCst);
        let begun = Instant::now();
        wait_until(&format!("reads go on after {after}"), SOON, || {
            assert!(!self.thread.is_finished(), "it failed after {after}");
            self.reads.load(Ordering::SeqCst) >= before + 50
        });
        let longest = std::mem::take(&mut *self.slowest.lock().unwrap());
        println!("after {after}: 50 reads in {:?}, longest stall {longest:?}", begun.elapsed());
    }

    fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().expect("every byte was right").expect("no read failed");
    }
}

fn kill_server() {
    let [process] = nbd_servers()[..] else { panic!("{:?}", nbd_servers()) };
    signal(process, Signal::SIGKILL);
}

#[test]
fn a_template_is_read_through_the_deaths_of_plugin_server_and_supervisor() {
    let stage = Stage::new();
    let test = "a_template_is_read_through_the_deaths_of_plugin_server_and_supervisor";
    let Some(bed) = Bed::new(&stage, test) else { return };
    let mut supervisor = stage.supervisor();
    let mut plugin = plugin::start(&stage, plugin::Deed::Template);
    plugin::go(&stage);
    let device = PathBuf::from(plugin::await_done(&stage));
    let reader = Reader::start(&device);
    reader.goes_on("its start");
    plugin.kill();
    reader.goes_on("the plugin was killed");
    kill_server();
    reader.goes_on("the server was killed");
    supervisor.kill();
    reader.goes_on("the supervisor was killed");
    let server = nbd_servers();
    supervisor = stage.supervisor();
    reader.goes_on("another supervisor was started");
    assert_eq!(nbd_servers(), server, "the server was taken over");
    supervisor.kill();
    kill_server();
    std::thread::sleep(Duration::from_secs(2)); // nobody is there to help
    let mut supervisor = stage.supervisor();
    reader.goes_on("supervisor and server were killed, and the supervisor was started");
    supervisor.kill();
    let supervisor = stage.supervisor();

    let (pools, pool) = open(stage.dir.path());
    let data_plane = pools.data_plane().clone();
    assert_eq!(templates::device(&pool, &uid(7)).unwrap(), Some(device.clone()), "after the plugin's start");
    let again =
        templates::attach(&pool, &data_plane, &uid(7), &bed.stage.path("mnt/image.qcow2"), Some("qcow2"));
    assert_eq!(again.unwrap(), device);
    let other = templates::attach(&pool, &data_plane, &uid(7), &bed.raw, Some("raw")).unwrap_err();
    assert_eq!(other.reason(), Reason::AlreadyDifferent, "{other}");
    let busy = templates::detach(&pool, &data_plane, &uid(7)).unwrap_err();
    assert_eq!(busy.reason(), Reason::InUse, "{busy}");
    assert!(chain(&busy).contains("process"), "{}", chain(&busy));
    assert!(stage.client().stop(&uid(7)).is_err(), "its server stays while it has a device");
    reader.goes_on("it was not detached");
    reader.end();
    templates::detach(&pool, &data_plane, &uid(7)).unwrap();
    assert_eq!(templates::device(&pool, &uid(7)).unwrap(), None);
    let gone = templates::detach(&pool, &data_plane, &uid(7)).unwrap_err();
    assert_eq!(gone.reason(), Reason::VolumeNotFound);
    assert_eq!(stage.client().list().unwrap(), []);
    close(pools, pool);
    supervisor.end();
    bed.end();
}

#[test]
fn when_every_device_is_taken_or_nobody_serves_it_says_so_and_leaves_nothing() {
    let stage = Stage::new();
    let test = "when_every_device_is_taken_or_nobody_serves_it_says_so_and_leaves_nothing";
    let Some(bed) = Bed::new(&stage, test) else { return };
    let supervisor = stage.supervisor();
    let (pools, pool) = open(stage.dir.path());
    let data_plane = pools.data_plane().clone();
    let config = ServerConfig {
        image: &bed.raw,
        format: ServedFormat::Raw,
        folder: &stage.path("theirs"),
        user: 65534,
        connections: 40,
        group: None,
        limit: SOON,
    };
    let server = NbdServer::start(&config).unwrap();
    let (mut nbd, mut slots) = (Nbd::open().unwrap(), Slots::default());
    let mut taken = Vec::new();
    for n in 0.. {
        let id = BackendId::new(&uid(0x1000 + n)).unwrap();
        let size = Bytes(SIZE as u64);
        let config =
            AttachConfig { id: &id, socket: server.socket(), size, dead_connection: SOON, limit: SOON };
        match Attachment::attach(&mut nbd, &mut slots, &config) {
            Ok(attachment) => taken.push(attachment),
            Err(AttachError::Exhausted { .. }) => break,
            Err(error) => panic!("{error}"),
        }
    }
    let error = templates::attach(&pool, &data_plane, &uid(7), &bed.raw, Some("raw")).unwrap_err();
    assert_eq!(error.reason(), Reason::SlotsExhausted, "{}", chain(&error));
    assert!(chain(&error).contains(&format!("{} ours", taken.len())), "{}", chain(&error));
    println!("{}", chain(&error));
    assert_eq!(pool.record.template(&uid(7)).unwrap(), None, "nothing is left of it");
    assert_eq!(stage.client().list().unwrap(), []);
    for attachment in taken {
        attachment.detach(&mut nbd, &mut slots).unwrap();
    }
    server.stop().unwrap();

    supervisor.end();
    let error = templates::attach(&pool, &data_plane, &uid(7), &bed.raw, Some("raw")).unwrap_err();
    assert_eq!(error.reason(), Reason::SupervisorUnavailable, "{}", chain(&error));
    let supervisor = stage.supervisor();
    let device = templates::attach(&pool, &data_plane, &uid(7), &bed.raw, Some("raw")).unwrap();
    assert!(device.exists());
    // A pool that is closed leaves nothing in the kernel, and everything in its record.
    drop(pool);
    let open_file = fs::File::open(&device).unwrap();
    let busy = pools.close(&PoolName::from("fast")).unwrap_err();
    assert_eq!(busy.reason(), Reason::InUse, "{}", chain(&busy));
    drop(open_file);
    pools.close(&PoolName::from("fast")).unwrap();
    assert_eq!(Attachment::list(&mut nbd).unwrap(), []);
    assert_eq!(stage.client().list().unwrap(), []);
    drop(pools);
    let (pools, pool) = open(stage.dir.path());
    assert!(templates::device(&pool, &uid(7)).unwrap().is_some());
    templates::detach(&pool, &data_plane, &uid(7)).unwrap();
    close(pools, pool);
    supervisor.end();
    bed.end();
}
