//! Disks of guests, shown to the host in every way that Berth shows them.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_core::ids::Uid;
use berth_core::ledger::Class;
use berth_core::thin::BlockSize;
use berth_core::units::Bytes;
use berth_device::loop_device::{self, LoopDevice, LoopOptions};
use berth_device::nbd::{
    AttachConfig, Attachment, BackendId, Nbd, NbdServer, ServedFormat, ServerConfig, Slots,
};
use berth_device::qemu::SourceDriver;
use berth_device::thin::{
    KernelPool, KernelPoolConfig, ThinConfig, ThinDevice, ThinDeviceError, ThinId, VolumeGroup, WhenFull,
    WipeConsent,
};

use super::{GROUP, GUESTS_FILESYSTEM, GUESTS_LABEL, ROOT, run, text};

const SIZE: Bytes = Bytes::mib(32);
const POOL: &str = "0f3c9a1e-5b7d-4c2a-9e10-00a1b2c3d4e5";
const SOON: Duration = Duration::from_secs(30);
/// Where the first partition begins.
const PARTITION: u64 = 1 << 20;

/// A volume group, an array's member, a file system, and one in a partition; each on a disk of its own.
type Make = fn(&Path);
const DISKS: [(&str, Make); 4] =
    [("group", volume_group), ("member", member), ("root", root), ("table", table)];

/// A template behind NBD, its server, and a clone of it: none if the host was faster and has made something of the template.
struct Shown {
    server: NbdServer,
    attachment: Attachment,
    clone: Option<ThinDevice>,
}

/// What guests have made of their disks, before the host sees any of it.
pub struct Images {
    paths: [PathBuf; 4],
    dir: tempfile::TempDir,
}

impl Images {
    pub fn make() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        Self { paths: DISKS.map(|(name, make)| image(dir.path(), name, make)), dir }
    }
}

/// Every disk, as a template and as a clone; one also as a volume of its own, and as a loop device over that.
pub struct Disks {
    nbd: Nbd,
    slots: Slots,
    group: VolumeGroup,
    pool: KernelPool,
    shown: Vec<Shown>,
    copy: ThinDevice,
    part: LoopDevice,
    _images: Images,
}

impl Disks {
    pub fn show(disk: &Path, images: Images) -> Self {
        let devices = [disk.to_owned()];
        let consent = WipeConsent::for_devices(devices.clone());
        let group = VolumeGroup::create("berth-0f3c9a1e-pool", &Uid::from(POOL), &devices, Some(&consent));
        let group = group.unwrap();
        KernelPool::provision(&config(), &group, Bytes::mib(256), Bytes::mib(4)).unwrap();
        let pool = KernelPool::open(&config(), &group).unwrap();
        // The first block of the volume that holds the data of the pool becomes that of the guest's root file system.
        let copy = volume(&pool, 1, None).unwrap();
        io::copy(
            &mut File::open(images.dir.path().join("root.raw")).unwrap(),
            &mut File::options().write(true).open(copy.path()).unwrap(),
        )
        .unwrap();
        File::open(copy.path()).unwrap().sync_all().unwrap();
        let options = LoopOptions { read_only: true, ..LoopOptions::default() };
        let part = loop_device::attach(&copy.path(), options).unwrap();
        let (mut nbd, mut slots) = (Nbd::open().unwrap(), Slots::default());
        let mut shown = Vec::new();
        for (n, image) in (2..).zip(&images.paths) {
            shown.push(Shown::start(&mut nbd, &mut slots, &pool, n, image, images.dir.path()));
        }
        Self { nbd, slots, group, pool, shown, copy, part, _images: images }
    }

    /// True if a clone was made of each template.
    pub fn all_are_cloned(&self) -> bool {
        self.shown.iter().all(|shown| shown.clone.is_some())
    }

    pub fn hide(mut self) {
        run("udevadm", &["settle", "--timeout=60"]);
        loop_device::detach(&self.part).unwrap();
        for shown in self.shown {
            if let Some(clone) = shown.clone {
                clone.deactivate().unwrap();
            }
            shown.attachment.detach(&mut self.nbd, &mut self.slots).unwrap();
            shown.server.stop().unwrap();
        }
        self.copy.deactivate().unwrap();
        self.pool.close(&self.group).unwrap();
        KernelPool::destroy(&config(), &self.group).unwrap();
        self.group.remove().unwrap();
    }
}

