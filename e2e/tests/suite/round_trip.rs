//! The whole path: an image from a server into the bucket, from the bucket onto a node, and into a pod's mount; and
//! back to nothing. Kubelet and external-provisioner are played by the CSI client of the suite.

use anyhow::{Context as _, ensure};
use berth_api::conditions::{self, ConditionType};
use berth_api::template_import::TemplateImportStatus;
use berth_api::{StagedImage, StagingReservation, TemplateImport};
use berth_e2e::cluster::SYSTEM_NAMESPACE;
use berth_e2e::csi::View;
use berth_e2e::drive;
use berth_e2e::site::{NodeKind, S3Kind};
use kube::api::DeleteParams;
use kube::{Api, ResourceExt as _};
use serde_json::json;

use crate::books;
use crate::remains::nothing_remains;
use crate::scene::{
    DISK_BYTES, IMPORT_LIMIT, MOUNTED, OS_RELEASE, RAW, Scene, claim, give, noise, same_start, sha256,
    take_back,
};

/// The same on every kind of node, which is on every backend of pools.
pub async fn there_and_back(kind: NodeKind) -> anyhow::Result<()> {
    let scene = Scene::start(S3Kind::Test, kind).await?;
    import_and_look_at_every_status(&scene).await?;
    let (node, csi) = (scene.node(), scene.node().csi());
    let first = give(node, &csi, &claim("first", View::Filesystem, MOUNTED)).await?;
    let root = &first.target;
    ensure!(node.read(&root.join("etc/os-release"))? == OS_RELEASE.as_bytes(), "another /etc/os-release");
    ensure!(node.read(&root.join("noise"))? == noise(9 << 20), "another content of the big file");
    node.write(&root.join("written"), b"by the first")?;

    let second = give(node, &csi, &claim("second", View::Filesystem, MOUNTED)).await?;
    let other = &second.target;
    ensure!(node.read(&other.join("etc/os-release"))? == OS_RELEASE.as_bytes(), "another /etc/os-release");
    ensure!(
        !node.names(other)?.contains(&"written".to_owned()),
        "the second volume sees what the first wrote"
    );
    let reused = reservation_of(&scene, "second").await?.status.and_then(|status| status.reused);
    ensure!(reused == Some(true), "the second volume did not reuse the staged image: {reused:?}");
    let images: Api<StagedImage> = Api::all(scene.site.client());
    let staged = images.list(&kube::api::ListParams::default()).await?.items;
    ensure!(staged.len() == 1, "{} staged images for one template", staged.len());

    let block = give(node, &csi, &claim("block", View::Block, RAW)).await?;
    same_start(node, &block.target, &scene.raw)?;
    books::balance(&scene.site, &[&first.volume, &second.volume, &block.volume]).await?;

    for used in [&first, &second, &block] {
        take_back(&csi, used).await?;
    }
    images.delete(&staged[0].name_any(), &DeleteParams::default()).await?;
    let imports: Api<TemplateImport> = Api::namespaced(scene.site.client(), "default");
    imports.delete("disk", &DeleteParams::default()).await?;
    nothing_remains(&scene.site).await?;
    let manifests = scene.site.s3().keys("images/manifests/").await?;
    ensure!(manifests.is_empty(), "manifests: {manifests:?}");
    scene.finish()
}

/// The import's states come in their order, progress never falls, and at the end the conditions hold.
async fn import_and_look_at_every_status(scene: &Scene) -> anyhow::Result<()> {
    let source = json!({ "http": { "url": scene.url(&scene.qcow2) } });
    drive::import(&scene.site, "default", "disk", "images", &source).await?;
    let mut seen: Vec<TemplateImportStatus> = Vec::new();
    let client = scene.site.client();
    let made =
        drive::wait_import(&client, "default", "disk", IMPORT_LIMIT, |status| seen.push(status.clone()));
    let made = made.await?;
    let states: Vec<_> = seen.iter().filter_map(|status| status.state).map(|state| state as u8).collect();
    ensure!(states.is_sorted(), "states went back: {:?}", seen.iter().map(|s| s.state).collect::<Vec<_>>());
    let percent: Vec<_> = seen.iter().filter_map(|status| status.progress.as_ref()?.percent).collect();
    ensure!(percent.is_sorted() && !percent.is_empty(), "progress {percent:?}");
    ensure!(
        seen.iter().any(|status| status.plan.is_some() && status.durable.is_none()),
        "no plan before the work"
    );
    let last = seen.last().context("no status")?;
    for condition in [ConditionType::Ready, ConditionType::Durable] {
        ensure!(conditions::is_true(&last.conditions, condition), "{condition:?}: {:?}", last.conditions);
    }
    ensure!(made.virtual_size == i64::try_from(DISK_BYTES)?, "virtual size {}", made.virtual_size);
    ensure!(made.source_digest == sha256(&scene.qcow2)?, "source digest {}", made.source_digest);
    ensure!(made.real_size < made.virtual_size && made.size < made.real_size, "sizes {made:?}");
    Ok(())
}

async fn reservation_of(scene: &Scene, claim: &str) -> anyhow::Result<StagingReservation> {
    let reservations: Api<StagingReservation> = Api::namespaced(scene.site.client(), SYSTEM_NAMESPACE);
    let label = format!("{}={claim}", berth_api::defaults::LABEL_CLAIM_NAME);
    let found = reservations.list(&kube::api::ListParams::default().labels(&label)).await?.items;
    ensure!(found.len() == 1, "{} reservations of claim {claim}", found.len());
    found.into_iter().next().context("one")
}
