//! Images from every source, volumes of them, and what is refused, with pools of directories.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_api::{StagedImage, StagingReservation};
use berth_e2e::cluster::SYSTEM_NAMESPACE;
use berth_e2e::csi::{Claim, View};
use berth_e2e::site::{NodeKind, S3Kind, Site, SiteOptions};
use berth_e2e::tools::Tool;
use berth_e2e::wait::{self, Look};
use berth_e2e::{drive, image, leaks};
use kube::Api;
use serde_json::json;
use tonic::Code;

use crate::round_trip::there_and_back;
use crate::scenario::{Need, Scenario};
use crate::scene::{
    self, DISK_BYTES, IMPORT_LIMIT, MOUNTED, OS_RELEASE, RAW, Scene, claim, give, same_start, sha256,
    take_back,
};

/// How long a release may take.
const RELEASE_LIMIT: Duration = Duration::from_secs(60);

pub fn scenarios() -> Vec<Scenario> {
    let needs = scene::needs(NodeKind::Namespace);
    let mut with_casync = needs.clone();
    with_casync.push(Need::Command("casync"));
    let mut with_minio = needs.clone();
    with_minio.push(Need::Tool(Tool::Minio));
    vec![
        Scenario::new("volume::qcow2_to_mount_and_back", &needs, qcow2_to_mount_and_back),
        Scenario::new("volume::casync_reads_what_is_stored", &with_casync, casync_reads_what_is_stored),
        Scenario::new("volume::every_source_gives_the_same_image", &needs, every_source_gives_the_same_image),
        Scenario::new(
            "volume::a23_a_template_is_used_on_every_node_at_once",
            &needs,
            used_on_every_node_at_once,
        ),
        Scenario::new("volume::classes_that_are_refused", &needs, classes_that_are_refused),
        Scenario::new("volume::two_nodes_and_two_operators", &needs, two_nodes_and_two_operators),
        Scenario::new("volume::through_minio", &with_minio, through_minio),
    ]
}

async fn qcow2_to_mount_and_back() -> anyhow::Result<()> {
    there_and_back(NodeKind::Namespace).await
}

async fn casync_reads_what_is_stored() -> anyhow::Result<()> {
    let scene = Scene::start(S3Kind::Test, NodeKind::Namespace).await?;
    let made = scene.import_http("disk", &scene.qcow2).await?;
    let copy = scene.dir.path().join("copy");
    let hex = made.digest.trim_start_matches("sha256:");
    let index = copy.join("disk.caibx");
    fs::create_dir_all(&copy)?;
    scene.site.s3().fetch(&format!("images/images/{hex}.caibx"), &index).await?;
    ensure!(sha256(&index)? == made.digest, "the digest is not that of the index");
    for key in scene.site.s3().keys("images/chunks/").await? {
        let file = copy.join(key.trim_start_matches("images/"));
        fs::create_dir_all(file.parent().context("a chunk has a folder")?)?;
        scene.site.s3().fetch(&key, &file).await?;
    }
    let extracted = copy.join("disk.raw");
    let mut casync = Command::new("casync");
    casync
        .arg("extract")
        .arg(format!("--store={}", copy.join("chunks").display()))
        .args([&index, &extracted]);
    image::run(&mut casync)?;
    ensure!(
        fs::metadata(&extracted)?.len() == DISK_BYTES,
        "{} bytes extracted",
        fs::metadata(&extracted)?.len()
    );
    same_start(scene.node(), &extracted, &scene.raw)?;
    let mut compare = Command::new("qemu-img");
    compare.args(["compare", "-f", "raw", "-F", "qcow2"]).args([&extracted, &scene.qcow2]);
    image::run(&mut compare)?;
    scene.finish()
}

async fn every_source_gives_the_same_image() -> anyhow::Result<()> {
    let scene = Scene::start(S3Kind::Test, NodeKind::Namespace).await?;
    let from_qcow2 = scene.import_http("disk", &scene.qcow2).await?;
    let from_raw = scene.import_http("raw", &scene.raw).await?;
    ensure!(from_raw.digest == from_qcow2.digest, "raw {} and qcow2 {}", from_raw.digest, from_qcow2.digest);
    scene.site.s3().store("upload/disk.qcow2", &scene.qcow2).await?;
    let source = json!({ "s3": {
        "endpoint": scene.site.s3_endpoint(), "bucket": berth_e2e::site::BUCKET, "key": "upload/disk.qcow2",
        "secretRef": { "name": "images-s3" },
    } });
    drive::import(&scene.site, "default", "bucket", "images", &source).await?;
    let from_s3 = drive::wait_import(&scene.site.client(), "default", "bucket", IMPORT_LIMIT, |_| {}).await?;
    ensure!(from_s3.digest == from_qcow2.digest, "s3 {} and http {}", from_s3.digest, from_qcow2.digest);
    ensure!(from_s3.source_digest == from_qcow2.source_digest, "source {}", from_s3.source_digest);
    scene.finish()
}

