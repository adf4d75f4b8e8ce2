//! The API as it is shown ∧ the records ∧ the disk → what decisions look at.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use berth_api::defaults::ANNOTATION_DISCARD;
use berth_api::parse::{self, PoolArea, generation};
use berth_api::staging_reservation::Access as ApiAccess;
use berth_api::{StagingPool, StagingReservation, TemplateImport};
use berth_core::ids::{
    Digest, ObjectName, PoolName, Uid, is_transfer_reservation, transfer_reservation_name,
};
use berth_core::ledger::{Charge, Class, Holder, Promise};
use berth_core::node::NodeView;
use berth_core::node::view::{
    AreaView, HeldFile, HeldImage, HeldVolume, HeldWorkDir, NodeFile, NodeImage, NodeReservation, NodeStore,
    NodeTransfer, ObeyedPromise, PoolOnNode, Shown,
};
use berth_core::transfer::TransferKind;
use berth_core::units::Bytes;
use berth_core::view::Access;
use berth_record::{
    FileEntry, FileFetch, ImageEntry, ImageState, ReadError, VolumeOrigin, VolumeState, tables,
};
use kube::{Resource as _, ResourceExt as _};
use thiserror::Error;

use super::files::{FileDir, directory};
use super::pools::{OpenPool, PoolError, PoolSpec};
use super::transfers::Subject;
use crate::area::{Backend, ThinGroup, ThinSpec};
use crate::files::boot;
use crate::node::Node;
use crate::sabotage;

