//! When a kernel pool grows, when people are told, and when nothing more is promised in it.

use super::{ADMISSION_PERCENT, MAX_METADATA};
use crate::units::Bytes;

/// Percent of a metadata device from which it grows, before promises have to stop.
const METADATA_GROW_PERCENT: u64 = 60;
/// Percent of data from which a pool grows.
const DATA_GROW_PERCENT: u64 = 80;
/// Percent from which people are told.
pub(super) const ALARM_PERCENT: u64 = 80;
/// The least by which data grows, if there is as much.
const DATA_STEP: Bytes = Bytes::gib(1);

/// How much data is free when the kernel says that a pool of `data` bytes runs low: where [`decide`] begins to grow it.
pub fn low_water(data: Bytes) -> Bytes {
    data.saturating_sub(data.percent(DATA_GROW_PERCENT))
}

/// What a kernel pool can do at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolMode {
    /// Everything.
    ReadWrite,
    /// No new block; blocks that are there are written.
    OutOfDataSpace,
    /// Nothing that changes metadata: it has none left, or could not write it.
    ReadOnly,
    /// Nothing at all.
    Failed,
}

/// What is used of how much.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// In use.
    pub used: Bytes,
    /// In all.
    pub total: Bytes,
}

impl Usage {
    /// Used percent of the total, rounded up; 100 of nothing.
    pub fn percent(&self) -> u64 {
        Self::of(self.used, self.total)
    }

    fn of(used: Bytes, total: Bytes) -> u64 {
        if total == Bytes::ZERO {
            return 100;
        }
        let percent = (u128::from(used.0) * 100).div_ceil(u128::from(total.0));
        u64::try_from(percent).unwrap_or(u64::MAX)
    }
}

/// The state of a kernel pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolState {
    /// What it can do.
    pub mode: PoolMode,
    /// True if its metadata has to be checked offline. The kernel resizes nothing until then.
    pub needs_check: bool,
    /// Its data.
    pub data: Usage,
    /// Its metadata.
    pub metadata: Usage,
}

/// How far a kernel pool may grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// The size that its data may attain.
    pub data_limit: Bytes,
    /// The size that its metadata may attain.
    pub metadata_limit: Bytes,
    /// What is free in the volume group.
    pub free: Bytes,
    /// The unit in which the volume group gives.
    pub extent: Bytes,
}

/// One of a pool's two devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// What holds the blocks.
    Data,
    /// What says where they are.
    Metadata,
}

/// Why nothing new may be promised in a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The kernel has given it up.
    Failed,
    /// Its metadata must be checked offline.
    NeedsCheck,
    /// It writes no metadata.
    ReadOnly,
    /// Its metadata is used beyond [`ADMISSION_PERCENT`] and cannot grow.
    Metadata,
    /// Its data is used up and cannot grow.
    Data,
}

/// What is to be done about a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Promise nothing more in it.
    StopGranting(StopReason),
    /// Make one of its devices larger.
    Grow {
        /// Which.
        part: Part,
        /// By how much; a multiple of the extent.
        by: Bytes,
    },
    /// Tell people.
    Alarm {
        /// What runs low.
        part: Part,
        /// Used percent, after whatever growth there is.
        percent: u64,
    },
}

/// What is to be done about a pool in this state, in this order. Nothing if all is well.
///
/// Metadata comes before data in what is free: a pool that cannot map anything has no use for data.
pub fn decide(state: &PoolState, room: &Room) -> Vec<Action> {
    let stopped = match state.mode {
        PoolMode::Failed => Some(StopReason::Failed),
        _ if state.needs_check => Some(StopReason::NeedsCheck),
        PoolMode::ReadOnly => Some(StopReason::ReadOnly),
        PoolMode::ReadWrite | PoolMode::OutOfDataSpace => None,
    };
    // Without a working metadata device nothing grows, except a metadata device that is merely full.
    let full = stopped == Some(StopReason::ReadOnly);
    if stopped.is_some() && !full {
        return stopped.map(Action::StopGranting).into_iter().collect();
    }
    let metadata = grow_metadata(&state.metadata, room);
    let left = Room { free: room.free.saturating_sub(metadata), ..*room };
    let data = if full { Bytes::ZERO } else { grow_data(&state.data, &left) };
    let metadata_percent = Usage::of(state.metadata.used, state.metadata.total.saturating_add(metadata));
    let data_percent = Usage::of(state.data.used, state.data.total.saturating_add(data));
    let mut actions = Vec::new();
    if let Some(reason) = stopped {
        actions.push(Action::StopGranting(reason));
    } else if metadata_percent > ADMISSION_PERCENT {
        actions.push(Action::StopGranting(StopReason::Metadata));
    } else if data_percent >= 100 || (state.mode == PoolMode::OutOfDataSpace && data == Bytes::ZERO) {
        actions.push(Action::StopGranting(StopReason::Data));
    }
    for (part, by) in [(Part::Metadata, metadata), (Part::Data, data)] {
        if by > Bytes::ZERO {
            actions.push(Action::Grow { part, by });
        }
    }
    for (part, percent) in [(Part::Metadata, metadata_percent), (Part::Data, data_percent)] {
        if percent >= ALARM_PERCENT {
            actions.push(Action::Alarm { part, percent });
        }
    }
    actions
}

