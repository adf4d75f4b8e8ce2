//! `StagingLedger` to its view and back.

use std::collections::BTreeMap;

use berth_core::ids::{Lineage, NodeName, ObjectName, PoolName, Uid};
use berth_core::ledger::{Charge, Class, Holder, Promise, Rebuilt};
use berth_core::overcommit::{Overcommit, Percent};
use berth_core::units::Bytes;
use berth_core::view::{LedgerCapacity, LedgerView};

use super::{generation, name_of, version_of};
use crate::StagingLedger;
use crate::staging_ledger::{
    Holder as ApiHolder, HolderKind, LedgerBytes, LedgerCapacity as ApiCapacity, LedgerPromise, LedgerScope,
    PromiseClass, RebuiltFrom, StagingLedgerSpec, VolumeOvercommit,
};

/// What decisions look at.
pub fn ledger_view(ledger: &StagingLedger) -> LedgerView {
    let StagingLedgerSpec { pool_name, scope, lineage, revision, rebuilt_from, capacity, promises } =
        &ledger.spec;
    LedgerView {
        name: name_of(&ledger.metadata).name,
        version: version_of(&ledger.metadata),
        pool: PoolName(pool_name.clone()),
        node: NodeName(scope.node_name.clone()),
        lineage: Lineage(lineage.clone()),
        revision: u64::try_from(*revision).unwrap_or_default(),
        rebuilt: rebuilt_from.as_ref().map(|from| Rebuilt {
            lineage: Lineage(from.lineage.clone()),
            revision: u64::try_from(from.revision).unwrap_or_default(),
            recovered: from.recovered.iter().cloned().map(Uid).collect(),
        }),
        capacity: LedgerCapacity {
            images: charge(&capacity.images),
            volumes: charge(&capacity.volumes),
            total: charge(&capacity.total),
            overcommit: capacity.volume_overcommit.as_ref().map(overcommit).unwrap_or_default(),
        },
        promises: promises.iter().map(|(uid, entry)| (Uid(uid.clone()), promise(entry))).collect(),
    }
}

/// The spec of a ledger with this content.
pub fn to_ledger_spec(ledger: &LedgerView) -> StagingLedgerSpec {
    StagingLedgerSpec {
        pool_name: ledger.pool.0.clone(),
        scope: LedgerScope { node_name: ledger.node.0.clone() },
        lineage: ledger.lineage.0.clone(),
        revision: i64::try_from(ledger.revision).unwrap_or(i64::MAX),
        rebuilt_from: ledger.rebuilt.as_ref().map(to_rebuilt_from),
        capacity: to_ledger_capacity(&ledger.capacity),
        promises: to_ledger_promises(&ledger.promises),
    }
}

/// What a ledger was rebuilt from, as it stands there.
pub fn to_rebuilt_from(rebuilt: &Rebuilt) -> RebuiltFrom {
    RebuiltFrom {
        lineage: rebuilt.lineage.0.clone(),
        revision: i64::try_from(rebuilt.revision).unwrap_or(i64::MAX),
        recovered: rebuilt.recovered.iter().map(ToString::to_string).collect(),
    }
}

/// The capacity as it stands in a ledger.
pub fn to_ledger_capacity(capacity: &LedgerCapacity) -> ApiCapacity {
    ApiCapacity {
        images: to_bytes(capacity.images),
        volumes: to_bytes(capacity.volumes),
        total: to_bytes(capacity.total),
        volume_overcommit: to_overcommit(capacity.overcommit),
    }
}

fn overcommit(overcommit: &VolumeOvercommit) -> Overcommit {
    let percent = Percent::from(u32::try_from(overcommit.percent).unwrap_or_default());
    Overcommit { percent, attain: Bytes::from_i64(overcommit.attain_bytes) }
}

fn to_overcommit(overcommit: Overcommit) -> Option<VolumeOvercommit> {
    let Overcommit { percent, attain } = overcommit;
    (overcommit != Overcommit::NONE).then(|| VolumeOvercommit {
        percent: i32::try_from(percent.get()).unwrap_or(i32::MAX),
        attain_bytes: attain.as_i64(),
    })
}

/// All promises as they stand in a ledger.
pub fn to_ledger_promises(promises: &BTreeMap<Uid, Promise>) -> BTreeMap<String, LedgerPromise> {
    promises.iter().map(|(uid, promise)| (uid.0.clone(), to_ledger_promise(promise))).collect()
}

