//! What the operator's endpoint says of what was promised, refused, waited for and is used by nobody.

use std::time::{Duration, Instant};

use anyhow::ensure;
use berth_api::staging_reservation::ReservationState;
use kube::api::DeleteParams;
use serde_json::json;

use super::bed::{Bed, GIB};

/// How long somebody waits at least.
const WAIT: Duration = Duration::from_secs(4);

/// The labels of the pool, and of it on its node.
const POOL: &str = "pool=\"p\"";
const PLACE: &str = "pool=\"p\",node=\"n1\"";

/// Somebody holds, somebody waits, some are refused for different reasons, an image is there that nothing refers to: every metric
/// of that has its number, and follows when the one who waits is served.
pub(super) async fn counted() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.change_pool(json!({"reclaim": {"highWatermark": 100, "lowWatermark": 100}})).await?;
    bed.start_operator("one")?;
    let node = bed.node("n1", 10 * GIB).await?;
    bed.wait_samples("one", "berth_pool_total_bytes", &[(PLACE, 10 * GIB)]).await?;
    bed.wait_samples("one", "berth_refusals_total", &[]).await?;
    bed.wait_samples("one", "berth_queue_length", &[("", 0)]).await?;
    bed.wait_samples("one", "berth_pool_queue_length", &[(POOL, 0)]).await?;

    bed.idle_image("idle", GIB).await?;
    bed.wait_samples("one", "berth_pool_unreferenced_bytes", &[(POOL, GIB)]).await?;
    bed.wait_samples("one", "berth_pool_promised_bytes", &[(PLACE, GIB)]).await?;
    bed.reserve("held", 6 * GIB, "Queue").await?;
    bed.wait_state("held", ReservationState::Ready).await?;
    node.set_written(5 * GIB);
    bed.wait_samples("one", "berth_pool_promised_bytes", &[(PLACE, 7 * GIB)]).await?;
    bed.wait_samples("one", "berth_pool_used_bytes", &[(PLACE, 5 * GIB)]).await?;
    // The user of the image, and the holder: neither had to wait.
    bed.wait_samples("one", "berth_admissions_total", &[(POOL, 2)]).await?;
    let before = bed.metric("one", "berth_queue_wait_seconds_total").await?;

    for (name, size, when_full) in
        [("giant", 11 * GIB, "Queue"), ("titan", 12 * GIB, "Reject"), ("now", 5 * GIB, "Reject")]
    {
        bed.reserve(name, size, when_full).await?;
        bed.wait_state(name, ReservationState::Refused).await?;
    }
    let refusals = [("reason=\"CapacityRefused\"", 1), ("reason=\"LargerThanPool\"", 2)];
    bed.wait_samples("one", "berth_refusals_total", &refusals).await?;
    bed.wait_samples("one", "berth_queue_length", &[("", 0)]).await?;

    // More than is there even without the image, which stays for that reason.
    let begun = Instant::now();
    bed.reserve("waits", 6 * GIB, "Queue").await?;
    bed.wait_state("waits", ReservationState::Queued).await?;
    bed.wait_samples("one", "berth_queue_length", &[("", 1)]).await?;
    bed.wait_samples("one", "berth_pool_queue_length", &[(POOL, 1)]).await?;
    bed.wait_samples("one", "berth_pool_unreferenced_bytes", &[(POOL, GIB)]).await?;
    tokio::time::sleep(WAIT).await;
    bed.reservations().delete("held", &DeleteParams::default()).await?;
    bed.wait_state("waits", ReservationState::Ready).await?;
    let longest = begun.elapsed() + Duration::from_secs(1);

    bed.wait_samples("one", "berth_queue_length", &[("", 0)]).await?;
    bed.wait_samples("one", "berth_pool_queue_length", &[(POOL, 0)]).await?;
    bed.wait_samples("one", "berth_pool_promised_bytes", &[(PLACE, 7 * GIB)]).await?;
    bed.wait_samples("one", "berth_admissions_total", &[(POOL, 3)]).await?;
    bed.wait_samples("one", "berth_refusals_total", &refusals).await?;
    let waited = bed.samples("one", "berth_queue_wait_seconds_total").await?;
    let waited = Duration::from_secs(u64::try_from(waited.values().sum::<i64>() - before)?);
    ensure!((WAIT..=longest).contains(&waited), "told to have waited {waited:?}, of {longest:?} at most");
    bed.no_denials()
}
