//! Requests as the sidecars send them, into types that mean something. Every message names the field.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use berth_api::defaults::TOPOLOGY_KEY;
use berth_core::ids::{NodeName, ObjectName, PoolName};
use berth_core::units::Bytes;
use berth_device::mounts::FsType;

use super::status::RpcError;
use crate::csi::v1::volume_capability::AccessType;
use crate::csi::v1::volume_capability::access_mode::Mode;
use crate::csi::v1::{CapacityRange, CreateVolumeRequest, Topology, TopologyRequirement, VolumeCapability};

/// Volumes are whole multiples of this.
pub const VOLUME_UNIT: Bytes = Bytes::mib(1);
/// The size of a volume where the request names none.
const DEFAULT_SIZE: Bytes = Bytes::gib(1);
/// The specification's bound of a string.
const MAX_NAME: usize = 128;

/// What a volume is used as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// A block device.
    Block,
    /// A file system: this one, where it has to be made.
    Filesystem(FsType),
}

/// A volume that is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeRequest {
    /// The name that makes the request idempotent.
    pub name: String,
    /// The pool.
    pub pool: PoolName,
    /// What it starts from.
    pub template: Option<ObjectName>,
    /// Whether the host may mount what came out of an image.
    pub host_mount: bool,
    /// Which partition the host mounts; the whole device if absent.
    pub partition: Option<u32>,
    /// The claim that it is for.
    pub claim: Option<ObjectName>,
    /// Its size, without what the template needs.
    pub size: Bytes,
    /// The most that it may be.
    pub limit: Option<Bytes>,
}

impl VolumeRequest {
    /// Reads a request, on `node`.
    pub fn parse(request: &CreateVolumeRequest, node: &NodeName) -> Result<Self, RpcError> {
        if request.name.is_empty() || request.name.len() > MAX_NAME {
            return Err(RpcError::invalid("name", format!("1 to {MAX_NAME} bytes are needed")));
        }
        if request.volume_content_source.is_some() {
            return Err(RpcError::invalid(
                "volume_content_source",
                "volumes start from nothing or from a template",
            ));
        }
        let uses = uses(&request.volume_capabilities)?;
        let class = ClassParameters::parse(&request.parameters)?;
        let mounted = uses.iter().any(|one| matches!(one, Use::Filesystem(_)));
        if mounted && class.template.is_some() && !class.host_mount {
            return Err(RpcError::HostMount(request.name.clone()));
        }
        check_topology(request.accessibility_requirements.as_ref(), node)?;
        let (size, limit) = size(request.capacity_range.as_ref(), class.template.is_some())?;
        Ok(Self {
            name: request.name.clone(),
            pool: class.pool,
            template: class.template,
            host_mount: class.host_mount,
            partition: class.partition,
            claim: class.claim,
            size,
            limit,
        })
    }

    /// The volume's size, where its image has this one.
    ///
    /// # Errors
    /// [`RpcError::Size`] beyond the request's limit.
    pub fn size_with(&self, image: Bytes) -> Result<Bytes, RpcError> {
        let needed = self.size.max(image);
        match self.limit {
            Some(limit) if needed > limit => Err(RpcError::Size { needed, limit }),
            _ => Ok(needed),
        }
    }
}

/// The parameters of a `StorageClass`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassParameters {
    /// The pool.
    pub pool: PoolName,
    /// What volumes start from.
    pub template: Option<ObjectName>,
    /// Whether the host may mount what came out of an image.
    pub host_mount: bool,
    /// Which partition.
    pub partition: Option<u32>,
    /// The claim, from `--extra-create-metadata`.
    pub claim: Option<ObjectName>,
}

impl ClassParameters {
    /// Reads them. Unknown ones are refused, so that a misspelt one is not taken for a default.
    pub fn parse(parameters: &HashMap<String, String>) -> Result<Self, RpcError> {
        let mut class = Self {
            pool: PoolName::default(),
            template: None,
            host_mount: false,
            partition: None,
            claim: None,
        };
        let (mut namespace, mut name) = (None, None);
        for (key, value) in parameters {
            match key.as_str() {
                "pool" => class.pool = PoolName::from(value.as_str()),
                "template" => class.template = Some(template(value)?),
                "hostMount" => class.host_mount = boolean(value)?,
                "partition" => class.partition = Some(number(value)?),
                "csi.storage.k8s.io/pvc/namespace" => namespace = Some(value.clone()),
                "csi.storage.k8s.io/pvc/name" => name = Some(value.clone()),
                other if other.starts_with("csi.storage.k8s.io/") => {}
                other => return Err(RpcError::invalid("parameters", format!("`{other}` is not known"))),
            }
        }
        if class.pool.as_str().is_empty() || class.pool.as_str().len() > 40 {
            return Err(RpcError::invalid("parameters", "`pool` must name a StagingPool"));
        }
        class.claim = namespace.zip(name).map(|(namespace, name)| ObjectName { namespace, name });
        Ok(class)
    }
}

fn template(text: &str) -> Result<ObjectName, RpcError> {
    let part = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b))
    };
    match text.split_once('/') {
        Some((namespace, name)) if part(namespace) && part(name) => Ok(ObjectName::new(namespace, name)),
        _ => Err(RpcError::invalid("parameters", format!("`template: {text}` is not <namespace>/<name>"))),
    }
}

fn boolean(text: &str) -> Result<bool, RpcError> {
    text.parse().map_err(|_| {
        RpcError::invalid("parameters", format!("`hostMount: {text}` is neither true nor false"))
    })
}

