//! Where the images come from, and what they become.

use serde_json::{Value, json};

use super::{ARCHIVE, STORE, TEMPLATE};
use crate::site::{BUCKET, Site};

/// A source and a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    /// A raw file that is read by range → qcow2.
    RangedToQcow2,
    /// A qcow2 file, staged → raw.
    StagedToRaw,
    /// An image of an image store → vmdk.
    StoredToVmdk,
    /// An image of an image store → VHD.
    StoredToVhd,
    /// An image of an image store → another image store.
    StoredToStore,
    /// A qcow2 file that is read by ranges → an image store.
    ImageToStore,
}

impl Route {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::RangedToQcow2,
        Self::StagedToRaw,
        Self::StoredToVmdk,
        Self::StoredToVhd,
        Self::StoredToStore,
        Self::ImageToStore,
    ];

    /// In turn.
    pub fn of(number: u64) -> Self {
        let count = Self::ALL.len() as u64;
        Self::ALL[usize::try_from(number % count).unwrap_or_default()]
    }

    /// The name, for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RangedToQcow2 => "ranged → qcow2",
            Self::StagedToRaw => "staged → raw",
            Self::StoredToVmdk => "stored → vmdk",
            Self::StoredToVhd => "stored → vhd",
            Self::StoredToStore => "stored → store",
            Self::ImageToStore => "image by ranges → store",
        }
    }

    /// The format of the object as `qemu-img` calls it; `None` if it becomes none.
    pub const fn driver(self) -> Option<&'static str> {
        match self {
            Self::RangedToQcow2 => Some("qcow2"),
            Self::StagedToRaw => Some("raw"),
            Self::StoredToVmdk => Some("vmdk"),
            Self::StoredToVhd => Some("vpc"),
            Self::StoredToStore | Self::ImageToStore => None,
        }
    }

    /// True if the sum of its source is told: all bytes of that are read.
    pub const fn is_summed(self) -> bool {
        !matches!(self, Self::ImageToStore)
    }

    /// The file that is its source, if it is one.
    pub const fn file(self) -> Option<&'static str> {
        match self {
            Self::RangedToQcow2 => Some("disk.raw"),
            Self::StagedToRaw | Self::ImageToStore => Some("disk.qcow2"),
            Self::StoredToVmdk | Self::StoredToVhd | Self::StoredToStore => None,
        }
    }

    /// What is asked for under this name.
    pub fn spec(self, site: &Site, name: &str) -> Value {
        let source = match self.file() {
            // Slow enough that there is something to interrupt.
            Some(file) => json!({ "http": { "url": format!("{}/slow/60000000/{file}", site.http()) } }),
            None => json!({ "storeImage": { "store": STORE, "image": TEMPLATE } }),
        };
        let staging = if self == Self::StagedToRaw { "Required" } else { "Auto" };
        let limits = json!({ "retries": 30 });
        match self.driver() {
            None => json!({
                "source": source, "staging": staging, "limits": limits,
                "destination": { "storeImage": { "store": ARCHIVE, "image": name } },
            }),
            Some(driver) => {
                let format = match driver {
                    "raw" => json!({ "destination": "Raw" }),
                    "qcow2" => json!({ "destination": "Qcow2" }),
                    "vmdk" => json!({ "destination": "Vmdk" }),
                    _ => json!({ "destination": "Vhd" }),
                };
                json!({
                    "source": source, "staging": staging, "limits": limits, "format": format,
                    "destination": { "s3": {
                        "endpoint": site.s3_endpoint(), "bucket": BUCKET, "key": object_key(name),
                        "secretRef": { "name": "images-s3" },
                    } },
                })
            }
        }
    }
}

/// The key of the object that a transfer makes.
pub(super) fn object_key(name: &str) -> String {
    format!("exports/{name}")
}
