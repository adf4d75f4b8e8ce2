//! The client's side of the NBD handshake, up to the point where the connection is given to the kernel.
//!
//! Source: `doc/proto.md` of the NBD project, "Fixed newstyle negotiation" and "Option types". Nothing that the server says
//! is trusted: every length is bounded, and the whole handshake has one limit of time.

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use berth_core::units::Bytes;
use thiserror::Error;

const MAGIC: &[u8; 8] = b"NBDMAGIC";
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// `NBD_FLAG_FIXED_NEWSTYLE` and `NBD_FLAG_NO_ZEROES`, the same bits on both sides.
const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

/// The protocol's limit for strings; no answer here has a reason to be longer.
const MOST_REPLY: u32 = 4096;
/// There are five kinds of information.
const MOST_REPLIES: u32 = 32;
/// The protocol's limit for the name of an export.
const MOST_NAME: usize = 4096;

/// Why there is no connection to an export.
#[derive(Debug, Error)]
pub enum HandshakeError {
    /// Nobody answers at the socket.
    #[error("failed to connect to the NBD server at {path}", path = path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The name is longer than the protocol allows.
    #[error("the name of the export has {length} bytes, more than {MOST_NAME}")]
    Name {
        /// Its length.
        length: usize,
    },
    /// It was not finished in time.
    #[error("the NBD server at {path} had not finished the handshake after {} s", limit.as_secs_f32(), path = path.display())]
    TimedOut {
        /// The socket.
        path: PathBuf,
        /// How long it had.
        limit: Duration,
    },
    /// The connection was lost.
    #[error("the NBD server at {path} broke off the handshake", path = path.display())]
    BrokenOff {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What it says is not the protocol, or is implausible.
    #[error("what answers at {path} does not speak NBD as it should: {what}", path = path.display())]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// It refused.
    #[error("the NBD server at {path} refused export `{export}`: {reason}", path = path.display())]
    Refused {
        /// The socket.
        path: PathBuf,
        /// The export.
        export: String,
        /// Its reason, in the protocol's words or its own.
        reason: String,
    },
}

/// What a server can do with an export: `NBD_FLAG_*`, the transmission flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExportFlags(pub u16);

impl ExportFlags {
    /// The other flags mean something.
    pub const HAS_FLAGS: Self = Self(1);
    /// Writes are refused.
    pub const READ_ONLY: Self = Self(1 << 1);
    /// It takes flushes.
    pub const FLUSH: Self = Self(1 << 2);
    /// It takes writes that are durable when they are answered.
    pub const FUA: Self = Self(1 << 3);
    /// It takes discards.
    pub const TRIM: Self = Self(1 << 5);
    /// Several connections see the same content.
    pub const MULTI_CONN: Self = Self(1 << 8);

    /// True if all of `flags` are set.
    pub const fn has(self, flags: Self) -> bool {
        self.0 & flags.0 == flags.0
    }

    /// These and `flags`.
    #[must_use]
    pub const fn and(self, flags: Self) -> Self {
        Self(self.0 | flags.0)
    }
}

impl fmt::Display for ExportFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#06x}", self.0)
    }
}

/// In what units a server takes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// The smallest, and what every offset and length is a multiple of. A power of two from 1 to 65,536.
    pub minimum: Bytes,
    /// What it likes best.
    pub preferred: Bytes,
    /// The longest request.
    pub maximum: Bytes,
}

/// What a server exports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Export {
    /// Its size, less than 2^63 bytes.
    pub size: Bytes,
    /// What the server can do with it.
    pub flags: ExportFlags,
    /// The units of its requests, if the server says so.
    pub blocks: Option<BlockSizes>,
}

/// Connects to a server and opens an export. The connection is ready for requests, and has no time-outs of its own.
pub fn handshake(path: &Path, export: &str, limit: Duration) -> Result<(UnixStream, Export), HandshakeError> {
    if export.len() > MOST_NAME {
        return Err(HandshakeError::Name { length: export.len() });
    }
    let deadline = Instant::now() + limit;
    let stream = connect(path, limit)?;
    let mut talk = Talk { stream, path, deadline, limit };
    talk.greet()?;
    let found = talk.go(export)?;
    let stream = talk.stream;
    // The kernel would obey them in the middle of requests.
    let cleared = stream.set_read_timeout(None).and_then(|()| stream.set_write_timeout(None));
    cleared.map_err(|source| HandshakeError::BrokenOff { path: path.to_owned(), source })?;
    Ok((stream, found))
}

