//! Images that are shown before all of them is here, for backends that can.

use berth_core::hydration::{Progress, Stop};
use berth_core::ids::{Digest, Uid};
use berth_core::units::Bytes;
use berth_record::{PoolRecord, ReadError};

use super::AreaError;
use crate::supervisor::stores::StoreServerSpec;

/// Where an image is read from that is not here, and how.
#[derive(Clone, Debug)]
pub struct Source {
    /// The server of its image store. Its id is [`Lazy::source_id`].
    pub server: StoreServerSpec,
    /// How many bytes a second are fetched that nobody waits for, at most.
    pub rate: Option<Bytes>,
}

/// How far an image is that is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advanced {
    /// It is shown, and becomes local by itself. Look again.
    Hydrating(Progress),
    /// All of it is here, and nothing else is needed any more.
    Local,
    /// It cannot be shown without its image store.
    SourceNeeded,
    /// It cannot go on by itself.
    Stopped(Stop),
}

/// Showing images early. Each call blocks, for a minute at most, and may be repeated after a crash.
pub trait Lazy: Send + Sync {
    /// Why no image can be shown so at this moment, one phrase for each thing that is missing.
    fn missing(&self) -> Vec<String>;

    /// How many bytes have to be promised to an image with so much data.
    fn charge(&self, data: Bytes, virtual_size: Bytes) -> Bytes;

    /// Whose the server and the device of an image's source are.
    fn source_id(&self, digest: &Digest) -> Uid;

    /// Begins to show an image that is recorded as empty, in place of what may be there of it. False, and nothing has changed, if
    /// the devices take only parts that are too small for that. `chunk` is the size of its chunks.
    fn begin(
        &self,
        record: &PoolRecord,
        digest: &Digest,
        source: &Source,
        chunk: Bytes,
    ) -> Result<bool, AreaError>;

    /// Does all that can be done now for an image that is recorded as shown; without its source, only what needs none.
    fn advance(
        &self,
        record: &PoolRecord,
        digest: &Digest,
        source: Option<&Source>,
    ) -> Result<Advanced, AreaError>;

    /// True if volumes can start from it.
    fn is_shown(&self, digest: &Digest) -> bool;

    /// True if nothing is left of what it took to show it early.
    fn is_settled(&self, record: &PoolRecord, digest: &Digest) -> Result<bool, ReadError>;
}
