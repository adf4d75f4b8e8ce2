//! Values that people and scripts give, from text into domain types. What is wrong with one is told as a phrase that can follow
//! the name of its flag or field.

use std::path::{Component, Path, PathBuf};

use berth_api::fields::Quantity;
use berth_core::ids::{NodeName, PoolName, Uid, is_uid};
use berth_core::thin::BlockSize;
use berth_core::units::Bytes;

/// The largest blocks of a kernel pool.
const MAX_BLOCK: Bytes = Bytes::mib(1);

/// A node's name: 1 to 253 lower-case letters, digits, dashes and dots.
pub fn node_name(text: &str) -> Result<NodeName, String> {
    let valid = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    if text.is_empty() || text.len() > 253 || !text.bytes().all(valid) {
        return Err("1 to 253 lower-case letters, digits, dashes and dots".to_owned());
    }
    Ok(NodeName::from(text))
}

/// A pool's name: what Kubernetes takes as one, because it is also the name of a directory.
pub fn pool_name(text: &str) -> Result<PoolName, String> {
    let end = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let label = |label: &str| {
        let bytes = label.as_bytes();
        let ends = bytes.first().is_some_and(|b| end(*b)) && bytes.last().is_some_and(|b| end(*b));
        ends && bytes.iter().all(|b| end(*b) || *b == b'-')
    };
    if text.len() > 253 || !text.split('.').all(label) {
        return Err(
            "1 to 253 lower-case letters, digits, dashes and dots, with a letter or digit at each end of each part"
                .to_owned(),
        );
    }
    Ok(PoolName::from(text))
}

/// A UID: 1 to 64 lower-case letters, digits and dashes.
pub fn uid(text: &str) -> Result<Uid, String> {
    if !is_uid(text) {
        return Err("1 to 64 lower-case letters, digits and dashes".to_owned());
    }
    Ok(Uid::from(text))
}

/// A UID for something new: a UUID, because device names are made of it.
pub fn new_uid(text: &str) -> Result<Uid, String> {
    match uuid::Uuid::try_parse(text) {
        Ok(uuid) if uuid.hyphenated().to_string() == text => Ok(Uid::from(text)),
        _ => Err("it must be a UUID of lower-case hexadecimal digits".to_owned()),
    }
}

/// A size above zero: a Kubernetes quantity of bytes.
pub fn size(text: &str) -> Result<Bytes, String> {
    match berth_api::parse::bytes("", &Quantity(text.to_owned())) {
        Ok(Bytes::ZERO) => Err("it must be above zero".to_owned()),
        Ok(bytes) => Ok(bytes),
        Err(_) => Err("not a quantity of bytes such as `10Gi`".to_owned()),
    }
}

/// The size of a kernel pool's blocks.
pub fn block_size(text: &str) -> Result<Bytes, String> {
    check_block(size(text)?)
}

/// Refuses what blocks of a kernel pool cannot be.
pub fn check_block(bytes: Bytes) -> Result<Bytes, String> {
    let good = BlockSize::new(bytes).is_ok() && bytes.0.is_power_of_two() && bytes <= MAX_BLOCK;
    if good { Ok(bytes) } else { Err("it must be a power of two from 64Ki to 1Mi".to_owned()) }
}

/// A path, made absolute: what opens it may work in another directory.
pub fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = std::path::absolute(text).map_err(|error| error.to_string())?;
    check_path(&path)?;
    Ok(path)
}

/// Refuses a path that is not absolute, or goes up.
pub fn check_path(path: &Path) -> Result<(), String> {
    if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
        return Err("it must be an absolute path without `..`".to_owned());
    }
    Ok(())
}

/// The name of an LVM volume group.
pub fn volume_group(text: &str) -> Result<String, String> {
    let valid = |b: u8| b.is_ascii_alphanumeric() || b"+_.-".contains(&b);
    let bad = matches!(text, "" | "." | "..") || text.len() > 127 || text.starts_with('-');
    if bad || !text.bytes().all(valid) {
        return Err("not a name of a volume group".to_owned());
    }
    Ok(text.to_owned())
}

/// `KEY=VALUE`, without control characters.
pub fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() && !text.chars().any(char::is_control) => {
            Ok((key.to_owned(), value.to_owned()))
        }
        _ => Err("it must be KEY=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_node_or_pool_has_are_refused() {
        assert!(node_name("").is_err() && node_name("a b").is_err() && node_name("N1").is_err());
        assert_eq!(node_name("n-1.example"), Ok(NodeName::from("n-1.example")));
        assert_eq!(pool_name("fast-1.local"), Ok(PoolName::from("fast-1.local")));
        for bad in ["", ".", "..", "../x", "a/b", "a..b", "-a", "a-", "A", "a\0"] {
            assert!(pool_name(bad).is_err(), "{bad}");
        }
        assert!(uid("0f8fad5b-d9cb-469f-a165-70867728950e").is_ok());
        assert!(new_uid("0f8fad5b-d9cb-469f-a165-70867728950e").is_ok());
        for bad in ["u", "0f8fad5bd9cb469fa16570867728950e", "0F8FAD5B-d9cb-469f-a165-70867728950e"] {
            assert!(new_uid(bad).is_err(), "{bad}");
        }
        assert!(uid("").is_err() && uid("A").is_err() && uid("../x").is_err());
    }

    #[test]
    fn sizes_are_quantities_above_zero() {
        assert_eq!(size("10Gi"), Ok(Bytes::gib(10)));
        assert_eq!(size("1.5Ki"), Ok(Bytes(1536)));
        for bad in ["", "0", "much", "-1", "10g", "10 Gi"] {
            assert!(size(bad).is_err(), "{bad}");
        }
        assert_eq!(block_size("256Ki"), Ok(Bytes::kib(256)));
        for bad in ["32Ki", "96Ki", "2Mi", "0"] {
            assert!(block_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn paths_are_absolute_and_never_go_up() {
        assert!(absolute("disk.qcow2").unwrap().is_absolute());
        assert!(absolute("/a/../b").is_err() && absolute("").is_err());
        assert!(check_path(Path::new("relative")).is_err());
    }

    #[test]
    fn groups_and_labels() {
        assert!(volume_group("vg0").is_ok());
        for bad in ["", "..", "-x", "a/b", "a b"] {
            assert!(volume_group(bad).is_err(), "{bad}");
        }
        assert_eq!(label("owner=ann=x"), Ok(("owner".to_owned(), "ann=x".to_owned())));
        assert!(label("owner").is_err() && label("=x").is_err() && label("a=\n").is_err());
    }
}
