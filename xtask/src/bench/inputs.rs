//! The images that are measured, made once from a fixed seed and kept.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use berth_core::units::Bytes;

use super::measure::succeed;

/// Changes whenever other bytes are made.
const VERSION: u32 = 1;
/// Data and holes alternate in slots of this size.
const SLOT: usize = 1 << 20;
/// What is either random or made of words.
const BLOCK: usize = 4096;
/// Bytes of a word; there are 256 words.
const WORD: usize = 16;

/// One image file.
pub struct Input {
    /// Its name in tables.
    pub name: &'static str,
    /// The qcow2 file.
    pub file: PathBuf,
}

/// All of them, and what they hold.
pub struct Inputs {
    /// What is in every one of them.
    pub raw: PathBuf,
    /// The size of the disk.
    pub virtual_size: Bytes,
    /// The files.
    pub files: Vec<Input>,
}

/// Makes what is not there yet. A name appears when its file is complete.
pub fn prepare(dir: &Path, data_mib: u64) -> anyhow::Result<Inputs> {
    let dir = dir.join(format!("inputs-{VERSION}-{data_mib}"));
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let raw = dir.join("disk.raw");
    make(&raw, |path| Ok(write_disk(path, data_mib)?))?;
    let mut files = Vec::new();
    for (name, file, options) in [("plain", "plain.qcow2", &[][..]), ("zlib", "zlib.qcow2", &["-c"][..])] {
        let file = dir.join(file);
        make(&file, |path| {
            let mut convert = Command::new("qemu-img");
            convert.args(["convert", "-f", "raw", "-O", "qcow2"]).args(options).arg(&raw).arg(path);
            succeed(&mut convert)?;
            // A peer that only decodes leaves nothing to compare: the input itself is compared once.
            succeed(
                Command::new("qemu-img").args(["compare", "-f", "qcow2", "-F", "raw"]).arg(path).arg(&raw),
            )
        })?;
        files.push(Input { name, file });
    }
    Ok(Inputs { raw, virtual_size: Bytes::mib(data_mib * 2), files })
}

fn make(path: &Path, write: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    if path.exists() {
        return Ok(());
    }
    eprintln!("making {}", path.display());
    let part = path.with_extension(format!("part-{}", std::process::id()));
    let written = write(&part).and_then(|()| Ok(fs::rename(&part, path)?));
    if written.is_err() {
        // It may not have come to exist.
        fs::remove_file(&part).ok();
    }
    written.with_context(|| format!("cannot make {}", path.display()))
}

/// A sparse disk: every second slot holds data.
fn write_disk(path: &Path, data_mib: u64) -> io::Result<()> {
    let mut file = BufWriter::with_capacity(SLOT, File::create(path)?);
    let mut content = Content::new(7);
    let mut slot = vec![0; SLOT];
    for number in 0..data_mib {
        content.fill(&mut slot);
        file.seek(SeekFrom::Start(Bytes::mib(number * 2).0))?;
        file.write_all(&slot)?;
    }
    let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.set_len(Bytes::mib(data_mib * 2).0)
}

/// Seeded bytes of which about half compress well; no two blocks are alike.
struct Content {
    state: u64,
    words: Vec<[u8; WORD]>,
}

impl Content {
    fn new(seed: u64) -> Self {
        let mut content = Self { state: seed, words: Vec::new() };
        for _ in 0..256 {
            let mut word = [0; WORD];
            content.random(&mut word);
            content.words.push(word);
        }
        content
    }

    /// Splitmix64 by Sebastiano Vigna, public domain.
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn random(&mut self, bytes: &mut [u8]) {
        for eight in bytes.chunks_exact_mut(8) {
            eight.copy_from_slice(&self.next().to_le_bytes());
        }
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for (number, block) in bytes.chunks_exact_mut(BLOCK).enumerate() {
            if number % 2 == 0 {
                self.random(block);
                continue;
            }
            for words in block.chunks_exact_mut(8 * WORD) {
                let picks = self.next().to_le_bytes();
                for (word, pick) in words.chunks_exact_mut(WORD).zip(picks) {
                    word.copy_from_slice(&self.words[usize::from(pick)]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn the_disk_is_the_same_every_time_and_half_of_it_is_holes() {
        let dir = tempfile::tempdir().expect("a directory");
        let (one, two) = (dir.path().join("1"), dir.path().join("2"));
        write_disk(&one, 4).expect("written");
        write_disk(&two, 4).expect("written");
        let bytes = fs::read(&one).expect("read");
        assert_eq!(bytes, fs::read(&two).expect("read"));
        assert_eq!(bytes.len(), 8 * SLOT);
        assert!(bytes[SLOT..2 * SLOT].iter().all(|byte| *byte == 0));
        assert_ne!(bytes[..SLOT], bytes[2 * SLOT..3 * SLOT], "slots differ");
        let allocated = fs::metadata(&one).expect("there").blocks() * 512;
        assert!(allocated <= Bytes::mib(5).0, "{allocated}");
    }
}
