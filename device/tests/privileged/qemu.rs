//! Conversions by the real `qemu-img`.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use berth_core::units::Bytes;
use berth_device::qemu::{ConvertError, ConvertLimits, Part, Progress, SourceDriver, convert_to_raw};

use crate::{Bench, group, noise, sparse, tool};

/// A raw disk with data, holes and data at its very end, whose size is no multiple of 4 KiB.
fn disk(bench: &Bench) -> (PathBuf, Bytes) {
    let (path, size) = (bench.path("disk.raw"), Bytes((48 << 20) + 512 * 3));
    sparse(&path, size);
    let file = File::options().write(true).open(&path).unwrap();
    for at in [0, 7 << 20, 30 << 20] {
        file.write_all_at(&noise(at, 3 << 20), at).unwrap();
    }
    file.write_all_at(&noise(9, 1024), size.0 - 1024).unwrap();
    (path, size)
}

fn image(raw: &Path, driver: SourceDriver, options: &[&str]) -> PathBuf {
    let path = raw.with_extension(driver.as_str());
    let mut arguments = vec!["convert", "-f", "raw", "-O", driver.as_str()];
    arguments.extend(options);
    arguments.extend([raw.to_str().unwrap(), path.to_str().unwrap()]);
    tool("qemu-img", &arguments, "");
    path
}

/// The processes in a tool's control group, of any version.
fn processes(group: &str) -> Vec<u32> {
    let suffix = format!("/berth-tools/{group}");
    let all =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    all.filter(|id: &u32| {
        let groups = fs::read_to_string(format!("/proc/{id}/cgroup")).unwrap_or_default();
        groups.lines().any(|line| line.ends_with(&suffix))
    })
    .collect()
}

/// Waits, for at most 20 seconds, until the group has processes, or has none.
async fn until(group: &str, running: bool) -> Vec<u32> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let now = processes(group);
        if now.is_empty() != running {
            return now;
        }
        assert!(Instant::now() < deadline, "{group}: {now:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn owner(path: &Path) -> u32 {
    fs::metadata(path).unwrap().uid()
}

#[tokio::test]
async fn every_format_becomes_the_same_raw_disk() {
    let Some(bench) = Bench::new("every_format_becomes_the_same_raw_disk") else { return };
    let (raw, size) = disk(&bench);
    let content = fs::read(&raw).unwrap();
    for (driver, options) in [
        (SourceDriver::Qcow2, &["-c"][..]),
        (SourceDriver::Vmdk, &["-o", "subformat=streamOptimized"]),
        (SourceDriver::Vmdk, &[]),
        (SourceDriver::Vhdx, &[]),
        (SourceDriver::Vpc, &["-o", "force_size=on"]),
    ] {
        let source = image(&raw, driver, options);
        let target = bench.path("target, with=commas");
        fs::write(&target, b"left by an earlier attempt").unwrap();
        let mut seen = Vec::new();
        let limits = ConvertLimits::new(size, group("formats"));
        let done =
            convert_to_raw(&source, driver, &target, Part::WHOLE, &limits, |progress| seen.push(progress))
                .await
                .unwrap();
        let result = fs::read(&target).unwrap();
        assert_eq!(result.len() as u64, size.0, "{driver}");
        assert!(result == content, "{driver} {options:?} differs");
        assert!(done.allocated < Bytes::mib(24), "{driver}: {} for 9 MiB of data", done.allocated);
        assert_eq!(seen.last(), Some(&Progress { percent: 100 }));
        assert_eq!((owner(&source), owner(&target)), (0, 0), "both files are ours again");
        println!("{driver}: {} allocated, not confined: {:?}", done.allocated, done.unconfined);
    }
}

#[tokio::test]
async fn part_by_part_it_becomes_the_same_disk_and_what_was_done_is_left_alone() {
    let Some(bench) = Bench::new("part_by_part_it_becomes_the_same_disk") else { return };
    let (raw, size) = disk(&bench);
    let content = fs::read(&raw).unwrap();
    let window = Bytes::mib(4);
    for driver in [SourceDriver::Qcow2, SourceDriver::Vhdx] {
        let source = image(&raw, driver, &[]);
        let target = bench.path("target");
        let limits = ConvertLimits::new(size, group("parts"));
        let (mut from, mut parts) = (Bytes::ZERO, 0);
        loop {
            let part = Part::at(from, window, size);
            convert_to_raw(&source, driver, &target, part, &limits, |_| ()).await.unwrap();
            assert_eq!(fs::metadata(&target).unwrap().len(), size.0);
            parts += 1;
            if part.len.is_none() {
                break;
            }
            from = Bytes(from.0 + window.0);
        }
        assert_eq!(parts, size.0.div_ceil(window.0));
        assert!(fs::read(&target).unwrap() == content, "{driver} differs");
        // A part writes nothing into others.
        File::options().write(true).open(&target).unwrap().write_all_at(b"mark", 1).unwrap();
        convert_to_raw(&source, driver, &target, Part::at(window, window, size), &limits, |_| ())
            .await
            .unwrap();
        let again = fs::read(&target).unwrap();
        assert_eq!(&again[1..5], b"mark");
        assert!(again[5..] == content[5..], "{driver} differs behind the mark");
    }
}

