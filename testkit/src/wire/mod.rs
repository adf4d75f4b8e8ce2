//! What the test servers share below S3 and files: connections that can be reset, bodies that are counted and cut.

mod body;
mod conn;
mod file;

use std::fmt::Write as _;

pub(crate) use body::{Cut, CutKind, End, ReceivedBody, SentBody, drain};
pub(crate) use conn::{Conn, Handler, Server};
pub(crate) use file::{FileBody, Piece};

/// The error type of bodies and services: hyper only passes it on.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The error of a request that ends without an answer because a fault rule says so.
#[derive(Debug, thiserror::Error)]
#[error("connection cut by a fault rule")]
pub(crate) struct CutOff;

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string does not fail");
        text
    })
}

/// Reads [`hex`] back; `None` if it is not hex.
pub(crate) fn unhex(text: &str) -> Option<Vec<u8>> {
    let pair = |i| text.get(i..i + 2).and_then(|h| u8::from_str_radix(h, 16).ok());
    (0..text.len()).step_by(2).map(pair).collect()
}

/// Decodes `%41` and leaves everything else; bytes that are no UTF-8 become replacement characters.
pub(crate) fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = bytes.get(i + 1..i + 3).and_then(|h| std::str::from_utf8(h).ok());
        match hex.and_then(|h| u8::from_str_radix(h, 16).ok()) {
            Some(byte) if bytes[i] == b'%' => {
                out.push(byte);
                i += 3;
            }
            _ => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    #[test]
    fn hex_reads_back() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(super::unhex(&super::hex(&all)), Some(all));
        assert_eq!((super::unhex("0"), super::unhex("0g"), super::unhex("äb")), (None, None, None));
    }

    #[test]
    fn percent_decoding_leaves_what_is_not_encoded() {
        assert_eq!(super::percent_decode("a%2Fb%20c%zz%4"), "a/b c%zz%4");
        assert_eq!(super::percent_decode("%C3%A4/100%"), "ä/100%");
    }
}
