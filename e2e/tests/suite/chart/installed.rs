//! The chart on a real API server: every object is accepted, rights are what they should be, an upgrade takes definitions along,
//! and nothing is uninstalled while something is promised.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_api::StagingReservation;
use berth_api::defaults::RELEASE_FINALIZER;
use berth_e2e::cluster::{Cluster, SYSTEM_NAMESPACE};
use berth_e2e::wait::{self, Look};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use k8s_openapi::api::storage::v1::{CSIDriver, StorageClass};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{
    ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, PostParams,
};
use kube::{Api, Client, ResourceExt};
use serde_json::json;

use super::helm::{Helm, chart};
use super::read;

/// How long the API server may take to act by a new policy, or to know a new definition.
const LIMIT: Duration = Duration::from_secs(60);

/// What is set beside the defaults: all that this API server knows; it has no kinds of the Prometheus operator.
const VALUES: &str = "{networkPolicy: {enabled: true}, monitoring: {dashboard: {enabled: true}}, storageClasses: [{name: blank, pool: fast}]}";

/// A release on a control plane of its own.
struct Release {
    cluster: Cluster,
    helm: Helm,
    kubeconfig: String,
    _dir: tempfile::TempDir,
}

impl Release {
    async fn start() -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let cluster = Cluster::start(dir.path()).await?;
        let kubeconfig = cluster.admin_kubeconfig().display().to_string();
        Ok(Self { cluster, helm: Helm::new()?, kubeconfig, _dir: dir })
    }

    /// Runs Helm; what it prints, or what it says if it refuses.
    fn helm(&self, words: &[&str], values: &str) -> anyhow::Result<Result<String, String>> {
        let words = [words, &["--kubeconfig", &self.kubeconfig]].concat();
        let output = self.helm.run(&words, values)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) })
    }

    fn done(&self, words: &[&str], values: &str) -> anyhow::Result<String> {
        self.helm(words, values)?.map_err(|said| anyhow::anyhow!("helm {words:?}: {said}"))
    }

    fn client(&self) -> Client {
        self.cluster.admin()
    }

    /// The names of the workloads.
    async fn workloads(&self) -> anyhow::Result<Vec<String>> {
        let everything = ListParams::default();
        let deployments: Api<Deployment> = Api::namespaced(self.client(), SYSTEM_NAMESPACE);
        let sets: Api<DaemonSet> = Api::namespaced(self.client(), SYSTEM_NAMESPACE);
        let mut names: Vec<_> =
            deployments.list(&everything).await?.iter().map(ResourceExt::name_any).collect();
        names.extend(sets.list(&everything).await?.iter().map(ResourceExt::name_any));
        names.sort();
        Ok(names)
    }

    async fn definitions(&self) -> anyhow::Result<usize> {
        let definitions: Api<CustomResourceDefinition> = Api::all(self.client());
        let all = definitions.list(&ListParams::default()).await?;
        Ok(all.iter().filter(|one| one.spec.group == "staging.berth.dev").count())
    }

    fn ledgers(&self) -> Api<DynamicObject> {
        let kind = GroupVersionKind::gvk("staging.berth.dev", "v1alpha1", "StagingLedger");
        Api::all_with(self.client(), &ApiResource::from_gvk(&kind))
    }
}

const WORKLOADS: [&str; 3] = ["berth-data-plane", "berth-node", "berth-operator"];

/// From nothing to installed, upgraded, guarded, uninstalled, and installed again.
pub async fn installed_upgraded_and_guarded() -> anyhow::Result<()> {
    let release = Release::start().await?;
    let notes = release.done(&["install", "berth", &chart()], VALUES)?;
    ensure!(notes.contains("pod-security.kubernetes.io/enforce=privileged"), "the notes: {notes}");
    ensure!(release.workloads().await? == WORKLOADS, "{:?}", release.workloads().await?);
    ensure!(release.definitions().await? == 8, "{} definitions", release.definitions().await?);
    let drivers: Api<CSIDriver> = Api::all(release.client());
    let driver = drivers.get("csi.berth.dev").await?.spec;
    ensure!(driver.attach_required == Some(false) && driver.storage_capacity == Some(true), "{driver:?}");
    let classes: Api<StorageClass> = Api::all(release.client());
    ensure!(classes.get("blank").await?.allow_volume_expansion != Some(true), "nothing would expand");
    rights(&release).await?;
    guarded_at_creation(&release).await?;
    upgraded(&release).await?;
    guarded(&release).await?;
    release.done(&["install", "berth", &chart()], VALUES).context("installed again")?;
    ensure!(release.workloads().await? == WORKLOADS, "{:?}", release.workloads().await?);
    taken_over(&release)
}

/// Definitions that belong to another release are not taken unless somebody says so.
fn taken_over(release: &Release) -> anyhow::Result<()> {
    release.done(&["uninstall", "berth"], "")?;
    let Err(said) = release.helm(&["install", "other", &chart()], VALUES)? else {
        anyhow::bail!("what belonged to another release was taken");
    };
    ensure!(said.contains("ownership"), "{said}");
    release.done(&["install", "other", &chart(), "--take-ownership"], VALUES).map(drop)
}

