//! Many reservations over many nodes against a real API server: how fast they are promised, with how many writes, and what
//! it costs when nothing happens.
//!
//! Nodes are API objects that one process keeps alive ([`nodes`]): each renews its Lease as often as a real one, obeys its
//! ledger, and reports. The same process watches what the operator writes, counts what is promised, and reads the API
//! server's own count of requests. The yardstick is what the same API server does in bare status patches in the same run.

mod idle;
mod nodes;
mod seen;
mod stage;
mod throughput;
mod writes;

use std::path::PathBuf;
use std::time::Duration;

pub use self::idle::{Idle, idle};
pub use self::throughput::{Throughput, throughput};
pub use self::writes::Writes;

/// How much there is.
#[derive(Debug, Clone)]
pub struct Sizes {
    /// How many reservations.
    pub reservations: usize,
    /// How many nodes.
    pub nodes: usize,
    /// How many pools; each node carries one.
    pub pools: usize,
    /// For how long it is watched when nothing happens, each time.
    pub quiet: Duration,
    /// The operator's program.
    pub operator: PathBuf,
    /// Whether reservations get their finalizer as they are created, and not from the operator.
    pub guarded: bool,
}
