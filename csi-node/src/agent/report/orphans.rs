//! What the record of a pool has and the API server does not: what lies there without an object, and, while the ledger is
//! behind, all of each promise, from which it is rebuilt.

use std::collections::{BTreeMap, BTreeSet};

use berth_api::defaults::SYSTEM_NAMESPACE;
use berth_api::staging_ledger::{Holder, HolderKind, LedgerPromise, PromiseClass};
use berth_api::staging_node::{NodePool, Orphan, OrphanKind};
use berth_core::ids::{PoolName, Uid};
use berth_core::node::view::AreaView;
use berth_core::node::{NodeView, behind};
use berth_record::{PromiseEntry, ReadError, tables};

use crate::agent::pools::OpenPool;
use crate::telemetry::chain;

/// How many orphans are listed.
const LISTED: usize = 64;

/// Adds both to what is told of a pool. A record that cannot be read is told of elsewhere; nothing is added then.
pub fn tell(told: &mut NodePool, view: &NodeView, name: &PoolName, open: &OpenPool) {
    let Some((pool, area)) = view.pools.get(name).and_then(|pool| Some((pool, pool.area.as_ref()?))) else {
        return;
    };
    let unknown = without_object(view, area);
    let lost = pool.ledger.as_ref().is_none_or(|ledger| behind(ledger, area).is_some());
    if unknown.is_empty() && !lost {
        return;
    }
    let recorded = match recorded(open) {
        Ok(recorded) => recorded,
        Err(error) => {
            tracing::warn!(pool = %name, error = chain(&error), "orphans are not told");
            return;
        }
    };
    if lost {
        for entry in &mut told.obeyed {
            let promise = recorded.promises.get(&Uid::from(entry.uid.as_str()));
            entry.recorded = promise.map(|promise| ledger_promise(&entry.uid, promise));
        }
    }
    if unknown.len() > LISTED {
        told.orphans_total = i32::try_from(unknown.len()).ok();
    }
    told.orphans = unknown.into_iter().take(LISTED).map(|uid| orphan(&recorded, area, uid)).collect();
}

/// What the area holds for objects that the API server does not show here. A watch that lags shows up here for a moment.
fn without_object<'a>(view: &NodeView, area: &'a AreaView) -> BTreeSet<&'a Uid> {
    let promised = area.promises.iter().filter(|(_, promise)| !promise.released).map(|(uid, _)| uid);
    let images = area.images.values().map(|held| &held.holder);
    let all = promised.chain(images).chain(area.volumes.keys()).chain(area.work_dirs.keys());
    all.filter(|uid| !view.reservations.contains_key(*uid) && !view.images.contains_key(*uid)).collect()
}

/// What is only in the record.
struct Recorded {
    promises: BTreeMap<Uid, PromiseEntry>,
    /// Size and labels.
    volumes: BTreeMap<Uid, (i64, BTreeMap<String, String>)>,
}

fn recorded(open: &OpenPool) -> Result<Recorded, ReadError> {
    let (_, promises) = open.promises()?;
    let volumes = open.record.record().entries(tables::VOLUMES)?;
    Ok(Recorded {
        promises: promises.into_iter().collect(),
        volumes: volumes.into_iter().map(|(uid, v)| (uid, (v.size.as_i64(), v.labels))).collect(),
    })
}

fn orphan(recorded: &Recorded, area: &AreaView, uid: &Uid) -> Orphan {
    let promise = recorded.promises.get(uid);
    let volume = recorded.volumes.get(uid);
    let kind = if volume.is_some() {
        OrphanKind::Volume
    } else if area.images.values().any(|held| held.holder == *uid) {
        OrphanKind::Image
    } else if area.work_dirs.contains_key(uid) {
        OrphanKind::WorkDir
    } else {
        OrphanKind::Promise
    };
    let promised = promise.map(|promise| promise.data.as_i64());
    let holder = promise.filter(|promise| !promise.holder.is_local()).map(|promise| {
        match promise.holder.namespace.as_str() {
            "" => promise.holder.name.clone(),
            namespace => format!("{namespace}/{}", promise.holder.name),
        }
    });
    Orphan {
        uid: uid.to_string(),
        kind,
        bytes: promised.or(volume.map(|(size, _)| *size)).unwrap_or_default(),
        holder,
        labels: volume.map(|(_, labels)| labels.clone()).unwrap_or_default(),
    }
}

