//! References to what is staged, on real nodes: who joins, who holds on, and what comes back when nobody does.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use berth_api::conditions::{self, ConditionType};
use berth_api::staged_image::StagedImageState;
use berth_api::staging_reservation::{ReservationState, StagingReservationStatus};
use berth_api::{StagedImage, StagingLedger, StagingPool, StagingReservation, TemplateImport};
use berth_e2e::cluster::SYSTEM_NAMESPACE;
use berth_e2e::csi::{Csi, Inline, View, Volume};
use berth_e2e::site::{BUCKET, NodeKind, S3Kind};
use berth_e2e::wait::{self, Look};
use berth_testkit::s3::fault::{FaultAction, FaultRule, write_rules};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};

use crate::remains::nothing_remains;
use crate::scenario::Scenario;
use crate::scene::{self, POOL, Scene};

/// How long a step may take on a busy machine.
const STEP_LIMIT: Duration = Duration::from_secs(90);
/// The size of a volume that starts from the test image.
const VOLUME_BYTES: i64 = 80 << 20;
/// The size of the chunks of a store, if nothing else is asked for.
const CHUNK_BYTES: i64 = 256 << 10;
/// How long a reference stays that nothing uses.
const TTL: Duration = Duration::from_secs(10);
/// How long after that its space may take to come back: one look of the operator, and the node's removal.
const SWEEP: Duration = Duration::from_secs(30);

pub fn scenarios() -> Vec<Scenario> {
    let needs = scene::needs(NodeKind::Namespace);
    vec![
        Scenario::new("references::a6_the_same_content_is_joined_while_it_is_copied", &needs, joined),
        Scenario::new(
            "references::a9_a_slow_holder_keeps_its_file_and_a_killed_ones_space_is_back",
            &needs,
            held,
        ),
        Scenario::new("references::a36_an_image_that_failed_goes_and_its_source_stays", &needs, failed),
        Scenario::new("references::a_restored_etcd_is_noticed_by_programs_that_run_on", &needs, restored),
    ]
}

/// A scene, and what the tests ask of it in `default`.
struct Bed {
    scene: Scene,
    csi: Csi,
    reservations: Api<StagingReservation>,
}

impl Bed {
    async fn start() -> anyhow::Result<Self> {
        let scene = Scene::start(S3Kind::Test, NodeKind::Namespace).await?;
        let csi = scene.node().csi();
        let reservations = Api::namespaced(scene.site.client(), "default");
        Ok(Self { scene, csi, reservations })
    }

    async fn reserve(&self, name: &str, spec: &Value) -> anyhow::Result<()> {
        let object = json!({
            "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation",
            "metadata": { "name": name, "namespace": "default" }, "spec": spec,
        });
        self.scene.site.apply(&object.to_string()).await?;
        Ok(())
    }

    /// Waits until the status of a reservation is as wanted.
    async fn until(
        &self,
        what: &str,
        name: &str,
        wanted: impl Fn(&StagingReservationStatus) -> bool,
    ) -> anyhow::Result<StagingReservationStatus> {
        let what = format!("{name} {what}");
        let status = wait::until(&what, STEP_LIMIT, || async {
            match self.reservations.get(name).await {
                Ok(found) => {
                    let status = found.status.unwrap_or_default();
                    if wanted(&status) { Look::Done(status) } else { Look::NotYet(format!("{status:?}")) }
                }
                Err(error) => Look::Failed(error),
            }
        });
        Ok(status.await?)
    }

    /// The bytes that are promised in the pool.
    async fn promised(&self) -> anyhow::Result<i64> {
        let ledgers: Api<StagingLedger> = Api::all(self.scene.site.client());
        let ledgers = ledgers.list(&ListParams::default()).await?.items;
        Ok(ledgers.iter().flat_map(|ledger| ledger.spec.promises.values()).map(|p| p.data_bytes).sum())
    }

    /// Waits until a reservation and its promise are gone; says how long that took.
    async fn space_is_back(&self, name: &str) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        wait::until(&format!("{name} and its promise to be gone"), STEP_LIMIT, || async {
            match self.reservations.get_opt(name).await {
                Ok(None) => Look::Done(()),
                Ok(Some(found)) => Look::NotYet(format!("{:?}", found.status)),
                Err(error) => Look::Failed(error),
            }
        })
        .await?;
        let left = self.promised().await?;
        ensure!(left == 0, "{left} bytes are still promised");
        Ok(begun.elapsed())
    }
}

