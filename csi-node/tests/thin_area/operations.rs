//! What may be asked of a node's pools, on a pool of thin devices.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_core::ids::{Digest, Sha256Sum};
use berth_core::ledger::Class;
use berth_core::reason::Reason;
use berth_core::units::{Bytes, Timestamp};
use berth_device::nbd::{
    self, AttachConfig, Attachment, BackendId, Nbd, NbdServer, ServedFormat, ServerConfig, Slots,
};
use berth_device::partition::Extent;
use berth_device::thin::{KernelPool, PoolStatus, ThinDevice};
use berth_node::agent::pools::{OpenPool, Pools};
use berth_node::area::Backend;
use berth_node::operation::{
    FindingKind, MapFrom, MapLine, Operation, OriginName, Outcome, PoolLine, Refusal, VolumeKind, VolumeLine,
    carry_out,
};
use berth_record::{ImageState, LedgerPosition, TemplateEntry, TemplateState, tables};

use super::killed::write;
use super::{Bench, MIB, POOL, holder, name, pools, remove_image, spec_on, used};

pub(super) const KIB64: u64 = 64 << 10;

/// A node with the pool, and nothing else.
pub(super) struct Asked {
    pub(super) pools: Pools,
    pub(super) backend: Backend,
}

impl Asked {
    pub(super) fn new(dir: &Path, bench: &Bench) -> Self {
        let asked = Self { pools: pools(dir), backend: spec_on(&bench.disk).backend };
        let (uid, backend) = (POOL.into(), asked.backend.clone());
        asked.done(&Operation::PoolCreate { pool: name(), uid, backend });
        asked
    }

    fn run(&self, operation: &Operation) -> Result<Outcome, Refusal> {
        carry_out(&self.pools, operation)
    }

    pub(super) fn done(&self, operation: &Operation) {
        assert_eq!(self.run(operation), Ok(Outcome::Done), "{operation:?}");
    }

    pub(super) fn refused(&self, operation: &Operation, reason: Reason, words: &str) {
        let refusal = self.run(operation).expect_err("refused");
        assert_eq!(refusal.reason, reason, "{refusal}");
        assert!(refusal.message.contains(words), "`{refusal}` names `{words}`");
    }

    pub(super) fn device(&self, n: u32, read_only: bool) -> PathBuf {
        match self.run(&attach(n, read_only)) {
            Ok(Outcome::Device(device)) => device,
            other => panic!("{other:?}"),
        }
    }