/// A reservation has its finalizer from its creation on, beside those it brings; what only asks has none.
async fn guarded_at_creation(release: &Release) -> anyhow::Result<()> {
    let reservations: Api<StagingReservation> = Api::namespaced(release.client(), "default");
    let make = async |name: &str, finalizers: &[&str], dry_run: bool| {
        let object = json!({
            "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation",
            "metadata": {"name": name, "finalizers": finalizers},
            "spec": {"poolName": "fast", "maxSize": "1Gi", "access": "Block", "dryRun": dry_run},
        });
        let made = reservations.create(&PostParams::default(), &serde_json::from_value(object)?).await?;
        let finalizers = made.finalizers().to_vec();
        let none = Patch::Merge(json!({"metadata": {"finalizers": null}}));
        reservations.patch(name, &PatchParams::default(), &none).await?;
        reservations.delete(name, &DeleteParams::default()).await?;
        anyhow::Ok(finalizers)
    };
    wait::until("reservations to be guarded from the start", LIMIT, || async {
        match make("plain", &[], false).await {
            Ok(finalizers) if finalizers == [RELEASE_FINALIZER] => Look::Done(()),
            Ok(other) => Look::NotYet(format!("{other:?}")),
            Err(error) => Look::Failed(std::io::Error::other(format!("{error:#}"))),
        }
    })
    .await?;
    let mut beside = make("beside", &["example.com/mine"], false).await?;
    beside.sort();
    ensure!(beside == ["example.com/mine", RELEASE_FINALIZER], "{beside:?}");
    let asks = make("asks", &[], true).await?;
    ensure!(asks.is_empty(), "what only asks is guarded: {asks:?}");
    Ok(())
}

/// The nodes' account may do what external-provisioner needs, and reads no Secret.
async fn rights(release: &Release) -> anyhow::Result<()> {
    let kubeconfig = release.cluster.service_account_kubeconfig(SYSTEM_NAMESPACE, "berth-node").await?;
    let reviews: Api<SelfSubjectAccessReview> = Api::all(release.cluster.client_for(&kubeconfig).await?);
    for (allowed, verb, group, resource, namespace) in [
        (true, "create", "storage.k8s.io", "csistoragecapacities", SYSTEM_NAMESPACE),
        (false, "create", "storage.k8s.io", "csistoragecapacities", "default"),
        (true, "create", "", "persistentvolumes", ""),
        (true, "update", "", "persistentvolumeclaims", "default"),
        (false, "create", "", "persistentvolumeclaims", "default"),
        (true, "get", "", "pods", SYSTEM_NAMESPACE),
        (false, "get", "", "pods", "default"),
        (false, "get", "", "secrets", SYSTEM_NAMESPACE),
        (false, "list", "", "secrets", "default"),
        (false, "update", "staging.berth.dev", "stagingledgers", ""),
    ] {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let attributes = ResourceAttributes {
            verb: some(verb),
            group: some(group),
            resource: some(resource),
            namespace: some(namespace),
            ..ResourceAttributes::default()
        };
        let spec =
            SelfSubjectAccessReviewSpec { resource_attributes: Some(attributes), ..Default::default() };
        let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
        let answer = reviews.create(&PostParams::default(), &review).await?.status.context("no answer")?;
        ensure!(answer.allowed == allowed, "{verb} {group}/{resource} in {namespace:?}: {}", answer.allowed);
    }
    Ok(())
}

/// An upgrade to a chart with another definition changes that definition.
async fn upgraded(release: &Release) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let newer = dir.path().join("berth");
    let copied = Command::new("cp").arg("-rL").arg(chart()).arg(&newer).status()?;
    ensure!(copied.success(), "cp: {copied}");
    let file = newer.join("files/crds/stagingpools.yaml");
    let text = std::fs::read_to_string(&file)?;
    let (short, more) = ("    - stgpool\n", "    - stgpool\n    - stgpoolx\n");
    ensure!(text.contains(short), "the definition has no short name");
    std::fs::write(&file, text.replace(short, more))?;
    let newer = newer.display().to_string();
    release.done(
        &["upgrade", "berth", &newer],
        &format!("{}\n", VALUES.replace("{networkPolicy", "{logFormat: json, networkPolicy")),
    )?;
    let definitions: Api<CustomResourceDefinition> = Api::all(release.client());
    let pools = definitions.get("stagingpools.staging.berth.dev").await?;
    let names = pools.spec.names.short_names.unwrap_or_default();
    ensure!(names.contains(&"stgpoolx".to_owned()), "the definition is still the old one: {names:?}");
    release.done(&["upgrade", "berth", &chart()], VALUES)?;
    Ok(())
}

