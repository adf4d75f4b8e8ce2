//! Small objects for unit tests.

use std::collections::{BTreeMap, BTreeSet};

use crate::budget::fits;
use crate::change::{Change, ReservationReport};
use crate::ids::{
    Digest, Lineage, NodeName, ObjectName, PoolName, Sha256Sum, Uid, ledger_name, staged_image_name,
};
use crate::ledger::{Charge, Class, Holder, Promise};
use crate::overcommit::Percent;
use crate::reason::Reason;
use crate::thin::{BlockSize, PoolMode, PoolState, ThinState, Usage};
use crate::transfer::TransferKind;
use crate::units::{Bytes, Generation, Timestamp};
use crate::view::{
    Access, DurableImage, ImageView, LedgerCapacity, LedgerView, NodeLossPolicy, NodePoolState, NodeState,
    ObjectVersion, Placement, PoolChoice, PoolView, ReclaimPolicy, ReservationState, ReservationView,
    Service, StoreView, Strategy, TransferState, TransferView, View, WhenFull,
};

pub const HOUR: u64 = 3_600_000;

pub fn promise(name: &str, class: Class, data: u64) -> Promise {
    Promise {
        holder: Holder::Reservation(ObjectName::new("ns", name)),
        class,
        charge: Charge { data: Bytes(data), metadata: Bytes::ZERO },
        generation: Generation::FIRST,
        revoked: None,
    }
}

pub fn ledger(pool: &str, node: &str, total: u64) -> LedgerView {
    let (pool, node) = (PoolName::from(pool), NodeName::from(node));
    LedgerView {
        name: ledger_name(&pool, &node),
        version: ObjectVersion("1".to_owned()),
        pool,
        node,
        lineage: Lineage::from("lineage"),
        revision: 1,
        rebuilt: None,
        capacity: LedgerCapacity::shared(Bytes(total)),
        promises: BTreeMap::new(),
    }
}

pub fn node_pool(total: u64) -> NodePoolState {
    NodePoolState {
        usable: true,
        reason: Reason::Ready,
        message: String::new(),
        total: Bytes(total),
        used: Bytes::ZERO,
        advisory: false,
        thin: None,
        lineage: None,
        obeyed_revision: 0,
        released: BTreeMap::new(),
        obeyed: BTreeMap::new(),
        recorded: BTreeMap::new(),
        in_use: BTreeSet::new(),
    }
}

pub fn pool(name: &str) -> PoolView {
    PoolView {
        name: PoolName::from(name),
        uid: Uid(format!("pool-{name}")),
        labels: BTreeMap::new(),
        block: None,
        limit: None,
        overcommit: Percent::WHOLE,
        when_full: WhenFull::Queue,
        max_queue_millis: HOUR,
        max_queued: 1000,
        strategy: Strategy::default(),
        tenant_limits: Vec::new(),
        reclaim: ReclaimPolicy::default(),
        node_loss: NodeLossPolicy::default(),
        service: Service::default(),
        drain_nodes: BTreeSet::new(),
        deleting: false,
        has_finalizer: true,
        invalid: None,
    }
}

/// The image store of [`template`]: `ns/store`.
pub fn store() -> StoreView {
    StoreView {
        name: ObjectName::new("ns", "store"),
        version: ObjectVersion("1".to_owned()),
        assignment: None,
        deleting: false,
    }
}

/// Nodes that carry pool `p`, with ledgers of these sizes, and an image store.
pub fn view(nodes: &[(&str, u64)]) -> View {
    let mut view = View { leader: true, ..View::default() };
    view.stores.insert(store().name, store());
    view.pools.insert(PoolName::from("p"), pool("p"));
    for (name, total) in nodes {
        let node = NodeState {
            name: NodeName::from(*name),
            version: ObjectVersion("1".to_owned()),
            live: true,
            reported: true,
            silent: false,
            zone: None,
            pools: BTreeMap::from([(PoolName::from("p"), node_pool(*total))]),
        };
        view.nodes.insert(node.name.clone(), node);
        view.ledgers.insert((PoolName::from("p"), NodeName::from(*name)), ledger("p", name, *total));
    }
    view
}

/// Nodes that carry pool `p`, made of kernel pools with so much data in all, and its ledgers.
pub fn thin_view(nodes: &[&str], total: Bytes) -> View {
    let sized: Vec<(&str, u64)> = nodes.iter().map(|name| (*name, total.0)).collect();
    let mut view = view(&sized);
    let state = PoolState {
        mode: PoolMode::ReadWrite,
        needs_check: false,
        data: Usage::default(),
        metadata: Usage { used: Bytes::ZERO, total: Bytes::mib(64) },
    };
    let pool = view.pools.get_mut(&PoolName::from("p")).expect("just made");
    pool.block = Some(BlockSize::DEFAULT);
    for node in view.nodes.values_mut() {
        let report = node.pools.get_mut(&pool.name).expect("it carries the pool");
        report.thin = Some(ThinState { images: state, volumes: state });
        let ledger = view.ledgers.get_mut(&(pool.name.clone(), node.name.clone())).expect("just made");
        ledger.capacity = pool.capacity(report).expect("of one backend");
    }
    view
}

