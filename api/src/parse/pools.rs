//! `StagingPool` to its view.

use berth_core::ids::{NodeName, PoolName};
use berth_core::overcommit::Percent;
use berth_core::thin::BlockSize;
use berth_core::units::Bytes;
use berth_core::view::{NodeLossPolicy, PoolView, ReclaimPolicy, Service, Strategy, TenantLimit, WhenFull};

use super::{InvalidField, bytes, name_of, seconds, uid_of};
use crate::StagingPool;
use crate::defaults::{
    HIGH_WATERMARK_PERCENT, LOW_WATERMARK_PERCENT, MAX_QUEUE_SECONDS, MAX_QUEUED, POOL_FINALIZER,
    RECLAIM_TTL_SECONDS,
};
use crate::fields::{self, Span};
use crate::staging_pool::{
    DmThinBackend, FilesystemBackend, NodeLossPolicy as ApiNodeLossPolicy, Ownership,
    ReclaimPolicy as ApiReclaimPolicy, Service as ApiService, StagingPoolSpec, Strategy as ApiStrategy,
    TenantLimit as ApiTenantLimit,
};

/// The smallest image that a filesystem pool may be: XFS refuses less than 300 MiB, and its log needs room.
const SMALLEST_AREA: Bytes = Bytes::mib(512);
/// The least of a volume group that a pool is made in.
const SMALLEST_THIN_AREA: Bytes = Bytes::gib(1);
/// The largest blocks of a kernel pool that may be asked for.
const LARGEST_BLOCK: Bytes = Bytes::mib(1);

/// How far volumes may be promised beyond what is there.
const OVERCOMMIT: &str = "spec.capacity.volumeOvercommitPercent";

/// What decisions look at.
pub fn pool_view(pool: &StagingPool) -> PoolView {
    let mut view = PoolView {
        name: PoolName(name_of(&pool.metadata).name),
        uid: uid_of(&pool.metadata),
        labels: pool.metadata.labels.clone().unwrap_or_default(),
        block: None,
        limit: None,
        overcommit: Percent::WHOLE,
        when_full: WhenFull::Queue,
        max_queue_millis: MAX_QUEUE_SECONDS * 1000,
        max_queued: MAX_QUEUED,
        strategy: Strategy::default(),
        tenant_limits: Vec::new(),
        reclaim: ReclaimPolicy {
            ttl_millis: RECLAIM_TTL_SECONDS * 1000,
            keep_warm_millis: 0,
            high_percent: HIGH_WATERMARK_PERCENT,
            low_percent: LOW_WATERMARK_PERCENT,
        },
        node_loss: node_loss(pool.spec.node_loss_policy),
        service: service(pool.spec.service),
        drain_nodes: pool.spec.drain_nodes.iter().cloned().map(NodeName).collect(),
        deleting: pool.metadata.deletion_timestamp.is_some(),
        has_finalizer: pool.metadata.finalizers.iter().flatten().any(|other| other == POOL_FINALIZER),
        invalid: None,
    };
    match read_policy(&pool.spec, &mut view).and_then(|()| pool_area(&pool.spec)) {
        Ok(PoolArea::Filesystem(_)) => view.invalid = overcommitted(view.overcommit),
        Ok(PoolArea::Thin(area)) => view.block = Some(area.block),
        Err(error) => view.invalid = Some(error.to_string()),
    }
    view
}

/// What is wrong with a pool that overcommits volumes and has no kernel pool of their own.
fn overcommitted(percent: Percent) -> Option<String> {
    let wrong = InvalidField::Range {
        field: OVERCOMMIT,
        value: percent.get().to_string(),
        allowed:
            "100 without `dmThin`: in a `filesystem` pool volumes and staged images share one file system"
                .to_owned(),
    };
    (percent > Percent::WHOLE).then(|| wrong.to_string())
}

