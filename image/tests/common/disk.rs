//! Disks in memory, and writing them.
#![allow(dead_code, missing_docs)]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use berth_core::units::Bytes;
use berth_image::{
    BLOCK, ExtentKind, ExtentReader as _, OnePassWriter, Output, Part, PartWriter, Probe, WriteError,
};

use super::Numbers;

/// A disk by its blocks; those that it does not have are zeros.
#[derive(Clone, Debug)]
pub struct Disk {
    pub size: Bytes,
    pub blocks: BTreeMap<u64, Vec<u8>>,
}

/// What a block may hold.
#[derive(Clone, Copy, Debug)]
pub enum Fill {
    Zeros,
    Random,
    Text,
    /// Of each cluster something else, zeros included.
    Mixed,
    /// One byte near its end.
    Speck,
}

pub const FILLS: [Fill; 5] = [Fill::Zeros, Fill::Random, Fill::Text, Fill::Mixed, Fill::Speck];

impl Disk {
    pub fn new(size: Bytes) -> Self {
        Self { size, blocks: BTreeMap::new() }
    }

    /// Fills the block with this number.
    pub fn fill(&mut self, block: u64, fill: Fill, numbers: &mut Numbers) {
        let len = self.size.saturating_sub(Bytes(block * BLOCK.0)).min(BLOCK);
        let mut content = vec![0; usize::try_from(len.0).unwrap()];
        let last = content.len() - 1;
        match fill {
            Fill::Zeros => {}
            Fill::Random => randomise(&mut content, numbers),
            Fill::Text => write_text(&mut content, numbers),
            Fill::Speck => content[last] = 1,
            Fill::Mixed => {
                for cluster in content.chunks_mut(64 << 10) {
                    match numbers.below(4) {
                        0 => {}
                        1 => randomise(cluster, numbers),
                        2 => write_text(cluster, numbers),
                        _ => cluster[..256].fill(7),
                    }
                }
            }
        }
        self.blocks.insert(block, content);
    }

    /// As a sparse file.
    pub fn save(&self, path: &Path) {
        let file = File::create(path).unwrap();
        for (block, bytes) in &self.blocks {
            file.write_all_at(bytes, block * BLOCK.0).unwrap();
        }
        file.set_len(self.size.0).unwrap();
    }

    /// Reads an image by its extents, and checks that they cover this disk in order and hold its content.
    pub async fn check(&self, path: &Path, probe: &Probe) {
        let mut reader = berth_image::open(path, probe).await.unwrap();
        assert_eq!(reader.virtual_size(), self.size);
        let mut at = Bytes(0);
        while let Some(extent) = reader.next_extent(at).await.unwrap() {
            assert_eq!(extent.offset, at);
            let end = extent.offset.saturating_add(extent.len);
            while at < end {
                let block = at.0 / BLOCK.0;
                let len = Bytes((block + 1) * BLOCK.0).min(end).saturating_sub(at);
                let len = usize::try_from(len.0).unwrap();
                let mut found = vec![0; len];
                if extent.kind == ExtentKind::Data {
                    reader.read_at(at, &mut found).await.unwrap();
                }
                let within = usize::try_from(at.0 % BLOCK.0).unwrap();
                match self.blocks.get(&block) {
                    Some(bytes) => assert!(found == bytes[within..within + len], "{at}+{len}"),
                    None => assert!(found.iter().all(|byte| *byte == 0), "{at}+{len}"),
                }
                at = at.saturating_add(Bytes(len as u64));
            }
        }
        assert_eq!(at, self.size);
    }

    /// The first block that is there, at or after this place.
    pub fn next(&self, from: Bytes) -> Option<(Bytes, &[u8])> {
        let next = self.blocks.range(from.0.div_ceil(BLOCK.0)..).next();
        next.map(|(block, bytes)| (Bytes(block * BLOCK.0), bytes.as_slice()))
    }
}

