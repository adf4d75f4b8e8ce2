//! Changes of table that are known to be ours: which they are, and what has to be true before the device is suspended.

use std::collections::BTreeSet;
use std::fs;

use berth_core::hydration::Progress;

use super::dmsetup::{self, DeviceInfo, DmError, understood};
use super::names::DeviceName;
use super::table::{DeviceNumber, PoolTable, ThinTable};
use super::template::{CloneStatus, CloneTable, LinearTable};

const NOT_UNDERSTOOD: &str = "its table is not understood";

/// A change of table that is known to be one of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum TableChange {
    /// It is as it should be.
    None,
    /// A kernel pool grows, or behaves otherwise.
    Pool { old: PoolTable, new: PoolTable },
    /// A thin device grows.
    Thin { old: ThinTable, new: ThinTable },
    /// A template that was a clone becomes its destination.
    Local { old: CloneTable, new: LinearTable },
}

impl TableChange {
    /// Refuses what would make it another device, or lose what lies behind its new end.
    pub(super) fn check(device: &DeviceName, old: &str, new: &str) -> Result<Self, &'static str> {
        match device {
            DeviceName::KernelPool { .. } => {
                let old: PoolTable = old.parse().map_err(|_| NOT_UNDERSTOOD)?;
                let new: PoolTable = new.parse().map_err(|_| NOT_UNDERSTOOD)?;
                let same = |table: PoolTable| (table.metadata, table.data, table.block_sectors);
                if same(old) != same(new) {
                    return Err("the new table has other devices or blocks");
                }
                not_smaller(old.sectors, new.sectors)?;
                Ok(Self::Pool { old, new })
            }
            DeviceName::Thin { .. } => {
                let old: ThinTable = old.parse().map_err(|_| NOT_UNDERSTOOD)?;
                let new: ThinTable = new.parse().map_err(|_| NOT_UNDERSTOOD)?;
                let same = |table: ThinTable| (table.pool, table.id, table.origin);
                if same(old) != same(new) {
                    return Err("the new table has another pool, number or origin");
                }
                not_smaller(old.sectors, new.sectors)?;
                Ok(Self::Thin { old, new })
            }
            DeviceName::Template { .. } => Self::check_template(old, new),
            DeviceName::CloneMetadata { .. } => Err("its table never changes"),
        }
    }

    fn check_template(old: &str, new: &str) -> Result<Self, &'static str> {
        let new: LinearTable = new.parse().map_err(|_| NOT_UNDERSTOOD)?;
        if old.parse() == Ok(new) {
            return Ok(Self::None);
        }
        let old: CloneTable = old.parse().map_err(|_| NOT_UNDERSTOOD)?;
        if (old.sectors, old.destination) != (new.sectors, new.device) {
            return Err("the new table is not the whole of its destination");
        }
        Ok(Self::Local { old, new })
    }

    /// Whether it refuses writes afterwards.
    pub(super) fn makes_read_only(&self) -> bool {
        matches!(self, Self::Local { .. })
    }

    /// Why a clone may not become its destination; `None` if it may. What counts as local is durable before that is told.
    pub(super) fn require_local(&self, uuid: &str) -> Result<Option<String>, DmError> {
        if !matches!(self, Self::Local { .. }) {
            return Ok(None);
        }
        let status: CloneStatus = understood(uuid, dmsetup::committed_status(uuid)?.parse())?;
        Ok(match status.progress() {
            Some(progress) if progress.is_complete() => None,
            Some(Progress { hydrated, total }) => Some(format!("{hydrated} regions of {total} are local")),
            None => Some("its metadata has failed".to_owned()),
        })
    }

    pub(super) fn old(&self) -> String {
        match self {
            Self::None => String::new(),
            Self::Pool { old, .. } => old.to_string(),
            Self::Thin { old, .. } => old.to_string(),
            Self::Local { old, .. } => old.to_string(),
        }
    }

    pub(super) fn new_table(&self) -> String {
        match self {
            Self::None => String::new(),
            Self::Pool { new, .. } => new.to_string(),
            Self::Thin { new, .. } => new.to_string(),
            Self::Local { new, .. } => new.to_string(),
        }
    }

    /// The external origins that the suspension may have to wait for: those of a pool's active devices too, whose
    /// suspension cannot be given up. Of a clone its source, while somebody still reads from there.
    pub(super) fn origins(&self, device: &DeviceInfo) -> Result<BTreeSet<DeviceNumber>, DmError> {
        match self {
            Self::None => return Ok(BTreeSet::new()),
            Self::Thin { old, .. } => return Ok(old.origin.into_iter().collect()),
            Self::Local { old, .. } => {
                let read = Some(old.source).filter(|source| is_busy(*source));
                return Ok(read.into_iter().chain([old.destination]).collect());
            }
            Self::Pool { .. } => {}
        }
        let mut origins = BTreeSet::new();
        for (name, line) in dmsetup::thin_tables()? {
            let table: ThinTable = understood(&name, line.parse())?;
            origins.extend(table.origin.filter(|_| table.pool == device.number));
        }
        Ok(origins)
    }
}

