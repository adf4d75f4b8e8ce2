//! The API server: objects with versions, and the writes that it takes or refuses. Naive on purpose.

use std::collections::{BTreeMap, BTreeSet};

use berth_core::change::{Change, ReservationReport};
use berth_core::ids::{Digest, Lineage, NodeName, ObjectName, PoolName, Sha256Sum, Uid, ledger_name};
use berth_core::ledger::Holder;
use berth_core::reason::Reason;
use berth_core::thin::{BlockSize, PoolMode, PoolState, ThinState, Usage};
use berth_core::units::{Bytes, Generation, Timestamp};
use berth_core::view::{
    DurableImage, ImageView, ImportState, ImportView, LedgerView, NodeLossPolicy, NodePoolState, NodeState,
    ObjectVersion, Placement, PoolChoice, PoolView, ReclaimPolicy, ReservationState, Service, Strategy, View,
    WhenFull,
};

/// A defect put in on purpose, to show that the model would find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    None,
    /// Ledgers are overwritten whatever version was seen.
    LedgerWithoutVersion,
    /// Placements are overwritten whatever version was seen.
    AssignWithoutVersion,
    /// States are overwritten whatever version was seen.
    ReportWithoutVersion,
    /// Operators believe that every node has given everything back.
    EarlyRelease,
    /// Promises are swept without asking whether their holders are gone.
    SweepWithoutAsking,
    /// Promises are swept at once, without waiting until their nodes know.
    SweepWithoutRevoking,
    /// Nodes do not say what their kernel pools have grown to.
    GrowthUntold,
}

/// Another writer was faster, or the object is gone: the list of changes ends.
#[derive(Debug)]
pub struct Conflict;

/// What happened, over many histories.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    pub histories: usize,
    pub operations: usize,
    pub conflicts: usize,
    pub crashes: usize,
    pub swept: usize,
    /// Reservations that went in spite of their finalizer, after they were assigned.
    pub slipped: usize,
    pub writes: BTreeMap<&'static str, usize>,
    pub transitions: BTreeSet<(ReservationState, ReservationState)>,
    pub reasons: BTreeSet<Reason>,
}

impl Coverage {
    pub fn add(&mut self, other: &Self) {
        self.histories += other.histories;
        self.operations += other.operations;
        self.conflicts += other.conflicts;
        self.crashes += other.crashes;
        self.swept += other.swept;
        self.slipped += other.slipped;
        for (name, count) in &other.writes {
            *self.writes.entry(name).or_default() += count;
        }
        self.transitions.extend(&other.transitions);
        self.reasons.extend(&other.reasons);
    }
}

pub const NODES: [&str; 3] = ["a", "b", "c"];
/// What sizes are counted in: much more than a block, so that all of them bound and are bounded.
pub const UNIT: u64 = 64 << 20;
pub const NODE_BYTES: u64 = 100 * UNIT;
/// Of each kernel pool's metadata device: enough for most of what its data can hold, but not for all.
const METADATA: Bytes = Bytes::kib(6500);

#[derive(Debug)]
pub struct World {
    /// The objects as they are.
    pub objects: View,
    pub now: Timestamp,
    pub sabotage: Sabotage,
    pub coverage: Coverage,
    /// Every placement that was ever given out.
    pub placements: BTreeMap<Uid, BTreeSet<Placement>>,
    reports: BTreeMap<Uid, ReservationReport>,
    counter: u64,
}

impl World {
    pub fn new(sabotage: Sabotage) -> Self {
        let mut objects = View::default();
        objects.pools.insert(PoolName::from("p"), pool("p", WhenFull::Queue));
        let thin = PoolView { block: Some(BlockSize::DEFAULT), ..pool("q", WhenFull::Reject) };
        objects.pools.insert(PoolName::from("q"), thin);
        for name in NODES {
            let pools = if name == "c" { vec!["q"] } else { vec!["p", "q"] };
            let pools = pools.into_iter().map(|pool| (PoolName::from(pool), report(pool == "q"))).collect();
            let node = NodeState {
                name: NodeName::from(name),
                version: ObjectVersion::default(),
                live: true,
                reported: true,
                silent: false,
                zone: None,
                pools,
            };
            objects.nodes.insert(node.name.clone(), node);
        }
        for (name, size) in [("one", 20 * UNIT), ("two", 35 * UNIT)] {
            let import = template(name, size);
            objects.imports.insert(import.name.clone(), import);
        }
        Self {
            objects,
            now: Timestamp(1_000_000),
            sabotage,
            coverage: Coverage { histories: 1, ..Coverage::default() },
            placements: BTreeMap::new(),
            reports: BTreeMap::new(),
            counter: 0,
        }
    }

