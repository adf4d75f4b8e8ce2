//! What kubelet and the sidecars may send, and what is made of it.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use axum::http::{StatusCode, Uri};
use berth_core::ids::{NodeName, ObjectName, PoolName};
use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_device::mounts::FsType;
use berth_node::agent::asked::{self, Carrier as _};
use berth_node::agent::jobs::Jobs;
use berth_node::agent::news::News;
use berth_node::agent::pools::{OpenPool, PoolSpec, Pools};
use berth_node::agent::watches::Watches;
use berth_node::area::Backend;
use berth_node::csi::v1::controller_server::Controller as _;
use berth_node::csi::v1::node_server::Node as _;
use berth_node::csi::v1::volume_capability::access_mode::Mode;
use berth_node::csi::v1::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use berth_node::csi::v1::{
    CapacityRange, CreateVolumeRequest, GetCapacityRequest, NodeGetVolumeStatsRequest,
    NodePublishVolumeRequest, NodeStageVolumeRequest, NodeUnstageVolumeRequest, Topology,
    TopologyRequirement, VolumeCapability, VolumeContentSource,
};
use berth_node::metrics::Metrics;
use berth_node::node::{Config, LastPreflight, Node};
use berth_node::operation::Operation;
use berth_node::rpc::Services;
use berth_node::rpc::in_flight::InFlight;
use berth_node::rpc::request::{Use, VolumeRequest, for_one_workload, path, use_of};
use berth_node::rpc::status::RpcError;
use berth_record::NodeRecord;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Status};

const MIB: i64 = 1 << 20;

fn capability(access: AccessType, mode: Mode) -> VolumeCapability {
    VolumeCapability { access_mode: Some(AccessMode { mode: mode.into() }), access_type: Some(access) }
}

fn block() -> VolumeCapability {
    capability(AccessType::Block(BlockVolume {}), Mode::SingleNodeWriter)
}

fn mount(fs_type: &str) -> VolumeCapability {
    let mount = MountVolume { fs_type: fs_type.to_owned(), ..MountVolume::default() };
    capability(AccessType::Mount(mount), Mode::SingleNodeWriter)
}

fn parameters(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn request() -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: "pvc-1".to_owned(),
        capacity_range: Some(CapacityRange { required_bytes: 10 * MIB, limit_bytes: 0 }),
        volume_capabilities: vec![block()],
        parameters: parameters(&[("pool", "fast")]),
        ..CreateVolumeRequest::default()
    }
}

fn parse(request: &CreateVolumeRequest) -> Result<VolumeRequest, RpcError> {
    VolumeRequest::parse(request, &NodeName::from("n1"))
}

#[allow(clippy::unnecessary_wraps)] // as the field of the request is
fn on(nodes: &[&str]) -> Option<TopologyRequirement> {
    let segments = |node: &&str| Topology { segments: parameters(&[("topology.berth.dev/node", node)]) };
    Some(TopologyRequirement { requisite: nodes.iter().map(segments).collect(), preferred: Vec::new() })
}

