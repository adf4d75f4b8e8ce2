//! Why work on an import or a transfer cannot begin or go on, and what that means for trying again.

use std::net::IpAddr;

use berth_api::parse::InvalidField;
use berth_core::ids::{ObjectName, Uid};
use berth_core::reason::Reason;
use berth_core::retry::Fault;
use berth_core::transfer::NoRoute;
use berth_objectstore::s3::ConnectError;
use berth_objectstore::source::address::NetworkError;
use thiserror::Error;

use super::super::space::SpaceDefect;
use super::super::stores::AccessError;
use crate::credentials::CredentialsError;
use crate::transfer::TransferError;

/// Why work on an import or a transfer cannot begin or go on.
#[derive(Debug, Error)]
pub enum WorkError {
    /// The object is gone.
    #[error("there is no TemplateImport or ImageTransfer {0}")]
    Gone(Uid),
    /// A field of it.
    #[error("what is asked for is not possible")]
    Field(#[from] InvalidField),
    /// The image that is to be read.
    #[error("ImageStore {store} has no image `{image}`")]
    NoImage {
        /// The image store.
        store: ObjectName,
        /// What it should have.
        image: ObjectName,
    },
    /// The way that it is to take.
    #[error(transparent)]
    Route(#[from] NoRoute),
    /// The credentials of the source or the destination.
    #[error("no credentials")]
    Credentials(#[from] CredentialsError),
    /// The client of the source or the destination.
    #[error("no client")]
    Connect(#[from] ConnectError),
    /// The host of an S3 source or destination has no address, or one that is refused.
    #[error("endpoint {endpoint} is at {address}, which is refused")]
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
    /// The transfer itself.
    #[error("the transfer failed")]
    Transfer(#[from] TransferError),
}

impl WorkError {
    pub(in crate::agent) fn reason(&self) -> Reason {
        match self {
            Self::Gone(_) => Reason::Retrying,
            Self::NoImage { .. } => Reason::SourceNotFound,
            Self::Route(error) => error.reason(),
            Self::Field(_) | Self::Connect(_) | Self::Network(_) => Reason::InvalidSpec,
            Self::Credentials(_) => Reason::CredentialsMissing,
            Self::Address { .. } => Reason::SourceAddressRefused,
            Self::Store(error) => error.reason(),
            Self::Space(_) => Reason::SpacePromiseBroken,
            Self::Transfer(error) => error.reason(),
        }
    }

    pub(super) fn fault(&self) -> Fault {
        match self {
            // An image may be published a moment later.
            Self::Gone(_) | Self::Credentials(_) | Self::NoImage { .. } => Fault::Passing,
            Self::Field(_)
            | Self::Connect(_)
            | Self::Network(_)
            | Self::Route(_)
            | Self::Space(_)
            | Self::Address { .. } => Fault::Lasting,
            Self::Store(error) => error.fault(),
            Self::Transfer(error) => error.fault(),
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
