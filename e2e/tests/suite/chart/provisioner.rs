//! The real external-provisioner, started as the chart starts it and with the rights that the chart gives: claims become volumes of a
//! real agent, and go again. Scheduler, binder and kubelet are played here.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_e2e::cluster::SYSTEM_NAMESPACE;
use berth_e2e::process::{Process, Program};
use berth_e2e::site::{Site, SiteOptions};
use berth_e2e::tools::Tool;
use berth_e2e::wait::{self, Look};
use k8s_openapi::api::core::v1::{Event, PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::api::storage::v1::CSIStorageCapacity;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};

use super::helm::{Helm, Rendered, items, text};
use super::read;
use crate::remains::nothing_remains;
use crate::scene::{POOL, make_pool};

/// How long one step may take. The sidecar pauses longer after each failure.
const LIMIT: Duration = Duration::from_secs(90);

/// The pod that the sidecar would run in.
const POD: &str = "berth-node-abcde";

/// The annotation by which the scheduler says where a claim's pod goes.
const SELECTED: &str = "volume.kubernetes.io/selected-node";

/// One claim fits and becomes a volume, one does not and is given back to the scheduler, and what is left is published; at the end
/// nothing of it remains.
pub async fn claims_become_volumes() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let site = Site::start(SiteOptions::new(&dir.path().join("site"))).await?;
    make_pool(&site).await?;
    let rendered = Helm::new()?.template(&format!("{{storageClasses: [{{name: blank, pool: {POOL}}}]}}"))?;
    for class in rendered.of("StorageClass") {
        site.apply(&class.to_string()).await?;
    }
    site.apply(&read("charts/berth/files/rbac/provisioner.yaml")?).await?;
    let mut sidecar = sidecar(&site, &rendered, dir.path()).await?;
    let outcome = async {
        capacity_is_published(&site).await.context("capacity")?;
        let volume = fits(&site).await.context("a claim that fits")?;
        does_not_fit(&site).await.context("a claim that does not fit")?;
        given_back(&site, &volume).await.context("a volume that is given back")
    };
    outcome.await.with_context(|| format!("the sidecar said: {}", sidecar.log_tail()))?;
    ensure!(sidecar.is_running(), "the sidecar ended: {}", sidecar.log_tail());
    let log = std::fs::read_to_string(sidecar.log())?;
    let denied = log.lines().find(|line| line.contains("forbidden"));
    ensure!(denied.is_none(), "the sidecar lacks a right: {denied:?}");
    sidecar.stop(Duration::from_secs(10))?;
    nothing_remains(&site).await?;
    ensure!(site.stop().is_empty(), "a loop device stays");
    Ok(())
}

/// Starts the sidecar as its container does, with the node's account, beside a pod of the agents.
async fn sidecar(site: &Site, rendered: &Rendered, dir: &Path) -> anyhow::Result<Process> {
    let (_, template) = rendered.pods().find(|(name, _)| *name == "berth-node").context("no agents")?;
    let mut pod: Pod = serde_json::from_value(template.clone())?;
    pod.metadata.name = Some(POD.to_owned());
    let pods: Api<Pod> = Api::namespaced(site.client(), SYSTEM_NAMESPACE);
    pods.create(&PostParams::default(), &pod).await.context("the agents' pod")?;
    let containers = items(&template["spec"]["containers"]);
    let container = containers.iter().find(|one| one["name"] == "provisioner").context("no provisioner")?;
    let node = &site.nodes()[0];
    let socket = node.csi_socket().display().to_string();
    let words = items(&container["args"]).iter().map(|word| text(word).replace("/csi/csi.sock", &socket));
    let kubeconfig = site.cluster().service_account_kubeconfig(SYSTEM_NAMESPACE, "berth-node").await?;
    let mut program =
        Program::new("csi-provisioner", &Tool::CsiProvisioner.obtain()?, &dir.join("provisioner.log"))
            .args(words)
            .args(["--kubeconfig".as_ref(), kubeconfig.as_os_str()]);
    for variable in items(&container["env"]) {
        let value = match text(&variable["valueFrom"]["fieldRef"]["fieldPath"]) {
            "spec.nodeName" => node.name(),
            "metadata.name" => POD,
            "metadata.namespace" => SYSTEM_NAMESPACE,
            other => anyhow::bail!("no field {other}"),
        };
        program = program.env(text(&variable["name"]), value);
    }
    Ok(program.spawn()?)
}

