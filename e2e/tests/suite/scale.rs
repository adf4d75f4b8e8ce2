//! Short versions of B12 and B13: what holds at any speed.

use std::time::Duration;

use anyhow::ensure;
use berth_e2e::ours::OPERATOR;
use berth_e2e::scale::{self, Sizes};

use crate::scenario::{CONTROL_PLANE, Need, Scenario};

/// On two cores that are busy otherwise, with a development build.
const LIMIT: Duration = Duration::from_mins(10);
/// Writes of the operator for each reservation: its assignment, its share of the writes of ledgers, pools, events and the
/// operator's own Lease. Each on its own would be more than this, and so would a write of its finalizer.
const WRITES_EACH: f64 = 2.0;

pub fn scenarios() -> Vec<Scenario> {
    let needs = [CONTROL_PLANE, &[Need::Program(OPERATOR)]].concat();
    vec![
        Scenario::new("scale::reservations_share_writes_of_ledgers", &needs, shared_writes).limited(LIMIT),
        Scenario::new("scale::volumes_cost_nothing_when_nothing_happens", &needs, quiet).limited(LIMIT),
    ]
}

fn sizes(reservations: usize) -> anyhow::Result<Sizes> {
    let quiet = Duration::from_secs(20);
    Ok(Sizes { reservations, nodes: 24, pools: 4, quiet, operator: OPERATOR.obtain()?, guarded: true })
}

async fn shared_writes() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let found = scale::throughput(dir.path(), &sizes(600)?).await?;
    println!("{found:?}");
    ensure!(found.overcommitted <= 0, "{} bytes too much were promised", found.overcommitted);
    ensure!(
        found.writes.0.of("stagingreservations/status") == found.writes.1 as u64,
        "not one status write for each"
    );
    let guards = found.writes.0.of("stagingreservations");
    ensure!(guards == 0, "{guards} writes of finalizers, which the policy puts on");
    ensure!(found.writes_each() < WRITES_EACH, "{:.2} writes for each", found.writes_each());
    Ok(())
}

async fn quiet() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let found = scale::idle(dir.path(), &sizes(200)?).await?;
    println!("{found:?}");
    ensure!(found.overcommitted <= 0, "{} bytes too much were promised", found.overcommitted);
    ensure!(found.beside_leases() == [0, 0], "something was written: {:?}", found.times);
    Ok(())
}