    pub fn fresh(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    pub fn version(&mut self) -> ObjectVersion {
        ObjectVersion(self.fresh().to_string())
    }

    /// What `kubectl delete` does.
    pub fn delete_reservation(&mut self, uid: &Uid) {
        let version = self.version();
        let Some(reservation) = self.objects.reservations.get_mut(uid) else { return };
        reservation.deleting = true;
        reservation.version = version;
        if !reservation.has_finalizer {
            self.objects.reservations.remove(uid);
        }
    }

    /// A deletion that the API server began before the finalizer was added, and carries out only now.
    pub fn slip(&mut self, uid: &Uid) {
        let guarded = self.objects.reservations.get(uid).is_some_and(|r| r.has_finalizer && !r.deleting);
        if let Some(gone) = guarded.then(|| self.objects.reservations.remove(uid)).flatten() {
            self.coverage.slipped += usize::from(gone.assignment.is_some());
        }
    }

    /// Takes a change or refuses it; says whether anything was written.
    pub fn apply(&mut self, change: &Change) -> Result<bool, Conflict> {
        let result = self.take(change);
        match &result {
            Ok(true) => *self.coverage.writes.entry(kind(change)).or_default() += 1,
            Ok(false) => {}
            Err(Conflict) => self.coverage.conflicts += 1,
        }
        result
    }

    fn take(&mut self, change: &Change) -> Result<bool, Conflict> {
        match change {
            Change::CreateLedger { pool, node, capacity } => {
                let key = (pool.clone(), node.clone());
                if self.objects.ledgers.contains_key(&key) {
                    return Ok(false);
                }
                let ledger = LedgerView {
                    name: ledger_name(pool, node),
                    version: self.version(),
                    pool: pool.clone(),
                    node: node.clone(),
                    lineage: Lineage(format!("lineage-{}", self.counter)),
                    revision: 1,
                    rebuilt: None,
                    capacity: *capacity,
                    promises: BTreeMap::new(),
                };
                self.objects.ledgers.insert(key, ledger);
                Ok(true)
            }
            Change::WriteLedger { name, version, revision, capacity, promises } => {
                let next = self.version();
                let blind = self.sabotage == Sabotage::LedgerWithoutVersion;
                let ledger =
                    self.objects.ledgers.values_mut().find(|ledger| ledger.name == *name).ok_or(Conflict)?;
                if ledger.version != *version && !blind {
                    return Err(Conflict);
                }
                ledger.revision = if blind { ledger.revision + 1 } else { *revision };
                ledger.version = next;
                ledger.capacity = *capacity;
                ledger.promises.clone_from(promises);
                if self.sabotage == Sabotage::SweepWithoutRevoking {
                    ledger.promises.retain(|_, promise| promise.revoked.is_none());
                }
                Ok(true)
            }
            Change::ConfirmGone { holder, uid } => {
                let there = match holder {
                    Holder::Reservation(_) => self.objects.reservations.contains_key(uid),
                    Holder::Image(_) => self.objects.images.values().any(|image| image.uid == *uid),
                };
                if there && self.sabotage != Sabotage::SweepWithoutAsking {
                    return Err(Conflict);
                }
                self.coverage.swept += usize::from(!there);
                Ok(false)
            }
            Change::CreateImage { .. } | Change::DeleteImage { .. } | Change::UnguardImage { .. } => {
                Ok(self.take_image(change))
            }
            Change::ReportPool { .. } | Change::ReportReclaim { .. } | Change::RetryAfter { .. } => Ok(false),
            other => self.take_reservation(other),
        }
    }

    fn take_reservation(&mut self, change: &Change) -> Result<bool, Conflict> {
        let (next, now) = (self.version(), self.now);
        let by_name = |objects: &View, name: &ObjectName| {
            objects.reservations.values().find(|other| other.name == *name).map(|other| other.uid.clone())
        };
        match change {
            Change::GuardReservation { uid, .. } => {
                let object = self
                    .objects
                    .reservations
                    .get_mut(uid)
                    .filter(|object| !object.deleting)
                    .ok_or(Conflict)?;
                object.has_finalizer = true;
                object.version = next;
                Ok(true)
            }
            Change::UnguardReservation { uid, .. } => {
                let object = self.objects.reservations.get_mut(uid).ok_or(Conflict)?;
                object.has_finalizer = false;
                object.version = next;
                if object.deleting {
                    self.objects.reservations.remove(uid);
                }
                Ok(true)
            }
            Change::AssignReservation { name, version, placement, image, .. } => {
                let uid = by_name(&self.objects, name).ok_or(Conflict)?;
                let object = self.objects.reservations.get_mut(&uid).ok_or(Conflict)?;
                if object.version != *version && self.sabotage != Sabotage::AssignWithoutVersion {
                    return Err(Conflict);
                }
                object.assignment = Some(placement.clone());
                object.assigned_image.clone_from(image);
                object.version = next;
                self.placements.entry(uid).or_default().insert(placement.clone());
                Ok(true)
            }
            Change::ReportReservation { uid, version, report, .. } => {
                let object = self.objects.reservations.get_mut(uid).ok_or(Conflict)?;
                if object.version != *version && self.sabotage != Sabotage::ReportWithoutVersion {
                    return Err(Conflict);
                }
                if self.reports.get(uid) == Some(report) && object.state == report.state {
                    return Ok(false);
                }
                if object.state != report.state {
                    self.coverage.transitions.insert((object.state, report.state));
                }
                self.coverage.reasons.insert(report.reason);
                self.reports.insert(uid.clone(), report.clone());
                object.state = report.state;
                object.version = next;
                if report.state == ReservationState::Queued && object.queued_since.is_none() {
                    object.queued_since = Some(now);
                }
                Ok(true)
            }
            other => panic!("nothing here calls for {other:?}"),
        }
    }

    fn take_image(&mut self, change: &Change) -> bool {
        match change {
            Change::CreateImage { name, image, pool, node, .. } => {
                if self.objects.images.contains_key(name) {
                    return false;
                }
                let uid = Uid(format!("image-{}", self.fresh()));
                let staged = ImageView {
                    uid,
                    name: name.clone(),
                    created: self.now,
                    deleting: false,
                    has_finalizer: true,
                    digest: image.digest,
                    pool: pool.clone(),
                    node: node.clone(),
                    data_bytes: image.real_size,
                    virtual_size: image.virtual_size,
                    ready: false,
                    last_used: None,
                    given_up: false,
                };
                self.objects.images.insert(name.clone(), staged);
                true
            }
            Change::DeleteImage { name, uid } => match self.objects.images.get_mut(name) {
                Some(image) if image.uid == *uid && !image.deleting => {
                    image.deleting = true;
                    true
                }
                _ => false,
            },
            Change::UnguardImage { name, uid } => match self.objects.images.get(name) {
                Some(image) if image.uid == *uid && image.deleting => {
                    self.objects.images.remove(name).is_some()
                }
                _ => false,
            },
            _ => false,
        }
    }
}

fn kind(change: &Change) -> &'static str {
    match change {
        Change::CreateLedger { .. } => "CreateLedger",
        Change::WriteLedger { .. } => "WriteLedger",
        Change::GuardReservation { .. } => "GuardReservation",
        Change::UnguardReservation { .. } => "UnguardReservation",
        Change::AssignReservation { .. } => "AssignReservation",
        Change::ReportReservation { .. } => "ReportReservation",
        Change::CreateImage { .. } => "CreateImage",
        Change::DeleteImage { .. } => "DeleteImage",
        Change::UnguardImage { .. } => "UnguardImage",
        _ => "other",
    }
}

