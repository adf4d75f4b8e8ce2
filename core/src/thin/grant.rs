//! When nothing more is promised in a kernel pool, and how that is said.

use std::fmt;

use super::growth::ALARM_PERCENT;
use super::{ADMISSION_PERCENT, PoolMode, PoolState, StopReason, ThinState, Usage};
use crate::ledger::{Charge, Class};
use crate::reason::Reason;
use crate::units::Bytes;

/// A kernel pool in which nothing more is promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// Which of the two.
    pub class: Class,
    /// Why.
    pub why: StopReason,
    /// Its data.
    pub data: Usage,
    /// Its metadata.
    pub metadata: Usage,
}

impl Stopped {
    /// The documented reason.
    pub const fn reason(&self) -> Reason {
        self.why.reason()
    }

    /// True if it passes when bytes are given back; otherwise somebody has to see to the pool.
    pub const fn is_about_space(&self) -> bool {
        matches!(self.why, StopReason::Metadata | StopReason::Data)
    }
}

impl StopReason {
    /// The documented reason.
    pub const fn reason(self) -> Reason {
        match self {
            Self::Failed => Reason::PoolAreaFailed,
            Self::NeedsCheck => Reason::NeedsCheck,
            Self::ReadOnly => Reason::ReadOnly,
            Self::Metadata => Reason::MetadataAlmostFull,
            Self::Data => Reason::DataAlmostFull,
        }
    }
}

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { class, why, data, metadata } = self;
        let class = match class {
            Class::Images => "images",
            Class::Volumes => "volumes",
        };
        write!(f, "promises nothing more for {class}: the kernel pool ")?;
        match why {
            StopReason::Failed => f.write_str("has failed"),
            StopReason::NeedsCheck => f.write_str("has metadata that must be checked offline"),
            StopReason::ReadOnly => f.write_str("is read-only"),
            StopReason::Metadata => {
                let (used, total, percent) = (metadata.used, metadata.total, metadata.percent());
                write!(f, "uses {used} of {total} of metadata, {percent} %, more than {ADMISSION_PERCENT} %")
            }
            StopReason::Data => {
                write!(f, "has no data space left: {} of {} are written", data.used, data.total)
            }
        }
    }
}

impl PoolState {
    /// Why its kernel pool takes no new block or device at this moment, if that is so.
    pub fn unwritable(&self) -> Option<StopReason> {
        match self.mode {
            PoolMode::Failed => Some(StopReason::Failed),
            _ if self.needs_check => Some(StopReason::NeedsCheck),
            PoolMode::ReadOnly => Some(StopReason::ReadOnly),
            PoolMode::OutOfDataSpace => Some(StopReason::Data),
            PoolMode::ReadWrite => None,
        }
    }

    /// Why nothing more may be promised in it, if that is so. Data that is used up is no reason by itself: a kernel pool
    /// grows to what is promised in it, and what is promised may be written.
    pub fn stopped(&self) -> Option<StopReason> {
        match self.unwritable() {
            None | Some(StopReason::Data) if self.metadata.percent() > ADMISSION_PERCENT => {
                Some(StopReason::Metadata)
            }
            why => why,
        }
    }
}

impl ThinState {
    /// The kernel pool of a class.
    pub const fn of(&self, class: Class) -> &PoolState {
        match class {
            Class::Images => &self.images,
            Class::Volumes => &self.volumes,
        }
    }

    /// Why nothing more is promised to a class, if that is so.
    pub fn stopped(&self, class: Class) -> Option<Stopped> {
        let state = self.of(class);
        state.stopped().map(|why| Stopped { class, why, data: state.data, metadata: state.metadata })
    }

    /// That nothing more is promised to volumes that are overcommitted, if they have written all that their kernel pool has and
    /// can attain: what is promised to them already is as much as they can write.
    pub fn volumes_full(&self, attainable: Bytes) -> Option<Stopped> {
        let PoolState { data, metadata, .. } = self.volumes;
        let full = data.used >= attainable.max(data.total);
        full.then_some(Stopped { class: Class::Volumes, why: StopReason::Data, data, metadata })
    }

    /// Why nothing more could be promised to a class once images that hold this much at most were gone, and volumes could attain
    /// that much. Images that go leave blocks and metadata to the kernel pool of images, which never shrinks. Volumes gain only
    /// what they can attain by it, and no metadata. A kernel pool that is damaged has to be seen to by somebody.
    pub fn stopped_without(&self, class: Class, images: Charge, attainable: Bytes) -> Option<Stopped> {
        let stopped = self.stopped(class)?;
        let Stopped { data, metadata, .. } = stopped;
        let metadata = Usage { used: metadata.used.saturating_sub(images.metadata), ..metadata };
        let passes = match (class, stopped.why) {
            (Class::Images, StopReason::Metadata) => metadata.percent() <= ADMISSION_PERCENT,
            (Class::Images, StopReason::Data) => images.data > Bytes::ZERO,
            (Class::Volumes, StopReason::Data) => attainable > data.total,
            (Class::Volumes, StopReason::Metadata)
            | (_, StopReason::Failed | StopReason::NeedsCheck | StopReason::ReadOnly) => false,
        };
        (!passes).then_some(stopped)
    }

