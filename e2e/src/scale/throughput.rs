//! How fast reservations are promised: everything at once, and one after the other.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::time::sleep;

use super::Sizes;
use super::seen::percentile;
use super::stage::Stage;
use super::writes::Writes;

/// One paced reservation for so many that were declared at once.
const PACED_PART: usize = 10;
/// How many are declared per second when they come one after the other: more than external-provisioner asks for at its best.
const PACE: f64 = 20.0;
/// How long writes may still follow after the last promise: what nodes report, what is told of pools.
const AFTER: Duration = Duration::from_secs(6);

/// What a run showed.
#[derive(Debug)]
pub struct Throughput {
    /// Bare status patches per second, before and after.
    pub yardstick: [f64; 2],
    /// Reservations declared before the operator's start, per second from the first promise to the last.
    pub rate: f64,
    /// From the operator's start to the first promise.
    pub first_promise: Duration,
    /// The API server's writes meanwhile, and for how many reservations.
    pub writes: (Writes, usize),
    /// From declared to reserved, paced: how many per second, the median, and what 99 % stay below.
    pub paced: (f64, Duration, Duration),
    /// The most that was promised beyond a capacity. Unit: bytes.
    pub overcommitted: i64,
    /// The operator's resident memory with all of them, and the most so far. Unit: MiB.
    pub memory: (u64, u64),
    /// From a start of the operator with all of them until it has seen everything.
    pub restart: Duration,
}

impl Throughput {
    /// Reservations per second as a share of bare status patches.
    pub fn ratio(&self) -> f64 {
        self.rate / f64::midpoint(self.yardstick[0], self.yardstick[1])
    }

    /// Writes of the operator for each reservation: nodes' reports and Leases are not the operator's.
    pub fn writes_each(&self) -> f64 {
        count(self.writes.0.without(&["leases", "stagingnodes", "stagingnodes/status"]))
            / count(self.writes.1 as u64)
    }
}

/// For ratios only.
#[allow(clippy::cast_precision_loss)]
pub(super) const fn count(number: u64) -> f64 {
    number as f64
}

/// Declares everything while no operator runs, and starts one; then declares some more at a steady pace.
///
/// # Errors
/// If something cannot be made, or does not come.
pub async fn throughput(dir: &Path, sizes: &Sizes) -> anyhow::Result<Throughput> {
    let mut stage = Stage::set(dir, sizes).await?;
    stage.operator.kill().await;
    // What is paced later counts among them: everything fits.
    let paced = sizes.reservations / PACED_PART;
    let at_once = sizes.reservations - paced;
    stage.declare(0, at_once, sizes.pools, None).await?;
    eprintln!("{at_once} reservations declared");
    let patches = sizes.reservations.clamp(500, 4000);
    let before = stage.yardstick(patches).await?;
    eprintln!("{before:.0} bare status patches per second");
    let writes = Writes::so_far(&stage.client).await?;
    let start = Instant::now();
    stage.operator.restart()?;
    stage.operator.wait_ready().await?;
    stage.nodes.renew_all().await;
    stage.until("every promise", || stage.nodes.world().promised.len() >= at_once).await?;
    let (first, last) = first_and_last(&stage).context("nothing was promised")?;
    let rate = count(at_once as u64) / last.duration_since(first).as_secs_f64();
    eprintln!("{rate:.0} reservations per second");
    sleep(AFTER).await;
    let writes = Writes::so_far(&stage.client).await?.since(&writes);
    let paced = one_by_one(&stage, sizes, at_once).await?;
    sleep(AFTER).await;
    let memory = stage.memory();
    stage.operator.kill().await;
    let after = stage.yardstick(patches).await?;
    let restarted = Instant::now();
    stage.operator.restart()?;
    stage.operator.wait_ready().await?;
    let restart = restarted.elapsed();
    let overcommitted = stage.nodes.world().overcommitted;
    stage.cluster.stop();
    Ok(Throughput {
        yardstick: [before, after],
        rate,
        first_promise: first.duration_since(start),
        writes: (writes, at_once),
        paced,
        overcommitted,
        memory,
        restart,
    })
}

fn first_and_last(stage: &Stage) -> Option<(Instant, Instant)> {
    let world = stage.nodes.world();
    Some((*world.promised.values().min()?, *world.promised.values().max()?))
}

/// Declares the rest at a steady pace; how long each took.
async fn one_by_one(stage: &Stage, sizes: &Sizes, from: usize) -> anyhow::Result<(f64, Duration, Duration)> {
    let declared = stage.declare(from, sizes.reservations, sizes.pools, Some(PACE)).await?;
    stage.until("the paced promises", || stage.nodes.world().promised.len() >= sizes.reservations).await?;
    let world = stage.nodes.world();
    let times = declared.iter().filter_map(|(name, at)| Some(world.promised.get(name)?.duration_since(*at)));
    let times: Vec<Duration> = times.collect();
    Ok((PACE, percentile(times.clone(), 50), percentile(times, 99)))
}