/// A guarded request for a directory, made at `created`.
pub fn reservation(name: &str, size: u64, created: u64) -> ReservationView {
    ReservationView {
        uid: Uid::from(name),
        name: ObjectName::new("ns", name),
        version: ObjectVersion("1".to_owned()),
        created: Timestamp(created),
        deleting: false,
        has_finalizer: true,
        pools: PoolChoice::Named(PoolName::from("p")),
        node: None,
        zone: None,
        priority: 0,
        ttl_millis: None,
        renewed: None,
        last_used: None,
        expires: None,
        dry_run: false,
        max_size: Bytes(size),
        template: None,
        claim_namespace: "ns".to_owned(),
        claim_name: None,
        claim: None,
        access: Access::File,
        when_full: None,
        state: ReservationState::Pending,
        assignment: None,
        assigned_image: None,
        prepared: None,
        queued_since: None,
        ready_since: None,
        only_copy: None,
        invalid: None,
    }
}

pub fn at(pool: &str, node: &str) -> (PoolName, NodeName) {
    (PoolName::from(pool), NodeName::from(node))
}

pub fn placed(pool: &str, node: &str, generation: u64) -> Placement {
    Placement { pool: PoolName::from(pool), node: NodeName::from(node), generation: Generation(generation) }
}

/// Puts a promise into a ledger, which must have room for it.
pub fn hold(view: &mut View, node: &str, name: &str, class: Class, data: u64) {
    let ledger = view.ledgers.get_mut(&at("p", node)).expect("the ledger is there");
    let new = [(Uid::from(name), promise(name, class, data))];
    fits(ledger, &new).expect("fits");
    let [(uid, promise)] = new;
    ledger.promises.insert(uid, promise);
}

pub fn digest() -> Digest {
    Digest(Sha256Sum::of(b"image"))
}

/// An import that is done: `ns/template`.
pub fn template(virtual_size: u64, real_size: u64) -> TransferView {
    TransferView {
        kind: TransferKind::Import,
        uid: Uid::from("import"),
        name: ObjectName::new("ns", "template"),
        version: ObjectVersion("1".to_owned()),
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
        assignment: Some(placed("p", "a", 1)),
        peak: Some(Bytes(10)),
        durable: Some(DurableImage {
            digest: digest(),
            virtual_size: Bytes(virtual_size),
            real_size: Bytes(real_size),
        }),
        error: None,
        retry: None,
        released: None,
        invalid: None,
    }
}

/// The staged image of [`template`] in pool `p`.
pub fn image(node: &str, real_size: u64, created: u64) -> ImageView {
    ImageView {
        uid: Uid(format!("image-{node}")),
        name: staged_image_name(&digest(), &PoolName::from("p"), &NodeName::from(node)),
        created: Timestamp(created),
        deleting: false,
        has_finalizer: true,
        digest: digest(),
        pool: PoolName::from("p"),
        node: NodeName::from(node),
        data_bytes: Bytes(real_size),
        virtual_size: Bytes(real_size),
        ready: false,
        last_used: None,
        given_up: false,
    }
}

/// An object that cannot be read.
pub fn unreadable(kind: &str, name: ObjectName, uid: &str) -> crate::view::Unreadable {
    crate::view::Unreadable {
        kind: kind.to_owned(),
        name,
        uid: Uid::from(uid),
        claim_namespace: "ns".to_owned(),
        problem: "spec.access: unknown variant `Sideways`".to_owned(),
    }
}

pub fn add(view: &mut View, reservation: ReservationView) -> Uid {
    let uid = reservation.uid.clone();
    view.reservations.insert(uid.clone(), reservation);
    uid
}

/// When decisions of tests are asked for that do not depend on the time.
pub const NOW: Timestamp = Timestamp(1_000);

/// What is decided about a reservation.
pub fn ask(view: &View, name: &str) -> Vec<Change> {
    crate::reservation::decide(view, &Uid::from(name), NOW)
}

/// What is said of it first.
pub fn told(view: &View, name: &str) -> ReservationReport {
    let changes = ask(view, name);
    match changes.first() {
        Some(Change::ReportReservation { report, .. }) => report.clone(),
        _ => panic!("no report: {changes:?}"),
    }
}