/// What the node has left is an object of the agents' pod, for this class and this node.
async fn capacity_is_published(site: &Site) -> anyhow::Result<()> {
    let capacities: Api<CSIStorageCapacity> = Api::namespaced(site.client(), SYSTEM_NAMESPACE);
    let found = wait::until("the capacity to be published", LIMIT, || async {
        match capacities.list(&ListParams::default()).await {
            Ok(list) => match list.items.into_iter().find(|one| one.capacity.is_some()) {
                Some(capacity) => Look::Done(capacity),
                None => Look::NotYet("none".to_owned()),
            },
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    ensure!(found.storage_class_name == "blank", "of class {}", found.storage_class_name);
    let topology = found.node_topology.as_ref().and_then(|one| one.match_labels.clone()).unwrap_or_default();
    let wanted = ("topology.berth.dev/node".to_owned(), site.nodes()[0].name().to_owned());
    ensure!(topology.into_iter().eq([wanted]), "of {:?}", found.node_topology);
    let owners = found.owner_references();
    ensure!(owners.iter().any(|one| one.kind == "Pod" && one.name == POD), "owned by {owners:?}");
    println!("capacity: {:?}", found.capacity);
    Ok(())
}

/// A claim whose pod goes to the site's node.
async fn claim(site: &Site, name: &str, size: &str) -> anyhow::Result<Api<PersistentVolumeClaim>> {
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(site.client(), "default");
    let claim = json!({
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "annotations": {
            "volume.kubernetes.io/storage-provisioner": "csi.berth.dev",
            SELECTED: site.nodes()[0].name(),
        }},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "blank",
            "resources": {"requests": {"storage": size}},
        },
    });
    claims.create(&PostParams::default(), &serde_json::from_value(claim)?).await?;
    Ok(claims)
}

/// Returns the volume's name.
async fn fits(site: &Site) -> anyhow::Result<String> {
    claim(site, "small", "80Mi").await?;
    let volumes: Api<PersistentVolume> = Api::all(site.client());
    let volume = wait::until("a PersistentVolume", LIMIT, || async {
        match volumes.list(&ListParams::default()).await {
            Ok(list) => list.items.into_iter().next().map_or(Look::NotYet("none".to_owned()), Look::Done),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    let spec = serde_json::to_value(&volume.spec)?;
    ensure!(spec["claimRef"]["name"] == "small" && spec["csi"]["driver"] == "csi.berth.dev", "{spec}");
    ensure!(text(&spec["csi"]["volumeHandle"]).starts_with("v1-"), "{spec}");
    let terms = &spec["nodeAffinity"]["required"]["nodeSelectorTerms"];
    ensure!(terms.to_string().contains(site.nodes()[0].name()), "usable anywhere: {terms}");
    Ok(volume.name_any())
}

/// A claim that does not fit loses its node, and an event says by how much it is too large.
async fn does_not_fit(site: &Site) -> anyhow::Result<()> {
    let claims = claim(site, "large", "100Gi").await?;
    wait::until("the claim to be given back to the scheduler", LIMIT, || async {
        match claims.get("large").await {
            Ok(claim) if !claim.annotations().contains_key(SELECTED) => Look::Done(()),
            Ok(claim) => Look::NotYet(format!("{:?}", claim.annotations())),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    let events: Api<Event> = Api::namespaced(site.client(), "default");
    let told = wait::until("an event", LIMIT, || async {
        match events.list(&ListParams::default().fields("involvedObject.name=large")).await {
            Ok(list) => {
                let failed = |event: &&Event| event.reason.as_deref() == Some("ProvisioningFailed");
                let said = list.items.iter().find(failed).and_then(|event| event.message.clone());
                said.map_or(Look::NotYet("none".to_owned()), Look::Done)
            }
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    println!("event: {told}");
    ensure!(told.contains("ResourceExhausted"), "{told}");
    let free: Value = json!({"metadata": {"finalizers": null}});
    claims.patch("large", &PatchParams::default(), &Patch::Merge(free)).await?;
    claims.delete("large", &DeleteParams::default()).await?;
    Ok(())
}

/// The claim goes, and the volume with it. What controllers of Kubernetes do in between is done here: nothing protects what nobody
/// uses, and the volume is released.
async fn given_back(site: &Site, volume: &str) -> anyhow::Result<()> {
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(site.client(), "default");
    let volumes: Api<PersistentVolume> = Api::all(site.client());
    let unprotected = json!({"metadata": {"finalizers": null}});
    claims.patch("small", &PatchParams::default(), &Patch::Merge(unprotected)).await?;
    claims.delete("small", &DeleteParams::default()).await?;
    let kept = volumes.get(volume).await?.finalizers().to_vec();
    ensure!(kept.iter().any(|one| one.contains("external-provisioner")), "unguarded: {kept:?}");
    let kept: Vec<_> = kept.into_iter().filter(|one| one != "kubernetes.io/pv-protection").collect();
    let finalizers = Patch::Merge(json!({"metadata": {"finalizers": kept}}));
    volumes.patch(volume, &PatchParams::default(), &finalizers).await?;
    let released = Patch::Merge(json!({"status": {"phase": "Released"}}));
    volumes.patch_status(volume, &PatchParams::default(), &released).await?;
    wait::until("the volume to go", LIMIT, || async {
        match volumes.get_opt(volume).await {
            Ok(None) => Look::Done(()),
            Ok(Some(volume)) => Look::NotYet(format!("{:?}", volume.status)),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    Ok(())
}
