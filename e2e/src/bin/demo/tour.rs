//! The quickstart, step by step.

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_api::StagingPool;
use berth_api::template_import::{DurableImage, TemplateImportStatus};
use berth_e2e::csi::{Claim, Csi, View, Volume};
use berth_e2e::drive;
use berth_e2e::site::{Site, SiteNode, SiteOptions};
use kube::Api;

use crate::debian;
use crate::screen::{Screen, Step, size};

/// How long an import may take.
const IMPORT_LIMIT: Duration = Duration::from_secs(1800);

/// What the examples say that this demonstration replaces.
const POOL_PATH: &str = "/var/lib/berth/areas/quickstart";
const STORE_ENDPOINT: &str = "http://127.0.0.1:9000";
const SOURCE_URL: &str = "http://127.0.0.1:8000/plain/debian.qcow2";
const ACCESS_KEY: &str = "accessKeyId: quickstart ";
const SECRET_KEY: &str = "secretKey: quickstart-secret";

/// A volume in use.
struct Used {
    volume: Volume,
    staged: PathBuf,
    target: PathBuf,
}

/// All of it, from nothing to nothing. `keeping` is true while it only waits for Ctrl-C or SIGTERM.
pub async fn run(screen: &Screen, dir: &Path, kept: &Path, keeping: &Cell<bool>) -> anyhow::Result<()> {
    screen.headline("A disk image");
    let asked = std::env::var("DEMO_IMAGE").ok().filter(|image| !image.is_empty());
    let file = match &asked {
        Some(url) if url.starts_with("http://") || url.starts_with("https://") => None,
        Some(path) => Some(PathBuf::from(path)),
        None => Some(debian::obtain(screen, kept)?),
    };

    screen.headline("A cluster on this machine");
    let step = screen.step("etcd, kube-apiserver, S3 server, file server, operator and one node");
    let site = Site::start(SiteOptions::new(&dir.join("site"))).await?;
    step.done("");
    let url = match (&file, asked) {
        (Some(file), _) => serve(&site, file)?,
        (None, url) => url.context("an address")?,
    };

    screen.headline("The examples of examples/quickstart, with this cluster's addresses and keys");
    let class = apply_examples(screen, &site, &url).await?;
    let made = import(screen, &site).await?;

    screen.headline("Volumes (kubelet and external-provisioner are played by a small CSI client)");
    let node = &site.nodes()[0];
    let csi = node.csi();
    let (first, first_took) = give(screen, node, &csi, &class, "first").await?;
    show_content(screen, node, &first)?;
    let (second, second_took) = give(screen, node, &csi, &class, "second").await?;
    show_sizes(screen, &site, &made, [first_took, second_took]).await?;
    show_commands(screen, &site, node, &first);
    if std::env::var("DEMO_KEEP").is_ok_and(|keep| !keep.is_empty() && keep != "0") {
        screen.line("\n  Everything stays until Ctrl-C.");
        keeping.set(true);
        while keeping.get() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    screen.headline("And back");
    let step = screen.step("both volumes unpublished, unstaged and deleted");
    for used in [&first, &second] {
        csi.unpublish(&used.volume, &used.target).await?;
        csi.unstage(&used.volume, &used.staged).await?;
        csi.delete(&used.volume.id).await?;
    }
    step.done("");
    let step = screen.step("everything stopped");
    let attached = tokio::task::spawn_blocking(move || site.stop()).await?;
    ensure!(attached.is_empty(), "still attached: {attached:?}");
    step.done("");
    Ok(())
}

/// Gives the file server the image, and returns its address.
fn serve(site: &Site, file: &Path) -> anyhow::Result<String> {
    let name = file
        .file_name()
        .context("DEMO_IMAGE names no file")?
        .to_string_lossy()
        .replace([' ', '%', '?', '#'], "_");
    let served = site.files().join(&name);
    if fs::hard_link(file, &served).is_err() {
        fs::copy(file, &served).with_context(|| format!("failed to copy {}", file.display()))?;
    }
    Ok(format!("{}/plain/{name}", site.http()))
}

/// Applies the examples in their order; returns the parameters of the `StorageClass`.
async fn apply_examples(screen: &Screen, site: &Site, url: &str) -> anyhow::Result<HashMap<String, String>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/quickstart");
    let pool = site.pool_path("quickstart").to_string_lossy().into_owned();
    let access_key = format!("accessKeyId: {} ", site.s3().access_key());
    let secret_key = format!("secretKey: {}", site.s3().secret_key());
    let endpoint = site.s3_endpoint();
    let applied = async |name: &str, replaced: &[(&str, &str)]| -> anyhow::Result<_> {
        let path = folder.join(name);
        let mut text =
            fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
        for (old, new) in replaced {
            ensure!(text.contains(old), "{name} does not say `{old}` any more");
            text = text.replace(old, new);
        }
        let step = screen.step(name);
        Ok((site.apply(&text).await?, step))
    };
    let (_, step) = applied("01-pool.yaml", &[(POOL_PATH, &pool)]).await?;
    drive::wait_pool(&site.client(), "quickstart", 1).await?;
    step.done("pool ready: a preallocated XFS image, so the bound is enforced");
    // What whoever owns the namespace does once: charts/berth/files/rbac/node-secret-example.yaml.
    site.let_nodes_read("default", &["images-s3"]).await?;
    let keys = [(ACCESS_KEY, access_key.as_str()), (SECRET_KEY, &secret_key), (STORE_ENDPOINT, &endpoint)];
    let (_, step) = applied("02-store.yaml", &keys).await?;
    drive::wait_store(&site.client(), "default", "images").await?;
    step.done("image store ready: probed from the node");
    let (_, step) = applied("03-template.yaml", &[(SOURCE_URL, url)]).await?;
    step.done(url);
    let (stored, step) = applied("04-storageclass.yaml", &[]).await?;
    step.done("");
    let class = stored.first().context("no StorageClass")?;
    let mut class: HashMap<String, String> = serde_json::from_value(class.data["parameters"].clone())?;
    if let Ok(partition) = std::env::var("DEMO_PARTITION") {
        class.insert("partition".to_owned(), partition);
    }
    Ok(class)
}

