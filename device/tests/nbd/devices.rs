//! Devices that work, are found again, and are told apart.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use berth_core::reason::Reason;
use berth_device::nbd::{self, AttachConfig, AttachError, Attachment, Nbd, ServedFormat, SlotUse};
use berth_device::qemu::SourceDriver;

use super::{Bench, SIZE, SOON, Served, byte, id, read_block, run, write_image};

/// Set for a copy of this program that is to take a device over; its value is the server's socket.
const ADOPT: &str = "BERTH_TEST_ADOPT_NBD";
const DEAD: Duration = Duration::from_secs(60);

#[test]
fn an_image_reads_through_a_device_as_qemu_img_converts_it() {
    let Some(mut bench) = Bench::new("an_image_reads_through_a_device_as_qemu_img_converts_it") else {
        return;
    };
    let path = |name: &str| bench.dir.path().join(name);
    let (raw, qcow2, converted) = (path("raw"), path("image.qcow2"), path("converted"));
    write_image(&raw, 3);
    let [raw, image, copy] = [&raw, &qcow2, &converted].map(|path| path.to_str().unwrap());
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "-c", raw, image]);
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", image, copy]);
    let served = Served::start(&qcow2, ServedFormat::Image(SourceDriver::Qcow2), &path("server")).unwrap();

    let attachment = bench.attach(&id(1), &served.socket(), DEAD).unwrap();
    assert_eq!((attachment.size(), attachment.path().exists()), (SIZE, true));
    assert!(fs::read(attachment.path()).unwrap() == fs::read(&converted).unwrap());
    let written = fs::OpenOptions::new()
        .write(true)
        .open(attachment.path())
        .and_then(|file| std::os::unix::fs::FileExt::write_all_at(&file, &[1; 512], 0));
    assert!(written.is_err(), "read-only");
    let sysfs = |name: &str| {
        let file = format!("/sys/block/nbd{}/{name}", attachment.index());
        fs::read_to_string(file).unwrap().trim().to_owned()
    };
    assert_eq!((sysfs("backend"), sysfs("ro")), (id(1).to_string(), "1".to_owned()));
    assert_eq!(sysfs("queue/logical_block_size"), "512", "what guests expect");

    // Everything may be done again.
    let again = bench.attach(&id(1), &served.socket(), DEAD).unwrap();
    assert_eq!(again, attachment);
    assert_eq!(Attachment::list(&mut bench.nbd).unwrap(), std::slice::from_ref(&attachment));
    let other_size = AttachConfig {
        id: &id(1),
        socket: &served.socket(),
        size: super::Bytes::mib(16),
        dead_connection: DEAD,
        limit: SOON,
    };
    for other in [other_size, AttachConfig { id: &id(2), ..other_size }] {
        let error = Attachment::attach(&mut bench.nbd, &mut bench.slots, &other).unwrap_err();
        assert!(matches!(error, AttachError::Size { .. }), "{error}");
    }
    bench.detach(attachment.clone());
    bench.detach(attachment.clone());
    let gone = attachment.reconnect(&mut bench.nbd, &served.socket(), SOON).unwrap_err();
    assert!(matches!(gone, AttachError::NotAttached { .. }), "{gone}");
    assert_eq!(Attachment::find(&mut bench.nbd, &id(1)).unwrap(), None);
}

#[test]
fn a_new_process_takes_a_device_over() {
    if let Some(socket) = std::env::var_os(ADOPT) {
        // The restarted process: it knows an identifier, and nothing else.
        let mut nbd = Nbd::open().unwrap();
        let found = Attachment::find(&mut nbd, &id(5)).unwrap().expect("the device is still there");
        found.reconnect(&mut nbd, Path::new(&socket), SOON).unwrap();
        println!("TOOK OVER {} with block 4 = {}", found.index(), read_block(&found.path(), 4).unwrap());
        return;
    }
    let Some(mut bench) = Bench::new("a_new_process_takes_a_device_over") else { return };
    let served = bench.served("server", 9);
    let other = bench.attach(&id(4), &served.socket(), DEAD).unwrap();
    let attachment = bench.attach(&id(5), &served.socket(), DEAD).unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "devices::a_new_process_takes_a_device_over", "--nocapture"])
        .env(ADOPT, served.socket())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let expected = format!("TOOK OVER {} with block 4 = {}", attachment.index(), byte(9, 4));
    assert!(output.status.success() && said.contains(&expected), "{output:?}");
    assert_eq!(
        read_block(&attachment.path(), 7).unwrap(),
        byte(9, 7),
        "the end of the other changed nothing"
    );
    bench.detach(attachment);
    bench.detach(other);
}

