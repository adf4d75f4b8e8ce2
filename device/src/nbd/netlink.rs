//! The generic-netlink interface of kernel NBD.
//!
//! Source of all numbers: `include/uapi/linux/nbd-netlink.h` and `include/uapi/linux/genetlink.h` of Linux 6.1; of what
//! the kernel does with them: its `drivers/block/nbd.c`. The kernel carries out a request before it answers, and refuses
//! whoever lacks `CAP_SYS_ADMIN` in the first user namespace.

use std::io::{self, Cursor};
use std::os::fd::{AsFd, AsRawFd as _};
use std::time::{Duration, Instant};

use berth_core::units::Bytes;
use neli::consts::nl::NlmF;
use neli::consts::socket::{Msg, NlFamily};
use neli::err::DeError;
use neli::genl::{AttrTypeBuilder, Genlmsghdr, GenlmsghdrBuilder, Nlattr, NlattrBuilder};
use neli::nl::{NlPayload, Nlmsghdr, NlmsghdrBuilder};
use neli::socket::NlSocket;
use neli::types::{Buffer, GenlBuffer, NlBuffer};
use neli::utils::Groups;
use neli::{FromBytesWithInput as _, ToBytes as _};
use nix::errno::Errno;
use thiserror::Error;

use super::handshake::ExportFlags;
use super::slots::BackendId;
use crate::sys;

const FAMILY: &str = "nbd";
const FAMILY_VERSION: u8 = 1;
const EVENTS: &str = "nbd_mc_group";

mod command {
    pub const CONNECT: u8 = 1;
    pub const DISCONNECT: u8 = 2;
    pub const RECONFIGURE: u8 = 3;
    pub const LINK_DEAD: u8 = 4;
    pub const STATUS: u8 = 5;
}

mod attribute {
    pub const INDEX: u16 = 1;
    pub const SIZE_BYTES: u16 = 2;
    pub const BLOCK_SIZE_BYTES: u16 = 3;
    pub const TIMEOUT: u16 = 4;
    pub const SERVER_FLAGS: u16 = 5;
    pub const SOCKETS: u16 = 7;
    pub const DEAD_CONN_TIMEOUT: u16 = 8;
    pub const DEVICE_LIST: u16 = 9;
    pub const BACKEND_IDENTIFIER: u16 = 10;
    /// `NBD_SOCK_ITEM` and `NBD_SOCK_FD`.
    pub const SOCKET: u16 = 1;
    /// `NBD_DEVICE_INDEX` and `NBD_DEVICE_CONNECTED`.
    pub const DEVICE_INDEX: u16 = 1;
    pub const DEVICE_CONNECTED: u16 = 2;
}

/// The controller of generic netlink: `GENL_ID_CTRL`, `CTRL_CMD_*` and `CTRL_ATTR_*`.
mod controller {
    pub const ID: u16 = 0x10;
    pub const VERSION: u8 = 1;
    pub const GET_FAMILY: u8 = 3;
    pub const FAMILY_ID: u16 = 1;
    pub const FAMILY_NAME: u16 = 2;
    pub const GROUPS: u16 = 7;
    pub const GROUP_NAME: u16 = 1;
    pub const GROUP_ID: u16 = 2;
}

/// Answers are there when a request was sent; this is for a kernel that does otherwise.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// 20 bytes for each of 3,000 devices.
const MOST_BYTES: usize = 64 << 10;

type Message = Genlmsghdr<u8, u16>;
type Attributes = GenlBuffer<u16, Buffer>;

/// Why the kernel did not do something about NBD.
#[derive(Debug, Error)]
pub enum NetlinkError {
    /// The netlink socket failed.
    #[error("failed to {action} a netlink socket")]
    Socket {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel has no NBD, or not in this network namespace.
    #[error("the kernel knows no netlink family `nbd`")]
    NoFamily,
    /// It did not answer in time.
    #[error("the kernel did not answer the request to {request}")]
    NoAnswer {
        /// What was asked for.
        request: String,
    },
    /// Its answer is not understood.
    #[error("failed to understand the kernel's answer to the request to {request}")]
    Garbled {
        /// What was asked for.
        request: String,
        /// What is wrong with it.
        source: DeError,
    },
    /// It refused.
    #[error("the kernel refused to {request}")]
    Refused {
        /// What was asked for.
        request: String,
        /// Why.
        source: Errno,
    },
}

impl NetlinkError {
    /// The kernel's reason, if it refused.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { source, .. } => Some(*source),
            _ => None,
        }
    }
}

