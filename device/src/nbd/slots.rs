//! Which `/dev/nbdN` may be used. Pure: what is known of the devices comes in as plain data.

use std::collections::BTreeSet;
use std::fmt;

use berth_core::ids::Uid;
use berth_core::units::Bytes;
use thiserror::Error;

/// How the identifier of every device of ours begins.
const PREFIX: &str = "BERTH-";

/// Whose device it is, as the kernel keeps it: `BERTH-<UID>`.
///
/// The kernel shows it in `/sys/block/nbdN/backend` (Linux 5.14), and takes a new connection for the device only with it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendId(String);

/// Why no identifier can be made.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BackendIdError {
    /// Not a UID as the API server gives them.
    #[error("`{0}` is not a UUID of lower-case hexadecimal digits")]
    NotAUuid(String),
}

impl BackendId {
    /// The identifier of what has this UID.
    pub fn new(uid: &Uid) -> Result<Self, BackendIdError> {
        let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        let groups = uid.as_str().split('-').map(str::len);
        if groups.eq([8, 4, 4, 4, 12]) && uid.as_str().bytes().all(|byte| byte == b'-' || hex(byte)) {
            Ok(Self(format!("{PREFIX}{uid}")))
        } else {
            Err(BackendIdError::NotAUuid(uid.to_string()))
        }
    }

    /// Reads back what the kernel shows; `None` if it is none of ours.
    pub fn parse(text: &str) -> Option<Self> {
        Self::new(&Uid::from(text.strip_prefix(PREFIX)?)).ok()
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whose it is.
    pub fn uid(&self) -> Uid {
        Uid::from(&self.0[PREFIX.len()..])
    }
}

impl fmt::Display for BackendId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is known of a device `/dev/nbdN`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// Its number.
    pub index: u32,
    /// True if it is connected, or open, or not yet let go by the last who had it open.
    pub in_use: bool,
    /// The process that connected it; absent when it is not connected.
    pub pid: Option<u32>,
    /// The identifier that it was connected with.
    pub backend: Option<String>,
    /// Its size; 0 when it is not connected.
    pub size: Bytes,
    /// How many devices are made of it.
    pub holders: usize,
}

/// Whose a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SlotUse {
    /// Nobody's.
    Free,
    /// Ours.
    Ours(BackendId),
    /// Connected by somebody else.
    Foreign,
    /// Not connected, but not let go either: somebody has it open.
    Held,
}

impl Slot {
    /// Whose it is.
    pub fn usage(&self) -> SlotUse {
        let ours = self.backend.as_deref().and_then(BackendId::parse);
        match (ours, self.pid) {
            (Some(id), _) => SlotUse::Ours(id),
            (None, Some(_)) => SlotUse::Foreign,
            (None, None) if self.backend.is_some() => SlotUse::Foreign,
            (None, None) if self.in_use || self.size != Bytes::ZERO || self.holders > 0 => SlotUse::Held,
            (None, None) => SlotUse::Free,
        }
    }
}

impl Slot {
    /// Who has it, for people.
    fn holder(&self) -> String {
        let who = match (self.usage(), self.pid) {
            (SlotUse::Ours(id), _) => id.to_string(),
            (SlotUse::Foreign, Some(pid)) => format!("of process {pid}"),
            (SlotUse::Foreign, None) => "of others".to_owned(),
            (SlotUse::Free | SlotUse::Held, _) => "held".to_owned(),
        };
        format!("nbd{} {who}", self.index)
    }
}

/// No device is free.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "none of the {total} devices /dev/nbdN is free: {ours} ours, {foreign} of others, {quarantined} not yet let go \
     ({by}); the option nbds_max of the module nbd makes more"
)]
pub struct SlotsExhausted {
    /// How many there are.
    pub total: usize,
    /// How many are ours and in use.
    pub ours: usize,
    /// How many others have connected.
    pub foreign: usize,
    /// How many are not connected, and not used before they were seen idle.
    pub quarantined: usize,
    /// Who has each: `nbd0 BERTH-<UID>`, `nbd1 of process 7`, `nbd2 held`.
    pub by: String,
}

/// Which devices are not to be used although they may look free.
///
/// Lost at a restart, which is no harm: a device that is not idle does not look free.
#[derive(Clone, Debug, Default)]
pub struct Slots {
    quarantined: BTreeSet<u32>,
}

impl Slots {
    /// Keeps a device from being used until it was seen idle: its disconnection was not confirmed.
    pub fn quarantine(&mut self, index: u32) {
        self.quarantined.insert(index);
    }

