//! Areas on this node's disks that belong to no pool of it. They are looked at, and left as they are.

use std::fs;
use std::path::Path;

use berth_core::ids::Uid;
use berth_device::loop_device;
use berth_device::mounts::{self, FsType, MountOptions};
use berth_device::pool_area;
use berth_device::thin::{self, FoundGroup, Scope, VolumeGroup};
use berth_record::{PoolIdentity, PoolRecord};

use super::error::OperationError;
use super::{PoolLine, PoolLineState};
use crate::agent::pools::Pools;
use crate::area::{Backend, ThinGroup};
use crate::telemetry::chain;

/// How the logical volume of a pool's record is named: `berth-<first 8 digits of the area's UID>-record`.
const RECORD_PREFIX: &str = "berth-";
const RECORD_SUFFIX: &str = "-record";

/// Those that are none of `known`: in volume groups, and in directories that held an area of this node.
pub fn areas(pools: &Pools, known: &[Uid]) -> Result<Vec<PoolLine>, OperationError> {
    let mut lines = Vec::new();
    for dir in pools.directories()? {
        match pool_area::identity_in(&dir) {
            Ok(Some((identity, size))) if !known.contains(&identity.pool) => lines.push(PoolLine {
                message: Some(format!("was pool {} of node {}", identity.name, identity.node)),
                backend: Some(Backend::Filesystem { path: dir, size }),
                ..found(identity.pool)
            }),
            Ok(_) => {}
            Err(error) => tracing::warn!(dir = %dir.display(), error = chain(&error), "not looked at"),
        }
    }
    if !thin::missing().is_empty() {
        return Ok(lines);
    }
    // What guests have written is none of the host's business.
    let of_guests = [pools.mount_root(), Path::new("/dev/mapper")].map(loop_device::list_below);
    let of_guests = of_guests.into_iter().flatten().flatten().map(|(device, _)| device.path);
    match thin::survey(&Scope::AllBut(of_guests.collect())) {
        Ok(groups) => lines.extend(groups.iter().flat_map(|group| in_group(pools, known, group))),
        Err(error) => tracing::warn!(error = chain(&error), "volume groups are not looked at"),
    }
    Ok(lines)
}

fn found(area: Uid) -> PoolLine {
    PoolLine { pool: None, area, backend: None, state: PoolLineState::Found, message: None, space: None }
}

/// The areas of a volume group, each told by the volume of its record.
fn in_group(pools: &Pools, known: &[Uid], group: &FoundGroup) -> Vec<PoolLine> {
    let records = group.volumes.iter().filter_map(|name| {
        let short = name.strip_prefix(RECORD_PREFIX)?.strip_suffix(RECORD_SUFFIX)?;
        let is_known = known.iter().any(|area| area.as_str().starts_with(short));
        (short.len() == 8 && !is_known).then_some((name, short))
    });
    let line = |(name, short): (&String, &str)| {
        let told = group.pool.clone().unwrap_or_else(|| Uid::from(short));
        if group.missing > 0 {
            let message = format!("volume group {} lacks {} of its devices", group.name, group.missing);
            return PoolLine { message: Some(message), ..found(told) };
        }
        match look(pools, group, name) {
            Ok(identity) => PoolLine {
                backend: backend(group, &identity),
                message: Some(format!(
                    "was pool {} ({}) of node {}",
                    identity.pool_name, identity.pool_uid, identity.node
                )),
                ..found(identity.area().clone())
            },
            Err(why) => PoolLine { message: Some(why), ..found(told) },
        }
    };
    records.map(line).collect()
}

/// What the area was made of, on the devices that it lies on here.
fn backend(group: &FoundGroup, identity: &PoolIdentity) -> Option<Backend> {
    let mut backend = serde_json::from_value(identity.made_of.clone()?).ok()?;
    if let Backend::Thin(spec) = &mut backend {
        match &mut spec.group {
            ThinGroup::Exclusive { devices, wipe } => {
                devices.clone_from(&group.devices);
                *wipe = false;
            }
            ThinGroup::Shared { name, .. } => name.clone_from(&group.name),
        }
    }
    Some(backend)
}

/// Reads whose area it is from its record, which is mounted read-only for that long.
fn look(pools: &Pools, group: &FoundGroup, volume: &str) -> Result<PoolIdentity, String> {
    let told = |error: &dyn std::error::Error| format!("its record cannot be looked at: {}", chain(error));
    let opened = VolumeGroup::open_shared(&group.name, &Scope::Only(group.devices.clone()));
    let opened = opened.map_err(|error| told(&error))?;
    let was_active = opened.find(volume).map_err(|error| told(&error))?.is_some_and(|found| found.active);
    let active = opened.activate(volume).map_err(|error| told(&error))?;
    let place = pools.state_dir().join(format!("found-{volume}"));
    let read = read_at(&active.path, &place, pools.state_dir());
    if let Err(error) = mounts::unmount(&place) {
        tracing::warn!(place = %place.display(), error = chain(&error), "stays mounted");
    } else {
        let _ = fs::remove_dir(&place); // an empty place at most
    }
    if !was_active {
        opened.deactivate(volume).map_err(|error| told(&error))?;
    }
    read
}

fn read_at(device: &Path, place: &Path, scratch: &Path) -> Result<PoolIdentity, String> {
    let options =
        MountOptions { read_only: true, no_access_times: true, no_exec: true, ..MountOptions::default() };
    mounts::mount_device(device, place, FsType::Ext4, options)
        .map_err(|error| format!("its record cannot be mounted: {}", chain(&error)))?;
    PoolRecord::identity_at(&place.join("record.redb"), scratch)
        .map_err(|error| format!("its record cannot be read: {}", chain(&error)))
}
