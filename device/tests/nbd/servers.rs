//! `qemu-nbd` without a kernel's help.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::Duration;

use berth_device::nbd::{ExportFlags, HandshakeError, NbdServer, ServedFormat, ServerError, handshake};
use berth_device::qemu::SourceDriver;

use super::{SIZE, SOON, Served, run, write_image};

fn qemu_is_there(test: &str) -> bool {
    let there = ["qemu-nbd", "qemu-img"].iter().all(|name| berth_device::find_program(name).is_some());
    if !there {
        println!("SKIPPED {test}: install qemu-utils");
    }
    there
}

fn convert(from: &Path, format: &str, to: &Path) {
    run("qemu-img", &["convert", "-f", "raw", "-O", format, from.to_str().unwrap(), to.to_str().unwrap()]);
}

#[test]
fn every_format_is_served_read_only_as_what_it_was_said_to_be() {
    if !qemu_is_there("every_format_is_served_read_only_as_what_it_was_said_to_be") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    write_image(&raw, 7);
    let formats = [
        ("raw", ServedFormat::Raw),
        ("qcow2", ServedFormat::Image(SourceDriver::Qcow2)),
        ("vmdk", ServedFormat::Image(SourceDriver::Vmdk)),
        ("vpc", ServedFormat::Image(SourceDriver::Vpc)),
        ("vhdx", ServedFormat::Image(SourceDriver::Vhdx)),
    ];
    for (name, format) in formats {
        let image = dir.path().join(format!("image.{name}"));
        convert(&raw, name, &image);
        fs::set_permissions(&image, fs::Permissions::from_mode(0o600)).unwrap();
        let owner = fs::metadata(&image).unwrap().uid();
        let mut served = Served::start(&image, format, &dir.path().join("server")).unwrap();
        let export = served.server().export();
        // A VHD has whole cylinders.
        assert!(export.size == SIZE || (name == "vpc" && export.size >= SIZE), "{name}: {}", export.size);
        assert!(export.flags.has(ExportFlags::READ_ONLY) && !export.flags.has(ExportFlags::TRIM), "{name}");
        let copy = dir.path().join("copy");
        let source = format!("nbd+unix:///?socket={}", served.socket().display());
        run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &source, copy.to_str().unwrap()]);
        let (copy, raw) = (fs::read(&copy).unwrap(), fs::read(&raw).unwrap());
        assert!(copy.starts_with(&raw) && copy[raw.len()..].iter().all(|byte| *byte == 0), "{name}");
        assert_eq!(fs::metadata(&image).unwrap().uid(), owner, "it was only lent");
        if owner == 0 {
            let process = format!("/proc/{}", served.server().id());
            assert_eq!(fs::metadata(process).unwrap().uid(), 65534, "unprivileged");
        }
    }
    // A qcow2 that is said to be raw is served byte for byte, and never opened as what it looks like.
    let image = dir.path().join("image.qcow2");
    let mut served = Served::start(&image, ServedFormat::Raw, &dir.path().join("server")).unwrap();
    let (export, length) = (served.server().export(), fs::metadata(&image).unwrap().len());
    assert!(export.size.0 - length < 512, "{} and {length}", export.size);
}

#[test]
fn a_killed_server_is_replaced_and_a_stopped_one_is_gone() {
    if !qemu_is_there("a_killed_server_is_replaced_and_a_stopped_one_is_gone") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, folder) = (dir.path().join("raw"), dir.path().join("server"));
    write_image(&image, 7);
    let mut first = Served::start(&image, ServedFormat::Raw, &folder).unwrap();
    assert!(first.server().ended().is_none());
    let socket = first.socket();
    let error = handshake(&socket, "other", SOON).unwrap_err();
    assert!(matches!(error, HandshakeError::Refused { .. }), "{error}");
    first.kill();
    assert!(socket.exists(), "it had no time to clean up");
    assert!(matches!(handshake(&socket, "", SOON), Err(HandshakeError::Connect { .. })));
    let mut second = Served::start(&image, ServedFormat::Raw, &folder).unwrap();
    assert_eq!(second.server().export().size, SIZE);
    let process = format!("/proc/{}", second.server().id());
    drop(second);
    assert!(!Path::new(&process).exists() && !socket.exists());
}

#[test]
fn a_server_that_cannot_work_says_why() {
    if !qemu_is_there("a_server_that_cannot_work_says_why") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, folder) = (dir.path().join("image"), dir.path().join("server"));
    // A header that the guard lets through, and nothing behind it.
    let mut header = vec![0; 512];
    header[..8].copy_from_slice(b"QFI\xFB\0\0\0\x03");
    fs::write(&image, header).unwrap();
    let error = Served::start(&image, ServedFormat::Image(SourceDriver::Qcow2), &folder).err().unwrap();
    let ServerError::Run { source, .. } = error else { panic!("{error}") };
    assert!(source.to_string().to_lowercase().contains("cluster"), "its last words: {source}");
    let error = Served::start(&dir.path().join("absent"), ServedFormat::Raw, &folder).err().unwrap();
    assert!(matches!(error, ServerError::File { action: "open", .. }), "{error}");
}

#[test]
fn a_server_that_hangs_is_given_up_and_ended() {
    if !qemu_is_there("a_server_that_hangs_is_given_up_and_ended") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("raw");
    write_image(&image, 7);
    let mut served = Served::start(&image, ServedFormat::Raw, &dir.path().join("server")).unwrap();
    super::signal(served.server().id(), "STOP");
    let error = handshake(&served.socket(), "", Duration::from_millis(300)).unwrap_err();
    assert!(matches!(error, HandshakeError::TimedOut { .. }), "{error}");
    let server: NbdServer = served.0.take().unwrap();
    server.stop().expect("killed where it does not listen");
}
