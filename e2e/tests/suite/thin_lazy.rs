//! A cluster whose node shows images before they are there: with a supervisor on a host with a kernel of its own, and seen from
//! outside, by the object store's log and by what volumes hold.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_api::staged_image::StagedImageHealth;
use berth_api::{StagedImage, TemplateImport};
use berth_e2e::csi::View;
use berth_e2e::process::Program;
use berth_e2e::site::{NodeKind, Programs, S3Kind, Started};
use berth_e2e::wait::{self, Look};
use berth_testkit::s3::fault::{FaultAction, FaultRule, write_rules};
use berth_testkit::s3::log::RequestLog;
use kube::Api;
use kube::api::{DeleteParams, ListParams};
use kube::core::ResourceExt as _;

use crate::remains::nothing_remains;
use crate::scenario::{Need, Scenario};
use crate::scene::{self, RAW, Scene, Used, claim, give, same_start, take_back};

/// How long an image may take to become local on a busy machine, and anything else that is waited for.
const LIMIT: Duration = Duration::from_secs(240);

/// How late a chunk comes, in milliseconds, so that few of them are there when the first volume is.
const LATE: u64 = 10_000;

pub fn scenarios() -> Vec<Scenario> {
    let needs = [&scene::needs(NodeKind::Kernel)[..], &["qemu-nbd"].map(Need::Command)].concat();
    vec![
        Scenario::new("thin::volumes_start_while_their_image_is_in_its_store", &needs, from_the_store)
            .limited(Duration::from_secs(1500)),
    ]
}

/// Volumes work while few chunks were asked for; each chunk is asked for once; when all are here the store may go. Then the
/// same again, while everything that runs on the node is killed.
async fn from_the_store() -> anyhow::Result<()> {
    let mut scene = Scene::start(S3Kind::Test, NodeKind::Kernel).await?;
    let mut supervisor = Some(supervise(&scene)?);
    scene.site.node_mut(0).kill9();
    scene.site.node_mut(0).start_agent()?;
    scene.node().wait_ready().await?;
    let raw = scene.raw.clone();
    scene.import_http("disk", &raw).await?;

    answer_late(&scene, Some(LATE))?;
    let mut used = vec![give_raw(&scene, "first").await?];
    let (few, health) = (chunks_asked(&scene)?, health(&scene).await?);
    ensure!(health == Some(StagedImageHealth::Usable), "{health:?} after {} chunks", few.len());
    same_head(&scene, &used[0])?;
    for name in ["second", "third"] {
        used.push(give_raw(&scene, name).await?);
    }
    answer_late(&scene, None)?;
    for volume in &used {
        same_start(scene.node(), &volume.target, &raw)?;
    }
    await_optimal(&scene).await?;
    let all = chunks_asked(&scene)?;
    println!("{} of {} chunks had come when the first volume was there", few.len(), all.len());
    ensure!(few.len() < all.len() / 2, "{} of {} chunks", few.len(), all.len());
    let twice: Vec<_> = all.iter().filter(|(_, times)| **times > 1).collect();
    ensure!(twice.is_empty(), "asked for more than once: {twice:?}");

    scene.site.s3_mut().kill9();
    scene.node().run(["sh", "-c", "echo 3 > /proc/sys/vm/drop_caches"])?;
    for volume in &used {
        same_start(scene.node(), &volume.target, &raw)?;
    }
    scene.site.s3_mut().restart().await?;
    give_back(&scene, &used).await?;

    answer_late(&scene, Some(LATE))?;
    let fourth = give_raw(&scene, "fourth").await?;
    kill_servers(&scene)?;
    scene.site.node_mut(0).kill9();
    same_head(&scene, &fourth)?;
    drop(supervisor.take());
    kill_servers(&scene)?;
    supervisor = Some(supervise(&scene)?);
    same_head(&scene, &fourth)?;
    scene.site.node_mut(0).start_agent()?;
    scene.node().wait_ready().await?;
    answer_late(&scene, None)?;
    same_start(scene.node(), &fourth.target, &raw)?;
    await_optimal(&scene).await?;
    scene.node().run(["sh", "-c", "echo 3 > /proc/sys/vm/drop_caches"])?;
    same_start(scene.node(), &fourth.target, &raw)?;
    println!("wrong_bytes=0 after the agent, the supervisor and the server were killed");
    give_back(&scene, &[fourth]).await?;

    let imports: Api<TemplateImport> = Api::namespaced(scene.site.client(), "default");
    imports.delete("disk", &DeleteParams::default()).await?;
    nothing_remains(&scene.site).await?;
    drop(supervisor);
    scene.finish()
}