#[tokio::test]
async fn an_image_that_is_larger_than_promised_writes_nothing_beyond() {
    let Some(bench) = Bench::new("an_image_that_is_larger_than_promised") else { return };
    let (raw, size) = disk(&bench);
    let source = image(&raw, SourceDriver::Qcow2, &[]);
    let target = bench.path("target");
    let limits = ConvertLimits::new(Bytes(size.0 / 2), group("larger"));
    let error = convert_to_raw(&source, SourceDriver::Qcow2, &target, Part::WHOLE, &limits, |_| ())
        .await
        .unwrap_err();
    assert!(matches!(&error, ConvertError::Failed { output, .. } if output.contains("smaller")), "{error}");
    assert!(fs::metadata(&target).unwrap().len() <= limits.virtual_size.round_up(Bytes::kib(4)).0);
}

#[tokio::test]
async fn images_that_reach_outside_or_lie_are_refused() {
    let Some(bench) = Bench::new("images_that_reach_outside_or_lie") else { return };
    let (raw, size) = disk(&bench);
    let secret = bench.path("secret");
    fs::write(&secret, vec![b's'; 1 << 20]).unwrap();
    let backed = bench.path("backed.qcow2");
    let arguments = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
    tool("qemu-img", &[&arguments[..], &[secret.to_str().unwrap(), backed.to_str().unwrap()]].concat(), "");
    let data_file = format!("data_file={},data_file_raw=on", secret.display());
    let external = bench.path("external.qcow2");
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", &data_file, external.to_str().unwrap(), "1M"],
        "",
    );
    let flat = bench.path("flat.vmdk");
    tool(
        "qemu-img",
        &["create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", flat.to_str().unwrap(), "1M"],
        "",
    );

    let target = bench.path("target");
    let limits = ConvertLimits::new(size, group("refused"));
    for (source, driver) in [
        (&backed, SourceDriver::Qcow2),
        (&external, SourceDriver::Qcow2),
        (&flat, SourceDriver::Vmdk),
        (&raw, SourceDriver::Qcow2),
        (&backed, SourceDriver::Vmdk),
    ] {
        let error = convert_to_raw(source, driver, &target, Part::WHOLE, &limits, |_| ()).await.unwrap_err();
        assert!(matches!(error, ConvertError::Guard(_)), "{error}");
        assert!(!target.exists(), "refused before anything was made");
    }
}

/// A conversion that takes a while: 1 GiB of data.
fn long(bench: &Bench) -> (PathBuf, Bytes) {
    let (raw, size) = (bench.path("long.raw"), Bytes::gib(1));
    sparse(&raw, size);
    let file = File::options().write(true).open(&raw).unwrap();
    let block = noise(6, 1 << 20);
    (0..1024).for_each(|n| file.write_all_at(&block, n << 20).unwrap());
    let source = image(&raw, SourceDriver::Qcow2, &[]);
    fs::remove_file(raw).unwrap();
    (source, size)
}

#[tokio::test]
async fn the_tool_is_unprivileged_and_dies_with_the_future() {
    let Some(bench) = Bench::new("the_tool_is_unprivileged_and_dies") else { return };
    let (source, size) = long(&bench);
    let target = bench.path("target");
    let group = &group("cancelled");
    let limits = ConvertLimits { user: 54321, ..ConvertLimits::new(size, group.as_str()) };
    let tool = {
        let conversion = convert_to_raw(&source, SourceDriver::Qcow2, &target, Part::WHOLE, &limits, |_| ());
        tokio::select! {
            done = conversion => panic!("it ended before it could be cancelled: {done:?}"),
            tool = unprivileged(group) => tool,
        }
    };
    until(group, false).await;
    let state = fs::read_to_string(format!("/proc/{}/stat", tool[0])).unwrap_or_default();
    assert!(state.is_empty() || state.contains(") Z "), "the tool lives: {state}");
    assert_eq!((owner(&source), owner(&target)), (0, 0));
}

/// The tool's processes, once it has become what it should be.
async fn unprivileged(group: &str) -> Vec<u32> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let tool = until(group, true).await;
        let status = fs::read_to_string(format!("/proc/{}/status", tool[0])).unwrap_or_default();
        let has = |line: &str| status.lines().any(|one| one.split_whitespace().eq(line.split_whitespace()));
        let confined =
            has("Uid: 54321 54321 54321 54321") && has("NoNewPrivs: 1") && has("CapEff: 0000000000000000");
        if confined && has("Groups:") && has("Name: qemu-img") {
            return tool;
        }
        assert!(Instant::now() < deadline, "{status}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_tool_that_stands_still_is_killed() {
    let Some(bench) = Bench::new("a_tool_that_stands_still_is_killed") else { return };
    let (source, size) = long(&bench);
    let target = bench.path("target");
    let group = &group("stalled");
    let limits =
        ConvertLimits { stall: Duration::from_millis(700), ..ConvertLimits::new(size, group.as_str()) };
    let conversion = convert_to_raw(&source, SourceDriver::Qcow2, &target, Part::WHOLE, &limits, |_| ());
    let freeze = async {
        let tool = until(group, true).await;
        for process in tool {
            let process = nix::unistd::Pid::from_raw(i32::try_from(process).unwrap());
            nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGSTOP).unwrap();
        }
    };
    let (result, ()) =
        tokio::time::timeout(Duration::from_secs(60), async { tokio::join!(conversion, freeze) })
            .await
            .expect("the watchdog acts");
    assert!(matches!(result, Err(ConvertError::Stalled { .. })), "{result:?}");
    until(group, false).await;
}
