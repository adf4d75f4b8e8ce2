//! Reads that follow each other, and what to fetch before it is asked for. Pure.

use std::ops::Range;

/// How many readers are told apart.
const READERS: usize = 16;
/// How far a read may be from where the one before it ended: a reader's requests may arrive out of order.
const SLACK: u64 = 1 << 20;
/// How many reads must follow each other before anything is read ahead.
const ENOUGH: u32 = 2;

/// One reader that goes through the image.
#[derive(Clone, Copy, Debug, Default)]
struct Reader {
    /// Where its reads have ended.
    next: u64,
    /// All before this was read ahead.
    fetched: u64,
    /// How many reads followed each other.
    run: u32,
    /// When it read last, in reads.
    last: u64,
}

/// The readers of an image.
#[derive(Debug)]
pub(super) struct Readers {
    known: [Reader; READERS],
    reads: u64,
    chunk: u64,
    most: u64,
}

impl Readers {
    /// Reads at most `most` bytes ahead, in chunks of `chunk` bytes.
    pub(super) fn new(chunk: u64, most: u64) -> Self {
        Self { known: [Reader::default(); READERS], reads: 0, chunk, most }
    }

    /// Takes note of a read. Returns what to fetch now, which is twice as much each time, up to the most.
    pub(super) fn read(&mut self, range: &Range<u64>) -> Option<Range<u64>> {
        self.reads += 1;
        let follows = |reader: &&mut Reader| reader.last > 0 && reader.next.abs_diff(range.start) <= SLACK;
        let Some(reader) = self.known.iter_mut().find(follows) else {
            let oldest = self.known.iter_mut().min_by_key(|reader| reader.last)?;
            *oldest = Reader { next: range.end, fetched: range.end, run: 0, last: self.reads };
            return None;
        };
        reader.last = self.reads;
        reader.next = reader.next.max(range.end);
        reader.run = reader.run.saturating_add(1);
        let grown = self.chunk.checked_shl(reader.run.checked_sub(ENOUGH)?.min(20)).unwrap_or(u64::MAX);
        let until = reader.next.saturating_add(grown.min(self.most));
        let from = reader.fetched.max(reader.next);
        // Not for every few bytes.
        if until < from + self.chunk {
            return None;
        }
        reader.fetched = until;
        Some(from..until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const C: u64 = 256 << 10;

    #[test]
    fn a_reader_is_read_ahead_of_without_gaps_or_repeats() {
        let mut readers = Readers::new(C, 16 * C);
        let (mut fetched, mut at) = (0..0, 0);
        for _ in 0..200 {
            let next = at..at + 65536;
            if let Some(ahead) = readers.read(&next) {
                assert!(
                    fetched.is_empty() || ahead.start == fetched.end.max(next.end),
                    "{ahead:?} after {fetched:?}"
                );
                assert!(ahead.end <= next.end + 16 * C);
                fetched = ahead;
            }
            at += 65536;
        }
        assert!(fetched.end >= at + 15 * C, "{fetched:?} at {at}");
    }

    #[test]
    fn reads_here_and_there_cause_nothing() {
        let mut readers = Readers::new(C, 16 * C);
        for n in 0..1000_u64 {
            let at = (n * 7919 % 1000) * (64 << 20);
            assert_eq!(readers.read(&(at..at + 4096)), None);
        }
    }

    #[test]
    fn many_readers_do_not_disturb_each_other() {
        let mut readers = Readers::new(C, 4 * C);
        let mut ahead = 0;
        for step in 0..40 {
            for reader in 0..10 {
                let at = reader * (10 << 30) + step * 65536;
                ahead += u32::from(readers.read(&(at..at + 65536)).is_some());
            }
        }
        assert!(ahead >= 40, "{ahead}");
    }
}
