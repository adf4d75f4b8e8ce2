//! Files for pods: an object is read in pods, and what a pod writes comes back to the store, whatever happens to the node.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_api::StagingReservation;
use berth_api::conditions::{self, ConditionType};
use berth_api::staging_reservation::{ReservationState, StagingReservationStatus};
use berth_e2e::cluster::Cluster;
use berth_e2e::csi::{Csi, CsiError, Inline, View, Volume};
use berth_e2e::site::{BUCKET, NodeKind, S3Kind};
use berth_e2e::wait::{self, Look};
use berth_testkit::s3::fault::{FaultAction, FaultRule, write_rules};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};
use tonic::Code;

use crate::remains::nothing_remains;
use crate::scenario::{CONTROL_PLANE, Scenario};
use crate::scene::{self, POOL, Scene, claim, give, noise, take_back};

/// How long a step may take on a busy machine.
const STEP_LIMIT: Duration = Duration::from_secs(90);
/// The object, in three parts when it is sent.
const OBJECT_BYTES: usize = (40 << 20) + 7;

pub fn scenarios() -> Vec<Scenario> {
    let (namespace, kernel) = (scene::needs(NodeKind::Namespace), scene::needs(NodeKind::Kernel));
    vec![
        Scenario::new("files::read_written_and_sent_back", &namespace, read_written_and_sent_back),
        Scenario::new("files::on_thin_devices", &kernel, on_thin_devices).limited(Duration::from_mins(5)),
        Scenario::new("files::refused_with_what_and_where", &namespace, refused_with_what_and_where),
        Scenario::new("files::an_only_copy_goes_with_consent", &namespace, an_only_copy_goes_with_consent),
        Scenario::new("files::examples_are_valid", CONTROL_PLANE, examples_are_valid),
        Scenario::new("files::block_of_a_pod_goes_with_it", &namespace, block_of_a_pod_goes_with_it),
    ]
}

/// The scene, and what the tests do with reservations in `default`.
struct Bed {
    scene: Scene,
    csi: Csi,
    reservations: Api<StagingReservation>,
}

impl Bed {
    async fn start(kind: NodeKind) -> anyhow::Result<Self> {
        let scene = Scene::start(S3Kind::Test, kind).await?;
        let csi = scene.node().csi();
        let reservations = Api::namespaced(scene.site.client(), "default");
        Ok(Self { scene, csi, reservations })
    }

    /// Stores an object of these bytes.
    async fn store(&self, key: &str, bytes: &[u8]) -> anyhow::Result<()> {
        let file = self.scene.dir.path().join("object");
        fs::write(&file, bytes)?;
        Ok(self.scene.site.s3().store(key, &file).await?)
    }

    /// An object as another client than ours reads it.
    async fn object(&self, key: &str) -> anyhow::Result<Vec<u8>> {
        let file = self.scene.dir.path().join("fetched");
        self.scene.site.s3().fetch(key, &file).await?;
        Ok(fs::read(&file)?)
    }

    fn place(&self, key: &str) -> Value {
        json!({
            "endpoint": self.scene.site.s3_endpoint(), "bucket": BUCKET, "key": key,
            "secretRef": { "name": "images-s3" },
        })
    }

