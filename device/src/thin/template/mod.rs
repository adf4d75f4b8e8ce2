//! Templates that become local while volumes read them: `dm-clone` over a thin device of the kernel pool `images`.
//!
//! What is done when is decided by [`berth_core::hydration`]; here is how. Everything may be called again after a crash.
//!
//! What can be relied on (`drivers/md/dm-clone-target.c`, tried on Linux 6.1):
//! - A region counts as local only once all of it was written. A write of a whole region reads nothing of the source; a
//!   shorter one makes the kernel read the rest of the region from the source first, and fails with it.
//! - What counts as local on disk is flushed to the destination before it is written to the metadata (since Linux 5.6).
//! - A write that returns is not durable before a flush, as with any disk that buffers writes.
//! - Discards that the kernel cannot record are passed over in silence: only the number of local regions tells.

mod device;
mod error;
mod metadata;
mod table;
mod writer;

pub use self::device::{CloneConfig, TemplateDevice, load, longest_request, missing};
pub use self::error::TemplateError;
pub use self::metadata::{FoundMetadata, clear_metadata, find_metadata};
pub use self::table::{CloneStatus, CloneTable, LinearTable, WorkingClone};
pub use self::writer::{DirectBuffer, TemplateWriter};
