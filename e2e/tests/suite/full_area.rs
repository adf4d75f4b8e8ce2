//! An area whose free space somebody else has taken behind Berth's back: what is promised cannot be written. That is told as the
//! defect that it is, with numbers, leaves nothing half done, and passes with its cause.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_api::conditions::{ConditionType, find};
use berth_api::template_import::ImportState;
use berth_api::{StagedImage, TemplateImport};
use berth_e2e::csi::View;
use berth_e2e::drive;
use berth_e2e::site::{NodeKind, S3Kind, SiteNode};
use berth_e2e::wait::{self, Look};
use kube::Api;
use kube::api::{DeleteParams, ListParams};
use kube::core::ResourceExt as _;
use serde_json::json;

use crate::remains::nothing_remains;
use crate::scenario::Scenario;
use crate::scene::{self, IMPORT_LIMIT, POOL, RAW, Scene, claim, give, same_start, take_back};

/// What is left free: less than the data of the image that comes.
const LEFT: u64 = 4 << 20;
/// How long it may take until the defect is told, and until what is given up is gone.
const TOLD_LIMIT: Duration = Duration::from_secs(90);
const REASON: &str = "SpacePromiseBroken";

pub fn scenarios() -> Vec<Scenario> {
    let needs = scene::needs(NodeKind::Namespace);
    vec![
        Scenario::new(
            "full_area::a49_a_broken_promise_is_told_with_numbers_and_passes_with_its_cause",
            &needs,
            a_broken_promise_is_told_with_numbers_and_passes_with_its_cause,
        )
        .limited(Duration::from_mins(6)),
    ]
}

/// A file in the area that nobody promised, as large as leaves [`LEFT`].
struct Eaten<'n> {
    node: &'n SiteNode,
    path: PathBuf,
}

impl<'n> Eaten<'n> {
    fn all_but_a_little(node: &'n SiteNode) -> anyhow::Result<Self> {
        let root = node.pool_root(POOL);
        let words = ["stat", "-f", "-c", "%a %S"].map(OsStr::new);
        let told = String::from_utf8(node.run(words.into_iter().chain([root.as_os_str()]))?)?;
        let mut numbers = told.split_whitespace().map(str::parse::<u64>);
        let (blocks, size) =
            (numbers.next().context("free blocks")??, numbers.next().context("their size")??);
        let taken = (blocks * size).checked_sub(LEFT).context("less is free than is to be left")?;
        let path = root.join("eaten");
        let length = taken.to_string();
        node.run([OsStr::new("fallocate"), OsStr::new("-l"), OsStr::new(&length), path.as_os_str()])?;
        Ok(Self { node, path })
    }

    fn give_back(self) -> anyhow::Result<()> {
        self.node.run([OsStr::new("rm"), self.path.as_os_str()])?;
        Ok(())
    }
}

async fn a_broken_promise_is_told_with_numbers_and_passes_with_its_cause() -> anyhow::Result<()> {
    let scene = Scene::start(S3Kind::Test, NodeKind::Namespace).await?;
    let node = scene.node();
    ensure!(defects(node).await? == 0, "none yet");

    let eaten = Eaten::all_but_a_little(node)?;
    an_import_is_told_and_leaves_nothing(&scene).await?;
    let after_import = defects(node).await?;
    ensure!(after_import > 0, "not counted");
    eaten.give_back()?;

    scene.import_http("disk", &scene.qcow2).await?;
    let eaten = Eaten::all_but_a_little(node)?;
    let csi = node.csi();
    let asked = claim("kept", View::Block, RAW);
    let staging = async {
        let said = staging_is_told(&scene).await?;
        eaten.give_back()?;
        Ok(said)
    };
    let (used, said) = tokio::try_join!(give(node, &csi, &asked), staging)?;
    println!("staging: {said}");
    ensure!(defects(node).await? > after_import, "not counted");
    same_start(node, &used.target, &scene.raw)?;

    take_back(&csi, &used).await?;
    let images: Api<StagedImage> = Api::all(scene.site.client());
    for image in images.list(&ListParams::default()).await?.items {
        images.delete(&image.name_any(), &DeleteParams::default()).await?;
    }
    let imports: Api<TemplateImport> = Api::namespaced(scene.site.client(), "default");
    imports.delete("disk", &DeleteParams::default()).await?;
    nothing_remains(&scene.site).await?;
    scene.finish()
}

/// An import ends with the reason and the numbers; nothing of it is left, although the area is as full as it was.
async fn an_import_is_told_and_leaves_nothing(scene: &Scene) -> anyhow::Result<()> {
    let imports: Api<TemplateImport> = Api::namespaced(scene.site.client(), "default");
    // A server without ranges: what it sends has to be staged.
    let url = scene.url(&scene.raw).replacen("/plain/", "/noranges/", 1);
    let source = json!({ "http": { "url": url } });
    drive::import(&scene.site, "default", "broken", "images", &source).await?;
    let error = wait::until("the import to end", IMPORT_LIMIT, || async {
        match imports.get("broken").await.map(|import| import.status.unwrap_or_default()) {
            Ok(status) if status.state == Some(ImportState::Failed) => Look::Done(status.last_error),
            Ok(status) => Look::NotYet(format!("{:?}: {:?}", status.state, status.last_error)),
            Err(error) => Look::Failed(error),
        }
    })
    .await?
    .context("no error")?;
    ensure!(error.reason == REASON, "{error:?}");
    has_numbers(&error.message)?;
    println!("import: {}", error.message);
    imports.delete("broken", &DeleteParams::default()).await?;
    let staging = scene.node().pool_root(POOL).join("staging");
    wait::until("the work directory to be gone", TOLD_LIMIT, || async {
        match scene.node().names(&staging) {
            Ok(left) if left.is_empty() => Look::Done(()),
            Ok(left) => Look::NotYet(format!("{left:?}")),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    Ok(())
}

/// What is said of an image that finds no space.
async fn staging_is_told(scene: &Scene) -> anyhow::Result<String> {
    let images: Api<StagedImage> = Api::all(scene.site.client());
    let said = wait::until("the staged image to say why", TOLD_LIMIT, || async {
        let conditions = match images.list(&ListParams::default()).await {
            Ok(list) => list
                .items
                .into_iter()
                .filter_map(|image| image.status)
                .flat_map(|s| s.conditions)
                .collect::<Vec<_>>(),
            Err(error) => return Look::Failed(error),
        };
        match find(&conditions, ConditionType::Ready) {
            Some(ready) if ready.reason == REASON => Look::Done(ready.message.clone()),
            other => Look::NotYet(format!("{other:?}")),
        }
    })
    .await?;
    has_numbers(&said)?;
    Ok(said)
}

/// Promised, written, free.
fn has_numbers(message: &str) -> anyhow::Result<()> {
    for part in [" promised, ", " of them used; the pool has ", " free"] {
        ensure!(message.contains(part), "`{part}` is not in: {message}");
    }
    Ok(())
}

/// How many defects of space the node has counted.
async fn defects(node: &SiteNode) -> anyhow::Result<u64> {
    let text = node.metrics().await?;
    let mine = text.lines().find(|line| line.starts_with("berth_node_space_defects_total{"));
    mine.map_or(Ok(0), |line| Ok(line.rsplit(' ').next().context("a number")?.parse()?))
}
