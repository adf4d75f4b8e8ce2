//! The node's Lease: as long as it is renewed, the node counts as live.
//!
//! **Order.** Before every renewal the node's report is read from the API server itself and written where it is not the
//! present one: whoever sees a renewal and reads the report afterwards reads one that is no older than the renewal, also
//! after the API server was set back. A node that cannot report is not live. What these two show of themselves also tells that
//! the API server was set back: to a state of at least one renewal ago.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use berth_api::StagingNode;
use berth_api::defaults::{NODE_LEASE_DURATION_SECONDS, NODE_LEASE_RENEW_SECONDS};
use berth_core::ids::node_lease_name;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::Api;
use kube::api::{ObjectMeta, PostParams};

use super::observe::observe;
use super::report::{ReportError, report_node};
use crate::node::Node;
use crate::telemetry::chain;

/// How soon a renewal that failed, or was not due yet, is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Renews until the node stops.
pub async fn run(node: Arc<Node>) {
    let interval = Duration::from_secs(u64::from(NODE_LEASE_RENEW_SECONDS.unsigned_abs()));
    let stop = node.stop.clone();
    let renewals = async {
        loop {
            let renewed = tokio::time::timeout(interval, beat(confirm_report(&node), renew(&node))).await;
            tokio::time::sleep(if renewed == Ok(true) { interval } else { RETRY }).await;
        }
    };
    stop.run_until_cancelled_owned(renewals).await;
}

/// Renews only if the report is known to be there. True if it did.
async fn beat(
    report: impl Future<Output = Result<bool, ReportError>>,
    renew: impl Future<Output = Result<(), kube::Error>>,
) -> bool {
    match report.await {
        Ok(true) => {}
        Ok(false) => return false,
        Err(error) => {
            tracing::warn!(error = chain(&error), "lease not renewed: the node's report is not written");
            return false;
        }
    }
    renew.await.inspect_err(|error| tracing::warn!(error = chain(error), "lease not renewed")).is_ok()
}

/// True if the API server now holds the present report; false if that is still to come.
async fn confirm_report(node: &Arc<Node>) -> Result<bool, ReportError> {
    if !node.watches.synced() {
        return Ok(false); // what is not known yet must not look like what is not there
    }
    let _alone = node.reporting.lock().await;
    let view = observe(node).await?;
    let found = Api::<StagingNode>::all(node.client.clone()).get_opt(node.name.as_str()).await;
    let what = || format!("to show StagingNode {}", node.name);
    let found = found.map_err(|source| ReportError::Api { what: what(), source: Box::new(source) })?;
    node.watches.met(found.as_ref());
    if !node.watches.synced() {
        return Ok(false); // it went back in time: what is to be reported may follow from what is no more
    }
    report_node(node, &view, found.map(Arc::new)).await
}

async fn renew(node: &Node) -> Result<(), kube::Error> {
    let leases = Api::<Lease>::namespaced(node.client.clone(), &node.config.system_namespace);
    let name = node_lease_name(&node.name);
    let found = leases.get_opt(&name).await?;
    node.watches.met(found.as_ref());
    let renewed = Some(MicroTime(jiff::Timestamp::now()));
    let spec = |old: Option<LeaseSpec>| LeaseSpec {
        holder_identity: Some(node.name.to_string()),
        lease_duration_seconds: Some(NODE_LEASE_DURATION_SECONDS),
        renew_time: renewed.clone(),
        ..old.unwrap_or_default()
    };
    let written = if let Some(mut lease) = found {
        lease.spec = Some(spec(lease.spec.take()));
        leases.replace(&name, &PostParams::default(), &lease).await?
    } else {
        let metadata = ObjectMeta { name: Some(name), ..ObjectMeta::default() };
        leases.create(&PostParams::default(), &Lease { metadata, spec: Some(spec(None)) }).await?
    };
    node.watches.met(Some(&written));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[tokio::test]
    async fn no_renewal_without_a_report() {
        let renewals = Cell::new(0);
        let renew = || async {
            renewals.set(renewals.get() + 1);
            Ok(())
        };
        let refused = || {
            let source = Box::new(kube::Error::LinesCodecMaxLineLengthExceeded);
            ReportError::Api { what: "it".to_owned(), source }
        };
        assert!(!beat(async { Err(refused()) }, renew()).await);
        assert!(!beat(async { Ok(false) }, renew()).await);
        assert_eq!(renewals.get(), 0);
        let report = async { Ok(renewals.get() == 0) };
        assert!(beat(report, renew()).await, "first the report");
        assert_eq!(renewals.get(), 1);
        assert!(!beat(async { Ok(true) }, async { Err(kube::Error::LinesCodecMaxLineLengthExceeded) }).await);
    }
}
