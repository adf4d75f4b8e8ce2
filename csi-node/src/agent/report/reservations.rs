//! What this node says of reservations that are assigned to it.

use std::sync::Arc;

use berth_api::StagingReservation;
use berth_api::conditions::{ConditionType, Truth, condition, time};
use berth_core::ids::{PoolName, Uid};
use berth_core::node::view::{AreaView, NodeReservation};
use berth_core::node::{NodeView, behind};
use berth_core::reason::Reason;
use kube::ResourceExt as _;
use serde_json::{Value, json};

use super::{ReportError, Wanted, apply, files, namespaced, shown};
use crate::agent::files::FileDir;
use crate::agent::news::without_host_paths;
use crate::node::{Node, now};

/// Reports a reservation of this node.
pub(super) async fn report(
    node: &Node,
    view: &NodeView,
    object: &StagingReservation,
) -> Result<(), ReportError> {
    let uid = Uid::from(object.uid().unwrap_or_default());
    let Some(reservation) = view.reservations.get(&uid) else { return Ok(()) };
    if reservation.deleting && reservation.file.is_none() {
        return Ok(());
    }
    let area = view.pools.get(&reservation.pool).and_then(|pool| pool.area.as_ref());
    let prepared = area.is_some_and(|area| reservation.is_prepared(&uid, area));
    let previous = object.status.as_ref().map(|status| status.conditions.clone()).unwrap_or_default();
    let (truth, reason, message) = if prepared {
        (Truth::True, Reason::Ready, String::new())
    } else {
        let (reason, message) = why_not(node, view, reservation, area, &uid);
        (Truth::False, reason, without_host_paths(&message))
    };
    let generation = object.metadata.generation;
    let ready = condition(&previous, ConditionType::Ready, truth, reason, message, generation, now());
    let mut conditions = vec![ready];
    let mut status = json!({});
    let open = node.pools.get(&reservation.pool);
    if let (Some(_), Some(pool)) = (&reservation.file, &open) {
        let told = files::report(pool, &uid, object, &node.news.file(&uid, object));
        conditions.extend(told.conditions);
        status = Value::Object(told.fields);
        if let Some(name) = told.name {
            status["path"] = json!(name);
        }
    }
    status["conditions"] = json!(conditions);
    if let Some(used) = last_used(node, &uid, &reservation.pool) {
        status["lastUsed"] = used;
    }
    if prepared {
        status["preparedGeneration"] = json!(reservation.generation.0);
    }
    let owned = [&["path", "preparedGeneration", "lastUsed"][..], &files::FIELDS].concat();
    let conditions = &[ConditionType::Ready, ConditionType::Staged, ConditionType::Durable];
    let wanted = Wanted { status, owned: &owned, conditions };
    apply(node, namespaced(node, object), object, shown(object.status.as_ref())?, wanted).await
}

/// When something last ceased to use a reservation, as its status says it.
fn last_used(node: &Node, uid: &Uid, pool: &PoolName) -> Option<Value> {
    let used = node.pools.get(pool)?.record.last_used(uid).ok().flatten()?;
    Some(json!(time(used)))
}

/// Reservations of this pool of which a use has ended that their status does not show yet: until then they count as in use, so
/// that nobody sees one idle without seeing since when.
pub(super) fn uses_to_tell(node: &Node, pool: &PoolName) -> Vec<Uid> {
    let to_tell = |object: &Arc<StagingReservation>| {
        let status = object.status.as_ref()?;
        let here = status.assignment.as_ref()?.pool.as_deref() == Some(pool.as_str());
        if !here || object.metadata.deletion_timestamp.is_some() {
            return None;
        }
        let uid = Uid::from(object.uid()?);
        let used = last_used(node, &uid, pool)?;
        (Some(used) != status.last_used.as_ref().map(|shown| json!(shown))).then_some(uid)
    };
    node.watches.assigned.state().iter().filter_map(to_tell).collect()
}

fn object(node: &Node, uid: &Uid) -> Option<Arc<StagingReservation>> {
    node.watches.assigned.find(|object| object.metadata.uid.as_deref() == Some(uid.as_str()))
}

/// What an assigned reservation waits for.
fn why_not(
    node: &Node,
    view: &NodeView,
    reservation: &NodeReservation,
    area: Option<&AreaView>,
    uid: &Uid,
) -> (Reason, String) {
    let name = &reservation.pool;
    let Some(area) = area else {
        let failure = node.pools.failure(name);
        return failure.unwrap_or((Reason::Progressing, format!("pool {name} is being opened on this node")));
    };
    if area.volumes.get(uid).is_some_and(|volume| volume.lost) {
        return (Reason::VolumeLost, format!("its file is gone from pool {name}, and is not made again"));
    }
    let ledger = view.pools.get(name).and_then(|pool| pool.ledger.as_ref());
    if let Some(problem) = ledger.and_then(|ledger| behind(ledger, area)) {
        return (Reason::LedgerBehind, problem);
    }
    if area.promises.get(uid).is_none_or(|promise| promise.generation != reservation.generation) {
        return (Reason::Progressing, format!("waits for the ledger of pool {name}"));
    }
    if let (Some(_), Some(object)) = (reservation.file, object(node, uid)) {
        let recorded = node.pools.get(name).map(|pool| files::recorded(&pool, uid));
        let (entry, dir) = recorded.unwrap_or((None, FileDir::Hidden));
        let (_, reason, message) = files::staged(entry.as_ref(), dir, &node.news.file(uid, &object));
        return (reason, message);
    }
    let news = object(node, uid).map(|object| node.news.file(uid, &object)).unwrap_or_default();
    if let (None, Some((reason, message, _))) = (reservation.image, news.error) {
        return (reason, message);
    }
    let Some(digest) = reservation.image else {
        return (Reason::Progressing, "is being made".to_owned());
    };
    let holder = view.images.iter().find(|(_, image)| image.digest == digest && image.pool == *name);
    let fill = holder.and_then(|(uid, _)| node.news.fill(uid));
    match fill {
        Some(fill) => match fill.error {
            Some((reason, message)) => (reason, format!("image {digest} is not staged: {message}")),
            None => (Reason::Progressing, format!("image {digest} is being staged: {} %", fill.percent)),
        },
        None => (Reason::Progressing, format!("image {digest} is to be staged")),
    }
}
