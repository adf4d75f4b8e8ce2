//! What each part of a volume reads, and where that differs from another volume: composed from streams, part by part, so
//! that a volume of any size is told in the memory of a few parts.
//!
//! **Guarantees.** What is told of a volume is ascending, without gaps and without overlaps, and together the whole volume.
//! Neighbours that read the same are told as one.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::units::Bytes;

/// A range of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its first byte.
    pub offset: Bytes,
    /// Its length.
    pub length: Bytes,
}

impl Extent {
    /// The first byte behind it.
    pub const fn end(&self) -> Bytes {
        self.offset.saturating_add(self.length)
    }
}

/// A part of a volume. Unit: bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MapLine {
    /// Where it begins.
    pub offset: Bytes,
    /// How long it is.
    pub length: Bytes,
    /// What it reads.
    pub from: MapFrom,
}

impl MapLine {
    /// The first byte behind it.
    pub const fn end(&self) -> Bytes {
        self.offset.saturating_add(self.length)
    }
}

/// Where the bytes of a part of a volume come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum MapFrom {
    /// Blocks of its own.
    Own,
    /// What it started from: never written here, or discarded since.
    Origin,
    /// Nowhere: zeros.
    Zero,
    /// It is not different from what it is compared with. In comparisons only.
    Same,
}

/// What is known of a part of a volume that is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// It has blocks of its own; in a comparison, others than the other volume.
    Own,
    /// It has the same blocks as the volume that it is compared with.
    Shared,
    /// It has none, and the volume that it is compared with has: what it reads is its origin's again.
    Back,
}

/// A stream that is not ascending, or overlaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("a part at {offset} is told after everything before {at}")]
pub struct Disorder {
    /// Where the part begins.
    pub offset: Bytes,
    /// What was told already.
    pub at: Bytes,
}

/// Composes what a volume reads from the parts that it holds itself and the parts that its origin holds. Both streams are
/// ascending and disjoint; what neither holds is zeros.
#[derive(Debug)]
pub struct Composer<O, E> {
    size: Bytes,
    /// The size of the volume that it is compared with.
    compared: Option<Bytes>,
    origin: O,
    /// What the origin holds next.
    below: Option<Extent>,
    at: Bytes,
    pending: Option<MapLine>,
    each: E,
}

impl<O: Iterator<Item = Extent>, E: FnMut(MapLine)> Composer<O, E> {
    /// For all of a volume of `size`. What is told goes to `each`.
    pub fn map(size: Bytes, origin: O, each: E) -> Self {
        Self { size, compared: None, origin, below: None, at: Bytes::ZERO, pending: None, each }
    }

    /// The same, compared with a volume of the size `with` that has the same origin. What lies behind the end of that one
    /// differs from it, whatever it is.
    pub fn comparison(size: Bytes, with: Bytes, origin: O, each: E) -> Self {
        Self { compared: Some(with), ..Self::map(size, origin, each) }
    }

    /// Takes the next part of the volume's own stream. What reaches beyond the volume's end is left out.
    ///
    /// # Errors
    /// [`Disorder`], before anything is told of the part.
    pub fn part(&mut self, extent: Extent, held: Held) -> Result<(), Disorder> {
        if extent.offset < self.at.min(self.size) {
            return Err(Disorder { offset: extent.offset, at: self.at });
        }
        self.gap(extent.offset);
        let end = extent.end().min(self.size);
        match (held, self.compared) {
            (Held::Own, _) | (Held::Shared, None) => self.tell(end, MapFrom::Own),
            (Held::Shared, Some(with)) => {
                self.tell(end.min(with), MapFrom::Same);
                self.tell(end, MapFrom::Own);
            }
            (Held::Back, _) => self.tell_below(end),
        }
        Ok(())
    }

    /// Tells the rest.
    pub fn finish(mut self) {
        self.gap(self.size);
        if let Some(last) = self.pending.take() {
            (self.each)(last);
        }
    }

    /// Nothing is held up to `end`: in a comparison, by neither.
    fn gap(&mut self, end: Bytes) {
        let end = end.min(self.size);
        if let Some(with) = self.compared {
            self.tell(end.min(with), MapFrom::Same);
        }
        self.tell_below(end);
    }

    /// What the origin has, up to `end`.
    fn tell_below(&mut self, end: Bytes) {
        while self.at < end {
            let at = self.at;
            let next = self.below.take().or_else(|| self.origin.next());
            let Some(extent) = next else { return self.tell(end, MapFrom::Zero) };
            if extent.end() <= at {
                continue;
            }
            self.below = Some(extent);
            self.tell(extent.offset.min(end), MapFrom::Zero);
            self.tell(extent.end().min(end), MapFrom::Origin);
        }
    }

    /// Everything up to `end`; nothing if that was told.
    fn tell(&mut self, end: Bytes, from: MapFrom) {
        if end <= self.at {
            return;
        }
        let (offset, length) = (self.at, end.saturating_sub(self.at));
        self.at = end;
        if let Some(last) = self.pending.as_mut().filter(|last| last.from == from) {
            last.length = last.length.saturating_add(length);
            return;
        }
        if let Some(last) = self.pending.replace(MapLine { offset, length, from }) {
            (self.each)(last);
        }
    }
}

