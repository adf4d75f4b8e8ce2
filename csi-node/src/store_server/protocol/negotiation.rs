//! The negotiation: from the greeting to the first request.

use super::options::{self, ALLOCATION, BASE, ClientOption};
use super::{Agreed, Broken, ExportInfo, MOST_NAME, MOST_OPTION, MOST_OPTIONS};

const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// `NBD_FLAG_FIXED_NEWSTYLE` and `NBD_FLAG_NO_ZEROES`, the same bits on both sides.
const FIXED_NEWSTYLE: u32 = 1;
const NO_ZEROES: u32 = 2;
/// The id that `base:allocation` has in answers.
pub const ALLOCATION_ID: u32 = 1;

/// `NBD_FLAG_*` of the export: has flags, read-only, takes flushes, several connections see the same.
const EXPORT_FLAGS: u16 = 0b1_0000_0111;
/// `NBD_FLAG_SEND_DF`: an answer can be one chunk. Only where answers are chunks.
const SEND_DF: u16 = 1 << 7;

/// `NBD_REP_*`.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Reply {
    Ack = 1,
    Server = 2,
    Info = 3,
    MetaContext = 4,
    Unsupported = (1 << 31) | 1,
    Invalid = (1 << 31) | 3,
    Unknown = (1 << 31) | 6,
    TooBig = (1 << 31) | 9,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Read more, until there are so many bytes; nothing was used up.
    Need(usize),
    /// Drop so many bytes of what was read, and send these.
    Answer {
        /// How many bytes were used up.
        used: usize,
        /// What to send; may be empty.
        send: Vec<u8>,
    },
    /// The same, then requests follow.
    Begin {
        /// How many bytes were used up.
        used: usize,
        /// What to send.
        send: Vec<u8>,
        /// What was agreed.
        agreed: Agreed,
    },
    /// The same, then the connection ends as the client wishes.
    End {
        /// What to send.
        send: Vec<u8>,
    },
}

/// Where a negotiation is.
#[derive(Debug)]
pub struct Negotiation<'a> {
    export: &'a ExportInfo,
    greeted: bool,
    zeroes: bool,
    options: u32,
    structured: bool,
    /// The name that `base:allocation` was selected for.
    allocation: Option<Vec<u8>>,
}

/// The first bytes that a server sends.
pub fn greeting() -> [u8; 18] {
    let mut bytes = *b"NBDMAGICIHAVEOPT\0\0";
    bytes[17] = 3;
    bytes
}

impl<'a> Negotiation<'a> {
    /// Begins after the greeting was sent.
    pub fn new(export: &'a ExportInfo) -> Self {
        Self { export, greeted: false, zeroes: true, options: 0, structured: false, allocation: None }
    }

    /// Goes on with what was read and not used up.
    ///
    /// # Errors
    /// [`Broken`]
    pub fn advance(&mut self, read: &[u8]) -> Result<Step, Broken> {
        if !self.greeted {
            return self.flags(read);
        }
        let mut rest = read;
        let (Some(magic), Some(number), Some(length)) =
            (super::take::<8>(&mut rest), super::take_u32(&mut rest), super::take_u32(&mut rest))
        else {
            return Ok(Step::Need(16));
        };
        if &magic != OPTION_MAGIC {
            return Err(Broken::OptionMagic(u64::from_be_bytes(magic)));
        }
        if length > MOST_OPTION {
            return Err(Broken::OptionLength { option: number, length });
        }
        let length = length as usize;
        let Some(data) = rest.get(..length) else { return Ok(Step::Need(16 + length)) };
        self.options += 1;
        if self.options > MOST_OPTIONS {
            return Err(Broken::Options);
        }
        self.option(number, data, 16 + length)
    }

    fn flags(&mut self, read: &[u8]) -> Result<Step, Broken> {
        let mut rest = read;
        let Some(flags) = super::take_u32(&mut rest) else { return Ok(Step::Need(4)) };
        if flags & !(FIXED_NEWSTYLE | NO_ZEROES) != 0 || flags & FIXED_NEWSTYLE == 0 {
            return Err(Broken::ClientFlags(flags));
        }
        (self.greeted, self.zeroes) = (true, flags & NO_ZEROES == 0);
        Ok(Step::Answer { used: 4, send: Vec::new() })
    }

