//! `qemu-img`, for formats that it alone reads well: unprivileged, confined, told the format, never asked to guess.
//!
//! `qemu-img info` is never called: it guesses. What an image claims about itself is read in memory-safe code.

mod convert;
mod guard;
mod progress;

pub use self::convert::{ConvertError, ConvertLimits, Converted, Part, convert_to_raw};
pub(crate) use self::guard::guard_file;
pub use self::guard::{GuardError, SourceDriver, UnknownDriver, guard};
pub use self::progress::Progress;