/// One promise as it stands in a ledger.
pub fn to_ledger_promise(promise: &Promise) -> LedgerPromise {
    let LedgerBytes { data_bytes, metadata_bytes } = to_bytes(promise.charge);
    let holder = match &promise.holder {
        Holder::Reservation(name) => ApiHolder {
            kind: HolderKind::StagingReservation,
            namespace: Some(name.namespace.clone()),
            name: name.name.clone(),
        },
        Holder::Image(name) => {
            ApiHolder { kind: HolderKind::StagedImage, namespace: None, name: name.clone() }
        }
    };
    LedgerPromise {
        holder,
        class: match promise.class {
            Class::Images => PromiseClass::Images,
            Class::Volumes => PromiseClass::Volumes,
        },
        data_bytes,
        metadata_bytes,
        generation: i64::try_from(promise.generation.0).unwrap_or(i64::MAX),
        revoked_revision: promise.revoked.map(|revision| i64::try_from(revision).unwrap_or(i64::MAX)),
    }
}

/// One promise as decisions look at it.
pub fn promise(entry: &LedgerPromise) -> Promise {
    let ApiHolder { kind, namespace, name } = &entry.holder;
    Promise {
        holder: match kind {
            HolderKind::StagingReservation => {
                Holder::Reservation(ObjectName::new(namespace.clone().unwrap_or_default(), name))
            }
            HolderKind::StagedImage => Holder::Image(name.clone()),
        },
        class: match entry.class {
            PromiseClass::Images => Class::Images,
            PromiseClass::Volumes => Class::Volumes,
        },
        charge: charge(&LedgerBytes { data_bytes: entry.data_bytes, metadata_bytes: entry.metadata_bytes }),
        generation: generation(entry.generation),
        revoked: entry.revoked_revision.and_then(|revision| u64::try_from(revision).ok()),
    }
}

fn charge(bytes: &LedgerBytes) -> Charge {
    Charge { data: Bytes::from_i64(bytes.data_bytes), metadata: Bytes::from_i64(bytes.metadata_bytes) }
}

fn to_bytes(charge: Charge) -> LedgerBytes {
    LedgerBytes { data_bytes: charge.data.as_i64(), metadata_bytes: charge.metadata.as_i64() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_core::units::Generation;

    #[test]
    fn a_ledger_goes_there_and_back_unchanged() {
        let promise = |holder, class, data| Promise {
            holder,
            class,
            charge: Charge { data: Bytes(data), metadata: Bytes(7) },
            generation: Generation(3),
            revoked: (data == 5).then_some(8),
        };
        let mut ledger = StagingLedger::new(
            "fast-a",
            to_ledger_spec(&LedgerView {
                name: "fast-a".to_owned(),
                version: berth_core::view::ObjectVersion("41".to_owned()),
                pool: PoolName::from("fast"),
                node: NodeName::from("a"),
                lineage: Lineage::from("6f2c1f9e-0000-4000-8000-000000000000"),
                revision: 9,
                rebuilt: Some(Rebuilt {
                    lineage: Lineage::from("1a2c1f9e-0000-4000-8000-000000000000"),
                    revision: 4,
                    recovered: [Uid::from("one")].into(),
                }),
                capacity: LedgerCapacity {
                    overcommit: Overcommit { percent: Percent::from(300), attain: Bytes::gib(2) },
                    ..LedgerCapacity::shared(Bytes::gib(10))
                },
                promises: BTreeMap::from([
                    (
                        Uid::from("one"),
                        promise(Holder::Reservation(ObjectName::new("ns", "r")), Class::Volumes, 5),
                    ),
                    (Uid::from("two"), promise(Holder::Image("img".to_owned()), Class::Images, 6)),
                ]),
            }),
        );
        ledger.metadata.resource_version = Some("41".to_owned());
        let view = ledger_view(&ledger);
        assert_eq!(to_ledger_spec(&view), ledger.spec);
        assert_eq!((view.version.0.as_str(), view.name.as_str(), view.revision), ("41", "fast-a", 9));
        assert_eq!(view.promises[&Uid::from("two")].holder, Holder::Image("img".to_owned()));
        assert_eq!(
            (view.capacity.overcommit.percent.get(), view.capacity.overcommit.attain),
            (300, Bytes::gib(2))
        );
        assert_eq!(view.promises[&Uid::from("one")].charge.metadata, Bytes(7));
    }

    #[test]
    fn what_is_larger_than_the_api_can_say_is_clamped_and_never_negative() {
        let mut capacity = LedgerCapacity::shared(Bytes(u64::MAX));
        assert_eq!(to_ledger_capacity(&capacity).total.data_bytes, i64::MAX);
        assert_eq!(to_ledger_capacity(&capacity).volume_overcommit, None);
        capacity.total.data = Bytes::from_i64(-5);
        assert_eq!(capacity.total.data, Bytes::ZERO);
    }
}
