//! What this node knows → its own status fields, by server-side apply, and only where they differ from what is shown.

mod files;
mod images;
mod orphans;
mod reservations;
mod scans;
mod transfers;

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;

use berth_api::conditions::{ConditionType, Truth, condition};
use berth_api::defaults::{LABEL_ZONE, node_manager};
use berth_api::parse::to_thin_pools;
use berth_api::staging_node::{NodePool, Obeyed, PreflightCheck, Released, StagingNodeSpec};
use berth_api::{ImageStore, StagingNode};
use berth_core::ids::{PoolName, Uid};
use berth_core::node::NodeView;
use berth_core::reason::Reason;
use berth_core::units::Bytes;
use k8s_openapi::NamespaceResourceScope;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use thiserror::Error;

use super::observe::{ObserveError, observe, wanted_pools};
use super::transfers::Subject;
use crate::area::Backend;
use crate::node::{Node, now, versions};
use crate::telemetry::chain;

/// Used bytes are reported in units of this, so that writing alone does not write to the API server.
const USED_UNIT: Bytes = Bytes::mib(16);

/// Why something was not reported. The next pass tries again.
#[derive(Debug, Error)]
pub enum ReportError {
    /// What there is to report is not known.
    #[error("nothing is known")]
    Observe(#[from] ObserveError),
    /// The API server.
    #[error("the API server refuses {what}")]
    Api {
        /// What was to be written.
        what: String,
        /// Its answer.
        source: Box<kube::Error>,
    },
    /// A status cannot be written as JSON.
    #[error("a status cannot be written")]
    Encode(#[from] serde_json::Error),
}

/// Reports everything that has changed. True if promises were told of for the first time: work under them may begin.
pub async fn report(node: &Arc<Node>) -> Result<bool, ReportError> {
    let (view, told) = {
        let _alone = node.reporting.lock().await;
        let view = observe(node).await?;
        let told = report_node(node, &view, node.watches.report.state().into_iter().next()).await?;
        (view, told)
    };
    for reservation in node.watches.assigned.state() {
        warn(reservations::report(node, &view, &reservation).await);
    }
    for image in node.watches.images.state() {
        warn(images::report(node, &view, &image).await);
    }
    for subject in Subject::all(node) {
        warn(transfers::report(node, &view, &subject).await);
    }
    for store in node.watches.stores.state() {
        warn(report_store(node, &view, &store).await);
    }
    node.news.retain_files(|uid| view.reservations.contains_key(uid));
    let stores = view.stores.values().map(|store| store.uid.clone()).collect();
    node.news.retain(
        &view.transfers.keys().cloned().collect(),
        &view.images.keys().cloned().collect(),
        &stores,
    );
    Ok(told && node.news.set_obeyed(obeyed(&view)))
}

fn obeyed(view: &NodeView) -> BTreeSet<super::news::ToldPromise> {
    let areas = view.pools.iter().filter_map(|(name, pool)| Some((name, pool.area.as_ref()?)));
    areas
        .flat_map(|(name, area)| {
            area.promises.iter().map(move |(uid, p)| (name.clone(), uid.clone(), p.generation, p.data))
        })
        .collect()
}

/// One object's trouble is not the others'.
fn warn(result: Result<(), ReportError>) {
    match result {
        Err(ReportError::Api { source, .. }) if is_gone(&source) => {}
        Err(error) => tracing::warn!(error = chain(&error), "status not reported"),
        Ok(()) => {}
    }
}

fn is_gone(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404 || status.code == 409)
}

/// True if `shown` differs from `wanted` in one of the `owned` fields. Times of condition changes do not count.
fn differs(shown: &Value, wanted: &Value, owned: &[&str], conditions: &[ConditionType]) -> bool {
    let field = |status: &Value, name: &str| status.get(name).cloned().unwrap_or(Value::Null);
    if owned.iter().any(|name| field(shown, name) != field(wanted, name)) {
        return true;
    }
    let of = |status: &Value, kind: &str| -> Option<Map<String, Value>> {
        let list = status.get("conditions")?.as_array()?;
        let mut found = list.iter().find(|c| c["type"] == kind)?.as_object()?.clone();
        found.remove("lastTransitionTime");
        Some(found)
    };
    conditions.iter().any(|kind| of(shown, kind.as_str()) != of(wanted, kind.as_str()))
}

/// What an object's status is to hold of this node's fields.
struct Wanted<'a> {
    status: Value,
    owned: &'a [&'a str],
    conditions: &'a [ConditionType],
}

