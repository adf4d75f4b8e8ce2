//! What readers other than `qemu-img` rely on: structures of written vmdk and VHD images, read strictly.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

mod common;

use std::collections::BTreeMap;
use std::io::Read as _;

use berth_core::units::Bytes;
use berth_image::{BLOCK, Compression, OnePassWriter, Output, OutputFormat};
use common::disk::{Disk, FILLS, Fill, write};
use common::{Numbers, seal_vhd};

fn output(format: OutputFormat, size: Bytes) -> Output {
    Output { format, virtual_size: size, level: None, id: *b"an identity, say" }
}

fn sparse_disk() -> Disk {
    let mut disk = Disk::new(Bytes((150 << 20) + 512));
    for block in [0, 1, 15, 16, 40, 75] {
        disk.fill(block, Fill::Mixed, &mut Numbers(block));
    }
    disk
}

fn le_u32(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

fn le_u64(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap()
}

/// What a vmdk has, as it is met from front to back, by sectors.
#[derive(Default)]
struct Stream {
    /// Grains by their first sector on the disk.
    grains: BTreeMap<usize, (usize, Vec<u8>)>,
    tables: Vec<(usize, Vec<usize>)>,
    directory: Option<(usize, Vec<usize>)>,
    footer: Option<Vec<u8>>,
}

impl Stream {
    /// Reads markers and what follows them until the end-of-stream marker, which must be the file's end.
    fn read(file: &[u8]) -> Self {
        let mut stream = Self::default();
        let mut at = 128 * 512;
        loop {
            let (value, size, kind) = (le_u64(file, at), le_u32(file, at + 8), le_u32(file, at + 12));
            if size > 0 {
                let mut content = Vec::new();
                let packed = &file[at + 12..at + 12 + size];
                flate2::read::ZlibDecoder::new(packed).read_to_end(&mut content).unwrap();
                assert_eq!(content.len(), 64 << 10);
                let last = stream.grains.last_key_value().map(|(sector, _)| *sector);
                assert!(last.is_none_or(|last| last < value) && value % 128 == 0, "{last:?}, {value}");
                stream.grains.insert(value, (at / 512, content));
                let end = (at + 12 + size).next_multiple_of(512);
                assert!(file[at + 12 + size..end].iter().all(|byte| *byte == 0));
                at = end;
                continue;
            }
            let body = &file[at + 512..(at + 512 + value * 512).min(file.len())];
            let entries = || body.as_chunks::<4>().0.iter().map(|entry| le_u32(entry, 0)).collect();
            match kind {
                0 => {
                    assert_eq!(at + 512, file.len(), "the end-of-stream marker is not the end");
                    return stream;
                }
                1 => stream.tables.push((at / 512 + 1, entries())),
                2 => stream.directory = Some((at / 512 + 1, entries())),
                3 => stream.footer = Some(body.to_vec()),
                _ => panic!("marker {kind} at {at}"),
            }
            at += 512 + value * 512;
        }
    }
}

#[test]
fn a_vmdk_can_be_read_as_a_stream_and_by_its_tables() {
    let disk = sparse_disk();
    let file = write(output(OutputFormat::Vmdk, disk.size), &disk);
    let stream = Stream::read(&file);
    let mut content = vec![0; usize::try_from(disk.size.0).unwrap().next_multiple_of(64 << 10)];
    for (sector, (_, grain)) in &stream.grains {
        content[sector * 512..][..grain.len()].copy_from_slice(grain);
    }
    let mut expected = vec![0; content.len()];
    for (block, bytes) in &disk.blocks {
        expected[usize::try_from(block * BLOCK.0).unwrap()..][..bytes.len()].copy_from_slice(bytes);
    }
    assert!(content == expected);

    // Header and footer differ in the directory's place only.
    let (directory_at, directory) = stream.directory.unwrap();
    let mut header = file[..512].to_vec();
    assert_eq!(le_u64(&header, 56), usize::MAX);
    header[56..64].copy_from_slice(&(directory_at as u64).to_le_bytes());
    assert!(stream.footer.unwrap() == header);
    // Directory and tables say where each grain is, and no more.
    let tables: BTreeMap<_, _> = stream.tables.into_iter().collect();
    assert_eq!(directory.iter().filter(|table| **table != 0).count(), tables.len());
    assert_eq!(tables.len(), 4);
    let mut told = BTreeMap::new();
    for (number, table) in directory.iter().enumerate().filter(|(_, table)| **table != 0) {
        let entries = tables[table].iter().enumerate().filter(|(_, grain)| **grain != 0);
        told.extend(entries.map(|(entry, grain)| ((number * 512 + entry) * 128, *grain)));
    }
    assert!(told.into_iter().eq(stream.grains.iter().map(|(sector, (at, _))| (*sector, *at))));
    let descriptor = String::from_utf8(file[512..21 * 512].to_vec()).unwrap();
    assert!(descriptor.contains("\nCID=616e2069\nparentCID=ffffffff\ncreateType=\"streamOptimized\"\n"));
    assert!(descriptor.contains(&format!("\nRW {} SPARSE ", disk.size.0 / 512)));
}

/// Grains that compression would only make longer, and fast levels that make them longer than others.
#[test]
fn grains_of_every_level() {
    let mut disk = Disk::new(BLOCK);
    for fill in [Fill::Random, Fill::Text, Fill::Mixed] {
        disk.fill(0, fill, &mut Numbers(5));
        for level in 1..=9 {
            let file = write(Output { level: Some(level), ..output(OutputFormat::Vmdk, disk.size) }, &disk);
            let stream = Stream::read(&file);
            for (sector, (_, grain)) in stream.grains {
                assert!(disk.blocks[&0][sector * 512..][..grain.len()] == grain, "level {level} at {sector}");
            }
        }
    }
}

/// Every reader must take the size for what it is, and Virtual PC's geometry must not be larger.
#[test]
fn footers_of_a_vhd() {
    let disk = sparse_disk();
    let output = output(OutputFormat::Vhd, disk.size);
    let file = write(output, &disk);
    let footer = &file[file.len() - 512..];
    assert!(file[..512] == *footer);
    assert_eq!(&footer[28..32], b"win ");
    assert_eq!(&footer[48..56], disk.size.0.to_be_bytes());
    assert_eq!(&footer[68..84], output.id);
    let [cylinders_high, cylinders_low, heads, track] = footer[56..60] else { panic!() };
    let cylinders = u64::from(u16::from_be_bytes([cylinders_high, cylinders_low]));
    let sectors = cylinders * u64::from(heads) * u64::from(track);
    let cylinder = u64::from(heads) * u64::from(track);
    assert!(sectors <= disk.size.0 / 512 && sectors + cylinder > disk.size.0 / 512);
    for (at, len, checksum) in [(0, 512, 64), (512, 1024, 36)] {
        let mut sealed = file[at..at + len].to_vec();
        seal_vhd(&mut sealed, checksum);
        assert!(file[at..at + len] == sealed);
    }
}

#[test]
fn blocks_of_a_vhd() {
    let disk = sparse_disk();
    let file = write(output(OutputFormat::Vhd, disk.size), &disk);
    let mut end = 5 << 20;
    for block in 0..76 {
        let entry = u32::from_be_bytes(file[1536 + block * 4..][..4].try_into().unwrap());
        let Some(content) = disk.blocks.get(&(block as u64)) else {
            assert_eq!(entry, u32::MAX, "block {block}");
            continue;
        };
        let at = entry as usize * 512;
        assert_eq!(at, end, "block {block}");
        assert!(file[at..at + 512].iter().all(|bits| *bits == 0xFF), "bitmap of block {block}");
        end = at + 512 + (2 << 20);
        assert!(file[at + 512..][..content.len()] == *content, "block {block}");
        assert!(file[at + 512 + content.len()..end].iter().all(|byte| *byte == 0));
    }
    assert_eq!(end + 512, file.len());
}

/// Blocks that were encoded in any order, by many threads, make the same object as those of one.
#[test]
fn encoded_by_many_threads() {
    let mut disk = Disk::new(Bytes::mib(40));
    let mut numbers = Numbers(3);
    for block in 0..20 {
        let fill = FILLS[numbers.below(FILLS.len())];
        disk.fill(block, fill, &mut numbers);
    }
    for format in [OutputFormat::Qcow2 { compression: Compression::Zstd }, OutputFormat::Vmdk] {
        let output = output(format, disk.size);
        let mut writer = OnePassWriter::new(output).unwrap();
        let (encoder, blocks) = (writer.encoder(), &disk.blocks);
        let mut encoded: Vec<_> = std::thread::scope(|scope| {
            let encode = |rest: u64| {
                let mine = blocks.iter().rev().filter(move |(block, _)| **block % 4 == rest);
                mine.map(|(block, bytes)| encoder.encode(Bytes(block * BLOCK.0), bytes).unwrap())
                    .collect::<Vec<_>>()
            };
            let threads: Vec<_> = (0..4).map(|rest| scope.spawn(move || encode(rest))).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        encoded.sort_by_key(berth_image::EncodedBlock::at);
        let mut body = Vec::new();
        for block in &encoded {
            writer.append(block, &mut body).unwrap();
        }
        let head = writer.finish(&mut body).unwrap();
        assert!([head, body].concat() == write(output, &disk), "{format:?}");
    }
}
