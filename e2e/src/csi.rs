//! A small client of the Container Storage Interface. It plays external-provisioner and kubelet: the calls in their
//! order, repeated as they repeat them. What those two do beside calling (binding, attaching, pods) does not happen.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, sleep};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};
use tower::service_fn;

use self::v1::controller_client::ControllerClient;
use self::v1::identity_client::IdentityClient;
use self::v1::node_client::NodeClient;
use self::v1::volume_capability::access_mode::Mode;
use self::v1::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use self::v1::{CapacityRange, Topology, TopologyRequirement, VolumeCapability};

mod error;

pub use self::error::CsiError;

/// The messages and stubs, generated.
#[allow(missing_docs, unused_qualifications, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("csi.v1");
}

/// Between two tries of a call that may succeed later.
const PAUSE: Duration = Duration::from_millis(500);

/// How long one call may take, as the sidecars allow it.
const CALL_LIMIT: Duration = Duration::from_secs(15);

/// How a pod is to see a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// A mounted file system.
    Filesystem,
    /// A block device.
    Block,
}

/// What a claim and its class ask for.
#[derive(Debug, Clone)]
pub struct Claim {
    /// The volume's name, as external-provisioner makes it: `pvc-<uid>`.
    pub volume: String,
    /// The claim's namespace.
    pub namespace: String,
    /// The claim's name.
    pub name: String,
    /// Bytes asked for.
    pub bytes: u64,
    /// How it is seen.
    pub view: View,
    /// The parameters of the class.
    pub parameters: HashMap<String, String>,
}

/// What a plugin declares, by the names of the specification, in alphabetical order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Of the plugin as a whole.
    pub plugin: BTreeSet<&'static str>,
    /// Of its controller service.
    pub controller: BTreeSet<&'static str>,
    /// Of its node service.
    pub node: BTreeSet<&'static str>,
}

/// A volume that was made.
#[derive(Debug, Clone)]
pub struct Volume {
    /// Its handle.
    pub id: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// How it is seen.
    pub view: View,
    /// What the plugin wants to be told again.
    pub context: HashMap<String, String>,
}

/// An inline volume of a pod.
#[derive(Debug, Clone)]
pub struct Inline {
    /// Its handle and attributes.
    pub volume: Volume,
    /// The pod's namespace.
    pub namespace: String,
    /// What the pod says of writing.
    pub read_only: bool,
}

/// Where a plugin is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// At its socket.
    Socket(PathBuf),
    /// At a port of this machine that passes connections on to its socket.
    Relay(SocketAddrV4),
}

/// A client of one node's plugin; it connects anew when the plugin was restarted.
#[derive(Debug, Clone)]
pub struct Csi {
    node: String,
    channel: Channel,
    limit: Duration,
}

