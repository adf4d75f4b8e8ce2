//! Transfers as a user makes them: out of an image store in every format, from store to store, paused, moved and given up.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_api::conditions::{self, ConditionType};
use berth_api::fields::PlannedStaging;
use berth_api::image_transfer::{ImageTransferStatus, TransferState};
use berth_api::{ImageTransfer, StagingReservation};
use berth_e2e::drive;
use berth_e2e::leaks;
use berth_e2e::site::{BUCKET, NodeKind, S3Kind, Site, SiteOptions};
use berth_e2e::wait::{self, Look};
use berth_testkit::s3::fault::{FaultAction, FaultRule, write_rules};
use berth_testkit::s3::log::RequestLog;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::remains::nothing_remains;
use crate::scenario::Scenario;
use crate::scene::{self, POOL, Scene, noise};

/// How long a transfer of a small image may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);
/// How long it takes at most until a node is known to be gone, and its work is elsewhere.
const MOVED: Duration = Duration::from_secs(240);

pub fn scenarios() -> Vec<Scenario> {
    let needs = scene::needs(NodeKind::Namespace);
    let long = Duration::from_mins(6);
    vec![
        Scenario::new("transfers::every_format_there_and_back", &needs, every_format_there_and_back)
            .limited(long),
        Scenario::new("transfers::b23_paused_gone_on_with_and_given_up", &needs, paused_and_given_up),
        Scenario::new(
            "transfers::a36_one_that_fails_leaves_nothing_and_is_tried_again",
            &needs,
            fails_and_is_tried_again,
        ),
        Scenario::new("transfers::b22_another_node_goes_on", &needs, another_node_goes_on).limited(long),
    ]
}

/// What the tests do with transfers in `default`.
struct Asker<'a> {
    site: &'a Site,
    dir: &'a Path,
    transfers: Api<ImageTransfer>,
}

impl<'a> Asker<'a> {
    fn new(site: &'a Site, dir: &'a Path) -> Self {
        Self { site, dir, transfers: Api::namespaced(site.client(), "default") }
    }

    fn object(&self, key: &str) -> Value {
        json!({ "s3": {
            "endpoint": self.site.s3_endpoint(), "bucket": BUCKET, "key": key, "secretRef": { "name": "images-s3" },
        } })
    }

    async fn ask(&self, name: &str, spec: Value) -> anyhow::Result<()> {
        let object = json!({
            "apiVersion": "staging.berth.dev/v1alpha1", "kind": "ImageTransfer",
            "metadata": { "name": name, "namespace": "default" }, "spec": spec,
        });
        self.site.apply(&object.to_string()).await?;
        Ok(())
    }

    async fn until(
        &self,
        what: &str,
        name: &str,
        limit: Duration,
        wanted: impl Fn(&ImageTransferStatus) -> bool,
    ) -> anyhow::Result<ImageTransferStatus> {
        let what = format!("transfer {name} to be {what}");
        let status = wait::until(&what, limit, || async {
            match self.transfers.get(name).await {
                Ok(found) => {
                    let status = found.status.unwrap_or_default();
                    if wanted(&status) { Look::Done(status) } else { Look::NotYet(format!("{status:?}")) }
                }
                Err(error) => Look::Failed(error),
            }
        });
        Ok(status.await?)
    }

    async fn ended(&self, name: &str, limit: Duration) -> anyhow::Result<ImageTransferStatus> {
        let ended = |status: &ImageTransferStatus| {
            matches!(status.state, Some(TransferState::Succeeded | TransferState::Failed))
        };
        self.until("ended", name, limit, ended).await
    }

    async fn succeeded(&self, name: &str, limit: Duration) -> anyhow::Result<ImageTransferStatus> {
        let status = self.ended(name, limit).await?;
        ensure!(status.state == Some(TransferState::Succeeded), "{name}: {status:?}");
        for kind in [ConditionType::Succeeded, ConditionType::Durable] {
            ensure!(conditions::is_true(&status.conditions, kind), "{name}: {:?}", status.conditions);
        }
        Ok(status)
    }