fn is(state: ReservationState) -> impl Fn(&StagingReservationStatus) -> bool {
    move |status| status.state == Some(state)
}

/// A second reservation of the same template comes while the first one's image is still being copied, a third one after
/// that: there is one image, charged and fetched once.
async fn joined() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    let made = bed.scene.import_http("disk", &bed.scene.qcow2).await?;
    let data = bed.scene.site.dir().join("s3");
    let before = chunk_reads(&data)?;
    let slow = FaultRule::new(FaultAction::Delay { ms: 2000 }).op("GetObject").key_prefix("images/chunks/");
    write_rules(&data, &[slow])?;
    let spec = json!({
        "poolName": POOL, "maxSize": VOLUME_BYTES, "access": "Block",
        "image": { "template": { "namespace": "default", "name": "disk" } },
    });
    bed.reserve("first", &spec).await?;
    let first = bed.until("to be promised", "first", |status| status.assignment.is_some()).await?;
    ensure!(first.reused == Some(false), "the first has joined something: {first:?}");
    let images: Api<StagedImage> = Api::all(bed.scene.site.client());
    let filling = wait::until("the image to be filled", STEP_LIMIT, || async {
        match images.list(&ListParams::default()).await {
            Ok(list) => match list.items.first().and_then(|image| image.status.as_ref()?.progress.clone()) {
                Some(progress) if progress.bytes_done > 0 => Look::Done(progress),
                other => Look::NotYet(format!("{other:?}")),
            },
            Err(error) => Look::Failed(error),
        }
    });
    let filling = filling.await?;
    ensure!(
        Some(filling.bytes_done) < filling.bytes_total,
        "it was copied before the second came: {filling:?}"
    );
    let charged = bed.promised().await? - VOLUME_BYTES;
    ensure!(charged > 0, "the image is not charged");

    bed.reserve("second", &spec).await?;
    let second = bed.until("to be promised", "second", |status| status.assignment.is_some()).await?;
    ensure!(second.reused == Some(true), "the second has not joined: {second:?}");
    ensure!(bed.promised().await? == charged + 2 * VOLUME_BYTES, "the second is charged for the image");
    write_rules(&data, &[])?;
    bed.reserve("third", &spec).await?;
    for name in ["first", "second", "third"] {
        bed.until("to be ready", name, is(ReservationState::Ready)).await?;
    }
    ensure!(bed.promised().await? == charged + 3 * VOLUME_BYTES, "the third is charged for the image");
    let complete = wait::until("the image to be there", STEP_LIMIT, || async {
        match images.list(&ListParams::default()).await {
            Ok(list) if list.items.len() == 1 && is_ready(&list.items[0]) => {
                Look::Done(list.items[0].name_any())
            }
            Ok(list) => Look::NotYet(format!("{:?}", list.items)),
            Err(error) => Look::Failed(error),
        }
    });
    let image = complete.await?;
    let reads = chunk_reads(&data)?.split_off(before.len());
    let places = usize::try_from(made.real_size / CHUNK_BYTES)?;
    ensure!(reads.len() == places, "{} reads for {places} places: {made:?}", reads.len());

    a34_only_use_moves_the_time_of_use(&mut bed, &images, &image, &spec).await?;

    for name in ["first", "second", "third", "fourth"] {
        bed.reservations.delete(name, &DeleteParams::default()).await?;
    }
    images.delete(&image, &DeleteParams::default()).await?;
    let imports: Api<TemplateImport> = Api::namespaced(bed.scene.site.client(), "default");
    imports.delete("disk", &DeleteParams::default()).await?;
    nothing_remains(&bed.scene.site).await?;
    bed.scene.finish()
}

