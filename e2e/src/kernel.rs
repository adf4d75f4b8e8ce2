//! A whole Linux kernel as an ordinary process: user-mode Linux, as a host that tests can start, use, hang, cut the
//! power of, and start again with the same disks, on machines whose own kernel has no device-mapper and no NBD.
//!
//! ```no_run
//! # use berth_e2e::kernel::{GIB, KernelHost, MIB};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = std::path::Path::new("/nowhere");
//! let host = KernelHost::at(dir).disk("data", GIB).memory(512 * MIB).boot()?;
//! host.run(["mkfs.ext4", "-q", "/dev/ubda"])?;
//! host.cut();
//! host.boot_again()?;
//! # Ok(()) }
//! ```
//!
//! **The guest** sees the machine's root file system (so every program of the machine is there, as root) below a
//! layer in memory: nothing that it writes reaches the machine, except below [`KernelHostBuilder::share`] and on its
//! disks. `/run`, `/dev` and `/dev/shm` are its own; there is no udev. It has one CPU. System calls are some 60
//! times and the start of a program 7 times slower than on the machine, so programs are built outside and limits of
//! time are wide.
//!
//! **Its end.** The guest is a process-id namespace of its own: when that is killed, and it is when this process ends
//! in any way, everything in it goes at once. (Killing linux.uml alone would set the guest's processes free, to go on
//! as processes of the machine.) A cut loses what the guest's kernel had not sent to a disk; what it had sent is in
//! the machine's memory and stays. Writes that are lost or reordered
//! before a flush take dm-flakey, or dm-log-writes and [`WriteLog`].
//!
//! All calls block, each for a limited time. They take `&self`, so that one thread can cut what another uses.

mod command;
mod config;
mod error;
mod guest;
mod host;
mod network;
mod obstacle;
mod plan;
mod write_log;

pub use self::command::{CommandError, GuestCommand, Output, Running};
pub use self::error::{BootError, NetworkError};
pub use self::host::KernelHost;
pub use self::network::{GATEWAY, KernelNetwork, NETWORK};
pub use self::plan::{Disk, KernelHostBuilder};
pub use self::write_log::{LogEntry, Point, Replayed, WriteLog, WriteLogError};

/// Bytes in a mebibyte.
pub const MIB: u64 = 1 << 20;

/// Bytes in a gibibyte.
pub const GIB: u64 = 1 << 30;
