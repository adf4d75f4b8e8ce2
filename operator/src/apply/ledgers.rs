//! Ledgers: created, and replaced under the version that was seen.

use std::collections::BTreeMap;
use std::time::Duration;

use berth_api::parse::to_ledger_capacity;
use berth_api::staging_ledger::{
    Holder as ApiHolder, HolderKind, LedgerPromise, LedgerScope, PromiseClass, StagingLedger,
    StagingLedgerSpec,
};
use berth_core::ids::{NodeName, ObjectName, PoolName, Uid, ledger_name};
use berth_core::ledger::{Class, Holder, Promise};
use berth_core::metric::Metric;
use berth_core::view::{LedgerCapacity, ObjectVersion};
use kube::{Api, ResourceExt as _};
use uuid::Uuid;

use super::error::{Answer, answer, swapped};
use super::{Applier, ApplyError};
use crate::context::now;
use crate::sabotage;

impl Applier {
    /// Another operator may have made it in the meantime: that is as good.
    pub(super) async fn create_ledger(
        &self,
        pool: &PoolName,
        node: &NodeName,
        capacity: LedgerCapacity,
    ) -> Result<bool, ApplyError> {
        let name = ledger_name(pool, node);
        let spec = StagingLedgerSpec {
            pool_name: pool.0.clone(),
            scope: LedgerScope { node_name: node.0.clone() },
            lineage: Uuid::new_v4().to_string(),
            revision: 1,
            rebuilt_from: None,
            capacity: to_ledger_capacity(&capacity),
            promises: BTreeMap::new(),
        };
        let api: Api<StagingLedger> = Api::all(self.client.clone());
        let result = api.create(&self.as_replica(), &StagingLedger::new(&name, spec)).await;
        if let Answer::Done(_) = answer("create", format!("StagingLedger {name}"), result)? {
            tracing::info!(ledger = name, %pool, %node, "ledger made");
        }
        // It enters the view by its watch.
        Ok(false)
    }

    /// Compare-and-swap: the ledger must still be at `version`.
    pub(super) async fn write_ledger(
        &self,
        name: &str,
        version: &ObjectVersion,
        revision: u64,
        capacity: LedgerCapacity,
        promises: &BTreeMap<Uid, Promise>,
    ) -> Result<bool, ApplyError> {
        let object = || format!("StagingLedger {name}");
        let conflict = || {
            self.metrics.add(Metric::LedgerConflictsTotal, &[], 1);
            ApplyError::Conflict { operation: "write", object: object() }
        };
        let seen = self.observer.stored::<StagingLedger>(&ObjectName::new("", name)).ok_or_else(conflict)?;
        if seen.resource_version().as_deref() != Some(version.0.as_str()) {
            return Err(conflict());
        }
        let mut ledger = StagingLedger::clone(&seen);
        ledger.metadata.managed_fields = None;
        ledger.spec.revision = revision.try_into().unwrap_or(i64::MAX);
        ledger.spec.capacity = to_ledger_capacity(&capacity);
        ledger.spec.promises =
            promises.iter().map(|(uid, promise)| (uid.0.clone(), promise_of(promise))).collect();
        let api: Api<StagingLedger> = Api::all(self.client.clone());
        if sabotage::active(sabotage::NO_COMPARE_AND_SWAP) {
            // The version and revision of whoever was faster, and the promises that this replica saw a while ago.
            tokio::time::sleep(Duration::from_millis(now().0 * 7 % 400)).await;
            let fresh = swapped("read", object(), api.get(name).await)?;
            ledger.metadata = fresh.metadata;
            ledger.spec.revision = fresh.spec.revision + 1;
        }
        let result = swapped("write", object(), api.replace(name, &self.as_replica(), &ledger).await);
        if matches!(result, Err(ApplyError::Conflict { .. })) {
            self.metrics.add(Metric::LedgerConflictsTotal, &[], 1);
        }
        self.observer.absorb(result?);
        Ok(true)
    }
}

pub(super) fn promise_of(promise: &Promise) -> LedgerPromise {
    let (kind, namespace, name) = match &promise.holder {
        Holder::Reservation(name) => {
            (HolderKind::StagingReservation, Some(name.namespace.clone()), name.name.clone())
        }
        Holder::Image(name) => (HolderKind::StagedImage, None, name.clone()),
    };
    LedgerPromise {
        holder: ApiHolder { kind, namespace, name },
        class: match promise.class {
            Class::Images => PromiseClass::Images,
            Class::Volumes => PromiseClass::Volumes,
        },
        data_bytes: promise.charge.data.as_i64(),
        metadata_bytes: promise.charge.metadata.as_i64(),
        generation: promise.generation.0.try_into().unwrap_or(i64::MAX),
        revoked_revision: promise.revoked.map(|revision| revision.try_into().unwrap_or(i64::MAX)),
    }
}
