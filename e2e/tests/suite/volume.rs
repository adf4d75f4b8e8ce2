//! The whole path: an image from a server into the bucket, from the bucket onto a node, and into a pod's mount; and
//! back to nothing. Kubelet and external-provisioner are played by the CSI client of the suite.

use std::collections::HashMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_api::conditions::{self, ConditionType};
use berth_api::template_import::{DurableImage, TemplateImportStatus};
use berth_api::{StagedImage, StagingLedger, StagingReservation, TemplateImport};
use berth_e2e::cluster::SYSTEM_NAMESPACE;
use berth_e2e::csi::{Claim, Csi, View, Volume};
use berth_e2e::leaks::{self, Snapshot};
use berth_e2e::site::{S3Kind, Site, SiteNode, SiteOptions};
use berth_e2e::tools::Tool;
use berth_e2e::wait::{self, Look};
use berth_e2e::{drive, image};
use kube::api::DeleteParams;
use kube::{Api, ResourceExt as _};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tonic::Code;

use crate::scenario::{Need, Scenario};

/// How long an import of a small image may take on a busy machine.
const IMPORT_LIMIT: Duration = Duration::from_secs(120);

/// How long a release may take.
const RELEASE_LIMIT: Duration = Duration::from_secs(60);

/// The size of the test image, no multiple of the unit of volumes.
const DISK_BYTES: u64 = (72 << 20) + (256 << 10);

/// What the partition of the test image holds.
const OS_RELEASE: &str = "PRETTY_NAME=\"Berth test system\"\n";

pub fn scenarios() -> Vec<Scenario> {
    let mut needs = Need::SITE.to_vec();
    needs.extend(["sfdisk", "mke2fs", "qemu-img", "mkfs.xfs"].map(Need::Command));
    let mut with_casync = needs.clone();
    with_casync.push(Need::Command("casync"));
    let mut with_minio = needs.clone();
    with_minio.push(Need::Tool(Tool::Minio));
    vec![
        Scenario::new("volume::qcow2_to_mount_and_back", &needs, qcow2_to_mount_and_back),
        Scenario::new("volume::casync_reads_what_is_stored", &with_casync, casync_reads_what_is_stored),
        Scenario::new("volume::every_source_gives_the_same_image", &needs, every_source_gives_the_same_image),
        Scenario::new("volume::classes_that_are_refused", &needs, classes_that_are_refused),
        Scenario::new("volume::two_nodes_and_two_operators", &needs, two_nodes_and_two_operators),
        Scenario::new("volume::through_minio", &with_minio, through_minio),
    ]
}

/// A site with pool `fast` and image store `default/images`, and a disk image in three forms.
struct Scene {
    // In this order: the site before its folder.
    site: Site,
    raw: PathBuf,
    qcow2: PathBuf,
    before: Snapshot,
    dir: tempfile::TempDir,
}

impl Scene {
    async fn start(s3: S3Kind) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let before = Snapshot::below(&fs::canonicalize(dir.path())?);
        let (raw, qcow2) = make_image(dir.path())?;
        let mut options = SiteOptions::new(&dir.path().join("site"));
        options.s3 = s3;
        let site = Site::start(options).await?;
        for file in [&raw, &qcow2] {
            let name = file.file_name().context("a file")?;
            fs::hard_link(file, site.files().join(name))?;
        }
        drive::make_pool(&site, "fast", "1Gi").await?;
        drive::make_store(&site, "default", "images").await?;
        Ok(Self { site, raw, qcow2, before, dir })
    }

    fn node(&self) -> &SiteNode {
        &self.site.nodes()[0]
    }

    /// The address of a file on the file server.
    fn url(&self, file: &Path) -> String {
        format!("{}/plain/{}", self.site.http(), file.file_name().unwrap_or_default().to_string_lossy())
    }

    async fn import_http(&self, name: &str, file: &Path) -> anyhow::Result<DurableImage> {
        let source = json!({ "http": { "url": self.url(file) } });
        drive::import(&self.site, "default", name, "images", &source).await?;
        Ok(drive::wait_import(&self.site.client(), "default", name, IMPORT_LIMIT, |_| {}).await?)
    }

    /// Ends the site; nothing of it may be left on the machine.
    fn finish(self) -> anyhow::Result<()> {
        let Self { site, before, dir, .. } = self;
        let attached = site.stop();
        ensure!(attached.is_empty(), "still attached: {attached:?}");
        let dir = fs::canonicalize(dir.path())?;
        let left = before.settle(Duration::from_secs(10), || Snapshot::below(&dir));
        ensure!(left.is_empty(), "left behind: {left:?}");
        Ok(())
    }
}