async fn import(screen: &Screen, site: &Site) -> anyhow::Result<DurableImage> {
    let mut step = screen.meter("import default/debian");
    let mut planned = false;
    let show = |status: &TemplateImportStatus| {
        if let Some(plan) = status.plan.as_ref().filter(|_| !planned) {
            planned = true;
            let (source, disk) = (unsigned(plan.source_bytes), unsigned(plan.virtual_size));
            step.says(&format!("{} of {}, a disk of {}", size(source), plan.format, size(disk)));
        }
        show_progress(&mut step, status);
    };
    let made = drive::wait_import(&site.client(), "default", "debian", IMPORT_LIMIT, show).await?;
    step.done(&format!("durable as {}", made.digest));
    Ok(made)
}

fn show_progress(step: &mut Step, status: &TemplateImportStatus) {
    let Some(progress) = &status.progress else { return };
    let stage = status.stage.as_ref().map_or("", |stage| stage.name.as_str());
    let total = progress.bytes_total.map_or(String::new(), |total| format!(" of {}", size(unsigned(total))));
    let rate =
        if progress.rate > 0 { format!(", {}/s", size(unsigned(progress.rate))) } else { String::new() };
    let text = format!("{stage}: {}{total}{rate}", size(unsigned(progress.bytes_done)));
    step.at(u64::try_from(progress.percent.unwrap_or(0)).unwrap_or(0), &text);
}

