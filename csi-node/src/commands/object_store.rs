//! The object store that a command works with, as its flags name it.

use std::io;
use std::path::PathBuf;

use berth_objectstore::s3::{Addressing, ConnectError, Credentials, S3Config, S3Store};
use clap::{Args, ValueEnum};
use thiserror::Error;

/// How a bucket is named in requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum AddressingArg {
    /// In the path.
    #[default]
    Path,
    /// In the host name.
    VirtualHost,
}

/// Flags that name a bucket. Credentials come from the environment.
#[derive(Clone, Debug, Args)]
pub struct StoreArgs {
    /// The object store's URL. Default: AWS.
    #[arg(long, env = "BERTH_STORE_ENDPOINT")]
    pub store_endpoint: Option<String>,
    /// The bucket.
    #[arg(long, env = "BERTH_STORE_BUCKET")]
    pub bucket: String,
    /// The region that signatures name.
    #[arg(long, env = "AWS_REGION", default_value = "us-east-1")]
    pub region: String,
    /// How the bucket is named in requests.
    #[arg(long, value_enum, default_value_t = AddressingArg::Path)]
    pub addressing: AddressingArg,
    /// A file of PEM certificates to trust beside the system's.
    #[arg(long)]
    pub ca_bundle: Option<PathBuf>,
}

/// Why there is no client.
#[derive(Debug, Error)]
pub enum StoreArgsError {
    /// The certificates.
    #[error("failed to read {}", path.display())]
    CaBundle {
        /// Their file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The client.
    #[error("no client for bucket `{bucket}`")]
    Connect {
        /// The bucket.
        bucket: String,
        /// Why.
        source: ConnectError,
    },
}

impl StoreArgs {
    /// A client for the bucket. Nothing is sent yet.
    ///
    /// # Errors
    /// [`StoreArgsError`].
    pub async fn connect(&self) -> Result<S3Store, StoreArgsError> {
        let read = |path: &PathBuf| {
            std::fs::read(path).map_err(|source| StoreArgsError::CaBundle { path: path.clone(), source })
        };
        let config = S3Config {
            endpoint: self.store_endpoint.clone(),
            region: self.region.clone(),
            bucket: self.bucket.clone(),
            addressing: match self.addressing {
                AddressingArg::Path => Addressing::Path,
                AddressingArg::VirtualHost => Addressing::VirtualHost,
            },
            credentials: Credentials::Ambient,
            ca_bundle: self.ca_bundle.as_ref().map(read).transpose()?,
        };
        let bucket = self.bucket.clone();
        S3Store::connect(config).await.map_err(|source| StoreArgsError::Connect { bucket, source })
    }
}
