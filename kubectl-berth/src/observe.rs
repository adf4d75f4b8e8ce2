//! Reads every object that a command looks at.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::time::Duration;

use berth_api::{
    ImageStore, ImageTransfer, StagedImage, StagingLedger, StagingNode, StagingPool, StagingReservation,
    TemplateImport, parse,
};
use berth_core::ids::{NodeName, node_lease_name};
use berth_core::view::View;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::api::ListParams;
use kube::core::{DeserializeGuard, PartialObjectMeta};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use thiserror::Error;

/// Objects per request.
const PAGE: u32 = 500;

/// Where, and for how long, to look.
#[derive(Clone, Debug)]
pub struct Scope {
    /// The namespace of Berth's own objects.
    pub system_namespace: String,
    /// For everything together.
    pub timeout: Duration,
}

/// Why the objects could not be read.
#[derive(Debug, Error)]
pub enum LookError {
    /// A list was refused.
    #[error("could not list {kind} objects")]
    List {
        /// The kind.
        kind: String,
        /// Why.
        source: kube::Error,
    },
    /// It took too long.
    #[error("the API server did not show everything within {} s", .0.as_secs())]
    Timeout(Duration),
}

/// An object that this version cannot read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Unreadable {
    /// Its kind.
    pub kind: String,
    /// Its namespace, if it has one, and name.
    pub name: String,
    /// What is wrong with it.
    pub problem: String,
}

/// Everything there is.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// The pools.
    pub pools: Vec<StagingPool>,
    /// The nodes' reports.
    pub nodes: Vec<StagingNode>,
    /// The reservations.
    pub reservations: Vec<StagingReservation>,
    /// The imports.
    pub imports: Vec<TemplateImport>,
    /// The transfers.
    pub transfers: Vec<ImageTransfer>,
    /// The staged images.
    pub images: Vec<StagedImage>,
    /// The ledgers.
    pub ledgers: Vec<StagingLedger>,
    /// The image stores.
    pub stores: Vec<ImageStore>,
    /// The Leases of nodes and operator.
    pub leases: Vec<Lease>,
    /// Names of those that have not run out, by this machine's clock.
    pub fresh_leases: BTreeSet<String>,
    /// What could not be read.
    pub unreadable: Vec<Unreadable>,
}

impl Seen {
    /// What decisions would look at.
    pub fn view(&self) -> View {
        let mut view = View::default();
        view.pools.extend(self.pools.iter().map(parse::pool_view).map(|pool| (pool.name.clone(), pool)));
        for node in &self.nodes {
            let mut state = parse::node_state(node);
            state.live = self.is_live(&state.name);
            state.reported = state.live;
            state.silent = !state.live;
            view.nodes.insert(state.name.clone(), state);
        }
        for reservation in self.reservations.iter().map(parse::reservation_view) {
            view.reservations.insert(reservation.uid.clone(), reservation);
        }
        for import in self.imports.iter().map(parse::import_view) {
            view.imports.insert(import.name.clone(), import);
        }
        for transfer in self.transfers.iter().map(parse::transfer_view) {
            view.transfers.insert(transfer.name.clone(), transfer);
        }
        for image in self.images.iter().filter_map(|image| parse::image_view(image).ok()) {
            view.images.insert(image.name.clone(), image);
        }
        for store in self.stores.iter().map(parse::store_view) {
            view.stores.insert(store.name.clone(), store);
        }
        for ledger in self.ledgers.iter().map(parse::ledger_view) {
            view.ledgers.insert((ledger.pool.clone(), ledger.node.clone()), ledger);
        }
        view
    }

    /// True if the node has renewed its Lease in time.
    pub fn is_live(&self, node: &NodeName) -> bool {
        self.fresh_leases.contains(&node_lease_name(node))
    }

    /// When the node last renewed its Lease, by its own clock.
    pub fn renewed(&self, node: &NodeName) -> Option<berth_core::units::Timestamp> {
        let name = node_lease_name(node);
        let lease = self.leases.iter().find(|lease| lease.name_any() == name)?;
        Some(crate::server::timestamp(lease.spec.as_ref()?.renew_time.as_ref()?.0))
    }

    /// Keeps what could be read, and remembers what could not.
    fn sort<K: Resource<DynamicType = ()>>(&mut self, listed: Vec<DeserializeGuard<K>>) -> Vec<K> {
        let mut readable = Vec::with_capacity(listed.len());
        for DeserializeGuard(object) in listed {
            match object {
                Ok(object) => readable.push(object),
                Err(bad) => {
                    let name = bad.metadata.name.unwrap_or_default();
                    let namespace =
                        bad.metadata.namespace.map(|namespace| namespace + "/").unwrap_or_default();
                    let kind = K::kind(&()).into_owned();
                    self.unreadable.push(Unreadable { kind, name: namespace + &name, problem: bad.error });
                }
            }
        }
        readable
    }
}

/// Reads everything once.
///
/// The lists are not of one instant. Holders and reports are read before the ledgers, so that in a sound cluster what
/// they claim is in the ledgers by then.
///
/// # Errors
/// [`LookError`]; an object that cannot be read is no error, but in [`Seen::unreadable`].
pub async fn look(client: &Client, scope: &Scope) -> Result<Seen, LookError> {
    match tokio::time::timeout(scope.timeout, look_at_all(client, &scope.system_namespace)).await {
        Ok(seen) => seen,
        Err(_) => Err(LookError::Timeout(scope.timeout)),
    }
}

