//! Content that is no image which can be imported, named so that people know what to do.

use berth_core::units::Bytes;

use super::Refusal;
use super::source::{Source, Stop};

/// Magic numbers at the start of the file.
const MAGICS: &[(&[u8], &str)] = &[
    (b"\x1f\x8b", "gzip-compressed data"),
    (b"\xfd7zXZ\0", "xz-compressed data"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed data"),
    (b"BZh", "bzip2-compressed data"),
    (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"QFI\xfb\0\0\0\x01", "a qcow image of version 1"),
    (b"QED\0", "a QED image"),
    (b"WithoutFreeSpace", "a Parallels image"),
    (b"WithouFreSpacExt", "a Parallels image"),
    (b"Bochs Virtual HD Image", "a Bochs image"),
    (b"LUKS\xba\xbe", "a LUKS container"),
    (b"<?xml", "an XML document"),
    (b"<!DOCTYPE", "an HTML document"),
    (b"<html", "an HTML document"),
];

/// Refuses what is recognised as something else than a disk. `head` is the first 512 bytes, or all there are.
///
/// A bootable disk can also be a CD image; such a one is imported by giving its format as raw.
pub(super) fn refuse(head: &[u8], source: &dyn Source) -> Result<(), Stop> {
    let unsupported = |name| Err(Stop::Refused(Refusal::UnsupportedFormat { name }));
    if let Some((_, name)) = MAGICS.iter().find(|(magic, _)| head.starts_with(magic)) {
        return unsupported(name);
    }
    if head.get(64..68) == Some(&[0x7f, 0x10, 0xda, 0xbe]) {
        return unsupported("a VDI image");
    }
    if head.get(257..262) == Some(b"ustar") {
        return unsupported("a tar archive (perhaps an OVA)");
    }
    // ECMA-119: the volume descriptors begin with sector 16 of 2048 bytes.
    match source.up_to(Bytes(32769), Bytes(5)) {
        Ok(identifier) if identifier == b"CD001" => unsupported("an ISO 9660 image"),
        Ok(_) | Err(Stop::NotSampled { .. }) => Ok(()),
        Err(stop) => Err(stop),
    }
}
