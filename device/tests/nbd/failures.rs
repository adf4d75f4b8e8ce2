//! Servers that go away.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use std::{fs, io};

use berth_device::nbd::{AttachError, Attachment, LinkDeadEvents, ServedFormat};
use nix::errno::Errno;

use super::{Bench, SOON, Served, byte, id, read_block};

/// Reads a block in a thread, because it may wait.
fn read_later(device: PathBuf, block: usize) -> Receiver<io::Result<u8>> {
    let (give, take) = channel();
    std::thread::spawn(move || give.send(read_block(&device, block)));
    take
}

fn restart(bench: &Bench, served: &mut Served) {
    let image = bench.dir.path().join("server.raw");
    // What was killed only waits to be replaced.
    *served = Served::start(&image, ServedFormat::Raw, &bench.dir.path().join("server")).unwrap();
}

fn expect_waiting(read: &Receiver<io::Result<u8>>, how_long: Duration) {
    let early = read.recv_timeout(how_long);
    assert!(early.is_err(), "it did not wait: {early:?}");
}

#[test]
fn what_waits_for_a_killed_server_goes_on_after_the_reconnection() {
    let Some(mut bench) = Bench::new("what_waits_for_a_killed_server_goes_on_after_the_reconnection") else {
        return;
    };
    let mut served = bench.served("server", 40);
    let attachment = bench.attach(&id(1), &served.socket(), Duration::from_secs(120)).unwrap();
    let mut events = LinkDeadEvents::open().unwrap();
    // Three times, because a device that was reconnected must be as good as a new one.
    for round in 0..3 {
        assert_eq!(read_block(&attachment.path(), round).unwrap(), byte(40, round));
        served.kill();
        let dead = events.until_quiet(SOON).next().expect("the kernel tells it").unwrap();
        assert_eq!(dead, attachment.index());
        let reads: Vec<_> = [10, 11, 12].map(|block| read_later(attachment.path(), block + round)).into();
        expect_waiting(&reads[0], Duration::from_secs(3));
        let found = Attachment::find(&mut bench.nbd, &id(1)).unwrap();
        assert_eq!(found.as_ref(), Some(&attachment), "found while its server is away");
        restart(&bench, &mut served);
        let started = Instant::now();
        attachment.reconnect(&mut bench.nbd, &served.socket(), SOON).unwrap();
        for (read, block) in reads.iter().zip([10, 11, 12]) {
            let value = read.recv_timeout(SOON).expect("it goes on").expect("and without an error");
            assert_eq!(value, byte(40, block + round));
        }
        println!("reconnected, and all reads were answered, after {:?}", started.elapsed());
    }
    assert!(events.until_quiet(Duration::from_millis(300)).next().is_none(), "one event for each");
    // A reconnection of what is well changes nothing.
    attachment.reconnect(&mut bench.nbd, &served.socket(), SOON).unwrap();
    bench.detach(attachment);
}

#[test]
fn without_a_reconnection_reads_fail_after_the_time_out_and_a_late_one_heals() {
    let Some(mut bench) = Bench::new("without_a_reconnection_reads_fail_after_the_time_out") else { return };
    let mut served = bench.served("server", 50);
    let attachment = bench.attach(&id(1), &served.socket(), Duration::from_secs(4)).unwrap();
    served.kill();
    let started = Instant::now();
    let error = read_later(attachment.path(), 3).recv_timeout(SOON).expect("it ends").unwrap_err();
    let waited = started.elapsed();
    assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32), "{error}");
    assert!(waited >= Duration::from_secs(3) && waited < Duration::from_secs(12), "{waited:?}");
    println!("a read failed {waited:?} after the server was killed, with a limit of 4 s");
    restart(&bench, &mut served);
    attachment.reconnect(&mut bench.nbd, &served.socket(), SOON).unwrap();
    assert_eq!(read_block(&attachment.path(), 3).unwrap(), byte(50, 3));
    bench.detach(attachment);
}

#[test]
fn a_wrong_identifier_and_another_image_are_refused() {
    let Some(mut bench) = Bench::new("a_wrong_identifier_and_another_image_are_refused") else { return };
    let mut served = bench.served("server", 60);
    let mut other = bench.served("other", 70);
    let attachment = bench.attach(&id(1), &served.socket(), Duration::from_secs(120)).unwrap();
    served.kill();
    let (stream, _) = berth_device::nbd::handshake(&other.socket(), "", SOON).unwrap();
    let error = bench.nbd.reconfigure(attachment.index(), &id(2), &stream).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::EINVAL), "{error}");
    let waits = read_later(attachment.path(), 5);
    expect_waiting(&waits, Duration::from_secs(2));

    // An image of another size is told by its size.
    let longer = bench.dir.path().join("longer.raw");
    fs::File::create(&longer).unwrap().set_len(16 << 20).unwrap();
    let wrong = Served::start(&longer, ServedFormat::Raw, &bench.dir.path().join("longer")).unwrap();
    let error = attachment.reconnect(&mut bench.nbd, &wrong.socket(), SOON).unwrap_err();
    assert!(matches!(error, AttachError::Size { .. }), "{error}");
    expect_waiting(&waits, Duration::from_millis(500));
    restart(&bench, &mut served);
    attachment.reconnect(&mut bench.nbd, &served.socket(), SOON).unwrap();
    assert_eq!(waits.recv_timeout(SOON).unwrap().unwrap(), byte(60, 5));
    assert!(other.server().ended().is_none());
    bench.detach(attachment);
}

#[test]
fn a_server_that_hangs_is_told_and_replaced() {
    let Some(mut bench) = Bench::new("a_server_that_hangs_is_told_and_replaced") else { return };
    let mut served = bench.served("server", 60);
    let mut spare = {
        let image = bench.dir.path().join("server.raw");
        Served::start(&image, ServedFormat::Raw, &bench.dir.path().join("spare")).unwrap()
    };
    let attachment = bench.attach(&id(1), &served.socket(), Duration::from_secs(120)).unwrap();
    super::signal(served.server().id(), "STOP");
    // The kernel believes that the old connection lives, and ignores the new one.
    let error = attachment.reconnect(&mut bench.nbd, &spare.socket(), Duration::from_secs(3)).unwrap_err();
    assert!(matches!(error, AttachError::Silent { .. }), "{error}");
    // What it has taken and never answers is sent again to the other one.
    let taken = read_later(attachment.path(), 9);
    expect_waiting(&taken, Duration::from_millis(500));
    served.kill();
    let started = Instant::now();
    attachment.reconnect(&mut bench.nbd, &spare.socket(), SOON).unwrap();
    assert_eq!(read_block(&attachment.path(), 3).unwrap(), byte(60, 3));
    assert_eq!(taken.recv_timeout(SOON).expect("it is sent again").unwrap(), byte(60, 9));
    let waited = started.elapsed();
    assert!(waited < Duration::from_secs(15), "{waited:?}");
    println!("what a hung server had taken was answered {waited:?} after it was killed");
    assert!(spare.server().ended().is_none());
    let index = attachment.index();
    bench.detach(attachment);
    let resend = fs::read_to_string(format!("/sys/block/nbd{index}/queue/io_timeout")).unwrap();
    assert_eq!(resend.trim(), "30000", "as the kernel had it");
}
