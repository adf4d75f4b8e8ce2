//! The stages of an import: which there are, how far it is over all of them, and what they occupy at most.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::units::Bytes;

/// One stage. Each ends with something that a crash cannot undo.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Stage {
    /// The source's bytes come into the reservation.
    Fetch,
    /// A tool turns them into a raw image beside them.
    Convert,
    /// The image's chunks go into the store, those that it lacks.
    Upload,
    /// Every chunk that the index names is listed with its size.
    Verify,
    /// The index, then the manifest.
    Publish,
}

impl Stage {
    /// Its share of the whole, of what those of the same import add up to.
    const fn weight(self) -> u64 {
        match self {
            Self::Fetch => 35,
            Self::Convert => 15,
            Self::Upload => 50,
            Self::Verify => 8,
            Self::Publish => 2,
        }
    }

    /// The name, as in status.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fetch => "Fetch",
            Self::Convert => "Convert",
            Self::Upload => "Upload",
            Self::Verify => "Verify",
            Self::Publish => "Publish",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which way an image takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Route {
    /// It is read where it lies, and nothing of it is staged.
    Direct,
    /// Its source comes into the reservation first.
    Staged,
}

/// What is known of a source before anything is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Shape {
    /// The source's bytes.
    pub source_bytes: Bytes,
    /// The size of the disk.
    pub virtual_size: Bytes,
    /// True if a tool must convert it.
    pub converted: bool,
    /// True if the source is read where it lies, and not fetched.
    pub in_place: bool,
    /// The chunk size of the image store that it goes into; `None` if it goes into none.
    pub chunk_size: Option<Bytes>,
}

/// Bytes of an index and of the journal of stored sizes, per item: 40 and 4.
const INDEX_ENTRY: u64 = 44;
/// What small files and the file system's own blocks may add.
const SLACK: Bytes = Bytes::mib(4);

impl Shape {
    /// The stages, in order.
    pub fn stages(&self) -> Vec<Stage> {
        let all = [Stage::Fetch, Stage::Convert, Stage::Upload, Stage::Verify, Stage::Publish];
        all.into_iter()
            .filter(|stage| match stage {
                Stage::Fetch => !self.in_place,
                Stage::Convert => self.converted,
                _ => true,
            })
            .collect()
    }

    /// The most that the work occupies at once: the fetched source, the raw image that a tool may write in full, and the
    /// index of an image without a single hole. A multiple of 1 MiB; 0 if nothing is staged. Saturates.
    pub fn peak_bytes(&self) -> Bytes {
        let source = if self.in_place { Bytes::ZERO } else { self.source_bytes };
        let raw = if self.converted { self.virtual_size } else { Bytes::ZERO };
        let chunks = self.chunk_size.map_or(0, |size| self.virtual_size.0.div_ceil(size.0.max(1)));
        let index = Bytes(chunks.saturating_mul(INDEX_ENTRY));
        match [source, raw, index].into_iter().sum() {
            Bytes::ZERO => Bytes::ZERO,
            staged => staged.saturating_add(SLACK).round_up(Bytes::mib(1)),
        }
    }

    /// How far the whole is, 0 to 99, when `done` of `total` bytes of `stage` are done. 100 is said only of what is
    /// durable, by those who know.
    pub fn percent(&self, stage: Stage, done: Bytes, total: Bytes) -> u8 {
        let stages = self.stages();
        let whole: u64 = stages.iter().map(|s| s.weight()).sum();
        let before: u64 = stages.iter().filter(|s| **s < stage).map(|s| s.weight()).sum();
        let (done, total) = (u128::from(done.0.min(total.0)), u128::from(total.0.max(1)));
        let within = u128::from(stage.weight()) * done * 100 / total;
        let percent = (u128::from(before) * 100 + within) / u128::from(whole.max(1));
        u8::try_from(percent.min(99)).unwrap_or(99)
    }

    /// Which stage it is, counted from 1, and how many there are.
    pub fn position(&self, stage: Stage) -> (u8, u8) {
        let stages = self.stages();
        let index = stages.iter().take_while(|s| **s < stage).count() + 1;
        (u8::try_from(index).unwrap_or(u8::MAX), u8::try_from(stages.len()).unwrap_or(u8::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(converted: bool, in_place: bool) -> Shape {
        Shape {
            source_bytes: Bytes::mib(300),
            virtual_size: Bytes::gib(2),
            converted,
            in_place,
            chunk_size: Some(Bytes::kib(256)),
        }
    }

    #[test]
    fn stages_follow_the_shape() {
        assert_eq!(shape(false, false).stages().len(), 4);
        assert_eq!(shape(true, false).stages().len(), 5);
        assert_eq!(shape(false, true).stages(), [Stage::Upload, Stage::Verify, Stage::Publish]);
        assert_eq!(shape(true, false).position(Stage::Upload), (3, 5));
        assert_eq!(shape(false, false).position(Stage::Upload), (2, 4));
    }

    #[test]
    fn the_peak_covers_all_files_at_once() {
        assert_eq!(shape(false, false).peak_bytes(), Bytes::mib(305));
        assert_eq!(shape(true, false).peak_bytes(), Bytes::mib(305 + 2048));
        assert_eq!(shape(false, true).peak_bytes(), Bytes::mib(5));
        let object = |in_place| Shape { chunk_size: None, ..shape(false, in_place) };
        assert_eq!(object(false).peak_bytes(), Bytes::mib(304));
        assert_eq!(object(true).peak_bytes(), Bytes::ZERO, "straight into an object");
        let largest = Shape { virtual_size: Bytes(u64::MAX), ..shape(true, false) };
        assert!(largest.peak_bytes().0 >= u64::MAX - (1 << 20));
    }

    #[test]
    fn percent_rises_over_all_stages_and_stays_below_100() {
        for converted in [false, true] {
            let shape = shape(converted, false);
            let mut last = 0;
            for stage in shape.stages() {
                for done in 0..=10 {
                    let now = shape.percent(stage, Bytes(done), Bytes(10));
                    assert!(now >= last, "{stage} {done}: {now} < {last}");
                    last = now;
                }
            }
            assert_eq!(last, 99);
        }
        assert_eq!(shape(false, false).percent(Stage::Fetch, Bytes(5), Bytes(0)), 0);
    }
}