/// A part of a file that has blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where it lies in the file.
    pub extent: Extent,
    /// Where its blocks lie on the disk below, in bytes; `None` if that is not known, or not for long.
    pub place: Option<Bytes>,
}

impl Run {
    /// The place of the byte at `at`, which lies within it.
    fn place_of(&self, at: Bytes) -> Option<Bytes> {
        Some(self.place?.saturating_add(at.saturating_sub(self.extent.offset)))
    }
}

/// Compares two files by where their blocks lie: those at the same place are the same blocks. Each part of which either has
/// blocks goes to `each`, ascending and disjoint, as it is in `new`.
///
/// # Errors
/// The first one of the streams.
pub fn compare<X>(
    old: impl Iterator<Item = Result<Run, X>>,
    new: impl Iterator<Item = Result<Run, X>>,
    mut each: impl FnMut(Extent, Held) -> Result<(), X>,
) -> Result<(), X> {
    let (mut olds, mut news) = (old.peekable(), new.peekable());
    let mut at = Bytes::ZERO;
    loop {
        let (before, now) = (front(&mut olds, at)?, front(&mut news, at)?);
        let starts = [before, now].into_iter().flatten().map(|run| run.extent.offset.max(at));
        let Some(start) = starts.min() else { return Ok(()) };
        let inside = |run: &Run| run.extent.offset <= start;
        let edges = [before, now].into_iter().flatten();
        let edges = edges.map(|run| if inside(&run) { run.extent.end() } else { run.extent.offset });
        let end = edges.min().unwrap_or(start);
        let held = match (before.filter(inside), now.filter(inside)) {
            (Some(before), Some(now)) => match (before.place_of(start), now.place_of(start)) {
                (Some(one), Some(other)) if one == other => Held::Shared,
                _ => Held::Own,
            },
            (_, Some(_)) => Held::Own,
            _ => Held::Back,
        };
        each(Extent { offset: start, length: end.saturating_sub(start) }, held)?;
        at = end;
    }
}