/// Why the view could not be made.
#[derive(Debug, Error)]
pub enum ObserveError {
    /// A record cannot be read.
    #[error("the record of pool {pool} cannot be read")]
    Record {
        /// The pool.
        pool: PoolName,
        /// Why.
        source: ReadError,
    },
    /// The list of pools.
    #[error("the list of pools cannot be read")]
    Known(#[from] PoolError),
    /// A worker is gone.
    #[error("the observing worker is gone")]
    Worker(#[from] tokio::task::JoinError),
}

/// Looks at everything.
pub async fn observe(node: &Arc<Node>) -> Result<NodeView, ObserveError> {
    let node = Arc::clone(node);
    tokio::task::spawn_blocking(move || look(&node)).await?
}

fn look(node: &Node) -> Result<NodeView, ObserveError> {
    let mut view = NodeView { node: node.name.clone(), jobs: node.jobs.keys(), ..NodeView::default() };
    for (name, spec) in wanted_pools(node) {
        view.pools.entry(name).or_default().wanted = Some(spec.uid);
    }
    for pool in node.pools.all() {
        if !view.pools.contains_key(&pool.name) && node.pools.is_local(&pool.name)? {
            continue; // nobody but a person decides about it
        }
        let area = area_view(node, &pool)
            .map_err(|source| ObserveError::Record { pool: pool.name.clone(), source })?;
        view.pools.entry(pool.name.clone()).or_default().area = Some(area);
    }
    for ledger in node.watches.ledgers.state() {
        let parsed = parse::ledger_view(&ledger);
        let pool = view.pools.entry(parsed.pool.clone()).or_default();
        pool.ledger = Some(parsed);
    }
    let assigned = node.watches.assigned.state();
    view.reservations = assigned.iter().filter_map(|found| reservation(node, found)).collect();
    view.images = images(node);
    view.transfers = transfers(node);
    view.stores = stores(node);
    if sabotage::active(sabotage::OBEY_WITHOUT_LEDGER) {
        invent_promises(&mut view);
    }
    Ok(view)
}

/// Pools that select this node, by its present labels.
pub fn wanted_pools(node: &Node) -> BTreeMap<PoolName, PoolSpec> {
    let nodes = node.watches.node.state();
    let Some(kube_node) = nodes.first() else { return BTreeMap::new() };
    let labels = kube_node.labels();
    let selects = |pool: &StagingPool| {
        pool.spec.node_selector.iter().all(|(key, value)| labels.get(key) == Some(value))
    };
    let pools = node.watches.pools.state();
    pools
        .iter()
        .filter(|pool| selects(pool))
        .filter_map(|pool| Some((pool.name_any().into(), spec_of(pool)?)))
        .collect()
}

fn spec_of(pool: &StagingPool) -> Option<PoolSpec> {
    let backend = match parse::pool_area(&pool.spec).ok()? {
        PoolArea::Filesystem(area) => Backend::Filesystem { path: area.path.into(), size: area.size },
        PoolArea::Thin(area) => {
            let group = match area.group {
                parse::ThinGroup::Exclusive { devices, wipe } => {
                    ThinGroup::Exclusive { devices: devices.into_iter().map(Into::into).collect(), wipe }
                }
                parse::ThinGroup::Shared { name, size } => ThinGroup::Shared { name, size },
            };
            Backend::Thin(ThinSpec { group, block: area.block.bytes() })
        }
    };
    Some(PoolSpec::new(pool.uid()?.into(), backend))
}

fn area_view(node: &Node, pool: &OpenPool) -> Result<AreaView, ReadError> {
    let record = pool.record.record();
    let (position, promises) = pool.promises()?;
    let attached: BTreeSet<Uid> =
        record.entries(tables::ATTACHMENTS)?.into_iter().map(|(uid, _)| uid).collect();
    let volumes = promises.values().filter(|p| p.class == berth_record::PromiseClass::Volumes);
    let to_volumes: Bytes = volumes.filter(|p| p.obeyed && !p.released).map(|p| p.data).sum();
    let promises = promises.into_iter().filter(|(_, promise)| promise.obeyed);
    let class = |class| match class {
        berth_record::PromiseClass::Images => Class::Images,
        berth_record::PromiseClass::Volumes => Class::Volumes,
    };
    let mut area = AreaView {
        lineage: position.lineage,
        revision: position.obeyed_revision,
        volumes_lack: pool.area.volumes_lack(position.overcommit.target(to_volumes)),
        promises: promises
            .map(|(uid, p)| {
                let reported = node.news.is_obeyed(&pool.name, &uid, p.generation, p.data);
                let (generation, data, class) = (p.generation, p.data, class(p.class));
                (uid, ObeyedPromise { generation, data, class, released: p.released, reported })
            })
            .collect(),
        ..AreaView::default()
    };
    let read = images_that_are_read(pool)?;
    for (digest, image) in record.entries(tables::IMAGES)? {
        let held = held_image(pool, &digest, image, read.contains(&digest))?;
        area.images.insert(digest, held);
    }
    for (uid, volume) in record.entries(tables::VOLUMES)? {
        let (made, there) = (volume.state == VolumeState::Ready, pool.area.has_volume(&uid));
        // One whose image waits for its store is shown once that is there again.
        let waits = matches!(&volume.origin, Some(VolumeOrigin::Image(digest))
            if area.images.get(digest).is_some_and(|image| !image.usable));
        let held = HeldVolume {
            generation: volume.generation,
            size: volume.size,
            ready: made && there,
            lost: made && !there && !waits,
            attached: attached.contains(&uid),
        };
        area.volumes.insert(uid, held);
    }
    for (uid, staging) in record.entries(tables::STAGING)? {
        let made = pool.area.has_work_dir(&uid);
        area.work_dirs.insert(uid, HeldWorkDir { generation: staging.generation, made });
    }
    for (uid, file) in record.entries(tables::FILES)? {
        let dir = directory(pool, &uid, &file);
        if let Some(held) = area.work_dirs.get_mut(&uid) {
            held.made &= matches!(dir, Ok(FileDir::Shown));
        }
        area.files.insert(uid, held_file(&file, matches!(dir, Ok(FileDir::Lost))));
    }
    Ok(area)
}

/// Images that volumes read what they have not written from.
fn images_that_are_read(pool: &OpenPool) -> Result<BTreeSet<Digest>, ReadError> {
    if pool.area.lazy().is_none() {
        return Ok(BTreeSet::new()); // each volume has all that it needs
    }
    let volumes = pool.record.record().entries(tables::VOLUMES)?;
    let images = volumes.into_iter().filter_map(|(_, volume)| match volume.origin {
        Some(VolumeOrigin::Image(digest)) => Some(digest),
        _ => None,
    });
    Ok(images.collect())
}

fn held_image(
    pool: &OpenPool,
    digest: &Digest,
    image: ImageEntry,
    in_use: bool,
) -> Result<HeldImage, ReadError> {
    let usable = match (image.state, pool.area.lazy()) {
        (ImageState::Filling { .. }, _) | (ImageState::Shown { .. }, None) => false,
        (ImageState::Complete, _) => pool.area.has_image(digest),
        (ImageState::Shown { .. }, Some(lazy)) => lazy.is_shown(digest),
    };
    let settled = pool.area.lazy().map_or(Ok(true), |lazy| lazy.is_settled(&pool.record, digest))?;
    let complete = usable && settled && image.state.is_complete();
    Ok(HeldImage { holder: image.holder, usable, complete, in_use, last_used: image.last_used })
}

fn held_file(file: &FileEntry, lost: bool) -> HeldFile {
    let writes = file.shown(boot()).any(|(_, shown)| shown.writer);
    let shown = match (file.shown(boot()).next(), writes) {
        (None, _) => Shown::ToNone,
        (Some(_), false) => Shown::ToReaders,
        (Some(_), true) => Shown::ToWriter,
    };
    HeldFile {
        generation: file.generation,
        fetched: file.fetch == FileFetch::Complete,
        lost,
        shown,
        only_copy: file.is_only_copy(),
    }
}

fn file(node: &Node, uid: &Uid, found: &StagingReservation) -> Option<NodeFile> {
    let asked = found.spec.file.as_ref()?;
    let consents = found.annotations().get(ANNOTATION_DISCARD).is_some_and(|text| text == "true");
    let failed = node.news.file(uid, found).error.is_some_and(|(_, _, again)| !again);
    Some(NodeFile { fetches: asked.source.is_some(), failed, discards: consents })
}

fn reservation(node: &Node, found: &StagingReservation) -> Option<(Uid, NodeReservation)> {
    let status = found.status.as_ref()?;
    let assignment = status.assignment.as_ref().filter(|a| a.node == node.name.as_str())?;
    let image = match &status.image {
        Some(image) => Some(image.digest.parse::<Digest>().ok()?),
        None => None,
    };
    let access = match found.spec.access {
        ApiAccess::Stream => Access::Stream,
        ApiAccess::File => Access::File,
        ApiAccess::Block => Access::Block,
    };
    let reservation = NodeReservation {
        name: ObjectName::new(found.namespace()?, found.name_any()),
        deleting: found.metadata.deletion_timestamp.is_some(),
        pool: assignment.pool.as_deref()?.into(),
        generation: generation(assignment.generation),
        access,
        image,
        file: file(node, &found.uid()?.into(), found),
        transfer: transfer_of(found),
        labels: found.labels().clone(),
    };
    Some((found.uid()?.into(), reservation))
}

/// The transfer that a reservation was made for: that controls it, and after which it is named. What only says so of itself is
/// told apart by the plan, which knows the transfers.
fn transfer_of(found: &StagingReservation) -> Option<Uid> {
    let owners = found.metadata.owner_references.iter().flatten();
    let mut controllers = owners.filter(|owner| owner.controller == Some(true));
    let kinds = [TransferKind::Import, TransferKind::Transfer];
    controllers.find_map(|owner| {
        let kind = kinds.into_iter().find(|kind| owner.kind == kind.as_str())?;
        let uid = Uid::from(owner.uid.as_str());
        let is_ours = owner.api_version == TemplateImport::api_version(&())
            && is_transfer_reservation(kind, &owner.name, &uid, &found.name_any());
        is_ours.then_some(uid)
    })
}

fn images(node: &Node) -> BTreeMap<Uid, NodeImage> {
    let images = node.watches.images.state();
    let ours = images.iter().filter(|image| image.spec.node_name == node.name.as_str());
    ours.filter_map(|image| {
        let parsed = NodeImage {
            name: image.name_any(),
            deleting: image.metadata.deletion_timestamp.is_some(),
            pool: image.spec.pool_name.as_str().into(),
            digest: image.spec.digest.parse().ok()?,
            data: Bytes::from_i64(image.spec.data_bytes),
            virtual_size: Bytes::from_i64(image.spec.virtual_size),
        };
        Some((image.uid()?.into(), parsed))
    })
    .collect()
}

fn transfers(node: &Node) -> BTreeMap<Uid, NodeTransfer> {
    let all = Subject::all(node).into_iter();
    all.filter_map(|subject| {
        let (name, uid, kind) = (subject.name(), subject.uid(), subject.kind());
        let news = node.news.transfer(&uid, &subject);
        let failed = news.last_error.as_ref().is_some_and(|error| !error.retryable);
        let reservation = transfer_reservation_name(kind, &name.name, &uid);
        let parsed = NodeTransfer {
            kind,
            reservation: ObjectName::new(name.namespace.clone(), reservation),
            name,
            deleting: subject.is_deleting(),
            generation: subject.assigned_to(node)?,
            suspended: subject.is_suspended(),
            planned: news.plan.is_some(),
            // The operator says that it has failed; its space goes once nothing works in it any more.
            ended: news.outcome.is_some() || failed || subject.has_failed() || subject.asked().is_err(),
            released: news.released_generation.map(generation),
        };
        Some((uid, parsed))
    })
    .collect()
}

fn stores(node: &Node) -> BTreeMap<ObjectName, NodeStore> {
    let stores = node.watches.stores.state();
    stores
        .iter()
        .filter_map(|store| {
            let assignment =
                store.status.as_ref()?.assignment.as_ref().filter(|a| a.node == node.name.as_str())?;
            let uid = Uid::from(store.uid()?);
            if store.metadata.deletion_timestamp.is_some() {
                return None;
            }
            let due = node.news.store_due(&uid, store.metadata.generation);
            let parsed = NodeStore { uid, generation: generation(assignment.generation), due };
            Some((ObjectName::new(store.namespace()?, store.name_any()), parsed))
        })
        .collect()
}

/// The defect `obey-without-ledger`: every assignment counts as promised.
fn invent_promises(view: &mut NodeView) {
    let holders =
        view.reservations.iter().map(|(uid, r)| (uid.clone(), r.pool.clone(), r.name.clone(), r.generation));
    for (uid, pool, name, generation) in holders.collect::<Vec<_>>() {
        let charge = Charge { data: Bytes::mib(64), metadata: Bytes::ZERO };
        let holder = Holder::Reservation(name);
        let promise = Promise { holder, class: Class::Volumes, charge, generation, revoked: None };
        let Some(PoolOnNode { ledger: Some(ledger), .. }) = view.pools.get_mut(&pool) else { continue };
        ledger.promises.entry(uid).or_insert(promise);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_reservation_that_a_transfer_controls_and_named_is_that_transfers() {
        let name = transfer_reservation_name(TransferKind::Import, "debian", &Uid::from("u1"));
        let reservation = |name: &str, kind: &str, api: &str, controller: bool| -> StagingReservation {
            serde_json::from_value(serde_json::json!({
                "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation",
                "metadata": {"name": name, "namespace": "ns", "uid": "r", "ownerReferences": [{
                    "apiVersion": api, "kind": kind, "name": "debian", "uid": "u1", "controller": controller,
                }]},
                "spec": {"maxSize": "1Gi"},
            }))
            .unwrap()
        };
        let (kind, api) = ("TemplateImport", "staging.berth.dev/v1alpha1");
        assert_eq!(transfer_of(&reservation(&name, kind, api, true)), Some(Uid::from("u1")));
        for other in [
            reservation("mine", kind, api, true),
            reservation(&name, "ConfigMap", api, true),
            reservation(&name, kind, "example.org/v1", true),
            reservation(&name, kind, api, false),
            reservation(&name, "ImageTransfer", api, true),
        ] {
            assert_eq!(transfer_of(&other), None, "{:?}", other.metadata);
        }
    }
}
