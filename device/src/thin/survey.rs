//! The volume groups of a machine in which there is anything of ours, whoever's pools they belong to.

use std::collections::BTreeMap;
use std::path::PathBuf;

use berth_core::ids::Uid;
use serde::Deserialize;

use super::group_error::VolumeGroupError;
use super::lvm::{self, Scope};
use super::volume_group::{TAG, TAG_POOL};

/// A volume group with logical volumes of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundGroup {
    /// Its name.
    pub name: String,
    /// The pool that it was made for; `None` for a group of others.
    pub pool: Option<Uid>,
    /// The devices it lies on, as far as they are there.
    pub devices: Vec<PathBuf>,
    /// How many of its devices are not there.
    pub missing: u64,
    /// The names of the logical volumes in it that bear our tag.
    pub volumes: Vec<String>,
}

#[derive(Deserialize)]
struct VolumeRow {
    vg_name: String,
    vg_tags: String,
    #[serde(deserialize_with = "lvm::bytes")]
    vg_missing_pv_count: u64,
    lv_name: String,
}

#[derive(Deserialize)]
struct DeviceRow {
    pv_name: PathBuf,
    vg_name: String,
}

/// Looks at every device in `scope`, and changes nothing.
pub fn survey(scope: &Scope) -> Result<Vec<FoundGroup>, VolumeGroupError> {
    let all = "of this machine";
    let fields = "vg_name,vg_tags,vg_missing_pv_count,lv_name";
    let select = format!("lv_tags={TAG}");
    let volumes: Vec<VolumeRow> = lvm::report(all, scope, "lvs", fields, &["-S", &select])?;
    if volumes.is_empty() {
        return Ok(Vec::new());
    }
    let devices = lvm::report(all, scope, "pvs", "pv_name,vg_name", &[])?;
    Ok(grouped(volumes, devices))
}

fn grouped(volumes: Vec<VolumeRow>, devices: Vec<DeviceRow>) -> Vec<FoundGroup> {
    let mut groups: BTreeMap<String, FoundGroup> = BTreeMap::new();
    for row in volumes {
        let group = groups.entry(row.vg_name.clone()).or_insert_with(|| FoundGroup {
            name: row.vg_name,
            pool: row.vg_tags.split(',').find_map(|tag| tag.strip_prefix(TAG_POOL)).map(Uid::from),
            devices: Vec::new(),
            missing: row.vg_missing_pv_count,
            volumes: Vec::new(),
        });
        group.volumes.push(row.lv_name);
    }
    for row in devices.into_iter().filter(|row| row.pv_name.starts_with("/dev")) {
        if let Some(group) = groups.get_mut(&row.vg_name) {
            group.devices.push(row.pv_name);
        }
    }
    groups.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_groups_with_the_devices_that_are_there() {
        let volume = |group: &str, tags: &str, name: &str| VolumeRow {
            vg_name: group.to_owned(),
            vg_tags: tags.to_owned(),
            vg_missing_pv_count: 1,
            lv_name: name.to_owned(),
        };
        let device = |name: &str, group: &str| DeviceRow { pv_name: name.into(), vg_name: group.to_owned() };
        let found = grouped(
            vec![volume("a", "berth,berth.pool=u1", "x"), volume("b", "", "y"), volume("a", "", "z")],
            vec![device("/dev/sda", "a"), device("[unknown]", "a"), device("/dev/sdc", "c")],
        );
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].pool.clone(), found[0].missing), (Some("u1".into()), 1));
        assert_eq!(
            (&found[0].volumes, &found[0].devices),
            (&vec!["x".into(), "z".into()], &vec!["/dev/sda".into()])
        );
        assert_eq!((found[1].name.as_str(), &found[1].pool), ("b", &None));
    }
}
