//! What the administrator of a pool has decided.

use std::collections::BTreeMap;

use super::{PoolChoice, PoolView};
use crate::ids::NodeName;
use crate::units::Bytes;

/// Which of several places a request gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Strategy {
    /// The first by the names of pool and node.
    FirstFit,
    /// The one with the most space left.
    MostFree,
    /// One that has the image; among those, or if none has, the one with the most space left.
    #[default]
    PreferPresent,
}

/// What the reservations of each of some namespaces may hold in a pool, over all nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TenantLimit {
    /// Labels of those namespaces, all of them; none given means every namespace.
    pub namespaces: BTreeMap<String, String>,
    /// At most so many bytes of data.
    pub bytes: Option<Bytes>,
    /// At most so many reservations.
    pub reservations: Option<u32>,
}

/// When images go that nothing refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReclaimPolicy {
    /// After this long without use, in milliseconds.
    pub ttl_millis: u64,
    /// Never before this long without use, in milliseconds.
    pub keep_warm_millis: u64,
    /// When more than this percentage is promised on a node.
    pub high_percent: u32,
    /// Until this percentage is.
    pub low_percent: u32,
}

/// What becomes of promises on a node that is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NodeLossPolicy {
    /// They stay until the node is back.
    #[default]
    Retain,
    /// What can be had again elsewhere is given up once the Kubernetes node is gone.
    Release,
}

/// Whether a pool takes anything new.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Service {
    /// It does.
    #[default]
    Open,
    /// It does not; what is there stays.
    Cordoned,
    /// It does not, and images that nothing refers to go at once.
    Draining,
}

/// What happens when the space is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// Wait.
    Queue,
    /// Refuse.
    Reject,
}

impl PoolView {
    /// Whether it takes anything new on this node.
    pub fn service_on(&self, node: &NodeName) -> Service {
        if self.drain_nodes.contains(node) { Service::Draining } else { self.service }
    }
}

impl Default for ReclaimPolicy {
    /// The defaults of the API, without a time of grace.
    fn default() -> Self {
        Self { ttl_millis: 3_600_000, keep_warm_millis: 0, high_percent: 85, low_percent: 70 }
    }
}

impl PoolChoice {
    /// True if the choice allows this pool.
    pub fn allows(&self, pool: &PoolView) -> bool {
        match self {
            Self::Named(name) => *name == pool.name,
            Self::Labelled(labels) => labels.iter().all(|(key, value)| pool.labels.get(key) == Some(value)),
        }
    }
}
