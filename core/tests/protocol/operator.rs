//! The real decisions, asked about what an operator has seen, and what it writes.

use std::collections::{BTreeMap, BTreeSet};

use berth_core::change::Change;
use berth_core::ids::{
    Digest, Lineage, NodeName, ObjectName, PoolName, Sha256Sum, Uid, ledger_name, staged_image_name,
};
use berth_core::ledger::{Charge, Class, Holder, Promise};
use berth_core::overcommit::Percent;
use berth_core::reason::Reason;
use berth_core::transfer::TransferKind;
use berth_core::units::{Bytes, Generation, Timestamp};
use berth_core::view::{
    Access, AssignedImage, DurableImage, ImageView, LedgerCapacity, LedgerView, NodeLossPolicy,
    NodePoolState, NodeState, ObjectVersion, Placement, PoolChoice, PoolView, ReclaimPolicy, ReservationView,
    Service, StoreView, Strategy, TransferState, TransferView, View, WhenFull,
};

use crate::scenario::Scenario;
use crate::state::{
    Entry, HOLDERS, Image, NODES, NewEntries, NewEntry, Objects, RESERVATIONS, Record, Reservation, Revoked,
    State, Write, tag,
};

/// Long after everything was made.
const NOW: Timestamp = Timestamp(1_000_000_000);
/// Of each ledger.
pub const CAPACITY: u8 = 100;
/// Of the image, which is as large as its disk.
pub const IMAGE: u8 = 20;

/// Something that an operator decides about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Object {
    Pool,
    Reservation(u8),
    Image(u8),
}

/// The writes that the decision about `object` calls for.
pub fn decide(scenario: &Scenario, seen: &Objects, leader: bool, object: Object) -> Vec<Write> {
    let view = view(scenario, seen, leader);
    let changes = match object {
        Object::Pool => berth_core::pool::decide(&view, &pool_name(), NOW),
        Object::Reservation(at) => berth_core::reservation::decide(&view, &Uid(format!("r{at}")), NOW),
        Object::Image(node) => berth_core::image::decide(&view, &image_name(node), NOW),
    };
    let ledgers = changes.iter().filter(|change| matches!(change, Change::WriteLedger { .. })).count();
    assert!(ledgers <= 1, "one ledger write in a pass: {changes:?}");
    changes.iter().filter_map(write_of).collect()
}

fn write_of(change: &Change) -> Option<Write> {
    let index = |name: &ObjectName| number(&name.name);
    Some(match change {
        Change::WriteLedger { name, version, revision, capacity, promises } => {
            assert_eq!(*capacity, LedgerCapacity::shared(Bytes(CAPACITY.into())));
            let node = (0..tag(NODES)).find(|n| ledger_name(&pool_name(), &node_name(*n)) == *name);
            let (node, base) = (node.expect("a ledger"), version.0.parse().expect("a number"));
            Write::Ledger { node, base, entries: entries(promises, *revision) }
        }
        Change::GuardReservation { name, .. } => Write::Guard(index(name)),
        Change::UnguardReservation { name, .. } => Write::Unguard(index(name)),
        Change::AssignReservation { name, version, placement, image, .. } => Write::Assign {
            reservation: index(name),
            version: version.0.parse().expect("a number"),
            node: number(&placement.node.0),
            image: image.is_some(),
        },
        Change::ReportReservation { name, version, report, .. } => Write::Report {
            reservation: index(name),
            version: version.0.parse().expect("a number"),
            state: State::of(report.state),
        },
        Change::CreateImage { node, .. } => Write::CreateImage(number(&node.0)),
        Change::DeleteImage { name, uid } => Write::DeleteImage { node: place(name), uid: number(&uid.0) },
        Change::UnguardImage { name, uid } => Write::UnguardImage { node: place(name), uid: number(&uid.0) },
        Change::ConfirmGone { uid, .. } => Write::Confirm(holder(uid)),
        // No history is lost here: only a view that lags calls for a rebuilt ledger, and the versions that it names are
        // refused.
        Change::ReportPool { .. }
        | Change::ReportReclaim { .. }
        | Change::RetryAfter { .. }
        | Change::RebuildLedger { .. } => return None,
        other => panic!("nothing here calls for {other:?}"),
    })
}