fn randomise(bytes: &mut [u8], numbers: &mut Numbers) {
    for eight in bytes.chunks_mut(8) {
        let number = (numbers.next() >> 8 ^ numbers.next() << 30).to_le_bytes();
        eight.copy_from_slice(&number[..eight.len()]);
    }
}

fn write_text(bytes: &mut [u8], numbers: &mut Numbers) {
    for word in bytes.chunks_mut(8) {
        word.copy_from_slice(&b"a berth for each byte of some image "[numbers.below(28)..][..word.len()]);
    }
}

/// Head and body of the object.
pub fn write(output: Output, disk: &Disk) -> Vec<u8> {
    let mut writer = OnePassWriter::new(output).unwrap();
    let mut body = Vec::new();
    feed(&mut writer, disk, disk.size, &mut body);
    let plan = *writer.plan();
    let head = writer.finish(&mut body).unwrap();
    assert_eq!(Bytes(head.len() as u64), plan.head_len);
    let object = [head, body].concat();
    assert!(Bytes(object.len() as u64) <= plan.worst_case, "{plan:?}: {}", object.len());
    object
}

/// Feeds the writer up to this place, a block's end.
pub fn feed(writer: &mut OnePassWriter, disk: &Disk, until: Bytes, body: &mut Vec<u8>) {
    let encoder = writer.encoder();
    while writer.position() < until {
        let (before, len) = (writer.body_len(), body.len());
        match disk.next(writer.position()) {
            Some((at, content)) if at == writer.position() => {
                writer.append(&encoder.encode(at, content).unwrap(), body).unwrap();
            }
            Some((at, _)) => writer.zeros(at.min(until), body).unwrap(),
            None => writer.zeros(until, body).unwrap(),
        }
        let given = Bytes((body.len() - len) as u64);
        assert_eq!(writer.body_len(), before.saturating_add(given));
        assert!(given <= OnePassWriter::MOST_PER_CALL);
    }
}

/// The object as parts, by number, from writers of which each goes on from a part's state where the former one was given
/// up: after as many parts as `lives` says, some of which are lost.
pub fn write_parts(
    output: Output,
    disk: &Disk,
    numbers: &mut Numbers,
    lives: usize,
) -> BTreeMap<u32, Vec<u8>> {
    let mut uploaded = BTreeMap::new();
    let mut state: Option<Vec<u8>> = None;
    for _ in 0..lives {
        let mut writer = begin(output, state.as_deref());
        // Of some parts only the state of an earlier one is recorded.
        let (steps, recorded) = (numbers.below(60), numbers.below(60));
        for step in 0..steps {
            if writer.position() == disk.size {
                break;
            }
            if let Some(part) = step_parts(&mut writer, disk).unwrap() {
                if step < recorded || state.is_none() {
                    state.clone_from(&part.resume);
                }
                upload(&mut uploaded, &part);
            }
        }
    }
    let mut writer = begin(output, state.as_deref());
    while writer.position() < disk.size {
        if let Some(part) = step_parts(&mut writer, disk).unwrap() {
            upload(&mut uploaded, &part);
        }
    }
    for part in writer.finish().unwrap() {
        assert_eq!(part.resume, None);
        upload(&mut uploaded, &part);
    }
    uploaded
}

fn begin(output: Output, state: Option<&[u8]>) -> PartWriter {
    state.map_or_else(|| PartWriter::new(output), PartWriter::resume).unwrap()
}

/// A part that is uploaded twice must be the same.
fn upload(uploaded: &mut BTreeMap<u32, Vec<u8>>, part: &Part) {
    if let Some(before) = uploaded.insert(part.number, part.bytes.clone()) {
        assert!(before == part.bytes, "part {} differs", part.number);
    }
}

/// One call of the writer.
pub fn step_parts(writer: &mut PartWriter, disk: &Disk) -> Result<Option<Part>, WriteError> {
    match disk.next(writer.position()) {
        Some((at, content)) if at == writer.position() => {
            writer.append(&writer.encoder().encode(at, content).unwrap())
        }
        Some((at, _)) => writer.zeros(at),
        None => writer.zeros(disk.size),
    }
}
