//! A pool of thin devices as a whole: what a check finds, what is lost with what, and how it changes hands.

use std::fs;
use std::path::Path;
use std::process::Command;

use berth_core::ids::Uid;
use berth_core::ledger::Class;
use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_device::thin::{self, PoolTable};
use berth_node::agent::pools::{PoolSpec, Pools};
use berth_node::area::Backend;
use berth_node::operation::{FindingKind, Operation, PoolLineState};
use berth_record::tables;

use super::killed::write;
use super::operations::{Asked, KIB64, attach, byte, create, destroy, detach};
use super::{Bench, MIB, POOL, holder, lvm, name, spec_on};

fn dmsetup(arguments: &[&str]) -> String {
    let output = Command::new("dmsetup").args(arguments).env("DM_DISABLE_UDEV", "1").output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_pool_is_checked_found_and_introduced_elsewhere() {
    let Some(bench) = Bench::new("a_pool_is_checked_found_and_introduced_elsewhere") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut asked = Asked::new(dir.path(), &bench);
    for n in 1..=3 {
        asked.done(&create(n, Bytes::mib(16), None));
    }
    write(&asked.device(1, false), MIB, 7);
    let grow = |class, size| Operation::PoolGrow { pool: name(), class, size };
    asked.done(&grow(Class::Volumes, Bytes::mib(64)));
    assert!(asked.pool().area.kernel_pools().unwrap().volumes.data.total >= Bytes::mib(64));
    asked.refused(&grow(Class::Images, Bytes::gib(1)), Reason::CapacityRefused, "ahead of need");
    assert_eq!(asked.findings(), []);
    planted(&mut asked, dir.path());
    lost(&mut asked, dir.path());
    elsewhere(asked, &bench, dir.path());
    bench.assert_nothing_is_left();
}

/// Each kind of finding, planted and mended.
fn planted(asked: &mut Asked, dir: &Path) {
    let volumes = "berth-0f3c9a1e-volumes";
    dmsetup(&["message", volumes, "0", "create_thin 99"]);
    let group = lvm(&["vgs", "--noheadings", "-o", "vg_name"]);
    let group = group.trim();
    let stray = ["lvcreate", "--yes", "-an", "-Wn", "-Zn", "--addtag", "berth", "-l", "1", "-n"];
    lvm(&[&stray[..], &["berth-0f3c9a1e-stray", group]].concat());
    dmsetup(&["suspend", &format!("berth-0f3c9a1e-{}", holder(2))]);
    asked.pool().record.record().commit(larger).unwrap();
    let wanted = [
        (FindingKind::Leaked, "berth-0f3c9a1e-stray".to_owned()),
        (FindingKind::Leaked, format!("{volumes}:99")),
        (FindingKind::Different, holder(3).to_string()), // the device against its entry
        (FindingKind::Different, holder(3).to_string()), // the entry against its volume
        (FindingKind::Suspended, format!("berth-0f3c9a1e-{}", holder(2))),
    ];
    assert_eq!(asked.findings(), wanted);
    dmsetup(&["message", volumes, "0", "delete 99"]);
    asked.pool().record.record().commit(as_before).unwrap();
    asked.killed(dir); // resumes
    lvm(&["lvremove", "--yes", &format!("{group}/berth-0f3c9a1e-stray")]);
    assert_eq!(asked.findings(), []);

    let line = dmsetup(&["table", volumes]);
    let mut table: PoolTable = line.parse().unwrap();
    table.features.read_only = true;
    for table in [table.to_string(), line.trim().to_owned()] {
        dmsetup(&["load", volumes, "--table", &table]);
        dmsetup(&["suspend", "--nolockfs", volumes]);
        dmsetup(&["resume", volumes]);
        let damaged = asked.findings();
        let is_read_only = table.contains("read_only");
        assert_eq!(
            damaged.contains(&(FindingKind::Damaged, volumes.to_owned())),
            is_read_only,
            "{damaged:?}"
        );
    }
}

fn sized(change: &berth_record::Change<'_>, size: Bytes) -> Result<(), berth_record::ChangeError> {
    let mut thin = change.require(tables::THIN, &holder(3))?;
    thin.size = size;
    change.put(tables::THIN, &holder(3), &thin)
}

fn larger(change: &berth_record::Change<'_>) -> Result<(), berth_record::ChangeError> {
    sized(change, Bytes::mib(24))
}

fn as_before(change: &berth_record::Change<'_>) -> Result<(), berth_record::ChangeError> {
    sized(change, Bytes::mib(16))
}

/// A thin device that is gone is one lost volume; a pool that cannot be started leaves what is attached.
fn lost(asked: &mut Asked, dir: &Path) {
    let volumes = "berth-0f3c9a1e-volumes";
    let id = asked.pool().record.thin(&holder(2)).unwrap().unwrap().id;
    dmsetup(&["remove", &format!("berth-0f3c9a1e-{}", holder(2))]);
    dmsetup(&["message", volumes, "0", &format!("delete {id}")]);
    asked.killed(dir);
    let missing = (FindingKind::Missing, holder(2).to_string());
    assert_eq!(asked.findings(), [missing, (FindingKind::Missing, format!("volume {}", holder(2)))]);
    asked.refused(&attach(2, false), Reason::VolumeLost, &holder(2).to_string());
    let device = asked.device(1, false);
    assert_eq!(byte(&device, MIB), 7, "the others are served");
    asked.done(&destroy(2));

    let status = dmsetup(&["status", volumes]);
    let transaction: u64 = status.split_whitespace().nth(3).unwrap().parse().unwrap();
    let set = |from: u64, to: u64| {
        dmsetup(&["message", volumes, "0", &format!("set_transaction_id {from} {to}")]);
    };
    set(transaction, transaction + 7);
    assert!(asked.findings().contains(&(FindingKind::Different, volumes.to_owned())));
    asked.killed(dir);
    let failed = asked.lines().remove(0);
    assert_eq!(failed.state, PoolLineState::Failed);
    asked.refused(&attach(3, false), Reason::PoolAreaFailed, "transaction");
    assert_eq!(byte(&device, MIB), 7, "attached, though nobody has it open");
    let shown = |n: u32| Path::new("/dev/mapper").join(format!("berth-0f3c9a1e-{}", holder(n))).exists();
    assert!(shown(1) && !shown(3), "the other one went");
    asked.refused(&Operation::PoolForget { pool: name() }, Reason::InUse, "is mounted at");
    set(transaction + 7, transaction);
    asked.killed(dir);
    assert!(shown(1) && shown(3));
    asked.done(&detach(1));
}

/// Forgotten here, introduced on another machine, and then under the UID of a pool that was made anew.
fn elsewhere(asked: Asked, bench: &Bench, dir: &Path) {
    asked.done(&Operation::PoolForget { pool: name() });
    assert_eq!(thin::list_ours().unwrap(), []);
    let found = asked.lines().remove(0);
    assert_eq!((found.state, found.area.as_str()), (PoolLineState::Found, POOL), "{found:?}");
    assert!(
        found.message.is_some_and(|message| message.contains("pool thin") && message.contains("node n1"))
    );
    assert!(matches!(&found.backend, Some(Backend::Thin(spec)) if spec.block == Bytes(KIB64)));
    assert_eq!(fs::read_dir(dir).unwrap().filter(|e| e.as_ref().unwrap().path().is_dir()).count(), 1, "mnt");
    drop(asked);

    let other = tempfile::tempdir().unwrap();
    let new = Uid::from("ffffffff-5b7d-4c2a-9e10-00a1b2c3d4e5");
    let backend = found.backend.unwrap();
    let asked = Asked { pools: Pools::new("n2".into(), other.path().join("mnt"), other.path()), backend };
    let introduce = |uid: Option<&Uid>| Operation::PoolIntroduce {
        pool: name(),
        area: POOL.into(),
        uid: uid.cloned(),
        backend: asked.backend.clone(),
    };
    asked.done(&introduce(Some(&new)));
    let device = asked.device(1, false);
    assert_eq!(byte(&device, MIB), 7);
    assert!(device.ends_with(format!("berth-0f3c9a1e-{}", holder(1))), "its names stay");
    drop(asked);
    let pools = Pools::new("n2".into(), other.path().join("mnt"), other.path());
    pools.prepare(&name(), &PoolSpec::new(new, spec_on(&bench.disk).backend)).unwrap(); // as an agent does
    let asked = Asked { pools, backend: spec_on(&bench.disk).backend };
    write(&asked.device(1, false), MIB, 8);
    asked.done(&detach(1));
    asked.done(&create(4, Bytes::mib(4), None));
    assert_eq!(asked.findings(), []);
    asked.refused(
        &Operation::PoolDestroy { pool: name(), with_contents: false },
        Reason::InUse,
        "3 volumes and snapshots",
    );
    asked.done(&Operation::PoolDestroy { pool: name(), with_contents: true });
}

#[test]
fn a_thin_device_that_nobody_recorded_is_left_alone() {
    let Some(bench) = Bench::new("a_thin_device_that_nobody_recorded_is_left_alone") else { return };
    let dir = tempfile::tempdir().unwrap();
    let asked = Asked::new(dir.path(), &bench);
    // The number that the first volume gets.
    let volumes = "berth-0f3c9a1e-volumes";
    dmsetup(&["message", volumes, "0", "create_thin 1"]);
    let volume = create(1, Bytes::mib(1), None);
    asked.refused(&volume, Reason::PoolAreaFailed, "has a thin device 1 already");
    asked.done(&volume);
    assert_eq!(asked.findings(), [(FindingKind::Leaked, format!("{volumes}:1"))], "it is still there");
    dmsetup(&["message", volumes, "0", "delete 1"]);
    asked.done(&destroy(1));
    assert_eq!(asked.findings(), []);
    asked.done(&Operation::PoolDestroy { pool: name(), with_contents: false });
    bench.assert_nothing_is_left();
}
