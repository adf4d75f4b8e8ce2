//! Kernel NBD: images of any format as read-only block devices, through servers that may die and come back.
//!
//! A server speaks NBD on a Unix socket ([`NbdServer`] is `qemu-nbd`); this crate shakes hands with it ([`handshake()`]) and
//! gives the connection to the kernel by generic netlink ([`Nbd`]), never by the older ioctls: with those, a device dies
//! with the process that attached it. A device carries an identifier ([`BackendId`]) that the kernel shows in sysfs and
//! compares, so an [`Attachment`] is found again after a restart of everything but the kernel. While its server is away,
//! requests wait, for the dead-connection time at most.
//!
//! The kernel's answers are the truth and nothing is kept beside them; everything may be called again after a crash.

mod attachment;
mod handshake;
mod holders;
mod netlink;
mod server;
mod slots;
mod sysfs;

pub use self::attachment::{AttachConfig, AttachError, Attachment};
pub use self::handshake::{BlockSizes, Export, ExportFlags, HandshakeError, handshake};
pub use self::holders::HoldersError;
pub(crate) use self::holders::processes;
pub use self::netlink::{Connect, LinkDeadEvents, Nbd, NetlinkError};
pub use self::server::{NbdServer, OwnServerConfig, ServedFormat, ServerConfig, ServerError};
pub use self::slots::{BackendId, BackendIdError, Slot, SlotUse, Slots, SlotsExhausted};
pub use self::sysfs::{SysfsError, observe};

use crate::program::find_program;

/// What kernel NBD needs and this node lacks, as one phrase each.
///
/// Asks for the netlink family, not for the module: a kernel may have it built in, and this process may be in a network
/// namespace that the family does not answer in.
pub fn missing() -> Vec<String> {
    let mut missing = Vec::new();
    if find_program("qemu-nbd").is_none() {
        missing.push("program qemu-nbd is not installed: install qemu-utils".to_owned());
    }
    match Nbd::open() {
        Ok(mut nbd) => match observe(&mut nbd) {
            Ok(slots) if slots.is_empty() => missing.push("the kernel has no device /dev/nbd0".to_owned()),
            Ok(_) => {}
            Err(error) => missing.push(format!("kernel NBD does not answer: {error}")),
        },
        Err(NetlinkError::NoFamily) => missing.push("the kernel has no NBD: load the module nbd".to_owned()),
        Err(error) => missing.push(format!("kernel NBD does not answer: {error}")),
    }
    missing
}
