//! `berth-node template serve` as clients of NBD see it, on an S3 server that counts and fails.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

#[allow(dead_code)] // no test program uses all of it
#[path = "../bed/mod.rs"]
mod bed;
mod client;
mod failures;
mod served;

use std::process::Command;

use bed::{Bed, MIB, raw_image, text};

use self::client::Client;
use self::served::{Served, import};

/// What a program says; nothing, with a line that says so, if it is not installed.
fn said(program: &str, arguments: &[&str]) -> Option<(bool, String)> {
    let Ok(output) = Command::new(program).args(arguments).output() else {
        eprintln!("skipped: {program} is not installed");
        return None;
    };
    let all = [output.stdout, output.stderr].concat();
    Some((output.status.success(), String::from_utf8_lossy(&all).into_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_and_libnbd_read_the_image_and_know_its_holes() {
    let bed = Bed::new().await;
    let disk = bed.file("disk");
    raw_image(&disk, 300, &[0..3, 7..8, 200..230, 299..300]);
    let digest = import(&bed, "disk").await;
    for image in [digest.as_str(), "images/disk"] {
        let served = Served::start(&bed, image, &[]).await;
        let listening = served.line("listening").await;
        assert_eq!(
            (listening["export"].as_str(), listening["virtualSize"].as_u64(), listening["dataSize"].as_u64()),
            (Some(&*digest), Some(300 * MIB), Some(35 * MIB))
        );
        let uri = served.uri();
        if let Some((same, told)) =
            said("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, text(&disk)])
        {
            assert!(same, "{told}");
        }
        if let Some((ok, map)) = said("qemu-img", &["map", "--output=json", "-f", "raw", &uri]) {
            assert!(ok, "{map}");
            let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
            let of = |zero: bool| {
                map.iter()
                    .filter(move |extent| extent["zero"] == zero)
                    .map(|extent| extent["length"].as_u64().unwrap())
            };
            assert_eq!((of(false).sum::<u64>(), of(true).sum::<u64>()), (35 * MIB, 265 * MIB), "{map:?}");
            assert!(
                map.iter().any(|extent| extent["start"] == 200 * MIB && extent["length"] == 30 * MIB),
                "{map:?}"
            );
        }
        if let Some((_, told)) = said("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0 3M 4M", &uri]) {
            assert!(told.contains("read 4194304/4194304"), "{told}");
        }
        if let Some((wrote, told)) = said("qemu-io", &["-f", "raw", "-c", "write 0 4k", &uri]) {
            assert!(!wrote || told.contains("Read-only") || told.contains("read-only"), "{told}");
        }
        if let Some((ok, told)) = said("nbdinfo", &["--json", &uri]) {
            assert!(ok, "{told}");
            let told: serde_json::Value = serde_json::from_str(&told).unwrap();
            let export = &told["exports"][0];
            for (field, wanted) in [
                ("export-size", serde_json::json!(300 * MIB)),
                ("is_read_only", true.into()),
                ("can_multi_conn", true.into()),
                ("can_df", true.into()),
                ("can_flush", true.into()),
                ("can_trim", false.into()),
                ("block_size_minimum", 1.into()),
                ("block_size_preferred", (256 << 10).into()),
                ("contexts", serde_json::json!(["base:allocation"])),
            ] {
                assert_eq!(export[field], wanted, "{field}: {told}");
            }
        }
        let copy = bed.file("copy");
        if let Some((ok, told)) = said("nbdcopy", &["--connections=4", &uri, text(&copy)]) {
            assert!(ok && bed::same_disk(&copy, &disk), "{told}");
        }
        let ended = served.end().await;
        assert_eq!(
            (ended["health"]["state"].as_str(), ended["failures"].as_u64()),
            (Some("Ok"), Some(0)),
            "{ended}"
        );
        assert_eq!(
            (ended["clients"]["open"].as_u64(), ended["clients"]["failed"].as_u64()),
            (Some(0), Some(0))
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_clients_make_one_request_for_each_chunk() {
    let bed = Bed::new().await;
    let disk = bed.file("disk");
    raw_image(&disk, 48, &[0..20, 30..44]);
    let digest = import(&bed, "disk").await;
    let served = Served::start(&bed, &digest, &["--connections", "20"]).await;
    let before = bed.s3.log().unwrap().last_seq();
    let whole = std::sync::Arc::new(std::fs::read(&disk).unwrap());
    let readers: Vec<_> = (0..20_u64)
        .map(|reader| {
            let (socket, whole) = (served.socket.clone(), std::sync::Arc::clone(&whole));
            std::thread::spawn(move || {
                let mut client = Client::connect(&socket);
                for step in 0..48 * 4 {
                    // Half of them from the begin, half of them from somewhere in the middle.
                    let at = (step + reader % 2 * (reader * 9)) % (48 * 4) * (MIB / 4);
                    let from = usize::try_from(at).unwrap();
                    assert!(client.read(at, 1 << 18).unwrap() == whole[from..from + (1 << 18)], "at {at}");
                }
            })
        })
        .collect();
    for reader in readers {
        reader.join().unwrap();
    }
    let log = bed.s3.log().unwrap().after(before);
    let mut asked = std::collections::BTreeMap::<String, u32>::new();
    for entry in log.entries().iter().filter(|entry| entry.key.contains("chunks/")) {
        *asked.entry(entry.key.clone()).or_default() += 1;
    }
    assert_eq!(asked.len(), 34 * 4, "each chunk of data, and none of zeros");
    assert!(asked.values().all(|times| *times == 1), "{asked:?}");
    let ended = served.end().await;
    assert_eq!(ended["chunksFetched"], 34 * 4, "{ended}");
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_stays_within_its_budget_on_a_large_sparse_image() {
    let bed = Bed::new().await;
    let disk = bed.file("disk");
    raw_image(&disk, 64 << 10, &[0..120, 40_000..40_020, 65_000..65_020]);
    // As a format without holes: an import hashes all of its source.
    bed::qemu_img(&["convert", "-q", "-f", "raw", "-O", "qcow2", text(&disk), text(&bed.file("disk.qcow2"))]);
    let digest = import(&bed, "disk.qcow2").await;
    let served = Served::start(&bed, &digest, &["--memory", "64Mi"]).await;
    let idle = served.peak_memory();
    let readers: Vec<_> = (0..12_u64)
        .map(|reader| {
            let socket = served.socket.clone();
            std::thread::spawn(move || {
                let mut client = Client::connect(&socket);
                for step in 0..16 {
                    client.read((reader * 50 + step * 3) % 117 * MIB, 3 << 20).unwrap();
                    client.read(40_000 * MIB + (step % 17) * MIB, 3 << 20).unwrap();
                }
            })
        })
        .collect();
    for reader in readers {
        reader.join().unwrap();
    }
    let grown = served.peak_memory() - idle;
    println!("it grew by {} MiB from {} MiB", grown / MIB, idle / MIB);
    let ended = served.end().await;
    assert!(ended["bytesRead"].as_u64().unwrap() > 1000 * MIB, "{ended}");
    assert!(ended["chunksFetched"].as_u64().unwrap() > 600, "more than it may keep: {ended}");
    // Connections, the client of the store, and what the allocator keeps of either, come on top of it.
    assert!(grown < 64 * MIB + 40 * MIB, "it grew by {} MiB", grown / MIB);
}
