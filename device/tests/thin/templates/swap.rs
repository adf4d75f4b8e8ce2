//! Volumes over a template that becomes local under them.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use berth_core::hydration::Shown;
use berth_core::units::Bytes;
use berth_device::thin::{
    DeviceName, DeviceNumber, InProcess, SuspendError, Suspender as _, TemplateDevice, TemplateError,
};

use super::{
    Bed, Bench, Dice, POOL, TEMPLATE, assert_is, assert_zeros_behind, chunks, holder, hydrate, read, uid,
    write,
};
use crate::assert_none_suspended;

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;

/// Reads and writes a volume at random until it is told to stop, and compares every read with what it has to be.
struct Guest<'a> {
    device: PathBuf,
    content: Vec<u8>,
    stop: &'a AtomicBool,
    requests: &'a AtomicU64,
}

impl Guest<'_> {
    fn run(mut self, seed: u64) -> Vec<u8> {
        let mut dice = Dice(seed);
        let pages = self.content.len() / PAGE;
        while !self.stop.load(Ordering::Relaxed) {
            let page = usize::try_from(dice.roll(pages as u64)).unwrap();
            let count = usize::try_from(dice.roll(24)).unwrap().clamp(1, pages - page);
            let range = page * PAGE..(page + count) * PAGE;
            if dice.roll(3) == 0 {
                let byte = dice.roll(256).to_le_bytes()[0];
                self.content[range.clone()].fill(byte);
                write(&self.device, range.start, &self.content[range]).unwrap();
            } else {
                let found = read(&self.device, range.start, range.len()).unwrap();
                assert!(
                    found == self.content[range.clone()],
                    "{} differs in {range:?}",
                    self.device.display()
                );
            }
            self.requests.fetch_add(1, Ordering::Relaxed);
        }
        self.content
    }
}

