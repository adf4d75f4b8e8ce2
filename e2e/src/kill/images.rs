//! Disk images whose data no compression shortens, in the formats that imports differ by; made once per machine.

use std::env;
use std::fs::{self, File};
use std::io::{self, BufWriter, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use berth_testkit::vhdx::name_log;

use crate::image::{self, ImageError};
use crate::seeded::Seeded;

/// Changed whenever an image of the same name would have another content.
const VERSION: u32 = 1;
/// 1 MiB, in bytes.
const MIB: u64 = 1 << 20;

/// One disk in three formats.
#[derive(Debug, Clone)]
pub struct Images {
    /// Sparse.
    pub raw: PathBuf,
    /// Not compressed.
    pub qcow2: PathBuf,
    /// Of the kind that a tool converts.
    pub vhdx: PathBuf,
    /// Bytes of data: holes not counted.
    pub data: u64,
    /// The size of the disk in bytes.
    pub virtual_size: u64,
}

/// The images with `data_mib` MiB of data, in two parts with a hole between and one after, chosen by `seed`; from the
/// user's folder for such things, or made there.
///
/// # Errors
/// [`ImageError`].
pub fn obtain(data_mib: u64, seed: u64) -> Result<Images, ImageError> {
    let dir = folder();
    fs::create_dir_all(&dir).map_err(|source| ImageError::File { path: dir.clone(), source })?;
    let name = |extension: &str| dir.join(format!("random-v{VERSION}-{data_mib}-{seed}.{extension}"));
    let virtual_size = (data_mib + data_mib / 4) * MIB;
    let images = Images {
        raw: name("raw"),
        qcow2: name("qcow2"),
        vhdx: name("vhdx"),
        data: data_mib * MIB,
        virtual_size,
    };
    made(&images.raw, |path| {
        let written = write_raw(path, data_mib, virtual_size, seed);
        written.map_err(|source| ImageError::File { path: path.to_owned(), source })
    })?;
    for (format, target) in [("qcow2", &images.qcow2), ("vhdx", &images.vhdx)] {
        made(target, |path| {
            let mut convert = Command::new("qemu-img");
            convert.args(["convert", "-q", "-f", "raw", "-O", format]);
            image::run(convert.args([&images.raw, &path.to_owned()]))?;
            let named = if format == "vhdx" { name_log(path) } else { Ok(()) };
            named.map_err(|source| ImageError::File { path: path.to_owned(), source })
        })?;
    }
    Ok(images)
}

/// `${XDG_CACHE_HOME:-$HOME/.cache}/berth/images`, or a folder for all where neither is set.
fn folder() -> PathBuf {
    let home = || env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let base = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
    base.unwrap_or_else(env::temp_dir).join("berth/images")
}

/// Makes a file under another name first, so that it is whole wherever it is seen.
fn made(path: &Path, make: impl FnOnce(&Path) -> Result<(), ImageError>) -> Result<(), ImageError> {
    if path.is_file() {
        return Ok(());
    }
    let unfinished = path.with_extension(format!("{}.unfinished", std::process::id()));
    make(&unfinished)?;
    fs::rename(&unfinished, path).map_err(|source| ImageError::File { path: path.to_owned(), source })
}

fn write_raw(path: &Path, data_mib: u64, virtual_size: u64, seed: u64) -> io::Result<()> {
    let mut seeded = Seeded::new(seed);
    let file = File::create(path)?;
    file.set_len(virtual_size)?;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    let mut piece = vec![0_u8; 1 << 20];
    for number in 0..data_mib {
        if number == data_mib / 2 {
            file.seek(SeekFrom::Start((number + data_mib / 8) * MIB))?;
        }
        for word in piece.chunks_exact_mut(8) {
            word.copy_from_slice(&seeded.draw().to_le_bytes());
        }
        file.write_all(&piece)?;
    }
    file.flush()
}
