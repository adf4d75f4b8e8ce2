//! The CSI services of this node, and its registration with kubelet.
//!
//! Every call is: parse into a type, take the volume's in-flight guard, look, answer if it is so already, else take one
//! short step. Long work is recorded as intent and done by the agent; the call says what it waits for.

pub mod attach;
pub mod capacity;
pub mod controller;
mod expand;
pub mod files;
pub mod identity;
pub mod in_flight;
pub mod node;
pub mod patience;
pub mod registration;
pub mod request;
pub mod shown;
pub mod status;

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::{Response, Status};

use crate::csi::registration::registration_server::RegistrationServer;
use crate::csi::v1::controller_server::ControllerServer;
use crate::csi::v1::identity_server::IdentityServer;
use crate::csi::v1::node_server::NodeServer;
use crate::node::Node;
use crate::socket::listen;
use crate::telemetry::chain;
use status::RpcError;

/// The CSI services.
#[derive(Clone)]
pub struct Services {
    node: Arc<Node>,
}

impl Services {
    /// Of this node.
    pub fn new(node: Arc<Node>) -> Self {
        Self { node }
    }

    /// Logs, counts and translates the outcome of a call.
    fn answer<T>(&self, method: &'static str, outcome: Result<T, RpcError>) -> Result<Response<T>, Status> {
        match outcome {
            Ok(reply) => {
                self.node.metrics.rpc(method, tonic::Code::Ok);
                Ok(Response::new(reply))
            }
            Err(error) => {
                let status = Status::from(&error);
                self.node.metrics.rpc(method, status.code());
                if error.is_wait() {
                    tracing::debug!(method, code = ?status.code(), error = chain(&error), "not yet");
                } else {
                    tracing::warn!(method, code = ?status.code(), error = chain(&error), "call failed");
                }
                Err(status)
            }
        }
    }
}

/// Serves the CSI services on `socket` until `stop`.
///
/// # Errors
/// If the socket cannot be made, or serving fails.
pub async fn serve(services: Services, socket: PathBuf, stop: CancellationToken) -> io::Result<()> {
    let listener = listen(&socket)?;
    tracing::info!(socket = %socket.display(), "csi listening");
    Server::builder()
        .add_service(IdentityServer::new(services.clone()))
        .add_service(ControllerServer::new(services.clone()))
        .add_service(NodeServer::new(services))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.cancelled_owned())
        .await
        .map_err(io::Error::other)
}

/// Serves the registration on a socket in kubelet's directory until `stop`, then removes it.
///
/// # Errors
/// If the socket cannot be made, or serving fails.
pub async fn register(directory: PathBuf, endpoint: PathBuf, stop: CancellationToken) -> io::Result<()> {
    let socket = directory.join(format!("{}-reg.sock", berth_api::defaults::DRIVER));
    let listener = listen(&socket)?;
    tracing::info!(socket = %socket.display(), "registration listening");
    let service = RegistrationServer::new(registration::Registrar::new(&endpoint, stop.clone()));
    let served = Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.cancelled_owned())
        .await
        .map_err(io::Error::other);
    drop(fs::remove_file(&socket)); // kubelet forgets the plugin when the socket goes; one that stays is replaced
    served
}
