//! A cluster whose node has a kernel of its own, with a pool of the device mapper: control plane, operator and servers on this
//! machine, the agent and all it does in the guest.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_api::{StagedImage, TemplateImport};
use berth_e2e::csi::View;
use berth_e2e::drive;
use berth_e2e::site::{NodeKind, S3Kind};
use berth_e2e::wait::{self, Look};
use berth_testkit::s3::fault::{FaultAction, FaultRule, write_rules};
use kube::Api;
use kube::api::{DeleteParams, ListParams};
use kube::core::ResourceExt as _;
use serde_json::json;

use crate::remains::nothing_remains;
use crate::round_trip::there_and_back;
use crate::scenario::{Need, Scenario};
use crate::scene::{self, IMPORT_LIMIT, POOL, RAW, Scene, claim, give, same_start, sha256, show, take_back};

pub fn scenarios() -> Vec<Scenario> {
    let needs = scene::needs(NodeKind::Kernel);
    // Two boots.
    let long = [&[Need::Long], &needs[..]].concat();
    let limit = Duration::from_secs(600);
    vec![
        Scenario::new("thin::qcow2_to_mount_and_back", &needs, qcow2_to_mount_and_back).limited(limit),
        Scenario::new("thin::a_node_goes_on_after_a_power_cut", &long, a_node_goes_on_after_a_power_cut)
            .limited(limit),
    ]
}

async fn qcow2_to_mount_and_back() -> anyhow::Result<()> {
    there_and_back(NodeKind::Kernel).await
}

/// The agent is killed, and later the power of the node is cut while it imports, while a volume is in use: after its boot, the
/// import goes on and ends well, and the volume has what was written to its disk.
async fn a_node_goes_on_after_a_power_cut() -> anyhow::Result<()> {
    let mut scene = Scene::start(S3Kind::Test, NodeKind::Kernel).await?;
    let kept =
        give(scene.node(), &scene.node().csi(), &claim("kept", View::Filesystem, &[("pool", POOL)])).await?;
    scene.node().write(&kept.target.join("file"), b"written to the disk")?;

    // An agent that is killed takes nothing along, and the next one finds it.
    scene.site.node_mut(0).kill9();
    ensure!(scene.node().read(&kept.target.join("file"))? == b"written to the disk", "without the agent");
    scene.site.node_mut(0).start_agent()?;
    scene.node().wait_ready().await?;

    let data = scene.site.dir().join("s3");
    let slow = FaultRule::new(FaultAction::Delay { ms: 1000 }).op("PutObject").key_prefix("images/chunks/");
    write_rules(&data, &[slow])?;
    let source = json!({ "http": { "url": scene.url(&scene.qcow2) } });
    drive::import(&scene.site, "default", "disk", "images", &source).await?;
    let imports: Api<TemplateImport> = Api::namespaced(scene.site.client(), "default");
    wait::until("the import to upload", IMPORT_LIMIT, || async {
        match imports.get("disk").await.map(|import| import.status.unwrap_or_default().stage) {
            Ok(Some(stage)) if stage.name == "Upload" => Look::Done(()),
            Ok(stage) => Look::NotYet(format!("{stage:?}")),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    scene.site.node_mut(0).cut_power()?;
    let status = imports.get("disk").await?.status.context("a status")?;
    ensure!(status.durable.is_none(), "it was cut off: {status:?}");
    write_rules(&data, &[])?;
    scene.site.node_mut(0).boot_again().await?;
    scene.node().wait_ready().await?;

    let made = drive::wait_import(&scene.site.client(), "default", "disk", IMPORT_LIMIT, |_| {}).await?;
    ensure!(made.source_digest == sha256(&scene.qcow2)?, "source digest {}", made.source_digest);
    let (node, csi) = (scene.node(), scene.node().csi());
    show(&csi, &kept).await?;
    ensure!(node.read(&kept.target.join("file"))? == b"written to the disk", "another content");
    let block = give(node, &csi, &claim("block", View::Block, RAW)).await?;
    same_start(node, &block.target, &scene.raw)?;
    for used in [&kept, &block] {
        take_back(&csi, used).await?;
    }
    let images: Api<StagedImage> = Api::all(scene.site.client());
    for image in images.list(&ListParams::default()).await?.items {
        images.delete(&image.name_any(), &DeleteParams::default()).await?;
    }
    imports.delete("disk", &DeleteParams::default()).await?;
    nothing_remains(&scene.site).await?;
    scene.finish()
}
