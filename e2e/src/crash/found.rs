//! What other programs say: `dmsetup`, `lvs`, `thin_dump` and `berth-record-dump`, as text of `look.sh`.

use std::collections::BTreeMap;

use serde_json::Value;

use super::step::Class;

/// A dm device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DmDevice {
    /// Its name.
    pub name: String,
    /// Its UUID; empty for those of the bed.
    pub uuid: String,
    /// It holds back whatever is asked of it.
    pub suspended: bool,
    /// The words of its table.
    pub table: Vec<String>,
}

/// A logical volume.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogicalVolume {
    /// Unit: bytes.
    pub size: u64,
    /// Between commas.
    pub tags: String,
}

/// The metadata of a kernel pool.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dump {
    /// The transaction that it was told of.
    pub transaction: u64,
    /// Thin devices by number, with the blocks that each has.
    pub devices: BTreeMap<u64, u64>,
}

/// All of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Found {
    /// dm devices.
    pub devices: Vec<DmDevice>,
    /// Logical volumes on the pool's device, by name.
    pub volumes: BTreeMap<String, LogicalVolume>,
    /// The kernel pools that are open.
    pub dumps: BTreeMap<Class, Dump>,
    /// The pool's record.
    pub record: Option<Value>,
    /// Identifiers of the connected NBD devices.
    pub nbd: Vec<String>,
}

impl Found {
    /// Reads the text.
    pub fn read(text: &str) -> Self {
        let mut found = Self::default();
        for part in text.split("== ").skip(1) {
            let (name, body) = part.split_once('\n').unwrap_or((part, ""));
            let lines = || body.lines().filter(|line| !line.trim().is_empty());
            match name {
                "info" => found.devices = lines().filter_map(device).collect(),
                "table" => lines().for_each(|line| found.take_table(line)),
                "lvs" => found.volumes = lines().filter_map(logical_volume).collect(),
                "dump images" => drop(found.dumps.insert(Class::Images, dump(body))),
                "dump volumes" => drop(found.dumps.insert(Class::Volumes, dump(body))),
                "record" => found.record = serde_json::from_str(body).ok(),
                "nbd" => {
                    found.nbd = lines().filter_map(|line| Some(line.split_once('|')?.1.to_owned())).collect();
                }
                _ => {}
            }
        }
        found
    }

    fn take_table(&mut self, line: &str) {
        let Some((name, table)) = line.split_once(": ") else { return };
        if let Some(device) = self.devices.iter_mut().find(|device| device.name == name) {
            device.table = table.split(' ').map(str::to_owned).collect();
        }
    }

    /// The rows of a table of the record.
    pub fn rows(&self, table: &str) -> BTreeMap<String, Value> {
        let rows = self.record.as_ref().and_then(|record| record["tables"][table].as_object());
        rows.map(|rows| rows.iter().map(|(key, row)| (key.clone(), row.clone())).collect())
            .unwrap_or_default()
    }
}

fn device(line: &str) -> Option<DmDevice> {
    let mut fields = line.split('|');
    let (name, uuid, state) = (fields.next()?, fields.next()?, fields.next()?);
    let suspended = state.trim() == "Suspended";
    Some(DmDevice { name: name.to_owned(), uuid: uuid.to_owned(), suspended, table: Vec::new() })
}

fn logical_volume(line: &str) -> Option<(String, LogicalVolume)> {
    let mut fields = line.trim().split('|');
    let (name, size, tags) = (fields.next()?, fields.next()?, fields.next().unwrap_or_default());
    Some((name.to_owned(), LogicalVolume { size: size.parse().ok()?, tags: tags.to_owned() }))
}

fn dump(xml: &str) -> Dump {
    let mut dump = Dump::default();
    for line in xml.lines() {
        let number =
            |name: &str| line.split_once(&format!(" {name}=\""))?.1.split('"').next()?.parse::<u64>().ok();
        if line.contains("<superblock") {
            dump.transaction = number("transaction").unwrap_or_default();
        } else if let Some(id) = number("dev_id") {
            dump.devices.insert(id, number("mapped_blocks").unwrap_or_default());
        }
    }
    dump
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"== info
disk||Active
berth-0f3c9a1e-images|BERTH-pool-images-0f|Suspended
== table
disk: 0 100 log-writes 98:16 98:0
berth-0f3c9a1e-images: 0 8192 thin-pool 254:4 254:5 128 0 0
== lvs
  berth-0f3c9a1e-record|16777216|berth
  other|4194304|
== dump volumes
<superblock uuid="" time="0" transaction="7" flags="0" version="2" data_block_size="128" nr_data_blocks="64">
  <device dev_id="3" mapped_blocks="2" transaction="1" creation_time="0" snap_time="0">
== record
{"tables": {"volumes": {"v": {"size": 5}}}}
== nbd
nbd0|BERTH-t
"#;

    #[test]
    fn everything_that_is_said_is_read() {
        let found = Found::read(TEXT);
        let pool = &found.devices[1];
        assert!(pool.suspended && pool.table[2] == "thin-pool" && !found.devices[0].suspended);
        assert_eq!(found.volumes["berth-0f3c9a1e-record"].size, 16 << 20);
        assert_eq!(found.volumes["other"].tags, "");
        let dump = Dump { transaction: 7, devices: BTreeMap::from([(3, 2)]) };
        assert_eq!(found.dumps, BTreeMap::from([(Class::Volumes, dump)]));
        assert_eq!(found.rows("volumes")["v"]["size"], 5);
        assert_eq!(found.nbd, ["BERTH-t"]);
    }
}
