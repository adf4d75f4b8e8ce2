//! Volumes that start from an image behind kernel NBD.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;

use berth_core::ids::Uid;
use berth_core::ledger::Class;
use berth_core::thin::BlockSize;
use berth_core::units::Bytes;
use berth_device::nbd::AttachError;
use berth_device::thin::{
    self, KernelPool, KernelPoolConfig, ThinConfig, ThinDevice, ThinId, VolumeGroup, WhenFull, WipeConsent,
};

use super::{BLOCK, Bench, SIZE, SOON, byte, id, read_block};

const POOL: &str = "0f3c9a1e-5b7d-4c2a-9e10-00a1b2c3d4e5";
const HOLDER: &str = "00000002-1111-4222-8333-444455556666";

fn disk() -> Option<PathBuf> {
    let named = std::env::var("BERTH_TEST_DISKS").ok();
    let named = named.as_deref().and_then(|named| named.split(',').next());
    Some(PathBuf::from(named.unwrap_or("/dev/ubda"))).filter(|disk| disk.exists())
}

fn write_block(device: &std::path::Path, block: usize, byte: u8) {
    let file = OpenOptions::new().write(true).open(device).unwrap();
    file.write_all_at(&vec![byte; BLOCK], (block * BLOCK) as u64).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn a_clone_reads_the_template_and_its_own_writes() {
    let test = "a_clone_reads_the_template_and_its_own_writes";
    let Some(mut bench) = Bench::new(test) else { return };
    let (missing, disk) = (thin::missing(), disk());
    let (true, Some(disk)) = (missing.is_empty(), disk) else {
        println!("SKIPPED {test}: {}", [missing, vec!["a disk to wipe".to_owned()]].concat().join("; "));
        return;
    };
    let devices = [disk];
    let consent = WipeConsent::for_devices(devices.clone());
    let pool_uid = Uid::from(POOL);
    let group = VolumeGroup::create("berth-nbd-test", &pool_uid, &devices, Some(&consent)).unwrap();
    let config = KernelPoolConfig {
        pool: pool_uid,
        class: Class::Volumes,
        block: BlockSize::DEFAULT,
        when_full: WhenFull::Queue,
    };
    KernelPool::provision(&config, &group, Bytes::mib(32), Bytes::mib(4)).unwrap();
    let pool = KernelPool::open(&config, &group).unwrap();

    let mut served = bench.served("server", 30);
    let attachment = bench.attach(&id(1), &served.socket(), Duration::from_secs(120)).unwrap();
    let (holder, origin, thin_id) = (Uid::from(HOLDER), attachment.path(), ThinId::new(1).unwrap());
    pool.create_thin(thin_id).unwrap();
    let size = SIZE.saturating_add(Bytes::mib(1));
    let thin = ThinConfig { holder: &holder, id: thin_id, size, origin: Some(&origin), read_only: false };
    let clone = ThinDevice::activate(&pool, &thin).unwrap();
    for block in 0..super::blocks() {
        assert_eq!(read_block(&clone.path(), block).unwrap(), byte(30, block), "block {block}");
    }
    assert_eq!(read_block(&clone.path(), super::blocks()).unwrap(), 0, "behind the template's end");
    write_block(&clone.path(), 3, 0xEE);
    assert_eq!(read_block(&clone.path(), 3).unwrap(), 0xEE);
    assert_eq!(read_block(&origin, 3).unwrap(), byte(30, 3), "the template is as it was");

    // Its server is killed under it: what is its own goes on, what needs the template waits, and nothing fails.
    served.kill();
    write_block(&clone.path(), 3, 0xDD);
    assert_eq!(read_block(&clone.path(), 3).unwrap(), 0xDD);
    let path = clone.path();
    let waits = std::thread::spawn(move || read_block(&path, 7));
    std::thread::sleep(Duration::from_secs(2));
    assert!(!waits.is_finished());
    let image = bench.dir.path().join("server.raw");
    let format = berth_device::nbd::ServedFormat::Raw;
    let again = super::Served::start(&image, format, &bench.dir.path().join("server")).unwrap();
    attachment.reconnect(&mut bench.nbd, &again.socket(), SOON).unwrap();
    assert_eq!(waits.join().unwrap().unwrap(), byte(30, 7));
    write_block(&clone.path(), 4, 0xCC);
    assert_eq!(read_block(&clone.path(), 4).unwrap(), 0xCC);

    let error = attachment.clone().detach(&mut bench.nbd, &mut bench.slots).unwrap_err();
    let AttachError::InUse { holders, .. } = &error else { panic!("{error}") };
    assert!(holders.contains(&format!("device {}", clone.name())), "{error}");
    clone.deactivate().unwrap();
    bench.detach(attachment);
    pool.close(&group).unwrap();
    KernelPool::destroy(&config, &group).unwrap();
    group.remove().unwrap();
}