impl Shown {
    fn start(nbd: &mut Nbd, slots: &mut Slots, pool: &KernelPool, n: u32, image: &Path, dir: &Path) -> Self {
        let format = ServedFormat::Image(SourceDriver::Qcow2);
        let folder = dir.join(format!("server-{n}"));
        let server = ServerConfig {
            image,
            format,
            folder: &folder,
            user: 65534,
            connections: 20,
            group: None,
            limit: SOON,
        };
        let server = NbdServer::start(&server).unwrap();
        let id = BackendId::new(&uid(n)).unwrap();
        let attach = AttachConfig {
            id: &id,
            socket: server.socket(),
            size: SIZE,
            dead_connection: Duration::from_secs(60),
            limit: SOON,
        };
        let attachment = Attachment::attach(nbd, slots, &attach).unwrap();
        run("udevadm", &["settle", "--timeout=60"]); // the host has all the time it needs
        let clone = volume(pool, n, Some(&attachment.path())).ok();
        Self { server, attachment, clone }
    }
}

fn volume(pool: &KernelPool, n: u32, origin: Option<&Path>) -> Result<ThinDevice, ThinDeviceError> {
    let (holder, id) = (uid(n), ThinId::new(n).unwrap());
    pool.create_thin(id).unwrap();
    let thin = ThinConfig { holder: &holder, id, size: SIZE, origin, read_only: false };
    ThinDevice::activate(pool, &thin)
}

fn config() -> KernelPoolConfig {
    KernelPoolConfig {
        pool: Uid::from(POOL),
        class: Class::Volumes,
        block: BlockSize::DEFAULT,
        when_full: WhenFull::Queue,
    }
}

fn uid(n: u32) -> Uid {
    Uid::from(format!("{n:08x}-1111-4222-8333-444455556666"))
}

/// An image of a disk that a guest has made, as qcow2.
fn image(dir: &Path, name: &str, make: Make) -> PathBuf {
    let (raw, image) = (dir.join(format!("{name}.raw")), dir.join(format!("{name}.qcow2")));
    File::create(&raw).unwrap().set_len(SIZE.0).unwrap();
    make(&raw);
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&image)]);
    image
}

/// What a guest does with its disk, while no udev of the host runs.
fn in_the_guest(raw: &Path, what: impl FnOnce(&str)) {
    let disk = loop_device::attach(raw, LoopOptions::default()).unwrap();
    what(text(&disk.path));
    loop_device::detach(&disk).unwrap();
}

/// A volume group with the name of the host's, and a volume in it.
fn volume_group(raw: &Path) {
    in_the_guest(raw, |disk| {
        let lvm = |words: &[&str]| run("lvm", &[words, &["--devices", disk]].concat());
        lvm(&["vgcreate", "--yes", GROUP, disk]);
        lvm(&["lvcreate", "--yes", "-an", "-Wn", "-Zn", "-n", "theirs", "-L", "8m", GROUP]);
    });
}

/// One half of a mirror.
fn member(raw: &Path) {
    in_the_guest(raw, |disk| {
        let new = ["--create", "/dev/md/guest", "--run", "--level=1", "--raid-devices=2", "--metadata=1.2"];
        run("mdadm", &[&new[..], &["--homehost=any", disk, "missing"]].concat());
        run("mdadm", &["--stop", "/dev/md/guest"]);
    });
}

/// The UUID of the host's root file system, on the whole disk.
fn root(raw: &Path) {
    run("mkfs.ext4", &["-q", "-F", "-U", ROOT, "-L", GUESTS_LABEL, text(raw)]);
}

/// A file system in a partition.
fn table(raw: &Path) {
    let script = raw.with_extension("sfdisk");
    fs::write(&script, "label: gpt\nstart=1MiB, size=16MiB\n").unwrap();
    let command = format!("sfdisk -q {} < {}", text(raw), text(&script));
    run("sh", &["-c", &command]);
    let part = raw.with_extension("part");
    File::create(&part).unwrap().set_len(16 << 20).unwrap();
    run("mkfs.ext4", &["-q", "-F", "-U", GUESTS_FILESYSTEM, text(&part)]);
    File::options()
        .write(true)
        .open(raw)
        .unwrap()
        .write_all_at(&fs::read(&part).unwrap(), PARTITION)
        .unwrap();
}
