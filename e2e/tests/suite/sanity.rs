//! csi-sanity against the node plugin: every test of what the plugin declares passes, nothing else is skipped, and
//! nothing is left.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use berth_e2e::csi::{Claim, View};
use berth_e2e::sanity::{self, Ending, Needs};
use berth_e2e::site::{NodeKind, Site, SiteNode, SiteOptions};
use berth_e2e::tools::Tool;
use tonic::Code;

use crate::growth::{NO_SYS_RESOURCE, enlarges_ext4};
use crate::remains::nothing_remains;
use crate::safety::long;
use crate::scenario::{Need, Scenario};
use crate::scene::{self, POOL, make_pool};

/// The tests that csi-sanity skips, by the start of their names, and the capability that is not declared.
const EXPLAINED: &[(&str, Needs)] = &[
    ("Controller Service [Controller Server] ControllerPublishVolume ", PUBLISH),
    ("Controller Service [Controller Server] ControllerUnpublishVolume ", PUBLISH),
    ("Controller Service [Controller Server] volume lifecycle ", PUBLISH),
    ("Controller Service [Controller Server] ListVolumes ", Needs::Controller("LIST_VOLUMES")),
    (
        "Controller Service [Controller Server] CreateVolume should create volume from an existing source snapshot",
        SNAPSHOT,
    ),
    (
        "Controller Service [Controller Server] CreateVolume should fail when the volume source snapshot is not found",
        SNAPSHOT,
    ),
    (
        "Controller Service [Controller Server] CreateVolume should create volume from an existing source volume",
        CLONE,
    ),
    (
        "Controller Service [Controller Server] CreateVolume should fail when the volume source volume is not found",
        CLONE,
    ),
    (
        "Controller Service [Controller Server] CreateVolume should create volume with a volume attribute class",
        MODIFY,
    ),
    (
        "Controller Service [Controller Server] CreateVolume should not create volume with an invalid volume attribute class",
        MODIFY,
    ),
    ("CreateSnapshot [Controller Server] ", SNAPSHOT),
    ("DeleteSnapshot [Controller Server] ", SNAPSHOT),
    ("ListSnapshots [Controller Server] ", Needs::Controller("LIST_SNAPSHOTS")),
    ("GetSnapshot [Controller Server] ", Needs::Controller("GET_SNAPSHOT")),
    ("ModifyVolume [Controller Server] ", MODIFY),
    ("ControllerGetVolumeHealth [Controller Server] ", Needs::Controller("GET_VOLUME_HEALTH")),
    ("ControllerListVolumeHealth [Controller Server] ", Needs::Controller("LIST_VOLUME_HEALTH")),
    ("GroupController Service ", Needs::Plugin("GROUP_CONTROLLER_SERVICE")),
    ("Node Service NodeGetVolumeHealth ", Needs::Node("GET_VOLUME_HEALTH")),
    ("Node Service NodeGetStorageHealth ", Needs::Node("GET_STORAGE_HEALTH")),
];
const EXPAND: &str = "Node Service NodeExpandVolume should work if node-expand is called after node-publish";
const PUBLISH: Needs = Needs::Controller("PUBLISH_UNPUBLISH_VOLUME");
const SNAPSHOT: Needs = Needs::Controller("CREATE_DELETE_SNAPSHOT");
const CLONE: Needs = Needs::Controller("CLONE_VOLUME");
const MODIFY: Needs = Needs::Controller("MODIFY_VOLUME");

pub fn scenarios() -> Vec<Scenario> {
    let needs = |kind| [scene::needs(kind), vec![Need::Tool(Tool::CsiSanity)]].concat();
    let limit = Duration::from_secs(900);
    vec![
        Scenario::new("sanity::filesystem_backend", &needs(NodeKind::Namespace), filesystem_backend)
            .limited(limit),
        Scenario::new("sanity::thin_backend", &needs(NodeKind::Kernel), thin_backend).limited(limit),
    ]
}

async fn filesystem_backend() -> anyhow::Result<()> {
    backend(NodeKind::Namespace, "filesystem").await
}

