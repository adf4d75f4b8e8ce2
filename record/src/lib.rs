//! The node's durable memory: what a pool has promised and holds, and which jobs are under way.
//!
//! Two records exist. A [`PoolRecord`] lies inside its pool's own area, so that the pool can be understood and recovered
//! from its own disk; the [`NodeRecord`] lies beside the agent. Both are files of the embedded ACID store `redb`: torn
//! writes, checksums and `fsync` are its business. The discipline on top is ours:
//!
//! * a record names its owner and its format version, and opening tells absent, damaged, newer, foreign and locked
//!   records apart ([`OpenError`]);
//! * every change is one transaction that is on stable storage before the call returns;
//! * intent is recorded before the effect and confirmed after it: an entry's state says how far its effect may have got;
//! * a generation only rises: what a late writer asks for is refused ([`ChangeError::StaleGeneration`]).
//!
//! Calls block for as long as the disk needs to sync; asynchronous callers run them on a blocking thread.

mod dump;
mod entry;
mod error;
mod file;
mod node;
mod pool;
mod sabotage;
mod schema;
mod store;
mod template;
mod thin;

pub use dump::dump;
pub use entry::{
    Attachment, AttachmentMode, FileContent, FileEntry, FileFetch, FilePublication, FileTarget, Holder,
    ImageEntry, ImageState, JobEntry, LocalState, PromiseClass, PromiseEntry, Sending, SentFile, SentPart,
    StagingEntry, TemplateEntry, TemplateState, ThinCounters, ThinEntry, ThinState, VolumeEntry, VolumeKind,
    VolumeOrigin, VolumeState,
};
pub use error::{AdoptError, ChangeError, CreateError, OpenError, ReadError};
pub use node::NodeRecord;
pub use pool::{LedgerPosition, PoolRecord};
pub use schema::{FORMAT_VERSION, Owner, PoolIdentity, RecordKey, StructTable, tables};
pub use store::{Change, Record};
