//! Small images of every kind of layout, made by hand or by our writers, with what they hold and where their tables are.
#![allow(dead_code, missing_docs)]

use std::ops::Range;

use berth_core::units::Bytes;
use berth_image::{Compression, Output, OutputFormat};

use super::disk::{Disk, Fill, write};
use super::{Numbers, descriptor, put, qcow2_header, seal_vhd, seal_vhdx, vhdx};

pub struct Image {
    pub name: &'static str,
    pub bytes: Vec<u8>,
    pub content: Vec<u8>,
    /// Where headers and tables are.
    pub tables: Vec<Range<usize>>,
    /// Makes checksums right again.
    pub seal: fn(&mut [u8]),
}

pub fn all() -> Vec<Image> {
    let mut images = vec![subclusters(), version2(), sparse_vmdk(), block_vhdx(), bitmap_vhd()];
    for (name, compression) in
        [("plain", Compression::None), ("zlib", Compression::Zlib), ("zstd", Compression::Zstd)]
    {
        let (bytes, content) = written(OutputFormat::Qcow2 { compression });
        let l1 = usize::try_from(u64::from_be_bytes(bytes[40..48].try_into().unwrap())).unwrap();
        let table = u64::from_be_bytes(bytes[l1..l1 + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
        let table = usize::try_from(table).unwrap();
        let tables = vec![0..112, l1..l1 + 8, table..table + 24 * 8];
        images.push(Image { name, bytes, content, tables, seal: |_| () });
    }
    let (bytes, content) = written(OutputFormat::Vmdk);
    let end = bytes.len();
    // The first marker and stream, and all tables: the last grain table, directory, footer.
    let tables =
        vec![0..80, 512..700, 65536..65600, end - 4608..end - 4500, end - 2048..end - 2040, end - 1536..end];
    images.push(Image { name: "stream", bytes, content, tables, seal: |_| () });
    images
}

/// 3 MiB and a sector, of which the last MiB is zeros.
fn written(format: OutputFormat) -> (Vec<u8>, Vec<u8>) {
    let mut disk = Disk::new(Bytes((3 << 20) + 512));
    disk.fill(0, Fill::Mixed, &mut Numbers(9));
    let mut content = disk.blocks[&0].clone();
    content.resize((3 << 20) + 512, 0);
    (write(Output { format, virtual_size: disk.size, level: None, id: [1; 16] }, &disk), content)
}

/// qcow2 with clusters of 16 KiB in subclusters of 512 bytes, which are zeros, data, or not there.
fn subclusters() -> Image {
    const CLUSTER: usize = 16 << 10;
    let mut numbers = Numbers(21);
    let mut bytes = qcow2_header(14, 30 * CLUSTER as u64 + 700, 1);
    put(&mut bytes, 72, &16_u64.to_be_bytes());
    bytes.resize(3 * CLUSTER, 0);
    put(&mut bytes, CLUSTER, &((2 * CLUSTER as u64) | (1 << 63)).to_be_bytes());
    let mut content = vec![0; 31 * CLUSTER];
    for cluster in 0..31 {
        let host = bytes.len();
        let data: Vec<u8> = (0..CLUSTER).map(|_| numbers.next().to_le_bytes()[1] | 1).collect();
        let (mut data_bits, mut zero_bits) = (0_u64, 0_u64);
        for part in 0..32 {
            match if cluster < 4 { 0 } else { numbers.below(4) } {
                0 | 1 => {
                    data_bits |= 1 << part;
                    let range = part * 512..(part + 1) * 512;
                    content[cluster * CLUSTER..][range.clone()].copy_from_slice(&data[range]);
                }
                2 => zero_bits |= 1 << part,
                _ => {}
            }
        }
        bytes.extend(data);
        let entry = 2 * CLUSTER + 16 * cluster;
        put(&mut bytes, entry, &(host as u64 | 1 << 63).to_be_bytes());
        put(&mut bytes, entry + 8, &(data_bits | zero_bits << 32).to_be_bytes());
    }
    // The padding to a whole sector is zeros, whatever the cluster holds.
    content.truncate(30 * CLUSTER + 1024);
    content[30 * CLUSTER + 700..].fill(0);
    let tables = vec![0..112, CLUSTER..CLUSTER + 8, 2 * CLUSTER..2 * CLUSTER + 31 * 16];
    Image { name: "subclusters", bytes, content, tables, seal: |_| () }
}

/// qcow2 of version 2 with clusters of 512 bytes, in another order than on the disk; a table describes 64 of them.
fn version2() -> Image {
    let mut numbers = Numbers(22);
    let mut bytes = qcow2_header(9, 100 << 9, 2);
    put(&mut bytes, 4, &2_u32.to_be_bytes());
    bytes[72..].fill(0);
    bytes.resize(4 << 9, 0);
    put(&mut bytes, 512, &1024_u64.to_be_bytes());
    put(&mut bytes, 520, &1536_u64.to_be_bytes());
    let mut content = vec![0; 100 << 9];
    for cluster in (0..100).rev().filter(|cluster| cluster % 5 != 1) {
        let data: Vec<u8> = (0..512).map(|_| numbers.next().to_le_bytes()[1]).collect();
        let host = bytes.len() as u64;
        put(&mut bytes, 1024 + 8 * cluster, &host.to_be_bytes());
        content[cluster << 9..][..512].copy_from_slice(&data);
        bytes.extend(data);
    }
    Image { name: "version2", bytes, content, tables: vec![0..80, 512..528, 1024..1024 + 800], seal: |_| () }
}

/// vmdk with grains of 4 KiB and tables of 8 entries, with grains that are zeros.
fn sparse_vmdk() -> Image {
    let text = descriptor("monolithicSparse", &["RW 1001 SPARSE \"disk.vmdk\""], "");
    let mut bytes = super::vmdk(&text, 1001, None);
    put(&mut bytes, 8, &7_u32.to_le_bytes());
    put(&mut bytes, 20, &8_u64.to_le_bytes());
    put(&mut bytes, 44, &8_u32.to_le_bytes());
    let mut content = vec![0; 1001 << 9];
    let mut numbers = Numbers(23);
    // The directory at sector 30, its tables from sector 31 on.
    for table in (0..16).filter(|table| *table != 9) {
        put(&mut bytes, 30 * 512 + 4 * table, &(31 + u32::try_from(table).unwrap()).to_le_bytes());
        for entry in 0..8 {
            let grain = table * 8 + entry;
            if grain * 8 >= 1001 {
                break;
            }
            let value = match numbers.below(4) {
                0 => 0,
                1 => 1,
                _ => {
                    let data: Vec<u8> = (0..4096).map(|_| numbers.next().to_le_bytes()[1]).collect();
                    let len = 4096.min(content.len() - grain * 4096);
                    content[grain * 4096..][..len].copy_from_slice(&data[..len]);
                    let sector = u32::try_from(bytes.len() / 512).unwrap();
                    bytes.extend(data);
                    sector
                }
            };
            put(&mut bytes, (31 + table) * 512 + 4 * entry, &value.to_le_bytes());
        }
    }
    let tables = (0..16).map(|table| (31 + table) * 512..(31 + table) * 512 + 32);
    let tables = [0..80, 512..700, 30 * 512..30 * 512 + 64].into_iter().chain(tables).collect();
    Image { name: "sparse", bytes, content, tables, seal: |_| () }
}

/// VHDX with blocks of 1 MiB in each state.
fn block_vhdx() -> Image {
    let mut bytes = vhdx((9 << 20) - 512, 0, 1);
    let mut content = vec![0; (9 << 20) - 512];
    for (block, state) in [6, 6, 0, 1, 2, 3, 6, 0, 6].into_iter().enumerate() {
        let mut entry = state;
        if state == 6 {
            let at = bytes.len();
            entry |= at as u64;
            bytes.resize(at + (1 << 20), u8::try_from(block + 1).unwrap());
            let end = content.len().min((block + 1) << 20);
            content[block << 20..end].fill(u8::try_from(block + 1).unwrap());
        }
        put(&mut bytes, (2 << 20) + 8 * block, &entry.to_le_bytes());
    }
    let metadata = 1 << 20;
    let tables = vec![
        65_536..65_620,
        131_072..131_150,
        196_608..196_690,
        metadata..metadata + 144,
        metadata + 65_536..metadata + 65_556,
        2 << 20..(2 << 20) + 72,
    ];
    Image { name: "vhdx", bytes, content, tables, seal: seal_vhdx }
}

/// VHD of which a block has sectors that were never written, whatever lies there.
fn bitmap_vhd() -> Image {
    let (mut bytes, mut content) = written(OutputFormat::Vhd);
    let table = usize::try_from(u64::from_be_bytes(bytes[528..536].try_into().unwrap())).unwrap();
    let bitmap = 512 * u32::from_be_bytes(bytes[table..table + 4].try_into().unwrap()) as usize;
    let mut numbers = Numbers(24);
    for byte in 30..512 {
        let bits = numbers.next().to_le_bytes()[0];
        bytes[bitmap + byte] = bits;
        for bit in (0..8).filter(|bit| bits & 0x80 >> bit == 0) {
            content[(byte * 8 + bit) * 512..][..512].fill(0);
        }
    }
    let end = bytes.len();
    let tables = vec![0..80, 512..600, table..table + 8, bitmap..bitmap + 64, end - 512..end - 430];
    Image { name: "vhd", bytes, content, tables, seal: seal_all_vhd }
}

fn seal_all_vhd(bytes: &mut [u8]) {
    let end = bytes.len() - 512;
    seal_vhd(&mut bytes[end..], 64);
    seal_vhd(&mut bytes[512..1536], 36);
    seal_vhd(&mut bytes[..512], 64);
}
