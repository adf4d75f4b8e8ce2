//! Why work on an import cannot begin or go on, and what that means for trying again.

use std::net::IpAddr;

use berth_api::parse::InvalidField;
use berth_core::ids::Uid;
use berth_core::reason::Reason;
use berth_core::retry::Fault;
use berth_objectstore::s3::ConnectError;
use berth_objectstore::source::address::NetworkError;
use thiserror::Error;

use super::super::space::SpaceDefect;
use super::super::stores::AccessError;
use crate::credentials::CredentialsError;
use crate::transfer::TransferError;

/// Why work on an import cannot begin or go on.
#[derive(Debug, Error)]
pub enum WorkError {
    /// The object is gone.
    #[error("there is no TemplateImport {0}")]
    Gone(Uid),
    /// A field of it.
    #[error("the import is not possible")]
    Field(#[from] InvalidField),
    /// Its checksum.
    #[error("spec.checksum: `{0}` is not a sha256 sum")]
    Checksum(String),
    /// The source's credentials.
    #[error("no credentials for the source")]
    Credentials(#[from] CredentialsError),
    /// The source's client.
    #[error("no client for the source")]
    Connect(#[from] ConnectError),
    /// The source's host has no address, or one that is refused.
    #[error("spec.source.s3.endpoint: {endpoint} is at {address}, which sources may not be read from")]
    Address {
        /// What was asked for.
        endpoint: String,
        /// Where it is.
        address: IpAddr,
    },
    /// Allowed networks.
    #[error("--allow-source-cidr")]
    Network(#[from] NetworkError),
    /// The image store.
    #[error("the image store cannot be used")]
    Store(#[from] AccessError),
    /// There was no space for what is promised: a defect.
    #[error("{0}")]
    Space(SpaceDefect),
    /// The import itself.
    #[error("the import failed")]
    Import(#[from] TransferError),
}

impl WorkError {
    pub(in crate::agent) fn reason(&self) -> Reason {
        match self {
            Self::Gone(_) => Reason::Retrying,
            Self::Field(_) | Self::Checksum(_) | Self::Connect(_) | Self::Network(_) => Reason::InvalidSpec,
            Self::Credentials(_) => Reason::CredentialsMissing,
            Self::Address { .. } => Reason::SourceAddressRefused,
            Self::Store(error) => error.reason(),
            Self::Space(_) => Reason::SpacePromiseBroken,
            Self::Import(error) => error.reason(),
        }
    }

    pub(super) fn fault(&self) -> Fault {
        match self {
            Self::Gone(_) | Self::Credentials(_) => Fault::Passing,
            Self::Field(_)
            | Self::Checksum(_)
            | Self::Connect(_)
            | Self::Network(_)
            | Self::Space(_)
            | Self::Address { .. } => Fault::Lasting,
            Self::Store(error) => error.fault(),
            Self::Import(error) => error.fault(),
        }
    }

    /// What waiting for it to pass is called.
    pub(super) fn waiting(&self) -> Reason {
        match self.fault() {
            Fault::StoreAway => Reason::ObjectStoreUnavailable,
            Fault::Passing | Fault::Lasting => Reason::Retrying,
        }
    }
}