async fn classes_that_are_refused() -> anyhow::Result<()> {
    let scene = Scene::start(S3Kind::Test, NodeKind::Namespace).await?;
    scene.import_http("disk", &scene.qcow2).await?;
    scene.site.cluster().ensure_namespace("stranger").await?;
    let csi = scene.node().csi();
    let unknown: &[(&str, &str)] = &[("pool", "fast"), ("template", "default/no-such")];
    let too_big = Claim { bytes: 64 << 30, ..claim("big", View::Block, RAW) };
    let stranger = Claim { namespace: "stranger".to_owned(), ..claim("stranger", View::Block, RAW) };
    for (claim, code, reason) in [
        (claim("unmounted", View::Filesystem, RAW), Code::InvalidArgument, "HostMountNotAllowed"),
        (claim("unknown", View::Block, unknown), Code::NotFound, "TemplateNotFound"),
        (stranger, Code::PermissionDenied, "NamespaceNotAllowed"),
        (too_big, Code::ResourceExhausted, "LargerThanPool"),
    ] {
        let Err(error) = csi.create(&claim).await else {
            anyhow::bail!("volume {} was made", claim.volume);
        };
        ensure!(
            error.code() == Some(code) && error.to_string().contains(reason),
            "{}: {error}",
            claim.volume
        );
    }
    let reservations: Api<StagingReservation> = Api::namespaced(scene.site.client(), SYSTEM_NAMESPACE);
    wait::until("refused reservations to be gone", RELEASE_LIMIT, || async {
        match reservations.list(&kube::api::ListParams::default()).await {
            Ok(list) if list.items.is_empty() => Look::Done(()),
            Ok(list) => Look::NotYet(format!("{} are there", list.items.len())),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    scene.finish()
}

async fn through_minio() -> anyhow::Result<()> {
    let scene = Scene::start(S3Kind::Minio, NodeKind::Namespace).await?;
    let made = scene.import_http("disk", &scene.qcow2).await?;
    ensure!(made.virtual_size == i64::try_from(DISK_BYTES)?, "virtual size {}", made.virtual_size);
    let (node, csi) = (scene.node(), scene.node().csi());
    let used = give(node, &csi, &claim("first", View::Filesystem, MOUNTED)).await?;
    let release = node.read(&used.target.join("etc/os-release"))?;
    ensure!(release == OS_RELEASE.as_bytes(), "another /etc/os-release");
    take_back(&csi, &used).await?;
    scene.finish()
}

/// A template that is Ready is used on two nodes at once; each takes it from the store, and none from the other.
async fn used_on_every_node_at_once() -> anyhow::Result<()> {
    let scene = Scene::start_on(S3Kind::Test, NodeKind::Namespace, 2).await?;
    scene.import_http("disk", &scene.qcow2).await?;
    let nodes = scene.site.nodes();
    let csis = [nodes[0].csi(), nodes[1].csi()];
    let claims = [claim("here", View::Block, RAW), claim("there", View::Block, RAW)];
    let (here, there) =
        tokio::try_join!(give(&nodes[0], &csis[0], &claims[0]), give(&nodes[1], &csis[1], &claims[1]))?;
    for (node, used) in nodes.iter().zip([&here, &there]) {
        same_start(node, &used.target, &scene.raw)?;
    }
    let images: Api<StagedImage> = Api::all(scene.site.client());
    let images = images.list(&kube::api::ListParams::default()).await?.items;
    let mut on: Vec<&str> = images.iter().map(|image| image.spec.node_name.as_str()).collect();
    on.sort_unstable();
    ensure!(on == ["node-1", "node-2"], "staged on {on:?}");
    let log = fs::read_to_string(scene.site.dir().join("s3/requests.jsonl"))?;
    let chunks =
        log.lines().filter(|line| line.contains(r#""op":"GetObject""#) && line.contains("images/chunks/"));
    let data: i64 = images.iter().map(|image| image.spec.data_bytes).sum();
    let places = usize::try_from(data / (256 << 10))?;
    let read = chunks.count();
    ensure!(read >= places, "{read} chunks were read for {places} places on two nodes");
    take_back(&csis[0], &here).await?;
    take_back(&csis[1], &there).await?;
    scene.finish()
}

/// One pool on two nodes at the same path; a volume on the second, while one of two operators is dead.
async fn two_nodes_and_two_operators() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let mut options = SiteOptions::new(&dir.path().join("site"));
    (options.nodes, options.operators) = (2, 2);
    let mut site = Site::start(options).await?;
    drive::make_pool(&site, "fast", "512Mi").await?;
    ensure!(leaks::loops_below(site.dir()).len() == 2, "loop devices: {:?}", leaks::loops_below(site.dir()));
    site.kill9_operator(0);
    ensure!(
        site.operator_pid(0).is_none() && site.operator_pid(1).is_some(),
        "the wrong operator was killed"
    );
    let node = &site.nodes()[1];
    let (csi, mut claim) = (node.csi(), claim("second", View::Filesystem, &[("pool", "fast")]));
    claim.bytes = 64 << 20;
    let used = give(node, &csi, &claim).await?;
    node.write(&used.target.join("file"), b"written")?;
    let reservations: Api<StagingReservation> = Api::namespaced(site.client(), SYSTEM_NAMESPACE);
    let made = reservations.list(&kube::api::ListParams::default()).await?.items;
    let assigned =
        made.first().and_then(|made| made.status.as_ref()?.assignment.as_ref()).context("no assignment")?;
    ensure!(
        made.len() == 1 && assigned.node == "node-2",
        "{} reservations, the first on {}",
        made.len(),
        assigned.node
    );
    take_back(&csi, &used).await?;
    ensure!(site.stop().is_empty(), "a loop device stays");
    Ok(())
}