/// A device that is to be connected.
#[derive(Clone, Copy, Debug)]
pub struct Connect<'a> {
    /// Its number; the first that is not in use if absent. One that does not exist is made.
    pub index: Option<u32>,
    /// Its size: a multiple of `block_size`.
    pub size: Bytes,
    /// Its logical block size: a power of two from 512 to the size of a page.
    pub block_size: Bytes,
    /// What the server can do, as it said in the handshake. [`ExportFlags::READ_ONLY`] makes the device read-only.
    pub flags: ExportFlags,
    /// How long the server may take for one request before its connection is dropped; without end if absent. Unit: whole
    /// seconds.
    pub io_timeout: Option<Duration>,
    /// How long requests wait for a new connection, from the first one after the last connection was lost; then they end
    /// in errors. Unit: whole seconds.
    pub dead_connection: Duration,
    /// Who may give it another connection later, and how it is found again.
    pub identifier: &'a BackendId,
}

/// A conversation with the kernel about NBD.
pub struct Nbd {
    generic: Generic,
    family: u16,
}

impl Nbd {
    /// Begins one. The kernel loads its module if it can.
    ///
    /// # Errors
    /// [`NetlinkError::NoFamily`] if it has none.
    pub fn open() -> Result<Self, NetlinkError> {
        let mut generic = Generic::open(Groups::empty())?;
        let family = generic.family()?;
        Ok(Self { generic, family: family.id })
    }

    /// Connects a device to a server and gives back its number. The kernel keeps the socket; the caller may close its own.
    ///
    /// # Errors
    /// [`NetlinkError::Refused`] with `EBUSY` if a device of that number is in use.
    pub fn connect(&mut self, connect: &Connect<'_>, socket: impl AsFd) -> Result<u32, NetlinkError> {
        let number = connect.index.map_or_else(|| "a device".to_owned(), |index| format!("nbd{index}"));
        let request = format!("connect {number} to {}", connect.identifier);
        let mut attributes = Attributes::new();
        if let Some(index) = connect.index {
            attributes.push(u32_attribute(attribute::INDEX, index));
        }
        attributes.push(u64_attribute(attribute::SIZE_BYTES, connect.size.0));
        attributes.push(u64_attribute(attribute::BLOCK_SIZE_BYTES, connect.block_size.0));
        attributes.push(u64_attribute(attribute::SERVER_FLAGS, u64::from(connect.flags.0)));
        attributes.push(u64_attribute(attribute::DEAD_CONN_TIMEOUT, connect.dead_connection.as_secs()));
        if let Some(timeout) = connect.io_timeout {
            attributes.push(u64_attribute(attribute::TIMEOUT, timeout.as_secs()));
        }
        attributes.push(text_attribute(attribute::BACKEND_IDENTIFIER, connect.identifier.as_str()));
        attributes.push(sockets(socket));
        let answer = self.ask(command::CONNECT, attributes, &request)?;
        let answer = answer.ok_or_else(|| NetlinkError::NoAnswer { request: request.clone() })?;
        let handle = answer.attrs().get_attr_handle();
        handle
            .get_attr_payload_as(attribute::INDEX)
            .map_err(|source| NetlinkError::Garbled { request, source })
    }

    /// Gives a device another connection in place of one that is dead. **Does nothing and succeeds while the kernel
    /// believes that the old connection lives**: ask the device for a block afterwards.
    ///
    /// # Errors
    /// [`NetlinkError::Refused`] with `EINVAL` if it is not connected, or carries another identifier.
    pub fn reconfigure(
        &mut self,
        index: u32,
        identifier: &BackendId,
        socket: impl AsFd,
    ) -> Result<(), NetlinkError> {
        let mut attributes = Attributes::new();
        attributes.push(u32_attribute(attribute::INDEX, index));
        attributes.push(text_attribute(attribute::BACKEND_IDENTIFIER, identifier.as_str()));
        attributes.push(sockets(socket));
        let request = format!("reconnect nbd{index} to {identifier}");
        self.ask(command::RECONFIGURE, attributes, &request).map(drop)
    }

    /// Disconnects a device, whoever uses it: their requests fail. Its number is free when the last of them has closed it.
    /// One that is not connected is no error.
    pub fn disconnect(&mut self, index: u32) -> Result<(), NetlinkError> {
        let mut attributes = Attributes::new();
        attributes.push(u32_attribute(attribute::INDEX, index));
        self.ask(command::DISCONNECT, attributes, &format!("disconnect nbd{index}")).map(drop)
    }

    /// Every device's number, and whether it is in use: connected, or merely open.
    pub fn status(&mut self) -> Result<Vec<(u32, bool)>, NetlinkError> {
        self.status_of(None)
    }