    async fn reserve(&self, name: &str, file: &Value) -> anyhow::Result<()> {
        let object = json!({
            "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation",
            "metadata": { "name": name, "namespace": "default" },
            "spec": { "poolName": POOL, "maxSize": "160Mi", "file": file },
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
        let status = wait::until(what, STEP_LIMIT, || async {
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

    async fn ready(&self, name: &str) -> anyhow::Result<StagingReservationStatus> {
        let ready =
            |status: &StagingReservationStatus| conditions::is_true(&status.conditions, ConditionType::Ready);
        self.until("the file to be there", name, ready).await
    }

    async fn delete(&self, name: &str) -> anyhow::Result<()> {
        self.reservations.delete(name, &DeleteParams::default()).await?;
        Ok(())
    }

    async fn gone(&self, name: &str) -> anyhow::Result<()> {
        let looked = wait::until("the reservation to be gone", STEP_LIMIT, || async {
            match self.reservations.get_opt(name).await {
                Ok(None) => Look::Done(()),
                Ok(Some(found)) => Look::NotYet(format!("{:?}", found.status)),
                Err(error) => Look::Failed(error),
            }
        });
        Ok(looked.await?)
    }

    fn target(&self, pod: &str) -> PathBuf {
        self.scene.node().target_path(pod)
    }

    async fn publish(&self, pod: &str, inline: &Inline) -> Result<(), CsiError> {
        self.csi.publish_inline(inline, &self.target(pod)).await
    }

    async fn unpublish(&self, pod: &str) -> Result<(), CsiError> {
        let volume = inline(pod, "", true, &[]).volume;
        self.csi.unpublish(&volume, &self.target(pod)).await
    }
}

/// What kubelet makes of the inline volume of a pod in `default`.
fn inline(pod: &str, reservation: &str, read_only: bool, more: &[(&str, &str)]) -> Inline {
    let attributes = [("reservation", reservation)].into_iter().chain(more.iter().copied());
    let context: HashMap<String, String> =
        attributes.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let volume = Volume { id: format!("csi-{pod}"), bytes: 0, view: View::Filesystem, context };
    Inline { volume, namespace: "default".to_owned(), read_only }
}

fn only_copy(status: &StagingReservationStatus) -> bool {
    conditions::find(&status.conditions, ConditionType::Durable)
        .is_some_and(|durable| durable.status == "False" && durable.reason == "OnlyCopy")
}

/// The answer to a call that is refused.
fn refused(outcome: Result<(), CsiError>, code: Code, mentions: &[&str]) -> anyhow::Result<()> {
    let error = outcome.err().context("it was not refused")?;
    let said = error.to_string();
    ensure!(error.code() == Some(code) && mentions.iter().all(|word| said.contains(word)), "{said}");
    Ok(())
}

async fn read_written_and_sent_back() -> anyhow::Result<()> {
    there_and_back(NodeKind::Namespace).await
}

async fn on_thin_devices() -> anyhow::Result<()> {
    there_and_back(NodeKind::Kernel).await
}

async fn there_and_back(kind: NodeKind) -> anyhow::Result<()> {
    let mut bed = Bed::start(kind).await?;
    let content = noise(OBJECT_BYTES);
    bed.store("upload/data.bin", &content).await?;
    let file = json!({ "source": bed.place("upload/data.bin"), "result": bed.place("result/data.bin") });
    let data = bed.scene.site.dir().join("s3");
    write_rules(&data, &[FaultRule::new(FaultAction::Stall { after_bytes: 20 << 20 }).op("GetObject")])?;
    bed.reserve("data", &file).await?;
    let half = |status: &StagingReservationStatus| {
        status.progress.as_ref().is_some_and(|progress| progress.bytes_done >= 16 << 20)
    };
    let status = bed.until("half of the object to be there", "data", half).await?;
    ensure!(!conditions::is_true(&status.conditions, ConditionType::Ready), "ready before its end");
    let (once, early) = (bed.csi.repeating_for(Duration::ZERO), inline("early", "data", true, &[]));
    let early = once.publish_inline(&early, &bed.target("early")).await;
    refused(early, Code::Aborted, &["Fetching", "of 40"])?;
    bed.scene.site.node_mut(0).kill9();
    write_rules(&data, &[])?;
    bed.scene.site.node_mut(0).start_agent()?;
    bed.scene.node().wait_ready().await?;
    let status = bed.ready("data").await?;
    ensure!(status.path.as_deref() == Some("data.bin"), "no name of a file in a pod: {:?}", status.path);
    ensure!(conditions::is_true(&status.conditions, ConditionType::Staged), "{:?}", status.conditions);

    two_pods_read(&bed, &content).await?;
    let changed = one_pod_writes(&bed).await?;
    deleted_it_is_sent_though_its_node_dies(&mut bed, &changed).await?;
    nothing_remains(&bed.scene.site).await?;
    bed.scene.finish()
}

async fn two_pods_read(bed: &Bed, content: &[u8]) -> anyhow::Result<()> {
    let node = bed.scene.node();
    for pod in ["one", "two"] {
        for _ in 0..2 {
            bed.publish(pod, &inline(pod, "data", true, &[])).await?; // kubelet repeats what it has no answer to
        }
        ensure!(node.read(&bed.target(pod).join("data.bin"))? == content, "another content");
        ensure!(node.write(&bed.target(pod).join("other"), b"x").is_err(), "it is not read-only");
    }
    let writer = inline("three", "data", false, &[]);
    refused(bed.publish("three", &writer).await, Code::FailedPrecondition, &["published to readers"])?;
    for pod in ["one", "two", "one"] {
        bed.unpublish(pod).await?;
    }
    Ok(())
}

async fn one_pod_writes(bed: &Bed) -> anyhow::Result<Vec<u8>> {
    let (node, target) = (bed.scene.node(), bed.target("writer"));
    bed.publish("writer", &inline("writer", "data", false, &[])).await?;
    bed.until("it to be shown as the only copy", "data", only_copy).await?;
    let options = node.run(["findmnt", "--noheadings", "--output", "OPTIONS", &target.to_string_lossy()])?;
    let options = String::from_utf8_lossy(&options).into_owned();
    for option in ["nosuid", "nodev", "noexec"] {
        ensure!(options.contains(option), "mounted with {options}");
    }
    let reader = inline("reader", "data", true, &[]);
    refused(bed.publish("reader", &reader).await, Code::FailedPrecondition, &["published to a writer"])?;
    let mut changed = noise(OBJECT_BYTES + (1 << 20));
    changed.reverse();
    node.write(&target.join("data.bin"), &changed)?;
    // Nothing that a pod writes goes beyond the promise.
    let beyond = ["dd", "if=/dev/zero", "bs=1M", "count=160", &format!("of={}/more", target.display())];
    ensure!(node.run(beyond).is_err(), "more was written than is promised");
    Ok(changed)
}

/// The examples are taken by the API server as they are, and name each other.
async fn examples_are_valid() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let cluster = Cluster::start(dir.path()).await?;
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("a repository")?;
    cluster.install_crds(&repository.join("crds")).await?;
    cluster.apply_yaml("{apiVersion: v1, kind: ServiceAccount, metadata: {name: default}}").await?;
    let mut files = fs::read_dir(repository.join("examples/files"))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()?;
    files.sort();
    let (mut made, mut named) = (Vec::new(), Vec::new());
    for file in files {
        for object in cluster.apply_file(&file).await.with_context(|| file.display().to_string())? {
            let object = serde_json::to_value(&object)?;
            if object["kind"] == "StagingReservation" {
                made.push(object["metadata"]["name"].clone());
            }
            let volumes = object["spec"]["volumes"].as_array().cloned().unwrap_or_default();
            let inline =
                volumes.iter().map(|volume| volume["csi"]["volumeAttributes"]["reservation"].clone());
            named.extend(inline.filter(|name| !name.is_null()));
        }
    }
    ensure!(named.len() == 2 && named.iter().all(|name| made.contains(name)), "{named:?} of {made:?}");
    Ok(())
}

async fn deleted_it_is_sent_though_its_node_dies(bed: &mut Bed, changed: &[u8]) -> anyhow::Result<()> {
    let data = bed.scene.site.dir().join("s3");
    let slow = FaultRule::new(FaultAction::Delay { ms: 3000 }).op("UploadPart");
    write_rules(&data, &[slow])?;
    bed.delete("data").await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    ensure!(
        bed.scene.node().read(&bed.target("writer").join("data.bin"))? == changed,
        "the pod has lost its file"
    );
    bed.unpublish("writer").await?;
    let waits = |status: &StagingReservationStatus| {
        let why = conditions::find(&status.conditions, ConditionType::Promised);
        let sending = status.progress.as_ref().is_some_and(|progress| {
            progress.bytes_done > 0 && progress.bytes_total == i64::try_from(changed.len()).ok()
        });
        status.state == Some(ReservationState::Releasing)
            && only_copy(status)
            && sending
            && why.is_some_and(|why| why.reason == "OnlyCopy" && why.message.contains("result/data.bin"))
    };
    bed.until("the deletion to wait for what is sent", "data", waits).await?;
    bed.scene.site.node_mut(0).kill9();
    ensure!(bed.object("result/data.bin").await.is_err(), "it was there before its end");
    write_rules(&data, &[])?;
    bed.scene.site.node_mut(0).start_agent()?;
    bed.scene.node().wait_ready().await?;
    bed.gone("data").await?;
    ensure!(bed.object("result/data.bin").await? == changed, "another content came back");
    let log = fs::read_to_string(data.join("requests.jsonl"))?;
    let begun = log.lines().filter(|line| line.contains("\"CreateMultipartUpload\"")).count();
    ensure!(begun == 1, "{begun} uploads were begun");
    Ok(())
}

async fn refused_with_what_and_where() -> anyhow::Result<()> {
    let bed = Bed::start(NodeKind::Namespace).await?;
    bed.store("upload/data.bin", b"content").await?;
    bed.store("upload/large.bin", &vec![1; 200 << 20]).await?;
    bed.reserve("data", &json!({ "source": bed.place("upload/data.bin") })).await?;
    bed.reserve("large", &json!({ "source": bed.place("upload/large.bin") })).await?;
    let plain = json!({
        "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation",
        "metadata": { "name": "plain", "namespace": "default" }, "spec": { "poolName": POOL, "maxSize": "1Mi" },
    });
    bed.scene.site.apply(&plain.to_string()).await?;
    bed.ready("data").await?;

    let stranger = Inline { namespace: "kube-system".to_owned(), ..inline("p", "data", true, &[]) };
    refused(bed.publish("p", &stranger).await, Code::NotFound, &["kube-system/data", "own namespace"])?;
    let writer = inline("p", "data", false, &[]);
    refused(bed.publish("p", &writer).await, Code::FailedPrecondition, &["spec.file.result", "readOnly"])?;
    let odd = inline("p", "data", true, &[("reservatoin", "x")]);
    refused(bed.publish("p", &odd).await, Code::InvalidArgument, &["`reservatoin` is not known"])?;
    bed.ready("plain").await?;
    let plain = inline("p", "plain", true, &[]);
    refused(bed.publish("p", &plain).await, Code::FailedPrecondition, &["no `spec.file`"])?;
    let too_large = |status: &StagingReservationStatus| {
        status.last_error.as_ref().is_some_and(|error| error.reason == "SourceTooLarge" && !error.retryable)
    };
    let status = bed.until("the large object to be refused", "large", too_large).await?;
    let said = status.last_error.map(|error| error.message).unwrap_or_default();
    ensure!(said.contains("200 MiB") && said.contains("160 MiB"), "no numbers: {said}");
    let large = inline("p", "large", true, &[]);
    refused(bed.publish("p", &large).await, Code::FailedPrecondition, &["SourceTooLarge", "200 MiB"])?;

    // What nobody wants is no only copy.
    bed.publish("p", &inline("p", "data", false, &[("discard", "true")])).await?;
    bed.scene.node().write(&bed.target("p").join("data.bin"), b"changed")?;
    bed.unpublish("p").await?;
    for name in ["data", "plain", "large"] {
        bed.delete(name).await?;
        bed.gone(name).await?;
    }
    ensure!(bed.object("upload/data.bin").await? == b"content", "the source has changed");
    nothing_remains(&bed.scene.site).await?;
    bed.scene.finish()
}

async fn an_only_copy_goes_with_consent() -> anyhow::Result<()> {
    let bed = Bed::start(NodeKind::Namespace).await?;
    let denied = FaultRule::new(FaultAction::SlowDown).key_prefix("result/");
    write_rules(&bed.scene.site.dir().join("s3"), &[denied])?;
    bed.reserve("data", &json!({ "name": "out", "result": bed.place("result/out") })).await?;
    bed.ready("data").await?;
    bed.publish("w", &inline("w", "data", false, &[])).await?;
    bed.scene.node().write(&bed.target("w").join("out"), b"precious")?;
    bed.unpublish("w").await?;
    bed.delete("data").await?;
    let waits = |status: &StagingReservationStatus| {
        let error = status.last_error.as_ref();
        only_copy(status)
            && status.state == Some(ReservationState::Releasing)
            && error.is_some_and(|error| error.reason == "ObjectStoreUnavailable" && error.retryable)
    };
    bed.until("the deletion to wait for the store", "data", waits).await?;
    let consent = json!({ "metadata": { "annotations": BTreeMap::from([
        (berth_api::defaults::ANNOTATION_DISCARD, "true"),
    ]) } });
    bed.reservations.patch("data", &PatchParams::default(), &Patch::Merge(&consent)).await?;
    bed.gone("data").await?;
    nothing_remains(&bed.scene.site).await?;
    bed.scene.finish()
}

/// A generic ephemeral volume is a claim that is named after its pod and goes with it; what the plugin is asked is the same as
/// for any other.
async fn block_of_a_pod_goes_with_it() -> anyhow::Result<()> {
    let bed = Bed::start(NodeKind::Namespace).await?;
    let node = bed.scene.node();
    let used = give(node, &bed.csi, &claim("pod-scratch", View::Block, &[("pool", POOL)])).await?;
    let of = format!("of={}", used.target.display());
    node.run(["dd", "if=/dev/urandom", "bs=1M", "count=8", "oflag=direct", "conv=notrunc", &of])?;
    take_back(&bed.csi, &used).await?;
    nothing_remains(&bed.scene.site).await?;
    bed.scene.finish()
}
