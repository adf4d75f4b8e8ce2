//! Compares what was acknowledged with what is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde_json::Value;

use super::found::{DmDevice, Found};
use super::model::{Model, Pool, Volume};
use super::step::{BLOCK, Class};

/// What a failure counts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Total {
    /// `thin_check` refuses the metadata of a kernel pool.
    ThinCheckBad,
    /// Something acknowledged is not there.
    LostAcknowledged,
    /// Something is there that nothing acknowledged needs.
    Leaked,
    /// The record and the kernel do not say the same.
    RecordMismatch,
    /// Anything else that must not be.
    Other,
}

/// Something that does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What it counts as.
    pub total: Total,
    /// One sentence.
    pub what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.total, self.what)
    }
}

/// Compares. Nothing may be under way.
pub fn judge(model: &Model, found: &Found) -> Vec<Failure> {
    let mut judge = Judge { model, found, failures: Vec::new() };
    for device in found.devices.iter().filter(|device| device.suspended) {
        judge.fail(Total::Other, format!("device {} is suspended", device.name));
    }
    match &model.pool {
        Pool::None => judge.no_pool(),
        Pool::Forgotten(uid) => judge.forgotten(uid),
        Pool::Open(uid) => judge.open(uid),
    }
    judge.failures
}

struct Judge<'a> {
    model: &'a Model,
    found: &'a Found,
    failures: Vec<Failure>,
}

