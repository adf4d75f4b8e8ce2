//! The client of the API server.

use std::path::{Path, PathBuf};

use kube::config::{InferConfigError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use thiserror::Error;

/// Why there is no client.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The file cannot be read, or lacks what was asked for.
    #[error("could not use the kubeconfig {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: KubeconfigError,
    },
    /// The usual kubeconfig lacks the context.
    #[error("could not use the context {context}")]
    Context {
        /// The context.
        context: String,
        /// Why.
        source: KubeconfigError,
    },
    /// There is neither a kubeconfig nor a service account.
    #[error("found no way to reach the API server")]
    Nothing(#[source] InferConfigError),
    /// The configuration is not usable.
    #[error("could not make a client of the API server")]
    Client(#[source] kube::Error),
}

/// A client as kubectl would make it.
///
/// # Errors
/// [`ConnectError`]. Nothing is asked of the API server yet.
pub async fn client(kubeconfig: Option<&Path>, context: Option<&str>) -> Result<Client, ConnectError> {
    let options = KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
    let config = match (kubeconfig, context) {
        (Some(path), _) => {
            let bad = |source| ConnectError::File { path: path.to_owned(), source };
            let file = Kubeconfig::read_from(path).map_err(bad)?;
            Config::from_custom_kubeconfig(file, &options).await.map_err(bad)?
        }
        (None, Some(context)) => {
            let bad = |source| ConnectError::Context { context: context.to_owned(), source };
            Config::from_kubeconfig(&options).await.map_err(bad)?
        }
        (None, None) => Config::infer().await.map_err(ConnectError::Nothing)?,
    };
    Client::try_from(config).map_err(ConnectError::Client)
}
