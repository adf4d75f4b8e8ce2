//! What kubelet and the sidecars may send, and what is made of it.

use std::collections::HashMap;

use berth_core::ids::{NodeName, ObjectName};
use berth_core::units::Bytes;
use berth_device::mounts::FsType;
use berth_node::csi::v1::volume_capability::access_mode::Mode;
use berth_node::csi::v1::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use berth_node::csi::v1::{
    CapacityRange, CreateVolumeRequest, Topology, TopologyRequirement, VolumeCapability, VolumeContentSource,
};
use berth_node::rpc::in_flight::InFlight;
use berth_node::rpc::request::{Use, VolumeRequest, path, use_of};
use berth_node::rpc::status::RpcError;
use tonic::{Code, Status};

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
fn one_call_for_each_volume_and_the_second_is_told_what_runs() {
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