    async fn suspend(&self, name: &str, suspend: bool) -> anyhow::Result<()> {
        let patch = Patch::Merge(json!({ "spec": { "suspend": suspend } }));
        self.transfers.patch(name, &PatchParams::default(), &patch).await?;
        Ok(())
    }

    async fn delete(&self, name: &str) -> anyhow::Result<()> {
        self.transfers.delete(name, &DeleteParams::default()).await?;
        let gone = wait::until("the transfer to be gone", LIMIT, || async {
            match self.transfers.get_opt(name).await {
                Ok(None) => Look::Done(()),
                Ok(Some(found)) => Look::NotYet(format!("{:?}", found.status)),
                Err(error) => Look::Failed(error),
            }
        });
        Ok(gone.await?)
    }

    /// The object as a raw disk, read by another client and another program than ours.
    async fn disk(&self, key: &str, driver: &str) -> anyhow::Result<PathBuf> {
        let file = self.dir.join(key.replace('/', "-"));
        self.site.s3().fetch(key, &file).await?;
        let raw = file.with_extension("as-raw");
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-f", driver, "-O", "raw"]).args([&file, &raw]);
        ensure!(command.status()?.success(), "qemu-img cannot read {key}");
        Ok(raw)
    }

    async fn is_disk(&self, key: &str, driver: &str, disk: &Path) -> anyhow::Result<()> {
        let found = fs::read(self.disk(key, driver).await?)?;
        let expected = fs::read(disk)?;
        // A format may only know sizes that are a little larger.
        ensure!(found.len() >= expected.len(), "{key} has {} bytes", found.len());
        let (same, more) = found.split_at(expected.len());
        ensure!(same == expected && more.iter().all(|byte| *byte == 0), "{key} holds something else");
        Ok(())
    }

    fn log(&self) -> anyhow::Result<RequestLog> {
        Ok(RequestLog::read(&self.site.dir().join("s3/requests.jsonl"))?)
    }
}

async fn every_format_there_and_back() -> anyhow::Result<()> {
    let scene = Scene::start(S3Kind::Test, NodeKind::Namespace).await?;
    let template = scene.import_http("disk", &scene.raw).await?;
    drive::make_store(&scene.site, "default", "archive").await?;
    let asker = Asker::new(&scene.site, scene.dir.path());
    let stored = json!({ "storeImage": { "store": "images", "image": "disk" } });
    let formats = [
        ("raw", json!({ "destination": "Raw" })),
        ("qcow2", json!({ "destination": "Qcow2", "compression": "Zstd" })),
        ("vmdk", json!({ "destination": "Vmdk" })),
        ("vpc", json!({ "destination": "Vhd" })),
    ];
    for (driver, format) in &formats {
        let key = format!("exports/disk.{driver}");
        asker
            .ask(driver, json!({ "source": stored, "destination": asker.object(&key), "format": format }))
            .await?;
    }
    let copy = json!({ "storeImage": { "store": "archive", "image": "disk-copy" } });
    asker.ask("copy", json!({ "source": stored, "destination": copy })).await?;
    for (driver, _) in &formats {
        let status = asker.succeeded(driver, LIMIT).await?;
        let plan = status.plan.context("no plan")?;
        ensure!(plan.staging == Some(PlannedStaging::Direct) && plan.peak_bytes == 0, "{plan:?}");
        let result = status.result.context("no result")?;
        ensure!(result.virtual_size == template.virtual_size, "{result:?}");
        ensure!(result.source_digest.as_deref() == Some(&template.digest), "{result:?}");
        asker.is_disk(&format!("exports/disk.{driver}"), driver, &scene.raw).await?;
    }
    let copied = asker.succeeded("copy", LIMIT).await?.result.context("no result")?;
    ensure!(copied.digest.as_deref() == Some(&template.digest), "{copied:?}");

    from_files(&scene, &asker).await?;
    back_from_its_copy(&scene, &asker).await?;
    for name in ["raw", "qcow2", "vmdk", "vpc", "copy", "direct", "staged", "again"] {
        asker.delete(name).await?;
    }
    asker.delete("never").await?;
    asker.is_disk("exports/disk.vmdk", "vmdk", &scene.raw).await.context("the object stays")?;
    ensure!(asker.log()?.open_uploads().is_empty(), "uploads stay: {:?}", asker.log()?.open_uploads());
    drive_away(&scene).await?;
    nothing_remains(&scene.site).await?;
    scene.finish()
}