fn read_policy(spec: &StagingPoolSpec, view: &mut PoolView) -> Result<(), InvalidField> {
    if let Some(limit) = &spec.capacity.limit {
        view.limit = Some(bytes("spec.capacity.limit", limit)?);
    }
    if let Some(percent) = spec.capacity.volume_overcommit_percent {
        let least = Percent::WHOLE.get();
        view.overcommit = in_range(OVERCOMMIT, percent, least..=Percent::MOST).map(Percent::from)?;
    }
    if let Some(when_full) = spec.admission.when_full {
        view.when_full = self::when_full(when_full);
    }
    if let Some(span) = &spec.admission.max_queue_time {
        view.max_queue_millis = seconds("spec.admission.maxQueueTime", span)?.saturating_mul(1000);
    }
    if let Some(count) = spec.admission.max_queued {
        view.max_queued = u32::try_from(count).map_err(|_| InvalidField::Range {
            field: "spec.admission.maxQueued",
            value: count.to_string(),
            allowed: "0 or more".to_owned(),
        })?;
    }
    if let Some(strategy) = spec.admission.strategy {
        view.strategy = self::strategy(strategy);
    }
    view.tenant_limits = spec.admission.tenant_limits.iter().map(tenant_limit).collect::<Result<_, _>>()?;
    view.reclaim = reclaim(&spec.reclaim, view.reclaim)?;
    Ok(())
}

/// `defaults` with what `spec` says otherwise.
fn reclaim(spec: &ApiReclaimPolicy, defaults: ReclaimPolicy) -> Result<ReclaimPolicy, InvalidField> {
    let millis = |field, span: &Option<Span>, default| match span {
        Some(span) => seconds(field, span).map(|seconds| seconds.saturating_mul(1000)),
        None => Ok(default),
    };
    let percent = |field, value: Option<i32>, default| match value {
        Some(value) => in_range(field, value, 0..=100),
        None => Ok(default),
    };
    let policy = ReclaimPolicy {
        ttl_millis: millis("spec.reclaim.ttl", &spec.ttl, defaults.ttl_millis)?,
        keep_warm_millis: millis("spec.reclaim.keepWarm", &spec.keep_warm, defaults.keep_warm_millis)?,
        high_percent: percent("spec.reclaim.highWatermark", spec.high_watermark, defaults.high_percent)?,
        low_percent: percent("spec.reclaim.lowWatermark", spec.low_watermark, defaults.low_percent)?,
    };
    if policy.low_percent > policy.high_percent {
        return Err(InvalidField::Range {
            field: "spec.reclaim.lowWatermark",
            value: policy.low_percent.to_string(),
            allowed: format!("at most the high watermark, {}", policy.high_percent),
        });
    }
    Ok(policy)
}

fn tenant_limit(limit: &ApiTenantLimit) -> Result<TenantLimit, InvalidField> {
    let field = "spec.admission.tenantLimits[].maxReservations";
    Ok(TenantLimit {
        namespaces: limit.namespace_labels.clone(),
        bytes: limit
            .max_bytes
            .as_ref()
            .map(|most| bytes("spec.admission.tenantLimits[].maxBytes", most))
            .transpose()?,
        reservations: limit.max_reservations.map(|count| in_range(field, count, 0..=100_000)).transpose()?,
    })
}

/// The value of a field that must be in a range.
fn in_range(
    field: &'static str,
    value: i32,
    allowed: std::ops::RangeInclusive<u32>,
) -> Result<u32, InvalidField> {
    u32::try_from(value).ok().filter(|value| allowed.contains(value)).ok_or_else(|| InvalidField::Range {
        field,
        value: value.to_string(),
        allowed: format!("from {} to {}", allowed.start(), allowed.end()),
    })
}

const fn strategy(strategy: ApiStrategy) -> Strategy {
    match strategy {
        ApiStrategy::FirstFit => Strategy::FirstFit,
        ApiStrategy::MostFree => Strategy::MostFree,
        ApiStrategy::PreferPresent => Strategy::PreferPresent,
    }
}

const fn node_loss(policy: Option<ApiNodeLossPolicy>) -> NodeLossPolicy {
    match policy {
        None | Some(ApiNodeLossPolicy::Retain) => NodeLossPolicy::Retain,
        Some(ApiNodeLossPolicy::Release) => NodeLossPolicy::Release,
    }
}

const fn service(service: Option<ApiService>) -> Service {
    match service {
        None | Some(ApiService::Open) => Service::Open,
        Some(ApiService::Cordoned) => Service::Cordoned,
        Some(ApiService::Draining) => Service::Draining,
    }
}

