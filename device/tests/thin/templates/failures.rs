//! What goes wrong with source, destination and metadata.

use berth_core::hydration::{CloneMode, Metadata};
use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_device::thin::{
    self, CloneConfig, InProcess, TemplateDevice, TemplateError, ThinConfig, ThinDevice,
};

use super::{
    Bed, Bench, CHUNK, POOL, TEMPLATE, assert_is, chunks, geometry, holder, hydrate, id, is_hole, progress,
    read, replace, run, uid, write,
};
use crate::assert_none_suspended;

const MIB: usize = 1 << 20;

#[test]
fn a_source_that_fails_marks_nothing_as_local() {
    let test = "a_source_that_fails_marks_nothing_as_local";
    let Some(bench) = Bench::new(test) else { return };
    let Some(bed) = Bed::new(&bench, test, 4 * MIB + 512) else { return };
    let template = bed.show(true);
    let volume = bed.volume(&template, 1, Bytes::ZERO);
    let writer = template.writer().unwrap();
    hydrate(&writer, &bed.image, 0).unwrap();
    let before = progress(&template);
    bed.source.break_down();
    let is_io_error =
        |result: std::io::Result<()>| result.unwrap_err().raw_os_error() == Some(nix::libc::EIO);
    assert!(is_io_error(read(&volume.path(), MIB, CHUNK).map(drop)), "what is not local");
    assert!(is_io_error(write(&volume.path(), MIB, &[1; 512])), "nor a part of a block of it");
    assert!(is_io_error(write(&template.path(), 2 * MIB, &[1; 512])));
    let last = *chunks(&bed.image).last().unwrap();
    let error = hydrate(&writer, &bed.image, last).unwrap_err();
    assert!(matches!(error, TemplateError::Write { .. }), "the rest of the last region: {error}");
    assert_eq!(progress(&template), before);
    assert_is(&volume.path(), &bed.image[..CHUNK], "what is local is read");
    // Chunks that came another way need no source.
    for chunk in 1..last {
        hydrate(&writer, &bed.image, chunk).unwrap();
    }
    assert_is(&volume.path(), &bed.image[..last * CHUNK], "without a source");
    assert!(matches!(template.confirm_local(), Err(TemplateError::Incomplete { .. })));
    bed.source.heal();
    hydrate(&writer, &bed.image, last).unwrap();
    drop(writer);
    template.confirm_local().unwrap();
    bed.source.break_down(); // nor does the end, as long as nobody waits for it
    template.make_local(&InProcess).unwrap();
    assert_none_suspended();
    assert_is(&volume.path(), &bed.image, "all of it");
    volume.deactivate().unwrap();
    bed.end();
}

/// A template whose metadata lies on a device of the test's own.
fn over_own_metadata(bed: &Bed, new: bool) -> Result<TemplateDevice, TemplateError> {
    TemplateDevice::show_clone(&CloneConfig {
        pool: &uid(POOL),
        holder: &holder(TEMPLATE),
        geometry: bed.geometry(),
        destination: &bed.destination.path(),
        metadata: std::path::Path::new("/dev/mapper/berth-test-metadata"),
        source: &bed.source.path,
        metadata_is_new: new,
    })
}

#[test]
fn metadata_that_cannot_be_written_or_read_is_told_apart_and_nothing_is_invented() {
    let test = "metadata_that_cannot_be_written_or_read_is_told_apart_and_nothing_is_invented";
    let Some(bench) = Bench::new(test) else { return };
    let Some(bed) = Bed::new(&bench, test, 4 * MIB) else { return };
    let sectors = bed.geometry().metadata().0 / 512;
    let below = bed.metadata.path();
    let works = format!("0 {sectors} linear {} 0", below.display());
    let broken = [
        (format!("0 {sectors} flakey {} 0 0 600 1 error_writes", below.display()), CloneMode::ReadOnly),
        (format!("0 {sectors} error"), CloneMode::Failed),
    ];
    run("dmsetup", &["create", "berth-test-metadata", "--table", &works]);
    let mut new = true;
    for (broken, mode) in broken {
        let template = over_own_metadata(&bed, new).unwrap();
        new = false;
        let writer = template.writer().unwrap();
        hydrate(&writer, &bed.image, 0).unwrap();
        writer.flush().unwrap();
        let durable = progress(&template);
        replace("berth-test-metadata", &broken);
        // What is written is there, and what is not recorded is not promised.
        let _ = hydrate(&writer, &bed.image, 1);
        let error = writer.flush().unwrap_err();
        assert!(matches!(&error, TemplateError::Stopped { mode: found, .. } if *found == mode), "{error}");
        assert_eq!(error.reason(), Reason::NeedsCheck);
        let status = template.status().unwrap();
        assert_eq!(status.mode(), mode);
        if mode == CloneMode::Failed {
            assert!(read(&template.path(), 0, 512).is_err(), "it reads nothing");
        } else {
            assert_eq!(status.progress(), Some(durable));
            assert_is(&template.path(), &bed.image, "it reads on");
            assert!(hydrate(&writer, &bed.image, 2).is_err());
            let hole = chunks(&bed.image).into_iter().find(|chunk| is_hole(*chunk)).unwrap();
            hydrate(&writer, &bed.image, hole).expect("the kernel says nothing");
            assert_eq!(progress(&template), durable, "but does nothing");
        }
        assert!(template.make_local(&InProcess).is_err());
        drop(writer);
        // Somebody has mended it: it goes on from what was durable.
        template.hide().unwrap();
        replace("berth-test-metadata", &works);
        let template = over_own_metadata(&bed, false).unwrap();
        assert_eq!(progress(&template), durable);
        assert_is(&template.path(), &bed.image, "after all");
        template.hide().unwrap();
    }
    run("dmsetup", &["remove", "--retry", "berth-test-metadata"]);
    bed.end();
}