/// True if requests are under way, or that cannot be told.
fn is_busy(device: DeviceNumber) -> bool {
    let counts = fs::read_to_string(format!("/sys/dev/block/{device}/inflight")).unwrap_or_default();
    counts.split_ascii_whitespace().collect::<Vec<_>>() != ["0", "0"]
}

fn not_smaller(old: u64, new: u64) -> Result<(), &'static str> {
    if new < old { Err("the new table is smaller") } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use berth_core::ids::Uid;
    use berth_core::ledger::Class;

    use super::*;

    const POOL: &str = "0f3c9a1e-5b7d-4c2a-9e10-00a1b2c3d4e5";

    fn pool() -> DeviceName {
        DeviceName::kernel_pool(&Uid::from(POOL), Class::Volumes).unwrap()
    }

    fn thin() -> DeviceName {
        DeviceName::thin(&Uid::from(POOL), Class::Volumes, &Uid::from(POOL)).unwrap()
    }

    fn template() -> DeviceName {
        DeviceName::template(&Uid::from(POOL), &Uid::from(POOL)).unwrap()
    }

    #[test]
    fn a_pool_may_only_grow_and_change_its_behaviour() {
        let old = "0 1024 thin-pool 254:0 254:1 128 32 1 no_discard_passdown";
        let good = "0 2048 thin-pool 254:0 254:1 128 64 1 error_if_no_space";
        let change = TableChange::check(&pool(), old, good).unwrap();
        assert_eq!(change.new_table().split(' ').nth(1), Some("2048"));
        let bad = [
            ("0 1023 thin-pool 254:0 254:1 128 32 0", "smaller"),
            ("0 2048 thin-pool 254:0 8:0 128 32 0", "other devices"),
            ("0 2048 thin-pool 8:0 254:1 128 32 0", "other devices"),
            ("0 2048 thin-pool 254:0 254:1 256 32 0", "other devices"),
            ("0 2048 linear 254:0 0", "not understood"),
            ("0 2048 error", "not understood"),
            ("", "not understood"),
        ];
        for (new, why) in bad {
            let error = TableChange::check(&pool(), old, new).unwrap_err();
            assert!(error.contains(why), "{new}: {error}");
        }
    }

    #[test]
    fn a_thin_device_may_only_grow() {
        let old = "0 1024 thin 254:2 7 43:0";
        assert!(TableChange::check(&thin(), old, "0 4096 thin 254:2 7 43:0").is_ok());
        let bad = [
            "0 1000 thin 254:2 7 43:0",
            "0 4096 thin 254:2 8 43:0",
            "0 4096 thin 254:3 7 43:0",
            "0 4096 thin 254:2 7",
            "0 4096 thin 254:2 7 8:0",
            "0 4096 linear 8:0 0",
        ];
        for new in bad {
            assert!(TableChange::check(&thin(), old, new).is_err(), "{new}");
        }
        assert!(
            TableChange::check(&pool(), old, "0 4096 thin 254:2 7 43:0").is_err(),
            "another kind of device"
        );
    }

    #[test]
    fn a_clone_may_only_become_its_own_destination() {
        let old = "0 1024 clone 254:2 254:1 43:0 128 2 no_hydration no_discard_passdown";
        let new = "0 1024 linear 254:1 0";
        let change = TableChange::check(&template(), old, new).unwrap();
        assert_eq!((change.old().as_str(), change.new_table().as_str()), (old, new));
        assert!(change.makes_read_only());
        assert_eq!(TableChange::check(&template(), new, new), Ok(TableChange::None), "it was done before");
        let bad = [
            "0 1024 linear 254:2 0",
            "0 1024 linear 43:0 0",
            "0 1024 linear 254:1 8",
            "0 1000 linear 254:1 0",
            "0 2048 linear 254:1 0",
            "0 1024 error",
            "0 1024 thin 254:2 7",
            old,
        ];
        for new in bad {
            assert!(TableChange::check(&template(), old, new).is_err(), "{new}");
        }
        let copies = "0 1024 clone 254:2 254:1 43:0 128 0";
        assert!(TableChange::check(&template(), copies, new).is_err(), "a clone that is not ours");
        assert!(TableChange::check(&template(), "0 1024 linear 254:9 0", new).is_err());
        assert!(
            TableChange::check(&thin(), old, new).is_err() && TableChange::check(&pool(), old, new).is_err()
        );
        let metadata = DeviceName::clone_metadata(&Uid::from(POOL), &Uid::from(POOL)).unwrap();
        assert!(TableChange::check(&metadata, "0 8 thin 254:2 7", "0 16 thin 254:2 7").is_err());
    }
}
