//! What makes regions local, and what of the source is read for it.

use berth_core::hydration::{Progress, RegionSize, Shown, Span};
use berth_core::units::Bytes;
use berth_device::thin::{
    self, CloneStatus, DirectBuffer, FoundMetadata, TemplateDevice, TemplateError, ThinConfig, ThinDevice,
};

use super::{
    Bed, Bench, CHUNK, Dice, POOL, REGION, TEMPLATE, assert_is, chunks, holder, hydrate, id, progress, read,
    run, uid, write,
};

const MIB: usize = 1 << 20;

#[test]
fn chunks_written_through_read_nothing_of_the_source() {
    let test = "chunks_written_through_read_nothing_of_the_source";
    let Some(bench) = Bench::new(test) else { return };
    // Once with a last region that is whole, and once with one that is shorter, in a hole: the kernel completes it itself.
    for (size, completed) in [(8 * MIB, 0), (33 * CHUNK + 20 * 1024, 40)] {
        let Some(bed) = Bed::new(&bench, test, size) else { return };
        let template = bed.show(true);
        assert_eq!(progress(&template), Progress { hydrated: 0, total: bed.geometry().regions() });
        let (writer, before) = (template.writer().unwrap(), bed.source.sectors_read());
        let mut order = chunks(&bed.image);
        Dice(7).shuffle(&mut order);
        for (done, chunk) in order.iter().enumerate() {
            hydrate(&writer, &bed.image, *chunk).unwrap();
            hydrate(&writer, &bed.image, *chunk).expect("it may be repeated");
            assert!(progress(&template).hydrated > done as u64, "chunk {chunk}");
        }
        assert_eq!(bed.source.sectors_read() - before, completed, "sectors of the source");
        assert!(progress(&template).is_complete());
        writer.flush().unwrap();
        template.confirm_local().unwrap();
        assert_is(&template.path(), &bed.image, "all is local");
        assert_eq!(bed.source.sectors_read() - before, completed, "nor for reading what is local");
        let holes = chunks(&bed.image).into_iter().filter(|chunk| super::is_hole(*chunk));
        let holes: u64 = holes.map(|chunk| super::span(&bed.image, chunk).length.0).sum();
        let mapped = bed.destination.mapped().unwrap().unwrap();
        assert!(mapped <= Bytes(bed.image.len() as u64 - holes + REGION), "holes take no space: {mapped}");
        drop(writer);
        bed.end();
    }
}

#[test]
fn a_chunk_of_any_size_is_whole_regions_for_the_kernel() {
    let test = "a_chunk_of_any_size_is_whole_regions_for_the_kernel";
    let Some(bench) = Bench::new(test) else { return };
    let Some(bed) = Bed::new(&bench, test, 16 * MIB) else { return };
    let devices = [bed.destination.path(), bed.source.path.clone()];
    let longest = thin::longest_request(&[&devices[0], &devices[1]]).unwrap();
    assert!(longest >= Bytes(REGION), "{longest}");
    let template = bed.show(true);
    let writer = template.writer().unwrap();
    // Pages that lie apart in memory, but for the first ones: the kernel's requests end where it likes.
    let mut buffer = DirectBuffer::new(16 * MIB);
    let mut pages: Vec<_> = (3..16 * MIB / 4096).collect();
    Dice(5).shuffle(&mut pages);
    for page in (0..3).chain(pages) {
        let range = page * 4096..(page + 1) * 4096;
        buffer[range.clone()].copy_from_slice(&bed.image[range]);
    }
    let before = bed.source.sectors_read();
    writer.write(Bytes::ZERO, &buffer, 16 * MIB).unwrap();
    assert_eq!(bed.source.sectors_read() - before, 0, "sectors of the source");
    drop(writer);
    template.confirm_local().unwrap();
    assert_is(&template.path(), &bed.image, "written at once");
    bed.end();
}

#[test]
fn a_part_of_a_region_never_counts_as_the_whole() {
    let test = "a_part_of_a_region_never_counts_as_the_whole";
    let Some(bench) = Bench::new(test) else { return };
    let Some(bed) = Bed::new(&bench, test, 2 * MIB + 512) else { return };
    let template = bed.show(true);
    let writer = template.writer().unwrap();
    let buffer = DirectBuffer::new(CHUNK);
    for (offset, length) in [(512, 65_536), (0, 512), (0, 65_536 + 512), (4096, 61_440), (2 * MIB, 1024)] {
        let error = writer.write(Bytes(offset as u64), &buffer, length).unwrap_err();
        assert!(matches!(error, TemplateError::Span { .. }), "{error}");
        let span = Span { offset: Bytes(offset as u64), length: Bytes(length as u64) };
        assert!(matches!(writer.discard(span), Err(TemplateError::Span { .. })));
    }
    assert_eq!(progress(&template).hydrated, 0);
    // Whoever writes less than a region all the same gets the rest of it from the source.
    write(&template.path(), 4096, &bed.image[4096..8192]).unwrap();
    assert_eq!(progress(&template).hydrated, 1);
    assert_eq!(bed.source.sectors_read(), REGION / 512);
    run("blkdiscard", &["-o", "131584", "-l", "65536", template.path().to_str().unwrap()]);
    assert_eq!(progress(&template).hydrated, 1, "a discard of less than a region does nothing");
    drop(writer);
    bed.source.break_down();
    assert_is(&template.path(), &bed.image[..usize::try_from(REGION).unwrap()], "the rest came along");
    bed.source.heal();
    assert_is(&template.path(), &bed.image, "and everything else from the source");
    bed.end();
}