/// The area of a filesystem pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilesystemArea {
    /// The directory on each node; absolute, without `.` and `..`.
    pub path: String,
    /// The size of the image that is preallocated there.
    pub size: Bytes,
}

/// The area of a pool that is made of kernel pools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThinArea {
    /// What its volumes lie in.
    pub group: ThinGroup,
    /// The size of the kernel pools' blocks.
    pub block: BlockSize,
}

/// The volume group of a pool that is made of kernel pools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ThinGroup {
    /// One that is made on these devices, which the pool has to itself.
    Exclusive {
        /// Their paths below `/dev`, sorted.
        devices: Vec<String>,
        /// Consent to destroy what they bear signatures of.
        wipe: bool,
    },
    /// One that others use too.
    Shared {
        /// Its name.
        name: String,
        /// How much of it the pool takes.
        size: Bytes,
    },
}

/// What a pool is made of, for the node that makes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PoolArea {
    /// A directory.
    Filesystem(FilesystemArea),
    /// Two kernel pools.
    Thin(ThinArea),
}

/// What a pool is made of, for the node that makes it.
///
/// # Errors
/// [`InvalidField`] if it is not exactly one backend, or a field of that cannot be used.
pub fn pool_area(spec: &StagingPoolSpec) -> Result<PoolArea, InvalidField> {
    match (&spec.backend.filesystem, &spec.backend.dm_thin) {
        (Some(backend), None) => filesystem_area(backend).map(PoolArea::Filesystem),
        (None, Some(backend)) => thin_area(backend).map(PoolArea::Thin),
        _ => Err(InvalidField::Shape {
            field: "spec.backend",
            problem: "exactly one of `filesystem` and `dmThin` must be set".to_owned(),
        }),
    }
}

fn filesystem_area(backend: &FilesystemBackend) -> Result<FilesystemArea, InvalidField> {
    let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
    let parts = backend.path.strip_prefix('/').map(|path| path.split('/').all(plain));
    if parts != Some(true) {
        return Err(InvalidField::Range {
            field: "spec.backend.filesystem.path",
            value: backend.path.clone(),
            allowed: "an absolute path without empty parts, `.` and `..`".to_owned(),
        });
    }
    let field = "spec.backend.filesystem.size";
    let size = bytes(field, &backend.size)?;
    if size < SMALLEST_AREA {
        let allowed = format!("at least {SMALLEST_AREA}");
        return Err(InvalidField::Range { field, value: backend.size.0.clone(), allowed });
    }
    Ok(FilesystemArea { path: backend.path.clone(), size })
}

fn thin_area(backend: &DmThinBackend) -> Result<ThinArea, InvalidField> {
    let block = match &backend.chunk_size {
        None => BlockSize::DEFAULT,
        Some(size) => {
            let field = "spec.backend.dmThin.chunkSize";
            let allowed = |bytes: &Bytes| bytes.0.is_power_of_two() && *bytes <= LARGEST_BLOCK;
            let bytes = Some(bytes(field, size)?).filter(allowed);
            bytes.and_then(|bytes| BlockSize::new(bytes).ok()).ok_or_else(|| InvalidField::Range {
                field,
                value: size.0.clone(),
                allowed: "a power of two from 64Ki to 1Mi".to_owned(),
            })?
        }
    };
    Ok(ThinArea { group: thin_group(backend)?, block })
}

fn thin_group(backend: &DmThinBackend) -> Result<ThinGroup, InvalidField> {
    match (backend.ownership, &backend.devices[..], &backend.volume_group, &backend.size) {
        (Ownership::Exclusive, [_, ..], None, None) => {
            let mut devices = backend.devices.clone();
            devices.sort();
            devices.iter().try_for_each(|device| plain_device(device))?;
            Ok(ThinGroup::Exclusive { devices, wipe: backend.wipe })
        }
        (Ownership::Shared, [], Some(name), Some(size)) => {
            let field = "spec.backend.dmThin.size";
            let taken = bytes(field, size)?;
            if taken < SMALLEST_THIN_AREA {
                let allowed = format!("at least {SMALLEST_THIN_AREA}");
                return Err(InvalidField::Range { field, value: size.0.clone(), allowed });
            }
            Ok(ThinGroup::Shared { name: name.clone(), size: taken })
        }
        _ => Err(InvalidField::Shape {
            field: "spec.backend.dmThin",
            problem: "either `devices` with `ownership: Exclusive`, or `volumeGroup` and `size` with `ownership: Shared`"
                .to_owned(),
        }),
    }
}

