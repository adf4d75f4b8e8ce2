//! What is promised, what is there, and what the kernel says: whether they agree.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_api::staging_ledger::{LedgerBytes, LedgerPromise, PromiseClass};
use berth_api::staging_node::{NodePool, ThinPool};
use berth_api::{StagingLedger, StagingNode};
use berth_e2e::csi::Volume;
use berth_e2e::site::Site;
use berth_e2e::wait::{self, Look};
use kube::api::ListParams;
use kube::{Api, Client};

use crate::remains::data_used;
use crate::scene::POOL;

/// How long the node's report may lag behind the kernel.
const REPORT_LIMIT: Duration = Duration::from_secs(30);

/// The unit of a pool of the device mapper. Unit: bytes.
const BLOCK: i64 = 64 << 10;

/// What the bytes that a pool uses are rounded up to, so that not every write is reported. Unit: bytes.
const USED_UNIT: i64 = 16 << 20;

/// With these volumes, and one image that they are of: each is promised its size, the classes and the whole are within the
/// ledger's capacity, and that is what the node reports; in a pool of the device mapper also as the kernel has it.
pub async fn balance(site: &Site, volumes: &[&Volume]) -> anyhow::Result<()> {
    let ledger = ledger(site).await?;
    let of = |class| ledger.spec.promises.values().filter(move |promise| promise.class == class);
    let mut promised: Vec<i64> = of(PromiseClass::Volumes).map(|promise| promise.data_bytes).collect();
    let mut sizes =
        volumes.iter().map(|volume| i64::try_from(volume.bytes)).collect::<Result<Vec<_>, _>>()?;
    promised.sort_unstable();
    sizes.sort_unstable();
    ensure!(promised == sizes, "promised {promised:?} for volumes of {sizes:?}");
    ensure!(of(PromiseClass::Images).count() == 1, "one image is staged: {:?}", ledger.spec.promises);

    let (images, volumes) = (sum(of(PromiseClass::Images)), sum(of(PromiseClass::Volumes)));
    let capacity = &ledger.spec.capacity;
    for (what, promised, capacity) in [
        ("images", images, &capacity.images),
        ("volumes", volumes, &capacity.volumes),
        ("all", sum(ledger.spec.promises.values()), &capacity.total),
    ] {
        let within = promised.0 <= capacity.data_bytes && promised.1 <= capacity.metadata_bytes;
        ensure!(within, "{promised:?} promised for {what}, of {capacity:?}");
    }
    let pool = pool(&site.client()).await?;
    ensure!(pool.total_bytes == capacity.total.data_bytes, "{} of {capacity:?}", pool.total_bytes);
    let Some(thin) = pool.thin else { return Ok(()) };
    for (what, promised, there, capacity) in [
        ("images", images, &thin.images, &capacity.images),
        ("volumes", volumes, &thin.volumes, &capacity.volumes),
    ] {
        kernel_pool(promised, there, capacity).with_context(|| format!("kernel pool {what}"))?;
    }
    ensure!(of(PromiseClass::Volumes).all(|promise| promise.metadata_bytes > 0), "metadata is promised too");
    as_the_kernel_says(site).await
}

/// A kernel pool has what is promised of its class, and no more of it is used.
fn kernel_pool(promised: (i64, i64), there: &ThinPool, capacity: &LedgerBytes) -> anyhow::Result<()> {
    ensure!(there.data_bytes >= promised.0, "{promised:?} promised, {there:?} there");
    ensure!(there.data_used_bytes > 0 && there.data_used_bytes <= promised.0, "{promised:?}, {there:?}");
    // 70 % of the metadata may be promised, and some of that is the kernel pool's own.
    let most = there.metadata_bytes / 10 * 7;
    ensure!(capacity.metadata_bytes > 0 && capacity.metadata_bytes <= most, "{capacity:?} of {there:?}");
    ensure!(there.metadata_used_bytes > 0 && there.metadata_used_bytes <= most, "{there:?}");
    Ok(())
}

/// The node reports of its kernel pools what the kernel says.
async fn as_the_kernel_says(site: &Site) -> anyhow::Result<()> {
    let client = site.client();
    wait::until("the node to report what its kernel says", REPORT_LIMIT, || async {
        let looked = async {
            let used = data_used(&site.nodes()[0])?;
            let mut used = used.into_iter().map(i64::try_from).collect::<Result<Vec<_>, _>>()?;
            let pool = pool(&client).await?;
            let thin = pool.thin.context("kernel pools")?;
            let mut told =
                [thin.images.data_used_bytes, thin.volumes.data_used_bytes].map(|used| used / BLOCK);
            used.sort_unstable();
            told.sort_unstable();
            let all = (told[0] + told[1]) * BLOCK;
            let all = pool.used_bytes % USED_UNIT == 0 && (0..USED_UNIT).contains(&(pool.used_bytes - all));
            anyhow::Ok((
                all && used == told,
                format!("{used:?} blocks used, {told:?} and {} bytes told", pool.used_bytes),
            ))
        };
        match looked.await {
            Ok((true, _)) => Look::Done(()),
            Ok((false, seen)) => Look::NotYet(seen),
            Err(error) => Look::Failed(std::io::Error::other(format!("{error:#}"))),
        }
    })
    .await?;
    Ok(())
}

fn sum<'a>(promises: impl Iterator<Item = &'a LedgerPromise>) -> (i64, i64) {
    promises.fold((0, 0), |(data, metadata), one| (data + one.data_bytes, metadata + one.metadata_bytes))
}

async fn ledger(site: &Site) -> anyhow::Result<StagingLedger> {
    let ledgers: Api<StagingLedger> = Api::all(site.client());
    let found = ledgers.list(&ListParams::default()).await?.items;
    ensure!(found.len() == 1, "{} ledgers", found.len());
    found.into_iter().next().context("one")
}

async fn pool(client: &Client) -> anyhow::Result<NodePool> {
    let nodes: Api<StagingNode> = Api::all(client.clone());
    let pools = nodes.list(&ListParams::default()).await?.items;
    let mut pools = pools.into_iter().flat_map(|node| node.status.unwrap_or_default().pools);
    pools.find(|pool| pool.name == POOL).context("no node reports the pool")
}
