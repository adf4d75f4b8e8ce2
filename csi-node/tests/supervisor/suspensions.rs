//! Devices that are suspended when somebody dies.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use berth_core::ledger::Class;
use berth_core::units::Bytes;
use berth_device::loop_device::{self, LoopDevice, LoopOptions};
use berth_device::thin::{
    self, DeviceName, InProcess, KernelPool, KernelPoolConfig, KernelPoolError, SuspendError, Suspender,
    ThinConfig, ThinDevice, ThinId, WhenFull,
};
use berth_node::agent::pools::Pools;
use berth_node::supervisor::DataPlane;
use berth_node::supervisor::protocol::{Answer, FailureKind, Request};

use super::{SOON, Stage, plugin, protocol, run, text, uid, wait_until};

/// A kernel pool with one thin device that is active, made by hand.
pub struct Bed {
    loops: Vec<LoopDevice>,
    pub pool: KernelPool,
    pub device: ThinDevice,
}

impl Bed {
    /// `None`, with the reason printed, where this machine cannot run the test.
    pub fn new(stage: &Stage, test: &str) -> Option<Self> {
        let missing = thin::missing();
        if !missing.is_empty() {
            println!("SKIPPED {test}: {}", missing.join("; "));
            return None;
        }
        assert_eq!(thin::list_ours().unwrap(), [], "before the test");
        let loops: Vec<_> =
            [("metadata", 4), ("data", 64)].map(|(name, mib)| shown(&stage.path(name), mib << 20)).into();
        let name = DeviceName::kernel_pool(&uid(1), Class::Volumes).unwrap();
        let [metadata, data] = [0, 1].map(|n| text(&loops[n].path).to_owned());
        let table = format!("0 {} thin-pool {metadata} {data} 128 0", (64 << 20) / 512);
        run("dmsetup", &["create", &name.name(), "-u", &name.uuid(), "--table", &table]);
        let pool = KernelPool::find(&uid(1), Class::Volumes).unwrap().unwrap();
        pool.create_thin(id(1)).unwrap();
        let device = activate(&pool, 1);
        write(&device.path(), 7);
        Some(Self { loops, pool, device })
    }

    fn suspended(&self) -> bool {
        let mine = |info: &thin::DeviceInfo| info.device().as_ref() == Some(self.device.name());
        thin::list_ours().unwrap().into_iter().find(mine).unwrap().suspended
    }

    /// Its first block, read past memory within `limit`.
    fn read(&self, limit: Duration) -> u8 {
        let (give, take) = channel();
        let path = self.device.path();
        std::thread::spawn(move || give.send(read(&path)));
        take.recv_timeout(limit).expect("it answers")
    }

    /// Removes everything, the devices of these numbers too.
    pub fn end(self, snapshots: &[u32]) {
        self.device.clone().deactivate().unwrap();
        for number in snapshots {
            let device = activate(&self.pool, *number);
            assert_eq!(read(&device.path()), 7, "as it was when the snapshot was taken");
            device.deactivate().unwrap();
        }
        run("dmsetup", &["remove", "--retry", &self.pool.name().name()]);
        for device in &self.loops {
            loop_device::detach(device).unwrap();
        }
        assert_eq!(thin::list_ours().unwrap(), [], "after the test");
    }
}

/// So that the next test begins without devices: pools go after what lies on them.
impl Drop for Bed {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for _ in 0..2 {
            for info in thin::list_ours().unwrap_or_default() {
                for arguments in [["resume", "--", &info.name], ["remove", "--retry", &info.name]] {
                    let _ = std::process::Command::new("dmsetup").args(arguments).status();
                }
            }
        }
        self.loops.iter().for_each(|device| drop(loop_device::detach(device)));
    }
}

fn shown(path: &Path, size: u64) -> LoopDevice {
    File::create(path).unwrap().set_len(size).unwrap();
    loop_device::attach(path, LoopOptions::default()).unwrap()
}

fn id(number: u32) -> ThinId {
    ThinId::new(number).unwrap()
}

fn activate(pool: &KernelPool, number: u32) -> ThinDevice {
    let config = ThinConfig {
        holder: &uid(0x100 + number),
        id: id(number),
        size: Bytes::mib(8),
        origin: None,
        read_only: false,
    };
    ThinDevice::activate(pool, &config).unwrap()
}

fn write(device: &Path, byte: u8) {
    let file = OpenOptions::new().write(true).open(device).unwrap();
    file.write_all_at(&vec![byte; 65536], 0).unwrap();
    file.sync_all().unwrap();
}