/// What no finished scene has any more: the template.
async fn drive_away(scene: &Scene) -> anyhow::Result<()> {
    let imports: Api<berth_api::TemplateImport> = Api::namespaced(scene.site.client(), "default");
    imports.delete("disk", &DeleteParams::default()).await?;
    Ok(())
}

/// Files behind addresses: one that is read where it lies, one that has to be staged, and the same where it must not be.
async fn from_files(scene: &Scene, asker: &Asker<'_>) -> anyhow::Result<()> {
    let sum = scene::sha256(&scene.raw)?;
    let (raw, qcow2) = (
        json!({ "http": { "url": scene.url(&scene.raw) } }),
        json!({ "http": { "url": scene.url(&scene.qcow2) } }),
    );
    let format = json!({ "destination": "Raw" });
    let direct = json!({
        "source": raw, "destination": asker.object("exports/direct"), "format": format, "checksum": sum, "staging": "Never",
    });
    asker.ask("direct", direct).await?;
    asker
        .ask(
            "staged",
            json!({
                "source": qcow2, "destination": asker.object("exports/staged"), "format": format, "staging": "Required",
            }),
        )
        .await?;
    let ranges = json!({ "source": qcow2, "destination": asker.object("exports/ranges"), "format": format });
    asker.ask("ranges", ranges).await?;
    let never = json!({
        "source": qcow2, "destination": asker.object("exports/never"), "format": format, "staging": "Never",
        "checksum": scene::sha256(&scene.qcow2)?,
    });
    asker.ask("never", never).await?;
    let status = asker.succeeded("direct", LIMIT).await?;
    ensure!(status.plan.is_some_and(|plan| plan.peak_bytes == 0), "nothing is staged of it");
    ensure!(status.result.and_then(|result| result.source_digest) == Some(sum), "another sum");
    asker.is_disk("exports/direct", "raw", &scene.raw).await?;
    let plan = asker.succeeded("staged", LIMIT).await?.plan.context("no plan")?;
    ensure!(plan.staging == Some(PlannedStaging::Staged) && plan.peak_bytes > 0, "{plan:?}");
    asker.is_disk("exports/staged", "raw", &scene.raw).await?;
    let plan = asker.succeeded("ranges", LIMIT).await?.plan.context("no plan")?;
    ensure!(plan.staging == Some(PlannedStaging::Direct) && plan.peak_bytes == 0, "{plan:?}");
    asker.is_disk("exports/ranges", "raw", &scene.raw).await?;
    let status = asker.ended("never", LIMIT).await?;
    let error = status.last_error.context("no error")?;
    ensure!(status.state == Some(TransferState::Failed) && error.reason == "StagingNotAllowed", "{error:?}");
    ensure!(error.message.contains("spec.staging"), "{}", error.message);
    Ok(())
}

/// What was copied to another store is an image like any other.
async fn back_from_its_copy(scene: &Scene, asker: &Asker<'_>) -> anyhow::Result<()> {
    let source = json!({ "storeImage": { "store": "archive", "image": "disk-copy" } });
    let format = json!({ "destination": "Qcow2" });
    asker
        .ask(
            "again",
            json!({ "source": source, "destination": asker.object("exports/again"), "format": format }),
        )
        .await?;
    asker.succeeded("again", LIMIT).await?;
    asker.is_disk("exports/again", "qcow2", &scene.raw).await
}

