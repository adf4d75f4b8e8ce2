//! The object store goes away in the middle of an import: it waits, says so, and ends well once the store is back.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use berth_api::TemplateImport;
use berth_api::conditions::{self, ConditionType};
use berth_api::template_import::{ImportState, TemplateImportStatus};
use berth_e2e::kill::store_files::StoreFiles;
use berth_e2e::site::{BUCKET, Site, SiteOptions};
use berth_e2e::wait::{self, Look};
use berth_e2e::{drive, image};
use berth_testkit::s3::fault::{FaultAction, FaultRule, write_rules};
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use crate::scenario::{Need, Scenario};

/// How long a step of an import may take on a busy machine.
const STEP_LIMIT: Duration = Duration::from_secs(120);
/// How often a fault that passes is tried again, and after how many failures the store comes back.
const RETRIES: usize = 2;
const FAILURES: usize = RETRIES + 3;

pub fn scenarios() -> Vec<Scenario> {
    let needs = [Need::SITE, &["casync", "mkfs.xfs"].map(Need::Command)].concat();
    let retried = a_failed_import_is_tried_again;
    vec![
        Scenario::new("outage::an_import_waits_for_its_store", &needs, an_import_waits_for_its_store)
            .limited(Duration::from_mins(6)),
        Scenario::new("outage::a54_a_failed_import_is_tried_again", &needs, retried),
    ]
}

/// A source that is not there fails its import; the annotation brings it back to work, once for each of its values, on a source
/// that is there by then.
async fn a_failed_import_is_tried_again() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let mut site = Site::start(SiteOptions::new(&dir.path().join("site"))).await?;
    drive::make_pool(&site, "work", "1Gi").await?;
    drive::make_store(&site, "default", "images").await?;
    begin(&site).await?;
    let imports: Api<TemplateImport> = Api::namespaced(site.client(), "default");
    let failed = |generation: i64| {
        move |status: &TemplateImportStatus| {
            let error = status.last_error.as_ref();
            status.state == Some(ImportState::Failed)
                && status.failed_generation == Some(generation)
                && error.is_some_and(|error| error.reason == "SourceNotFound" && !error.retryable)
        }
    };
    let first = until(&imports, "it to fail", failed(1)).await?;
    ensure!(first.retried.is_none(), "{first:?}");
    retry(&imports, "one").await?;
    let again = until(&imports, "it to fail again", failed(2)).await?;
    ensure!(again.retried.as_deref() == Some("one"), "{again:?}");
    site.node_mut(0).kill9();
    site.node_mut(0).start_agent()?;
    site.nodes()[0].wait_ready().await?;
    let same = imports.get("disk").await?.status.context("no status")?;
    ensure!(same.assignment == again.assignment, "the same value has acted twice: {same:?}");

    fs::write(site.files().join("disk.raw"), vec![7; 8 << 20])?;
    retry(&imports, "two").await?;
    let ready = |status: &TemplateImportStatus| status.state == Some(ImportState::Ready);
    let status = until(&imports, "it to be ready", ready).await?;
    let made = status.durable.clone().context("ready without an image")?;
    ensure!(status.last_error.is_none() && status.failed_generation.is_none(), "{status:?}");
    ensure!(status.attempts == Some(1), "attempts count anew: {:?}", status.attempts);
    same_as(&site, &made.digest, &dir.path().join("restored"))?;
    let left = site.stop();
    ensure!(left.is_empty(), "loop devices: {left:?}");
    Ok(())
}

async fn retry(imports: &Api<TemplateImport>, value: &str) -> anyhow::Result<()> {
    let body = json!({ "metadata": { "annotations": { "staging.berth.dev/retry": value } } });
    imports.patch("disk", &PatchParams::default(), &Patch::Merge(&body)).await?;
    Ok(())
}

/// Waits until the import's status is as wanted.
async fn until(
    imports: &Api<TemplateImport>,
    what: &str,
    wanted: impl Fn(&TemplateImportStatus) -> bool,
) -> anyhow::Result<TemplateImportStatus> {
    let looked = wait::until(what, STEP_LIMIT, || async {
        match imports.get("disk").await {
            Ok(import) => {
                let status = import.status.unwrap_or_default();
                if wanted(&status) { Look::Done(status) } else { Look::NotYet(format!("{status:?}")) }
            }
            Err(error) => Look::Failed(error),
        }
    });
    Ok(looked.await?)
}

