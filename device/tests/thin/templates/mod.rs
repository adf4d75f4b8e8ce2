//! Templates that become local while volumes read and write over them.

mod failures;
mod killed;
mod power;
mod swap;
mod writes;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use berth_core::hydration::{Geometry, Progress, RegionSize, Span};
use berth_core::ledger::Class;
use berth_core::units::Bytes;
use berth_device::find_program;
use berth_device::thin::{
    self, CloneConfig, DirectBuffer, KernelPool, TemplateDevice, ThinConfig, ThinDevice, VolumeGroup,
    WhenFull,
};

use super::{Bench, POOL, config, end_pool, holder, id, open_pool, run, uid};

/// The size of a chunk, and of a region.
const CHUNK: usize = 256 << 10;
const REGION: u64 = 64 << 10;
/// The device that everything comes from: a delay over a file.
const SOURCE: &str = "berth-test-source";

/// None of the numbers here has to be good, only the same each time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = usize::try_from(self.roll(last as u64 + 1)).unwrap();
            items.swap(last, other);
        }
    }
}

/// True for a chunk that is a hole.
fn is_hole(chunk: usize) -> bool {
    chunk % 5 == 3
}

/// An image whose every sector says where it is; some chunks are holes.
fn image(size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    for (sector, content) in bytes.chunks_mut(512).enumerate() {
        if !is_hole(sector * 512 / CHUNK) {
            let mut dice = Dice(sector as u64 + 0x9E37_79B9_7F4A_7C15);
            content.chunks_mut(8).for_each(|word| word.copy_from_slice(&dice.roll(u64::MAX).to_le_bytes()));
        }
    }
    bytes
}

/// A source that takes its time, and tells how much was read of it.
struct Source {
    file: PathBuf,
    path: PathBuf,
    loop_device: String,
    _dir: tempfile::TempDir,
}

impl Source {
    fn new(content: &[u8], milliseconds: u32) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let file = dir.path().join("image.raw");
        fs::write(&file, content).unwrap();
        let loop_device = run("losetup", &["--find", "--show", file.to_str().unwrap()]).trim().to_owned();
        let source = Self { file, path: PathBuf::from("/dev/mapper").join(SOURCE), loop_device, _dir: dir };
        run("dmsetup", &["create", SOURCE, "--table", &source.table(milliseconds)]);
        source
    }

    fn table(&self, milliseconds: u32) -> String {
        let sectors = fs::metadata(&self.file).unwrap().len() / 512;
        format!("0 {sectors} delay {} 0 {milliseconds}", self.loop_device)
    }

    /// Every read fails from now on.
    fn break_down(&self) {
        let sectors = fs::metadata(&self.file).unwrap().len() / 512;
        replace(SOURCE, &format!("0 {sectors} error"));
    }

    fn heal(&self) {
        replace(SOURCE, &self.table(1));
    }

    /// Sectors read so far, counted by the kernel.
    fn sectors_read(&self) -> u64 {
        let number = thin::DeviceNumber::of(&self.path).unwrap();
        let stat = fs::read_to_string(format!("/sys/dev/block/{number}/stat")).unwrap();
        stat.split_whitespace().nth(2).unwrap().parse().unwrap()
    }

    fn end(self) {
        run("dmsetup", &["remove", "--retry", SOURCE]);
        run("losetup", &["--detach", &self.loop_device]);
    }
}

/// Gives a device that is not ours another table.
fn replace(name: &str, table: &str) {
    run("dmsetup", &["load", name, "--table", table]);
    run("dmsetup", &["suspend", "--noflush", "--nolockfs", name]);
    run("dmsetup", &["resume", name]);
}

/// A template in the kernel pool `images`, and a kernel pool for volumes over it.
struct Bed {
    group: VolumeGroup,
    images: KernelPool,
    volumes: KernelPool,
    destination: ThinDevice,
    metadata: ThinDevice,
    source: Source,
    image: Vec<u8>,
}

const TEMPLATE: u32 = 1;

impl Bed {
    /// `None`, with the reason printed, where this machine cannot run the test.
    fn new(bench: &Bench, test: &str, size: usize) -> Option<Self> {
        let mut missing = thin::missing_for_templates();
        if !missing.is_empty() && find_program("modprobe").is_some_and(|modprobe| load_module(&modprobe)) {
            missing = thin::missing_for_templates();
        }
        if !missing.is_empty() {
            println!("SKIPPED {test}: {}", missing.join("; "));
            return None;
        }
        forget_failed();
        let group = bench.group();
        let images = open_pool(&group, Class::Images, Bytes::mib(96));
        let volumes = open_pool(&group, Class::Volumes, Bytes::mib(96));
        images.create_thin(id(1)).unwrap();
        images.create_thin(id(2)).unwrap();
        let (destination, metadata) = thin_devices(&images, size);
        let image = image(size);
        let source = Source::new(&image, 1);
        Some(Self { group, images, volumes, destination, metadata, source, image })
    }

    fn geometry(&self) -> Geometry {
        geometry(self.image.len())
    }

    fn show(&self, metadata_is_new: bool) -> TemplateDevice {
        self.try_show(metadata_is_new).unwrap()
    }

    fn try_show(&self, metadata_is_new: bool) -> Result<TemplateDevice, thin::TemplateError> {
        let (pool, holder) = (uid(POOL), holder(TEMPLATE));
        let (destination, metadata, source) =
            (self.destination.path(), self.metadata.path(), self.source.path.clone());
        TemplateDevice::show_clone(&CloneConfig {
            pool: &pool,
            holder: &holder,
            geometry: self.geometry(),
            destination: &destination,
            metadata: &metadata,
            source: &source,
            metadata_is_new,
        })
    }

