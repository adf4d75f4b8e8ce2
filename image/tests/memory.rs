//! Memory does not grow with the image. Alone in its program, so that nothing else is measured.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

mod common;

use std::fs;
use std::path::Path;

use berth_core::units::Bytes;
use berth_image::{ExtentKind, ExtentReader as _, probe_file};

fn anonymous_memory() -> Bytes {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon")).unwrap();
    Bytes::kib(line.split_whitespace().nth(1).unwrap().parse().unwrap())
}

/// Walks the image and reads a little of every data extent; the highest growth seen, and the number of such extents.
async fn walk(path: &Path) -> (Bytes, u64) {
    let before = anonymous_memory();
    let mut reader = berth_image::open(path, &probe_file(path).unwrap()).await.unwrap();
    let (mut at, mut data, mut peak) = (Bytes(0), 0, Bytes(0));
    while let Some(extent) = reader.next_extent(at).await.unwrap() {
        if extent.kind == ExtentKind::Data {
            data += 1;
            let mut piece = [0; 4096];
            reader.read_at(at, &mut piece).await.unwrap();
            assert_eq!(piece, [0x5A; 4096]);
            peak = peak.max(anonymous_memory().saturating_sub(before));
        }
        at = at.saturating_add(extent.len);
    }
    assert_eq!(at, reader.virtual_size());
    (peak, data)
}

#[tokio::test]
async fn a_tebibyte_takes_no_more_than_two_gibibytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let (small_size, large_size) = (Bytes::gib(2), Bytes::gib(1024));
    for (cluster_bits, tables) in [(16, 2048), (18, 128), (19, 32), (21, 2)] {
        common::scattered_qcow2(&path, cluster_bits, small_size.0);
        let (small, _) = walk(&path).await;
        common::scattered_qcow2(&path, cluster_bits, large_size.0);
        let (large, data) = walk(&path).await;
        assert_eq!(data, tables);
        println!("clusters 2^{cluster_bits}: 2 GiB takes {small}, 1 TiB takes {large}");
        let more = large.saturating_sub(small);
        // 8 MiB of tables and a window of 4 MiB; what the allocator keeps differs by some MiB from run to run.
        assert!(more < Bytes::mib(16), "clusters 2^{cluster_bits}: {more} more");
    }
}