#[test]
fn what_cannot_be_made_is_refused_with_the_code_that_the_sidecar_needs() {
    type Edit = fn(&mut CreateVolumeRequest);
    let cases: [(&str, Code, Edit); 16] = [
        ("name", Code::InvalidArgument, |r| r.name.clear()),
        ("name", Code::InvalidArgument, |r| r.name = "x".repeat(129)),
        ("volume_capabilities", Code::InvalidArgument, |r| r.volume_capabilities.clear()),
        ("volume_capability", Code::InvalidArgument, |r| {
            r.volume_capabilities =
                vec![capability(AccessType::Block(BlockVolume {}), Mode::MultiNodeMultiWriter)];
        }),
        ("volume_capability", Code::InvalidArgument, |r| r.volume_capabilities[0].access_mode = None),
        ("volume_capability", Code::InvalidArgument, |r| r.volume_capabilities[0].access_type = None),
        ("btrfs", Code::InvalidArgument, |r| r.volume_capabilities = vec![mount("btrfs")]),
        ("volume_content_source", Code::InvalidArgument, |r| {
            r.volume_content_source = Some(VolumeContentSource::default());
        }),
        ("pool", Code::InvalidArgument, |r| r.parameters.clear()),
        ("hostmount", Code::InvalidArgument, |r| {
            r.parameters = parameters(&[("pool", "p"), ("hostmount", "true")]);
        }),
        ("template: x", Code::InvalidArgument, |r| {
            r.parameters = parameters(&[("pool", "p"), ("template", "x")]);
        }),
        ("../b", Code::InvalidArgument, |r| {
            r.parameters = parameters(&[("pool", "p"), ("template", "a/../b")]);
        }),
        ("partition: 0", Code::InvalidArgument, |r| {
            r.parameters = parameters(&[("pool", "p"), ("partition", "0")]);
        }),
        ("HostMountNotAllowed", Code::InvalidArgument, |r| {
            r.parameters = parameters(&[("pool", "p"), ("template", "a/b")]);
            r.volume_capabilities = vec![mount("ext4")];
        }),
        ("limit", Code::OutOfRange, |r| {
            r.capacity_range =
                Some(CapacityRange { required_bytes: 10 * MIB + 1, limit_bytes: 10 * MIB + 2 });
        }),
        ("not among", Code::ResourceExhausted, |r| r.accessibility_requirements = on(&["n2", "n3"])),
    ];
    for (mentions, code, edit) in cases {
        let mut asked = request();
        edit(&mut asked);
        let error = parse(&asked).expect_err(mentions);
        let status = Status::from(&error);
        assert_eq!(status.code(), code, "{error}");
        assert!(status.message().contains(mentions), "`{}` names `{mentions}`", status.message());
        assert!(status.details().is_empty());
    }
    let mut negative = request();
    negative.capacity_range = Some(CapacityRange { required_bytes: -1, limit_bytes: 0 });
    assert!(parse(&negative).is_err());
}

#[test]
fn sizes_are_whole_and_within_bounds() {
    for (required, limit, template, size) in [
        (10 * MIB, 0, false, 10 * MIB),
        (10 * MIB + 1, 0, false, 11 * MIB),
        (10 * MIB + 1, 11 * MIB, false, 11 * MIB),
        (0, 0, false, 1024 * MIB),
        (0, 100 * MIB, false, 100 * MIB),
        (0, 0, true, MIB),
    ] {
        let mut asked = request();
        asked.capacity_range = Some(CapacityRange { required_bytes: required, limit_bytes: limit });
        if template {
            asked.parameters.insert("template".to_owned(), "images/debian".to_owned());
        }
        assert_eq!(parse(&asked).unwrap().size, Bytes::from_i64(size), "{required} {limit}");
    }
}

#[test]
fn an_image_beyond_the_limit_is_refused_with_both_sizes() {
    let mut asked = request();
    asked.parameters.insert("template".to_owned(), "images/debian".to_owned());
    asked.capacity_range = Some(CapacityRange { required_bytes: 10 * MIB, limit_bytes: 20 * MIB });
    let asked = parse(&asked).unwrap();
    let with = |mib: i64| asked.size_with(Bytes::from_i64(mib * MIB));
    assert_eq!(with(5).unwrap(), Bytes::from_i64(10 * MIB));
    assert_eq!(with(20).unwrap(), Bytes::from_i64(20 * MIB));
    let status = Status::from(&with(21).expect_err("beyond the limit"));
    assert_eq!(status.code(), Code::OutOfRange);
    assert_eq!(status.message(), "21 MiB are needed, more than the limit of 20 MiB");
}

#[test]
fn everything_that_is_meant_is_understood() {
    let mut asked = request();
    asked.volume_capabilities = vec![mount("")];
    asked.accessibility_requirements = on(&["n2", "n1"]);
    asked.parameters = parameters(&[
        ("pool", "fast"),
        ("template", "images/debian-12.1"),
        ("hostMount", "true"),
        ("partition", "1"),
        ("csi.storage.k8s.io/pvc/namespace", "team"),
        ("csi.storage.k8s.io/pvc/name", "disk"),
        ("csi.storage.k8s.io/pv/name", "pv"),
    ]);
    let parsed = parse(&asked).unwrap();
    assert_eq!(parsed.template, Some(ObjectName::new("images", "debian-12.1")));
    assert_eq!(parsed.claim, Some(ObjectName::new("team", "disk")));
    assert_eq!((parsed.host_mount, parsed.partition), (true, Some(1)));
    assert_eq!(use_of(Some(&mount("xfs"))).unwrap(), Use::Filesystem(FsType::Xfs));
    assert_eq!(use_of(Some(&block())).unwrap(), Use::Block);
}