#[test]
fn what_is_local_is_remembered_and_the_rest_is_read_from_the_source() {
    let test = "what_is_local_is_remembered_and_the_rest_is_read_from_the_source";
    let Some(bench) = Bench::new(test) else { return };
    let Some(bed) = Bed::new(&bench, test, 4 * MIB + 12 * 1024) else { return };
    let (pool, one) = (uid(POOL), holder(TEMPLATE));
    let shown = |bed: &Bed| {
        let size = Bytes(bed.image.len() as u64);
        TemplateDevice::shown(&pool, &one, size, &bed.destination.path()).unwrap()
    };
    assert_eq!(shown(&bed), Shown::Absent);
    assert_eq!(thin::find_metadata(&bed.metadata.path()).unwrap(), Some(FoundMetadata::Blank));
    let template = bed.show(true);
    assert_eq!(bed.show(true), template, "taken over, and its metadata not cleared");
    let order = chunks(&bed.image);
    let writer = template.writer().unwrap();
    for chunk in &order[..order.len() / 2] {
        hydrate(&writer, &bed.image, *chunk).unwrap();
    }
    writer.flush().unwrap();
    drop(writer);
    let half = progress(&template);
    assert!(half.hydrated > 0 && !half.is_complete());
    template.hide().unwrap();
    assert_eq!(
        thin::find_metadata(&bed.metadata.path()).unwrap(),
        Some(FoundMetadata::Clone(bed.geometry()))
    );
    // A device that was made and got no table.
    let name = thin::DeviceName::template(&pool, &one).unwrap();
    run("dmsetup", &["create", &name.name(), "-u", &name.uuid(), "--notable"]);
    assert_eq!(shown(&bed), Shown::Unfinished);
    let template = bed.show(false);
    assert!(matches!(shown(&bed), Shown::Clone { progress: Some(progress), .. } if progress == half));
    let before = bed.source.sectors_read();
    assert_is(&template.path(), &bed.image, "half of it is local");
    let remote: u64 =
        order[order.len() / 2..].iter().map(|chunk| super::span(&bed.image, *chunk).length.0).sum();
    assert_eq!(bed.source.sectors_read() - before, remote / 512, "what is local is not read from the source");
    // Metadata that was never used is cleared: everything is remote again, whatever lies below.
    template.hide().unwrap();
    let template = bed.show(true);
    assert_eq!(progress(&template).hydrated, 0);
    bed.end();
}

#[test]
fn the_metadata_of_a_terabyte_fits() {
    let test = "the_metadata_of_a_terabyte_fits";
    let Some(bench) = Bench::new(test) else { return };
    let Some(bed) = Bed::new(&bench, test, MIB) else { return };
    let size = Bytes::gib(1024);
    let region = RegionSize::new(Bytes(REGION)).unwrap();
    let geometry = berth_core::hydration::Geometry::new(size, region).unwrap();
    let (pool, two) = (uid(POOL), holder(2));
    bed.images.create_thin(id(11)).unwrap();
    bed.images.create_thin(id(12)).unwrap();
    let thin = ThinConfig { holder: &two, id: id(11), size, origin: None, read_only: false };
    let destination = ThinDevice::activate(&bed.images, &thin).unwrap();
    let metadata =
        ThinDevice::activate_clone_metadata(&bed.images, &two, id(12), geometry.metadata()).unwrap();
    run("dmsetup", &["create", "berth-test-zeros", "--table", &format!("0 {} zero", size.0 / 512)]);
    let config = thin::CloneConfig {
        pool: &pool,
        holder: &two,
        geometry,
        destination: &destination.path(),
        metadata: &metadata.path(),
        source: std::path::Path::new("/dev/mapper/berth-test-zeros"),
        metadata_is_new: true,
    };
    let template = TemplateDevice::show_clone(&config).unwrap();
    // Every bit changes in one commit, twice as much as ever: half before, all after.
    let writer = template.writer().unwrap();
    for (offset, length) in [(Bytes::ZERO, Bytes::gib(512)), (Bytes::gib(512), Bytes::gib(512))] {
        writer.discard(Span { offset, length }).unwrap();
        writer.flush().unwrap();
    }
    drop(writer);
    template.confirm_local().unwrap();
    let CloneStatus::Working(clone) = template.status().unwrap() else { panic!("it has failed") };
    assert!(clone.writable && clone.progress.total == 1 << 24);
    assert!(clone.metadata.used * 2 <= clone.metadata.total, "{clone:?}");
    assert!(read(&template.path(), 0, MIB).unwrap().iter().all(|byte| *byte == 0));
    template.hide().unwrap();
    run("dmsetup", &["remove", "--retry", "berth-test-zeros"]);
    metadata.deactivate().unwrap();
    destination.deactivate().unwrap();
    bed.end();
}