    /// The same for one device; empty if there is none of that number.
    pub fn status_of(&mut self, index: Option<u32>) -> Result<Vec<(u32, bool)>, NetlinkError> {
        let request = "tell the status of its devices".to_owned();
        let mut attributes = Attributes::new();
        if let Some(index) = index {
            attributes.push(u32_attribute(attribute::INDEX, index));
        }
        let answer = self.ask(command::STATUS, attributes, &request)?;
        let answer = answer.ok_or_else(|| NetlinkError::NoAnswer { request: request.clone() })?;
        parse_status(&answer).map_err(|source| NetlinkError::Garbled { request, source })
    }

    fn ask(
        &mut self,
        command: u8,
        attributes: Attributes,
        request: &str,
    ) -> Result<Option<Message>, NetlinkError> {
        self.generic.ask(self.family, FAMILY_VERSION, command, attributes, request)
    }
}

/// What the kernel says unasked: that a device has lost a connection.
///
/// Its events are sent in the host's network namespace only. They are a hint: those of the time before it was opened are
/// not told, and some are lost when nobody reads them (an error of `ENOBUFS`; look at every device then).
pub struct LinkDeadEvents {
    generic: Generic,
    family: u16,
}

impl LinkDeadEvents {
    /// Listens from now on.
    pub fn open() -> Result<Self, NetlinkError> {
        let family = Generic::open(Groups::empty())?.family()?;
        let group = family.events.ok_or(NetlinkError::NoFamily)?;
        Ok(Self { generic: Generic::open(Groups::new_groups(&[group]))?, family: family.id })
    }

    /// The numbers of the devices that lose a connection; ends after `quiet` without one.
    pub fn until_quiet(&mut self, quiet: Duration) -> impl Iterator<Item = Result<u32, NetlinkError>> + '_ {
        std::iter::from_fn(move || self.next_within(quiet).transpose())
    }

    fn next_within(&mut self, quiet: Duration) -> Result<Option<u32>, NetlinkError> {
        let deadline = Instant::now() + quiet;
        let request = || "tell of lost connections".to_owned();
        while let Some(messages) = self.generic.receive(deadline, &request())? {
            for message in messages.iter().filter(|message| *message.nl_type() == self.family) {
                let Some(payload) = message.get_payload().filter(|p| *p.cmd() == command::LINK_DEAD) else {
                    continue;
                };
                let index = payload.attrs().get_attr_handle().get_attr_payload_as(attribute::INDEX);
                return index
                    .map(Some)
                    .map_err(|source| NetlinkError::Garbled { request: request(), source });
            }
        }
        Ok(None)
    }
}

/// What the controller says of the family.
#[derive(Debug, PartialEq, Eq)]
struct Family {
    id: u16,
    events: Option<u32>,
}

/// A generic-netlink socket.
struct Generic {
    socket: NlSocket,
    sequence: u32,
}

impl Generic {
    fn open(groups: Groups) -> Result<Self, NetlinkError> {
        let failed = |source| NetlinkError::Socket { action: "open", source };
        let socket = NlSocket::connect(NlFamily::Generic, None, groups).map_err(failed)?;
        socket.nonblock().map_err(failed)?;
        Ok(Self { socket, sequence: 0 })
    }

    fn family(&mut self) -> Result<Family, NetlinkError> {
        let request = "describe the netlink family `nbd`";
        let mut attributes = Attributes::new();
        attributes.push(text_attribute(controller::FAMILY_NAME, FAMILY));
        let answer =
            self.ask(controller::ID, controller::VERSION, controller::GET_FAMILY, attributes, request);
        match answer {
            Ok(Some(answer)) => parse_family(&answer)
                .map_err(|source| NetlinkError::Garbled { request: request.to_owned(), source }),
            Ok(None) => Err(NetlinkError::NoFamily),
            Err(error) if error.errno() == Some(Errno::ENOENT) => Err(NetlinkError::NoFamily),
            Err(error) => Err(error),
        }
    }

