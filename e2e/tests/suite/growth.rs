//! Volumes that become larger while they are in use: promised first, then the device, then the file system.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use berth_api::StagingLedger;
use berth_e2e::csi::{Claim, View};
use berth_e2e::site::{NodeKind, Site, SiteOptions};
use kube::Api;
use kube::api::ListParams;
use tonic::Code;

use crate::remains::nothing_remains;
use crate::scenario::Scenario;
use crate::scene::{self, POOL, make_pool};

const MIB: u64 = 1 << 20;

/// Why a mounted ext4 does not grow on some machines.
pub const NO_SYS_RESOURCE: &str =
    "the kernel enlarges a mounted ext4 for CAP_SYS_RESOURCE only, which is not there";

/// True if nodes of this kind may make a mounted ext4 larger. `CAP_SYS_RESOURCE` is number 24 in
/// `include/uapi/linux/capability.h`.
pub fn enlarges_ext4(kind: NodeKind) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap_or_default();
    let effective = u64::from_str_radix(effective.trim(), 16).unwrap_or_default();
    kind == NodeKind::Kernel || effective >> 24 & 1 == 1
}

pub fn scenarios() -> Vec<Scenario> {
    let limit = Duration::from_secs(600);
    let (here, guest) = (scene::needs(NodeKind::Namespace), scene::needs(NodeKind::Kernel));
    vec![
        Scenario::new("growth::filesystem_backend", &here, filesystem_backend).limited(limit),
        Scenario::new("growth::thin_backend", &guest, thin_backend).limited(limit),
    ]
}

async fn filesystem_backend() -> anyhow::Result<()> {
    backend(NodeKind::Namespace).await
}

async fn thin_backend() -> anyhow::Result<()> {
    backend(NodeKind::Kernel).await
}

async fn backend(kind: NodeKind) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let mut options = SiteOptions::new(&dir.path().join("site"));
    options.kind = kind;
    let site = Site::start(options).await?;
    make_pool(&site).await?;
    for view in [View::Filesystem, View::Block] {
        if view == View::Filesystem && !enlarges_ext4(kind) {
            println!("SKIPPED {view:?}: {NO_SYS_RESOURCE}");
            continue;
        }
        grows_in_use(&site, view).await.with_context(|| format!("{view:?}"))?;
        nothing_remains(&site).await?;
    }
    ensure!(site.stop().is_empty(), "a loop device stays");
    Ok(())
}

async fn grows_in_use(site: &Site, view: View) -> anyhow::Result<()> {
    let node = &site.nodes()[0];
    let csi = node.csi();
    let claim = Claim {
        volume: format!("pvc-grows-{view:?}"),
        namespace: "default".to_owned(),
        name: "grows".to_owned(),
        bytes: 64 * MIB,
        view,
        parameters: [("pool".to_owned(), POOL.to_owned())].into(),
    };
    let volume = csi.create(&claim).await?;
    let (staged, target) = (node.staging_path(&volume.id), node.target_path(&volume.id));
    csi.stage(&volume, &staged).await?;
    csi.publish(&volume, &staged, &target).await?;
    let before = csi.total_bytes(&volume, &target).await?;
    ensure!(promised(site).await? == 64 * MIB);

    ensure!(csi.expand(&volume, 96 * MIB, 0).await? == 96 * MIB);
    ensure!(promised(site).await? == 96 * MIB, "promised before the node is asked");
    for _ in 0..2 {
        ensure!(csi.node_expand(&volume, &staged, &target, 96 * MIB).await? == 96 * MIB);
    }
    let after = csi.total_bytes(&volume, &target).await?;
    ensure!(after >= before + 24 * MIB, "{before} bytes, then {after}");

    // Not smaller, not more than is there, and as it was after that.
    ensure!(csi.expand(&volume, 32 * MIB, 0).await? == 96 * MIB, "what it has is enough");
    for (bytes, limit, code, words) in [
        (32 * MIB, 64 * MIB, Code::OutOfRange, "96 MiB are needed, more than the limit of 64 MiB"),
        (1 << 50, 0, Code::ResourceExhausted, "96 MiB are promised"),
    ] {
        let Err(refused) = csi.expand(&volume, bytes, limit).await else { bail!("{bytes} bytes were given") };
        ensure!(refused.code() == Some(code) && refused.to_string().contains(words), "{refused}");
    }
    ensure!(promised(site).await? == 96 * MIB);
    ensure!(csi.total_bytes(&volume, &target).await? == after);

    csi.unpublish(&volume, &target).await?;
    csi.unstage(&volume, &staged).await?;
    csi.delete(&volume.id).await?;
    ensure!(promised(site).await? == 0);
    Ok(())
}

/// What all ledgers promise to volumes, by the API server.
async fn promised(site: &Site) -> anyhow::Result<u64> {
    let ledgers: Api<StagingLedger> = Api::all(site.client());
    let ledgers = ledgers.list(&ListParams::default()).await?.items;
    let promises = ledgers.iter().flat_map(|ledger| ledger.spec.promises.values());
    Ok(promises.map(|promise| promise.data_bytes.unsigned_abs()).sum())
}
