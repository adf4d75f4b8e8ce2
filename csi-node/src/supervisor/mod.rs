//! What must outlive the plugin, in a small process of its own: suspensions of devices, and servers of images.
//!
//! A plugin that is killed while a device is suspended would leave it so, and everything that uses it waiting, until the
//! next start. So [`serve`] runs beside it (`berth-node supervise`), changes seldom, and does these few things for it, over
//! a socket ([`protocol`], [`client`]). Commands, and a plugin that is told of no supervisor, do them themselves.
//! Both are a [`DataPlane`], and nothing else asks which it is.

pub mod client;
pub mod data_plane;
pub mod keeper;
mod kept;
pub mod protocol;
pub mod serve;
pub mod servers;
mod spec;
pub mod stores;

pub use self::data_plane::DataPlane;

/// Where it listens, unless it is told otherwise.
pub const SOCKET: &str = "/run/berth/supervisor.sock";
