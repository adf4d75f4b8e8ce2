//! Condition types, and setting one in a list without losing when it last changed.

use berth_core::reason::Reason;
use berth_core::units::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// The condition types of all kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConditionType {
    /// The object does what it is for.
    Ready,
    /// The space is promised.
    Promised,
    /// The reservation that the work needs is there.
    Reserved,
    /// The image, or the file that a pod has changed, is in its store, verified.
    Durable,
    /// The object is in its file, all of it.
    Staged,
    /// Work is under way.
    Progressing,
    /// A bounded piece of work has ended well.
    Succeeded,
}

impl ConditionType {
    /// The name in `conditions[].type`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "Ready",
            Self::Promised => "Promised",
            Self::Reserved => "Reserved",
            Self::Durable => "Durable",
            Self::Staged => "Staged",
            Self::Progressing => "Progressing",
            Self::Succeeded => "Succeeded",
        }
    }
}

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truth {
    /// It holds.
    True,
    /// It does not.
    False,
    /// Nobody knows yet.
    Unknown,
}

impl Truth {
    /// The text in `conditions[].status`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

/// `now` as Kubernetes writes it (whole seconds). Falls back to the epoch outside the years 0 to 9999.
pub fn time(now: Timestamp) -> Time {
    let seconds = i64::try_from(now.0 / 1000).unwrap_or_default();
    Time(jiff::Timestamp::from_second(seconds).unwrap_or_default())
}

/// Milliseconds since 1970 of a Kubernetes time; times before that count as 1970.
pub fn timestamp(time: &Time) -> Timestamp {
    Timestamp(u64::try_from(time.0.as_millisecond()).unwrap_or_default())
}

/// The condition to write: `lastTransitionTime` is kept from `previous` while the status stays the same.
pub fn condition(
    previous: &[Condition],
    kind: ConditionType,
    truth: Truth,
    reason: Reason,
    message: impl Into<String>,
    observed_generation: Option<i64>,
    now: Timestamp,
) -> Condition {
    let since = previous
        .iter()
        .find(|c| c.type_ == kind.as_str() && c.status == truth.as_str())
        .map_or_else(|| time(now), |c| c.last_transition_time.clone());
    Condition {
        type_: kind.as_str().to_owned(),
        status: truth.as_str().to_owned(),
        reason: reason.as_str().to_owned(),
        message: message.into(),
        observed_generation,
        last_transition_time: since,
    }
}

/// The condition of this type, if it is there.
pub fn find(conditions: &[Condition], kind: ConditionType) -> Option<&Condition> {
    conditions.iter().find(|c| c.type_ == kind.as_str())
}

/// True if the condition is there and holds.
pub fn is_true(conditions: &[Condition], kind: ConditionType) -> bool {
    find(conditions, kind).is_some_and(|c| c.status == Truth::True.as_str())
}
