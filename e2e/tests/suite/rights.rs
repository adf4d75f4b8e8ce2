//! What a node's agent may write: what is its own, by the policy of the chart and the token of its pod.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_e2e::cluster::{Cluster, SYSTEM_NAMESPACE};
use berth_e2e::wait::{self, Look};
use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::ApiResource;
use serde_json::{Value, json};

use crate::manifests::repository;
use crate::scenario::{CONTROL_PLANE, Scenario};

const ACCOUNT: &str = "berth-node";
/// How long the API server may take to act by a new policy.
const LIMIT: Duration = Duration::from_secs(30);

pub fn scenarios() -> Vec<Scenario> {
    vec![Scenario::new("rights::a_node_writes_what_is_its_own", CONTROL_PLANE, a_node_writes_what_is_its_own)]
}

/// The kinds whose status says where they are placed.
const PLACED: [(&str, &str); 4] = [
    ("stagingreservation", "stagingreservations"),
    ("templateimport", "templateimports"),
    ("imagetransfer", "imagetransfers"),
    ("imagestore", "imagestores"),
];

async fn a_node_writes_what_is_its_own() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let cluster = Cluster::start(dir.path()).await?;
    cluster.install_crds(&repository().join("crds")).await?;
    for file in ["rbac/node", "admission/nodes-write-their-own"] {
        cluster.apply_file(&repository().join(format!("charts/berth/files/{file}.yaml"))).await?;
    }
    let mine = bound(&cluster, "node-1").await?;
    let others = bound(&cluster, "node-2").await?;
    let plain =
        cluster.client_for(&cluster.service_account_kubeconfig(SYSTEM_NAMESPACE, ACCOUNT).await?).await?;
    reports(&mine, &others, &plain).await?;
    leases(&mine, &others).await?;
    images(&cluster.admin(), &mine, &others).await?;
    for (manifest, plural) in PLACED {
        placed(&cluster.admin(), &mine, &others, manifest, plural).await.context(manifest)?;
    }
    Ok(())
}

async fn bound(cluster: &Cluster, node: &str) -> anyhow::Result<Client> {
    let kubeconfig = cluster.node_bound_kubeconfig(SYSTEM_NAMESPACE, ACCOUNT, node, Ipv4Addr::LOCALHOST);
    Ok(cluster.client_for(&kubeconfig.await?).await?)
}

fn berth(kind: &str, plural: &str) -> ApiResource {
    ApiResource {
        group: "staging.berth.dev".to_owned(),
        version: "v1alpha1".to_owned(),
        api_version: "staging.berth.dev/v1alpha1".to_owned(),
        kind: kind.to_owned(),
        plural: plural.to_owned(),
    }
}

/// Refused by the policy, with these words.
fn refused<T>(answer: Result<T, kube::Error>, words: &str) -> anyhow::Result<()> {
    match answer {
        Err(kube::Error::Api(status)) if status.message.contains(words) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("refused without `{words}`")),
        Ok(_) => anyhow::bail!("taken, and not refused with `{words}`"),
    }
}