#[test]
fn one_workload_only_is_what_one_access_mode_says() {
    for (mode, alone) in [
        (Mode::SingleNodeSingleWriter, true),
        (Mode::SingleNodeMultiWriter, false),
        (Mode::SingleNodeWriter, false),
        (Mode::SingleNodeReaderOnly, false),
    ] {
        let asked = capability(AccessType::Block(BlockVolume {}), mode);
        assert_eq!(for_one_workload(Some(&asked)), alone, "{mode:?}");
        assert_eq!(use_of(Some(&asked)).unwrap(), Use::Block, "{mode:?}");
    }
    assert!(!for_one_workload(None));
}

#[test]
fn paths_cannot_leave_where_they_are_meant_to_be() {
    for bad in ["", "/", "relative", "/a/../b", "/..", "./a", "/a\0b"] {
        let error = path("target_path", bad).expect_err(bad);
        assert!(error.to_string().starts_with("target_path"), "{error}");
    }
    assert!(path("target_path", &format!("/{}", "x".repeat(5000))).is_err());
    assert_eq!(
        path("target_path", "/var/lib/kubelet/pods/x").unwrap().to_str(),
        Some("/var/lib/kubelet/pods/x")
    );
}

#[test]
fn a53_one_call_for_each_volume_and_the_second_is_told_what_runs() {
    let calls = InFlight::default();
    let first = calls.begin("v1-a", "NodeStageVolume").unwrap();
    let other = calls.begin("v1-b", "NodeStageVolume").unwrap();
    let busy = calls.clone().begin("v1-a", "NodeUnstageVolume").err().unwrap();
    let status = Status::from(&busy);
    assert_eq!(status.code(), Code::Aborted);
    assert!(
        status.message().contains("NodeStageVolume for v1-a has been running for"),
        "{}",
        status.message()
    );
    drop(first);
    let again = calls.begin("v1-a", "NodeUnstageVolume").unwrap();
    drop((again, other));
}

/// What an API server lists, by the plural of the kind; `None` while it is away. What is not named is empty.
type Lists = Arc<RwLock<Option<BTreeMap<&'static str, Vec<Value>>>>>;

/// Serves lists in which nothing ever changes; returns its address.
async fn api_server(lists: Lists) -> String {
    let answer = move |uri: Uri| {
        let lists = Arc::clone(&lists);
        async move {
            let watch = uri.query().is_some_and(|query| query.contains("watch=true"));
            let plural = uri.path().rsplit('/').next().unwrap_or_default();
            let items =
                lists.read().unwrap().as_ref().map(|lists| lists.get(plural).cloned().unwrap_or_default());
            match items {
                None => (StatusCode::SERVICE_UNAVAILABLE, String::new()),
                Some(_) if watch => std::future::pending().await,
                Some(items) => {
                    let list = json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": "1"}, "items": items});
                    (StatusCode::OK, list.to_string())
                }
            }
        }
    };
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(answer)).await });
    address
}

async fn node(dir: &Path, lists: &Lists) -> Arc<Node> {
    let address = api_server(Arc::clone(lists)).await;
    let client = kube::Client::try_from(kube::Config::new(address.parse().unwrap())).unwrap();
    let (name, wake, stop) = (NodeName::from("n1"), Arc::new(Notify::new()), CancellationToken::new());
    Arc::new(Node {
        watches: Watches::start(&client, &name, "berth-system", Arc::clone(&wake), stop.clone()),
        client,
        config: Config {
            state_dir: dir.to_owned(),
            mount_root: dir.join("mnt"),
            system_namespace: "berth-system".to_owned(),
            hydration_rate: Bytes::mib(64),
            allow_source_cidrs: Vec::new(),
            default_staging: berth_core::transfer::Staging::Auto,
        },
        pools: Pools::new(name.clone(), dir.join("mnt"), dir),
        jobs: Jobs::new(Arc::clone(&wake), stop.clone()),
        news: News::default(),
        record: Arc::new(NodeRecord::create(&dir.join("node.redb"), &name).unwrap()),
        reporting: tokio::sync::Mutex::default(),
        in_flight: InFlight::default(),
        preflight: LastPreflight::take(),
        metrics: Arc::new(Metrics::default()),
        name,
        wake,
        stop,
    })
}

