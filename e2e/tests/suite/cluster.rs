//! The test control plane itself: what every other scenario stands on.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_e2e::cluster::{Cluster, SYSTEM_NAMESPACE};
use berth_e2e::wait::{self, Look};
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Secret};
use kube::api::{ListParams, PostParams};
use kube::{Api, Client, ResourceExt};

use crate::scenario::{CONTROL_PLANE, Need, Scenario};

pub fn scenarios() -> Vec<Scenario> {
    let kubectl = [CONTROL_PLANE, &[Need::Command("kubectl")]].concat();
    vec![
        Scenario::new("cluster::starts_and_answers", CONTROL_PLANE, starts_and_answers),
        Scenario::new("cluster::kubectl_can_use_it", &kubectl, kubectl_can_use_it),
        Scenario::new(
            "cluster::rbac_denies_what_is_not_granted",
            CONTROL_PLANE,
            rbac_denies_what_is_not_granted,
        ),
        Scenario::new("cluster::tokens_name_their_node", CONTROL_PLANE, tokens_name_their_node),
        Scenario::new("cluster::etcd_keeps_data_over_a_kill", CONTROL_PLANE, etcd_keeps_data_over_a_kill),
        Scenario::new(
            "cluster::crds_are_installed_and_enforced",
            CONTROL_PLANE,
            crds_are_installed_and_enforced,
        ),
    ]
}

async fn starts_and_answers() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let cluster = Cluster::start(dir.path()).await?;
    let namespaces: Api<Namespace> = Api::all(cluster.admin());
    let names: Vec<_> =
        namespaces.list(&ListParams::default()).await?.iter().map(ResourceExt::name_any).collect();
    for wanted in ["default", "kube-system", SYSTEM_NAMESPACE] {
        ensure!(names.iter().any(|name| name == wanted), "no namespace {wanted} among {names:?}");
    }
    let version = cluster.admin().apiserver_version().await?;
    ensure!(version.git_version.starts_with("v1."), "version {}", version.git_version);
    cluster.stop();
    Ok(())
}