impl Csi {
    /// A client of the plugin of `node` at `address`. Calls that may succeed later are repeated for `limit`. Nothing is
    /// sent yet.
    ///
    /// # Panics
    /// Never: the address that is parsed is a constant.
    pub fn new(node: &str, address: &Address, limit: Duration) -> Self {
        let endpoint = Endpoint::from_static("http://plugin.invalid").timeout(CALL_LIMIT);
        let channel = match address.clone() {
            Address::Socket(socket) => endpoint.connect_with_connector_lazy(service_fn(move |_: Uri| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            })),
            Address::Relay(relay) => {
                endpoint.connect_with_connector_lazy(service_fn(move |_: Uri| async move {
                    TcpStream::connect(relay).await.map(TokioIo::new)
                }))
            }
        };
        Self { node: node.to_owned(), channel, limit }
    }

    /// The same client, but calls that may succeed later are repeated for `limit`.
    #[must_use]
    pub fn repeating_for(&self, limit: Duration) -> Self {
        Self { limit, ..self.clone() }
    }

    /// The driver's name and version.
    ///
    /// # Errors
    /// [`CsiError`].
    pub async fn plugin(&self) -> Result<(String, String), CsiError> {
        let mut client = IdentityClient::new(self.channel.clone());
        let info = self.repeat("GetPluginInfo", &self.node, async || {
            client.get_plugin_info(v1::GetPluginInfoRequest::default()).await
        });
        let info = info.await?;
        Ok((info.name, info.vendor_version))
    }

    /// What the plugin declares that it can do.
    ///
    /// # Errors
    /// [`CsiError`].
    pub async fn capabilities(&self) -> Result<Capabilities, CsiError> {
        let mut identity = IdentityClient::new(self.channel.clone());
        let plugin = self.repeat("GetPluginCapabilities", &self.node, async || {
            identity.get_plugin_capabilities(v1::GetPluginCapabilitiesRequest::default()).await
        });
        let plugin = plugin.await?.capabilities.into_iter().filter_map(|one| match one.r#type? {
            v1::plugin_capability::Type::Service(one) => Some(one.r#type().as_str_name()),
            v1::plugin_capability::Type::VolumeExpansion(one) => Some(one.r#type().as_str_name()),
        });
        let mut controller = ControllerClient::new(self.channel.clone());
        let by_controller = self.repeat("ControllerGetCapabilities", &self.node, async || {
            controller.controller_get_capabilities(v1::ControllerGetCapabilitiesRequest::default()).await
        });
        let by_controller = by_controller.await?.capabilities.into_iter().filter_map(|one| {
            let v1::controller_service_capability::Type::Rpc(one) = one.r#type?;
            Some(one.r#type().as_str_name())
        });
        let mut node = NodeClient::new(self.channel.clone());
        let by_node = self.repeat("NodeGetCapabilities", &self.node, async || {
            node.node_get_capabilities(v1::NodeGetCapabilitiesRequest::default()).await
        });
        let by_node = by_node.await?.capabilities.into_iter().filter_map(|one| {
            let v1::node_service_capability::Type::Rpc(one) = one.r#type?;
            Some(one.r#type().as_str_name())
        });
        Ok(Capabilities {
            plugin: plugin.collect(),
            controller: by_controller.collect(),
            node: by_node.collect(),
        })
    }

    /// `CreateVolume`, as external-provisioner does for a claim whose pod was scheduled to this node.
    ///
    /// # Errors
    /// [`CsiError`].
    pub async fn create(&self, claim: &Claim) -> Result<Volume, CsiError> {
        let mut parameters = claim.parameters.clone();
        let details =
            [("pvc/name", &claim.name), ("pvc/namespace", &claim.namespace), ("pv/name", &claim.volume)];
        parameters.extend(details.map(|(key, value)| (format!("csi.storage.k8s.io/{key}"), value.clone())));
        let here = Topology {
            segments: HashMap::from([(berth_api::defaults::TOPOLOGY_KEY.to_owned(), self.node.clone())]),
        };
        let request = v1::CreateVolumeRequest {
            name: claim.volume.clone(),
            capacity_range: Some(range(claim.bytes, 0)),
            volume_capabilities: vec![capability(claim.view, Mode::SingleNodeWriter)],
            parameters,
            accessibility_requirements: Some(TopologyRequirement {
                requisite: vec![here.clone()],
                preferred: vec![here],
            }),
            ..v1::CreateVolumeRequest::default()
        };
        let mut client = ControllerClient::new(self.channel.clone());
        let call = "CreateVolume";
        let answer =
            self.repeat(call, &claim.volume, async || client.create_volume(timed(&request)).await).await?;
        let missing = |missing| CsiError::Answer { call, subject: claim.volume.clone(), missing };
        let volume = answer.volume.ok_or_else(|| missing("a volume"))?;
        if volume.volume_id.is_empty() {
            return Err(missing("a handle"));
        }
        let bytes = u64::try_from(volume.capacity_bytes).unwrap_or_default();
        Ok(Volume { id: volume.volume_id, bytes, view: claim.view, context: volume.volume_context })
    }

    /// `NodeStageVolume`, with the directory that kubelet makes for it.
    ///
    /// # Errors
    /// [`CsiError`].
    pub async fn stage(&self, volume: &Volume, at: &Path) -> Result<(), CsiError> {
        make_directory(at)?;
        let request = v1::NodeStageVolumeRequest {
            volume_id: volume.id.clone(),
            staging_target_path: text(at),
            volume_capability: Some(capability(volume.view, Mode::SingleNodeWriter)),
            volume_context: volume.context.clone(),
            ..v1::NodeStageVolumeRequest::default()
        };
        let mut client = NodeClient::new(self.channel.clone());
        self.repeat("NodeStageVolume", &volume.id, async || client.node_stage_volume(request.clone()).await)
            .await?;
        Ok(())
    }

    /// `NodePublishVolume`; kubelet makes the directory above `target`, the plugin `target` itself.
    ///
    /// # Errors
    /// [`CsiError`].
    pub async fn publish(&self, volume: &Volume, staged: &Path, target: &Path) -> Result<(), CsiError> {
        self.publish_as(volume, staged, target, Mode::SingleNodeWriter).await
    }

    /// `NodePublishVolume` of an inline volume, as kubelet does for a pod: `volume.context` holds its attributes.
    ///
    /// # Errors
    /// [`CsiError`].
    pub async fn publish_inline(&self, inline: &Inline, target: &Path) -> Result<(), CsiError> {
        if let Some(parent) = target.parent() {
            make_directory(parent)?;
        }
        let mut context = inline.volume.context.clone();
        let details = [
            ("ephemeral", "true"),
            ("pod.name", "pod"),
            ("pod.namespace", &inline.namespace),
            ("pod.uid", "c0ffee"),
            ("serviceAccount.name", "default"),
        ];
        context.extend(details.map(|(key, value)| (format!("csi.storage.k8s.io/{key}"), value.to_owned())));
        let request = v1::NodePublishVolumeRequest {
            volume_id: inline.volume.id.clone(),
            target_path: text(target),
            volume_capability: Some(capability(inline.volume.view, Mode::SingleNodeWriter)),
            volume_context: context,
            readonly: inline.read_only,
            ..v1::NodePublishVolumeRequest::default()
        };
        let (mut client, call) = (NodeClient::new(self.channel.clone()), "NodePublishVolume");
        let once = async || client.node_publish_volume(request.clone()).await;
        self.repeat(call, &inline.volume.id, once).await?;
        Ok(())
    }

    /// The same for a volume that one workload only may use, as kubelet does for a `ReadWriteOncePod` claim.
    ///
    /// # Errors
    /// [`CsiError`].
    pub async fn publish_alone(&self, volume: &Volume, staged: &Path, target: &Path) -> Result<(), CsiError> {
        self.publish_as(volume, staged, target, Mode::SingleNodeSingleWriter).await
    }

    async fn publish_as(
        &self,
        volume: &Volume,
        staged: &Path,
        target: &Path,
        mode: Mode,
    ) -> Result<(), CsiError> {
        if let Some(parent) = target.parent() {
            make_directory(parent)?;
        }
        let request = v1::NodePublishVolumeRequest {
            volume_id: volume.id.clone(),
            staging_target_path: text(staged),
            target_path: text(target),
            volume_capability: Some(capability(volume.view, mode)),
            volume_context: volume.context.clone(),
            ..v1::NodePublishVolumeRequest::default()
        };
        let mut client = NodeClient::new(self.channel.clone());
        let call = "NodePublishVolume";
        self.repeat(call, &volume.id, async || client.node_publish_volume(request.clone()).await).await?;
        Ok(())
    }

    /// `NodeUnpublishVolume`.
    ///
    /// # Errors
    /// [`CsiError`].
    pub async fn unpublish(&self, volume: &Volume, target: &Path) -> Result<(), CsiError> {
        let request =
            v1::NodeUnpublishVolumeRequest { volume_id: volume.id.clone(), target_path: text(target) };
        let mut client = NodeClient::new(self.channel.clone());
        let call = "NodeUnpublishVolume";
        self.repeat(call, &volume.id, async || client.node_unpublish_volume(request.clone()).await).await?;
        Ok(())
    }

    /// `NodeUnstageVolume`.
    ///
    /// # Errors
    /// [`CsiError`].
    pub async fn unstage(&self, volume: &Volume, at: &Path) -> Result<(), CsiError> {
        let request =
            v1::NodeUnstageVolumeRequest { volume_id: volume.id.clone(), staging_target_path: text(at) };
        let mut client = NodeClient::new(self.channel.clone());
        let call = "NodeUnstageVolume";
        self.repeat(call, &volume.id, async || client.node_unstage_volume(request.clone()).await).await?;
        Ok(())
    }

    /// `ControllerExpandVolume`, as external-resizer does. Returns the size that the volume has then. Unit: bytes.
    ///
    /// # Errors
    /// [`CsiError`].
    pub async fn expand(&self, volume: &Volume, bytes: u64, limit: u64) -> Result<u64, CsiError> {
        let request = v1::ControllerExpandVolumeRequest {
            volume_id: volume.id.clone(),
            capacity_range: Some(range(bytes, limit)),
            volume_capability: Some(capability(volume.view, Mode::SingleNodeWriter)),
            ..v1::ControllerExpandVolumeRequest::default()
        };
        let mut client = ControllerClient::new(self.channel.clone());
        let call = "ControllerExpandVolume";
        let answer = self
            .repeat(call, &volume.id, async || client.controller_expand_volume(timed(&request)).await)
            .await?;
        Ok(u64::try_from(answer.capacity_bytes).unwrap_or_default())
    }

    /// `NodeExpandVolume`, as kubelet does for a volume that a pod sees at `target`.
    ///
    /// # Errors
    /// [`CsiError`].
    pub async fn node_expand(
        &self,
        volume: &Volume,
        staged: &Path,
        target: &Path,
        bytes: u64,
    ) -> Result<u64, CsiError> {
        let request = v1::NodeExpandVolumeRequest {
            volume_id: volume.id.clone(),
            volume_path: text(target),
            capacity_range: Some(range(bytes, 0)),
            staging_target_path: text(staged),
            volume_capability: Some(capability(volume.view, Mode::SingleNodeWriter)),
            ..v1::NodeExpandVolumeRequest::default()
        };
        let mut client = NodeClient::new(self.channel.clone());
        let call = "NodeExpandVolume";
        let answer =
            self.repeat(call, &volume.id, async || client.node_expand_volume(timed(&request)).await).await?;
        Ok(u64::try_from(answer.capacity_bytes).unwrap_or_default())
    }

    /// `NodeGetVolumeStats`: how many bytes a volume has in all, or the file system of it that is shown at `target`.
    ///
    /// # Errors
    /// [`CsiError`].
    pub async fn total_bytes(&self, volume: &Volume, target: &Path) -> Result<u64, CsiError> {
        let request = v1::NodeGetVolumeStatsRequest {
            volume_id: volume.id.clone(),
            volume_path: text(target),
            ..v1::NodeGetVolumeStatsRequest::default()
        };
        let mut client = NodeClient::new(self.channel.clone());
        let call = "NodeGetVolumeStats";
        let answer = self
            .repeat(call, &volume.id, async || client.node_get_volume_stats(timed(&request)).await)
            .await?;
        let bytes = answer.usage.iter().find(|usage| usage.unit() == v1::volume_usage::Unit::Bytes);
        Ok(bytes.and_then(|usage| u64::try_from(usage.total).ok()).unwrap_or_default())
    }

    /// `DeleteVolume`.
    ///
    /// # Errors
    /// [`CsiError`].
    pub async fn delete(&self, id: &str) -> Result<(), CsiError> {
        let request =
            v1::DeleteVolumeRequest { volume_id: id.to_owned(), ..v1::DeleteVolumeRequest::default() };
        let mut client = ControllerClient::new(self.channel.clone());
        self.repeat("DeleteVolume", id, async || client.delete_volume(timed(&request)).await).await?;
        Ok(())
    }

    /// Repeats a call while its code says that the outcome is open, as the sidecars and kubelet do.
    async fn repeat<T>(
        &self,
        call: &'static str,
        subject: &str,
        mut once: impl AsyncFnMut() -> Result<tonic::Response<T>, Status>,
    ) -> Result<T, CsiError> {
        let deadline = Instant::now() + self.limit;
        loop {
            let status = match once().await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) => status,
            };
            let (subject, code, message) = (subject.to_owned(), status.code(), status.message().to_owned());
            // The client's own time-out shows as Cancelled.
            let open = [Code::Aborted, Code::DeadlineExceeded, Code::Unavailable, Code::Cancelled];
            if !open.contains(&code) {
                return Err(CsiError::Refused { call, subject, code, message });
            }
            if Instant::now() >= deadline {
                return Err(CsiError::Undecided { call, subject, limit: self.limit, code, message });
            }
            sleep(PAUSE).await;
        }
    }
}

/// With the deadline that the sidecars send, so that the plugin answers before it.
fn timed<T: Clone>(request: &T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(request.clone());
    request.set_timeout(CALL_LIMIT);
    request
}

fn capability(view: View, mode: Mode) -> VolumeCapability {
    let access_type = match view {
        View::Filesystem => AccessType::Mount(MountVolume::default()),
        View::Block => AccessType::Block(BlockVolume::default()),
    };
    VolumeCapability { access_mode: Some(AccessMode { mode: mode.into() }), access_type: Some(access_type) }
}

fn range(bytes: u64, limit: u64) -> CapacityRange {
    let number = |bytes| i64::try_from(bytes).unwrap_or(i64::MAX);
    CapacityRange { required_bytes: number(bytes), limit_bytes: number(limit) }
}

fn make_directory(path: &Path) -> Result<(), CsiError> {
    std::fs::create_dir_all(path).map_err(|source| CsiError::Directory { path: path.to_owned(), source })
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
