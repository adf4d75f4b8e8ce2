//! Servers that are kept running, without a kernel's help.

use std::path::Path;
use std::time::Duration;

use berth_core::units::Bytes;
use berth_device::nbd::handshake;
use berth_node::supervisor::keeper::{Keeper, Watch};
use berth_node::supervisor::servers::{DiskFormat, ServeError, ServerSpec, Servers, StateError};
use nix::sys::signal::Signal;

use super::{SOON, Stage, nbd_servers, run, signal, text, uid, wait_until};

fn spec(image: &Path) -> ServerSpec {
    ServerSpec { id: uid(3), image: image.to_owned(), format: DiskFormat::Qcow2, size: Bytes::mib(4) }
}

fn is_missing(test: &str) -> bool {
    let missing = ["qemu-nbd", "qemu-img"].iter().any(|name| berth_device::find_program(name).is_none());
    if missing {
        println!("SKIPPED {test}: install qemu-utils");
    }
    missing
}

#[test]
fn a_server_is_kept_through_its_death_and_that_of_its_keeper() {
    let stage = Stage::new();
    if is_missing("a_server_is_kept_through_its_death_and_that_of_its_keeper") {
        return;
    }
    let before = nbd_servers();
    let ours = || -> Vec<u32> { nbd_servers().into_iter().filter(|id| !before.contains(id)).collect() };
    let (image, folder) = (stage.path("image"), stage.path("servers"));
    run("qemu-img", &["create", "-f", "qcow2", text(&image), "4M"]);
    let first = Keeper::new(&folder, Watch::Always);
    let socket = first.serve(&spec(&image)).unwrap();
    assert_eq!(first.serve(&spec(&image)).unwrap(), socket, "the same again");
    assert_eq!(handshake(&socket, "", SOON).unwrap().1.size, Bytes::mib(4));
    let other = ServerSpec { size: Bytes::mib(8), ..spec(&image) };
    assert!(matches!(first.serve(&other), Err(ServeError::Refused { .. })));
    let locked = Keeper::new(&folder, Watch::WhenAsked).start();
    assert!(matches!(locked, Err(StateError::Locked { .. })), "{locked:?}");

    let [process] = ours()[..] else { panic!("{:?}", ours()) };
    signal(process, Signal::SIGKILL);
    wait_until("another one answers", SOON, || {
        handshake(&socket, "", Duration::from_secs(1)).is_ok() && !ours().contains(&process)
    });
    wait_until("it is told", SOON, || {
        let lines = first.list().unwrap();
        lines[0].running && lines[0].restarts == 1
    });
    let [process] = ours()[..] else { panic!("{:?}", ours()) };
    drop(first);

    let second = Keeper::new(&folder, Watch::WhenAsked);
    assert_eq!(second.serve(&spec(&image)).unwrap(), socket);
    let confined = berth_device::cgroup::probe().is_ok();
    assert_eq!(ours() == [process], confined, "taken over, where there is a control group to find it in");
    second.stop(&uid(3)).unwrap();
    second.stop(&uid(3)).expect("the same again");
    assert_eq!(second.list().unwrap(), []);
    if confined {
        assert_eq!(ours(), [0; 0]);
    }
    assert!(!socket.exists());
    drop(second);
    assert_eq!(Keeper::new(&folder, Watch::WhenAsked).list().unwrap(), [], "nor by the next one");
}

/// Puts an image of this size in its place at once: a keeper looks at what is there at any moment, and holds its locks.
fn put(image: &Path, size: &str) {
    let new = image.with_extension("new");
    run("qemu-img", &["create", "-f", "qcow2", text(&new), size]);
    std::fs::rename(new, image).unwrap();
}

#[test]
fn what_cannot_be_served_is_told_and_served_once_it_can() {
    let stage = Stage::new();
    if is_missing("what_cannot_be_served_is_told_and_served_once_it_can") {
        return;
    }
    let image = stage.path("image");
    let keeper = Keeper::new(&stage.path("servers"), Watch::Always);
    let error = keeper.serve(&spec(&image)).unwrap_err();
    assert!(matches!(error, ServeError::Cannot { .. }), "{error}");
    let line = keeper.list().unwrap().remove(0);
    assert!(!line.running && line.message.is_some(), "{line:?}");
    put(&image, "8M");
    let error = keeper.serve(&spec(&image)).unwrap_err();
    assert!(error.to_string().contains("8 MiB") || error.to_string().contains("4 MiB"), "{error}");
    put(&image, "4M");
    wait_until("it is tried again", SOON, || keeper.list().unwrap()[0].running);
    keeper.stop(&uid(3)).unwrap();
    for bad in [
        ServerSpec { image: "relative".into(), ..spec(&image) },
        ServerSpec { size: Bytes(7), ..spec(&image) },
        ServerSpec { id: "../../etc".into(), ..spec(&image) },
    ] {
        assert!(matches!(keeper.serve(&bad), Err(ServeError::Refused { .. })), "{bad:?}");
    }
}
