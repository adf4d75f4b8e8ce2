//! Volumes that are promised more than is there, and images beside them that are not.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use berth_core::budget::{fits, free};
use berth_core::ids::{Lineage, ObjectName, Sha256Sum, Uid, ledger_name};
use berth_core::ledger::{Class, Holder as Held, Promise};
use berth_core::node::Origin;
use berth_core::overcommit::{Overcommit, Percent};
use berth_core::reason::Reason;
use berth_core::thin::{PoolMode, capacity, demanded, image_charge, volume_charge};
use berth_core::units::Generation;
use berth_core::view::{LedgerCapacity, LedgerView, ObjectVersion};
use berth_node::agent::volumes;
use berth_record::{Holder, LedgerPosition, PromiseClass, PromiseEntry};

use super::*;

/// What is written at once.
const PART: usize = 1 << 20;
const OVER: u32 = 300;
const IMAGE: Bytes = Bytes::mib(128);

/// What an operator does for the pool, by the decisions that it is made of.
struct Operator {
    ledger: LedgerView,
}

impl Operator {
    fn new() -> Self {
        let (pool, node) = (name(), "n1".into());
        let ledger = LedgerView {
            name: ledger_name(&pool, &node),
            version: ObjectVersion::default(),
            pool,
            node,
            lineage: Lineage::from("l"),
            revision: 0,
            rebuilt: None,
            capacity: LedgerCapacity::default(),
            promises: BTreeMap::new(),
        };
        Self { ledger }
    }

    /// Follows what the area has become; the node follows the ledger.
    fn follow(&mut self, pool: &OpenPool) {
        let state = pool.area.kernel_pools().unwrap();
        let mut wanted = capacity(pool.area.total(), BlockSize::DEFAULT, &state);
        let attain = demanded(&state.volumes.data, wanted.volumes.data);
        wanted.overcommit = Overcommit { percent: Percent::from(OVER), attain };
        self.ledger.capacity =
            wanted.covering(self.ledger.capacity.overcommit, self.ledger.promises.values());
        self.obeyed(pool, &[]);
        let volumes = self.ledger.promises.values().filter(|promise| promise.class == Class::Volumes);
        let promised = volumes.map(|promise| promise.charge.data).sum();
        if let Some(size) = pool.area.volumes_lack(self.ledger.capacity.overcommit.target(promised)) {
            pool.area.grow(Class::Volumes, size).unwrap();
        }
    }

    fn obeyed(&mut self, pool: &OpenPool, promises: &[(Uid, PromiseEntry)]) {
        self.ledger.revision += 1;
        let (lineage, overcommit) = (Some(self.ledger.lineage.clone()), self.ledger.capacity.overcommit);
        let position = LedgerPosition { lineage, obeyed_revision: self.ledger.revision, overcommit };
        pool.obey(&position, promises).unwrap();
    }

    /// Promises it, if it fits, and has the node obey that.
    fn promise(&mut self, pool: &OpenPool, uid: &Uid, class: Class, size: Bytes) {
        let new = [asked(uid, class, size)];
        fits(&self.ledger, &new)
            .unwrap_or_else(|short| panic!("{uid}: {short} of {:?}", self.ledger.capacity));
        let [(uid, promise)] = new;
        let holder =
            Holder { kind: "StagingReservation".into(), namespace: "ns".into(), name: uid.to_string() };
        let class = match class {
            Class::Images => PromiseClass::Images,
            Class::Volumes => PromiseClass::Volumes,
        };
        let (data, metadata) = (promise.charge.data, promise.charge.metadata);
        let generation = Generation(1);
        let entry = PromiseEntry { generation, class, data, metadata, holder, obeyed: true, released: false };
        self.obeyed(pool, &[(uid.clone(), entry)]);
        self.ledger.promises.insert(uid, promise);
    }
}

fn asked(uid: &Uid, class: Class, size: Bytes) -> (Uid, Promise) {
    let charge = match class {
        Class::Images => image_charge(size, size, BlockSize::DEFAULT),
        Class::Volumes => volume_charge(size, BlockSize::DEFAULT),
    };
    let holder = Held::Reservation(ObjectName::new("ns", uid.as_str()));
    (uid.clone(), Promise { holder, class, charge, generation: FIRST, revoked: None })
}

/// Writes a volume from its start, again and again where there is no space, until it is told to stop or is at its end.
struct Writer {
    written: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    ended: thread::JoinHandle<()>,
}

impl Writer {
    fn start(volume: PathBuf, end: Bytes) -> Self {
        let (written, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (progress, stopped) = (Arc::clone(&written), Arc::clone(&stop));
        let ended = thread::spawn(move || {
            let direct = nix::fcntl::OFlag::O_DIRECT.bits();
            let file = OpenOptions::new().write(true).custom_flags(direct).open(&volume).unwrap();
            let buffer = vec![7; 2 * PART];
            let aligned = buffer.as_ptr().align_offset(4096);
            let part = &buffer[aligned..aligned + PART];
            let mut at = 0;
            while at < end.0 && !stopped.load(Ordering::SeqCst) {
                match file.write_all_at(part, at) {
                    Ok(()) => at += MIB,
                    Err(_) => thread::sleep(Duration::from_millis(200)), // no space
                }
                progress.store(at, Ordering::SeqCst);
            }
        });
        Self { written, stop, ended }
    }

    fn written(&self) -> u64 {
        self.written.load(Ordering::SeqCst)
    }

    /// Lets the operator follow until this is so.
    fn until(&self, operator: &mut Operator, pool: &OpenPool, what: &str, so: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !so(self) {
            assert!(begun.elapsed() < Duration::from_secs(240), "{what}: {:?}", pool.area.kernel_pools());
            operator.follow(pool);
            thread::sleep(Duration::from_millis(200));
        }
    }

    fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.ended.join().unwrap();
    }
}

