//! The node's hands: loop devices, mounts, XFS pool images, reflink, thin pools, kernel NBD, `mkfs` and QEMU's tools.
//!
//! The only crate with `unsafe` (in `sys` for ioctls and `confine` for children, nowhere else) and the only one whose
//! product code starts child processes. Functions are synchronous and may block, except where they are `async`.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod cgroup;
mod confine;
pub mod file_map;
pub mod files;
pub mod filesystem;
pub mod host_config;
pub mod loop_device;
pub mod memory;
pub mod mounts;
pub mod nbd;
pub mod partition;
pub mod pool_area;
pub mod preflight;
mod program;
pub mod qemu;
mod sys;
pub mod thin;
pub mod users;

pub use program::{RunError, find_program};