/// What is not a use, a change of the object, of its pool, a restart of the plugin or mere time, does not move the time of the
/// last use of an image; a volume that is made of it does.
async fn a34_only_use_moves_the_time_of_use(
    bed: &mut Bed,
    images: &Api<StagedImage>,
    image: &str,
    spec: &Value,
) -> anyhow::Result<()> {
    let used = async |images: &Api<StagedImage>| -> anyhow::Result<_> {
        let status = images.get(image).await?.status.context("no status")?;
        status.last_used.context("no time of use")
    };
    let before = used(images).await?;
    let labels = Patch::Merge(json!({ "metadata": { "labels": { "looked-at": "yes" } } }));
    images.patch(image, &PatchParams::default(), &labels).await?;
    let pools: Api<StagingPool> = Api::all(bed.scene.site.client());
    pools.patch(POOL, &PatchParams::default(), &labels).await?;
    bed.scene.site.node_mut(0).kill9();
    bed.scene.site.node_mut(0).start_agent()?;
    bed.scene.node().wait_ready().await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    ensure!(used(images).await? == before, "it counts as used though nobody used it");
    bed.reserve("fourth", spec).await?;
    bed.until("to be ready", "fourth", is(ReservationState::Ready)).await?;
    let later = wait::until("the image to be used", STEP_LIMIT, || async {
        match images.get(image).await.map(|image| image.status.and_then(|status| status.last_used)) {
            Ok(Some(now)) if now > before => Look::Done(()),
            Ok(other) => Look::NotYet(format!("{other:?} after {before:?}")),
            Err(error) => Look::Failed(error),
        }
    });
    Ok(later.await?)
}

fn is_ready(image: &StagedImage) -> bool {
    image.status.as_ref().is_some_and(|status| conditions::is_true(&status.conditions, ConditionType::Ready))
}

/// The keys of the chunks that were read, in their order.
fn chunk_reads(data: &Path) -> anyhow::Result<Vec<String>> {
    let log = fs::read_to_string(data.join("requests.jsonl"))?;
    let lines = log.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
    let reads = lines.iter().filter(|line| line["op"] == "GetObject");
    let keys = reads.filter_map(|line| line["key"].as_str()).filter(|key| key.starts_with("images/chunks/"));
    Ok(keys.map(str::to_owned).collect())
}

/// A staged image of which chunks cannot be read is `Failed`, and serves nobody. Deleted in that state it goes with its bytes and
/// its promise; what is in the store stays as it was, and the next reservation has the image staged anew.
async fn failed() -> anyhow::Result<()> {
    let bed = Bed::start().await?;
    bed.scene.import_http("disk", &bed.scene.qcow2).await?;
    let data = bed.scene.site.dir().join("s3");
    let denied = FaultRule::new(FaultAction::Deny).op("GetObject").key_prefix("images/chunks/").skip(20);
    write_rules(&data, &[denied])?;
    let spec = json!({
        "poolName": POOL, "maxSize": VOLUME_BYTES, "access": "Block",
        "image": { "template": { "namespace": "default", "name": "disk" } },
    });
    bed.reserve("first", &spec).await?;
    let images: Api<StagedImage> = Api::all(bed.scene.site.client());
    let failed = wait::until("the image to fail", STEP_LIMIT, || async {
        match images.list(&ListParams::default()).await {
            Ok(list) => match list.items.first() {
                Some(image) if state_of(image) == Some(StagedImageState::Failed) => {
                    Look::Done(image.name_any())
                }
                other => Look::NotYet(format!("{:?}", other.and_then(|image| image.status.as_ref()))),
            },
            Err(error) => Look::Failed(error),
        }
    });
    let failed = failed.await?;
    let status = bed.reservations.get("first").await?.status.context("no status")?;
    ensure!(
        status.state != Some(ReservationState::Ready),
        "it is served from an image that failed: {status:?}"
    );

    bed.reservations.delete("first", &DeleteParams::default()).await?;
    images.delete(&failed, &DeleteParams::default()).await?;
    wait::until("image, reservation and promises to be gone", STEP_LIMIT, || async {
        let left = async {
            let objects = images.list(&ListParams::default()).await?.items.len();
            let reserved = bed.reservations.get_opt("first").await?.is_some();
            anyhow::Ok((objects, reserved, bed.promised().await?))
        };
        match left.await {
            Ok((0, false, 0)) => Look::Done(()),
            Ok(left) => Look::NotYet(format!("{left:?}")),
            Err(error) => Look::Failed(std::io::Error::other(format!("{error:#}"))),
        }
    })
    .await?;
    let kept = bed.scene.node().names(&bed.scene.node().pool_root(POOL).join("images"))?;
    ensure!(kept.is_empty(), "bytes of the image stay: {kept:?}");

    write_rules(&data, &[])?;
    bed.reserve("second", &spec).await?;
    bed.until("to be ready", "second", is(ReservationState::Ready)).await?;
    bed.reservations.delete("second", &DeleteParams::default()).await?;
    for image in images.list(&ListParams::default()).await?.items {
        images.delete(&image.name_any(), &DeleteParams::default()).await?;
    }
    let imports: Api<TemplateImport> = Api::namespaced(bed.scene.site.client(), "default");
    imports.delete("disk", &DeleteParams::default()).await?;
    nothing_remains(&bed.scene.site).await?;
    bed.scene.finish()
}

