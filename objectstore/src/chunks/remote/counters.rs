//! What a served image has counted since it was opened.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Totals since the image was opened. Numbers only grow.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        #[serde(rename_all = "camelCase")]
        pub struct Counted { $($(#[$doc])* pub $name: u64,)* }

        #[derive(Default)]
        pub(super) struct Counters { $(pub $name: AtomicU64,)* }

        impl Counters {
            pub(super) fn counted(&self) -> Counted {
                Counted { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Reads that were asked for.
    reads,
    /// Bytes of the image that were given to readers.
    bytes_read,
    /// Chunks that a read found kept.
    hits,
    /// Chunks that a read found on their way for somebody else.
    joined,
    /// Chunks that were fetched and were right.
    chunks_fetched,
    /// Bytes of their frames.
    bytes_fetched,
    /// Of these chunks, those that were fetched before anyone read them, because reads followed each other.
    chunks_ahead,
    /// Of these chunks, those that were fetched in the background.
    chunks_background,
    /// Pages of the index that were read after the image was opened.
    index_pages,
    /// Attempts that failed and were made again.
    retries,
    /// Reads that failed.
    failures,
}

/// Adds to a counter.
pub(super) fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}