#[test]
fn nothing_is_shown_over_what_does_not_belong_together() {
    let test = "nothing_is_shown_over_what_does_not_belong_together";
    let Some(bench) = Bench::new(test) else { return };
    let Some(bed) = Bed::new(&bench, test, 4 * MIB) else { return };
    let (pool, one, two) = (uid(POOL), holder(TEMPLATE), holder(2));
    let (destination, metadata, source) =
        (bed.destination.path(), bed.metadata.path(), bed.source.path.clone());
    let good = CloneConfig {
        pool: &pool,
        holder: &one,
        geometry: bed.geometry(),
        destination: &destination,
        metadata: &metadata,
        source: &source,
        metadata_is_new: false,
    };
    let refused = |config: CloneConfig<'_>| TemplateDevice::show_clone(&config).unwrap_err();
    let nowhere = std::path::Path::new("/dev/mapper/berth-nowhere");
    for (config, missing) in [
        (CloneConfig { destination: nowhere, ..good }, "destination"),
        (CloneConfig { source: nowhere, ..good }, "source"),
        (CloneConfig { metadata: nowhere, ..good }, "metadata"),
    ] {
        let error = refused(config);
        assert!(matches!(&error, TemplateError::Missing { part, .. } if *part == missing), "{error}");
    }
    for size in [4 * MIB - 512, 4 * MIB + 512] {
        let error = refused(CloneConfig { geometry: geometry(size), ..good });
        assert!(matches!(error, TemplateError::OtherSize { part: "destination", .. }), "{error}");
        assert_eq!(error.reason(), Reason::AlreadyDifferent);
    }
    let error = refused(CloneConfig { source: &metadata, ..good });
    assert!(matches!(error, TemplateError::OtherSize { part: "source", .. }), "{error}");

    // Metadata that is too small, of somebody else, of another template.
    bed.images.create_thin(id(20)).unwrap();
    let small = ThinDevice::activate_clone_metadata(&bed.images, &two, id(20), Bytes::kib(64)).unwrap();
    let error = refused(CloneConfig { metadata: &small.path(), ..good });
    assert!(matches!(error, TemplateError::MetadataTooSmall { .. }), "{error}");
    small.deactivate().unwrap();
    write(&metadata, 0, &[7; 4096]).unwrap();
    let error = refused(good);
    assert!(matches!(error, TemplateError::ForeignMetadata { .. }), "{error}");
    assert_eq!(read(&metadata, 0, 4096).unwrap(), [7; 4096], "nothing was written");
    let template = TemplateDevice::show_clone(&CloneConfig { metadata_is_new: true, ..good }).unwrap();
    let in_use = thin::clear_metadata(&metadata).unwrap_err();
    assert!(in_use.to_string().ends_with(&format!("part of {}", template.name())), "{in_use}");
    other_regions_are_not_believed(&bed, good);
    template.hide().unwrap();
    bed.end();
}

/// The metadata of one template is never taken for that of another.
fn other_regions_are_not_believed(bed: &Bed, good: CloneConfig<'_>) {
    let other = holder(3);
    let size = Bytes::mib(8);
    bed.images.create_thin(id(21)).unwrap();
    let thin = ThinConfig { holder: &other, id: id(21), size, origin: None, read_only: false };
    let larger = ThinDevice::activate(&bed.images, &thin).unwrap();
    let found = thin::find_metadata(good.metadata).unwrap().unwrap();
    assert_eq!(found.of(&good.geometry), Metadata::OfThis);
    assert_eq!(found.of(&geometry(8 * MIB)), Metadata::OfOther);
    let error = TemplateDevice::show_clone(&CloneConfig {
        holder: &other,
        geometry: geometry(8 * MIB),
        destination: &larger.path(),
        source: &larger.path(),
        ..good
    })
    .unwrap_err();
    assert!(matches!(error, TemplateError::ForeignMetadata { .. }), "{error}");
    larger.deactivate().unwrap();
}