async fn thin_backend() -> anyhow::Result<()> {
    backend(NodeKind::Kernel, "dmThin").await
}

/// On the backend that goes with this kind of nodes.
async fn backend(kind: NodeKind, name: &str) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let mut options = SiteOptions::new(&dir.path().join("site"));
    options.kind = kind;
    let site = Site::start(options).await?;
    println!("{}", site.nodes()[0].description());
    make_pool(&site).await?;
    conforms(&site, name).await?;
    ensure!(site.stop().is_empty(), "a loop device stays");
    Ok(())
}

/// Runs csi-sanity with volumes of the pool, once as file systems and once as block devices. In a guest, where each program
/// that the agent runs takes ten times as long, the second only if there is time.
async fn conforms(site: &Site, backend: &str) -> anyhow::Result<()> {
    let node = &site.nodes()[0];
    let declared = node.csi().capabilities().await?;
    println!("capabilities of the plugin: {:?}", declared.plugin);
    println!("capabilities of its controller: {:?}", declared.controller);
    println!("capabilities of its node service: {:?}", declared.node);
    let program = Tool::CsiSanity.obtain()?;
    let both = site.kind() == NodeKind::Namespace || long();
    let views = if both { &[View::Filesystem, View::Block][..] } else { &[View::Filesystem] };
    for &view in views {
        let dir = node.kubelet().join(format!("sanity-{view:?}"));
        let report = sanity::run(&program, node, &dir, view, &[("pool", POOL)]).await?;
        let [passed, failed, skipped] =
            [Ending::Passed, Ending::Failed, Ending::Skipped].map(|ending| report.count(ending));
        println!("csi-sanity: {passed} passed, {failed} failed, {skipped} skipped ({backend}, {view:?})");
        let mut problems = report.problems(EXPLAINED, &declared);
        if view == View::Filesystem && !enlarges_ext4(site.kind()) {
            println!("SKIPPED {EXPAND}: {NO_SYS_RESOURCE}");
            let denied = |text: &str| text.contains(EXPAND) && text.contains("denied to resize filesystem");
            problems.retain(|problem| !denied(problem) && problem != "the run as a whole failed");
        }
        ensure!(problems.is_empty(), "{backend}, {view:?}:\n{}", problems.join("\n"));
        one_workload_or_several(node, view).await?;
        nothing_remains(site).await.with_context(|| format!("after {backend}, {view:?}"))?;
    }
    Ok(())
}

/// What csi-sanity does not look at: a volume for one workload is published at its place as often as it is asked for, and
/// one for several at several places.
async fn one_workload_or_several(node: &SiteNode, view: View) -> anyhow::Result<()> {
    let csi = node.csi();
    let claim = Claim {
        volume: format!("pvc-places-{view:?}"),
        namespace: "default".to_owned(),
        name: "places".to_owned(),
        bytes: 64 << 20,
        view,
        parameters: [("pool".to_owned(), POOL.to_owned())].into(),
    };
    let volume = csi.create(&claim).await?;
    let (staged, first) = (node.staging_path(&volume.id), node.target_path(&volume.id));
    let second = first.with_file_name("second");
    csi.stage(&volume, &staged).await?;
    for _ in 0..2 {
        csi.publish_alone(&volume, &staged, &first).await?;
    }
    let Err(refused) = csi.publish_alone(&volume, &staged, &second).await else {
        bail!("{view:?}: published at a second place, though it is for one workload");
    };
    ensure!(refused.code() == Some(Code::FailedPrecondition), "{view:?}: {refused}");
    ensure!(refused.to_string().contains(&first.display().to_string()), "{view:?}: {refused}");
    csi.publish(&volume, &staged, &second).await?;
    csi.publish_alone(&volume, &staged, &first).await?;
    for target in [&first, &second] {
        csi.unpublish(&volume, target).await?;
    }
    csi.unstage(&volume, &staged).await?;
    csi.delete(&volume.id).await?;
    Ok(())
}