/// How each call that looks for a volume is answered. No volume is on this node.
async fn looked_for(node: &Arc<Node>) -> [Status; 3] {
    let services = Services::new(Arc::clone(node));
    let (id, path) = ("v1-0f2c".to_owned(), "/somewhere".to_owned());
    let stage = NodeStageVolumeRequest {
        volume_id: id.clone(),
        staging_target_path: path.clone(),
        volume_capability: Some(block()),
        ..NodeStageVolumeRequest::default()
    };
    let publish = NodePublishVolumeRequest {
        volume_id: id.clone(),
        staging_target_path: path.clone(),
        target_path: path.clone(),
        volume_capability: Some(block()),
        ..NodePublishVolumeRequest::default()
    };
    let stats = NodeGetVolumeStatsRequest {
        volume_id: id,
        volume_path: path,
        ..NodeGetVolumeStatsRequest::default()
    };
    [
        services.node_stage_volume(Request::new(stage)).await.unwrap_err(),
        services.node_publish_volume(Request::new(publish)).await.unwrap_err(),
        services.node_get_volume_stats(Request::new(stats)).await.unwrap_err(),
    ]
}

async fn answered(node: &Arc<Node>, code: Code, mentions: &str) {
    for status in looked_for(node).await {
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(mentions), "`{}` names `{mentions}`", status.message());
    }
}

async fn until_synced(node: &Node) {
    let synced = async {
        while !node.watches.synced() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), synced).await.expect("every kind is listed");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_volume_is_said_to_be_absent_while_a_pool_that_may_hold_it_is_not_open() {
    let (dir, lists) = (tempfile::tempdir().unwrap(), Lists::default());
    let node = node(dir.path(), &lists).await;
    let known = |names: &[&str]| {
        let backend = Backend::Filesystem { path: dir.path().join("area"), size: Bytes::mib(512) };
        let spec = PoolSpec::new("u".into(), backend);
        let known: BTreeMap<PoolName, PoolSpec> =
            names.iter().map(|name| (PoolName::from(*name), spec.clone())).collect();
        std::fs::write(dir.path().join("pools.json"), serde_json::to_vec(&known).unwrap()).unwrap();
    };
    known(&["fast"]);
    answered(&node, Code::Unavailable, "pool fast,").await; // open before this start
    known(&[]);
    answered(&node, Code::Unavailable, "has not seen the API server").await;

    let kube_node =
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "labels": {"disk": "yes"}}});
    let pool = |name: &str, disk: &str| {
        json!({
            "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingPool", "metadata": {"name": name, "uid": name},
            "spec": {"backend": {"filesystem": {"path": "/srv", "size": "1Gi"}}, "nodeSelector": {"disk": disk}},
        })
    };
    let pools = vec![pool("others", "no"), pool("wanted", "yes")];
    *lists.write().unwrap() = Some(BTreeMap::from([("nodes", vec![kube_node]), ("stagingpools", pools)]));
    until_synced(&node).await;
    answered(&node, Code::Unavailable, "pool wanted,").await; // selects this node, and is not made yet
    node.stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_absent_once_nothing_can_hold_it() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path(), &Arc::new(RwLock::new(Some(BTreeMap::new())))).await;
    until_synced(&node).await;
    answered(&node, Code::NotFound, "there is no volume v1-0f2c").await;
    node.stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn where_no_volume_can_be_there_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path(), &Arc::new(RwLock::new(Some(BTreeMap::new())))).await;
    until_synced(&node).await;
    let services = Services::new(Arc::clone(&node));
    for (id, path, code) in [
        ("v1-0f2c", "", Code::InvalidArgument),
        ("", "/somewhere", Code::InvalidArgument),
        ("v1-0f2c", "some/path", Code::NotFound),
        ("not-of-ours", "some/path", Code::NotFound),
        ("not-of-ours", "/somewhere", Code::NotFound),
    ] {
        let asked = NodeGetVolumeStatsRequest {
            volume_id: id.to_owned(),
            volume_path: path.to_owned(),
            ..NodeGetVolumeStatsRequest::default()
        };
        let status = services.node_get_volume_stats(Request::new(asked)).await.unwrap_err();
        assert_eq!(status.code(), code, "`{id}` at `{path}`: {status}");
    }
    node.stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn capacity_is_told_without_parameters_and_not_for_a_class_that_makes_no_volumes() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path(), &Arc::new(RwLock::new(Some(BTreeMap::new())))).await;
    until_synced(&node).await;
    let services = Services::new(Arc::clone(&node));
    let ask = |pairs: &[(&str, &str)]| {
        Request::new(GetCapacityRequest { parameters: parameters(pairs), ..GetCapacityRequest::default() })
    };
    for pairs in [&[][..], &[("pool", "fast")]] {
        let told = services.get_capacity(ask(pairs)).await.unwrap().into_inner();
        assert_eq!((told.available_capacity, told.maximum_volume_size), (0, Some(0)), "{pairs:?}");
        assert_eq!(told.minimum_volume_size, Some(MIB));
    }
    for pairs in [[("template", "a/b")], [("pool", "")]] {
        let status = services.get_capacity(ask(&pairs)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{pairs:?}: {status}");
    }
    node.stop.cancel();
}

