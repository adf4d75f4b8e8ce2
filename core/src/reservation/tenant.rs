//! What the reservations of one namespace may hold in a pool, over all nodes.

use std::collections::BTreeMap;
use std::fmt;

use crate::ledger::Holder;
use crate::units::Bytes;
use crate::view::{PoolView, ReservationView, TenantLimit, View};

/// A limit that one more reservation would exceed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TenantExcess {
    /// The namespace.
    pub namespace: String,
    /// What it is about.
    pub kind: ExcessKind,
}

/// What a limit is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExcessKind {
    /// Bytes of data.
    Bytes {
        /// What is held.
        held: Bytes,
        /// What is asked for beside it.
        asked: Bytes,
        /// What may be held.
        most: Bytes,
    },
    /// A number of reservations.
    Reservations {
        /// How many there are.
        held: u32,
        /// How many there may be.
        most: u32,
    },
}

impl TenantExcess {
    /// How many bytes the namespace must give back first, if it is bytes that count.
    pub fn shortfall(&self) -> Option<Bytes> {
        match self.kind {
            ExcessKind::Bytes { held, asked, most } => Some(held.saturating_add(asked).saturating_sub(most)),
            ExcessKind::Reservations { .. } => None,
        }
    }
}

impl fmt::Display for TenantExcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let namespace = &self.namespace;
        match self.kind {
            ExcessKind::Bytes { held, asked, most } => write!(
                f,
                "allows namespace {namespace} {most} in all: {held} are held, {asked} more are asked for"
            ),
            ExcessKind::Reservations { held, most } => {
                write!(f, "allows namespace {namespace} {most} reservations: {held} are held")
            }
        }
    }
}

/// What each namespace holds in a pool, by the promises in the pool's ledgers. A staged image is nobody's: it is shared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Holdings(BTreeMap<String, (Bytes, u32)>);

impl Holdings {
    /// Adds up. Nothing is counted in a pool without limits.
    pub(super) fn of(view: &View, pool: &PoolView) -> Self {
        let mut held: BTreeMap<String, (Bytes, u32)> = BTreeMap::new();
        if pool.tenant_limits.is_empty() {
            return Self(held);
        }
        let promises = view.ledgers.values().filter(|ledger| ledger.pool == pool.name);
        for (uid, promise) in promises.flat_map(|ledger| &ledger.promises) {
            let Holder::Reservation(name) = &promise.holder else { continue };
            let reservation = view.reservations.get(uid);
            let namespace = reservation.map_or(&name.namespace, |known| &known.claim_namespace);
            let sum = held.entry(namespace.clone()).or_default();
            *sum = (sum.0.saturating_add(promise.charge.data), sum.1.saturating_add(1));
        }
        Self(held)
    }

    /// The first limit of the pool that `asked` bytes more would exceed.
    pub(super) fn excess(
        &self,
        view: &View,
        pool: &PoolView,
        reservation: &ReservationView,
        asked: Bytes,
    ) -> Option<TenantExcess> {
        let namespace = &reservation.claim_namespace;
        let (bytes, count) = self.0.get(namespace).copied().unwrap_or_default();
        limits(view, pool, namespace).find_map(|limit| {
            let over = |most: &Bytes| bytes.saturating_add(asked) > *most;
            let kind = match (limit.bytes.filter(over), limit.reservations) {
                (Some(most), _) => ExcessKind::Bytes { held: bytes, asked, most },
                (None, Some(most)) if count >= most => ExcessKind::Reservations { held: count, most },
                _ => return None,
            };
            Some(TenantExcess { namespace: namespace.clone(), kind })
        })
    }
}

/// True if a limit of the pool is about this namespace. Then the leader alone admits: two operators that see the same sum
/// in two ledgers could exceed it together.
pub(super) fn is_limited(view: &View, pool: &PoolView, namespace: &str) -> bool {
    limits(view, pool, namespace).next().is_some()
}

/// The limits of a pool that are about this namespace. One whose labels are not known has none.
fn limits<'v>(view: &'v View, pool: &'v PoolView, namespace: &str) -> impl Iterator<Item = &'v TenantLimit> {
    let labels = view.namespaces.get(namespace);
    pool.tenant_limits.iter().filter(move |limit| {
        let mut wanted = limit.namespaces.iter();
        wanted.all(|(key, value)| labels.is_some_and(|labels| labels.get(key) == Some(value)))
    })
}
