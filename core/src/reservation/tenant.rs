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

/// What each namespace holds in a pool, by the promises in the pool's ledgers, which tell it of objects that cannot be read as
/// well. A staged image is nobody's: it is shared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Holdings(BTreeMap<String, (Bytes, u32)>);

impl Holdings {
    /// Adds up.
    pub(super) fn of(view: &View, pool: &PoolView) -> Self {
        let mut held: BTreeMap<String, (Bytes, u32)> = BTreeMap::new();
        for (uid, promise) in view.ledgers_in(&pool.name).flat_map(|ledger| &ledger.promises) {
            let Holder::Reservation(name) = &promise.holder else { continue };
            let reservation = view.reservations.get(uid);
            let unreadable = view.unreadable_object(uid).map(|one| &one.claim_namespace);
            let known = unreadable.or_else(|| reservation.map(|known| &known.claim_namespace));
            let namespace = known.unwrap_or(&name.namespace);
            let sum = held.entry(namespace.clone()).or_default();
            *sum = (sum.0.saturating_add(promise.charge.data), sum.1.saturating_add(1));
        }
        Self(held)
    }

    /// How many reservations a namespace holds.
    pub(super) fn count(&self, namespace: &str) -> u32 {
        self.0.get(namespace).map_or(0, |(_, count)| *count)
    }

    /// The first limit of the pool that `asked` bytes more would exceed; the number of reservations counts for one that holds
    /// nothing yet.
    pub(super) fn excess(
        &self,
        view: &View,
        pool: &PoolView,
        reservation: &ReservationView,
        asked: Bytes,
    ) -> Option<TenantExcess> {
        let namespace = &reservation.claim_namespace;
        let held = self.count(namespace);
        let is_new = reservation.assignment.is_none();
        let exceeded = |limit: &TenantLimit| {
            let too_many = limit.reservations.filter(|most| is_new && held >= *most);
            let too_many = too_many.map(|most| ExcessKind::Reservations { held, most });
            self.excess_over(limit, namespace, asked).or(too_many)
        };
        let kind = limits(view, pool, namespace).find_map(exceeded)?;
        Some(TenantExcess { namespace: namespace.clone(), kind })
    }

    fn excess_over(&self, limit: &TenantLimit, namespace: &str, asked: Bytes) -> Option<ExcessKind> {
        let held = self.0.get(namespace).map_or(Bytes::ZERO, |(bytes, _)| *bytes);
        let most = limit.bytes.filter(|most| held.saturating_add(asked) > *most)?;
        Some(ExcessKind::Bytes { held, asked, most })
    }
}

/// True if a limit of the pool is about this namespace. Then the leader alone admits: two operators that see the same sum
/// in two ledgers could exceed it together.
pub(super) fn is_limited(view: &View, pool: &PoolView, namespace: &str) -> bool {
    limits(view, pool, namespace).next().is_some()
}

/// Why it cannot be told whether a reservation of this namespace keeps within the pool's limits: a ledger that cannot be read
/// may promise more. It is the leader's to say, which alone admits.
pub(super) fn unjudged(view: &View, pool: &PoolView, namespace: &str) -> Option<String> {
    let hidden = view.unreadable_ledger(&pool.name).filter(|_| view.leader)?;
    is_limited(view, pool, namespace).then(|| hidden.to_string())
}

/// The limits of a pool that are about this namespace. One whose labels are not known has none.
fn limits<'v>(view: &'v View, pool: &'v PoolView, namespace: &str) -> impl Iterator<Item = &'v TenantLimit> {
    let labels = view.namespaces.get(namespace);
    pool.tenant_limits.iter().filter(move |limit| {
        let mut wanted = limit.namespaces.iter();
        wanted.all(|(key, value)| labels.is_some_and(|labels| labels.get(key) == Some(value)))
    })
}

#[cfg(test)]
#[path = "tenant_tests.rs"]
mod tests;