impl Judge<'_> {
    fn fail(&mut self, total: Total, what: String) {
        self.failures.push(Failure { total, what });
    }

    fn ours(&self) -> Vec<&DmDevice> {
        self.found.devices.iter().filter(|device| device.uuid.starts_with("BERTH-")).collect()
    }

    fn no_pool(&mut self) {
        self.no_devices();
        for name in self.found.volumes.keys() {
            self.fail(Total::Leaked, format!("logical volume {name} of a pool that was destroyed"));
        }
    }

    fn forgotten(&mut self, uid: &str) {
        self.no_devices();
        self.logical_volumes(uid);
    }

    fn no_devices(&mut self) {
        for name in self.ours().into_iter().map(|device| device.name.clone()).collect::<Vec<_>>() {
            self.fail(Total::Leaked, format!("device {name}, and no pool is open"));
        }
        for identifier in self.found.nbd.iter().filter(|identifier| identifier.starts_with("BERTH-")) {
            self.failures.push(Failure {
                total: Total::Leaked,
                what: format!("NBD device {identifier}, and no pool is open"),
            });
        }
    }

    fn open(&mut self, uid: &str) {
        if self.found.record.is_none() {
            self.fail(Total::LostAcknowledged, format!("the record of pool {uid} cannot be read"));
            return;
        }
        self.logical_volumes(uid);
        self.kernel_pools();
        let recorded = self.found.rows("volumes");
        for (volume, wanted) in &self.model.volumes {
            match recorded.get(volume) {
                None => self.fail(Total::LostAcknowledged, format!("volume {volume} is not recorded")),
                Some(row) => self.volume(volume, wanted, row),
            }
        }
        for volume in recorded.keys().filter(|volume| !self.model.volumes.contains_key(*volume)) {
            if self.model.gone.contains(volume) {
                let what = format!("volume {volume} was destroyed, and is recorded");
                self.fail(Total::LostAcknowledged, what);
            } else {
                self.fail(Total::Leaked, format!("volume {volume} is recorded, and nobody has it"));
            }
        }
        self.thin_devices();
        self.shown();
        self.promises();
        self.attachments();
        self.templates();
    }

    fn logical_volumes(&mut self, uid: &str) {
        let prefix = format!("berth-{}-", &uid[..8]);
        let mut wanted = BTreeSet::from([format!("{prefix}record")]);
        for class in Class::BOTH {
            wanted.extend(["data", "metadata"].map(|part| format!("{prefix}{}-{part}", class.word())));
        }
        let found: BTreeSet<String> = self.found.volumes.keys().cloned().collect();
        for name in wanted.difference(&found) {
            self.fail(Total::LostAcknowledged, format!("logical volume {name} is not there"));
        }
        for name in found.difference(&wanted) {
            self.fail(Total::Leaked, format!("logical volume {name} is of no use"));
        }
        for (class, least) in &self.model.grown {
            let name = format!("{prefix}{}-data", class.word());
            let size = self.found.volumes.get(&name).map(|volume| volume.size).unwrap_or_default();
            if size < *least {
                let what = format!("{name} has {size} bytes, and was grown to {least}");
                self.fail(Total::LostAcknowledged, what);
            }
        }
    }

    /// Transactions and sizes of the kernel pools.
    fn kernel_pools(&mut self) {
        let counters = self.found.rows("thin_counters");
        for class in Class::BOTH {
            let Some(dump) = self.found.dumps.get(&class) else {
                self.fail(Total::LostAcknowledged, format!("kernel pool {} is not open", class.word()));
                continue;
            };
            let recorded = counters.get(class.word()).and_then(|row| row["transaction"].as_u64());
            if recorded.unwrap_or_default() != dump.transaction {
                let (class, found) = (class.word(), dump.transaction);
                let what =
                    format!("kernel pool {class} is at transaction {found}, and the record at {recorded:?}");
                self.fail(Total::RecordMismatch, what);
            }
            let prefix = format!("BERTH-pool-{}-", class.word());
            let sectors =
                self.ours().into_iter().find(|device| device.uuid.starts_with(&prefix)).and_then(sectors);
            let data =
                self.found.volumes.iter().find(|(name, _)| name.ends_with(&format!("{}-data", class.word())));
            let size = data.map(|(_, volume)| volume.size / BLOCK * BLOCK);
            if sectors.map(|sectors| sectors * 512) != size {
                let what = format!("kernel pool {} has {sectors:?} sectors on {size:?} bytes", class.word());
                self.fail(Total::RecordMismatch, what);
            }
        }
    }

    /// What the record says of an acknowledged volume.
    fn volume(&mut self, uid: &str, wanted: &Volume, row: &Value) {
        let kind = if wanted.snapshot { "Snapshot" } else { "Volume" };
        let origin = wanted.template.as_ref().map_or(Value::Null, |template| template.as_str().into());
        let said = [
            ("state", "Ready".into(), &row["state"]),
            ("kind", kind.into(), &row["kind"]),
            ("size", wanted.size.into(), &row["size"]),
            ("origin", origin, &row["origin"]),
        ];
        for (field, wanted, found) in said {
            if *found != wanted && !found.to_string().contains(wanted.as_str().unwrap_or("nothing")) {
                let what = format!("{field} of volume {uid} is {found}, and not {wanted}");
                self.fail(Total::LostAcknowledged, what);
            }
        }
    }

    /// Record and kernel pools have the same thin devices, and each is a volume's.
    fn thin_devices(&mut self) {
        let recorded = self.found.rows("thin");
        let mut known: BTreeMap<Class, BTreeSet<u64>> = BTreeMap::new();
        for (uid, row) in &recorded {
            let class = Class::BOTH.into_iter().find(|class| row["class"] == format!("{class:?}"));
            let (Some(class), Some(id)) = (class, row["id"].as_u64()) else {
                self.fail(Total::RecordMismatch, format!("thin device {uid} is recorded as {row}"));
                continue;
            };
            known.entry(class).or_default().insert(id);
            if row["state"] != "Made" {
                let what = format!("thin device {uid} is still {}", row["state"]);
                self.fail(Total::RecordMismatch, what);
            }
            if !self.model.volumes.contains_key(uid) {
                self.fail(Total::Leaked, format!("thin device {uid} belongs to no volume"));
            }
            if self.found.dumps.get(&class).is_some_and(|dump| !dump.devices.contains_key(&id)) {
                let what = format!("thin device {id} of {uid} is recorded, and not in {}", class.word());
                self.fail(Total::RecordMismatch, what);
            }
        }
        for (class, dump) in &self.found.dumps {
            let recorded = known.remove(class).unwrap_or_default();
            for id in dump.devices.keys().filter(|id| !recorded.contains(id)) {
                let what = format!("thin device {id} in {} is not recorded", class.word());
                self.failures.push(Failure { total: Total::Leaked, what });
            }
        }
        for uid in self.model.volumes.keys().filter(|uid| !recorded.contains_key(*uid)) {
            self.failures.push(Failure {
                total: Total::LostAcknowledged,
                what: format!("volume {uid} has no thin device recorded"),
            });
        }
    }

    /// The thin devices that the kernel shows are those that are recorded, in the same way.
    fn shown(&mut self) {
        let thin = self.found.rows("thin");
        let shown: Vec<DmDevice> =
            self.ours().into_iter().filter(|device| device.uuid.contains("-thin-")).cloned().collect();
        for device in &shown {
            let uid = &device.uuid[device.uuid.len().saturating_sub(36)..];
            let Some(volume) = self.model.volumes.get(uid) else {
                self.fail(Total::Leaked, format!("device {} belongs to no volume", device.name));
                continue;
            };
            let row = thin.get(uid);
            let id = row.and_then(|row| row["id"].as_u64());
            if id.map(|id| id.to_string()).as_ref() != device.table.get(4) {
                let what = format!("device {} shows {:?}, and {id:?} is recorded", device.name, device.table);
                self.fail(Total::RecordMismatch, what);
            }
            let size = volume.size.next_multiple_of(BLOCK);
            if sectors(device) != Some(size / 512) {
                let what =
                    format!("device {} has {:?} sectors of {size} bytes", device.name, sectors(device));
                self.fail(Total::LostAcknowledged, what);
            }
        }
        for (uid, _) in self.model.volumes.iter().filter(|(_, volume)| volume.attached) {
            if !shown.iter().any(|device| device.uuid.ends_with(uid)) {
                let what = format!("volume {uid} is attached, and has no device");
                self.failures.push(Failure { total: Total::LostAcknowledged, what });
            }
        }
    }

    /// Space is promised to what is there, and to nothing else.
    fn promises(&mut self) {
        for (uid, row) in self.found.rows("promises") {
            let known = self.model.volumes.contains_key(&uid) || self.model.templates.contains(&uid);
            if !known && row["released"] != true {
                self.fail(Total::Leaked, format!("space is promised to {uid}, which is not there"));
            }
        }
    }

    /// What is attached is recorded, so that nothing of it is taken away.
    fn attachments(&mut self) {
        let recorded: BTreeSet<String> = self.found.rows("attachments").into_keys().collect();
        let attached = self.model.volumes.iter().filter(|(_, volume)| volume.attached);
        let attached: BTreeSet<String> = attached.map(|(uid, _)| uid.clone()).collect();
        for uid in attached.difference(&recorded) {
            self.fail(Total::LostAcknowledged, format!("volume {uid} is attached, and not recorded so"));
        }
        for uid in recorded.difference(&attached) {
            self.fail(Total::Leaked, format!("volume {uid} is recorded as attached, and is not"));
        }
    }

    fn templates(&mut self) {
        let recorded: BTreeSet<String> = self.found.rows("templates").into_keys().collect();
        for uid in self.model.templates.difference(&recorded) {
            self.failures.push(Failure {
                total: Total::LostAcknowledged,
                what: format!("template {uid} is not recorded"),
            });
        }
        for uid in recorded.difference(&self.model.templates) {
            let what = format!("template {uid} is recorded, and nobody has it");
            self.failures.push(Failure { total: Total::Leaked, what });
        }
        let connected: BTreeSet<&str> =
            self.found.nbd.iter().filter_map(|identifier| identifier.strip_prefix("BERTH-")).collect();
        let wanted: BTreeSet<&str> = self.model.templates.iter().map(String::as_str).collect();
        for uid in wanted.difference(&connected) {
            let what = format!("template {uid} has no device");
            self.failures.push(Failure { total: Total::LostAcknowledged, what });
        }
        for uid in connected.difference(&wanted) {
            let what = format!("an NBD device shows template {uid}, which nobody has");
            self.failures.push(Failure { total: Total::Leaked, what });
        }
    }
}

fn sectors(device: &DmDevice) -> Option<u64> {
    device.table.get(1)?.parse().ok()
}

#[cfg(test)]
mod tests;