fn state_of(image: &StagedImage) -> Option<StagedImageState> {
    image.status.as_ref()?.state
}

/// A pod reads slowly, for longer than the reference stays unused: its file stays. Another one comes and goes while there is no
/// operator: the reference stays for its time from then on. Then the pod is killed: the space is back within that time and a
/// sweep, though its node's plugin was killed too.
async fn held() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    let content = scene::noise(3 << 20);
    let file = bed.scene.dir.path().join("object");
    fs::write(&file, &content)?;
    bed.scene.site.s3().store("upload/data.bin", &file).await?;
    let source = json!({
        "endpoint": bed.scene.site.s3_endpoint(), "bucket": BUCKET, "key": "upload/data.bin",
        "secretRef": { "name": "images-s3" },
    });
    let ttl = format!("{}s", TTL.as_secs());
    bed.reserve(
        "data",
        &json!({ "poolName": POOL, "maxSize": "64Mi", "ttl": ttl, "file": { "source": source } }),
    )
    .await?;
    bed.until("to say when it ends", "data", |status| status.expires_at.is_some()).await?;

    publish(&bed, "slow").await?;
    bed.until("to end no more", "data", |status| status.expires_at.is_none()).await?;
    let until = Instant::now() + TTL + SWEEP / 2;
    let target = bed.scene.node().target_path("slow");
    while Instant::now() < until {
        ensure!(
            bed.scene.node().read(&target.join("data.bin"))? == content,
            "a slow holder has lost its file"
        );
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    unpublish(&bed, "slow").await?;
    let told = bed.until("to say when it ends", "data", |status| status.expires_at.is_some()).await?;
    let (ends, used) = (told.expires_at.context("checked")?, told.last_used.context("the end of its use")?);
    ensure!(ends.0 >= used.0 + jiff::SignedDuration::try_from(TTL)?, "it ends at {ends:?}, used at {used:?}");

    bed.scene.site.kill9_operator(0);
    tokio::time::sleep(TTL).await;
    publish(&bed, "short").await?;
    unpublish(&bed, "short").await?;
    bed.until("to tell of the use", "data", |status| status.last_used.as_ref() > Some(&used)).await?;
    let ended = Instant::now();
    bed.scene.site.start_operator(0)?;
    bed.until("to end later", "data", |status| status.expires_at.as_ref() > Some(&ends)).await?;

    publish(&bed, "killed").await?;
    bed.until("to end no more", "data", |status| status.expires_at.is_none()).await?;
    ensure!(ended.elapsed() < TTL * 3, "too slow a machine for what this shows: {:?}", ended.elapsed());
    bed.scene.site.node_mut(0).kill9();
    bed.scene.site.node_mut(0).start_agent()?;
    bed.scene.node().wait_ready().await?;
    unpublish(&bed, "killed").await?; // as kubelet does for a pod that is dead
    let took = bed.space_is_back("data").await?;
    ensure!(took < TTL + SWEEP, "the space came back after {took:?}");
    println!("the space of a killed holder came back after {took:?}, its reference stays {TTL:?} unused");
    nothing_remains(&bed.scene.site).await?;
    bed.scene.finish()
}

/// What kubelet makes of the inline volume of a pod that reads.
fn inline(pod: &str) -> Inline {
    let context = [("reservation".to_owned(), "data".to_owned())].into();
    let volume = Volume { id: format!("csi-{pod}"), bytes: 0, view: View::Filesystem, context };
    Inline { volume, namespace: "default".to_owned(), read_only: true }
}

async fn publish(bed: &Bed, pod: &str) -> anyhow::Result<()> {
    Ok(bed.csi.publish_inline(&inline(pod), &bed.scene.node().target_path(pod)).await?)
}