fn number(text: &str) -> Result<u32, RpcError> {
    let bad = || RpcError::invalid("parameters", format!("`partition: {text}` is not a partition's number"));
    text.parse().ok().filter(|number| (1..=128).contains(number)).ok_or_else(bad)
}

/// Which uses are asked for; at least one, each of them possible.
pub fn uses(capabilities: &[VolumeCapability]) -> Result<Vec<Use>, RpcError> {
    if capabilities.is_empty() {
        return Err(RpcError::invalid("volume_capabilities", "at least one is needed"));
    }
    capabilities.iter().map(|capability| use_of(Some(capability))).collect()
}

/// The use that a capability asks for.
pub fn use_of(capability: Option<&VolumeCapability>) -> Result<Use, RpcError> {
    let missing = || RpcError::invalid("volume_capability", "access type and access mode are needed");
    let capability = capability.ok_or_else(missing)?;
    match capability.access_mode.ok_or_else(missing)?.mode() {
        Mode::Unknown => return Err(missing()),
        Mode::SingleNodeWriter
        | Mode::SingleNodeReaderOnly
        | Mode::SingleNodeSingleWriter
        | Mode::SingleNodeMultiWriter => {}
        Mode::MultiNodeReaderOnly | Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter => {
            return Err(RpcError::invalid("volume_capability", "a volume is reachable on one node only"));
        }
    }
    match capability.access_type.as_ref().ok_or_else(missing)? {
        AccessType::Block(_) => Ok(Use::Block),
        AccessType::Mount(mount) => match mount.fs_type.as_str() {
            "" | "ext4" => Ok(Use::Filesystem(FsType::Ext4)),
            "xfs" => Ok(Use::Filesystem(FsType::Xfs)),
            other => Err(RpcError::invalid(
                "volume_capability",
                format!("file system `{other}` is neither ext4 nor xfs"),
            )),
        },
    }
}

/// True if a volume is for one workload only: it may be published at one place at a time.
pub fn for_one_workload(capability: Option<&VolumeCapability>) -> bool {
    let mode = capability.and_then(|capability| capability.access_mode).map(|mode| mode.mode());
    mode == Some(Mode::SingleNodeSingleWriter)
}

/// This node must be among the nodes asked for, if any are.
fn check_topology(asked: Option<&TopologyRequirement>, node: &NodeName) -> Result<(), RpcError> {
    let Some(asked) = asked else { return Ok(()) };
    let here = |topology: &Topology| is_here(topology, node);
    let all = || asked.requisite.iter().chain(&asked.preferred);
    if all().next().is_none() || all().any(here) { Ok(()) } else { Err(RpcError::OtherNode) }
}

/// True if a topology names this node, or leaves the node open.
pub fn is_here(topology: &Topology, node: &NodeName) -> bool {
    topology.segments.get(TOPOLOGY_KEY).is_none_or(|name| name == node.as_str())
}

fn size(range: Option<&CapacityRange>, from_template: bool) -> Result<(Bytes, Option<Bytes>), RpcError> {
    let (required, limit) = range.map_or((0, 0), |range| (range.required_bytes, range.limit_bytes));
    let positive = |field, value: i64| {
        u64::try_from(value).map(Bytes).map_err(|_| RpcError::invalid(field, format!("{value} is negative")))
    };
    let required = positive("capacity_range.required_bytes", required)?;
    let limit = Some(positive("capacity_range.limit_bytes", limit)?).filter(|limit| *limit > Bytes::ZERO);
    let needed = match (required, from_template) {
        (Bytes::ZERO, true) => VOLUME_UNIT, // the template's own size counts
        (Bytes::ZERO, false) => DEFAULT_SIZE.min(limit.unwrap_or(DEFAULT_SIZE)),
        (required, _) => required,
    };
    let size = needed.round_up(VOLUME_UNIT);
    match limit {
        Some(limit) if size > limit => Err(RpcError::Size { needed: size, limit }),
        _ => Ok((size, limit)),
    }
}

/// The size that a volume is to be made, and the most that it may have then.
pub fn grown_size(range: Option<&CapacityRange>) -> Result<(Bytes, Option<Bytes>), RpcError> {
    if range.is_none_or(|range| range.required_bytes == 0) {
        return Err(RpcError::invalid("capacity_range.required_bytes", "a size is needed"));
    }
    size(range, false)
}

/// A path of kubelet's: absolute, and without `..`.
pub fn path(field: &'static str, text: &str) -> Result<PathBuf, RpcError> {
    let path = Path::new(text);
    if text.is_empty() {
        return Err(RpcError::invalid(field, "a path is needed"));
    }
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !path.is_absolute() || !plain || text.len() > 4095 || text.contains('\0') || path.parent().is_none() {
        return Err(RpcError::invalid(field, format!("`{text}` is not an absolute path without `..`")));
    }
    Ok(path.to_owned())
}

/// The volume handle of a request; not necessarily one of ours.
pub fn volume_id(text: &str) -> Result<&str, RpcError> {
    if text.is_empty() { Err(RpcError::invalid("volume_id", "a volume is needed")) } else { Ok(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a42_a_class_names_a_pool_and_configures_nothing_of_it() {
        let class = |more: &[(&str, &str)]| {
            let all = [&[("pool", "fast"), ("template", "default/disk")], more].concat();
            ClassParameters::parse(&all.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
        };
        class(&[]).unwrap();
        for foreign in
            ["path", "size", "devices", "volumeGroup", "staging", "overcommit", "reclaim", "whenFull"]
        {
            let refusal = class(&[(foreign, "1")]).unwrap_err().to_string();
            assert!(refusal.contains(&format!("`{foreign}` is not known")), "{refusal}");
        }
    }
}
