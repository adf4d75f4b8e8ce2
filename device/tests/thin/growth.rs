//! Both kernel pools grow while clones are written to for the first time, on a slow disk, and nothing waits for long.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use berth_core::ledger::Class;
use berth_core::thin::Part;
use berth_core::units::Bytes;
use berth_device::thin::{InProcess, KernelPool, ThinConfig, ThinDevice, VolumeGroup, WhenFull, WipeConsent};
use nix::fcntl::OFlag;

use super::{
    BLOCK, Bench, GROUP, POOL, assert_none_suspended, config, end_pool, fill, holder, id, open_pool, run, uid,
};

/// How long each request takes, in milliseconds.
const LATENCY: u32 = 20;
/// The longest that a task may be in an uninterruptible sleep.
const LONGEST: Duration = Duration::from_secs(5);
/// How often each kernel pool grows, unless `BERTH_TEST_GROWTHS` says so.
const GROWTHS: u64 = 5;
/// Blocks of the template and of each clone.
const BLOCKS: u64 = 512;
const CLONES: u32 = 2;
/// What a kernel pool begins with, and grows by.
const STEP: Bytes = Bytes::mib(4);
/// Blocks that are always left: writes never wait for space, as in a pool that is as large as what is promised in it.
const MARGIN: u64 = 8;

/// A page that may be written past the page cache.
#[repr(align(4096))]
struct Page([u8; 4096]);

/// The disk that everything lies on, which can be made slow.
struct Slow<'a> {
    disk: &'a str,
    sectors: String,
}

impl<'a> Slow<'a> {
    const NAME: &'static str = "slow";

    fn over(disk: &'a Path) -> Self {
        let disk = disk.to_str().unwrap();
        let slow = Self { disk, sectors: run("blockdev", &["--getsz", disk]).trim().to_owned() };
        run("dmsetup", &["create", Self::NAME, "--table", &slow.table(0)]);
        slow
    }

    fn table(&self, millis: u32) -> String {
        format!("0 {} delay {} 0 {millis}", self.sectors, self.disk)
    }

    fn set_latency(&self, millis: u32) {
        run("dmsetup", &["load", Self::NAME, "--table", &self.table(millis)]);
        run("dmsetup", &["resume", Self::NAME]);
    }

    fn remove() {
        run("dmsetup", &["remove", "--retry", Self::NAME]);
    }
}

/// A template and clones of it that nothing was written to yet.
struct Bed {
    images: KernelPool,
    volumes: KernelPool,
    template: ThinDevice,
    clones: Vec<ThinDevice>,
}

impl Bed {
    fn new(group: &VolumeGroup) -> Self {
        let images = open_pool(group, Class::Images, Bytes(BLOCKS * BLOCK as u64).saturating_add(STEP));
        let volumes = open_pool(group, Class::Volumes, STEP);
        let size = Bytes(BLOCKS * BLOCK as u64);
        let one = holder(1);
        images.create_thin(id(1)).unwrap();
        let thin = ThinConfig { holder: &one, id: id(1), size, origin: None, read_only: false };
        let filled = ThinDevice::activate(&images, &thin).unwrap();
        fill(&filled.path(), 0, usize::try_from(BLOCKS).unwrap(), 0xAA).unwrap();
        filled.deactivate().unwrap();
        let template = ThinDevice::activate(&images, &ThinConfig { read_only: true, ..thin }).unwrap();
        let origin = template.path();
        let clone = |number: u32| {
            volumes.create_thin(id(number)).unwrap();
            let holder = holder(10 + number);
            let thin = ThinConfig { holder: &holder, id: id(number), origin: Some(&origin), ..thin };
            ThinDevice::activate(&volumes, &thin).unwrap()
        };
        let clones = (1..=CLONES).map(clone).collect();
        Self { images, volumes, template, clones }
    }

    fn end(self, group: &VolumeGroup) {
        self.clones.into_iter().for_each(|clone| clone.deactivate().unwrap());
        self.template.deactivate().unwrap();
        end_pool(self.volumes, group, &config(Class::Volumes, WhenFull::Queue));
        end_pool(self.images, group, &config(Class::Images, WhenFull::Queue));
    }
}

/// Where in its block the page of a write lies.
fn place(block: u64) -> u64 {
    block * BLOCK as u64 + block % 16 * 4096
}

/// Writes one page to each block of a clone, in order, as far as there is room for all clones; returns how many.
fn write_pages(clone: &Path, byte: u8, room: &AtomicU64, over: &AtomicBool) -> u64 {
    let file = OpenOptions::new().write(true).custom_flags(OFlag::O_DIRECT.bits()).open(clone).unwrap();
    let page = Page([byte; 4096]);
    let mut block = 0;
    while block < BLOCKS && !over.load(Ordering::Relaxed) {
        if block >= room.load(Ordering::Relaxed) / u64::from(CLONES) {
            thread::sleep(Duration::from_millis(10));
            continue;
        }
        file.write_all_at(&page.0, place(block)).unwrap();
        block += 1;
    }
    block
}

