//! What lies in a block: 4 KiB that say whose they are, so that whatever is read tells where it came from.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The unit of what is written and compared. Unit: bytes.
pub const BLOCK: usize = 4096;

/// What a block holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Content {
    /// Zeros.
    Zero,
    /// The template's block of this number.
    Template(u64),
    /// What was written.
    Stamp {
        /// To which volume: a clone holds what was written to its source.
        volume: String,
        /// To which block.
        block: u64,
        /// In which write.
        sequence: u64,
    },
    /// Nothing of these, or parts of several; how it begins.
    Other(String),
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero => write!(f, "zeros"),
            Self::Template(block) => write!(f, "block {block} of the template"),
            Self::Stamp { volume, block, sequence } => {
                write!(f, "block {block} of write {sequence} to {volume}")
            }
            Self::Other(text) => write!(f, "`{text}`"),
        }
    }
}

impl Content {
    /// The block.
    pub fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Zero => vec![0; BLOCK],
            Self::Template(block) => repeated(&format!("template {block}\n")),
            Self::Stamp { volume, block, sequence } => {
                repeated(&format!("stamp {volume} {block} {sequence}\n"))
            }
            Self::Other(text) => text.clone().into_bytes(),
        }
    }

    /// What a block is.
    pub fn of(bytes: &[u8]) -> Self {
        if bytes.iter().all(|byte| *byte == 0) {
            return Self::Zero;
        }
        let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let line = String::from_utf8_lossy(&line[..line.len().min(80)]).into_owned();
        let found = match line.split(' ').collect::<Vec<_>>()[..] {
            ["template", block] => block.parse().ok().map(Self::Template),
            ["stamp", volume, block, sequence] => block
                .parse()
                .ok()
                .zip(sequence.parse().ok())
                .map(|(block, sequence)| Self::Stamp { volume: volume.to_owned(), block, sequence }),
            _ => None,
        };
        found.filter(|found| found.bytes() == bytes).unwrap_or(Self::Other(line))
    }
}

fn repeated(text: &str) -> Vec<u8> {
    text.bytes().cycle().take(BLOCK).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_tells_what_it_is_and_a_torn_one_is_something_else() {
        let stamp = Content::Stamp { volume: "v".into(), block: 7, sequence: 3 };
        for content in [Content::Zero, Content::Template(9), stamp.clone()] {
            assert_eq!(Content::of(&content.bytes()), content);
        }
        let mut torn = stamp.bytes();
        torn[2048..].fill(0);
        assert!(matches!(Content::of(&torn), Content::Other(_)));
    }
}
