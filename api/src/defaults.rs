//! Names and defaults that users, charts and tests rely on.

/// The namespace that Berth keeps its own objects in.
pub const SYSTEM_NAMESPACE: &str = "berth-system";
/// The CSI driver's name.
pub const DRIVER: &str = "csi.berth.dev";
/// The topology key: a volume is reachable on the node with this value only.
pub const TOPOLOGY_KEY: &str = "topology.berth.dev/node";
/// The Lease that gates sweeps and reclaim.
pub const OPERATOR_LEASE: &str = "berth-operator";
/// The finalizer of a reservation or staged image whose bytes a node may still hold.
pub const RELEASE_FINALIZER: &str = "staging.berth.dev/release";
/// The finalizer of an import whose session a node may still hold.
pub const IMPORT_FINALIZER: &str = "staging.berth.dev/import";
/// The finalizer of a transfer whose traces a node may still hold.
pub const TRANSFER_FINALIZER: &str = "staging.berth.dev/transfer";
/// The finalizer of a pool that has ledgers.
pub const POOL_FINALIZER: &str = "staging.berth.dev/pool";
/// Annotation of a staged image whose template was deleted: it may go although no other copy is known.
pub const ANNOTATION_GIVEN_UP: &str = "staging.berth.dev/given-up";
/// Field manager of the operator's applies of `status.lastReclaim`.
pub const RECLAIM_MANAGER: &str = "berth-operator-reclaim";
/// Field manager of the operator's server-side applies.
pub const OPERATOR_MANAGER: &str = "berth-operator";
/// Label with the PVC's namespace on a CSI volume's reservation.
pub const LABEL_CLAIM_NAMESPACE: &str = "staging.berth.dev/claim-namespace";
/// Label with the PVC's name on a CSI volume's reservation.
pub const LABEL_CLAIM_NAME: &str = "staging.berth.dev/claim-name";
/// Annotation with the CSI volume name on its reservation.
pub const ANNOTATION_VOLUME_NAME: &str = "staging.berth.dev/volume-name";
/// Annotation with the `PersistentVolume` that was made of a CSI volume, on the reservation of that.
pub const ANNOTATION_PERSISTENT_VOLUME: &str = "staging.berth.dev/persistent-volume";

/// Annotation with the time, RFC 3339, at which a person last said that a reservation is still needed.
pub const ANNOTATION_RENEWED: &str = "staging.berth.dev/renewed-at";
/// With a new value, lets an import or a transfer that has failed be tried again, once.
pub const ANNOTATION_RETRY: &str = "staging.berth.dev/retry";
/// Annotation by which a person consents, with the value `true`, to losing a file that is in no object store yet.
pub const ANNOTATION_DISCARD: &str = "staging.berth.dev/discard-only-copy";
/// The nodes' label with their zone.
pub const LABEL_ZONE: &str = "topology.kubernetes.io/zone";

/// How often a node renews its Lease, in seconds.
pub const NODE_LEASE_RENEW_SECONDS: i32 = 15;
/// After how long without renewal a node counts as lost, in seconds.
pub const NODE_LEASE_DURATION_SECONDS: i32 = 40;
/// Default time an unreferenced staged image stays, in seconds.
pub const RECLAIM_TTL_SECONDS: u64 = 3600;
/// Default percentage of promised space above which unreferenced images go.
pub const HIGH_WATERMARK_PERCENT: u32 = 85;
/// Default percentage of promised space down to which they go.
pub const LOW_WATERMARK_PERCENT: u32 = 70;
/// Default time a reservation stays that nothing uses, in seconds.
pub const RESERVATION_TTL_SECONDS: u64 = 3600;
/// Default time a request may wait in the queue, in seconds.
pub const MAX_QUEUE_SECONDS: u64 = 3600;
/// Default number of requests that may wait for one pool.
pub const MAX_QUEUED: u32 = 1000;
/// Default time without a byte after which a source counts as stalled, in seconds.
pub const STALL_TIMEOUT_SECONDS: u64 = 60;
/// Default bound of an image's virtual size and of a source's bytes: 256 GiB.
pub const SIZE_LIMIT_BYTES: u64 = 256 << 30;
/// Default chunk size of an image store: 256 KiB.
pub const CHUNK_SIZE_BYTES: u64 = 256 << 10;
/// How often a fault that passes is tried again.
pub const RETRY_LIMIT: u32 = 10;
/// Share of an empty area that is kept back for its file system's metadata and for the record, in percent.
pub const HEADROOM_PERCENT: u8 = 5;

/// Field manager of a node agent's server-side applies.
pub fn node_manager(node: &str) -> String {
    format!("berth-node/{node}")
}