pub fn read(device: &Path) -> u8 {
    let file = OpenOptions::new().read(true).custom_flags(nix::libc::O_DIRECT).open(device).unwrap();
    let mut buffer = vec![0; 8192];
    let start = buffer.as_ptr().align_offset(4096);
    file.read_exact_at(&mut buffer[start..start + 4096], 0).unwrap();
    buffer[start]
}

#[test]
fn with_a_supervisor_a_plugin_killed_in_a_suspension_leaves_nothing_suspended() {
    let stage = Stage::new();
    let Some(bed) = Bed::new(&stage, "with_a_supervisor_a_plugin_killed_in_a_suspension") else { return };
    let supervisor = stage.supervisor();
    let mut plugin = plugin::start(&stage, plugin::Deed::Snapshot);
    stage.next_suspension_kills(Some(plugin.id()));
    plugin::go(&stage);
    wait_until("it was killed", SOON, || stage.was_killed());
    let killed = Instant::now();
    assert_eq!(bed.read(SOON), 7);
    println!("the device answered {:?} after the plugin was killed", killed.elapsed());
    assert!(!bed.suspended() && plugin.0.wait().unwrap().code().is_none());
    // What it had asked for was done to its end, and asked for again it is told so.
    wait_until("the snapshot is there", SOON, || {
        let again = bed.pool.create_snap(id(2), id(1), &stage.client());
        matches!(again, Err(KernelPoolError::IdTaken { .. }))
    });
    write(&bed.device.path(), 9);
    supervisor.end();
    bed.end(&[2]);
}

#[test]
fn without_a_supervisor_the_next_start_resumes_it() {
    let stage = Stage::new();
    let Some(bed) = Bed::new(&stage, "without_a_supervisor_the_next_start_resumes_it") else { return };
    let mut plugin = plugin::start(&stage, plugin::Deed::SnapshotAlone);
    stage.next_suspension_kills(None);
    plugin::go(&stage);
    wait_until("it was killed", SOON, || stage.was_killed());
    plugin.0.wait().unwrap();
    assert!(bed.suspended(), "nobody is there to resume it");
    let pools = |data_plane| {
        let pools = Pools::new("n1".into(), stage.path("mnt"), stage.dir.path());
        pools.with_data_plane(data_plane).reopen_known().unwrap();
    };
    pools(DataPlane::supervised(&stage.socket()));
    assert!(bed.suspended(), "where there is a supervisor, only that may resume");
    let folder = stage.path("servers");
    pools(DataPlane::in_process(&folder, berth_node::supervisor::keeper::Watch::WhenAsked));
    assert!(!bed.suspended());
    assert_eq!(bed.read(SOON), 7);
    bed.pool.create_snap(id(2), id(1), &InProcess).unwrap();
    bed.end(&[2]);
}

#[test]
fn a_supervisor_killed_in_a_suspension_resumes_at_its_start_before_it_answers() {
    let stage = Stage::new();
    let Some(bed) = Bed::new(&stage, "a_supervisor_killed_in_a_suspension_resumes_at_its_start") else {
        return;
    };
    let mut first = stage.supervisor();
    stage.next_suspension_kills(None);
    let error = bed.pool.create_snap(id(2), id(1), &stage.client()).unwrap_err();
    let lost = matches!(error, KernelPoolError::Suspend(SuspendError::Unavailable { .. }));
    assert!(lost, "{error:?}");
    first.0.wait().unwrap();
    wait_until("it is known", SOON, || stage.was_killed());
    assert!(bed.suspended());
    let error = bed.device.resize(Bytes::mib(16), &stage.client()).unwrap_err();
    assert!(format!("{error:?}").contains("Unavailable"), "nothing is suspended here then: {error:?}");

    let second = stage.supervisor();
    assert!(!bed.suspended(), "before its first answer");
    assert_eq!(bed.read(SOON), 7);
    bed.pool.create_snap(id(2), id(1), &stage.client()).unwrap();
    bed.device.resize(Bytes::mib(16), &stage.client()).unwrap();
    assert_eq!(bed.device.size().unwrap(), Bytes::mib(16));
    let block = bed.pool.block();
    let config = KernelPoolConfig { pool: uid(1), class: Class::Volumes, block, when_full: WhenFull::Error };
    assert!(!bed.pool.table().unwrap().features.error_if_no_space);
    bed.pool.refresh(&config, &stage.client()).unwrap();
    assert!(bed.pool.table().unwrap().features.error_if_no_space);
    // One whose suspension took effect late.
    run("dmsetup", &["suspend", &bed.device.name().name()]);
    assert_eq!(bed.read(SOON), 7, "found and resumed");
    second.end();
    bed.device.clone().deactivate().unwrap();
    bed.end(&[2]);
}