/// The first run that ends behind `at`.
fn front<X>(
    runs: &mut std::iter::Peekable<impl Iterator<Item = Result<Run, X>>>,
    at: Bytes,
) -> Result<Option<Run>, X> {
    while let Some(next) = runs.next_if(|next| next.as_ref().map_or(true, |run| run.extent.end() <= at)) {
        next?;
    }
    Ok(runs.peek().and_then(|next| next.as_ref().ok()).copied())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: usize = 24;

    fn extent((offset, length): (u64, u64)) -> Extent {
        Extent { offset: Bytes(offset), length: Bytes(length) }
    }

    fn shown(lines: &[MapLine]) -> String {
        let mut text = String::new();
        for line in lines {
            assert_eq!(line.offset.0, text.len() as u64, "complete and ascending");
            assert!(line.length > Bytes::ZERO);
            let letter = match line.from {
                MapFrom::Own => "o",
                MapFrom::Origin => "i",
                MapFrom::Zero => "z",
                MapFrom::Same => "s",
            };
            text.push_str(&letter.repeat(usize::try_from(line.length.0).expect("small")));
        }
        assert!(lines.windows(2).all(|pair| pair[0].from != pair[1].from), "neighbours are one: {text}");
        text
    }

    fn composed(size: u64, with: Option<u64>, origin: &[Extent], parts: &[(Extent, Held)]) -> String {
        let mut lines = Vec::new();
        let mut composer = Composer::map(Bytes(size), origin.iter().copied(), |line| lines.push(line));
        composer.compared = with.map(Bytes);
        for (extent, held) in parts {
            composer.part(*extent, *held).expect("in order");
        }
        composer.finish();
        shown(&lines)
    }

    fn map(size: u64, origin: &[(u64, u64)], own: &[(u64, u64)]) -> String {
        let origin: Vec<_> = origin.iter().copied().map(extent).collect();
        let own: Vec<_> = own.iter().copied().map(|part| (extent(part), Held::Own)).collect();
        composed(size, None, &origin, &own)
    }

    #[test]
    fn every_byte_is_told_once() {
        assert_eq!(map(4, &[], &[]), "zzzz");
        assert_eq!(map(4, &[(0, 9)], &[]), "iiii");
        assert_eq!(map(6, &[(0, 3)], &[]), "iiizzz");
        assert_eq!(map(6, &[(0, 3)], &[(1, 1)]), "ioizzz");
        assert_eq!(map(6, &[(0, 3)], &[(2, 2)]), "iioozz");
        assert_eq!(map(6, &[(0, 3)], &[(0, 6)]), "oooooo");
        assert_eq!(map(6, &[(0, 3)], &[(0, 1), (1, 1), (4, 9)]), "ooizoo", "what reaches beyond the end");
        assert_eq!(map(6, &[(0, 6)], &[(6, 3)]), "iiiiii");
        assert_eq!(map(9, &[(1, 2), (5, 1), (7, 9)], &[(2, 2)]), "ziooziz".to_owned() + "ii");
    }

    #[test]
    fn a_discarded_block_is_back_to_the_origin_and_in_the_delta() {
        let origin = [extent((0, 2)), extent((4, 1))];
        let parts = [
            (extent((0, 1)), Held::Shared),
            (extent((1, 2)), Held::Back),
            (extent((5, 1)), Held::Own),
            (extent((6, 4)), Held::Shared),
        ];
        assert_eq!(composed(10, Some(8), &origin, &parts), "sizssossoo", "behind the old end all differs");
        assert_eq!(composed(10, Some(8), &origin, &[]), "sssssssszz");
        assert_eq!(composed(4, Some(8), &origin, &parts), "sizs", "the old one may be larger");
    }

    #[test]
    fn a_stream_that_goes_back_is_refused() {
        let mut composer = Composer::map(Bytes(9), std::iter::empty(), |_| {});
        composer.part(extent((3, 2)), Held::Own).expect("the first");
        let refused = composer.part(extent((4, 1)), Held::Own);
        assert_eq!(refused, Err(Disorder { offset: Bytes(4), at: Bytes(5) }));
    }

    /// Disjoint and ascending parts from what each byte is.
    fn runs<T: Copy + PartialEq>(bytes: &[Option<T>]) -> Vec<(Extent, T)> {
        let mut runs: Vec<(Extent, T)> = Vec::new();
        for (at, held) in (0_u64..).zip(bytes) {
            let Some(held) = *held else { continue };
            match runs.last_mut() {
                // Some neighbours stay two parts.
                Some((last, what)) if *what == held && last.end() == Bytes(at) && at % 5 != 0 => {
                    last.length = last.length.saturating_add(Bytes(1));
                }
                _ => runs.push((extent((at, 1)), held)),
            }
        }
        runs
    }

    fn compared(old: &[(u64, u64, u64)], new: &[(u64, u64, u64)]) -> String {
        let run = |&(offset, length, place): &(u64, u64, u64)| {
            Ok(Run { extent: extent((offset, length)), place: (place > 0).then_some(Bytes(place)) })
        };
        let mut text = String::new();
        let told = compare(old.iter().map(run), new.iter().map(run), |extent, held| {
            let letter = match held {
                Held::Own => "o",
                Held::Shared => "s",
                Held::Back => "b",
            };
            text.push_str(&"-".repeat(usize::try_from(extent.offset.0).expect("small") - text.len()));
            text.push_str(&letter.repeat(usize::try_from(extent.length.0).expect("small")));
            Ok::<(), Disorder>(())
        });
        told.expect("nothing fails");
        text
    }

    #[test]
    fn blocks_at_the_same_place_are_the_same() {
        assert_eq!(compared(&[], &[]), "");
        assert_eq!(compared(&[(0, 4, 100)], &[(0, 4, 100)]), "ssss");
        assert_eq!(compared(&[(0, 4, 100)], &[(1, 2, 101)]), "bssb", "in the middle of a run");
        assert_eq!(
            compared(&[(0, 4, 100)], &[(1, 2, 100)]),
            "boob",
            "the same blocks, elsewhere in the file"
        );
        assert_eq!(compared(&[(2, 2, 100)], &[(0, 3, 50), (5, 1, 9)]), "ooob-o");
        assert_eq!(compared(&[(0, 2, 100), (2, 2, 200)], &[(0, 4, 100)]), "ssoo");
        assert_eq!(compared(&[(0, 1, 0)], &[(0, 1, 0)]), "o", "where they lie is not known");
    }

    #[test]
    fn a_stream_that_fails_is_not_taken_for_its_end() {
        let failed = || std::iter::once(Err::<Run, &str>("no"));
        assert_eq!(compare(failed(), std::iter::empty(), |_, _| Ok(())), Err("no"));
        assert_eq!(compare(std::iter::empty(), failed(), |_, _| Ok(())), Err("no"));
    }

    proptest! {
        #[test]
        fn composition_is_what_each_byte_alone_says(
            held in prop::collection::vec(
                prop_oneof![
                    2 => Just(None),
                    1 => Just(Some(Held::Own)),
                    1 => Just(Some(Held::Shared)),
                    1 => Just(Some(Held::Back)),
                ],
                SIZE,
            ),
            below in prop::collection::vec(prop::option::of(Just(())), SIZE),
            size in 0..27_u64,
            with in prop::option::of(0..27_u64),
        ) {
            let origin: Vec<_> = runs(&below).into_iter().map(|(extent, ())| extent).collect();
            let told = composed(size, with, &origin, &runs(&held));
            let naive: String = (0..size).map(|at| {
                let index = usize::try_from(at).expect("small");
                let compared = with.is_some_and(|with| at < with);
                let from_below = if below.get(index).copied().flatten().is_some() { 'i' } else { 'z' };
                match held.get(index).copied().flatten() {
                    Some(Held::Own) => 'o',
                    Some(Held::Shared) => if compared { 's' } else { 'o' },
                    Some(Held::Back) => from_below,
                    None => if compared { 's' } else { from_below },
                }
            }).collect();
            prop_assert_eq!(told, naive);
        }
    }
}
