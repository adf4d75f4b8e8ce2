//! The node service: what kubelet asks for. State is the kernel ∧ the record; nothing is kept in memory.

use std::collections::HashMap;
use std::path::PathBuf;

use berth_api::defaults::TOPOLOGY_KEY;
use berth_core::ids::reservation_of_volume;
use tonic::{Request, Response, Status};

use super::Services;
use super::attach::{self, FoundVolume, ImportedContent, Publication, Stats};
use super::controller::{CONTEXT_HOST_MOUNT, CONTEXT_PARTITION};
use super::files::{self, FileRequest};
use super::in_flight::Guard;
use super::patience;
use super::request::{for_one_workload, path, use_of, volume_id};
use super::status::RpcError;
use crate::agent::observe::wanted_pools;
use crate::csi::v1::node_server::Node as NodeService;
use crate::csi::v1::node_service_capability::{Rpc, Type, rpc};
use crate::csi::v1::volume_usage::Unit;
use crate::csi::v1::{
    NodeExpandVolumeRequest, NodeExpandVolumeResponse, NodeGetCapabilitiesRequest,
    NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse, NodeGetVolumeStatsRequest,
    NodeGetVolumeStatsResponse, NodePublishVolumeRequest, NodePublishVolumeResponse, NodeServiceCapability,
    NodeStageVolumeRequest, NodeStageVolumeResponse, NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse,
    NodeUnstageVolumeRequest, NodeUnstageVolumeResponse, Topology, VolumeUsage,
};

#[tonic::async_trait]
impl NodeService for Services {
    async fn node_stage_volume(
        &self,
        request: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        let outcome = self.stage(&request.into_inner()).await;
        self.answer("NodeStageVolume", outcome)
    }