async fn unpublish(bed: &Bed, pod: &str) -> anyhow::Result<()> {
    Ok(bed.csi.unpublish(&inline(pod).volume, &bed.scene.node().target_path(pod)).await?)
}

/// etcd goes back to a copy from before a reservation was made; operator and node run on. What the node holds is promised again
/// and counts, and the pool serves what is asked for after that.
async fn restored() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    let work = |size: &str| json!({ "poolName": POOL, "maxSize": size });
    bed.reserve("before", &work("64Mi")).await?;
    bed.until("to be ready", "before", is(ReservationState::Ready)).await?;
    let data = bed.scene.site.cluster().etcd_data();
    let backup = data.with_file_name("etcd-backup");
    stop_and(&mut bed, || copy(&data, &backup)).await?;
    renewed_by_all(&bed).await?;
    bed.reserve("lost", &work("128Mi")).await?;
    bed.until("to be ready", "lost", is(ReservationState::Ready)).await?;
    let lost = bed.reservations.get("lost").await?.uid().context("uid")?;
    let pids = (bed.scene.site.operator_pid(0), bed.scene.node().pid());

    stop_and(&mut bed, || {
        fs::remove_dir_all(&data)?;
        copy(&backup, &data)
    })
    .await?;
    ensure!(bed.reservations.get_opt("lost").await?.is_none(), "not restored");
    come_further(&bed).await?;
    let ledgers: Api<StagingLedger> = Api::all(bed.scene.site.client());
    wait::until("the ledger to be rebuilt", STEP_LIMIT, || async {
        match ledgers.list(&ListParams::default()).await {
            Ok(list) if list.items.iter().any(|ledger| ledger.spec.promises.contains_key(&lost)) => {
                Look::Done(())
            }
            Ok(list) => Look::NotYet(format!("{:?}", list.items.first().map(|ledger| &ledger.spec))),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    ensure!(bed.promised().await? == (64 + 128) << 20, "what the node holds does not count");
    bed.reserve("after", &work("64Mi")).await?;
    bed.until("to be ready", "after", is(ReservationState::Ready)).await?;
    let now = (bed.scene.site.operator_pid(0), bed.scene.node().pid());
    ensure!(now == pids, "a program was started anew: {pids:?}, then {now:?}");
    bed.scene.finish()
}

/// Does something while neither API server nor etcd runs.
async fn stop_and(bed: &mut Bed, act: impl FnOnce() -> std::io::Result<()>) -> anyhow::Result<()> {
    let cluster = bed.scene.site.cluster_mut();
    cluster.kill_apiserver();
    cluster.kill_etcd();
    act()?;
    cluster.restart().await?;
    Ok(())
}

/// Waits until every Lease of Berth has been renewed: what the API server had before is from an earlier renewal, as any backup is.
async fn renewed_by_all(bed: &Bed) -> anyhow::Result<()> {
    let leases: Api<Lease> = Api::namespaced(bed.scene.site.client(), SYSTEM_NAMESPACE);
    let versions = async || -> kube::Result<BTreeMap<String, Option<String>>> {
        let list = leases.list(&ListParams::default()).await?;
        Ok(list.items.iter().map(|lease| (lease.name_any(), lease.resource_version())).collect())
    };
    let before = versions().await?;
    ensure!(before.len() >= 2, "an operator and a node have a Lease each: {before:?}");
    wait::until("every Lease to be renewed", STEP_LIMIT, || async {
        match versions().await {
            Ok(now) if before.iter().all(|(name, version)| now.get(name) != Some(version)) => Look::Done(()),
            Ok(now) => Look::NotYet(format!("{before:?}, now {now:?}")),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    Ok(())
}

/// Writes so much at once that the API server's own version is beyond the one that it was set back from: a Lease or a report that
/// is older than it was is all that still tells of that.
async fn come_further(bed: &Bed) -> anyhow::Result<()> {
    let maps: Api<ConfigMap> = Api::namespaced(bed.scene.site.client(), SYSTEM_NAMESPACE);
    let map = |count: u32| -> anyhow::Result<ConfigMap> {
        Ok(serde_json::from_value(json!({
            "metadata": { "name": "further" }, "data": { "count": count.to_string() },
        }))?)
    };
    maps.create(&PostParams::default(), &map(0)?).await?;
    for count in 1..500 {
        maps.replace("further", &PostParams::default(), &map(count)?).await?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}
