//! What still holds a pool, and what will make it go.

use std::collections::BTreeSet;
use std::fmt;

use berth_api::StagingReservation;
use berth_core::ids::{NodeName, ObjectName, PoolName, Uid};
use berth_core::ledger::{Class, Holder as PromiseHolder};
use berth_core::units::Bytes;
use berth_core::view::{Access, LedgerView, View};
use kube::ResourceExt as _;
use serde::Serialize;

use crate::explain::claim;
use crate::observe::Seen;
use crate::pods::PodsOfClaims;
use crate::text::count;

/// What a promise is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Kind {
    /// A volume: it is the only copy, and goes only with its claim.
    Volume,
    /// A directory.
    Directory,
    /// Nothing but an entry in the ledger.
    Stream,
    /// A staged image.
    Image,
}

/// One promise in a pool. Sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Holder {
    /// The node.
    pub node: String,
    /// What it is.
    pub kind: Kind,
    /// The object's name, with its namespace if it has one.
    pub name: String,
    /// What is promised.
    pub bytes: Bytes,
    /// Who keeps it: owners, claims, pods, reservations that refer to an image.
    pub held_by: Vec<String>,
    /// True if the node says that something uses it now.
    pub in_use: bool,
    /// What will make it go.
    pub goes: String,
}

/// Everything promised in the pool, on these nodes; on all if none is named. In order of node and kind.
pub fn holders(seen: &Seen, pool: &PoolName, nodes: &BTreeSet<NodeName>, pods: &PodsOfClaims) -> Vec<Holder> {
    let view = seen.view();
    let mut all: Vec<Holder> = Vec::new();
    for ledger in ledgers(&view, pool, nodes) {
        let report = view.report_of(pool, &ledger.node);
        for (uid, promise) in &ledger.promises {
            let in_use = report.is_some_and(|report| report.in_use.contains(uid));
            let (kind, name, held_by, goes) = match &promise.holder {
                PromiseHolder::Image(name) => of_image(&view, name),
                PromiseHolder::Reservation(name) => {
                    of_reservation(seen, &view, uid, name, promise.class, pods)
                }
            };
            let (node, bytes) = (ledger.node.to_string(), promise.charge.data);
            all.push(Holder { node, kind, name, bytes, held_by, in_use, goes });
        }
    }
    all.sort();
    all
}

fn ledgers<'v>(
    view: &'v View,
    pool: &'v PoolName,
    nodes: &'v BTreeSet<NodeName>,
) -> impl Iterator<Item = &'v LedgerView> {
    view.ledgers
        .values()
        .filter(move |ledger| ledger.pool == *pool && (nodes.is_empty() || nodes.contains(&ledger.node)))
}

/// The namespaces of the claims that have volumes in the pool.
pub fn claim_namespaces(seen: &Seen, pool: &PoolName) -> BTreeSet<String> {
    let view = seen.view();
    let everywhere = BTreeSet::new();
    let uids: BTreeSet<&Uid> =
        ledgers(&view, pool, &everywhere).flat_map(|ledger| ledger.promises.keys()).collect();
    let here = seen.reservations.iter().filter(|found| uids.contains(&Uid(found.uid().unwrap_or_default())));
    here.filter_map(claim).map(|claim| claim.namespace).collect()
}

type Described = (Kind, String, Vec<String>, String);

fn of_image(view: &View, name: &str) -> Described {
    let users: Vec<String> = view
        .reservations
        .values()
        .filter(|user| !user.deleting)
        .filter(|user| user.assigned_image.as_ref().is_some_and(|image| image.staged_image == name))
        .map(|user| format!("reservation {}", user.name))
        .collect();
    let goes = match (view.images.get(name), users.len()) {
        (None, _) => "once an operator has made sure that its object is gone".to_owned(),
        (Some(image), _) if image.deleting => "once its node has removed it".to_owned(),
        (Some(_), 0) => "by itself: nothing refers to it".to_owned(),
        (Some(_), users) => format!("after {}", count(users, "reservation")),
    };
    (Kind::Image, name.to_owned(), users, goes)
}

fn of_reservation(
    seen: &Seen,
    view: &View,
    uid: &Uid,
    name: &ObjectName,
    class: Class,
    pods: &PodsOfClaims,
) -> Described {
    let object = seen.reservations.iter().find(|found| found.uid().as_deref() == Some(uid.as_str()));
    let Some((object, request)) = object.zip(view.reservations.get(uid)) else {
        let kind = if class == Class::Volumes { Kind::Volume } else { Kind::Directory };
        return (kind, name.to_string(), Vec::new(), "once its object is known to be gone".to_owned());
    };
    let kind = match request.access {
        Access::Block => Kind::Volume,
        Access::File => Kind::Directory,
        Access::Stream => Kind::Stream,
    };
    let mut held_by: Vec<String> =
        object.owner_references().iter().map(|owner| format!("{} {}", owner.kind, owner.name)).collect();
    let claim = claim(object);
    if let Some(claim) = &claim {
        held_by.push(format!("claim {claim}"));
        held_by.extend(
            pods.get(claim).into_iter().flatten().map(|pod| format!("pod {}/{pod}", claim.namespace)),
        );
    }
    let goes = goes(object, claim.as_ref(), request.ttl_millis.is_some());
    (kind, name.to_string(), held_by, goes)
}

fn goes(object: &StagingReservation, claim: Option<&ObjectName>, expires: bool) -> String {
    let owner = object.owner_references().iter().find(|owner| owner.controller == Some(true));
    match (claim, owner) {
        _ if object.metadata.deletion_timestamp.is_some() => "once its node has removed its bytes".to_owned(),
        (Some(claim), _) => format!("with claim {claim}"),
        (None, Some(owner)) => format!("with {} {}", owner.kind, owner.name),
        (None, None) if expires => "when it is deleted, or unused for its ttl".to_owned(),
        (None, None) => "when it is deleted".to_owned(),
    }
}

/// How much is left, in one line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Left {
    /// Volumes.
    pub volumes: usize,
    /// Everything else.
    pub others: usize,
    /// Bytes promised to all of them.
    pub bytes: Bytes,
}

impl Left {
    /// Of these.
    pub fn of(holders: &[Holder]) -> Self {
        let volumes = holders.iter().filter(|holder| holder.kind == Kind::Volume).count();
        let bytes = holders.iter().map(|holder| holder.bytes).sum();
        Self { volumes, others: holders.len() - volumes, bytes }
    }

    /// True if draining can do no more: nothing is left but volumes and the images that these start from.
    pub fn is_drained(holders: &[Holder]) -> bool {
        let volumes: BTreeSet<String> = holders
            .iter()
            .filter(|holder| holder.kind == Kind::Volume)
            .map(|holder| format!("reservation {}", holder.name))
            .collect();
        holders.iter().all(|holder| match holder.kind {
            Kind::Volume => true,
            Kind::Image => holder.held_by.iter().any(|user| volumes.contains(user)),
            Kind::Directory | Kind::Stream => false,
        })
    }
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let others = if self.others == 1 {
            "1 other holder".to_owned()
        } else {
            format!("{} other holders", self.others)
        };
        write!(f, "{} and {others} left, {}", count(self.volumes, "volume"), self.bytes)
    }
}
