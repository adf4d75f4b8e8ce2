//! Objects into the views that decisions look at, and back where decisions write. Every message names the field and the
//! value. A field that cannot be used never hides its object: the view carries the message as `invalid`.

mod claims;
mod images;
mod ledgers;
mod nodes;
mod pools;
mod reservations;
mod transfer_views;
pub mod transfers;

use std::collections::BTreeMap;

use berth_core::ids::{NodeName, ObjectName, PoolName, Uid};
use berth_core::reason::Reason;
use berth_core::units::{Bytes, Generation, Timestamp};
use berth_core::view::{ObjectVersion, Placement, PoolChoice, Unreadable};
use kube::api::ObjectMeta;
use thiserror::Error;

use crate::conditions::timestamp;
use crate::fields::{Assignment, PoolSelector, Quantity, Span};

pub use claims::{SELECTED_NODE, named_reservation};
pub use images::{image_view, staged_state, store_view};
use ledgers::promise;
pub use ledgers::{
    ledger_view, to_ledger_capacity, to_ledger_promise, to_ledger_promises, to_ledger_spec, to_rebuilt_from,
};
pub use nodes::{node_state, to_thin_pools};
use pools::when_full;
pub use pools::{FilesystemArea, PoolArea, ThinArea, ThinGroup, pool_area, pool_view};
pub use reservations::{file_name, reservation_view};
pub use transfer_views::{import_view, to_import_state, to_transfer_state, transfer_view};
pub use transfers::{Asked, AskedDestination, AskedSource, asked_import, asked_transfer, transfer_deadline};

/// A field whose value cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum InvalidField {
    /// Not a number of bytes.
    #[error("{field}: `{value}` is not a quantity of bytes such as `10Gi`")]
    Quantity {
        /// The field's path.
        field: &'static str,
        /// What stands there.
        value: String,
    },
    /// Not a span of time.
    #[error("{field}: `{value}` is not a span of time such as `1h30m`")]
    Span {
        /// The field's path.
        field: &'static str,
        /// What stands there.
        value: String,
    },
    /// Outside what is allowed.
    #[error("{field}: `{value}` must be {allowed}")]
    Range {
        /// The field's path.
        field: &'static str,
        /// What stands there.
        value: String,
        /// What may stand there.
        allowed: String,
    },
    /// Missing, or beside something that it excludes.
    #[error("{field}: {problem}")]
    Shape {
        /// The field's path.
        field: &'static str,
        /// What is wrong.
        problem: String,
    },
}

/// The bytes that `quantity` stands for, rounded up to whole ones as Kubernetes does.
///
/// # Errors
/// [`InvalidField::Quantity`] if it is no quantity, or does not fit in 63 bits.
pub fn bytes(field: &'static str, quantity: &Quantity) -> Result<Bytes, InvalidField> {
    let bad = || InvalidField::Quantity { field, value: quantity.0.clone() };
    let split = quantity.0.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(quantity.0.len());
    let (number, suffix) = quantity.0.split_at(split);
    let factor: u128 = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "P" => 1_000_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        _ => return Err(bad()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || whole.len() > 18 || fraction.len() > 9 || number.ends_with('.') {
        return Err(bad());
    }
    let digits: u128 = format!("{whole}{fraction}").parse().map_err(|_| bad())?;
    let scale = 10_u128.pow(u32::try_from(fraction.len()).map_err(|_| bad())?);
    let value = (digits * factor).div_ceil(scale);
    u64::try_from(value).ok().filter(|v| i64::try_from(*v).is_ok()).map(Bytes).ok_or_else(bad)
}

/// The seconds that `span` stands for.
///
/// # Errors
/// [`InvalidField::Span`] if it is none.
pub fn seconds(field: &'static str, span: &Span) -> Result<u64, InvalidField> {
    let bad = || InvalidField::Span { field, value: span.0.clone() };
    let mut rest = span.0.as_str();
    let mut total = 0_u64;
    for (unit, factor) in [('h', 3600), ('m', 60), ('s', 1)] {
        if let Some((number, after)) = rest.split_once(unit) {
            let count: u64 = number.parse().map_err(|_| bad())?;
            total = count.checked_mul(factor).and_then(|s| s.checked_add(total)).ok_or_else(bad)?;
            rest = after;
        }
    }
    if rest.is_empty() && !span.0.is_empty() { Ok(total) } else { Err(bad()) }
}

/// What decisions look at of an object that cannot be read: by its metadata alone.
pub fn unreadable(kind: &str, meta: &ObjectMeta, problem: String) -> Unreadable {
    Unreadable {
        kind: kind.to_owned(),
        name: name_of(meta),
        uid: uid_of(meta),
        claim_namespace: reservations::claim_namespace(meta),
        problem,
    }
}

fn name_of(meta: &ObjectMeta) -> ObjectName {
    ObjectName::new(meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
}

fn uid_of(meta: &ObjectMeta) -> Uid {
    Uid(meta.uid.clone().unwrap_or_default())
}

fn version_of(meta: &ObjectMeta) -> ObjectVersion {
    ObjectVersion(meta.resource_version.clone().unwrap_or_default())
}

fn created_of(meta: &ObjectMeta) -> Timestamp {
    meta.creation_timestamp.as_ref().map_or(Timestamp(0), timestamp)
}

fn has_finalizer(meta: &ObjectMeta, finalizer: &str) -> bool {
    meta.finalizers.iter().flatten().any(|other| other == finalizer)
}

/// A generation as the API writes it; a negative one counts as 0.
pub fn generation(value: i64) -> Generation {
    Generation(u64::try_from(value).unwrap_or_default())
}

/// The reason with this name. One that this version does not know comes from a newer one; its message is kept.
fn reason(name: &str, otherwise: Reason) -> Reason {
    Reason::from_name(name).unwrap_or(otherwise)
}

/// A placement without a pool is none of a reservation's or an import's.
fn placement(assignment: Option<&Assignment>) -> Option<Placement> {
    let assignment = assignment?;
    Some(Placement {
        pool: PoolName(assignment.pool.clone()?),
        node: NodeName(assignment.node.clone()),
        generation: generation(assignment.generation),
    })
}

fn labelled(selector: Option<&PoolSelector>) -> PoolChoice {
    PoolChoice::Labelled(selector.map_or_else(BTreeMap::new, |selector| selector.match_labels.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities() {
        let parse = |text: &str| bytes("spec.maxSize", &Quantity(text.to_owned()));
        assert_eq!(parse("1Gi"), Ok(Bytes::gib(1)));
        assert_eq!(parse("1.5k"), Ok(Bytes(1500)));
        assert_eq!(parse("0.1"), Ok(Bytes(1)), "rounded up");
        assert_eq!(parse("0"), Ok(Bytes(0)));
        for bad in ["", "Gi", "-1", "1gi", "1e3", "1.", ".5", "9999999Pi", "1 Gi"] {
            let error = parse(bad).expect_err(bad).to_string();
            assert!(error.contains("spec.maxSize") && error.contains(bad), "{error}");
        }
    }

    #[test]
    fn spans() {
        let parse = |text: &str| seconds("spec.reclaim.ttl", &Span(text.to_owned()));
        assert_eq!(parse("1h30m"), Ok(5400));
        assert_eq!(parse("90s"), Ok(90));
        assert_eq!(parse("0s"), Ok(0));
        for bad in ["", "1", "1d", "m", "1s1h", "-1s"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