async fn apply<K>(
    node: &Node,
    api: Api<K>,
    object: &K,
    shown: Value,
    wanted: Wanted<'_>,
) -> Result<(), ReportError>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Serialize + Debug,
{
    if !differs(&shown, &wanted.status, wanted.owned, wanted.conditions) {
        return Ok(());
    }
    let name = object.name_any();
    let mut metadata = json!({"name": name});
    if let Some(uid) = object.uid() {
        metadata["uid"] = json!(uid); // a later object of the same name is not ours to write to
    }
    let patch = json!({
        "apiVersion": K::api_version(&()), "kind": K::kind(&()), "metadata": metadata, "status": wanted.status,
    });
    let params = PatchParams::apply(&node_manager(node.name.as_str())).force();
    let failed = |source| ReportError::Api {
        what: format!("the status of {} {name}", K::kind(&())),
        source: Box::new(source),
    };
    let answer = api.patch_status(&name, &params, &Patch::Apply(&patch)).await.map_err(failed)?;
    let left = left_over(&serde_json::to_value(&answer)?["status"], &wanted);
    if left.is_empty() {
        return Ok(());
    }
    // What another node owns as well, from which the work has moved away, does not go by being left out.
    let cleared = json!({"metadata": patch["metadata"], "status": left});
    let params = PatchParams { field_manager: params.field_manager, ..PatchParams::default() };
    api.patch_status(&name, &params, &Patch::Merge(&cleared)).await.map_err(failed)?;
    Ok(())
}

/// The owned fields that are still shown though they are to go, each with null as its value.
fn left_over(shown: &Value, wanted: &Wanted<'_>) -> Map<String, Value> {
    let is_left = |name: &&str| {
        shown.get(*name).is_some_and(|value| !value.is_null()) && wanted.status.get(*name).is_none()
    };
    wanted.owned.iter().copied().filter(is_left).map(|name| (name.to_owned(), Value::Null)).collect()
}

fn namespaced<K>(node: &Node, object: &K) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    Api::namespaced(node.client.clone(), &object.namespace().unwrap_or_default())
}

fn shown<T: Serialize>(status: Option<&T>) -> Result<Value, ReportError> {
    Ok(status.map(serde_json::to_value).transpose()?.unwrap_or_else(|| json!({})))
}

async fn report_store(node: &Node, view: &NodeView, object: &ImageStore) -> Result<(), ReportError> {
    let uid = Uid::from(object.uid().unwrap_or_default());
    if !view.stores.values().any(|store| store.uid == uid) {
        return Ok(());
    }
    let Some(news) = node.news.store(&uid) else { return Ok(()) };
    let (truth, reason, message) = match &news.error {
        None => (Truth::True, Reason::Ready, String::new()),
        Some((reason, message)) => (Truth::False, *reason, message.clone()),
    };
    let previous = object.status.as_ref().map(|status| status.conditions.clone()).unwrap_or_default();
    let ready = condition(&previous, ConditionType::Ready, truth, reason, message, news.observed, now());
    let mut status = json!({"conditions": [ready]});
    if let Some(capabilities) = &news.capabilities {
        status["capabilities"] = json!(capabilities);
    }
    if let Some((images, unique, unreferenced)) = news.usage {
        status["images"] = json!(images);
        status["uniqueBytes"] = json!(unique);
        status["unreferencedBytes"] = json!(unreferenced);
    }
    let owned = &["capabilities", "images", "uniqueBytes", "unreferencedBytes"];
    let wanted = Wanted { status, owned, conditions: &[ConditionType::Ready] };
    apply(node, namespaced(node, object), object, shown(object.status.as_ref())?, wanted).await
}

