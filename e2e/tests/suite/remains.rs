//! What a site may still have once everything was taken back: nothing, down to the kernel of its node.

use std::time::Duration;

use anyhow::ensure;
use berth_api::{StagedImage, StagingLedger, StagingReservation, TemplateImport};
use berth_e2e::leaks;
use berth_e2e::site::{NodeKind, Site, SiteNode};
use berth_e2e::wait::{self, Look};
use kube::Api;
use kube::api::ListParams;

use crate::scene::POOL;

/// How long a release may take.
const RELEASE_LIMIT: Duration = Duration::from_secs(60);

/// Waits until there is no import, staged image, reservation and promise; then the node must have nothing but an empty pool.
pub async fn nothing_remains(site: &Site) -> anyhow::Result<()> {
    no_object_remains(site).await?;
    let node = &site.nodes()[0];
    let pool = node.pool_root(POOL);
    for part in ["volumes", "images", "staging"] {
        let left = node.names(&pool.join(part))?;
        ensure!(left.is_empty(), "left in {part}: {left:?}");
    }
    let mounts = node.mounts()?;
    ensure!(mounts == [pool], "mounts: {mounts:?}");
    match site.kind() {
        NodeKind::Namespace => {
            let loops = leaks::loops_below(site.dir());
            ensure!(loops.len() == 1, "loop devices: {loops:?}");
            Ok(())
        }
        NodeKind::Kernel => no_device_remains(node),
    }
}

async fn no_object_remains(site: &Site) -> anyhow::Result<()> {
    let client = site.client();
    let images: Api<StagedImage> = Api::all(client.clone());
    let imports: Api<TemplateImport> = Api::all(client.clone());
    let reservations: Api<StagingReservation> = Api::all(client.clone());
    let ledgers: Api<StagingLedger> = Api::all(client);
    let everything = ListParams::default();
    wait::until("every object and promise to be gone", RELEASE_LIMIT, || async {
        let counted = async {
            let promises: usize =
                ledgers.list(&everything).await?.items.iter().map(|ledger| ledger.spec.promises.len()).sum();
            let objects = images.list(&everything).await?.items.len()
                + imports.list(&everything).await?.items.len()
                + reservations.list(&everything).await?.items.len();
            Ok::<_, kube::Error>((promises, objects))
        };
        match counted.await {
            Ok((0, 0)) => Look::Done(()),
            Ok((promises, objects)) => Look::NotYet(format!("{promises} promises, {objects} objects")),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    Ok(())
}

/// No thin device, no block used in a kernel pool, no loop device.
fn no_device_remains(node: &SiteNode) -> anyhow::Result<()> {
    let text = |words: &[&str]| -> anyhow::Result<String> {
        Ok(String::from_utf8_lossy(&node.run(words)?).trim().to_owned())
    };
    let thin = text(&["dmsetup", "ls", "--target", "thin"])?;
    ensure!(thin.is_empty(), "thin devices: {thin}");
    let loops = text(&["losetup", "--list", "--noheadings"])?;
    ensure!(loops.is_empty(), "loop devices: {loops}");
    let used = data_used(node)?;
    ensure!(used == [0, 0], "blocks used in the kernel pools: {used:?}");
    Ok(())
}

/// The blocks that are used in each kernel pool of the node, as the kernel says.
pub fn data_used(node: &SiteNode) -> anyhow::Result<Vec<u64>> {
    let status = node.run(["dmsetup", "status", "--target", "thin-pool"])?;
    let status = String::from_utf8_lossy(&status).into_owned();
    // NAME: START LENGTH thin-pool TRANSACTION USED/TOTAL-METADATA USED/TOTAL-DATA ...
    let used = status.lines().map(|line| line.split(' ').nth(6)?.split('/').next()?.parse().ok());
    used.collect::<Option<Vec<u64>>>().ok_or_else(|| anyhow::anyhow!("not understood: {status}"))
}