async fn an_import_waits_for_its_store() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let mut site = Site::start(SiteOptions::new(&dir.path().join("site"))).await?;
    drive::make_pool(&site, "work", "1Gi").await?;
    drive::make_store(&site, "default", "images").await?;
    // 64 MiB of which no two chunks are equal.
    let raw: Vec<u8> =
        (0..64_u32 << 18).flat_map(|word| word.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    fs::write(site.files().join("disk.raw"), &raw)?;
    let data = site.dir().join("s3");
    let slow = FaultRule::new(FaultAction::Delay { ms: 300 }).op("PutObject").key_prefix("images/chunks/");
    write_rules(&data, &[slow])?;
    begin(&site).await?;

    let imports: Api<TemplateImport> = Api::namespaced(site.client(), "default");
    let uploading = |status: &TemplateImportStatus| {
        status.stage.as_ref().is_some_and(|stage| stage.name == "Upload").then_some(())
    };
    look(&imports, "the upload to begin", uploading).await?;
    site.s3_mut().kill9();
    let mut failures = BTreeSet::new();
    look(&imports, "the import to wait for its store", |status| {
        if let Some(error) = status.last_error.as_ref().filter(|_| waits(status)) {
            failures.insert(error.time.0.to_string());
        }
        (failures.len() >= FAILURES && shown(status)).then_some(())
    })
    .await?;
    let published: Vec<_> =
        StoreFiles::read(&data, BUCKET, "images")?.keys("manifests/").map(str::to_owned).collect();
    ensure!(published.is_empty(), "published without its store: {published:?}");

    write_rules(&data, &[])?;
    site.s3_mut().restart().await?;
    let made = drive::wait_import(&site.client(), "default", "disk", STEP_LIMIT, |_| {}).await?;
    let status = imports.get("disk").await?.status.context("no status")?;
    ensure!(conditions::is_true(&status.conditions, ConditionType::Durable), "{:?}", status.conditions);
    ensure!(status.last_error.is_none(), "an error of what went well: {:?}", status.last_error);
    same_as(&site, &made.digest, &dir.path().join("restored"))?;
    let left = site.stop();
    ensure!(left.is_empty(), "loop devices: {left:?}");
    Ok(())
}

async fn begin(site: &Site) -> anyhow::Result<()> {
    let import = json!({
        "apiVersion": "staging.berth.dev/v1alpha1", "kind": "TemplateImport",
        "metadata": { "name": "disk", "namespace": "default" },
        "spec": {
            "source": { "http": { "url": format!("{}/plain/disk.raw", site.http()) } },
            "store": { "name": "images" }, "limits": { "retries": RETRIES },
        },
    });
    site.apply(&import.to_string()).await?;
    Ok(())
}

/// Looks at the import's status until `wanted` is there. It must neither end nor say that it is durable meanwhile.
async fn look(
    imports: &Api<TemplateImport>,
    what: &str,
    wanted: impl FnMut(&TemplateImportStatus) -> Option<()>,
) -> anyhow::Result<()> {
    let wanted = RefCell::new(wanted);
    let looked = wait::until(what, STEP_LIMIT, || async {
        let status = match imports.get("disk").await {
            Ok(import) => import.status.unwrap_or_default(),
            Err(error) => return Look::Failed(error),
        };
        if ended(&status) {
            return Look::Done(Err(anyhow!("it ended without its store: {status:?}")));
        }
        let found = wanted.borrow_mut()(&status);
        found.map_or_else(|| Look::NotYet(format!("{status:?}")), |()| Look::Done(Ok(())))
    });
    looked.await?
}

/// True if the import has ended, or anything says that it is durable.
fn ended(status: &TemplateImportStatus) -> bool {
    let said = [ConditionType::Durable, ConditionType::Ready];
    status.durable.is_some()
        || matches!(status.state, Some(ImportState::Ready | ImportState::Failed))
        || said.iter().any(|kind| conditions::is_true(&status.conditions, *kind))
}

/// True if the node says that it waits for the store, with the store's own words.
fn waits(status: &TemplateImportStatus) -> bool {
    let reason = "ObjectStoreUnavailable";
    let told = conditions::find(&status.conditions, ConditionType::Progressing)
        .is_some_and(|told| told.status == "True" && told.reason == reason);
    let error = status.last_error.as_ref();
    told && error.is_some_and(|e| e.reason == reason && e.retryable && e.message.contains("images/"))
}

/// True if that is what the list of imports shows.
fn shown(status: &TemplateImportStatus) -> bool {
    conditions::find(&status.conditions, ConditionType::Ready)
        .is_some_and(|told| told.status == "False" && told.reason == "ObjectStoreUnavailable")
}

/// Restores the image by another implementation than ours, and compares it to the source.
fn same_as(site: &Site, digest: &str, dir: &Path) -> anyhow::Result<()> {
    let index = StoreFiles::read(&site.dir().join("s3"), BUCKET, "images")?.lay_out(digest, dir)?;
    let restored = dir.join("image.raw");
    let mut casync = Command::new("casync");
    casync.arg("extract").arg(format!("--store={}", dir.join("chunks").display()));
    image::run(casync.args([&index, &restored]))?;
    image::run(Command::new("cmp").args([&restored, &site.files().join("disk.raw")]))?;
    Ok(())
}