/// The node's own object, made if it is not there: then its status waits for the next pass, and false says so.
pub(super) async fn report_node(
    node: &Node,
    view: &NodeView,
    object: Option<Arc<StagingNode>>,
) -> Result<bool, ReportError> {
    let api = Api::<StagingNode>::all(node.client.clone());
    let Some(object) = object else {
        let new = StagingNode::new(node.name.as_str(), StagingNodeSpec { node_name: node.name.to_string() });
        return match api.create(&PostParams::default(), &new).await {
            Err(source) if !is_gone(&source) => {
                Err(ReportError::Api { what: format!("StagingNode {}", node.name), source: Box::new(source) })
            }
            _ => {
                node.wake.notify_one();
                Ok(false)
            }
        };
    };
    // It asks the kernel, in a pool of the device mapper through a program that may take long.
    let pools = tokio::task::block_in_place(|| pools(node, view));
    let preflight = node.preflight.get();
    let previous = object.status.as_ref().map(|status| status.conditions.clone()).unwrap_or_default();
    let missing: Vec<&str> =
        preflight.failures().filter(|check| check.required).map(|check| check.detail.as_str()).collect();
    let (truth, reason) = if missing.is_empty() {
        (Truth::True, Reason::Ready)
    } else {
        (Truth::False, Reason::PreflightFailed)
    };
    let generation = object.metadata.generation;
    let ready =
        condition(&previous, ConditionType::Ready, truth, reason, missing.join("; "), generation, now());
    let checks: Vec<PreflightCheck> = preflight
        .checks
        .iter()
        .map(|c| PreflightCheck {
            name: c.name.into(),
            ok: c.ok,
            required: c.required,
            detail: c.detail.clone(),
        })
        .collect();
    let mut status = json!({
        "pools": pools, "preflight": checks, "versions": versions(&preflight), "conditions": [ready],
    });
    if let Some(zone) = zone(node) {
        status["zone"] = json!(zone);
    }
    let owned = &["pools", "preflight", "versions", "zone"];
    let wanted = Wanted { status, owned, conditions: &[ConditionType::Ready] };
    apply(node, api, &*object, shown(object.status.as_ref())?, wanted).await?;
    Ok(true)
}

/// The zone of this node, by its present labels.
fn zone(node: &Node) -> Option<String> {
    let nodes = node.watches.node.state();
    nodes.first()?.labels().get(LABEL_ZONE).cloned()
}

fn pools(node: &Node, view: &NodeView) -> Vec<NodePool> {
    let wanted = wanted_pools(node);
    let names: BTreeSet<&PoolName> = wanted.keys().chain(view.pools.keys()).collect();
    let shown = |name: &&PoolName| {
        wanted.contains_key(*name) || view.pools.get(*name).is_some_and(|pool| pool.area.is_some())
    };
    names
        .into_iter()
        .filter(shown)
        .map(|name| pool(node, view, name, wanted.get(name).map(|spec| &spec.uid)))
        .collect()
}

