//! Why a pool cannot be opened, as it is reported; and that nothing was made or written then.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use berth_core::reason::Reason;
use berth_core::thin::BlockSize;
use berth_core::units::Bytes;
use berth_node::agent::pools::PoolSpec;
use berth_node::area::{Backend, ThinGroup, ThinSpec};

use super::{Bench, POOL, destroy, lvm, name, pools, reopen, spec_on, switch_off, text};

fn spec(group: ThinGroup) -> PoolSpec {
    PoolSpec::new(POOL.into(), Backend::Thin(ThinSpec { group, block: BlockSize::DEFAULT.bytes() }))
}

/// Why a pool of this kind cannot be made.
fn refusal(dir: &Path, spec: &PoolSpec) -> (Reason, String) {
    let pools = pools(dir);
    pools.prepare(&name(), spec).expect_err("it cannot be made");
    assert!(pools.get(&name()).is_none());
    pools.failure(&name()).expect("it is known why")
}

fn start_of(disk: &Path) -> Vec<u8> {
    let mut start = vec![0; 1 << 20];
    fs::File::open(disk).unwrap().read_exact_at(&mut start, 0).unwrap();
    start
}

#[test]
fn each_refusal_has_its_own_reason_and_touches_nothing() {
    let Some(bench) = Bench::new("each_refusal_has_its_own_reason_and_touches_nothing") else { return };
    let dir = tempfile::tempdir().unwrap();
    let disk = text(&bench.disk);
    lvm(&["vgcreate", "--yes", "others", disk]);
    let before = start_of(&bench.disk);
    let own = |wipe| spec(ThinGroup::Exclusive { devices: vec![bench.disk.clone()], wipe });
    let (reason, message) = refusal(dir.path(), &own(false));
    assert_eq!(reason, Reason::NotBlank, "{message}");
    assert!(message.contains(disk), "{message}");
    assert!(start_of(&bench.disk) == before, "nothing was written");

    // A volume of others with the name of the pool's record, in use.
    lvm(&["lvcreate", "--yes", "-Wn", "-n", "berth-0f3c9a1e-record", "-L", "16m", "others"]);
    let theirs = Path::new("/dev/others/berth-0f3c9a1e-record");
    fs::write(theirs, [7; 4096]).unwrap();
    let look =
        || lvm(&["lvs", "--noheadings", "-o", "lv_full_name,lv_uuid,lv_tags,lv_size,lv_active", "others"]);
    let before = look();
    let shared = |name: &str| spec(ThinGroup::Shared { name: name.to_owned(), size: Bytes::mib(640) });
    let (reason, message) = refusal(dir.path(), &shared("others"));
    assert_eq!(reason, Reason::ForeignVolume, "{message}");
    let (reason, message) = refusal(dir.path(), &own(true));
    assert_eq!(reason, Reason::DeviceInUse, "its wiping was agreed to, and yet: {message}");
    assert!(message.contains("others-berth--0f3c9a1e--record"), "{message}");
    let (reason, message) = refusal(dir.path(), &shared("nowhere"));
    assert_eq!(reason, Reason::PoolAreaGone, "{message}");
    assert_eq!(look(), before);
    assert!(fs::read(theirs).unwrap().starts_with(&[7; 4096]));
    lvm(&["vgremove", "--yes", "others"]);
    lvm(&["pvremove", "--yes", disk]);
    bench.assert_nothing_is_left();
}

#[test]
fn a_pool_whose_disk_was_wiped_is_gone_and_not_made_anew() {
    let Some(bench) = Bench::new("a_pool_whose_disk_was_wiped_is_gone_and_not_made_anew") else { return };
    let dir = tempfile::tempdir().unwrap();
    let first = pools(dir.path());
    first.prepare(&name(), &spec_on(&bench.disk)).unwrap();
    let pool = first.get(&name()).unwrap();
    switch_off(pool, first);
    let header = start_of(&bench.disk);
    let file = OpenOptions::new().write(true).open(&bench.disk).unwrap();
    let write = |bytes: &[u8]| {
        file.write_all_at(bytes, 0).unwrap();
        file.sync_all().unwrap();
    };
    write(&vec![0; header.len()]);
    // It was agreed that the disk may be wiped when the pool was made; not now.
    let (reason, message) = refusal(dir.path(), &spec_on(&bench.disk));
    assert_eq!(reason, Reason::PoolAreaGone, "{message}");
    assert!(start_of(&bench.disk).iter().all(|byte| *byte == 0), "nothing was made");
    write(&header);
    drop(file);
    let (pools, pool) = reopen(dir.path());
    destroy(pool, pools);
    bench.assert_nothing_is_left();
}
