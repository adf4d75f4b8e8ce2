//! The power goes while a template becomes local.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use berth_core::ledger::Class;
use berth_core::units::Bytes;
use berth_device::thin::{
    self, CloneConfig, InProcess, KernelPool, KernelPoolError, TemplateDevice, VolumeGroup, WhenFull,
    WipeConsent,
};

use super::{
    Dice, POOL, Source, TEMPLATE, assert_is, chunks, config, end_pool, geometry, holder, hydrate, id, image,
    load_module, open_pool, progress, thin_devices, uid,
};
use crate::{GROUP, disks};

const MIB: usize = 1 << 20;
const SIZE: usize = 24 * MIB + 20 * 1024;
/// Names the folder that survives a power cut, for the program whose power is cut.
const PLAY: &str = "BERTH_TEST_PLAY_TEMPLATE";
/// How many chunks become local between two flushes.
const WINDOW: usize = 4;

/// Makes a template local and takes it all away. Run again after a power cut, it goes on: everything reads as it should, and
/// what was flushed is still local. By itself it does nothing.
#[test]
fn play() {
    let Some(share) = std::env::var_os(PLAY).map(PathBuf::from) else { return };
    assert!(
        thin::missing_for_templates().is_empty()
            || load_module(&berth_device::find_program("modprobe").unwrap())
    );
    let [_, disk] = disks().expect("two disks to wipe");
    let (group, images) = pool(&disk);
    let (destination, metadata) = thin_devices(&images, SIZE);
    let content = image(SIZE);
    let source = Source::new(&content, 1);
    let template = TemplateDevice::show_clone(&CloneConfig {
        pool: &uid(POOL),
        holder: &holder(TEMPLATE),
        geometry: geometry(SIZE),
        destination: &destination.path(),
        metadata: &metadata.path(),
        source: &source.path,
        metadata_is_new: false,
    })
    .unwrap();
    let (kept, found) = (acknowledged(&share), progress(&template).hydrated);
    println!("{kept} regions were flushed, {found} are local");
    assert!(found >= kept);
    assert_is(&template.path(), &content, "after a power cut");
    let writer = template.writer().unwrap();
    let mut order = chunks(&content);
    Dice(found + 1).shuffle(&mut order);
    for window in order.chunks(WINDOW) {
        for chunk in window {
            hydrate(&writer, &content, *chunk).unwrap();
            thread::sleep(Duration::from_millis(50)); // as long as a chunk takes to come
        }
        writer.flush().unwrap();
        acknowledge(&share, progress(&template).hydrated);
    }
    drop(writer);
    template.confirm_local().unwrap();
    template.make_local(&InProcess).unwrap();
    assert_is(&template.path(), &content, "all is local");
    template.hide().unwrap();
    source.end();
    metadata.deactivate().unwrap();
    destination.deactivate().unwrap();
    end_pool(images, &group, &config(Class::Images, WhenFull::Queue));
    group.remove().unwrap();
}

/// The kernel pool with both thin devices, as far as it is not there.
fn pool(disk: &Path) -> (VolumeGroup, KernelPool) {
    let devices = [disk.to_owned()];
    let group = VolumeGroup::open_own(GROUP, &uid(POOL), &devices).unwrap_or_else(|_| {
        let consent = WipeConsent::for_devices(devices.clone());
        VolumeGroup::create(GROUP, &uid(POOL), &devices, Some(&consent)).unwrap()
    });
    let images = open_pool(&group, Class::Images, Bytes::mib(96));
    for number in [1, 2] {
        match images.create_thin(id(number)) {
            Ok(()) | Err(KernelPoolError::IdTaken { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    (group, images)
}

fn acknowledge(share: &Path, regions: u64) {
    let mut file = File::create(share.join("regions.new")).unwrap();
    write!(file, "{regions}").unwrap();
    file.sync_all().unwrap();
    fs::rename(share.join("regions.new"), share.join("regions")).unwrap();
}

fn acknowledged(share: &Path) -> u64 {
    fs::read_to_string(share.join("regions")).map_or(0, |text| text.parse().unwrap())
}