    /// The devices that are kept from being used.
    pub fn quarantined(&self) -> impl Iterator<Item = u32> + '_ {
        self.quarantined.iter().copied()
    }

    /// Takes note of what was seen since: what is idle is quarantined no longer.
    pub fn observe(&mut self, seen: &[Slot]) {
        let idle =
            |index: &u32| seen.iter().any(|slot| slot.index == *index && slot.usage() == SlotUse::Free);
        self.quarantined.retain(|index| !idle(index));
    }

    /// The lowest device that may be used and is not in `tried`.
    pub fn pick(&self, seen: &[Slot], tried: &BTreeSet<u32>) -> Result<u32, SlotsExhausted> {
        let usable = |slot: &&Slot| {
            slot.usage() == SlotUse::Free
                && !tried.contains(&slot.index)
                && !self.quarantined.contains(&slot.index)
        };
        match seen.iter().filter(usable).map(|slot| slot.index).min() {
            Some(index) => Ok(index),
            None => Err(self.exhausted(seen)),
        }
    }

    fn exhausted(&self, seen: &[Slot]) -> SlotsExhausted {
        let (mut ours, mut foreign) = (0, 0);
        for slot in seen.iter().filter(|slot| !self.quarantined.contains(&slot.index)) {
            match slot.usage() {
                SlotUse::Ours(_) => ours += 1,
                SlotUse::Foreign => foreign += 1,
                SlotUse::Free | SlotUse::Held => {}
            }
        }
        let by: Vec<_> = seen.iter().map(Slot::holder).collect();
        let quarantined = seen.len() - ours - foreign;
        SlotsExhausted { total: seen.len(), ours, foreign, quarantined, by: by.join(", ") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0f3c9a1e-5b7d-4c2a-9e10-00a1b2c3d4e5";

    fn idle(index: u32) -> Slot {
        Slot { index, ..Slot::default() }
    }

    fn connected(index: u32, backend: Option<&str>) -> Slot {
        let backend = backend.map(str::to_owned);
        Slot { index, in_use: true, pid: Some(7), backend, size: Bytes::mib(1), holders: 0 }
    }

    fn none() -> BTreeSet<u32> {
        BTreeSet::new()
    }

    #[test]
    fn identifiers_read_back_and_hostile_ones_are_not_ours() {
        let id = BackendId::new(&Uid::from(UID)).unwrap();
        assert_eq!(id.to_string(), format!("BERTH-{UID}"));
        assert_eq!((BackendId::parse(id.as_str()), id.uid()), (Some(id.clone()), Uid::from(UID)));
        for bad in ["", "BERTH-", UID, "BERTH-x", &format!("BERTH-{UID}x"), &format!("berth-{UID}")] {
            assert_eq!(BackendId::parse(bad), None, "{bad}");
        }
        assert!(BackendId::new(&Uid::from(UID.to_uppercase().as_str())).is_err());
    }

    #[test]
    fn each_device_is_somebodys() {
        let ours = format!("BERTH-{UID}");
        assert!(matches!(connected(0, Some(&ours)).usage(), SlotUse::Ours(id) if id.as_str() == ours));
        for foreign in [connected(0, None), connected(0, Some("rbd/pool/image")), connected(0, Some(""))] {
            assert_eq!(foreign.usage(), SlotUse::Foreign);
        }
        assert_eq!(idle(0).usage(), SlotUse::Free);
        let held = [
            Slot { in_use: true, ..idle(0) },
            Slot { size: Bytes(512), ..idle(0) },
            Slot { holders: 1, ..idle(0) },
        ];
        for slot in held {
            assert_eq!(slot.usage(), SlotUse::Held, "{slot:?}");
        }
    }

    #[test]
    fn the_lowest_free_device_is_taken_and_one_that_was_tried_is_not() {
        let seen = [idle(5), connected(0, None), idle(3), Slot { in_use: true, ..idle(1) }];
        let slots = Slots::default();
        assert_eq!(slots.pick(&seen, &none()), Ok(3));
        assert_eq!(slots.pick(&seen, &BTreeSet::from([3])), Ok(5));
        let error = slots.pick(&seen, &BTreeSet::from([3, 5])).unwrap_err();
        let by = "nbd5 held, nbd0 of process 7, nbd3 held, nbd1 held".to_owned();
        assert_eq!(error, SlotsExhausted { total: 4, ours: 0, foreign: 1, quarantined: 3, by });
    }

    #[test]
    fn a_device_whose_end_was_not_seen_waits_until_it_was() {
        let ours = format!("BERTH-{UID}");
        let mut slots = Slots::default();
        slots.quarantine(0);
        // Before anybody has looked again, its looks are not believed.
        assert!(slots.pick(&[idle(0)], &none()).is_err());
        slots.observe(&[connected(0, Some(&ours))]);
        slots.observe(&[Slot { in_use: true, ..idle(0) }]);
        assert_eq!(slots.quarantined().collect::<Vec<_>>(), [0]);
        let error = slots.pick(&[connected(0, Some(&ours)), connected(1, Some(&ours))], &none()).unwrap_err();
        let by = format!("nbd0 {ours}, nbd1 {ours}");
        assert_eq!(error, SlotsExhausted { total: 2, ours: 1, foreign: 0, quarantined: 1, by });
        assert!(error.to_string().contains("none of the 2 devices"), "{error}");
        slots.observe(&[idle(0)]);
        assert_eq!(slots.pick(&[idle(0)], &none()), Ok(0));
        assert!(slots.pick(&[], &none()).is_err());
    }
}