/// A promise as a ledger has it. One that the node made itself, before the pool was a cluster's, is held by a reservation that
/// does not exist, so that it counts until a person decides.
fn ledger_promise(uid: &str, promise: &PromiseEntry) -> LedgerPromise {
    let holder = &promise.holder;
    let holder = match holder.kind.as_str() {
        "StagedImage" => Holder { kind: HolderKind::StagedImage, namespace: None, name: holder.name.clone() },
        _ if holder.is_local() => Holder {
            kind: HolderKind::StagingReservation,
            namespace: Some(SYSTEM_NAMESPACE.to_owned()),
            name: uid.to_owned(),
        },
        _ => Holder {
            kind: HolderKind::StagingReservation,
            namespace: Some(holder.namespace.clone()),
            name: holder.name.clone(),
        },
    };
    LedgerPromise {
        holder,
        class: match promise.class {
            berth_record::PromiseClass::Images => PromiseClass::Images,
            berth_record::PromiseClass::Volumes => PromiseClass::Volumes,
        },
        data_bytes: promise.data.as_i64(),
        metadata_bytes: promise.metadata.as_i64(),
        generation: i64::try_from(promise.generation.0).unwrap_or(i64::MAX),
        revoked_revision: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_core::ids::Digest;
    use berth_core::ids::Sha256Sum;
    use berth_core::ledger::Class;
    use berth_core::node::view::{HeldImage, HeldVolume, HeldWorkDir, ObeyedPromise};
    use berth_core::units::{Bytes, Generation, Timestamp};

    fn promised(released: bool) -> ObeyedPromise {
        let (generation, data) = (Generation::FIRST, Bytes(5));
        ObeyedPromise { generation, data, class: Class::Images, released, reported: true }
    }

    fn entry(kind: &str, namespace: &str) -> PromiseEntry {
        PromiseEntry {
            generation: Generation(2),
            class: berth_record::PromiseClass::Volumes,
            data: Bytes(7),
            metadata: Bytes(3),
            holder: berth_record::Holder {
                kind: kind.to_owned(),
                namespace: namespace.to_owned(),
                name: "name".to_owned(),
            },
            obeyed: true,
            released: false,
        }
    }

    #[test]
    fn everything_without_an_object_is_found_and_said_to_be_what_it_is() {
        let size = Bytes::mib(1);
        let volume =
            HeldVolume { generation: Generation::FIRST, size, ready: true, lost: false, attached: false };
        let image = HeldImage {
            holder: Uid::from("image"),
            usable: true,
            complete: true,
            in_use: false,
            last_used: Timestamp(0),
        };
        let area = AreaView {
            promises: [("volume", false), ("bare", false), ("gone", true)]
                .map(|(uid, released)| (Uid::from(uid), promised(released)))
                .into(),
            images: [(Digest(Sha256Sum::of(b"i")), image)].into(),
            volumes: [(Uid::from("volume"), volume)].into(),
            work_dirs: [(Uid::from("dir"), HeldWorkDir { generation: Generation::FIRST, made: true })].into(),
            ..AreaView::default()
        };
        let unknown = without_object(&NodeView::default(), &area);
        let labels = BTreeMap::from([("claim".to_owned(), "db".to_owned())]);
        let recorded = Recorded {
            promises: [(Uid::from("volume"), entry("StagingReservation", "shop"))].into(),
            volumes: [(Uid::from("volume"), (9, labels.clone()))].into(),
        };
        let found: Vec<Orphan> = unknown.iter().map(|uid| orphan(&recorded, &area, uid)).collect();
        let kinds: Vec<(&str, OrphanKind)> = found.iter().map(|one| (one.uid.as_str(), one.kind)).collect();
        let expected = [
            ("bare", OrphanKind::Promise),
            ("dir", OrphanKind::WorkDir),
            ("image", OrphanKind::Image),
            ("volume", OrphanKind::Volume),
        ];
        assert_eq!(kinds, expected);
        let volume = found.last().expect("four");
        assert_eq!((volume.bytes, volume.holder.as_deref(), &volume.labels), (7, Some("shop/name"), &labels));
    }

    #[test]
    fn a_recorded_promise_becomes_all_that_a_ledger_says_of_it() {
        let told = ledger_promise("u", &entry("StagingReservation", "shop"));
        assert_eq!((told.data_bytes, told.metadata_bytes, told.generation), (7, 3, 2));
        assert_eq!((told.class, told.holder.namespace.as_deref()), (PromiseClass::Volumes, Some("shop")));
        let image = ledger_promise("u", &entry("StagedImage", "")).holder;
        assert_eq!(
            (image.kind, image.namespace, image.name.as_str()),
            (HolderKind::StagedImage, None, "name")
        );
        let local = ledger_promise("u", &entry(berth_record::Holder::LOCAL, "")).holder;
        assert_eq!((local.namespace.as_deref(), local.name.as_str()), (Some(SYSTEM_NAMESPACE), "u"));
    }
}
