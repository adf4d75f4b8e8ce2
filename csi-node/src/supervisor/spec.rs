//! What a kept server serves: an image file, or an image of an image store.

use std::path::PathBuf;

use berth_core::ids::Uid;
use berth_core::units::Bytes;

use super::servers::ServerSpec;
use super::stores::StoreServerSpec;

/// What is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Spec {
    /// An image file, by `qemu-nbd`.
    Image(ServerSpec),
    /// An image of an image store, by this program.
    Store(Box<StoreServerSpec>),
}

impl Spec {
    /// Whose device reads from it.
    pub(super) fn id(&self) -> &Uid {
        match self {
            Self::Image(spec) => &spec.id,
            Self::Store(spec) => &spec.id,
        }
    }

    /// The size that it must have as a disk.
    pub(super) fn size(&self) -> Bytes {
        match self {
            Self::Image(spec) => spec.size,
            Self::Store(spec) => spec.size,
        }
    }

    /// The image, for people: a path or a digest.
    pub(super) fn shown(&self) -> PathBuf {
        match self {
            Self::Image(spec) => spec.image.clone(),
            Self::Store(spec) => spec.digest.to_string().into(),
        }
    }

    /// True if both are the same image, however it is reached.
    pub(super) fn is_same_image(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Store(one), Self::Store(other)) => one.is_same_image(other),
            (one, other) => one == other,
        }
    }

    /// True for an image of an image store.
    pub(super) fn is_store(&self) -> bool {
        self.store().is_some()
    }

    /// The image of an image store.
    pub(super) fn store(&self) -> Option<&StoreServerSpec> {
        match self {
            Self::Store(spec) => Some(spec),
            Self::Image(_) => None,
        }
    }

    /// The image file.
    pub(super) fn image(&self) -> Option<&ServerSpec> {
        match self {
            Self::Image(spec) => Some(spec),
            Self::Store(_) => None,
        }
    }
}