/// Until half of it is used, as far as there is room.
fn grow_metadata(usage: &Usage, room: &Room) -> Bytes {
    if usage.percent() < METADATA_GROW_PERCENT {
        return Bytes::ZERO;
    }
    let wanted = Bytes(usage.used.0.saturating_mul(2)).saturating_sub(usage.total).max(room.extent);
    let limit = room.metadata_limit.min(MAX_METADATA);
    within(wanted, limit.saturating_sub(usage.total), room)
}

/// By a tenth, but at least [`DATA_STEP`], as far as there is room.
fn grow_data(usage: &Usage, room: &Room) -> Bytes {
    if usage.percent() < DATA_GROW_PERCENT {
        return Bytes::ZERO;
    }
    let wanted = usage.total.percent(10).max(DATA_STEP).max(room.extent);
    within(wanted, room.data_limit.saturating_sub(usage.total), room)
}

/// How large the data of a kernel pool has to become that is nearly all written, where it may attain `limit`: by a tenth, but
/// at least by [`DATA_STEP`], or a tenth of what it may attain if that is less. Zero while there is enough.
pub fn demanded(usage: &Usage, limit: Bytes) -> Bytes {
    if usage.used == Bytes::ZERO || usage.percent() < DATA_GROW_PERCENT {
        return Bytes::ZERO;
    }
    let step = usage.total.percent(10).max(DATA_STEP.min(limit.percent(10)));
    usage.total.saturating_add(step).min(limit)
}

