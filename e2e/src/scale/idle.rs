//! What it costs when nothing happens, and how soon a silent node is noticed.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::ensure;
use tokio::time::sleep;

use super::Sizes;
use super::stage::Stage;
use super::throughput::count;
use super::writes::Writes;

/// This part of the reservations is there the first time.
const FEW_PART: usize = 10;
/// Nothing is waited for after this long.
const LIMIT: Duration = Duration::from_mins(3);

/// What a run showed.
#[derive(Debug)]
pub struct Idle {
    /// For each time: how many reservations were ready, and the API server's writes.
    pub times: [(usize, Writes); 2],
    /// How long each time was.
    pub quiet: Duration,
    /// From the last renewal of a node's Lease until the operator counted it as lost.
    pub lost_after: Duration,
    /// The most that was promised beyond a capacity. Unit: bytes.
    pub overcommitted: i64,
    /// The operator's resident memory with all of them, and the most so far. Unit: MiB.
    pub memory: (u64, u64),
}

impl Idle {
    /// All writes per second with everything there.
    pub fn per_second(&self) -> f64 {
        count(self.times[1].1.without(&[])) / self.quiet.as_secs_f64()
    }

    /// Writes each time that are not of Leases: nothing asks for any.
    pub fn beside_leases(&self) -> [u64; 2] {
        [0, 1].map(|time| self.times[time].1.without(&["leases"]))
    }
}

/// Some reservations made ready, then all; each time it is watched what is written while nothing happens.
///
/// # Errors
/// If something cannot be made, or does not come.
pub async fn idle(dir: &Path, sizes: &Sizes) -> anyhow::Result<Idle> {
    let stage = Stage::set(dir, sizes).await?;
    let few = sizes.reservations / FEW_PART;
    let mut times = Vec::with_capacity(2);
    for (from, to) in [(0, few), (few, sizes.reservations)] {
        stage.declare(from, to, sizes.pools, None).await?;
        stage.until("every promise", || stage.nodes.world().promised.len() >= to).await?;
        stage.nodes.prepare().await;
        stage.until("all of them to be ready", || stage.nodes.world().ready.len() >= to).await?;
        until_quiet(&stage).await?;
        let before = Writes::so_far(&stage.client).await?;
        sleep(sizes.quiet).await;
        times.push((to, Writes::so_far(&stage.client).await?.since(&before)));
        eprintln!("{to} ready; watched for {} s", sizes.quiet.as_secs());
    }
    let (few, all) = (times.remove(0), times.remove(0));
    let memory = stage.memory();
    let lost_after = lose_one(&stage).await?;
    let overcommitted = stage.nodes.world().overcommitted;
    stage.cluster.stop();
    Ok(Idle { times: [few, all], quiet: sizes.quiet, lost_after, overcommitted, memory })
}

/// Waits until nothing but Leases was written for a few seconds: nodes report late, and so do pools.
async fn until_quiet(stage: &Stage) -> anyhow::Result<()> {
    let deadline = Instant::now() + LIMIT;
    let mut before = Writes::so_far(&stage.client).await?;
    loop {
        sleep(Duration::from_secs(8)).await;
        let now = Writes::so_far(&stage.client).await?;
        if now.since(&before).without(&["leases"]) == 0 {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "it does not become quiet: {:?}", now.since(&before));
        before = now;
    }
}

/// How long it takes until a node that renews its Lease no more counts as lost.
async fn lose_one(stage: &Stage) -> anyhow::Result<Duration> {
    let node = stage.nodes.world().pools.keys().next().cloned().unwrap_or_default();
    stage.nodes.renew_all().await;
    stage.nodes.silence(&node);
    let start = Instant::now();
    let gone = format!("berth_node_ready{{node=\"{node}\"}} 0");
    while !stage.operator.metrics().await.lines().any(|line| line == gone) {
        ensure!(start.elapsed() < LIMIT, "{node} is not counted as lost");
        sleep(Duration::from_millis(100)).await;
    }
    Ok(start.elapsed())
}