#[test]
fn a_supervisor_that_is_told_to_end_in_a_suspension_ends_after_it() {
    let stage = Stage::new();
    let Some(bed) = Bed::new(&stage, "a_supervisor_that_is_told_to_end_in_a_suspension") else { return };
    let mut supervisor = stage.supervisor();
    fs::write(stage.path("signal"), "TERM").unwrap();
    fs::write(stage.path("pause"), "4").unwrap(); // longer than the program waits for nothing
    stage.next_suspension_kills(None);
    let _ = bed.pool.create_snap(id(2), id(1), &stage.client()); // whether the answer still comes does not matter
    assert!(supervisor.0.wait().unwrap().success(), "it ended by itself");
    assert!(stage.was_killed() && !bed.suspended());
    bed.end(&[2]);
}

#[test]
fn nothing_is_done_to_devices_of_others_nor_anything_but_what_is_known() {
    let stage = Stage::new();
    let test = "nothing_is_done_to_devices_of_others_nor_anything_but_what_is_known";
    let Some(bed) = Bed::new(&stage, test) else { return };
    let supervisor = stage.supervisor();
    for uuid in ["LVM-foreign", "BERTH-of-the-future"] {
        run("dmsetup", &["create", "foreign", "-u", uuid, "--table", "0 8 zero"]);
        let request = Request::ReplaceTable { device: uuid.to_owned(), table: "0 8 error".to_owned() };
        let answer = protocol::ask(&stage.socket(), &request);
        assert!(
            matches!(&answer, Answer::Failed(failure) if failure.kind == FailureKind::Refused),
            "{answer:?}"
        );
        assert!(run("dmsetup", &["table", "foreign"]).contains("zero"));
        run("dmsetup", &["remove", "--retry", "foreign"]);
    }
    let client = stage.client();
    let (device, pool) = (bed.device.name().clone(), bed.pool.name().clone());
    let absent = DeviceName::thin(&uid(1), Class::Volumes, &uid(99)).unwrap();
    let table = bed.device.table().unwrap();
    let message = |of, transaction| thin::PoolMessage::CreateSnap { id: id(5), of: id(of), transaction };
    let outcomes = [
        client.replace_table(&device, "0 16384 zero"),
        client.replace_table(&device, &format!("0 8 thin {} 1", table.pool)),
        client.replace_table(&device, &format!("0 16384 thin {} 2", table.pool)),
        client.replace_table(&pool, &table.to_string()),
        client.replace_table(&absent, &table.to_string()),
        client.message_while_frozen(&device, message(4, 0)),
        client.message_while_frozen(&device, message(1, 1)), // of a plugin that is gone by now
        client.message_while_frozen(&pool, message(1, 0)),
        client.message_while_frozen(&absent, message(1, 0)),
    ];
    for (n, outcome) in outcomes.into_iter().enumerate() {
        assert!(matches!(outcome, Err(SuspendError::Refused { .. })), "{n}: {outcome:?}");
    }
    let suspensions = fs::read_to_string(stage.path("suspensions")).unwrap_or_default();
    assert_eq!(suspensions, "", "nothing was ever suspended");
    supervisor.end();
    bed.end(&[]);
}

#[test]
fn an_origin_that_is_silent_is_told_before_anything_is_suspended() {
    let stage = Stage::new();
    let test = "an_origin_that_is_silent_is_told_before_anything_is_suspended";
    let Some(bed) = Bed::new(&stage, test) else { return };
    let supervisor = stage.supervisor();
    run("dmsetup", &["create", "origin", "--table", "0 16384 zero"]);
    bed.pool.create_thin(id(3)).unwrap();
    let origin = PathBuf::from("/dev/mapper/origin");
    let (holder, size) = (uid(0x103), Bytes::mib(8));
    let config = ThinConfig { holder: &holder, id: id(3), size, origin: Some(&origin), read_only: false };
    let device = ThinDevice::activate(&bed.pool, &config).unwrap();
    run("dmsetup", &["suspend", "origin"]);
    let started = Instant::now();
    let error = bed.pool.create_snap(id(4), id(3), &stage.client()).unwrap_err();
    let silent = matches!(error, KernelPoolError::Suspend(SuspendError::OriginSilent { .. }));
    assert!(silent, "{error:?}");
    println!("told after {:?}", started.elapsed());
    assert!(!stage.path("suspensions").exists(), "by our program");
    run("dmsetup", &["resume", "origin"]);
    bed.pool.create_snap(id(4), id(3), &stage.client()).unwrap();
    device.deactivate().unwrap();
    run("dmsetup", &["remove", "--retry", "origin"]);
    supervisor.end();
    bed.end(&[]);
}