    async fn node_unstage_volume(
        &self,
        request: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        let outcome = self.unstage(&request.into_inner()).await;
        self.answer("NodeUnstageVolume", outcome)
    }

    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let outcome = self.publish(&request.into_inner()).await;
        self.answer("NodePublishVolume", outcome)
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let outcome = self.unpublish(&request.into_inner()).await;
        self.answer("NodeUnpublishVolume", outcome)
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let outcome = self.stats(&request.into_inner()).await;
        self.answer("NodeGetVolumeStats", outcome)
    }

    async fn node_expand_volume(
        &self,
        request: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        let until = patience::until(request.metadata());
        let outcome = self.node_expand(&request.into_inner(), until).await;
        self.answer("NodeExpandVolume", outcome)
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let of =
            |kind: rpc::Type| NodeServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: kind.into() })) };
        let capabilities = [
            rpc::Type::StageUnstageVolume,
            rpc::Type::GetVolumeStats,
            rpc::Type::SingleNodeMultiWriter,
            rpc::Type::ExpandVolume,
        ];
        let capabilities = capabilities.into_iter().map(of).collect();
        self.answer("NodeGetCapabilities", Ok(NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(
        &self,
        _: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        let segments = HashMap::from([(TOPOLOGY_KEY.to_owned(), self.node.name.to_string())]);
        let reply = NodeGetInfoResponse {
            node_id: self.node.name.to_string(),
            max_volumes_per_node: 0,
            accessible_topology: Some(Topology { segments }),
        };
        self.answer("NodeGetInfo", Ok(reply))
    }
}

impl Services {
    /// A usable volume of this node by its handle. Blocks for a look into the records.
    pub(super) fn find_volume(&self, id: &str) -> Result<FoundVolume, RpcError> {
        let uid = reservation_of_volume(id).map_err(|_| RpcError::NoVolume(id.to_owned()))?;
        let seen_all = self.node.watches.synced();
        let wanted = wanted_pools(&self.node).into_keys();
        match attach::find(&self.node.pools, wanted, id, &uid) {
            // Pools that the API server has yet to show may hold it.
            Err(RpcError::NoVolume(_)) if !seen_all => Err(RpcError::NotSynced),
            found => found,
        }
    }

    /// Runs something short that blocks, under the volume's guard, which is held until it has ended even if the caller
    /// has gone away.
    pub(super) async fn guarded<T: Send + 'static>(
        &self,
        guard: Guard,
        act: impl FnOnce(&Self) -> Result<T, RpcError> + Send + 'static,
    ) -> Result<T, RpcError> {
        let services = self.clone();
        let work = tokio::task::spawn_blocking(move || {
            let _held = guard;
            act(&services)
        });
        work.await?
    }

    async fn stage(&self, request: &NodeStageVolumeRequest) -> Result<NodeStageVolumeResponse, RpcError> {
        let id = volume_id(&request.volume_id)?.to_owned();
        let staged = path("staging_target_path", &request.staging_target_path)?;
        let wanted = use_of(request.volume_capability.as_ref())?;
        let content = content(&request.volume_context)?;
        let guard = self.node.in_flight.begin(&id, "NodeStageVolume")?;
        self.guarded(guard, move |services| services.find_volume(&id)?.stage(&staged, wanted, content))
            .await?;
        Ok(NodeStageVolumeResponse {})
    }

    async fn unstage(
        &self,
        request: &NodeUnstageVolumeRequest,
    ) -> Result<NodeUnstageVolumeResponse, RpcError> {
        let id = volume_id(&request.volume_id)?;
        let staged = path("staging_target_path", &request.staging_target_path)?;
        let Ok(uid) = reservation_of_volume(id) else { return Ok(NodeUnstageVolumeResponse {}) };
        let guard = self.node.in_flight.begin(id, "NodeUnstageVolume")?;
        let wanted = wanted_pools(&self.node).into_keys();
        self.guarded(guard, move |services| attach::unstage(&services.node.pools, wanted, &uid, &staged))
            .await?;
        self.node.wake.notify_one(); // a deletion may have waited for it
        Ok(NodeUnstageVolumeResponse {})
    }

    async fn publish(
        &self,
        request: &NodePublishVolumeRequest,
    ) -> Result<NodePublishVolumeResponse, RpcError> {
        if let Some(file) = FileRequest::parse(request)? {
            self.publish_file(file).await?;
            return Ok(NodePublishVolumeResponse {});
        }
        let id = volume_id(&request.volume_id)?.to_owned();
        let target = path("target_path", &request.target_path)?;
        let wanted = use_of(request.volume_capability.as_ref())?;
        let how = Publication {
            read_only: request.readonly,
            alone: for_one_workload(request.volume_capability.as_ref()),
        };
        // The order of the checks: what names no volume of ours needs no staging path to be refused.
        reservation_of_volume(&id).map_err(|_| RpcError::NoVolume(id.clone()))?;
        let staged = path("staging_target_path", &request.staging_target_path)?;
        let guard = self.node.in_flight.begin(&id, "NodePublishVolume")?;
        let publish =
            move |services: &Self| services.find_volume(&id)?.publish(&staged, &target, wanted, how);
        self.guarded(guard, publish).await?;
        Ok(NodePublishVolumeResponse {})
    }

    async fn unpublish(
        &self,
        request: &NodeUnpublishVolumeRequest,
    ) -> Result<NodeUnpublishVolumeResponse, RpcError> {
        let id = volume_id(&request.volume_id)?;
        let target = path("target_path", &request.target_path)?;
        let guard = self.node.in_flight.begin(id, "NodeUnpublishVolume")?;
        if reservation_of_volume(id).is_ok() {
            self.guarded(guard, move |_| attach::unpublish(&target)).await?;
        } else {
            let id = id.to_owned();
            self.guarded(guard, move |services| files::hide(services, &id, &target)).await?;
        }
        Ok(NodeUnpublishVolumeResponse {})
    }

    async fn stats(
        &self,
        request: &NodeGetVolumeStatsRequest,
    ) -> Result<NodeGetVolumeStatsResponse, RpcError> {
        let id = volume_id(&request.volume_id)?.to_owned();
        let shown = path("volume_path", &request.volume_path);
        let shown: PathBuf = match shown {
            // Volumes are shown at no such path: there is nothing, as at any other path where it is not.
            Err(_) if !request.volume_path.is_empty() => {
                return Err(RpcError::NoPath { volume: id, path: request.volume_path.clone() });
            }
            shown => shown?,
        };
        let services = self.clone();
        let look = move || {
            if files::find_shown(&services.node.pools, &id)?.is_some_and(|target| target == shown) {
                return attach::stats_of_directory(&id, &shown);
            }
            attach::stats(&services.find_volume(&id)?, &shown)
        };
        Ok(usage(&tokio::task::spawn_blocking(look).await??))
    }
}

fn content(context: &HashMap<String, String>) -> Result<ImportedContent, RpcError> {
    let partition = context.get(CONTEXT_PARTITION).map(|text| {
        text.parse()
            .map_err(|_| RpcError::invalid("volume_context", format!("`partition: {text}` is no number")))
    });
    let host_mount = context.get(CONTEXT_HOST_MOUNT).is_some_and(|text| text == "true");
    Ok(ImportedContent { host_mount, partition: partition.transpose()? })
}

fn usage(stats: &Stats) -> NodeGetVolumeStatsResponse {
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let (total, parts) = stats.bytes;
    let (used, available) = parts.unwrap_or_default();
    let mut usage = vec![VolumeUsage {
        unit: Unit::Bytes.into(),
        total: number(total),
        used: number(used),
        available: number(available),
    }];
    if let Some((total, used, available)) = stats.inodes {
        usage.push(VolumeUsage {
            unit: Unit::Inodes.into(),
            total: number(total),
            used: number(used),
            available: number(available),
        });
    }
    NodeGetVolumeStatsResponse { usage, volume_condition: None }
}
