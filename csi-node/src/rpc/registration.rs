//! How kubelet finds the plugin: it looks into its directory, asks who is there, and says what came of it.

use std::path::Path;

use berth_api::defaults::DRIVER;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::csi::registration::registration_server::Registration;
use crate::csi::registration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};

/// Answers kubelet.
pub struct Registrar {
    endpoint: String,
    stop: CancellationToken,
}

impl Registrar {
    /// For the CSI services at `endpoint`. A registration that kubelet refuses ends the program by `stop`: started
    /// again, it registers again.
    pub fn new(endpoint: &Path, stop: CancellationToken) -> Self {
        Self { endpoint: endpoint.display().to_string(), stop }
    }
}

#[tonic::async_trait]
impl Registration for Registrar {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".to_owned(),
            name: DRIVER.to_owned(),
            endpoint: self.endpoint.clone(),
            supported_versions: vec!["1.0.0".to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        if status.plugin_registered {
            tracing::info!("registered with kubelet");
        } else {
            tracing::error!(error = status.error, "kubelet refuses the plugin");
            self.stop.cancel();
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
