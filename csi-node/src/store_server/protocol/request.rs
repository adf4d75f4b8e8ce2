//! Requests, as they arrive.

use berth_core::units::Bytes;

use super::{Agreed, Broken, Errno, ExportInfo};

const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Bytes of a request without its data.
pub const REQUEST: usize = 28;
/// What a client may send unasked.
const MOST_WRITE: u32 = 32 << 20;

/// `NBD_CMD_FLAG_DF` and `NBD_CMD_FLAG_REQ_ONE`.
const DO_NOT_FRAGMENT: u16 = 1 << 2;
const ONE: u16 = 1 << 3;

/// A request. What is asked for was checked: it is within the export, and agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What the client knows it by.
    pub cookie: u64,
    /// What it asks for.
    pub command: Command,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Bytes.
    Read {
        /// From where.
        offset: u64,
        /// How many, at least 1 and at most the export's longest read.
        len: Bytes,
        /// True if they must come in one chunk.
        whole: bool,
    },
    /// What is data and what is zeros.
    Status {
        /// From where.
        offset: u64,
        /// For how much, at least 1.
        len: Bytes,
        /// True if one extent is enough.
        one: bool,
    },
    /// What was written is to be kept; nothing was.
    Flush,
    /// The client ends.
    Disconnect,
    /// Refused, after so many bytes of data that follow.
    Refused {
        /// Why.
        errno: Errno,
        /// What follows the request, to be dropped.
        follows: Bytes,
        /// True for a read or a question for extents, whose refusal has another form if that is agreed on.
        chunked: bool,
    },
}

/// Reads a request.
///
/// # Errors
/// [`Broken`]: where the next request begins is not known then.
pub fn decode(bytes: &[u8; REQUEST], export: &ExportInfo, agreed: Agreed) -> Result<Request, Broken> {
    let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let long = |at: usize| (u64::from(word(at)) << 32) | u64::from(word(at + 4));
    let short = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    if word(0) != REQUEST_MAGIC {
        return Err(Broken::RequestMagic(word(0)));
    }
    let (flags, kind, cookie, offset, length) = (short(4), short(6), long(8), long(16), word(24));
    let asked = Asked { flags, offset, length };
    let command = match kind {
        0 => asked.read(export, agreed),
        1 if length > MOST_WRITE => return Err(Broken::WriteLength(Bytes(length.into()))),
        1 => refused(Errno::Perm, length, false),
        2 => Command::Disconnect,
        3 if flags == 0 => Command::Flush,
        // TRIM and WRITE_ZEROES: nothing follows.
        4 | 6 => refused(Errno::Perm, 0, false),
        7 => asked.status(export, agreed),
        _ => refused(Errno::Invalid, 0, false),
    };
    Ok(Request { cookie, command })
}

fn refused(errno: Errno, follows: u32, chunked: bool) -> Command {
    Command::Refused { errno, follows: Bytes(follows.into()), chunked }
}

/// The fields that most requests have.
struct Asked {
    flags: u16,
    offset: u64,
    length: u32,
}

impl Asked {
    fn read(&self, export: &ExportInfo, agreed: Agreed) -> Command {
        let known = if agreed.structured { DO_NOT_FRAGMENT } else { 0 };
        let len = Bytes(self.length.into());
        if self.flags & !known != 0 || len > export.longest || !self.is_within(export) {
            return refused(Errno::Invalid, 0, true);
        }
        Command::Read { offset: self.offset, len, whole: self.flags & DO_NOT_FRAGMENT != 0 }
    }

    fn status(&self, export: &ExportInfo, agreed: Agreed) -> Command {
        if !agreed.allocation || self.flags & !ONE != 0 || !self.is_within(export) {
            return refused(Errno::Invalid, 0, true);
        }
        Command::Status { offset: self.offset, len: Bytes(self.length.into()), one: self.flags & ONE != 0 }
    }

    fn is_within(&self, export: &ExportInfo) -> bool {
        let end = self.offset.checked_add(self.length.into());
        self.length > 0 && end.is_some_and(|end| end <= export.size.0)
    }
}
