//! The node's Lease: as long as it is renewed, the node counts as live.

use std::sync::Arc;
use std::time::Duration;

use berth_api::defaults::{NODE_LEASE_DURATION_SECONDS, NODE_LEASE_RENEW_SECONDS};
use berth_core::ids::node_lease_name;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::Api;
use kube::api::{ObjectMeta, PostParams};

use crate::node::Node;
use crate::telemetry::chain;

/// How soon a renewal that failed is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// Renews until the node stops.
pub async fn run(node: Arc<Node>) {
    let interval = Duration::from_secs(u64::from(NODE_LEASE_RENEW_SECONDS.unsigned_abs()));
    let stop = node.stop.clone();
    let renewals = async {
        loop {
            let pause = match tokio::time::timeout(interval, renew(&node)).await {
                Ok(Ok(())) => interval,
                Ok(Err(error)) => {
                    tracing::warn!(error = chain(&error), "lease not renewed");
                    RETRY
                }
                Err(_) => RETRY,
            };
            tokio::time::sleep(pause).await;
        }
    };
    stop.run_until_cancelled_owned(renewals).await;
}

async fn renew(node: &Node) -> Result<(), kube::Error> {
    let leases = Api::<Lease>::namespaced(node.client.clone(), &node.config.system_namespace);
    let name = node_lease_name(&node.name);
    let found = leases.get_opt(&name).await?;
    let renewed = Some(MicroTime(jiff::Timestamp::now()));
    let spec = |old: Option<LeaseSpec>| LeaseSpec {
        holder_identity: Some(node.name.to_string()),
        lease_duration_seconds: Some(NODE_LEASE_DURATION_SECONDS),
        renew_time: renewed.clone(),
        ..old.unwrap_or_default()
    };
    match found {
        Some(mut lease) => {
            lease.spec = Some(spec(lease.spec.take()));
            leases.replace(&name, &PostParams::default(), &lease).await?;
        }
        None => {
            let metadata = ObjectMeta { name: Some(name), ..ObjectMeta::default() };
            leases.create(&PostParams::default(), &Lease { metadata, spec: Some(spec(None)) }).await?;
        }
    }
    Ok(())
}