/// What external-provisioner and kubelet do for a pod.
async fn give(
    screen: &Screen,
    node: &SiteNode,
    csi: &Csi,
    class: &HashMap<String, String>,
    name: &str,
) -> anyhow::Result<(Used, Duration)> {
    let step = screen.step(&format!("volume `{name}`, made, staged and mounted"));
    let claim = Claim {
        volume: format!("pvc-{name}"),
        namespace: "default".to_owned(),
        name: name.to_owned(),
        bytes: 0,
        view: View::Filesystem,
        parameters: class.clone(),
    };
    step.says("CreateVolume");
    let volume = csi.create(&claim).await?;
    let (staged, target) = (node.staging_path(&volume.id), node.target_path(&volume.id));
    step.says("NodeStageVolume");
    csi.stage(&volume, &staged).await?;
    step.says("NodePublishVolume");
    csi.publish(&volume, &staged, &target).await?;
    let took = step.done(&format!("{}, {}", volume.id, size(volume.bytes)));
    Ok((Used { volume, staged, target }, took))
}

fn show_content(screen: &Screen, node: &SiteNode, used: &Used) -> anyhow::Result<()> {
    let root = &used.target;
    screen.line("  /etc/os-release, read inside the volume:");
    // In an image it may be a symbolic link that is absolute: it must not be followed out of the volume.
    let release = [root.join("etc/os-release"), root.join("usr/lib/os-release")];
    let file = r#"[ ! -L "$1" ] && [ -f "$1" ]"#;
    let is_file = |path: &Path| {
        let words = ["sh", "-c", file, "sh"].map(OsStr::new);
        node.run(words.into_iter().chain([path.as_os_str()])).is_ok()
    };
    match release.iter().find(|path| is_file(path)) {
        Some(path) => {
            for line in String::from_utf8_lossy(&node.read(path)?).lines().take(4) {
                screen.line(&format!("    {line}"));
            }
        }
        None => screen.line("    (there is none)"),
    }
    let probe = root.join("written-by-the-demonstration");
    node.write(&probe, b"the volume is writable\n").context("the volume is not writable")?;
    screen.line("  and a file was written to it");
    Ok(())
}

async fn show_sizes(
    screen: &Screen,
    site: &Site,
    made: &DurableImage,
    took: [Duration; 2],
) -> anyhow::Result<()> {
    let pools: Api<StagingPool> = Api::all(site.client());
    let pool = pools.get("quickstart").await?.status.unwrap_or_default().capacity;
    screen.headline("Sizes and times");
    for (what, value) in [
        ("disk", size(unsigned(made.virtual_size))),
        ("of it not holes", size(unsigned(made.real_size))),
        ("in the bucket, compressed", format!("{} in {} chunks", size(unsigned(made.size)), made.chunks)),
        ("pool: total", size(unsigned(pool.total))),
        ("pool: promised", size(unsigned(pool.promised))),
        ("pool: used", size(unsigned(pool.used))),
        ("first volume, image staged from the bucket", format!("{:.1} s", took[0].as_secs_f32())),
        ("second volume, image there already", format!("{:.1} s", took[1].as_secs_f32())),
    ] {
        screen.line(&format!("  {what:<44} {value}"));
    }
    Ok(())
}

fn show_commands(screen: &Screen, site: &Site, node: &SiteNode, used: &Used) {
    screen.headline("To try next, while it runs (DEMO_KEEP=1 make demo)");
    screen.line(&format!("  export KUBECONFIG={}", site.cluster().admin_kubeconfig().display()));
    for command in [
        "kubectl get berth -A",
        "kubectl get stagingpool quickstart -o yaml",
        "kubectl describe templateimport debian",
        "kubectl get stagingledger -o yaml",
        "kubectl get events -A",
    ] {
        screen.line(&format!("  {command}"));
    }
    let namespace = node.namespace_argument().unwrap_or_default();
    screen.line(&format!("  nsenter {namespace} ls {}", used.target.display()));
}

/// Sizes in status are never negative.
fn unsigned(bytes: i64) -> u64 {
    u64::try_from(bytes).unwrap_or_default()
}