fn make(pool: &OpenPool, uid: &Uid, size: Bytes) {
    volumes::make(pool, uid, FIRST, size, &Origin::Blank, &BTreeMap::new()).unwrap();
}

/// All that the image is promised is written, read back, and sealed.
fn stage_whole(pool: &OpenPool) {
    let digest = Digest(Sha256Sum::of(b"an image"));
    let image = pool.area.new_image(&pool.record, &digest, IMAGE).unwrap();
    let part: Vec<u8> = (0..MIB).map(|at| (at % 251) as u8).collect();
    for at in 0..IMAGE.0 / MIB {
        image.write_all_at(&part, at * MIB).unwrap();
    }
    image.sync_all().unwrap();
    pool.area.seal_image(&pool.record, &digest, Arc::new(image)).unwrap();
    let shown = File::open(pool.area.image(&digest)).unwrap();
    let mut found = vec![0; PART];
    for at in 0..IMAGE.0 / MIB {
        shown.read_exact_at(&mut found, at * MIB).unwrap();
        assert!(found == part, "MiB {at} of the image");
    }
    drop(shown);
    pool.area.remove_image(&pool.record, &digest).unwrap();
}

#[test]
fn d46_volumes_that_are_promised_more_than_is_there_fill_up_and_images_keep_what_they_are_promised() {
    let test =
        "d46_volumes_that_are_promised_more_than_is_there_fill_up_and_images_keep_what_they_are_promised";
    let Some(bench) = Bench::new(test) else { return };
    let dir = tempfile::tempdir().unwrap();
    let pools = pools(dir.path());
    pools.prepare(&name(), &spec_on(&bench.disk)).unwrap();
    let pool = pools.get(&name()).unwrap();
    let total = pool.area.total();
    let size = Bytes((total.0 - IMAGE.0) / MIB * MIB);
    let mut operator = Operator::new();
    operator.follow(&pool);

    let (image, one, two, three) = (holder(1), holder(2), holder(3), holder(4));
    operator.promise(&pool, &image, Class::Images, IMAGE);
    operator.promise(&pool, &one, Class::Volumes, size);
    make(&pool, &one, size);
    let made = pool.area.kernel_pools().unwrap().volumes.data.total;
    assert!(
        made >= Bytes(size.0 / 3) && made < Bytes(size.0 / 2),
        "as much as it counts for: {made} of {size}"
    );
    let part = Bytes(size.0 * 6 / 10 / MIB * MIB);
    let writer = Writer::start(pool.area.volume(&one), part);
    writer.until(&mut operator, &pool, "more than it counts for", |writer| writer.written() == part.0);
    writer.end();
    let grown = pool.area.kernel_pools().unwrap().volumes.data.total;
    assert!(grown >= part && grown < size, "as much as it wrote, in steps: {grown}");

    for uid in [&two, &three] {
        operator.promise(&pool, uid, Class::Volumes, size);
        make(&pool, uid, size);
    }
    assert!(3 * size.0 > total.0 * 2, "three volumes of {size} in {total}");
    let fourth = [asked(&holder(5), Class::Volumes, Bytes::mib(64))];
    fits(&operator.ledger, &fourth).expect_err("300 % and no more");
    assert!(free(&operator.ledger, Class::Images) < Bytes::mib(8), "nor an image");
    let writer = Writer::start(pool.area.volume(&two), size);
    let state = || pool.area.kernel_pools().unwrap();
    writer.until(&mut operator, &pool, "full", |_| state().volumes.mode == PoolMode::OutOfDataSpace);
    let full = state();
    let said = full.stopped(Class::Volumes).expect("nothing more is promised");
    assert_eq!(said.reason(), Reason::DataAlmostFull);
    assert!(said.to_string().contains("has no data space left"), "{said}");
    assert!(full.volumes_full(operator.ledger.attainable_by_volumes()).is_some(), "{full:?}");
    assert_eq!(full.stopped(Class::Images), None);
    println!("full at {} of {total}: {said}", full.volumes.data.used);

    stage_whole(&pool);

    let before = writer.written();
    assert!(before < size.0, "it waits");
    volumes::remove(&pool, &one).unwrap();
    writer.until(&mut operator, &pool, "writes go on", |writer| writer.written() > before + 16 * MIB);
    assert_eq!(state().volumes.mode, PoolMode::ReadWrite);
    writer.end();

    for uid in [&two, &three] {
        volumes::remove(&pool, uid).unwrap();
    }
    destroy(pool, pools);
    bench.assert_nothing_is_left();
}