/// Makes every part late, so that there is time to look.
fn slowly(site: &Site) -> anyhow::Result<()> {
    let late = FaultRule::new(FaultAction::Delay { ms: 1500 }).op("UploadPart");
    Ok(write_rules(&site.dir().join("s3"), &[late])?)
}

/// A raw disk of 256 MiB on the file server.
fn large_disk(site: &Site, dir: &Path) -> anyhow::Result<PathBuf> {
    let disk = dir.join("large.raw");
    fs::write(&disk, noise(256 << 20))?;
    fs::hard_link(&disk, site.files().join("large.raw"))?;
    Ok(disk)
}

/// Waits until there are so many reservations.
async fn reservations_are(site: &Site, wanted: usize) -> anyhow::Result<()> {
    let reservations: Api<StagingReservation> = Api::namespaced(site.client(), "default");
    let what = format!("{wanted} reservations");
    let looked = wait::until(&what, LIMIT, || async {
        match reservations.list(&ListParams::default()).await {
            Ok(list) if list.items.len() == wanted => Look::Done(()),
            Ok(list) => Look::NotYet(format!("{:?}", list.items)),
            Err(error) => Look::Failed(error),
        }
    });
    Ok(looked.await?)
}

async fn paused_and_given_up() -> anyhow::Result<()> {
    let scene = Scene::start(S3Kind::Test, NodeKind::Namespace).await?;
    let asker = Asker::new(&scene.site, scene.dir.path());
    let disk = large_disk(&scene.site, scene.dir.path())?;
    slowly(&scene.site)?;
    let (source, format) = (json!({ "http": { "url": scene.url(&disk) } }), json!({ "destination": "Raw" }));
    for name in ["pauses", "goes"] {
        let key = format!("exports/{name}");
        asker
            .ask(name, json!({ "source": source, "destination": asker.object(&key), "format": format }))
            .await?;
    }
    let begun = |status: &ImageTransferStatus| {
        status.progress.as_ref().is_some_and(|progress| progress.bytes_on_wire >= 32 << 20)
    };
    asker.until("begun", "pauses", LIMIT, begun).await?;
    asker.suspend("pauses", true).await?;
    let paused = |status: &ImageTransferStatus| status.state == Some(TransferState::Suspended);
    asker.until("paused", "pauses", LIMIT, paused).await?;
    asker.until("begun", "goes", LIMIT, begun).await?;
    asker.delete("goes").await?;
    let log = asker.log()?;
    ensure!(log.open_uploads().len() == 1, "one upload stays, of what pauses: {:?}", log.open_uploads());
    reservations_are(&scene.site, 1).await.context("that of what pauses stays, the other goes")?;
    let sent = log.last_seq();
    tokio::time::sleep(Duration::from_secs(4)).await;
    ensure!(
        asker.log()?.after(sent).succeeded("UploadPart").count() == 0,
        "something is sent while it pauses"
    );
    write_rules(&scene.site.dir().join("s3"), &[])?;
    asker.suspend("pauses", false).await?;
    asker.succeeded("pauses", LIMIT).await?;
    asker.is_disk("exports/pauses", "raw", &disk).await?;
    let again: u64 = asker.log()?.repeated_parts().values().map(|repeats| repeats.bytes).sum();
    ensure!(again <= 32 << 20, "{again} bytes were sent again");
    ensure!(asker.disk("exports/goes", "raw").await.is_err(), "what was given up is there");
    asker.delete("pauses").await?;
    nothing_remains(&scene.site).await?;
    scene.finish()
}