/// Its own report, and no other one's; nothing with a token that names no node.
async fn reports(mine: &Client, others: &Client, plain: &Client) -> anyhow::Result<()> {
    let kind = berth("StagingNode", "stagingnodes");
    let api = |client: &Client| Api::<DynamicObject>::all_with(client.clone(), &kind);
    let report: DynamicObject = serde_json::from_value(json!({
        "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingNode",
        "metadata": {"name": "node-1"}, "spec": {"nodeName": "node-1"},
    }))?;
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    wait::until("the policy to be acted by", LIMIT, || async {
        match api(others).create(&dry, &report).await {
            Err(kube::Error::Api(status)) if status.message.contains("node node-2 writes") => Look::Done(()),
            Ok(_) => Look::NotYet("it is taken".to_owned()),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    refused(api(plain).create(&dry, &report).await, "names no node")?;
    api(mine).create(&PostParams::default(), &report).await.context("its own report")?;
    let seen = Patch::Merge(json!({"status": {"versions": {"agent": "1"}}}));
    api(mine).patch_status("node-1", &PatchParams::default(), &seen).await.context("its own status")?;
    refused(
        api(others).patch_status("node-1", &PatchParams::default(), &seen).await,
        "node node-2 writes what is of node-1",
    )
}

/// A Lease is renewed by who holds it, and not taken.
async fn leases(mine: &Client, others: &Client) -> anyhow::Result<()> {
    use k8s_openapi::api::coordination::v1::Lease;
    let api = |client: &Client| Api::<Lease>::namespaced(client.clone(), SYSTEM_NAMESPACE);
    let lease = |holder: &str| -> serde_json::Result<Lease> {
        serde_json::from_value(
            json!({"metadata": {"name": "berth-node-1"}, "spec": {"holderIdentity": holder}}),
        )
    };
    api(mine).create(&PostParams::default(), &lease("node-1")?).await.context("its own Lease")?;
    let take = Patch::Merge(json!({"spec": {"holderIdentity": "node-2"}}));
    refused(
        api(others).patch("berth-node-1", &PatchParams::default(), &take).await,
        "node node-2 writes what is of node-2, node-1",
    )
}

async fn images(admin: &Client, mine: &Client, others: &Client) -> anyhow::Result<()> {
    let kind = berth("StagedImage", "stagedimages");
    let api = |client: &Client| Api::<DynamicObject>::all_with(client.clone(), &kind);
    let image = crate::manifests::good("stagedimage")?;
    let image = api(admin).create(&PostParams::default(), &serde_json::from_value(image)?).await?;
    let name = image.metadata.name.context("a name")?;
    let filling = Patch::Merge(json!({"status": {"state": "Filling"}}));
    api(mine).patch_status(&name, &PatchParams::default(), &filling).await.context("an image of its own")?;
    refused(
        api(others).patch_status(&name, &PatchParams::default(), &filling).await,
        "node node-2 writes what is of node-1",
    )
}

/// The status of what is assigned to it, except the place itself.
async fn placed(
    admin: &Client,
    mine: &Client,
    others: &Client,
    manifest: &str,
    plural: &str,
) -> anyhow::Result<()> {
    let object = crate::manifests::good(manifest)?;
    let kind = berth(object["kind"].as_str().context("a kind")?, plural);
    let api = |client: &Client| Api::<DynamicObject>::namespaced_with(client.clone(), "default", &kind);
    let mut object: DynamicObject = serde_json::from_value(object)?;
    object.metadata.namespace = Some("default".to_owned());
    let name = api(admin).create(&PostParams::default(), &object).await?.metadata.name.context("a name")?;
    let own = Patch::Merge(json!({"status": {"conditions": []}}));
    let place = |node: &str, generation: i64| -> Patch<Value> {
        Patch::Merge(json!({"status": {"assignment": {"node": node, "generation": generation}}}))
    };
    let params = PatchParams::default();
    refused(api(mine).patch_status(&name, &params, &own).await, "writes what is of no node")?;
    refused(api(mine).patch_status(&name, &params, &place("node-1", 1)).await, "of node-1, no node")?;
    api(admin).patch_status(&name, &params, &place("node-1", 1)).await?;
    let told = json!([{
        "type": "Ready", "status": "True", "reason": "Ready", "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }]);
    let told = Patch::Merge(json!({"status": {"conditions": told}}));
    api(mine).patch_status(&name, &params, &told).await.context("what is assigned to it")?;
    refused(api(others).patch_status(&name, &params, &told).await, "node node-2 writes what is of node-1")?;
    refused(api(mine).patch_status(&name, &params, &place("node-1", 2)).await, "A place is written by")?;
    ensure!(api(admin).get(&name).await?.data["status"]["assignment"]["generation"] == 1, "it was written");
    Ok(())
}