    /// Sends a request, waits for its end, and gives back what the kernel said besides.
    fn ask(
        &mut self,
        family: u16,
        version: u8,
        command: u8,
        attributes: Attributes,
        request: &str,
    ) -> Result<Option<Message>, NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = encode(family, version, command, attributes, self.sequence);
        let failed = |source| NetlinkError::Socket { action: "send on", source };
        self.socket.send(&bytes, Msg::empty()).map_err(failed)?;
        let deadline = Instant::now() + ANSWER_LIMIT;
        let mut answer = None;
        while let Some(messages) = self.receive(deadline, request)? {
            for message in messages.iter().filter(|message| *message.nl_seq() == self.sequence) {
                match message.nl_payload() {
                    NlPayload::Payload(payload) => answer = Some(payload.clone()),
                    NlPayload::Err(error) => {
                        let source = Errno::from_raw(error.error().saturating_neg());
                        return Err(NetlinkError::Refused { request: request.to_owned(), source });
                    }
                    NlPayload::Ack(_) | NlPayload::DumpExtAck(_) | NlPayload::Empty => return Ok(answer),
                }
            }
        }
        Err(NetlinkError::NoAnswer { request: request.to_owned() })
    }

    /// The next messages; `None` if there are none by then.
    fn receive(
        &self,
        deadline: Instant,
        request: &str,
    ) -> Result<Option<NlBuffer<u16, Message>>, NetlinkError> {
        let failed = |source| NetlinkError::Socket { action: "receive from", source };
        let left = deadline.saturating_duration_since(Instant::now());
        if !sys::wait_readable(self.socket.as_raw_fd(), left).map_err(failed)? {
            return Ok(None);
        }
        let mut buffer = vec![0; MOST_BYTES];
        let (length, _) = self.socket.recv(&mut buffer, Msg::empty()).map_err(failed)?;
        let messages = NlBuffer::from_bytes_with_input(&mut Cursor::new(&buffer[..length]), length);
        messages.map(Some).map_err(|source| NetlinkError::Garbled { request: request.to_owned(), source })
    }
}

fn encode(family: u16, version: u8, command: u8, attributes: Attributes, sequence: u32) -> Vec<u8> {
    let message = GenlmsghdrBuilder::default().cmd(command).version(version).attrs(attributes);
    let message = message.build().expect("command and version are given");
    let message = NlmsghdrBuilder::default()
        .nl_type(family)
        .nl_flags(NlmF::REQUEST | NlmF::ACK)
        .nl_seq(sequence)
        .nl_payload(NlPayload::Payload(message))
        .build()
        .expect("type, flags and payload are given");
    bytes_of(&message)
}

fn bytes_of(message: &Nlmsghdr<u16, Message>) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    message.to_bytes(&mut bytes).expect("a buffer in memory takes every message");
    bytes.into_inner()
}

fn attribute_of(kind: u16, payload: Vec<u8>) -> Nlattr<u16, Buffer> {
    let kind = AttrTypeBuilder::default().nla_type(kind).build().expect("the type is given");
    let attribute = NlattrBuilder::default().nla_type(kind).nla_payload(Buffer::from(payload)).build();
    attribute.expect("type and payload are given")
}

fn u32_attribute(kind: u16, value: u32) -> Nlattr<u16, Buffer> {
    attribute_of(kind, value.to_ne_bytes().to_vec())
}

fn u64_attribute(kind: u16, value: u64) -> Nlattr<u16, Buffer> {
    attribute_of(kind, value.to_ne_bytes().to_vec())
}

fn text_attribute(kind: u16, text: &str) -> Nlattr<u16, Buffer> {
    attribute_of(kind, [text.as_bytes(), b"\0"].concat())
}

/// `NBD_ATTR_SOCKETS { NBD_SOCK_ITEM { NBD_SOCK_FD } }`.
fn sockets(socket: impl AsFd) -> Nlattr<u16, Buffer> {
    let number = socket.as_fd().as_raw_fd().to_ne_bytes().to_vec();
    let nest = |inner: &Nlattr<u16, Buffer>, kind| {
        attribute_of(kind, Vec::new()).nest(inner).expect("a buffer in memory takes every attribute")
    };
    nest(&nest(&attribute_of(attribute::SOCKET, number), attribute::SOCKET), attribute::SOCKETS)
}

fn parse_family(answer: &Message) -> Result<Family, DeError> {
    let handle = answer.attrs().get_attr_handle();
    let id = handle.get_attr_payload_as(controller::FAMILY_ID)?;
    let mut events = None;
    if let Ok(groups) = handle.get_nested_attributes::<u16>(controller::GROUPS) {
        for group in groups.iter() {
            let group = group.get_attr_handle::<u16>()?;
            let name: String = group.get_attr_payload_as_with_len(controller::GROUP_NAME)?;
            if name == EVENTS {
                events = Some(group.get_attr_payload_as(controller::GROUP_ID)?);
            }
        }
    }
    Ok(Family { id, events })
}

fn parse_status(answer: &Message) -> Result<Vec<(u32, bool)>, DeError> {
    let handle = answer.attrs().get_attr_handle();
    let list = handle.get_nested_attributes::<u16>(attribute::DEVICE_LIST)?;
    let device = |item: &Nlattr<u16, Buffer>| {
        let item = item.get_attr_handle::<u16>()?;
        let index = item.get_attr_payload_as(attribute::DEVICE_INDEX)?;
        Ok((index, item.get_attr_payload_as::<u8>(attribute::DEVICE_CONNECTED)? != 0))
    };
    list.iter().map(device).collect()
}

#[cfg(test)]
#[path = "netlink_tests.rs"]
mod tests;