/// `wanted`, bounded by `most` and by what is free, in whole extents.
fn within(wanted: Bytes, most: Bytes, room: &Room) -> Bytes {
    let whole = |bytes: Bytes| Bytes(bytes.0 - bytes.0.checked_rem(room.extent.0).unwrap_or(0));
    wanted.round_up(room.extent).min(whole(most)).min(whole(room.free))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(data_percent: u64, metadata_percent: u64) -> PoolState {
        let usage = |percent: u64, total: Bytes| Usage { used: total.percent(percent), total };
        PoolState {
            mode: PoolMode::ReadWrite,
            needs_check: false,
            data: usage(data_percent, Bytes::gib(20)),
            metadata: usage(metadata_percent, Bytes::mib(100)),
        }
    }

    const PLENTY: Room = Room {
        data_limit: Bytes::gib(100),
        metadata_limit: Bytes::gib(1),
        free: Bytes::gib(80),
        extent: Bytes::mib(4),
    };

    #[test]
    fn a_pool_that_is_well_is_left_alone() {
        assert_eq!(decide(&state(79, 59), &PLENTY), []);
        assert_eq!(decide(&state(79, 59), &Room { free: Bytes::ZERO, ..PLENTY }), []);
    }

    #[test]
    fn data_grows_at_the_low_water_mark_in_steps_within_limits() {
        let grow = |by| Action::Grow { part: Part::Data, by };
        assert_eq!(decide(&state(80, 0), &PLENTY), [grow(Bytes::gib(2))]);
        let nearly = Room { data_limit: Bytes(Bytes::gib(21).0 - 1), ..PLENTY };
        assert_eq!(decide(&state(80, 0), &nearly), [grow(Bytes::mib(1020))]);
        let little = Room { free: Bytes::mib(6), ..PLENTY };
        let alarm = Action::Alarm { part: Part::Data, percent: 80 };
        assert_eq!(decide(&state(80, 0), &little), [grow(Bytes::mib(4)), alarm]);
        let total = state(0, 0).data.total;
        assert_eq!(low_water(total), total.percent(20));
    }

    #[test]
    fn what_cannot_grow_alarms_and_then_stops() {
        let none = Room { free: Bytes::ZERO, ..PLENTY };
        let alarm = |part, percent| Action::Alarm { part, percent };
        assert_eq!(decide(&state(90, 0), &none), [alarm(Part::Data, 90)]);
        assert_eq!(
            decide(&state(100, 0), &none),
            [Action::StopGranting(StopReason::Data), alarm(Part::Data, 100)]
        );
        assert_eq!(decide(&state(0, 70), &none), []);
        assert_eq!(decide(&state(0, 71), &none), [Action::StopGranting(StopReason::Metadata)]);
        assert_eq!(
            decide(&state(0, 85), &none),
            [Action::StopGranting(StopReason::Metadata), alarm(Part::Metadata, 85)]
        );
    }

    #[test]
    fn metadata_grows_first_and_to_the_double_of_what_is_used() {
        let grow = |part, by| Action::Grow { part, by };
        assert_eq!(decide(&state(0, 90), &PLENTY), [grow(Part::Metadata, Bytes::mib(80))]);
        let scarce = Room { free: Bytes::mib(80), ..PLENTY };
        let alarm = Action::Alarm { part: Part::Data, percent: 90 };
        assert_eq!(decide(&state(90, 90), &scarce), [grow(Part::Metadata, Bytes::mib(80)), alarm]);
        assert_eq!(decide(&state(0, 60), &PLENTY), [grow(Part::Metadata, Bytes::mib(20))]);
    }

    #[test]
    fn a_damaged_pool_is_neither_used_nor_grown() {
        let with = |mode, needs_check| PoolState { mode, needs_check, ..state(95, 95) };
        for (pool, reason) in [
            (with(PoolMode::Failed, false), StopReason::Failed),
            (with(PoolMode::Failed, true), StopReason::Failed),
            (with(PoolMode::ReadWrite, true), StopReason::NeedsCheck),
            (with(PoolMode::ReadOnly, true), StopReason::NeedsCheck),
        ] {
            assert_eq!(decide(&pool, &PLENTY), [Action::StopGranting(reason)]);
        }
    }

    #[test]
    fn a_full_pool_gets_what_it_lacks() {
        let full = PoolState { mode: PoolMode::OutOfDataSpace, ..state(100, 10) };
        assert_eq!(decide(&full, &PLENTY)[0], Action::Grow { part: Part::Data, by: Bytes::gib(2) });
        let read_only = PoolState { mode: PoolMode::ReadOnly, ..state(10, 99) };
        assert_eq!(
            decide(&read_only, &PLENTY)[..2],
            [
                Action::StopGranting(StopReason::ReadOnly),
                Action::Grow { part: Part::Metadata, by: Bytes::mib(100) }
            ]
        );
    }

    #[test]
    fn what_is_written_demands_more_in_steps_up_to_the_limit() {
        let usage = |used, total| Usage { used: Bytes::gib(used), total: Bytes::gib(total) };
        let asked = |used, total, limit| demanded(&usage(used, total), Bytes::gib(limit));
        assert_eq!((asked(15, 20, 100), asked(0, 0, 100)), (Bytes::ZERO, Bytes::ZERO));
        assert_eq!((asked(16, 20, 100), asked(40, 50, 100)), (Bytes::gib(22), Bytes::gib(55)));
        assert_eq!((asked(4, 5, 10), asked(10, 10, 10)), (Bytes::gib(6), Bytes::gib(10)));
        let nearly = demanded(&usage(4, 5), Bytes::mib(5 * 1024 + 100));
        assert_eq!(nearly, Bytes::mib(5 * 1024 + 100));
    }

    #[test]
    fn growth_never_exceeds_limit_or_what_is_free() {
        for used in 0..=100 {
            for free in [0, 1, 5, 100, 5000] {
                let room = Room { free: Bytes::mib(free), data_limit: Bytes::gib(21), ..PLENTY };
                let grown: Bytes = decide(&state(used, used), &room)
                    .iter()
                    .map(|action| match action {
                        Action::Grow { by, .. } => *by,
                        _ => Bytes::ZERO,
                    })
                    .sum();
                assert!(grown <= room.free && grown.0.is_multiple_of(room.extent.0), "{used} {free}");
            }
        }
    }
}