/// Waits until the guests have sent so many more requests.
fn let_run(requests: &AtomicU64, more: u64) {
    let until = requests.load(Ordering::Relaxed) + more;
    let started = std::time::Instant::now();
    while requests.load(Ordering::Relaxed) < until {
        assert!(started.elapsed() < std::time::Duration::from_secs(120), "the guests are stuck");
        thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn volumes_read_and_write_while_their_template_becomes_local() {
    let test = "volumes_read_and_write_while_their_template_becomes_local";
    let Some(bench) = Bench::new(test) else { return };
    let Some(bed) = Bed::new(&bench, test, 16 * MIB + 20 * 1024) else { return };
    let template = bed.show(true);
    let volumes = [bed.volume(&template, 1, Bytes::ZERO), bed.volume(&template, 2, Bytes::mib(2))];
    let (stop, requests) = (AtomicBool::new(false), AtomicU64::new(0));
    let contents = thread::scope(|scope| {
        let guests: Vec<_> = volumes
            .iter()
            .zip(1..)
            .map(|(volume, seed)| {
                let (device, content) = (volume.path(), bed.image.clone());
                let guest = Guest { device, content, stop: &stop, requests: &requests };
                scope.spawn(move || guest.run(seed * 0x1234_5678_9ABC))
            })
            .collect();
        let_run(&requests, 50);
        become_local(&bed, &template, &requests);
        let_run(&requests, 50);
        stop.store(true, Ordering::Relaxed);
        guests.into_iter().map(|guest| guest.join().unwrap()).collect::<Vec<_>>()
    });
    println!("the guests have sent {} requests", requests.load(Ordering::Relaxed));
    for (volume, content) in volumes.iter().zip(&contents) {
        assert_is(&volume.path(), content, "after all");
    }
    assert_zeros_behind(&volumes[1].path(), bed.image.len());
    assert_is(&template.path(), &bed.image, "the template is as it was");
    assert!(write(&template.path(), 0, &[1; PAGE]).is_err(), "nobody writes to it any more");
    assert_is(&bed.destination.path(), &bed.image, "and lies on its own");
    for volume in volumes {
        let in_use = template.clone().hide().unwrap_err();
        assert!(matches!(in_use, TemplateError::InUse { .. }), "{in_use}");
        volume.deactivate().unwrap();
    }
    bed.end();
}

/// In random order, with the process that does it beginning anew in between; then the table is replaced.
fn become_local(bed: &Bed, template: &TemplateDevice, requests: &AtomicU64) {
    let mut order = chunks(&bed.image);
    Dice(99).shuffle(&mut order);
    for part in order.chunks(order.len() / 4 + 1) {
        let template = bed.show(false); // as somebody who knows of nothing
        let writer = template.writer().unwrap();
        for chunk in part {
            hydrate(&writer, &bed.image, *chunk).unwrap();
        }
        let_run(requests, 20);
    }
    template.confirm_local().unwrap();
    template.make_local(&InProcess).unwrap();
    template.make_local(&InProcess).expect("it may be repeated");
    assert_none_suspended();
    let (pool, one) = (uid(POOL), holder(TEMPLATE));
    let size = Bytes(bed.image.len() as u64);
    let shown = || TemplateDevice::shown(&pool, &one, size, &bed.destination.path()).unwrap();
    assert_eq!(shown(), Shown::Linear);
    // Neither is used any more.
    let before = bed.source.sectors_read();
    bed.source.break_down();
    let number = DeviceNumber::of(&bed.source.path).unwrap();
    let holders = format!("/sys/dev/block/{number}/holders");
    assert_eq!(std::fs::read_dir(holders).unwrap().count(), 0);
    let_run(requests, 50);
    assert_eq!(bed.source.sectors_read(), before);
    let error = bed.try_show(false).unwrap_err();
    assert!(matches!(error, TemplateError::Different { .. }), "{error}");
    assert!(matches!(template.writer(), Err(TemplateError::NotActive { .. })));
    let again = TemplateDevice::show_local(&pool, &one, size, &bed.destination.path()).unwrap();
    assert_eq!(&again, template, "taken over");
}

#[test]
fn only_a_template_that_is_local_becomes_its_destination() {
    let test = "only_a_template_that_is_local_becomes_its_destination";
    let Some(bench) = Bench::new(test) else { return };
    let Some(bed) = Bed::new(&bench, test, 2 * MIB) else { return };
    let template = bed.show(true);
    let refused = |table: &str| match InProcess.replace_table(template.name(), table) {
        Err(SuspendError::Refused { why, .. }) => why,
        other => panic!("{table}: {other:?}"),
    };
    let number = |path: &Path| DeviceNumber::of(path).unwrap();
    let (own, metadata) = (number(&bed.destination.path()), number(&bed.metadata.path()));
    let sectors = bed.image.len() / 512;
    let local = format!("0 {sectors} linear {own} 0");
    assert_eq!(refused(&local), "0 regions of 32 are local");
    let writer = template.writer().unwrap();
    let mut others = chunks(&bed.image);
    let last = others.pop().unwrap();
    for chunk in others {
        hydrate(&writer, &bed.image, chunk).unwrap();
    }
    assert_eq!(refused(&local), "28 regions of 32 are local");
    let error = template.confirm_local().unwrap_err();
    assert!(
        matches!(&error, TemplateError::Incomplete { progress, .. } if progress.hydrated == 28),
        "{error}"
    );
    let error = template.make_local(&InProcess).unwrap_err();
    assert!(matches!(error, TemplateError::Suspend { source: SuspendError::Refused { .. }, .. }), "{error}");
    hydrate(&writer, &bed.image, last).unwrap();
    drop(writer);
    for other in [
        format!("0 {sectors} linear {metadata} 0"),
        format!("0 {} linear {own} 0", sectors - 8),
        format!("0 {sectors} error"),
        format!("0 {sectors} zero"),
    ] {
        refused(&other);
    }
    let metadata = DeviceName::clone_metadata(&uid(POOL), &holder(TEMPLATE)).unwrap();
    assert!(InProcess.replace_table(&metadata, &local).is_err());
    template.make_local(&InProcess).unwrap();
    assert_none_suspended();
    assert_is(&template.path(), &bed.image, "it is local");
    bed.end();
}