async fn give_raw(scene: &Scene, name: &str) -> anyhow::Result<Used> {
    give(scene.node(), &scene.node().csi(), &claim(name, View::Block, RAW)).await
}

/// A supervisor in its usual place. Agents that start later find it there.
fn supervise(scene: &Scene) -> anyhow::Result<Started> {
    let log = scene.node().log().with_file_name("supervisor.log");
    let program = Programs::beside_this(None)?.node;
    let program = Program::new("supervisor", &program, &log).args(["supervise"]).env("RUST_LOG", "info");
    let started = scene.node().start_program(&program)?;
    // It answers before long; whoever asks waits for that.
    scene.node().run(["sh", "-c", "until [ -S /run/berth/supervisor.sock ]; do sleep 0.1; done"])?;
    Ok(started)
}

/// Kills what serves image stores on the node, wherever it is found.
fn kill_servers(scene: &Scene) -> anyhow::Result<()> {
    let script =
        "for group in $(find /sys/fs/cgroup -path '*/nbd-*/cgroup.procs'); do kill -9 $(cat $group); done";
    scene.node().run(["sh", "-c", script])?;
    Ok(())
}

/// Chunks come so many milliseconds late from now on.
fn answer_late(scene: &Scene, ms: Option<u64>) -> anyhow::Result<()> {
    let late = |ms| FaultRule::new(FaultAction::Delay { ms }).op("GetObject").key_prefix("images/chunks/");
    let rules: Vec<_> = ms.map(late).into_iter().collect();
    Ok(write_rules(&scene.site.dir().join("s3"), &rules)?)
}

/// How often each chunk was asked for.
fn chunks_asked(scene: &Scene) -> anyhow::Result<BTreeMap<String, usize>> {
    let log = RequestLog::read(&scene.site.dir().join("s3/requests.jsonl"))?;
    let mut asked = BTreeMap::new();
    for entry in log.entries() {
        if entry.op == "GetObject" && entry.key.starts_with("images/chunks/") {
            *asked.entry(entry.key.clone()).or_default() += 1;
        }
    }
    Ok(asked)
}

/// The first MiB of a volume is the disk's.
fn same_head(scene: &Scene, volume: &Used) -> anyhow::Result<()> {
    let words = [OsStr::new("cmp"), OsStr::new("--bytes=1048576")];
    scene.node().run(words.into_iter().chain([volume.target.as_os_str(), scene.raw.as_os_str()]))?;
    Ok(())
}

/// The only staged image.
async fn staged(scene: &Scene) -> anyhow::Result<StagedImage> {
    let images: Api<StagedImage> = Api::all(scene.site.client());
    let mut all = images.list(&ListParams::default()).await?.items;
    ensure!(all.len() <= 1, "{} staged images for one template", all.len());
    all.pop().context("no staged image")
}

async fn health(scene: &Scene) -> anyhow::Result<Option<StagedImageHealth>> {
    Ok(staged(scene).await?.status.and_then(|status| status.health))
}

async fn await_optimal(scene: &Scene) -> anyhow::Result<()> {
    wait::until("the image to be all here", LIMIT, || async {
        match staged(scene).await.map(|image| image.status.unwrap_or_default()) {
            Ok(status) if status.health == Some(StagedImageHealth::Optimal) => Look::Done(()),
            Ok(status) => Look::<(), kube::Error>::NotYet(format!("{status:?}")),
            Err(error) => Look::NotYet(error.to_string()),
        }
    })
    .await?;
    Ok(())
}

/// Volumes and their image go.
async fn give_back(scene: &Scene, volumes: &[Used]) -> anyhow::Result<()> {
    for used in volumes {
        take_back(&scene.node().csi(), used).await?;
    }
    let images: Api<StagedImage> = Api::all(scene.site.client());
    images.delete(&staged(scene).await?.name_any(), &DeleteParams::default()).await?;
    wait::until("the image to go", LIMIT, || async {
        match images.list(&ListParams::default()).await {
            Ok(left) if left.items.is_empty() => Look::Done(()),
            Ok(left) => Look::NotYet(format!("{} are left", left.items.len())),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    Ok(())
}