fn entries(promises: &BTreeMap<Uid, Promise>, revision: u64) -> NewEntries {
    let mut entries = [None; HOLDERS];
    for (uid, promise) in promises {
        let revoked = match promise.revoked {
            None => Revoked::No,
            Some(at) if at == revision => Revoked::Now,
            Some(at) => Revoked::Before(small(at)),
        };
        entries[usize::from(holder(uid))] = Some(NewEntry { bytes: small(promise.charge.data.0), revoked });
    }
    entries
}

fn small(number: u64) -> u8 {
    u8::try_from(number).expect("everything here is small")
}

/// The number at the end of a name.
fn number(name: &str) -> u8 {
    name[1..].parse().expect("a letter and a number")
}

fn holder(uid: &Uid) -> u8 {
    let first = if uid.0.starts_with('r') { 0 } else { tag(RESERVATIONS) };
    first + number(&uid.0)
}

fn uid_of(holder: usize) -> Uid {
    match holder.checked_sub(RESERVATIONS) {
        None => Uid(format!("r{holder}")),
        Some(image) => Uid(format!("i{image}")),
    }
}

fn pool_name() -> PoolName {
    PoolName::from("p")
}

fn node_name(node: u8) -> NodeName {
    NodeName(format!("n{node}"))
}

fn digest() -> Digest {
    Digest(Sha256Sum::of(b"image"))
}

fn image_name(node: u8) -> String {
    staged_image_name(&digest(), &pool_name(), &node_name(node))
}

fn place(name: &str) -> u8 {
    (0..tag(NODES)).find(|node| image_name(*node) == name).expect("an image")
}

fn view(scenario: &Scenario, seen: &Objects, leader: bool) -> View {
    let mut view = View { leader, ..View::default() };
    view.pools.insert(pool_name(), pool());
    for node in 0..scenario.nodes {
        let name = node_name(tag(node));
        let key = (pool_name(), name.clone());
        view.ledgers.insert(key, ledger_view(node, seen));
        let pools = BTreeMap::from([(pool_name(), report_view(&seen.reports[node]))]);
        let state = NodeState {
            name: name.clone(),
            version: ObjectVersion::default(),
            live: true,
            reported: true,
            silent: false,
            zone: None,
            pools,
        };
        view.nodes.insert(name, state);
        if let Some(image) = seen.images[node] {
            let image = image_view(tag(node), image);
            view.images.insert(image.name.clone(), image);
        }
    }
    for (at, reservation) in seen.reservations.iter().enumerate() {
        if let Some(reservation) = reservation {
            let reservation = reservation_view(scenario, at, *reservation);
            view.reservations.insert(reservation.uid.clone(), reservation);
        }
    }
    let import = import();
    let (name, version) = (import.stores[0].clone(), ObjectVersion::default());
    view.stores.insert(name.clone(), StoreView { name, version, assignment: None, deleting: false });
    view.imports.insert(import.name.clone(), import);
    view
}

fn ledger_view(node: usize, seen: &Objects) -> LedgerView {
    let ledger = &seen.ledgers[node];
    let named = |uid: usize| uid.checked_sub(RESERVATIONS);
    let promise = |(at, entry): (usize, &Option<Entry>)| {
        let entry = entry.as_ref()?;
        let holder = match named(at) {
            None => Holder::Reservation(ObjectName::new("ns", format!("r{at}"))),
            Some(_) => Holder::Image(image_name(tag(node))),
        };
        let promise = Promise {
            holder,
            class: if at < RESERVATIONS { Class::Volumes } else { Class::Images },
            charge: Charge { data: Bytes(entry.bytes.into()), metadata: Bytes::ZERO },
            generation: Generation::FIRST,
            revoked: entry.revoked.map(u64::from),
        };
        Some((uid_of(at), promise))
    };
    LedgerView {
        name: ledger_name(&pool_name(), &node_name(tag(node))),
        version: ObjectVersion(ledger.revision.to_string()),
        pool: pool_name(),
        node: node_name(tag(node)),
        lineage: Lineage::from("lineage"),
        revision: ledger.revision.into(),
        rebuilt: None,
        capacity: LedgerCapacity::shared(Bytes(CAPACITY.into())),
        promises: ledger.entries.iter().enumerate().filter_map(promise).collect(),
    }
}