/// In a thread, because it waits without end for a server that accepts nobody and does not end.
fn connect(path: &Path, limit: Duration) -> Result<UnixStream, HandshakeError> {
    let (give, take) = std::sync::mpsc::sync_channel(1);
    let target = path.to_owned();
    std::thread::spawn(move || give.send(UnixStream::connect(target)));
    match take.recv_timeout(limit) {
        Ok(connected) => {
            connected.map_err(|source| HandshakeError::Connect { path: path.to_owned(), source })
        }
        Err(_) => Err(HandshakeError::TimedOut { path: path.to_owned(), limit }),
    }
}

/// A handshake that is under way.
struct Talk<'a> {
    stream: UnixStream,
    path: &'a Path,
    deadline: Instant,
    limit: Duration,
}

impl Talk<'_> {
    fn greet(&mut self) -> Result<(), HandshakeError> {
        let greeting: [u8; 18] = self.read()?;
        if !greeting.starts_with(MAGIC) {
            return Err(self.protocol("it does not begin with NBDMAGIC"));
        }
        if &greeting[8..16] != OPTION_MAGIC {
            return Err(self.protocol("it speaks the oldest form of the protocol"));
        }
        let flags = u16::from_be_bytes([greeting[16], greeting[17]]);
        if flags & FIXED_NEWSTYLE == 0 {
            return Err(self.protocol("it does not know the fixed newstyle negotiation"));
        }
        let ours = u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES));
        self.write(&ours.to_be_bytes())
    }

    fn go(&mut self, export: &str) -> Result<Export, HandshakeError> {
        self.write(&go_request(export))?;
        let (mut found, mut blocks) = (None, None);
        for _ in 0..MOST_REPLIES {
            let (kind, data) = self.reply()?;
            match kind {
                REPLY_ACK => {
                    let (size, flags) =
                        found.ok_or_else(|| self.protocol("it does not say what the export is"))?;
                    return Ok(Export { size, flags, blocks });
                }
                REPLY_INFO => match parse_info(&data).map_err(|what| self.protocol(what))? {
                    Info::Export(size, flags) => found = Some((size, flags)),
                    Info::Blocks(sizes) => blocks = Some(sizes),
                    Info::Other => {}
                },
                error if error & REPLY_ERROR != 0 => {
                    let said = String::from_utf8_lossy(&data).trim().to_owned();
                    let reason = if said.is_empty() { error_name(error).to_owned() } else { said };
                    return Err(HandshakeError::Refused {
                        path: self.path.to_owned(),
                        export: export.to_owned(),
                        reason,
                    });
                }
                _ => return Err(self.protocol("its answer is of an unknown type")),
            }
        }
        Err(self.protocol("it answers without end"))
    }

    /// Type and data of the next answer.
    fn reply(&mut self) -> Result<(u32, Vec<u8>), HandshakeError> {
        let header: [u8; 20] = self.read()?;
        let word =
            |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        if ((u64::from(word(0)) << 32) | u64::from(word(4))) != REPLY_MAGIC {
            return Err(self.protocol("an answer does not begin with its magic number"));
        }
        if word(8) != OPTION_GO {
            return Err(self.protocol("it answers something that it was not asked"));
        }
        let (kind, length) = (word(12), word(16));
        if length > MOST_REPLY {
            return Err(self.protocol("an answer is longer than 4096 bytes"));
        }
        let mut data = vec![0; length as usize];
        self.fill(&mut data)?;
        Ok((kind, data))
    }

    fn read<const N: usize>(&mut self) -> Result<[u8; N], HandshakeError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// Like `read_exact`, but for the one limit of time that all reads share.
    fn fill(&mut self, mut rest: &mut [u8]) -> Result<(), HandshakeError> {
        while !rest.is_empty() {
            let left = self.time_left()?;
            let read = self.stream.set_read_timeout(Some(left)).and_then(|()| self.stream.read(rest));
            match read {
                Ok(0) => return Err(self.broken_off(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => rest = &mut rest[n..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.broken_off(error)),
            }
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), HandshakeError> {
        let left = self.time_left()?;
        let written = self.stream.set_write_timeout(Some(left)).and_then(|()| self.stream.write_all(bytes));
        written.map_err(|error| self.broken_off(error))
    }

    fn time_left(&self) -> Result<Duration, HandshakeError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(self.timed_out()) } else { Ok(left) }
    }

    fn broken_off(&self, source: io::Error) -> HandshakeError {
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.timed_out(),
            _ => HandshakeError::BrokenOff { path: self.path.to_owned(), source },
        }
    }

    fn timed_out(&self) -> HandshakeError {
        HandshakeError::TimedOut { path: self.path.to_owned(), limit: self.limit }
    }

    fn protocol(&self, what: &'static str) -> HandshakeError {
        HandshakeError::Protocol { path: self.path.to_owned(), what }
    }
}