fn pool(name: &str, when_full: WhenFull) -> PoolView {
    PoolView {
        name: PoolName::from(name),
        uid: Uid(format!("pool-{name}")),
        labels: BTreeMap::new(),
        block: None,
        limit: None,
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

fn report(thin: bool) -> NodePoolState {
    NodePoolState {
        usable: true,
        reason: Reason::Ready,
        message: String::new(),
        total: Bytes(NODE_BYTES),
        used: Bytes::ZERO,
        advisory: false,
        thin: thin.then(|| grown([0, 0])),
        lineage: None,
        obeyed_revision: 0,
        released: BTreeMap::new(),
        obeyed: BTreeMap::new(),
        recorded: BTreeMap::new(),
        in_use: BTreeSet::new(),
    }
}

/// What a node says of kernel pools whose data has grown to this.
pub fn grown(data: [u64; 2]) -> ThinState {
    let [images, volumes] = data.map(|data| PoolState {
        mode: PoolMode::ReadWrite,
        needs_check: false,
        data: Usage { used: Bytes::ZERO, total: Bytes(data) },
        metadata: Usage { used: Bytes::ZERO, total: METADATA },
    });
    ThinState { images, volumes }
}

fn template(name: &str, size: u64) -> ImportView {
    ImportView {
        uid: Uid(format!("import-{name}")),
        name: ObjectName::new("ns", name),
        version: ObjectVersion::default(),
        created: Timestamp(0),
        deleting: false,
        has_finalizer: true,
        pools: PoolChoice::Labelled(BTreeMap::new()),
        store: ObjectName::new("ns", "store"),
        allowed_namespaces: Vec::new(),
        state: ImportState::Ready,
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
        invalid: None,
    }
}