    fn option(&mut self, number: u32, data: &[u8], used: usize) -> Result<Step, Broken> {
        let answer = |send| Ok(Step::Answer { used, send });
        let Some(option) = options::parse(number, data) else {
            let said = b"the data of the option is not what it has";
            return answer(reply(number, Reply::Invalid, said));
        };
        match option {
            ClientOption::ExportName(name) if self.is_export(&name) => {
                let mut send = self.size_and_flags();
                send.resize(send.len() + if self.zeroes { 124 } else { 0 }, 0);
                Ok(Step::Begin { used, send, agreed: self.agreed(&name) })
            }
            ClientOption::ExportName(_) => Err(Broken::Export),
            ClientOption::Abort => Ok(Step::End { send: reply(number, Reply::Ack, b"") }),
            ClientOption::List => {
                let length = u32::try_from(self.export.name.len()).unwrap_or(u32::MAX).to_be_bytes();
                let name = [&length[..], self.export.name.as_bytes()].concat();
                answer([reply(number, Reply::Server, &name), reply(number, Reply::Ack, b"")].concat())
            }
            ClientOption::Info { name, wanted, go } if self.is_export(&name) => {
                let send = self.info(number, &wanted);
                if !go {
                    return answer(send);
                }
                Ok(Step::Begin { used, send, agreed: self.agreed(&name) })
            }
            ClientOption::Info { .. } => answer(reply(number, Reply::Unknown, b"no such export")),
            ClientOption::StructuredReply if self.structured => {
                answer(reply(number, Reply::Invalid, b"structured replies are agreed on already"))
            }
            ClientOption::StructuredReply => {
                self.structured = true;
                answer(reply(number, Reply::Ack, b""))
            }
            ClientOption::Meta { name, queries, set } => answer(self.meta(number, name, &queries, set)),
            ClientOption::Unknown => answer(reply(number, Reply::Unsupported, b"")),
        }
    }

    fn meta(&mut self, number: u32, name: Vec<u8>, queries: &[Vec<u8>], set: bool) -> Vec<u8> {
        if set {
            // Whatever the answer is, an earlier selection is gone.
            self.allocation = None;
        }
        if set && !self.structured {
            return reply(number, Reply::Invalid, b"metadata needs structured replies");
        }
        if !self.is_export(&name) {
            return reply(number, Reply::Unknown, b"no such export");
        }
        if queries.iter().any(|query| query.len() > MOST_NAME) {
            return reply(number, Reply::TooBig, b"a query is too long");
        }
        let meant = |query: &Vec<u8>| query == ALLOCATION || (!set && query == BASE);
        let found = queries.iter().any(meant) || (!set && queries.is_empty());
        let mut send = Vec::new();
        if found {
            let id = if set { ALLOCATION_ID } else { 0 };
            send = reply(number, Reply::MetaContext, &[&id.to_be_bytes()[..], ALLOCATION].concat());
        }
        if found && set {
            self.allocation = Some(name);
        }
        send.extend(reply(number, Reply::Ack, b""));
        send
    }

    /// The answers to `NBD_OPT_INFO` and `NBD_OPT_GO`. The units of requests are told in any case.
    fn info(&self, number: u32, wanted: &[u16]) -> Vec<u8> {
        let info =
            |kind: u16, data: &[u8]| reply(number, Reply::Info, &[&kind.to_be_bytes()[..], data].concat());
        let mut send = info(0, &self.size_and_flags());
        if wanted.contains(&1) {
            send.extend(info(1, self.export.name.as_bytes()));
        }
        if wanted.contains(&2) {
            send.extend(info(2, self.export.description.as_bytes()));
        }
        let size = |bytes: berth_core::units::Bytes| u32::try_from(bytes.0).unwrap_or(u32::MAX).to_be_bytes();
        let sizes = [1_u32.to_be_bytes(), size(self.export.preferred), size(self.export.longest)];
        send.extend(info(3, sizes.as_flattened()));
        send.extend(reply(number, Reply::Ack, b""));
        send
    }

    fn size_and_flags(&self) -> Vec<u8> {
        let flags = EXPORT_FLAGS | if self.structured { SEND_DF } else { 0 };
        [&self.export.size.0.to_be_bytes()[..], &flags.to_be_bytes()].concat()
    }

    fn is_export(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.export.name.as_bytes()
    }

    fn agreed(&self, name: &[u8]) -> Agreed {
        let allocation = self.allocation.as_deref() == Some(name);
        Agreed { structured: self.structured, allocation }
    }
}

fn reply(option: u32, kind: Reply, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    [
        &REPLY_MAGIC.to_be_bytes()[..],
        &option.to_be_bytes(),
        &(kind as u32).to_be_bytes(),
        &length.to_be_bytes(),
        data,
    ]
    .concat()
}
