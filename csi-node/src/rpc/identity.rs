//! Who this plugin is.

use berth_api::defaults::DRIVER;
use tonic::{Request, Response, Status};

use super::Services;
use crate::csi::v1::identity_server::Identity;
use crate::csi::v1::plugin_capability::{Service, Type, VolumeExpansion, service, volume_expansion};
use crate::csi::v1::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    PluginCapability, ProbeRequest, ProbeResponse,
};

#[tonic::async_trait]
impl Identity for Services {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        let reply = GetPluginInfoResponse {
            name: DRIVER.to_owned(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            ..GetPluginInfoResponse::default()
        };
        self.answer("GetPluginInfo", Ok(reply))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let of = |kind: service::Type| PluginCapability {
            r#type: Some(Type::Service(Service { r#type: kind.into() })),
        };
        let online = VolumeExpansion { r#type: volume_expansion::Type::Online.into() };
        let capabilities = vec![
            of(service::Type::ControllerService),
            of(service::Type::VolumeAccessibilityConstraints),
            PluginCapability { r#type: Some(Type::VolumeExpansion(online)) },
        ];
        self.answer("GetPluginCapabilities", Ok(GetPluginCapabilitiesResponse { capabilities }))
    }

    /// Cheap, and true whatever transfers run: a plugin that is busy must not be restarted for it.
    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        self.answer("Probe", Ok(ProbeResponse { ready: Some(true) }))
    }
}
