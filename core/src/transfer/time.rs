//! What time does to a transfer: its deadline, and the end of an object whose work has ended.

use crate::change::Change;
use crate::units::Timestamp;
use crate::view::{TransferView, View};

/// How often one whose time has come is looked at by an operator that does not hold the Lease, in milliseconds.
const LOOK_MILLIS: u64 = 10_000;

/// Why a transfer that has not ended may take no longer, if it may not.
pub(super) fn overdue(transfer: &TransferView, now: Timestamp) -> Option<String> {
    let deadline = transfer.deadline?;
    (now >= after(transfer.created, deadline))
        .then(|| format!("spec.limits.deadline: not finished {deadline} s after it was made"))
}

/// When a transfer is to be looked at again because of its time, and the deletion of one that has ended for as long as it says. That
/// is the leader's. What was transferred stays.
pub(super) fn end_of_life(view: &View, transfer: &TransferView, now: Timestamp) -> Option<Change> {
    if !transfer.has_ended() {
        let due = after(transfer.created, transfer.deadline?);
        return (now < due).then(|| Change::RetryAfter { millis: due.millis_since(now) });
    }
    let due = after(transfer.finished?, transfer.ttl_after_finished?);
    if transfer.retry.is_some() && !transfer.is_done() {
        return None;
    }
    if now < due {
        return Some(Change::RetryAfter { millis: due.millis_since(now) });
    }
    if !view.leader {
        return Some(Change::RetryAfter { millis: LOOK_MILLIS });
    }
    Some(Change::DeleteTransfer { id: transfer.id(), version: transfer.version.clone() })
}

const fn after(since: Timestamp, seconds: u64) -> Timestamp {
    Timestamp(since.0.saturating_add(seconds.saturating_mul(1000)))
}