    /// A volume over the template; longer than it by `more`.
    fn volume(&self, template: &TemplateDevice, number: u32, more: Bytes) -> ThinDevice {
        self.volumes.create_thin(id(number)).unwrap();
        let (holder, origin) = (holder(100 + number), template.path());
        let size = Bytes(self.image.len() as u64).saturating_add(more);
        let thin =
            ThinConfig { holder: &holder, id: id(number), size, origin: Some(&origin), read_only: false };
        ThinDevice::activate(&self.volumes, &thin).unwrap()
    }

    /// Takes everything down. Nothing may lie on the template any more.
    fn end(self) {
        if let Some(template) = TemplateDevice::find(&uid(POOL), &holder(TEMPLATE)).unwrap() {
            template.hide().unwrap();
        }
        self.source.end();
        self.metadata.deactivate().unwrap();
        self.destination.deactivate().unwrap();
        end_pool(self.volumes, &self.group, &config(Class::Volumes, WhenFull::Queue));
        end_pool(self.images, &self.group, &config(Class::Images, WhenFull::Queue));
        self.group.remove().unwrap();
    }
}

fn progress(template: &TemplateDevice) -> Progress {
    template.status().unwrap().progress().unwrap_or_else(|| panic!("{} has failed", template.name()))
}

/// Removes what a test that failed has left of its own.
fn forget_failed() {
    let left = ["berth-test-zeros", "berth-test-metadata", SOURCE];
    for name in left.into_iter().filter(|name| Path::new("/dev/mapper").join(name).exists()) {
        run("dmsetup", &["remove", "--retry", name]);
    }
}

fn load_module(modprobe: &Path) -> bool {
    std::process::Command::new(modprobe).arg("dm-clone").status().is_ok_and(|status| status.success())
}

fn geometry(size: usize) -> Geometry {
    Geometry::new(Bytes(size as u64), RegionSize::new(Bytes(REGION)).unwrap()).unwrap()
}

/// Destination and metadata of the template.
fn thin_devices(images: &KernelPool, size: usize) -> (ThinDevice, ThinDevice) {
    let one = holder(TEMPLATE);
    let size_of_image = Bytes(size as u64);
    let thin = ThinConfig { holder: &one, id: id(1), size: size_of_image, origin: None, read_only: false };
    let destination = ThinDevice::activate(images, &thin).unwrap();
    let metadata =
        ThinDevice::activate_clone_metadata(images, &one, id(2), geometry(size).metadata()).unwrap();
    (destination, metadata)
}

/// Where a chunk lies.
fn span(image: &[u8], chunk: usize) -> Span {
    let start = chunk * CHUNK;
    let length = CHUNK.min(image.len() - start);
    Span { offset: Bytes(start as u64), length: Bytes(length as u64) }
}

/// Makes one chunk local, as the program does that has fetched it.
fn hydrate(writer: &thin::TemplateWriter, image: &[u8], chunk: usize) -> Result<(), thin::TemplateError> {
    let span = span(image, chunk);
    if is_hole(chunk) {
        return writer.discard(span);
    }
    let length = usize::try_from(span.length.0).unwrap();
    let mut buffer = DirectBuffer::new(CHUNK);
    buffer[..length].copy_from_slice(&image[chunk * CHUNK..chunk * CHUNK + length]);
    writer.write(span.offset, &buffer, length)
}

fn chunks(image: &[u8]) -> Vec<usize> {
    (0..image.len().div_ceil(CHUNK)).collect()
}

/// Reads past memory. `offset` and `length` are multiples of 512.
fn read(device: &Path, offset: usize, length: usize) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new().read(true).custom_flags(nix::libc::O_DIRECT).open(device)?;
    let mut buffer = DirectBuffer::new(length);
    file.read_exact_at(&mut buffer, offset as u64)?;
    Ok(buffer.to_vec())
}

/// Writes past memory.
fn write(device: &Path, offset: usize, bytes: &[u8]) -> io::Result<()> {
    let file = OpenOptions::new().write(true).custom_flags(nix::libc::O_DIRECT).open(device)?;
    let mut buffer = DirectBuffer::new(bytes.len());
    buffer.copy_from_slice(bytes);
    file.write_all_at(&buffer, offset as u64)
}

/// Compares the beginning of a device with what it should be.
fn assert_is(device: &Path, expected: &[u8], when: &str) {
    for (number, expected) in expected.chunks(1 << 20).enumerate() {
        let found = read(device, number << 20, expected.len()).unwrap();
        let differs = found.iter().zip(expected).position(|(found, expected)| found != expected);
        let at = differs.map(|at| (number << 20) + at);
        assert_eq!(at, None, "{when}: {} differs", device.display());
    }
}

/// What is behind the template's end of a longer volume.
fn assert_zeros_behind(device: &Path, size: usize) {
    let length = usize::try_from(File::open(device).and_then(size_of).unwrap()).unwrap();
    let found = read(device, size, length - size).unwrap();
    assert!(found.iter().all(|byte| *byte == 0), "behind the template's end");
}

fn size_of(mut file: File) -> io::Result<u64> {
    use std::io::{Seek as _, SeekFrom};
    file.seek(SeekFrom::End(0))
}