fn report_view(record: &Record) -> NodePoolState {
    let holders = |which: &[bool; HOLDERS]| -> BTreeMap<Uid, Generation> {
        let set = which.iter().enumerate().filter(|(_, set)| **set);
        set.map(|(at, _)| (uid_of(at), Generation::FIRST)).collect()
    };
    NodePoolState {
        usable: record.revision > 0,
        reason: Reason::Ready,
        message: String::new(),
        total: Bytes(CAPACITY.into()),
        used: Bytes::ZERO,
        advisory: false,
        thin: None,
        lineage: (record.revision > 0).then(|| Lineage::from("lineage")),
        obeyed_revision: record.revision.into(),
        released: holders(&record.released),
        obeyed: holders(&record.obeyed),
        recorded: BTreeMap::new(),
        in_use: BTreeSet::new(),
    }
}

fn image_view(node: u8, image: Image) -> ImageView {
    ImageView {
        uid: Uid(format!("i{}", image.uid)),
        name: image_name(node),
        created: Timestamp(0),
        deleting: image.deleting,
        has_finalizer: true,
        digest: digest(),
        pool: pool_name(),
        node: node_name(node),
        data_bytes: Bytes(IMAGE.into()),
        virtual_size: Bytes(IMAGE.into()),
        ready: false,
        last_used: None,
        given_up: false,
    }
}

fn reservation_view(scenario: &Scenario, at: usize, reservation: Reservation) -> ReservationView {
    let asked = &scenario.asked[at];
    ReservationView {
        uid: uid_of(at),
        name: ObjectName::new("ns", format!("r{at}")),
        version: ObjectVersion(reservation.version.to_string()),
        created: Timestamp(at as u64),
        deleting: reservation.deleting,
        has_finalizer: reservation.guarded,
        pools: PoolChoice::Named(pool_name()),
        node: None,
        zone: None,
        priority: 0,
        ttl_millis: None,
        renewed: None,
        last_used: None,
        expires: None,
        dry_run: false,
        max_size: Bytes(asked.bytes.into()),
        template: asked.template.then(|| ObjectName::new("ns", "template")),
        claim_namespace: "ns".to_owned(),
        claim_name: None,
        claim: None,
        access: Access::Block,
        when_full: None,
        state: reservation.state.shown(),
        assignment: reservation.assigned.map(|(node, _)| Placement {
            pool: pool_name(),
            node: node_name(node),
            generation: Generation::FIRST,
        }),
        assigned_image: reservation.assigned.filter(|(_, image)| *image).map(|(node, _)| AssignedImage {
            digest: digest(),
            staged_image: image_name(node),
            virtual_size: Bytes(IMAGE.into()),
        }),
        prepared: reservation.prepared.then_some(Generation::FIRST),
        queued_since: None,
        ready_since: None,
        only_copy: None,
        invalid: None,
    }
}

fn import() -> TransferView {
    TransferView {
        kind: TransferKind::Import,
        uid: Uid::from("import"),
        name: ObjectName::new("ns", "template"),
        version: ObjectVersion::default(),
        created: Timestamp(0),
        deleting: false,
        has_finalizer: true,
        pools: PoolChoice::Labelled(BTreeMap::new()),
        stores: vec![ObjectName::new("ns", "store")],
        suspended: false,
        deadline: None,
        ttl_after_finished: None,
        finished: None,
        done: false,
        allowed_namespaces: Vec::new(),
        state: TransferState::Done,
        assignment: None,
        peak: None,
        durable: Some(DurableImage {
            digest: digest(),
            virtual_size: Bytes(IMAGE.into()),
            real_size: Bytes(IMAGE.into()),
        }),
        error: None,
        retry: None,
        released: None,
        invalid: None,
    }
}

fn pool() -> PoolView {
    PoolView {
        name: pool_name(),
        uid: Uid::from("pool"),
        labels: BTreeMap::new(),
        block: None,
        limit: None,
        overcommit: Percent::default(),
        when_full: WhenFull::Queue,
        max_queue_millis: 3_600_000,
        max_queued: 10,
        strategy: Strategy::default(),
        tenant_limits: Vec::new(),
        reclaim: ReclaimPolicy { ttl_millis: 1, ..ReclaimPolicy::default() },
        node_loss: NodeLossPolicy::default(),
        service: Service::default(),
        drain_nodes: BTreeSet::new(),
        deleting: false,
        has_finalizer: true,
        invalid: None,
    }
}