/// The longest uninterruptible sleep that was seen of any task, and whose it was.
fn watch_sleepers(over: &AtomicBool) -> (Duration, String) {
    let mut asleep: BTreeMap<u32, (String, Instant)> = BTreeMap::new();
    let mut longest = (Duration::ZERO, "nobody".to_owned());
    while !over.load(Ordering::Relaxed) {
        let mut now = BTreeMap::new();
        for (task, switches, name) in uninterruptible() {
            // Another number of switches: it was awake in between.
            let since = asleep.remove(&task).filter(|(before, _)| *before == switches);
            let since = since.map_or_else(Instant::now, |(_, since)| since);
            if since.elapsed() > longest.0 {
                longest = (since.elapsed(), name);
            }
            now.insert(task, (switches, since));
        }
        asleep = now;
        thread::sleep(Duration::from_millis(100));
    }
    longest
}

/// Tasks in state D: id, how often they were switched away from, name.
fn uninterruptible() -> Vec<(u32, String, String)> {
    let tasks = fs::read_dir("/proc").unwrap().flatten().filter(|entry| {
        entry.file_name().to_str().is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
    });
    let threads =
        tasks.flat_map(|task| fs::read_dir(task.path().join("task")).into_iter().flatten().flatten());
    let look = |thread: fs::DirEntry| {
        let status = fs::read_to_string(thread.path().join("status")).ok()?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.map(|value| value.trim().to_owned())
        };
        if !field("State:")?.starts_with('D') {
            return None;
        }
        let number = thread.file_name().to_str()?.parse().ok()?;
        Some((number, field("voluntary_ctxt_switches:")?, field("Name:")?))
    };
    threads.filter_map(look).collect()
}

#[test]
fn both_pools_grow_under_first_writes_to_clones_and_nobody_waits_for_long() {
    let test = "both_pools_grow_under_first_writes_to_clones_and_nobody_waits_for_long";
    let Some(bench) = Bench::new(test) else { return };
    let growths = std::env::var("BERTH_TEST_GROWTHS").ok().map_or(GROWTHS, |text| text.parse().unwrap());
    let slow = Slow::over(&bench.large);
    let devices = ["/dev/mapper/slow".into()];
    let consent = WipeConsent::for_devices(devices.clone());
    let group = VolumeGroup::create(GROUP, &uid(POOL), &devices, Some(&consent)).unwrap();
    let bed = Bed::new(&group);
    slow.set_latency(LATENCY);
    let (over, room) = (AtomicBool::new(false), AtomicU64::new(0));
    let (written, longest) = thread::scope(|scope| {
        let watcher = scope.spawn(|| watch_sleepers(&over));
        let writers: Vec<_> = bed
            .clones
            .iter()
            .zip(1_u8..)
            .map(|(clone, byte)| (clone.path(), byte))
            .map(|(path, byte)| {
                scope.spawn({
                    let (room, over) = (&room, &over);
                    move || write_pages(&path, byte, room, over)
                })
            })
            .collect();
        for round in 0..growths {
            for (class, pool) in [(Class::Images, &bed.images), (Class::Volumes, &bed.volumes)] {
                pool.grow(&config(class, WhenFull::Queue), &group, Part::Data, STEP, &InProcess).unwrap();
            }
            let total = bed.volumes.state().unwrap().data.total.0 / BLOCK as u64;
            room.store(total - MARGIN, Ordering::Relaxed);
            assert_none_suspended();
            assert!(total >= (round + 2) * STEP.0 / BLOCK as u64, "it has grown");
        }
        over.store(true, Ordering::Relaxed);
        let written: Vec<u64> = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
        (written, watcher.join().unwrap())
    });
    slow.set_latency(0);
    println!(
        "both kernel pools grew {growths} times at {LATENCY} ms of latency, {written:?} blocks written for the first time \
         meanwhile; longest uninterruptible sleep {:.1} s ({})",
        longest.0.as_secs_f64(),
        longest.1
    );
    assert!(
        written.iter().all(|blocks| *blocks >= 2 * growths.min(BLOCKS / 2)),
        "{written:?}: hardly any writes"
    );
    assert!(longest.0 > Duration::ZERO, "the watcher saw nobody wait for a slow disk");
    assert!(longest.0 < LONGEST, "{} slept for {:?}", longest.1, longest.0);
    for ((clone, byte), blocks) in bed.clones.iter().zip(1_u8..).zip(&written) {
        check(&clone.path(), byte, *blocks);
    }
    bed.end(&group);
    group.remove().unwrap();
    Slow::remove();
}

/// Each of the first blocks has its page, and the template's bytes around it; the next one is the template's.
fn check(clone: &Path, byte: u8, blocks: u64) {
    let file = File::open(clone).unwrap();
    let mut bytes = vec![0; BLOCK];
    for block in 0..=blocks.min(BLOCKS - 1) {
        file.read_exact_at(&mut bytes, block * BLOCK as u64).unwrap();
        let page = usize::try_from(place(block) % BLOCK as u64).unwrap();
        let own = if block < blocks { byte } else { 0xAA };
        assert!(bytes[page..page + 4096].iter().all(|found| *found == own), "block {block}");
        bytes[page..page + 4096].fill(0xAA);
        assert!(bytes.iter().all(|found| *found == 0xAA), "block {block} around its page");
    }
}