/// A destination refuses what was staged for it: the space comes back, the source is as it was, and a person has it tried again.
async fn fails_and_is_tried_again() -> anyhow::Result<()> {
    let scene = Scene::start(S3Kind::Test, NodeKind::Namespace).await?;
    let asker = Asker::new(&scene.site, scene.dir.path());
    let data = scene.site.dir().join("s3");
    write_rules(&data, &[FaultRule::new(FaultAction::Deny).op("UploadPart").key_prefix("exports/")])?;
    let before = fs::read(&scene.qcow2)?;
    let spec = json!({
        "source": { "http": { "url": scene.url(&scene.qcow2) } }, "destination": asker.object("exports/denied"),
        "format": { "destination": "Raw" }, "staging": "Required",
    });
    asker.ask("denied", spec).await?;
    let status = asker.ended("denied", LIMIT).await?;
    let error = status.last_error.context("no error")?;
    ensure!(status.state == Some(TransferState::Failed) && error.reason == "ObjectStoreDenied", "{error:?}");
    reservations_are(&scene.site, 0).await?;
    let staged = scene.node().names(&scene.node().pool_root(POOL).join("staging"))?;
    ensure!(staged.is_empty() && asker.log()?.open_uploads().is_empty(), "left: {staged:?}");
    ensure!(fs::read(&scene.qcow2)? == before, "the source is another");
    write_rules(&data, &[])?;
    let again = Patch::Merge(json!({ "metadata": { "annotations": { "staging.berth.dev/retry": "1" } } }));
    asker.transfers.patch("denied", &PatchParams::default(), &again).await?;
    let is_done = |status: &ImageTransferStatus| status.state == Some(TransferState::Succeeded);
    asker.until("done after all", "denied", LIMIT, is_done).await?;
    asker.is_disk("exports/denied", "raw", &scene.raw).await?;
    asker.delete("denied").await?;
    nothing_remains(&scene.site).await?;
    scene.finish()
}

async fn another_node_goes_on() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let mut options = SiteOptions::new(&dir.path().join("site"));
    options.nodes = 2;
    let mut site = Site::start(options).await?;
    drive::make_pool(&site, POOL, "512Mi").await?;
    site.give_credentials("default", "images-s3").await?;
    let disk = large_disk(&site, dir.path())?;
    slowly(&site)?;
    let url = format!("{}/plain/large.raw", site.http());
    let asker = Asker::new(&site, dir.path());
    let spec = json!({
        "source": { "http": { "url": url } }, "destination": asker.object("exports/moves"),
        "format": { "destination": "Raw" },
    });
    asker.ask("moves", spec).await?;
    let begun = |status: &ImageTransferStatus| {
        status.resume.is_some() && status.progress.as_ref().is_some_and(|p| p.bytes_on_wire >= 64 << 20)
    };
    let status = asker.until("begun", "moves", LIMIT, begun).await?;
    let first = status.assignment.context("no assignment")?.node;
    let index = site.nodes().iter().position(|node| node.name() == first).context("no such node")?;
    site.node_mut(index).kill9();
    write_rules(&site.dir().join("s3"), &[])?;
    let asker = Asker::new(&site, dir.path());
    let status = asker.succeeded("moves", MOVED).await?;
    ensure!(status.assignment.is_some_and(|now| now.node != first), "it was not moved");
    asker.is_disk("exports/moves", "raw", &disk).await?;
    let log = asker.log()?;
    ensure!(log.succeeded("CreateMultipartUpload").count() == 1, "it is another upload");
    let again: u64 = log.repeated_parts().values().map(|repeats| repeats.bytes).sum();
    // A window, and what was sent in the two seconds in which nothing is told.
    ensure!(again <= 64 << 20, "{again} bytes were sent again");
    asker.delete("moves").await?;
    site.node_mut(index).start_agent()?;
    site.nodes()[index].wait_ready().await?;
    ensure!(site.stop().is_empty(), "a loop device stays");
    ensure!(leaks::loops_below(dir.path()).is_empty(), "{:?}", leaks::loops_below(dir.path()));
    Ok(())
}