    /// True if one of the kernel pools has less than a fifth left of what it can attain of `total`.
    pub fn data_runs_low(&self, total: Bytes) -> bool {
        let low = |own: &PoolState, other: &PoolState| {
            let attainable = total.saturating_sub(other.data.total);
            let usage = Usage { used: own.data.used, total: attainable };
            usage.used > Bytes::ZERO && usage.percent() >= ALARM_PERCENT
        };
        low(&self.images, &self.volumes) || low(&self.volumes, &self.images)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn well() -> PoolState {
        PoolState {
            mode: PoolMode::ReadWrite,
            needs_check: false,
            data: Usage { used: Bytes::ZERO, total: Bytes::gib(1) },
            metadata: Usage { used: Bytes::ZERO, total: Bytes(1000) },
        }
    }

    #[test]
    fn grants_stop_above_70_percent_of_metadata_and_in_damaged_pools() {
        let well = well();
        let used = |used| PoolState { metadata: Usage { used: Bytes(used), total: Bytes(1000) }, ..well };
        assert_eq!((used(700).stopped(), used(701).stopped()), (None, Some(StopReason::Metadata)));
        for (state, reason) in [
            (PoolState { needs_check: true, ..well }, StopReason::NeedsCheck),
            (PoolState { mode: PoolMode::ReadOnly, ..well }, StopReason::ReadOnly),
            (PoolState { mode: PoolMode::ReadOnly, needs_check: true, ..well }, StopReason::NeedsCheck),
            (PoolState { mode: PoolMode::Failed, needs_check: true, ..well }, StopReason::Failed),
            (PoolState { mode: PoolMode::OutOfDataSpace, ..well }, StopReason::Data),
        ] {
            assert_eq!((state.stopped(), state.unwritable()), (Some(reason), Some(reason)));
        }
        assert_eq!(used(701).unwritable(), None, "what is promised may be made");
        let full = PoolState { data: Usage { used: Bytes::gib(1), total: Bytes::gib(1) }, ..well };
        assert_eq!(full.stopped(), None, "what is promised may be written");
        let thin = ThinState { images: full, volumes: well };
        assert!(!thin.data_runs_low(Bytes::gib(10)) && thin.data_runs_low(Bytes::gib(2)));
    }

    #[test]
    fn what_is_stopped_is_told_with_numbers() {
        let metadata = Usage { used: Bytes::mib(71), total: Bytes::mib(100) };
        let thin = ThinState { images: PoolState { metadata, ..well() }, volumes: well() };
        let stopped = thin.stopped(Class::Images).expect("71 %");
        assert_eq!(
            stopped.to_string(),
            "promises nothing more for images: the kernel pool uses 71 MiB of 100 MiB of metadata, 71 %, more than 70 %"
        );
        assert_eq!((stopped.reason(), stopped.is_about_space()), (Reason::MetadataAlmostFull, true));
        assert_eq!(thin.stopped(Class::Volumes), None);
        let full = PoolState {
            mode: PoolMode::OutOfDataSpace,
            data: Usage { used: Bytes::mib(700), total: Bytes::mib(700) },
            ..well()
        };
        let thin = ThinState { images: well(), volumes: full };
        assert_eq!(
            thin.stopped(Class::Volumes).expect("full").to_string(),
            "promises nothing more for volumes: the kernel pool has no data space left: 700 MiB of 700 MiB are written"
        );
    }

    #[test]
    fn images_that_go_help_a_full_kernel_pool_and_no_damaged_one() {
        let images = |data, metadata| Charge { data: Bytes(data), metadata: Bytes(metadata) };
        let full = PoolState { mode: PoolMode::OutOfDataSpace, ..well() };
        let metadata = PoolState { metadata: Usage { used: Bytes(750), total: Bytes(1000) }, ..well() };
        let stays = |state: PoolState, class, gone, attainable| {
            let thin = ThinState { images: state, volumes: state };
            thin.stopped_without(class, gone, Bytes::gib(attainable)).map(|stopped| stopped.why)
        };
        assert_eq!(stays(metadata, Class::Images, images(1, 50), 0), None);
        assert_eq!(stays(metadata, Class::Images, images(1, 49), 0), Some(StopReason::Metadata));
        assert_eq!(stays(metadata, Class::Volumes, images(1, 750), 9), Some(StopReason::Metadata));
        assert_eq!(stays(full, Class::Images, images(1, 0), 0), None);
        assert_eq!(stays(full, Class::Images, images(0, 0), 9), Some(StopReason::Data));
        assert_eq!(stays(full, Class::Volumes, images(1, 0), 2), None);
        assert_eq!(stays(full, Class::Volumes, images(1, 0), 1), Some(StopReason::Data));
        let damaged = PoolState { needs_check: true, ..metadata };
        for class in [Class::Images, Class::Volumes] {
            assert_eq!(stays(damaged, class, images(1, 750), 9), Some(StopReason::NeedsCheck));
        }
    }

    #[test]
    fn overcommitted_volumes_that_have_written_all_take_nothing_more() {
        let data = |gib| Usage { used: Bytes::gib(gib), total: Bytes::gib(5) };
        let full = |used, attainable| {
            let thin = ThinState { images: well(), volumes: PoolState { data: data(used), ..well() } };
            thin.volumes_full(Bytes::gib(attainable)).map(|stopped| (stopped.class, stopped.reason()))
        };
        assert_eq!(full(5, 4), Some((Class::Volumes, Reason::DataAlmostFull)));
        assert_eq!((full(5, 6), full(4, 4)), (None, None), "it grows, or has space");
    }
}
