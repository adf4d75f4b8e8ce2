//! The objects that a world begins with.

use std::collections::{BTreeMap, BTreeSet};

use berth_core::ids::{Digest, NodeName, ObjectName, PoolName, Sha256Sum, Uid};
use berth_core::overcommit::Percent;
use berth_core::reason::Reason;
use berth_core::thin::{PoolMode, PoolState, ThinState, Usage};
use berth_core::transfer::TransferKind;
use berth_core::units::{Bytes, Generation, Timestamp};
use berth_core::view::{
    DurableImage, NodeLossPolicy, NodePoolState, ObjectVersion, Placement, PoolChoice, PoolView,
    ReclaimPolicy, Service, Strategy, TransferState, TransferView, WhenFull,
};

use super::{NODE_BYTES, metadata_device};

pub fn pool(name: &str, when_full: WhenFull) -> PoolView {
    PoolView {
        name: PoolName::from(name),
        uid: Uid(format!("pool-{name}")),
        labels: BTreeMap::new(),
        block: None,
        limit: None,
        overcommit: Percent::WHOLE,
        when_full,
        max_queue_millis: 3_600_000,
        max_queued: 3,
        strategy: Strategy::default(),
        tenant_limits: Vec::new(),
        reclaim: ReclaimPolicy { ttl_millis: 60_000, ..ReclaimPolicy::default() },
        node_loss: NodeLossPolicy::default(),
        service: Service::default(),
        drain_nodes: BTreeSet::new(),
        deleting: false,
        has_finalizer: true,
        invalid: None,
    }
}

/// What a node says of a new pool; where it is of kernel pools, volumes are promised so many percent.
pub fn report(thin: Option<u64>) -> NodePoolState {
    NodePoolState {
        usable: true,
        reason: Reason::Ready,
        message: String::new(),
        total: Bytes(NODE_BYTES),
        used: Bytes::ZERO,
        advisory: false,
        thin: thin.map(|percent| grown([0, 0], percent)),
        lineage: None,
        obeyed_revision: 0,
        released: BTreeMap::new(),
        obeyed: BTreeMap::new(),
        recorded: BTreeMap::new(),
        in_use: BTreeSet::new(),
    }
}

/// What a node says of kernel pools whose data has grown to this.
pub fn grown(data: [u64; 2], percent: u64) -> ThinState {
    let [images, volumes] = data.map(|data| PoolState {
        mode: PoolMode::ReadWrite,
        needs_check: false,
        data: Usage { used: Bytes::ZERO, total: Bytes(data) },
        metadata: Usage { used: Bytes::ZERO, total: metadata_device(percent) },
    });
    ThinState { images, volumes }
}

pub fn template(name: &str, size: u64) -> TransferView {
    TransferView {
        kind: TransferKind::Import,
        uid: Uid(format!("import-{name}")),
        name: ObjectName::new("ns", name),
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
        allowed_namespaces: vec!["*".to_owned()],
        state: TransferState::Done,
        assignment: Some(Placement {
            pool: PoolName::from("p"),
            node: NodeName::from("a"),
            generation: Generation::FIRST,
        }),
        peak: None,
        durable: Some(DurableImage {
            digest: Digest(Sha256Sum::of(name.as_bytes())),
            virtual_size: Bytes(size),
            real_size: Bytes(size),
        }),
        error: None,
        released: None,
        retry: None,
        invalid: None,
    }
}
