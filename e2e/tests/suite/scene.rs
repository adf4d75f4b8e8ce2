//! What the scenarios with volumes stand on: a site with a pool and an image store, a disk image, and what is done for a pod.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_api::template_import::DurableImage;
use berth_e2e::csi::{Claim, Csi, View, Volume};
use berth_e2e::leaks::Snapshot;
use berth_e2e::site::{NodeKind, S3Kind, Site, SiteNode, SiteOptions};
use berth_e2e::{drive, image};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::scenario::Need;

/// How long an import of a small image may take on a busy machine.
pub const IMPORT_LIMIT: Duration = Duration::from_secs(120);

/// The size of the test image, no multiple of the unit of volumes.
pub const DISK_BYTES: u64 = (72 << 20) + (256 << 10);

/// What the partition of the test image holds.
pub const OS_RELEASE: &str = "PRETTY_NAME=\"Berth test system\"\n";

/// The pool.
pub const POOL: &str = "fast";

/// A class of volumes with the test image's file system, and one of its bytes.
pub const MOUNTED: &[(&str, &str)] =
    &[("pool", POOL), ("template", "default/disk"), ("hostMount", "true"), ("partition", "1")];
pub const RAW: &[(&str, &str)] = &[("pool", POOL), ("template", "default/disk")];

/// What a scene takes of the machine.
pub fn needs(kind: NodeKind) -> Vec<Need> {
    let commands = ["sfdisk", "mke2fs", "qemu-img", "mkfs.xfs"].map(Need::Command);
    let thin = ["dmsetup", "lvm", "thin_check", "thin_dump", "thin_delta"].map(Need::Command);
    match kind {
        NodeKind::Namespace => [Need::SITE, &commands].concat(),
        NodeKind::Kernel => [Need::SITE, &[Need::Kernel], &commands, &thin].concat(),
    }
}

/// A site with pool `fast` and image store `default/images`, and a disk image in two forms.
pub struct Scene {
    // In this order: the site before its folder.
    pub site: Site,
    pub raw: PathBuf,
    pub qcow2: PathBuf,
    before: Snapshot,
    pub dir: tempfile::TempDir,
}

impl Scene {
    /// The pool is one of a directory on nodes that are namespaces, and one of the device mapper on others.
    pub async fn start(s3: S3Kind, kind: NodeKind) -> anyhow::Result<Self> {
        Self::start_on(s3, kind, 1).await
    }

    /// The same with so many nodes, each with the pool.
    pub async fn start_on(s3: S3Kind, kind: NodeKind, nodes: usize) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let before = Snapshot::below(&fs::canonicalize(dir.path())?);
        let (raw, qcow2) = make_image(dir.path())?;
        let mut options = SiteOptions::new(&dir.path().join("site"));
        (options.s3, options.kind, options.nodes) = (s3, kind, nodes);
        let site = Site::start(options).await?;
        println!("{}", site.nodes()[0].description());
        for file in [&raw, &qcow2] {
            let name = file.file_name().context("a file")?;
            fs::hard_link(file, site.files().join(name))?;
        }
        make_pool(&site).await?;
        drive::make_store(&site, "default", "images").await?;
        Ok(Self { site, raw, qcow2, before, dir })
    }

    pub fn node(&self) -> &SiteNode {
        &self.site.nodes()[0]
    }

    /// The address of a file on the file server.
    pub fn url(&self, file: &Path) -> String {
        format!("{}/plain/{}", self.site.http(), file.file_name().unwrap_or_default().to_string_lossy())
    }

    pub async fn import_http(&self, name: &str, file: &Path) -> anyhow::Result<DurableImage> {
        let source = json!({ "http": { "url": self.url(file) } });
        drive::import(&self.site, "default", name, "images", &source).await?;
        Ok(drive::wait_import(&self.site.client(), "default", name, IMPORT_LIMIT, |_| {}).await?)
    }

    /// Ends the site; nothing of it may be left on the machine.
    pub fn finish(self) -> anyhow::Result<()> {
        let Self { site, before, dir, .. } = self;
        let attached = site.stop();
        ensure!(attached.is_empty(), "still attached: {attached:?}");
        let dir = fs::canonicalize(dir.path())?;
        let left = before.settle(Duration::from_secs(10), || Snapshot::below(&dir));
        ensure!(left.is_empty(), "left behind: {left:?}");
        Ok(())
    }
}

/// Makes the pool that goes with the site's nodes.
pub async fn make_pool(site: &Site) -> anyhow::Result<()> {
    match site.kind() {
        NodeKind::Namespace => drive::make_pool(site, POOL, "1Gi").await?,
        NodeKind::Kernel => drive::make_thin_pool(site, POOL).await?,
    }
    Ok(())
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
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(length).collect()
}

/// A claim of 80 MiB.
pub fn claim(name: &str, view: View, class: &[(&str, &str)]) -> Claim {
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

/// A volume that a pod could use now.
pub struct Used {
    pub volume: Volume,
    pub staged: PathBuf,
    pub target: PathBuf,
}

/// What external-provisioner and kubelet do for a pod.
pub async fn give(node: &SiteNode, csi: &Csi, claim: &Claim) -> anyhow::Result<Used> {
    let volume = csi.create(claim).await?;
    ensure!(volume.id.starts_with("v1-"), "handle {}", volume.id);
    ensure!(volume.bytes >= claim.bytes, "{} bytes for a claim of {}", volume.bytes, claim.bytes);
    let used = Used { staged: node.staging_path(&volume.id), target: node.target_path(&volume.id), volume };
    show(csi, &used).await?;
    Ok(used)
}

/// What kubelet does for a pod, each call twice: it repeats what it has no answer to.
pub async fn show(csi: &Csi, used: &Used) -> anyhow::Result<()> {
    for _ in 0..2 {
        csi.stage(&used.volume, &used.staged).await?;
    }
    for _ in 0..2 {
        csi.publish(&used.volume, &used.staged, &used.target).await?;
    }
    Ok(())
}

/// The way back.
pub async fn take_back(csi: &Csi, used: &Used) -> anyhow::Result<()> {
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

/// Checks that a file or device of the node starts with the bytes of a file of this machine.
pub fn same_start(node: &SiteNode, longer: &Path, shorter: &Path) -> anyhow::Result<()> {
    let length = format!("--bytes={}", fs::metadata(shorter)?.len());
    node.run([OsStr::new("cmp"), length.as_ref(), longer.as_os_str(), shorter.as_os_str()])?;
    Ok(())
}

pub fn sha256(path: &Path) -> anyhow::Result<String> {
    let digest = Sha256::digest(fs::read(path)?);
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("sha256:{hex}"))
}