    fn volume(&self, n: u32) -> VolumeLine {
        match self.run(&Operation::VolumeList { pool: name() }) {
            Ok(Outcome::Volumes(lines)) => lines.into_iter().find(|line| line.uid == holder(n)).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    fn map(&self, n: u32) -> Vec<(u64, u64, MapFrom)> {
        self.told(&Operation::VolumeMap { pool: name(), volume: holder(n), offset: Bytes::ZERO })
    }

    fn delta(&self, old: u32, n: u32) -> Vec<(u64, u64, MapFrom)> {
        self.told(&delta(old, n))
    }

    /// In blocks of 64 KiB.
    fn told(&self, operation: &Operation) -> Vec<(u64, u64, MapFrom)> {
        match self.run(operation) {
            Ok(Outcome::Map(lines)) => {
                let unit = |bytes: Bytes| bytes.0 / KIB64;
                let part = |line: MapLine| (unit(line.offset), unit(line.length), line.from);
                lines.into_iter().map(part).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn findings(&self) -> Vec<(FindingKind, String)> {
        match self.run(&Operation::PoolCheck { pool: name() }) {
            Ok(Outcome::Findings(found)) => {
                let mut found: Vec<_> = found.into_iter().map(|found| (found.kind, found.about)).collect();
                found.sort();
                found
            }
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn lines(&self) -> Vec<PoolLine> {
        match self.run(&Operation::PoolList {}) {
            Ok(Outcome::Pools(lines)) => lines,
            other => panic!("{other:?}"),
        }
    }

    /// As after a kill: the kernel keeps what it has, and a new process opens the pool.
    pub(super) fn killed(&mut self, dir: &Path) {
        self.pools = pools(dir);
        self.pools.reopen_known().unwrap();
    }

    pub(super) fn pool(&self) -> std::sync::Arc<OpenPool> {
        self.pools.get(&name()).unwrap_or_else(|| panic!("{:?}", self.pools.failure(&name())))
    }
}

pub(super) fn create(n: u32, size: Bytes, origin: Option<OriginName>) -> Operation {
    let labels = BTreeMap::new();
    Operation::VolumeCreate { pool: name(), volume: holder(n), size, origin, labels }
}

pub(super) fn clone(n: u32, of: u32, size: Option<Bytes>) -> Operation {
    Operation::VolumeClone { pool: name(), volume: holder(n), source: holder(of), size }
}

fn snapshot(n: u32, of: u32) -> Operation {
    Operation::VolumeSnapshot { pool: name(), snapshot: holder(n), source: holder(of) }
}

pub(super) fn attach(n: u32, read_only: bool) -> Operation {
    Operation::VolumeAttach { pool: name(), volume: holder(n), read_only }
}

pub(super) fn detach(n: u32) -> Operation {
    Operation::VolumeDetach { pool: name(), volume: holder(n) }
}

fn delta(old: u32, n: u32) -> Operation {
    Operation::VolumeDelta { pool: name(), old: holder(old), volume: holder(n), offset: Bytes::ZERO }
}

fn resize(n: u32, size: Bytes) -> Operation {
    Operation::VolumeResize { pool: name(), volume: holder(n), size }
}

pub(super) fn destroy(n: u32) -> Operation {
    Operation::VolumeDestroy { pool: name(), volume: holder(n) }
}

pub(super) fn byte(device: &Path, at: u64) -> u8 {
    let mut byte = [0];
    File::open(device).unwrap().read_exact_at(&mut byte, at).unwrap();
    byte[0]
}

fn size(device: &Path) -> u64 {
    File::open(device).unwrap().seek(SeekFrom::End(0)).unwrap()
}

fn digest() -> Digest {
    Digest(Sha256Sum::of(b"index"))
}

/// An image of 8 MiB with 64 KiB of fives at 1 MiB.
fn stage_image(pool: &OpenPool) {
    let (image, digest) = (holder(20), digest());
    let bytes = Bytes::mib(1);
    let held = berth_record::PromiseEntry {
        generation: super::FIRST,
        class: berth_record::PromiseClass::Images,
        data: bytes,
        metadata: Bytes::mib(1),
        holder: berth_record::Holder::local(&image),
        obeyed: true,
        released: false,
    };
    pool.obey(&LedgerPosition::default(), &[(image.clone(), held)]).unwrap();
    let entry = pool.record.begin_fill(&digest, &image, Bytes::mib(8), bytes, Timestamp(1)).unwrap();
    assert_ne!(entry.state, ImageState::Complete);
    let file = pool.area.new_image(&pool.record, &digest, Bytes::mib(8)).unwrap();
    file.write_all_at(&vec![5; 64 << 10], MIB).unwrap();
    pool.area.seal_image(&pool.record, &digest, file.into()).unwrap();
    pool.record.fill_complete(&digest, &image).unwrap();
}

#[test]
fn volumes_are_made_copied_enlarged_mapped_and_destroyed() {
    let Some(bench) = Bench::new("volumes_are_made_copied_enlarged_mapped_and_destroyed") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut asked = Asked::new(dir.path(), &bench);
    // All at once, because each growth costs LVM seconds in a guest.
    asked.done(&Operation::PoolGrow { pool: name(), class: Class::Volumes, size: Bytes::mib(128) });
    for _ in 0..2 {
        asked.done(&create(1, Bytes::mib(16), None));
    }
    let device = asked.device(1, false);
    write(&device, MIB, 7);
    let line = asked.volume(1);
    assert_eq!(
        (line.kind, line.size, line.device.as_ref()),
        (VolumeKind::Volume, Bytes::mib(16), Some(&device))
    );
    assert_eq!(line.mapped, Some(Bytes(KIB64)));
    let open = File::open(&device).unwrap();
    asked.refused(&detach(1), Reason::InUse, "process");
    asked.refused(&destroy(1), Reason::InUse, "detach it first");
    asked.refused(&Operation::PoolForget { pool: name() }, Reason::InUse, "is attached");
    drop(open);
    asked.refused(&create(9, Bytes::gib(2), None), Reason::CapacityRefused, "bytes");

    copies(&asked, &device);
    grows(&mut asked, dir.path());
    origins(&asked);
    templates(&asked, dir.path());
    for n in [2, 3] {
        asked.done(&destroy(n));
    }
    assert_eq!(used(&asked.pool()).1, Bytes::ZERO, "blocks come back at once");
    assert_eq!(asked.findings(), []);
    asked.done(&Operation::PoolDestroy { pool: name(), with_contents: true });
    bench.assert_nothing_is_left();
}

/// A snapshot of a volume in use, and a larger clone of the snapshot, each as it was.
fn copies(asked: &Asked, device: &Path) {
    let file = File::options().write(true).open(device).unwrap();
    file.write_all_at(&[2; 4096], 3 * MIB).unwrap(); // not written out
    for _ in 0..2 {
        asked.done(&snapshot(2, 1));
        asked.done(&clone(3, 2, Some(Bytes::mib(24))));
    }
    drop(file);
    write(device, MIB, 9);
    let kept = asked.device(2, true);
    assert_eq!((byte(&kept, MIB), byte(&kept, 3 * MIB)), (7, 2), "as it was, with what was under way");
    File::options()
        .write(true)
        .open(&kept)
        .and_then(|file| file.write_all_at(&[1; 512], 0).and_then(|()| file.sync_all()))
        .expect_err("never written");
    asked.refused(&attach(2, false), Reason::IsSnapshot, "for writing");
    let copy = asked.device(3, false);
    assert_eq!((size(&copy), byte(&copy, MIB), byte(&copy, 23 * MIB)), (24 * MIB, 7, 0));
    write(&copy, MIB, 3);
    assert_eq!((byte(device, MIB), byte(&kept, MIB)), (9, 7));
    assert_eq!(used(&asked.pool()).1, Bytes(4 * KIB64), "what is the same is there once");
    asked.done(&detach(1));
    for _ in 0..2 {
        asked.done(&destroy(1));
    }
    assert_eq!((byte(&kept, MIB), used(&asked.pool()).1), (7, Bytes(3 * KIB64)), "its source may go");
    for n in [2, 3] {
        asked.done(&detach(n));
    }
}

/// Online, and after a kill between the record and the device.
fn grows(asked: &mut Asked, dir: &Path) {
    let device = asked.device(3, false);
    let open = File::open(&device).unwrap();
    for _ in 0..2 {
        asked.done(&resize(3, Bytes::mib(32)));
    }
    assert_eq!(size(&device), 32 * MIB, "while it is open");
    asked.refused(&resize(2, Bytes::mib(32)), Reason::IsSnapshot, "made larger");
    asked.pool().record.volume_resized(&holder(3), Bytes::mib(40)).unwrap();
    asked.killed(dir);
    assert_eq!(size(&device), 40 * MIB, "completed at the start");
    asked.pool().record.volume_resized(&holder(3), Bytes::mib(48)).unwrap();
    asked.pool().record.thin_resized(&holder(3), Bytes::mib(48)).unwrap();
    asked.killed(dir);
    assert_eq!(
        (size(&device), byte(&device, MIB)),
        (48 * MIB, 3),
        "and where only the device was left to do"
    );
    let leave = std::process::Command::new("dmsetup")
        .args(["message", &kernel_pool().name().name(), "0", "reserve_metadata_snap"])
        .status();
    assert!(leave.unwrap().success());
    assert!(holds_metadata());
    asked.killed(dir);
    assert!(!holds_metadata(), "what was being read is released at the start");
    drop(open);
    asked.done(&detach(3));
}

fn kernel_pool() -> KernelPool {
    KernelPool::find(&POOL.into(), Class::Volumes).unwrap().unwrap()
}

fn holds_metadata() -> bool {
    matches!(kernel_pool().status().unwrap(), PoolStatus::Working(pool) if pool.held_root.is_some())
}

/// A volume of an image: its map, a discard, and copies of it with the same origin.
fn origins(asked: &Asked) {
    let pool = asked.pool();
    stage_image(&pool);
    let origin = Some(OriginName::Image(digest()));
    asked.refused(&create(5, Bytes::mib(4), origin.clone()), Reason::InvalidSpec, "has 8 MiB");
    asked.done(&create(5, Bytes::mib(16), origin.clone()));
    let device = asked.device(5, false);
    let (own, image, zero) = (MapFrom::Own, MapFrom::Origin, MapFrom::Zero);
    assert_eq!(asked.map(5), [(0, 16, zero), (16, 1, image), (17, 239, zero)], "the image has one block");
    assert_eq!(byte(&device, MIB), 5);
    write(&device, MIB, 6);
    write(&device, 9 * MIB, 6);
    assert_eq!(asked.map(5), [(0, 16, zero), (16, 1, own), (17, 127, zero), (144, 1, own), (145, 111, zero)]);
    asked.done(&snapshot(6, 5));
    let thin = ThinDevice::find(&kernel_pool(), &holder(5)).unwrap().unwrap();
    thin.discard(Extent { offset: Bytes::mib(1), length: Bytes(KIB64) }).unwrap();
    assert_eq!(byte(&device, MIB), 5, "the image's byte again");
    assert_eq!(asked.map(5)[..2], [(0, 16, zero), (16, 1, image)]);
    let kept = asked.device(6, true);
    assert_eq!((byte(&kept, MIB), byte(&kept, 2 * MIB), asked.map(6)[1]), (6, 0, (16, 1, own)));
    assert_eq!(asked.volume(6).origin, origin);
    differences(asked, &device, &thin);
    for n in [5, 6] {
        asked.done(&detach(n));
        pool.area.require_unused(&pool.record, &digest()).expect_err("volumes read from it");
        asked.done(&destroy(n));
    }
    remove_image(&pool, &digest());
    pool.released(&holder(20), super::FIRST).unwrap();
    pool.forget(&holder(20)).unwrap();
}

/// Volume 5, of which block 16 was discarded since its snapshot 6. Each is in use.
fn differences(asked: &Asked, device: &Path, thin: &ThinDevice) {
    let (own, image, zero, same) = (MapFrom::Own, MapFrom::Origin, MapFrom::Zero, MapFrom::Same);
    let back = (16, 1, image);
    assert_eq!(asked.delta(6, 5), [(0, 16, same), back, (17, 239, same)], "back to the image, and told");
    assert_eq!(asked.delta(5, 6), [(0, 16, same), (16, 1, own), (17, 239, same)]);
    assert_eq!(asked.delta(6, 6), [(0, 256, same)]);
    write(device, 2 * MIB, 8);
    write(device, 9 * MIB, 8);
    asked.done(&resize(5, Bytes::mib(20)));
    write(device, 18 * MIB, 8);
    let rest =
        [(33, 111, same), (144, 1, own), (145, 111, same), (256, 32, zero), (288, 1, own), (289, 31, zero)];
    let wanted = [&[(0, 16, same), back, (17, 15, same), (32, 1, own)][..], &rest].concat();
    assert_eq!(asked.delta(6, 5), wanted, "written again, written anew, and behind the old end");
    thin.discard(Extent { offset: Bytes::mib(9), length: Bytes(KIB64) }).unwrap();
    assert_eq!(asked.delta(6, 5)[5], (144, 1, zero), "behind the image there are zeros");
    asked.refused(&delta(3, 5), Reason::NotRelated, "did not start from");
    let kernel = kernel_pool();
    let read = kernel.metadata_snapshot(Duration::ZERO).unwrap();
    let told = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| asked.delta(6, 5));
        std::thread::sleep(Duration::from_millis(500));
        assert!(!waiting.is_finished(), "one at a time");
        drop(read);
        waiting.join().unwrap()
    });
    assert_eq!(told.len(), wanted.len());
}

/// A volume and its copy read from the device of a template.
fn templates(asked: &Asked, dir: &Path) {
    let missing = nbd::missing();
    if !missing.is_empty() {
        return println!("SKIPPED volumes of templates: {}", missing.join("; "));
    }
    let (uid, image, folder) = (holder(30), dir.join("image.raw"), dir.join("server"));
    fs::write(&image, vec![4; 2 << 20]).unwrap();
    let limit = Duration::from_secs(30);
    let server = NbdServer::start(&ServerConfig {
        image: &image,
        format: ServedFormat::Raw,
        folder: &folder,
        user: 65534,
        connections: 20,
        group: None,
        limit,
    });
    let server = server.unwrap();
    let (id, size) = (BackendId::new(&uid).unwrap(), Bytes::mib(2));
    let config = AttachConfig { id: &id, socket: server.socket(), size, dead_connection: limit, limit };
    let (mut kernel, mut slots) = (Nbd::open().unwrap(), Slots::default());
    let template = Attachment::attach(&mut kernel, &mut slots, &config).unwrap();
    let entry = TemplateEntry {
        file: image,
        format: "raw".to_owned(),
        virtual_size: size,
        state: TemplateState::Attached,
    };
    let pool = asked.pool();
    let record = pool.record.record();
    record.commit(|change| change.put(tables::TEMPLATES, &uid, &entry)).unwrap();
    assert_eq!(asked.device(30, true), template.path());
    let origin = Some(OriginName::Template(uid.clone()));
    asked.refused(&create(7, Bytes::mib(1), origin.clone()), Reason::InvalidSpec, "has 2 MiB");
    asked.done(&create(7, Bytes::mib(4), origin.clone()));
    let device = asked.device(7, false);
    write(&device, 0, 6);
    asked.done(&clone(8, 7, None));
    let copy = asked.device(8, false);
    assert_eq!((byte(&copy, 0), byte(&copy, MIB), byte(&copy, 3 * MIB)), (6, 4, 0));
    assert_eq!(asked.map(8), [(0, 1, MapFrom::Own), (1, 31, MapFrom::Origin), (32, 32, MapFrom::Zero)]);
    assert_eq!((asked.volume(8).origin, asked.findings()), (origin, vec![]));
    for n in [7, 8] {
        asked.done(&detach(n));
        asked.done(&destroy(n));
    }
    record.commit(|change| change.remove(tables::TEMPLATES, &uid).map(drop)).unwrap();
    template.detach(&mut kernel, &mut slots).unwrap();
    server.stop().unwrap();
}