fn pool(node: &Node, view: &NodeView, name: &PoolName, wanted: Option<&Uid>) -> NodePool {
    let mut told = NodePool { name: name.to_string(), ..NodePool::default() };
    let (Some(open), Some(area)) =
        (node.pools.get(name), view.pools.get(name).and_then(|pool| pool.area.as_ref()))
    else {
        let (reason, message) =
            node.pools.failure(name).unwrap_or((Reason::Progressing, "is being prepared".to_owned()));
        told.uid = wanted.map(ToString::to_string).unwrap_or_default();
        reason.as_str().clone_into(&mut told.reason);
        told.message = message;
        return told;
    };
    told.uid = open.spec.uid.to_string();
    let same = wanted == Some(&open.spec.uid);
    (told.usable, told.reason) = match (same, wanted) {
        (true, _) => (true, Reason::Ready.to_string()),
        (false, Some(_)) => (false, Reason::InUseByPool.to_string()),
        (false, None) => (false, Reason::NoMatchingNode.to_string()),
    };
    told.message = match (open.area.advisory(), wanted) {
        (Some(advisory), Some(_)) if same => advisory,
        (_, Some(_)) if !same => {
            format!("the area belongs to an earlier pool of this name (uid {})", open.spec.uid)
        }
        (_, None) => "the pool does not select this node any more".to_owned(),
        _ => String::new(),
    };
    if told.usable && matches!(open.spec.backend, Backend::Thin(_)) {
        scans::warn(&mut told, &node.preflight.get().scans_guest_disks());
    }
    told.advisory = open.area.advisory().is_some();
    told.total_bytes = open.area.total().as_i64();
    let kernel = open.area.kernel_pools();
    // One look for both: in a pool of the device mapper each is a program to be run.
    let used = kernel.as_ref().map(|state| state.images.data.used.saturating_add(state.volumes.data.used));
    told.thin = kernel.as_ref().map(to_thin_pools);
    told.used_bytes = used.unwrap_or_else(|| open.area.used()).round_up(USED_UNIT).as_i64();
    told.lineage = area.lineage.as_ref().map(ToString::to_string);
    told.obeyed_revision = i64::try_from(area.revision).unwrap_or(i64::MAX);
    for (uid, promise) in &area.promises {
        let generation = i64::try_from(promise.generation.0).unwrap_or(i64::MAX);
        let uid = uid.to_string();
        if promise.released {
            told.released.push(Released { uid, generation });
        } else {
            told.obeyed.push(Obeyed { uid, generation, recorded: None });
        }
    }
    orphans::tell(&mut told, view, name, &open);
    let mut in_use: BTreeSet<Uid> = area.in_use().cloned().collect();
    in_use.extend(reservations::uses_to_tell(node, name));
    told.in_use = in_use.into_iter().map(|uid| uid.0).collect();
    let obeyed: Bytes = area.promises.values().filter(|p| !p.released).map(|p| p.data).sum();
    node.metrics.pool(&told.name, told.total_bytes, told.used_bytes, obeyed.as_i64());
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_fields_and_conditions_count() {
        let ready =
            |status: &str, time: &str| json!({"type": "Ready", "status": status, "lastTransitionTime": time});
        let shown = json!({"state": "Promised", "path": "/a", "conditions": [ready("True", "1"), {"type": "Promised"}]});
        let same = json!({"path": "/a", "conditions": [ready("True", "2")]});
        let differs = |wanted: &Value| {
            differs(&shown, wanted, &["path", "preparedGeneration"], &[ConditionType::Ready])
        };
        assert!(!differs(&same), "times and others' fields do not count");
        assert!(differs(&json!({"path": "/b", "conditions": [ready("True", "1")]})));
        assert!(differs(&json!({"path": "/a", "conditions": [ready("False", "1")]})));
        assert!(differs(&json!({"conditions": [ready("True", "1")]})), "a field that is to go");
        assert!(differs(&json!({"path": "/a"})), "a condition that is to go");
    }

    #[test]
    fn what_another_node_has_left_is_cleared_by_name() {
        let status = json!({"attempts": 2});
        let wanted = Wanted { status, owned: &["attempts", "lastError"], conditions: &[] };
        let answer = json!({"attempts": 2, "lastError": {"reason": "SourceStalled"}, "state": "Importing"});
        assert_eq!(Value::Object(left_over(&answer, &wanted)), json!({"lastError": null}));
        assert!(left_over(&json!({"attempts": 2, "lastError": null}), &wanted).is_empty());
    }
}