/// A disk with a partition table and one ext4 partition, as raw and as compressed qcow2.
fn make_image(dir: &Path) -> anyhow::Result<(PathBuf, PathBuf)> {
    let tree = dir.join("tree");
    fs::create_dir_all(tree.join("etc"))?;
    fs::write(tree.join("etc/os-release"), OS_RELEASE)?;
    fs::write(tree.join("noise"), noise(9 << 20))?;
    fs::write(tree.join("text"), "the same line over and over\n".repeat(100_000))?;
    let (raw, qcow2) = (dir.join("disk.raw"), dir.join("disk.qcow2"));
    image::make_disk(&raw, DISK_BYTES, &tree)?;
    image::to_qcow2(&raw, &qcow2)?;
    Ok((raw, qcow2))
}

/// Bytes that do not compress, the same each time (xorshift).
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(length).collect()
}

fn claim(name: &str, view: View, class: &[(&str, &str)]) -> Claim {
    let parameters = class.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    Claim {
        volume: format!("pvc-{name}"),
        namespace: "default".to_owned(),
        name: name.to_owned(),
        bytes: 80 << 20,
        view,
        parameters: parameters.collect::<HashMap<_, _>>(),
    }
}

const MOUNTED: &[(&str, &str)] =
    &[("pool", "fast"), ("template", "default/disk"), ("hostMount", "true"), ("partition", "1")];
const RAW: &[(&str, &str)] = &[("pool", "fast"), ("template", "default/disk")];

/// A volume that a pod could use now.
struct Used {
    volume: Volume,
    staged: PathBuf,
    target: PathBuf,
}

/// What external-provisioner and kubelet do for a pod.
async fn give(node: &SiteNode, csi: &Csi, claim: &Claim) -> anyhow::Result<Used> {
    let volume = csi.create(claim).await?;
    ensure!(volume.id.starts_with("v1-"), "handle {}", volume.id);
    ensure!(volume.bytes >= claim.bytes, "{} bytes for a claim of {}", volume.bytes, claim.bytes);
    let (staged, target) = (node.staging_path(&volume.id), node.target_path(&volume.id));
    // Each call twice: kubelet repeats what it has no answer to.
    for _ in 0..2 {
        csi.stage(&volume, &staged).await?;
    }
    for _ in 0..2 {
        csi.publish(&volume, &staged, &target).await?;
    }
    Ok(Used { volume, staged, target })
}

/// The way back.
async fn take_back(csi: &Csi, used: &Used) -> anyhow::Result<()> {
    for _ in 0..2 {
        csi.unpublish(&used.volume, &used.target).await?;
    }
    for _ in 0..2 {
        csi.unstage(&used.volume, &used.staged).await?;
    }
    for _ in 0..2 {
        csi.delete(&used.volume.id).await?;
    }
    Ok(())
}