/// `NBD_OPT_GO` with a question for the block sizes; whoever asks for them promises to obey them.
fn go_request(export: &str) -> Vec<u8> {
    let length = u32::try_from(export.len()).expect("a name has at most 4096 bytes");
    [
        &OPTION_MAGIC[..],
        &OPTION_GO.to_be_bytes(),
        &(length + 8).to_be_bytes(),
        &length.to_be_bytes(),
        export.as_bytes(),
        &1_u16.to_be_bytes(),
        &INFO_BLOCK_SIZE.to_be_bytes(),
    ]
    .concat()
}

/// A piece of information about an export.
enum Info {
    Export(Bytes, ExportFlags),
    Blocks(BlockSizes),
    Other,
}

fn parse_info(data: &[u8]) -> Result<Info, &'static str> {
    let Some((kind, rest)) = data.split_first_chunk::<2>() else {
        return Err("a piece of information has no type");
    };
    match u16::from_be_bytes(*kind) {
        INFO_EXPORT => {
            let wrong = "what it says of the export has not 12 bytes";
            let (size, flags) = rest.split_first_chunk::<8>().ok_or(wrong)?;
            let size = u64::from_be_bytes(*size);
            let flags = u16::from_be_bytes(flags.try_into().map_err(|_| wrong)?);
            if i64::try_from(size).is_err() {
                return Err("it exports more than 2^63 bytes");
            }
            Ok(Info::Export(Bytes(size), ExportFlags(flags)))
        }
        INFO_BLOCK_SIZE => {
            let (words, []) = rest.as_chunks::<4>() else {
                return Err("what it says of block sizes has not 14 bytes");
            };
            let [minimum, preferred, maximum] = words else {
                return Err("what it says of block sizes has not 14 bytes");
            };
            let size = |bytes: &[u8; 4]| Bytes(u64::from(u32::from_be_bytes(*bytes)));
            let sizes =
                BlockSizes { minimum: size(minimum), preferred: size(preferred), maximum: size(maximum) };
            let plausible = sizes.minimum.0.is_power_of_two()
                && sizes.minimum <= Bytes::kib(64)
                && sizes.preferred.0.is_power_of_two()
                && sizes.preferred >= sizes.minimum
                && sizes.maximum >= sizes.minimum;
            plausible.then_some(Info::Blocks(sizes)).ok_or("its block sizes are no block sizes")
        }
        _ => Ok(Info::Other),
    }
}

/// `NBD_REP_ERR_*`.
fn error_name(error: u32) -> &'static str {
    match error & !REPLY_ERROR {
        1 => "it does not know NBD_OPT_GO",
        2 => "its policy forbids it",
        3 => "it calls the request invalid",
        4 => "its platform does not support it",
        5 => "it wants TLS",
        6 => "it has no such export",
        7 => "it is shutting down",
        8 => "it wants its block sizes to be obeyed",
        9 => "it calls the request too long",
        _ => "it gives no reason",
    }
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
