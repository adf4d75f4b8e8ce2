//! SHA-256 that can stop and go on in another process.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use berth_core::ids::Sha256Sum;
use sha2::Digest as _;
use sha2::Sha256;
use sha2::digest::common::hazmat::{SerializableState, SerializedState};
use thiserror::Error;

/// The saved state of a [`SourceHash`] is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{len} bytes are not the state of a SHA-256")]
pub struct StateError {
    /// How long it was.
    pub len: usize,
}

/// The sum of a source's bytes so far; its state is a part of every checkpoint.
#[derive(Clone, Default)]
pub struct SourceHash(Sha256);

impl SourceHash {
    /// Of nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The state, to be continued with [`SourceHash::from_state`]: about 105 bytes.
    pub fn state(&self) -> Vec<u8> {
        self.0.serialize().to_vec()
    }

    /// Continues from a saved state.
    ///
    /// # Errors
    /// [`StateError`] if it has the wrong length or is inconsistent: the source must be read again from its start.
    pub fn from_state(state: &[u8]) -> Result<Self, StateError> {
        let bad = StateError { len: state.len() };
        let state = SerializedState::<Sha256>::try_from(state).map_err(|_| bad)?;
        Sha256::deserialize(&state).map(Self).map_err(|_| bad)
    }

    /// The sum of all bytes added.
    pub fn finish(self) -> Sha256Sum {
        Sha256Sum(self.0.finalize().into())
    }
}

/// Standard base64, as checksum headers want it.
pub(crate) fn base64(bytes: &[u8]) -> String {
    BASE64_STANDARD.encode(bytes)
}

/// The sum that a checksum header tells; `None` if it is none.
pub(crate) fn sum_of_base64(text: &str) -> Option<Sha256Sum> {
    BASE64_STANDARD.decode(text).ok()?.try_into().ok().map(Sha256Sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_on_from_any_state() {
        let data: Vec<u8> = (0..1000_u32).flat_map(u32::to_le_bytes).collect();
        for cut in [0, 1, 63, 64, 65, 2048, data.len()] {
            let mut first = SourceHash::new();
            first.update(&data[..cut]);
            let mut second = SourceHash::from_state(&first.state()).expect("our own state");
            second.update(&data[cut..]);
            assert_eq!(second.finish(), Sha256Sum::of(&data), "cut at {cut}");
        }
    }

    #[test]
    fn rubbish_is_no_state() {
        assert!(SourceHash::from_state(b"").is_err());
        assert!(
            SourceHash::from_state(&[0xff; 105]).is_err() || SourceHash::from_state(&[0xff; 104]).is_err()
        );
    }

    #[test]
    fn a_header_tells_a_sum_or_nothing() {
        let sum = Sha256Sum::of(b"x");
        assert_eq!(sum_of_base64(&base64(&sum.0)), Some(sum));
        for other in ["", "Zm9v", "no base64 at all"] {
            assert_eq!(sum_of_base64(other), None, "{other}");
        }
    }
}