fn local_pool(node: &Node, dir: &Path) -> Arc<OpenPool> {
    let (name, backend) =
        (PoolName::from("fast"), Backend::Filesystem { path: dir.join("area"), size: Bytes::mib(512) });
    let uid = format!("uid-{}", dir.file_name().unwrap().display()).to_lowercase().replace('.', "");
    node.pools.create(&name, &PoolSpec::new(uid.into(), backend)).unwrap();
    node.pools.get(&name).unwrap()
}

/// Calls and operations share one guard for each volume, and an operation waits while the agent changes a pool.
#[tokio::test(flavor = "multi_thread")]
async fn an_operation_and_a_call_never_work_on_one_volume_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path(), &Arc::new(RwLock::new(Some(BTreeMap::new())))).await;
    until_synced(&node).await;
    let detach = Operation::VolumeDetach { pool: "fast".into(), volume: "0f2c".into() };

    let call = node.in_flight.begin("v1-0f2c", "NodeStageVolume").unwrap();
    let refusal = asked::Agent(Arc::clone(&node)).carry(detach.clone()).await.unwrap_err();
    assert_eq!(refusal.reason, Reason::InUse);
    assert!(refusal.message.contains("NodeStageVolume for v1-0f2c"), "{refusal}");
    drop(call);

    let pool = local_pool(&node, dir.path());
    let (take, taken) = std::sync::mpsc::channel();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let step = std::thread::spawn(move || {
        let _turn = pool.turn();
        take.send(()).unwrap();
        ended.recv().unwrap();
    });
    taken.recv().unwrap();
    let agent = asked::Agent(Arc::clone(&node));
    let mut operation = tokio::spawn(async move { agent.carry(detach).await });
    let begun = async {
        while node.in_flight.begin("v1-0f2c", "test").is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), begun).await.expect("the operation has begun");
    let services = Services::new(Arc::clone(&node));
    let unstage = NodeUnstageVolumeRequest {
        volume_id: "v1-0f2c".to_owned(),
        staging_target_path: "/somewhere".to_owned(),
    };
    let status = services.node_unstage_volume(Request::new(unstage.clone())).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted, "{status}");
    assert!(status.message().contains("VolumeDetach for v1-0f2c"), "{status}");
    let waits = tokio::time::timeout(Duration::from_millis(100), &mut operation).await;
    assert!(waits.is_err(), "a step of the agent is under way");
    end.send(()).unwrap();
    step.join().unwrap();
    let refusal = operation.await.unwrap().unwrap_err();
    assert_eq!(refusal.reason, Reason::VolumeNotFound, "{refusal}");
    services.node_unstage_volume(Request::new(unstage)).await.unwrap();
    tokio::time::timeout(Duration::from_secs(10), node.wake.notified()).await.expect("the agent is woken");
    node.pools.destroy(&"fast".into(), true).unwrap();
    node.stop.cancel();
}
