//! Leases, judged by the API server's clock alone: it notes when each was written, so that a node's clock can be told
//! apart from a node that is late.

use berth_core::units::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use kube::ResourceExt as _;

use crate::server::timestamp;

/// A clock that is further off than this is told of, in milliseconds.
pub const SKEW_WARNING_MILLIS: u64 = 5_000;
/// S3 servers refuse requests that are signed with a clock that is off by 15 minutes; a third of that is an alarm.
pub const SKEW_FAILURE_MILLIS: u64 = 300_000;

/// How a Lease was last renewed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renewal {
    /// Who holds it; empty if nobody does.
    pub holder: String,
    /// How long ago it was written, by the API server's clock, in milliseconds.
    pub age_millis: u64,
    /// True if that is not longer than it holds.
    pub fresh: bool,
    /// How far the holder's clock was ahead of the API server's when it was written; negative if it was behind. In
    /// milliseconds, exact to a second; `None` if the API server does not say when that was.
    pub skew_millis: Option<i64>,
}

impl Renewal {
    /// Of the Lease with this name, if it is there and was ever renewed.
    pub fn of(leases: &[Lease], name: &str, now: Timestamp) -> Option<Self> {
        let lease = leases.iter().find(|lease| lease.name_any() == name)?;
        let spec = lease.spec.as_ref()?;
        let renewed = timestamp(spec.renew_time.as_ref()?.0);
        let times = lease.managed_fields().iter().filter_map(|entry| entry.time.as_ref());
        let written = times.map(|time| timestamp(time.0)).max();
        let age_millis = now.millis_since(written.unwrap_or(renewed));
        let holds = u64::try_from(spec.lease_duration_seconds.unwrap_or_default()).unwrap_or_default() * 1000;
        let skew_millis = written.and_then(|written| {
            let (renewed, written) = (i64::try_from(renewed.0).ok()?, i64::try_from(written.0).ok()?);
            Some(renewed - written)
        });
        // Times are exact to a second.
        let fresh = age_millis <= holds + 1000;
        Some(Self {
            holder: spec.holder_identity.clone().unwrap_or_default(),
            age_millis,
            fresh,
            skew_millis,
        })
    }
}