#[test]
fn devices_of_others_are_left_alone() {
    let Some(mut bench) = Bench::new("devices_of_others_are_left_alone") else { return };
    let theirs = bench.dir.path().join("theirs");
    write_image(&theirs, 80);
    let first = nbd::observe(&mut bench.nbd).unwrap();
    let free = first.iter().find(|slot| slot.usage() == SlotUse::Free).unwrap().index;
    let device = format!("/dev/nbd{free}");
    run("qemu-nbd", &["--read-only", "-f", "raw", "--connect", &device, theirs.to_str().unwrap()]);
    let usage = |bench: &mut Bench, index: u32| {
        nbd::observe(&mut bench.nbd).unwrap().into_iter().find(|slot| slot.index == index).unwrap().usage()
    };
    // It is done before the kernel names its process: until then the device is only open.
    let deadline = Instant::now() + Duration::from_secs(20);
    while usage(&mut bench, free) == SlotUse::Held && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(usage(&mut bench, free), SlotUse::Foreign);

    let served = bench.served("server", 20);
    let attachment = bench.attach(&id(6), &served.socket(), DEAD).unwrap();
    assert_ne!(attachment.index(), free);
    assert_eq!(usage(&mut bench, attachment.index()), SlotUse::Ours(id(6)));
    assert_eq!(Attachment::list(&mut bench.nbd).unwrap(), std::slice::from_ref(&attachment));
    bench.detach(attachment);
    assert_eq!(usage(&mut bench, free), SlotUse::Foreign);
    assert_eq!(read_block(Path::new(&device), 1).unwrap(), byte(80, 1), "it works as before");
    run("qemu-nbd", &["--disconnect", &device]);
}

#[test]
fn when_no_device_is_free_it_says_what_they_are_used_for() {
    let Some(mut bench) = Bench::new("when_no_device_is_free_it_says_what_they_are_used_for") else { return };
    let served = bench.served("server", 1);
    let all = nbd::observe(&mut bench.nbd).unwrap();
    // One that is merely open is not taken, and neither is it ours.
    let open = fs::File::open(format!("/dev/nbd{}", all[2].index)).unwrap();
    let mut attached = Vec::new();
    let source = loop {
        match bench.attach(&id(100 + u32::try_from(attached.len()).unwrap()), &served.socket(), DEAD) {
            Ok(attachment) => attached.push(attachment),
            Err(error @ AttachError::Exhausted { .. }) => {
                assert_eq!(error.reason(), Reason::SlotsExhausted);
                let AttachError::Exhausted { source, .. } = error else { unreachable!() };
                break source;
            }
            Err(error) => panic!("{error}"),
        }
        assert!(attached.len() < all.len(), "more than there are");
    };
    let used = all.iter().filter(|slot| slot.usage() != SlotUse::Free).count();
    assert_eq!((source.total, source.ours), (all.len(), all.len() - used - 1));
    assert!(source.quarantined >= 1 && source.to_string().contains(&all.len().to_string()), "{source}");
    for attachment in &attached {
        let whose = format!("nbd{} {}", attachment.index(), attachment.id());
        assert!(source.to_string().contains(&whose), "{whose} in {source}");
    }
    assert!(source.to_string().contains(&format!("nbd{} held", all[2].index)), "{source}");
    assert_eq!(read_block(&attached[5].path(), 6).unwrap(), byte(1, 6));
    drop(open);
    for attachment in attached {
        bench.detach(attachment);
    }
    let attachment = bench.attach(&id(1), &served.socket(), DEAD).unwrap();
    bench.detach(attachment);
}

#[test]
fn a_device_in_use_is_not_let_go_and_says_by_whom() {
    let Some(mut bench) = Bench::new("a_device_in_use_is_not_let_go_and_says_by_whom") else { return };
    let served = bench.served("server", 1);
    let attachment = bench.attach(&id(1), &served.socket(), DEAD).unwrap();
    let open = fs::File::open(attachment.path()).unwrap();
    let in_use = |bench: &mut Bench, attachment: &Attachment| match attachment
        .clone()
        .detach(&mut bench.nbd, &mut bench.slots)
    {
        Err(AttachError::InUse { holders, .. }) => holders.join(", "),
        other => panic!("{other:?}"),
    };
    let holders = in_use(&mut bench, &attachment);
    assert!(holders.contains(&format!("process {} (", std::process::id())), "{holders}");
    drop(open);

    let sectors = (SIZE.0 / 512).to_string();
    let table = format!("0 {sectors} linear {} 0", attachment.path().display());
    run("dmsetup", &["create", "--readonly", "nbd-holder", "--table", &table]);
    let holders = in_use(&mut bench, &attachment);
    assert!(holders.contains("device nbd-holder"), "{holders}");
    assert_eq!(read_block(Path::new("/dev/mapper/nbd-holder"), 3).unwrap(), byte(1, 3), "it works on");
    run("dmsetup", &["remove", "--retry", "nbd-holder"]);
    bench.detach(attachment);
}