async fn look_at_all(client: &Client, system_namespace: &str) -> Result<Seen, LookError> {
    let mut seen = Seen::default();
    let listed = list(&Api::all(client.clone())).await?;
    seen.pools = seen.sort(listed);
    let listed = list(&Api::all(client.clone())).await?;
    seen.nodes = seen.sort(listed);
    let listed = list(&Api::all(client.clone())).await?;
    seen.reservations = seen.sort(listed);
    let listed = list(&Api::all(client.clone())).await?;
    seen.imports = seen.sort(listed);
    let listed = list(&Api::all(client.clone())).await?;
    seen.transfers = seen.sort(listed);
    let listed = list(&Api::all(client.clone())).await?;
    seen.images = seen.sort(listed);
    for image in &seen.images {
        if let Err(error) = parse::image_view(image) {
            let (kind, name) = (StagedImage::kind(&()).into_owned(), image.name_any());
            seen.unreadable.push(Unreadable { kind, name, problem: error.to_string() });
        }
    }
    let listed = list(&Api::all(client.clone())).await?;
    seen.stores = seen.sort(listed);
    let listed = list(&Api::all(client.clone())).await?;
    seen.ledgers = seen.sort(listed);
    let listed = list::<Lease>(&Api::namespaced(client.clone(), system_namespace)).await?;
    seen.leases = seen.sort(listed);
    let now = Timestamp::now();
    seen.fresh_leases =
        seen.leases.iter().filter(|lease| is_fresh(lease, now)).map(kube::ResourceExt::name_any).collect();
    Ok(seen)
}

/// The labels of all namespaces, which limits of tenants go by. Without the right to list them such limits are not seen.
pub async fn namespaces(client: &Client, scope: &Scope) -> BTreeMap<String, BTreeMap<String, String>> {
    let all = Api::<Namespace>::all(client.clone());
    let params = ListParams::default();
    let why = match tokio::time::timeout(scope.timeout, all.list_metadata(&params)).await {
        Ok(Ok(listed)) => {
            let labels =
                |namespace: PartialObjectMeta<Namespace>| (namespace.name_any(), namespace.labels().clone());
            return listed.items.into_iter().map(labels).collect();
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {} s", scope.timeout.as_secs()),
    };
    eprintln!("warning: limits of tenants by labels of namespaces are left out: {why}");
    BTreeMap::new()
}

/// All objects, page by page. One that is no object of its kind does not hide the others.
async fn list<K>(api: &Api<DeserializeGuard<K>>) -> Result<Vec<DeserializeGuard<K>>, LookError>
where
    K: Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug,
{
    let mut all = Vec::new();
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let refused = |source| LookError::List { kind: K::kind(&()).into_owned(), source };
        let mut answer = api.list(&page).await.map_err(refused)?;
        all.append(&mut answer.items);
        match answer.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => return Ok(all),
        }
    }
}

/// True if the Lease was renewed no longer ago than it holds. A Lease from the future is fresh: the clocks differ.
fn is_fresh(lease: &Lease, now: Timestamp) -> bool {
    let Some(spec) = &lease.spec else { return false };
    let (Some(renewed), Some(seconds)) = (&spec.renew_time, spec.lease_duration_seconds) else {
        return false;
    };
    now.duration_since(renewed.0) < SignedDuration::from_secs(seconds.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{lease, seen};
    use berth_core::ids::PoolName;
    use serde_json::json;

    #[test]
    fn a_lease_is_fresh_until_it_runs_out() {
        let lease = lease("n", "2026-01-01T00:00:00Z");
        let at = |text: &str| is_fresh(&lease, text.parse().expect("a time"));
        assert!(at("2026-01-01T00:00:39Z"));
        assert!(!at("2026-01-01T00:00:40Z"));
        assert!(at("2025-12-31T23:00:00Z"), "the clocks differ");
        assert!(!is_fresh(&Lease::default(), Timestamp::UNIX_EPOCH));
    }

    #[test]
    fn the_view_holds_every_object() {
        let view = seen().view();
        assert_eq!((view.pools.len(), view.nodes.len(), view.ledgers.len()), (1, 1, 1));
        assert_eq!((view.reservations.len(), view.imports.len()), (2, 1));
        assert!(view.nodes[&NodeName::from("n1")].live);
        assert!(view.report_of(&PoolName::from("fast"), &NodeName::from("n1")).is_some());
    }

    #[test]
    fn an_object_that_cannot_be_read_is_remembered_and_hides_no_other() {
        let pool = |spec: serde_json::Value| json!({"apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingPool", "metadata": {"name": "p"}, "spec": spec});
        let good = pool(json!({"backend": {"filesystem": {"path": "/srv/berth", "size": "1Gi"}}}));
        let listed = [good, pool(json!({"backend": 7}))];
        let listed = listed.into_iter().map(|o| serde_json::from_value(o).expect("guarded")).collect();
        let mut seen = Seen::default();
        let readable: Vec<StagingPool> = seen.sort(listed);
        assert_eq!(readable.len(), 1);
        assert_eq!(
            (seen.unreadable[0].kind.as_str(), seen.unreadable[0].name.as_str()),
            ("StagingPool", "p")
        );
        assert!(!seen.unreadable[0].problem.is_empty());
    }
}