/// Nothing is uninstalled while a ledger holds a promise, or something that was recovered; then all is but definitions and objects.
async fn guarded(release: &Release) -> anyhow::Result<()> {
    let ledger = "every-field";
    release.cluster.apply_yaml(&read("e2e/manifests/good/stagingledger.yaml")?).await?;
    refused(release, "still holds promises").await?;
    let recovered =
        json!({"lineage": "6f1c52a4-2f5a-4a86-9e5c-0b7a3a3f2f11", "revision": 7, "recovered": ["uid-9"]});
    change(release, ledger, &json!({"revision": 8, "promises": {"uid-1": null}, "rebuiltFrom": recovered}))
        .await?;
    refused(release, "still holds what a restore has lost").await?;
    change(release, ledger, &json!({"revision": 9, "rebuiltFrom": {"recovered": []}})).await?;
    wait::until("the guard to see that nothing is promised", LIMIT, || async {
        match blocked(release).await {
            Ok(None) => Look::Done(()),
            Ok(Some(said)) => Look::NotYet(said),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    release.done(&["uninstall", "berth"], "")?;
    ensure!(release.workloads().await?.is_empty(), "left: {:?}", release.workloads().await?);
    ensure!(release.definitions().await? == 8, "{} definitions are left", release.definitions().await?);
    release.ledgers().get(ledger).await.context("the object is gone with its release")?;
    Ok(())
}

async fn change(release: &Release, ledger: &str, spec: &serde_json::Value) -> anyhow::Result<()> {
    let patch = Patch::Merge(json!({"spec": spec}));
    release.ledgers().patch(ledger, &PatchParams::default(), &patch).await.map(drop).context("the ledger")
}

/// Waits until the guard holds, then sees that Helm uninstalls nothing.
async fn refused(release: &Release, why: &str) -> anyhow::Result<()> {
    wait::until("the guard to hold", LIMIT, || async {
        match blocked(release).await {
            Ok(Some(said)) if said.contains(why) => Look::Done(()),
            Ok(said) => Look::NotYet(format!("{said:?}")),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    let Err(said) = release.helm(&["uninstall", "berth"], "")? else {
        anyhow::bail!("uninstalled in spite of {why}");
    };
    for wanted in ["pool fast", why, "(ledger every-field)", "docs/operations.md", "--no-hooks"] {
        ensure!(said.contains(wanted), "{why}: no `{wanted}` in: {said}");
    }
    ensure!(release.workloads().await? == WORKLOADS, "{why}: {:?}", release.workloads().await?);
    // Helm has noted that it was about to uninstall. Who wants to go on with the release says so, as the documentation has it.
    let status = release.done(&["status", "berth"], "")?;
    let revision = status.lines().find_map(|line| line.strip_prefix("REVISION: ")).context("no revision")?;
    release.done(&["rollback", "berth", revision], "")?;
    release.done(&["upgrade", "berth", &chart()], VALUES)?;
    let status = release.done(&["status", "berth"], "")?;
    ensure!(status.contains("STATUS: deployed"), "{why}: the release is another one: {status}");
    Ok(())
}

/// What the guard says to who makes what Helm makes first; nothing is made.
async fn blocked(release: &Release) -> Result<Option<String>, kube::Error> {
    let maps: Api<ConfigMap> = Api::namespaced(release.client(), SYSTEM_NAMESPACE);
    let mut map = ConfigMap::default();
    map.metadata.name = Some("berth-uninstall".to_owned());
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    match maps.create(&dry, &map).await {
        Ok(_) => Ok(None),
        Err(kube::Error::Api(status)) if status.code == 422 || status.code == 403 => Ok(Some(status.message)),
        Err(error) => Err(error),
    }
}

/// The operator's pod passes the level `restricted`; the pods on nodes do not, and pass `privileged`. An API server checks each
/// pod as it would be made.
pub async fn pods_pass_their_level() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let cluster = Cluster::start(dir.path()).await?;
    for level in ["restricted", "privileged"] {
        let labels = json!({"pod-security.kubernetes.io/enforce": level});
        let namespace =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": level, "labels": labels}});
        let namespaces: Api<Namespace> = Api::all(cluster.admin());
        namespaces.create(&PostParams::default(), &serde_json::from_value(namespace)?).await?;
    }
    let helm = Helm::new()?;
    for set in super::SETS {
        let rendered = helm.set(set)?;
        for (name, template) in rendered.pods() {
            for level in ["restricted", "privileged"] {
                let mut pod: Pod = serde_json::from_value(template.clone())?;
                pod.metadata.name = Some(name.to_owned());
                let pods: Api<Pod> = Api::namespaced(cluster.admin(), level);
                let dry = PostParams { dry_run: true, ..PostParams::default() };
                let outcome = pods.create(&dry, &pod).await;
                let wanted = level == "privileged" || name == "berth-operator";
                match outcome {
                    Ok(_) => ensure!(wanted, "{set}: {name} passes {level}"),
                    Err(kube::Error::Api(status)) if !wanted && status.code == 403 => {}
                    Err(error) => return Err(error).with_context(|| format!("{set}: {name} at {level}")),
                }
            }
        }
    }
    Ok(())
}
