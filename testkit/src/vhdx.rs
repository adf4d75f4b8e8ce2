//! VHDX images that only a tool reads.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Where the two headers are, in bytes, and how long each is.
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const HEADER: usize = 4096;

/// Names a log, which is empty, in both headers of a VHDX: readers that replay none leave it to a tool then.
/// Source: \[MS-VHDX\] 2.2.2.
///
/// # Errors
/// When the file cannot be read or written.
pub fn name_log(vhdx: &Path) -> io::Result<()> {
    let image = OpenOptions::new().read(true).write(true).open(vhdx)?;
    for at in HEADERS {
        let mut header = [0; HEADER];
        image.read_exact_at(&mut header, at)?;
        header[48..64].fill(7);
        header[4..8].fill(0);
        let sum = crc32c(&header);
        header[4..8].copy_from_slice(&sum.to_le_bytes());
        image.write_all_at(&header, at)?;
    }
    Ok(())
}

/// CRC-32C, as headers carry it over themselves.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_value_of_crc_32c() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }
}