async fn qcow2_to_mount_and_back() -> anyhow::Result<()> {
    let scene = Scene::start(S3Kind::Test).await?;
    import_and_look_at_every_status(&scene).await?;
    let (node, csi) = (scene.node(), scene.node().csi());
    let first = give(node, &csi, &claim("first", View::Filesystem, MOUNTED)).await?;
    let root = node.inside(&first.target);
    ensure!(fs::read_to_string(root.join("etc/os-release"))? == OS_RELEASE, "another /etc/os-release");
    ensure!(fs::read(root.join("noise"))? == noise(9 << 20), "another content of the big file");
    let mut written = fs::File::create(root.join("written"))?;
    written.write_all(b"by the first")?;
    written.sync_all()?;
    drop(written);

    let second = give(node, &csi, &claim("second", View::Filesystem, MOUNTED)).await?;
    let other = node.inside(&second.target);
    ensure!(fs::read_to_string(other.join("etc/os-release"))? == OS_RELEASE, "another /etc/os-release");
    ensure!(!other.join("written").exists(), "the second volume sees what the first wrote");
    let reused = reservation_of(&scene, "second").await?.status.and_then(|status| status.reused);
    ensure!(reused == Some(true), "the second volume did not reuse the staged image: {reused:?}");
    let images: Api<StagedImage> = Api::all(scene.site.client());
    let staged = images.list(&kube::api::ListParams::default()).await?.items;
    ensure!(staged.len() == 1, "{} staged images for one template", staged.len());

    let block = give(node, &csi, &claim("block", View::Block, RAW)).await?;
    same_start(&node.inside(&block.target), &scene.raw)?;

    for used in [&first, &second, &block] {
        take_back(&csi, used).await?;
    }
    nothing_remains(&scene, &staged[0].name_any()).await?;
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

/// After the last volume: no reservation, no mount, no loop device but the pool's; and without the staged image and
/// the import, no promise, no file, no manifest.
async fn nothing_remains(scene: &Scene, staged: &str) -> anyhow::Result<()> {
    let client = scene.site.client();
    let images: Api<StagedImage> = Api::all(client.clone());
    let imports: Api<TemplateImport> = Api::namespaced(client.clone(), "default");
    let reservations: Api<StagingReservation> = Api::all(client.clone());
    let ledgers: Api<StagingLedger> = Api::all(client);
    images.delete(staged, &DeleteParams::default()).await?;
    imports.delete("disk", &DeleteParams::default()).await?;
    let everything = kube::api::ListParams::default();
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
    let node = scene.node();
    let pool = node.pool_root("fast");
    for part in ["volumes", "images", "staging"] {
        let left: Vec<_> =
            fs::read_dir(node.inside(&pool.join(part)))?.flatten().map(|entry| entry.file_name()).collect();
        ensure!(left.is_empty(), "left in {part}: {left:?}");
    }
    let mounts = node.mounts();
    ensure!(mounts == [scene.site.dir().join("disk"), pool], "mounts: {mounts:?}");
    let loops = leaks::loops_below(scene.site.dir());
    ensure!(loops.len() == 1, "loop devices: {loops:?}");
    let manifests = scene.site.s3().keys("images/manifests/").await?;
    ensure!(manifests.is_empty(), "manifests: {manifests:?}");
    Ok(())
}

async fn casync_reads_what_is_stored() -> anyhow::Result<()> {
    let scene = Scene::start(S3Kind::Test).await?;
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
    same_start(&extracted, &scene.raw)?;
    let mut compare = Command::new("qemu-img");
    compare.args(["compare", "-f", "raw", "-F", "qcow2"]).args([&extracted, &scene.qcow2]);
    image::run(&mut compare)?;
    scene.finish()
}

async fn every_source_gives_the_same_image() -> anyhow::Result<()> {
    let scene = Scene::start(S3Kind::Test).await?;
    let from_qcow2 = scene.import_http("disk", &scene.qcow2).await?;
    let from_raw = scene.import_http("raw", &scene.raw).await?;
    ensure!(from_raw.digest == from_qcow2.digest, "raw {} and qcow2 {}", from_raw.digest, from_qcow2.digest);
    scene.site.s3().store("upload/disk.qcow2", &scene.qcow2).await?;
    let source = json!({ "s3": {
        "endpoint": scene.site.s3().endpoint(), "bucket": berth_e2e::site::BUCKET, "key": "upload/disk.qcow2",
        "secretRef": { "name": "images-s3" },
    } });
    drive::import(&scene.site, "default", "bucket", "images", &source).await?;
    let from_s3 = drive::wait_import(&scene.site.client(), "default", "bucket", IMPORT_LIMIT, |_| {}).await?;
    ensure!(from_s3.digest == from_qcow2.digest, "s3 {} and http {}", from_s3.digest, from_qcow2.digest);
    ensure!(from_s3.source_digest == from_qcow2.source_digest, "source {}", from_s3.source_digest);
    scene.finish()
}

async fn classes_that_are_refused() -> anyhow::Result<()> {
    let scene = Scene::start(S3Kind::Test).await?;
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
    let scene = Scene::start(S3Kind::Minio).await?;
    let made = scene.import_http("disk", &scene.qcow2).await?;
    ensure!(made.virtual_size == i64::try_from(DISK_BYTES)?, "virtual size {}", made.virtual_size);
    let (node, csi) = (scene.node(), scene.node().csi());
    let used = give(node, &csi, &claim("first", View::Filesystem, MOUNTED)).await?;
    let release = fs::read_to_string(node.inside(&used.target).join("etc/os-release"))?;
    ensure!(release == OS_RELEASE, "another /etc/os-release");
    take_back(&csi, &used).await?;
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
    fs::write(node.inside(&used.target).join("file"), "written")?;
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

/// Checks that `longer` (a file or device) starts with the bytes of `shorter`.
fn same_start(longer: &Path, shorter: &Path) -> anyhow::Result<()> {
    let mut left = fs::File::open(longer).with_context(|| format!("open {}", longer.display()))?;
    let mut right = fs::File::open(shorter)?;
    let (mut one, mut other) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0_u64;
    loop {
        let length = right.read(&mut other)?;
        if length == 0 {
            return Ok(());
        }
        left.read_exact(&mut one[..length]).with_context(|| format!("{} ends at {at}", longer.display()))?;
        ensure!(one[..length] == other[..length], "{} differs in the MiB at {at}", longer.display());
        at += u64::try_from(length)?;
    }
}

fn sha256(path: &Path) -> anyhow::Result<String> {
    let digest = Sha256::digest(fs::read(path)?);
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("sha256:{hex}"))
}