async fn kubectl_can_use_it() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let cluster = Cluster::start(dir.path()).await?;
    let kubeconfig = cluster.admin_kubeconfig();
    let output = tokio::task::spawn_blocking(move || {
        let mut kubectl = Command::new("kubectl");
        kubectl.arg("--kubeconfig").arg(kubeconfig).args(["--request-timeout=30s", "auth", "whoami"]);
        kubectl.args(["-o", "jsonpath={.status.userInfo.username}"]).output()
    })
    .await??;
    let who = String::from_utf8_lossy(&output.stdout);
    ensure!(who == "admin", "kubectl says {who:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A service account may read nothing; after a grant it may read what was granted, where it was granted, and still
/// nothing else.
async fn rbac_denies_what_is_not_granted() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let cluster = Cluster::start(dir.path()).await?;
    let kubeconfig = cluster.service_account_kubeconfig("tenant", "reader").await?;
    let reader = cluster.client_for(&kubeconfig).await?;
    let maps = |namespace: &str| Api::<ConfigMap>::namespaced(reader.clone(), namespace);
    let denied = maps("tenant").list(&ListParams::default()).await;
    ensure!(is_forbidden(&denied), "without a grant: {denied:?}");
    cluster
        .apply_yaml(
            "apiVersion: rbac.authorization.k8s.io/v1\nkind: Role\nmetadata: {name: reader, namespace: tenant}\n\
             rules: [{apiGroups: [''], resources: [configmaps], verbs: [get, list]}]\n---\n\
             apiVersion: rbac.authorization.k8s.io/v1\nkind: RoleBinding\n\
             metadata: {name: reader, namespace: tenant}\n\
             roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader}\n\
             subjects: [{kind: ServiceAccount, name: reader, namespace: tenant}]\n",
        )
        .await?;
    // The authorizer learns of the grant by a watch.
    wait::until("the grant to hold", Duration::from_secs(20), || async {
        match maps("tenant").list(&ListParams::default()).await {
            Ok(_) => Look::Done(()),
            denied if is_forbidden(&denied) => Look::NotYet("forbidden".to_owned()),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    let elsewhere = maps(SYSTEM_NAMESPACE).list(&ListParams::default()).await;
    ensure!(is_forbidden(&elsewhere), "in another namespace: {elsewhere:?}");
    let secrets = Api::<Secret>::namespaced(reader.clone(), "tenant").list(&ListParams::default()).await;
    ensure!(is_forbidden(&secrets), "another kind: {secrets:?}");
    Ok(())
}

fn is_forbidden<T>(outcome: &kube::Result<T>) -> bool {
    matches!(outcome, Err(kube::Error::Api(status)) if status.is_forbidden())
}

async fn tokens_name_their_node() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let cluster = Cluster::start(dir.path()).await?;
    let bound =
        cluster.node_bound_kubeconfig(SYSTEM_NAMESPACE, "berth-node", "node-7", Ipv4Addr::LOCALHOST).await?;
    let plain = cluster.service_account_kubeconfig(SYSTEM_NAMESPACE, "berth-node").await?;
    let node = node_claim(cluster.client_for(&bound).await?).await?;
    ensure!(node == ["node-7"], "the bound token says {node:?}");
    let node = node_claim(cluster.client_for(&plain).await?).await?;
    ensure!(node.is_empty(), "the plain token says {node:?}");
    Ok(())
}

/// What the API server knows of the node on which a token's bearer runs.
async fn node_claim(client: Client) -> anyhow::Result<Vec<String>> {
    let reviews: Api<SelfSubjectReview> = Api::all(client);
    let review = reviews.create(&PostParams::default(), &SelfSubjectReview::default()).await?;
    let user = review.status.and_then(|status| status.user_info).context("no user in the review")?;
    let mut extra = user.extra.unwrap_or_default();
    Ok(extra.remove("authentication.kubernetes.io/node-name").unwrap_or_default())
}

async fn etcd_keeps_data_over_a_kill() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(dir.path()).await?;
    let maps: Api<ConfigMap> = Api::namespaced(cluster.admin(), "default");
    let mut map = ConfigMap::default();
    map.metadata.name = Some("kept".to_owned());
    map.data = Some([("answer".to_owned(), "42".to_owned())].into());
    let before = maps.create(&PostParams::default(), &map).await?;
    cluster.kill_etcd();
    let mut other = map.clone();
    other.metadata.name = Some("other".to_owned());
    let params = PostParams::default();
    let write = tokio::time::timeout(Duration::from_secs(3), maps.create(&params, &other)).await;
    ensure!(!matches!(write, Ok(Ok(_))), "a write was accepted while etcd was down");
    cluster.restart().await?;
    let after = wait::until("the object", Duration::from_secs(60), || async {
        match maps.get("kept").await {
            Ok(map) => Look::Done(map),
            Err(kube::Error::Api(status)) if status.is_not_found() => Look::Failed(kube::Error::Api(status)),
            Err(error) => Look::NotYet(error.to_string()),
        }
    })
    .await?;
    ensure!(after.data == map.data && after.uid() == before.uid(), "{after:?}");
    ensure!(after.resource_version() == before.resource_version(), "{:?}", after.resource_version());
    Ok(())
}

/// The CRDs of this tree are accepted by a real API server, and their schemas refuse what they should.
async fn crds_are_installed_and_enforced() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let cluster = Cluster::start(dir.path()).await?;
    let crds = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../crds"));
    cluster.install_crds(crds).await?;
    let refused = cluster
        .apply_yaml(
            "apiVersion: staging.berth.dev/v1alpha1\nkind: StagingPool\nmetadata: {name: none}\n\
             spec: {backend: {}}\n",
        )
        .await;
    let error =
        format!("{:#}", anyhow::Error::from(refused.err().context("a pool without a backend was accepted")?));
    ensure!(error.contains("backend"), "{error}");
    Ok(())
}
