//! Images made to take much memory do not. Alone in its program, so that nothing else is measured.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

mod common;

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use berth_core::units::Bytes;
use berth_image::{ExtentReader as _, probe_file};
use common::{Numbers, put, qcow2_header};

fn anonymous_memory() -> Bytes {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon")).unwrap();
    Bytes::kib(line.split_whitespace().nth(1).unwrap().parse().unwrap())
}

fn deflate(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

/// A sparse qcow2 of 1 GiB whose clusters are all compressed, each with as many sectors as an entry can say, and
/// overlapping: at every step of the file the same stream. `scatter` puts those that follow each other far apart.
fn overlapping(path: &Path, cluster_bits: u32, step: u64, scatter: bool) {
    const SIZE: u64 = 1 << 30;
    let cluster = 1_u64 << cluster_bits;
    let (clusters, per_table) = (SIZE / cluster, cluster / 8);
    let tables = clusters.div_ceil(per_table);
    let mut header = qcow2_header(cluster_bits, SIZE, u32::try_from(tables).unwrap());
    put(&mut header, 40, &cluster.to_be_bytes());
    let l1_clusters = (tables * 8).div_ceil(cluster);
    let content = (1 + l1_clusters + tables) * cluster;
    let file = File::create(path).unwrap();
    file.write_all_at(&header, 0).unwrap();
    let stream = deflate(&vec![0x5A; usize::try_from(cluster).unwrap()]);
    let places = 512;
    for place in 0..places {
        file.write_all_at(&stream, content + place * step).unwrap();
    }
    file.set_len(content + places * step + 2 * cluster + 512).unwrap();
    let sectors = ((1_u64 << (cluster_bits - 8)) - 1) << (62 - (cluster_bits - 8));
    for table in 0..tables {
        let at = (1 + l1_clusters + table) * cluster;
        file.write_all_at(&(at | 1 << 63).to_be_bytes(), cluster + table * 8).unwrap();
        let entry = |number: u64| {
            let place = if scatter { number * 211 % places } else { number % places };
            (content + place * step) | sectors | 1 << 62
        };
        let first = table * per_table;
        let entries: Vec<u8> =
            (first..first + per_table).flat_map(|number| entry(number).to_be_bytes()).collect();
        file.write_all_at(&entries, at).unwrap();
    }
}

/// The most memory that reading takes, front to back and here and there.
async fn read(path: &Path, len: usize) -> Bytes {
    let before = anonymous_memory();
    let mut reader = berth_image::open(path, &probe_file(path).unwrap()).await.unwrap();
    let (mut piece, mut peak, mut numbers) = (vec![0; len], Bytes(0), Numbers(5));
    for step in 0..24 {
        let at = if step < 12 { step * piece.len() as u64 } else { numbers.next() % (1 << 29) };
        reader.next_extent(Bytes(at)).await.unwrap();
        piece.fill(0);
        reader.read_at(Bytes(at), &mut piece).await.unwrap();
        assert!(piece.iter().all(|byte| *byte == 0x5A));
        peak = peak.max(anonymous_memory().saturating_sub(before));
    }
    peak
}

#[tokio::test]
async fn memory_is_bounded_whatever_tables_say() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    for (cluster_bits, step, len) in
        [(21, 512 << 10, 3 << 20), (16, 1 << 20, 3 << 20), (12, 1 << 20, 1 << 20), (9, 512 << 10, 256 << 10)]
    {
        for scatter in [false, true] {
            overlapping(&path, cluster_bits, step, scatter);
            let peak = read(&path, len).await;
            println!("clusters 2^{cluster_bits}, scattered {scatter}: {peak}");
            // Some 40 MiB; what the allocator keeps differs by some MiB from run to run.
            assert!(peak < Bytes::mib(56), "clusters 2^{cluster_bits}, scattered {scatter}: {peak}");
        }
    }
}
