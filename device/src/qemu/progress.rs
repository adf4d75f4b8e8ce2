//! What `qemu-img -p` prints: `    (12.34/100%)` and a carriage return, again and again.

/// How far a conversion got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Percent of the source's extents, 0 to 100.
    pub percent: u8,
}

/// Reads percentages out of pieces of text that may be cut anywhere.
#[derive(Debug, Default)]
pub(super) struct Parser {
    pending: Vec<u8>,
}

impl Parser {
    /// The last whole percentage in what was printed so far, if `text` completed one.
    pub fn feed(&mut self, text: &[u8]) -> Option<Progress> {
        let mut found = None;
        for &byte in text {
            match byte {
                b'(' => self.pending.clear(),
                b'/' => {
                    found = percentage(&self.pending).or(found);
                    self.pending.clear();
                }
                _ if self.pending.len() < 16 => self.pending.push(byte),
                _ => {}
            }
        }
        found
    }
}

fn percentage(text: &[u8]) -> Option<Progress> {
    let number = std::str::from_utf8(text).ok()?.trim();
    let (whole, fraction) = number.split_once('.')?;
    let plain = fraction.len() == 2 && fraction.bytes().all(|byte| byte.is_ascii_digit());
    let percent = whole.parse::<u8>().ok().filter(|percent| *percent <= 100 && plain)?;
    Some(Progress { percent })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_survive_being_cut() {
        let printed = b"    (0.00/100%)\r    (12.34/100%)\r    (100.00/100%)\r";
        for cut in 1..printed.len() {
            let mut parser = Parser::default();
            let seen: Vec<_> = printed.chunks(cut).filter_map(|piece| parser.feed(piece)).collect();
            assert_eq!(seen.last(), Some(&Progress { percent: 100 }), "pieces of {cut}");
        }
    }

    #[test]
    fn other_text_is_no_progress() {
        let mut parser = Parser::default();
        for text in ["qemu-img: error/100%", "(999.00/100%)", "(1/100%)", &"(".repeat(99), "(12.3x/"] {
            assert_eq!(parser.feed(text.as_bytes()), None, "{text}");
        }
        assert!(parser.pending.len() <= 16);
    }
}
