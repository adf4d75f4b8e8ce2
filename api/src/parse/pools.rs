//! `StagingPool` to its view.

use berth_core::ids::PoolName;
use berth_core::units::Bytes;
use berth_core::view::{PoolView, WhenFull};

use super::{InvalidField, bytes, name_of, seconds, uid_of};
use crate::StagingPool;
use crate::defaults::{MAX_QUEUE_SECONDS, MAX_QUEUED, RECLAIM_TTL_SECONDS};
use crate::fields;
use crate::staging_pool::StagingPoolSpec;

/// The smallest image that a filesystem pool may be: XFS refuses less than 300 MiB, and its log needs room.
const SMALLEST_AREA: Bytes = Bytes::mib(512);

/// What decisions look at.
pub fn pool_view(pool: &StagingPool) -> PoolView {
    let mut view = PoolView {
        name: PoolName(name_of(&pool.metadata).name),
        uid: uid_of(&pool.metadata),
        labels: pool.metadata.labels.clone().unwrap_or_default(),
        limit: None,
        when_full: WhenFull::Queue,
        max_queue_millis: MAX_QUEUE_SECONDS * 1000,
        max_queued: MAX_QUEUED,
        reclaim_ttl_millis: RECLAIM_TTL_SECONDS * 1000,
        deleting: pool.metadata.deletion_timestamp.is_some(),
        invalid: None,
    };
    if let Err(error) =
        read_policy(&pool.spec, &mut view).and_then(|()| filesystem_area(&pool.spec).map(drop))
    {
        view.invalid = Some(error.to_string());
    }
    view
}

fn read_policy(spec: &StagingPoolSpec, view: &mut PoolView) -> Result<(), InvalidField> {
    if let Some(limit) = &spec.capacity.limit {
        view.limit = Some(bytes("spec.capacity.limit", limit)?);
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
    if let Some(span) = &spec.reclaim.ttl {
        view.reclaim_ttl_millis = seconds("spec.reclaim.ttl", span)?.saturating_mul(1000);
    }
    Ok(())
}

/// The area of a filesystem pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilesystemArea {
    /// The directory on each node; absolute, without `.` and `..`.
    pub path: String,
    /// The size of the image that is preallocated there.
    pub size: Bytes,
}

/// What a pool is made of, for the node that makes it.
///
/// # Errors
/// [`InvalidField`] if the backend is none, the path is not absolute and plain, or the size is below 512 MiB.
pub fn filesystem_area(spec: &StagingPoolSpec) -> Result<FilesystemArea, InvalidField> {
    let Some(backend) = &spec.backend.filesystem else {
        return Err(InvalidField::Shape {
            field: "spec.backend",
            problem: "`filesystem` must be set".to_owned(),
        });
    };
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
        assert_eq!((plain.max_queue_millis, plain.reclaim_ttl_millis), (3_600_000, 3_600_000));
        let full = pool(
            "  backend: {filesystem: {path: /p, size: 512Mi}}\n  capacity: {limit: 100Mi}\n  admission: {whenFull: Reject, \
             maxQueueTime: 90s, maxQueued: 3}\n  reclaim: {ttl: 1m30s}\n",
        );
        let view = pool_view(&full);
        assert_eq!(
            (view.invalid, view.limit, view.when_full),
            (None, Some(Bytes::mib(100)), WhenFull::Reject)
        );
        assert_eq!((view.max_queue_millis, view.max_queued, view.reclaim_ttl_millis), (90_000, 3, 90_000));
        let area = filesystem_area(&full.spec).expect("valid");
        assert_eq!(area, FilesystemArea { path: "/p".to_owned(), size: Bytes::mib(512) });
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
            ("  backend: {}\n", "spec.backend: `filesystem` must be set"),
            (
                "  backend: {filesystem: {path: /p, size: 1Gi}}\n  admission: {maxQueueTime: 1d}\n",
                "spec.admission.maxQueueTime: `1d` is not a span of time such as `1h30m`",
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
