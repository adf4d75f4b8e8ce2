//! The options of the negotiation: what a client may ask for, and how it is read.

use super::{MOST_NAME, take_text, take_u16, take_u32};

/// The one metadata context there is.
pub const ALLOCATION: &[u8] = b"base:allocation";
/// Its namespace: asked for in a list, it stands for all within.
pub const BASE: &[u8] = b"base:";

/// An option, as the client means it. Names are bytes: only equal ones are looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientOption {
    /// `NBD_OPT_EXPORT_NAME` (1): begins, without a way to refuse.
    ExportName(Vec<u8>),
    /// `NBD_OPT_ABORT` (2).
    Abort,
    /// `NBD_OPT_LIST` (3).
    List,
    /// `NBD_OPT_INFO` (6) and `NBD_OPT_GO` (7), which begins.
    Info {
        /// Which export.
        name: Vec<u8>,
        /// What is to be told beside its size and flags.
        wanted: Vec<u16>,
        /// True to begin.
        go: bool,
    },
    /// `NBD_OPT_STRUCTURED_REPLY` (8).
    StructuredReply,
    /// `NBD_OPT_LIST_META_CONTEXT` (9) and `NBD_OPT_SET_META_CONTEXT` (10), which selects.
    Meta {
        /// Which export.
        name: Vec<u8>,
        /// Which contexts; none means all when they are listed.
        queries: Vec<Vec<u8>>,
        /// True to select.
        set: bool,
    },
    /// One that this server does not have.
    Unknown,
}

/// Numbers of options that answers name.
pub mod number {
    /// `NBD_OPT_EXPORT_NAME`, which has no answer of the usual form.
    pub const EXPORT_NAME: u32 = 1;
}

/// Reads an option's data. Nothing if it is not what the option has.
pub fn parse(number: u32, data: &[u8]) -> Option<ClientOption> {
    let mut rest = data;
    let empty = data.is_empty();
    let option = match number {
        number::EXPORT_NAME => {
            rest = &[];
            ClientOption::ExportName(data.to_vec())
        }
        // Whoever wants to end may say why.
        2 => return Some(ClientOption::Abort),
        3 if empty => ClientOption::List,
        6 | 7 => {
            let name = take_name(&mut rest)?;
            let count = take_u16(&mut rest)?;
            let wanted = (0..count).map(|_| take_u16(&mut rest)).collect::<Option<Vec<u16>>>()?;
            ClientOption::Info { name, wanted, go: number == 7 }
        }
        8 if empty => ClientOption::StructuredReply,
        9 | 10 => {
            let name = take_name(&mut rest)?;
            let count = take_u32(&mut rest)?;
            // The data's own length bounds them: each has at least four bytes.
            let most = u32::try_from(rest.len() / 4).unwrap_or(u32::MAX);
            if count > most {
                return None;
            }
            let queries = (0..count).map(|_| take_text(&mut rest)).collect::<Option<Vec<_>>>()?;
            ClientOption::Meta { name, queries, set: number == 10 }
        }
        3 | 8 => return None,
        _ => return Some(ClientOption::Unknown),
    };
    rest.is_empty().then_some(option)
}

fn take_name(rest: &mut &[u8]) -> Option<Vec<u8>> {
    take_text(rest).filter(|name| name.len() <= MOST_NAME)
}
