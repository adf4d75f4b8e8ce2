//! Ledgers that are rebuilt from their node's record, and ledgers that end with their pool.

use std::collections::BTreeMap;

use berth_api::parse::{to_ledger_capacity, to_rebuilt_from};
use berth_api::{StagingLedger, StagingNode};
use berth_core::ids::{NodeName, ObjectName, Uid};
use berth_core::ledger::{Promise, Rebuilt};
use berth_core::metric::Metric;
use berth_core::reason::Reason;
use berth_core::view::{LedgerCapacity, ObjectVersion};
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, ResourceExt as _};
use uuid::Uuid;

use super::error::{Answer, answer, swapped};
use super::ledgers::promise_of;
use super::{Applier, ApplyError};
use crate::observe::Observed;

/// What a ledger is to hold from now on.
pub(super) struct NewLedger<'c> {
    pub revision: u64,
    pub capacity: LedgerCapacity,
    pub promises: &'c BTreeMap<Uid, Promise>,
    pub rebuilt: &'c Rebuilt,
}

impl Applier {
    /// Compare-and-swap of the whole ledger, with a lineage of its own. What the node reports is read from the API server
    /// itself first: a report that the view lags behind may have given back what this would promise again.
    pub(super) async fn rebuild_ledger(
        &self,
        name: &str,
        version: &ObjectVersion,
        node: &NodeName,
        report: &ObjectVersion,
        new: &NewLedger<'_>,
    ) -> Result<bool, ApplyError> {
        let object = || format!("StagingLedger {name}");
        let conflict = || ApplyError::Conflict { operation: "rebuild", object: object() };
        let seen = self.observer.stored::<StagingLedger>(&ObjectName::new("", name)).ok_or_else(conflict)?;
        if !is_at(&*seen, version) {
            return Err(conflict());
        }
        let nodes: Api<StagingNode> = Api::all(self.client.clone());
        let told = swapped("read", format!("StagingNode {node}"), nodes.get(node.as_str()).await)?;
        if !is_at(&told, report) {
            return Err(conflict());
        }
        let mut ledger = StagingLedger::clone(&seen);
        ledger.metadata.managed_fields = None;
        ledger.spec.lineage = Uuid::new_v4().to_string();
        ledger.spec.revision = new.revision.try_into().unwrap_or(i64::MAX);
        ledger.spec.capacity = to_ledger_capacity(&new.capacity);
        ledger.spec.promises =
            new.promises.iter().map(|(uid, promise)| (uid.0.clone(), promise_of(promise))).collect();
        ledger.spec.rebuilt_from = Some(to_rebuilt_from(new.rebuilt));
        let api: Api<StagingLedger> = Api::all(self.client.clone());
        let written = swapped("rebuild", object(), api.replace(name, &self.as_replica(), &ledger).await)?;
        let message = format!(
            "rebuilt from the record of node {node} at revision {}: {} promises, {} of them without a holder",
            new.rebuilt.revision,
            new.promises.len(),
            new.rebuilt.recovered.len()
        );
        tracing::warn!(ledger = name, lineage = written.spec.lineage, message, "ledger rebuilt");
        self.events.say(&written, "Rebuilt", Reason::LedgerRebuilt, &message);
        self.metrics.add(Metric::LedgerRebuildsTotal, &[("pool", &written.spec.pool_name)], 1);
        self.observer.absorb(written);
        Ok(true)
    }

    /// Only at the version that was seen to be empty.
    pub(super) async fn delete_ledger(
        &self,
        name: &str,
        version: &ObjectVersion,
    ) -> Result<bool, ApplyError> {
        let seen = self.observer.stored::<StagingLedger>(&ObjectName::new("", name));
        let Some(seen) = seen.filter(|seen| is_at(&**seen, version)) else {
            return Err(ApplyError::Conflict {
                operation: "delete",
                object: format!("StagingLedger {name}"),
            });
        };
        let params = DeleteParams {
            preconditions: Some(Preconditions { uid: seen.uid(), resource_version: seen.resource_version() }),
            ..DeleteParams::default()
        };
        let api: Api<StagingLedger> = Api::all(self.client.clone());
        let result = api.delete(name, &params).await;
        if let Answer::Done(_) = answer("delete", format!("StagingLedger {name}"), result)? {
            tracing::info!(ledger = name, "ledger deleted with its pool");
        }
        // It leaves the view by its watch.
        Ok(false)
    }
}

fn is_at<K: Observed>(object: &K, version: &ObjectVersion) -> bool {
    object.meta().resource_version.as_deref() == Some(version.0.as_str())
}