fn plain_device(device: &str) -> Result<(), InvalidField> {
    let plain = |part: &str| !part.is_empty() && !part.starts_with('.');
    let parts = device.strip_prefix("/dev/").map(|path| path.split('/').all(plain));
    if parts == Some(true) {
        return Ok(());
    }
    Err(InvalidField::Range {
        field: "spec.backend.dmThin.devices",
        value: device.to_owned(),
        allowed: "a path below /dev without empty parts, `.` and `..`".to_owned(),
    })
}

pub(super) const fn when_full(when_full: fields::WhenFull) -> WhenFull {
    match when_full {
        fields::WhenFull::Queue => WhenFull::Queue,
        fields::WhenFull::Reject => WhenFull::Reject,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(yaml: &str) -> StagingPool {
        let head = "apiVersion: staging.berth.dev/v1alpha1\nkind: StagingPool\nmetadata: {name: fast, uid: u1, labels: {tier: nvme}}\n";
        serde_saphyr::from_str(&format!("{head}spec:\n{yaml}")).expect("readable")
    }

    #[test]
    fn defaults_and_every_field() {
        let plain = pool_view(&pool("  backend: {filesystem: {path: /var/lib/berth/fast, size: 1Gi}}\n"));
        assert_eq!(plain.invalid, None);
        assert_eq!(
            (plain.name.as_str(), plain.uid.as_str(), plain.labels["tier"].as_str()),
            ("fast", "u1", "nvme")
        );
        assert_eq!((plain.limit, plain.when_full, plain.max_queued), (None, WhenFull::Queue, 1000));
        assert_eq!((plain.max_queue_millis, plain.reclaim.ttl_millis), (3_600_000, 3_600_000));
        let full = pool(
            "  backend: {filesystem: {path: /p, size: 512Mi}}\n  capacity: {limit: 100Mi}\n  admission: {whenFull: Reject, \
             maxQueueTime: 90s, maxQueued: 3}\n  reclaim: {ttl: 1m30s}\n",
        );
        let view = pool_view(&full);
        assert_eq!(
            (view.invalid, view.limit, view.when_full),
            (None, Some(Bytes::mib(100)), WhenFull::Reject)
        );
        assert_eq!((view.max_queue_millis, view.max_queued, view.reclaim.ttl_millis), (90_000, 3, 90_000));
        let area = pool_area(&full.spec).expect("valid");
        let wanted = FilesystemArea { path: "/p".to_owned(), size: Bytes::mib(512) };
        assert_eq!((area, view.block), (PoolArea::Filesystem(wanted), None));
    }

    #[test]
    fn a46_every_pool_is_bounded_by_size_and_time_whether_it_says_so_or_not() {
        let head = "apiVersion: staging.berth.dev/v1alpha1\nkind: StagingPool\nmetadata: {name: fast}\n";
        for backend in ["{filesystem: {path: /p}}", "{dmThin: {ownership: Shared, volumeGroup: vg}}"] {
            let yaml = format!("{head}spec: {{backend: {backend}}}\n");
            let bounded = serde_saphyr::from_str::<StagingPool>(&yaml);
            assert!(bounded.map_or(true, |pool| pool_view(&pool).invalid.is_some()), "no size: {backend}");
        }
        let plain = pool_view(&pool("  backend: {filesystem: {path: /p, size: 1Gi}}\n"));
        let hour = 3_600_000;
        assert_eq!((plain.reclaim.ttl_millis, plain.max_queue_millis, plain.max_queued), (hour, hour, 1000));
    }

    #[test]
    fn a_pool_of_kernel_pools() {
        let own = pool("  backend: {dmThin: {devices: [/dev/sdc, /dev/disk/by-id/x.1:2], wipe: true}}\n");
        let devices = vec!["/dev/disk/by-id/x.1:2".to_owned(), "/dev/sdc".to_owned()];
        let group = ThinGroup::Exclusive { devices, wipe: true };
        let area = PoolArea::Thin(ThinArea { group, block: BlockSize::DEFAULT });
        let over =
            pool("  backend: {dmThin: {devices: [/dev/sdb]}}\n  capacity: {volumeOvercommitPercent: 300}\n");
        assert_eq!((pool_view(&over).overcommit.get(), pool_view(&over).invalid), (300, None));
        assert_eq!(pool_area(&own.spec), Ok(area));
        assert_eq!((pool_view(&own).block, pool_view(&own).invalid), (Some(BlockSize::DEFAULT), None));
        let shared =
            "  backend: {dmThin: {ownership: Shared, volumeGroup: vg, size: 100Gi, chunkSize: 256Ki}}\n";
        let Ok(PoolArea::Thin(ThinArea { group, block })) = pool_area(&pool(shared).spec) else {
            panic!("a thin area");
        };
        assert_eq!(group, ThinGroup::Shared { name: "vg".to_owned(), size: Bytes::gib(100) });
        assert_eq!(block.bytes(), Bytes::kib(256));
    }

    #[test]
    fn messages_name_field_and_value() {
        for (yaml, message) in [
            (
                "  backend: {filesystem: {path: /p, size: 511Mi}}\n",
                "spec.backend.filesystem.size: `511Mi` must be at least 512 MiB",
            ),
            (
                "  backend: {filesystem: {path: /p, size: much}}\n",
                "spec.backend.filesystem.size: `much` is not a quantity of bytes such as `10Gi`",
            ),
            (
                "  backend: {filesystem: {path: /p/../etc, size: 1Gi}}\n",
                "spec.backend.filesystem.path: `/p/../etc` must be an absolute path without empty parts, `.` and `..`",
            ),
            ("  backend: {}\n", "spec.backend: exactly one of `filesystem` and `dmThin` must be set"),
            (
                "  backend: {filesystem: {path: /p, size: 1Gi}, dmThin: {devices: [/dev/sdb]}}\n",
                "spec.backend: exactly one of `filesystem` and `dmThin` must be set",
            ),
            (
                "  backend: {dmThin: {devices: [/dev/../etc/passwd]}}\n",
                "spec.backend.dmThin.devices: `/dev/../etc/passwd` must be a path below /dev without empty parts, `.` and `..`",
            ),
            (
                "  backend: {dmThin: {devices: [/dev/sdb], chunkSize: 96Ki}}\n",
                "spec.backend.dmThin.chunkSize: `96Ki` must be a power of two from 64Ki to 1Mi",
            ),
            (
                "  backend: {dmThin: {ownership: Shared, volumeGroup: vg, size: 1023Mi}}\n",
                "spec.backend.dmThin.size: `1023Mi` must be at least 1 GiB",
            ),
            (
                "  backend: {dmThin: {volumeGroup: vg, size: 10Gi}}\n",
                "spec.backend.dmThin: either `devices` with `ownership: Exclusive`, or `volumeGroup` and `size` with `ownership: Shared`",
            ),
            (
                "  backend: {filesystem: {path: /p, size: 1Gi}}\n  admission: {maxQueueTime: 1d}\n",
                "spec.admission.maxQueueTime: `1d` is not a span of time such as `1h30m`",
            ),
            (
                "  backend: {filesystem: {path: /p, size: 1Gi}}\n  capacity: {volumeOvercommitPercent: 101}\n",
                "spec.capacity.volumeOvercommitPercent: `101` must be 100 without `dmThin`: in a `filesystem` pool volumes and staged images share one file system",
            ),
            (
                "  backend: {dmThin: {devices: [/dev/sdb]}}\n  capacity: {volumeOvercommitPercent: 1001}\n",
                "spec.capacity.volumeOvercommitPercent: `1001` must be from 100 to 1000",
            ),
            (
                "  backend: {filesystem: {path: /p, size: 1Gi}}\n  admission: {maxQueued: -1}\n",
                "spec.admission.maxQueued: `-1` must be 0 or more",
            ),
        ] {
            assert_eq!(pool_view(&pool(yaml)).invalid.as_deref(), Some(message));
        }
    }
}
