//! The server's side of the NBD protocol, without IO: bytes in, typed requests out, and answers back to bytes.
//!
//! Source: `doc/proto.md` of the NBD project: "Fixed newstyle negotiation", "Option types", "Transmission phase",
//! "Structured replies" and the metadata context `base:allocation`. All numbers are big-endian.
//!
//! Nothing that a client says is trusted. What is wrong within the protocol gets the protocol's error; what is not the
//! protocol, or is longer than anything that has a meaning here, ends the connection ([`Broken`]).

pub mod answer;
pub mod negotiation;
pub mod options;
pub mod request;

#[cfg(test)]
mod tests;

use berth_core::units::Bytes;
use thiserror::Error;

/// The protocol's limit for the name of an export.
pub const MOST_NAME: usize = 4096;
/// The longest data of an option: the longest name, and more queries than there are metadata contexts.
pub const MOST_OPTION: u32 = 16 << 10;
/// How many options a client may send before it takes the export.
pub const MOST_OPTIONS: u32 = 64;

/// Why a connection cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Broken {
    /// The client's flags have bits that no client may set, or lack what this server needs.
    #[error("the client's flags are {0:#x}")]
    ClientFlags(u32),
    /// An option does not begin as one.
    #[error("an option begins with {0:#x}")]
    OptionMagic(u64),
    /// An option is longer than any that has a meaning.
    #[error("option {option} has {length} bytes, more than {MOST_OPTION}")]
    OptionLength {
        /// Its number.
        option: u32,
        /// Its length.
        length: u32,
    },
    /// It negotiates without end.
    #[error("the client sent more than {MOST_OPTIONS} options")]
    Options,
    /// It asks in the old way, which knows no refusal, for an export that is not there.
    #[error("the client asks for an export that is not there, by NBD_OPT_EXPORT_NAME")]
    Export,
    /// A request does not begin as one.
    #[error("a request begins with {0:#x}")]
    RequestMagic(u32),
    /// A write, which is refused, is longer than the protocol lets a client send unasked.
    #[error("a write has {0}")]
    WriteLength(Bytes),
}

/// What is exported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its name; the empty name stands for it too.
    pub name: String,
    /// What people are told of it.
    pub description: String,
    /// Its size, less than 2^63 bytes.
    pub size: Bytes,
    /// What requests it likes best: a power of two from 512 bytes to 32 MiB.
    pub preferred: Bytes,
    /// The longest read: a power of two, not less than `preferred`.
    pub longest: Bytes,
}

/// What a client and the server have agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// Reads are answered in chunks (`NBD_OPT_STRUCTURED_REPLY`).
    pub structured: bool,
    /// `NBD_CMD_BLOCK_STATUS` may be asked for `base:allocation`.
    pub allocation: bool,
}

/// The errors of the protocol that this server gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errno {
    /// `NBD_EPERM`: the export is read-only.
    Perm,
    /// `NBD_EIO`: it could not be read.
    Io,
    /// `NBD_EINVAL`: the request makes no sense.
    Invalid,
}

impl Errno {
    /// The number on the wire.
    pub const fn number(self) -> u32 {
        match self {
            Self::Perm => 1,
            Self::Io => 5,
            Self::Invalid => 22,
        }
    }
}

/// The first bytes, taken off; nothing if there are not so many.
fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(*head)
}

fn take_u16(rest: &mut &[u8]) -> Option<u16> {
    take(rest).map(u16::from_be_bytes)
}

fn take_u32(rest: &mut &[u8]) -> Option<u32> {
    take(rest).map(u32::from_be_bytes)
}

/// A text with its length before it.
fn take_text(rest: &mut &[u8]) -> Option<Vec<u8>> {
    let length = usize::try_from(take_u32(rest)?).ok()?;
    let (text, tail) = rest.split_at_checked(length)?;
    *rest = tail;
    Some(text.to_vec())
}
