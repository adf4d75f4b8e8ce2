//! Identities, and the names derived from them, with the inverse where recovery needs it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use crate::transfer::TransferKind;

/// Why a text is not the identity it was taken for.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ParseIdError {
    /// A digest without the algorithm in front, or with another one.
    #[error("`{0}` does not start with `sha256:`")]
    Algorithm(String),
    /// Not 64 lower-case hexadecimal digits.
    #[error("`{0}` is not 64 lower-case hexadecimal digits")]
    Hex(String),
    /// Not a handle of ours.
    #[error("`{0}` is not a volume or snapshot handle of this driver")]
    Handle(String),
}

/// 32 bytes of SHA-256, printed as lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sha256Sum(pub [u8; 32]);

impl Sha256Sum {
    /// The sum of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Reads 64 lower-case hexadecimal digits.
    pub fn from_hex(text: &str) -> Result<Self, ParseIdError> {
        let bad = || ParseIdError::Hex(text.to_owned());
        if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            return Err(bad());
        }
        let mut sum = [0; 32];
        for (byte, pair) in sum.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(pair).map_err(|_| bad())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| bad())?;
        }
        Ok(Self(sum))
    }
}

impl fmt::Display for Sha256Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sha256Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<String> for Sha256Sum {
    type Error = ParseIdError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::from_hex(&text)
    }
}

/// The id of a chunk: the SHA-256 of its uncompressed bytes. Names its key in the image store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub Sha256Sum);

impl ChunkId {
    /// The id of a chunk with this content.
    pub fn of(content: &[u8]) -> Self {
        Self(Sha256Sum::of(content))
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The identity of an image: `sha256:` of its canonical `.caibx` index, so of content and chunk size together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(pub Sha256Sum);

impl Digest {
    /// The 64 hexadecimal digits, as in object-store keys.
    pub fn hex(&self) -> String {
        self.0.to_string()
    }

    /// The first 16 hexadecimal digits, for names.
    pub fn short(&self) -> String {
        self.hex()[..16].to_owned()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

impl FromStr for Digest {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let hex = text.strip_prefix("sha256:").ok_or_else(|| ParseIdError::Algorithm(text.to_owned()))?;
        Ok(Self(Sha256Sum::from_hex(hex)?))
    }
}

impl TryFrom<String> for Digest {
    type Error = ParseIdError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

        impl $name {
            /// The text itself.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text)
            }
        }
    };
}

text_id! {
    /// The UID that the API server gave an object. Identifies a holder of promised space for ever.
    Uid
}
text_id! {
    /// The name of a `StagingPool`.
    PoolName
}
text_id! {
    /// The name of a Kubernetes node.
    NodeName
}
text_id! {
    /// A UUID, new each time a ledger is made or rebuilt.
    Lineage
}

/// A namespaced object's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl ObjectName {
    /// From the two parts.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The CSI handle of a volume: `v1-<UID of its reservation>`.
pub fn volume_handle(reservation: &Uid) -> String {
    format!("v1-{reservation}")
}

/// The reservation behind a volume handle.
///
/// # Errors
/// [`ParseIdError::Handle`] if it is not one of ours.
pub fn reservation_of_volume(handle: &str) -> Result<Uid, ParseIdError> {
    match handle.strip_prefix("v1-") {
        Some(uid) if is_uid(uid) => Ok(Uid::from(uid)),
        _ => Err(ParseIdError::Handle(handle.to_owned())),
    }
}

/// The ledger of `pool` on `node`: readable, unique, and a valid object name (at most 253 characters, RFC 1123).
pub fn ledger_name(pool: &PoolName, node: &NodeName) -> String {
    hashed_name(pool.as_str(), &[pool.as_str(), node.as_str()])
}

/// The reservation of the CSI volume `volume_name` asked for on `node`.
pub fn csi_reservation_name(volume_name: &str, node: &NodeName) -> String {
    hashed_name(&format!("csi-{volume_name}"), &[volume_name, node.as_str()])
}

/// The staged image of `digest` in `pool` on `node`.
pub fn staged_image_name(digest: &Digest, pool: &PoolName, node: &NodeName) -> String {
    hashed_name(&digest.short(), &[&digest.hex(), pool.as_str(), node.as_str()])
}

/// The reservation that holds what the transfer with this `uid` needs.
pub fn transfer_reservation_name(kind: TransferKind, transfer: &str, uid: &Uid) -> String {
    hashed_name(&format!("{}-{transfer}", kind.noun()), &[uid.as_str()])
}

/// How many reservations may stand in for the first of a transfer, one after the other.
const SPARE_RESERVATIONS: u8 = 7;

/// The names of all reservations that a transfer may have. Only one of no bytes has any but the first: it is replaced by the next
/// one where its node is lost, which may give it back much later.
pub fn transfer_reservation_names<'n>(
    kind: TransferKind,
    transfer: &'n str,
    uid: &'n Uid,
) -> impl Iterator<Item = String> + 'n {
    let spare = move |number: u8| {
        hashed_name(&format!("{}-{transfer}", kind.noun()), &[uid.as_str(), &number.to_string()])
    };
    std::iter::once(transfer_reservation_name(kind, transfer, uid)).chain((1..=SPARE_RESERVATIONS).map(spare))
}

/// True if a transfer may have a reservation of this name. Names that begin otherwise are told apart without a hash.
pub fn is_transfer_reservation(kind: TransferKind, transfer: &str, uid: &Uid, name: &str) -> bool {
    name.starts_with(&readable(&format!("{}-{transfer}", kind.noun())))
        && transfer_reservation_names(kind, transfer, uid).any(|made| made == name)
}

/// The Lease that a node's agent renews.
pub fn node_lease_name(node: &NodeName) -> String {
    format!("berth-node-{}", &Sha256Sum::of(node.as_str().as_bytes()).to_string()[..16])
}

/// `prefix-<16 hex of sha256(parts)>`; the parts are separated so that no two lists hash alike, and the prefix is cut
/// so that the name stays below 64 characters and made of what an RFC 1123 label may hold.
fn hashed_name(prefix: &str, parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    let sum = Sha256Sum(hash.finalize().into()).to_string();
    let readable = readable(prefix);
    if readable.is_empty() { format!("x-{}", &sum[..16]) } else { format!("{readable}-{}", &sum[..16]) }
}

/// What people see of a hashed name.
fn readable(prefix: &str) -> String {
    let readable: String = prefix
        .chars()
        .map(|c| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' })
        .take(46)
        .collect();
    readable.trim_matches('-').to_owned()
}

/// True for what may stand for a UID in names, keys and paths: 1 to 64 lower-case letters, digits and dashes.
pub fn is_uid(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_read_back() {
        let digest = Digest(Sha256Sum::of(b"index"));
        assert_eq!(digest.to_string().parse(), Ok(digest));
        assert!(matches!("md5:00".parse::<Digest>(), Err(ParseIdError::Algorithm(_))));
        assert!(matches!("sha256:00".parse::<Digest>(), Err(ParseIdError::Hex(_))));
        assert!(matches!(Sha256Sum::from_hex(&"A".repeat(64)), Err(ParseIdError::Hex(_))));
    }

    #[test]
    fn handles_read_back_and_foreign_ones_are_refused() {
        let uid = Uid::from("0f8fad5b-d9cb-469f-a165-70867728950e");
        assert_eq!(reservation_of_volume(&volume_handle(&uid)), Ok(uid));
        for foreign in ["", "v1-", "v1-../../etc", "pvc-1", "v2-abc"] {
            assert!(reservation_of_volume(foreign).is_err(), "{foreign}");
        }
    }

    #[test]
    fn names_are_labels_and_distinct() {
        let node = NodeName::from("n1");
        let long = csi_reservation_name(&"PVC_".repeat(80), &node);
        assert!(long.len() < 64 && is_uid(&long), "{long}");
        assert_ne!(
            ledger_name(&PoolName::from("a"), &NodeName::from("bc")),
            ledger_name(&PoolName::from("ab"), &NodeName::from("c"))
        );
        assert_eq!(csi_reservation_name("___", &node).split('-').next(), Some("csi"));
    }

    #[test]
    fn the_reservations_of_a_transfer_are_told_by_their_names() {
        let (uid, other) = (Uid::from("u1"), Uid::from("u2"));
        for kind in [TransferKind::Import, TransferKind::Transfer] {
            let names: Vec<String> = transfer_reservation_names(kind, "debian", &uid).collect();
            assert_eq!(names[0], transfer_reservation_name(kind, "debian", &uid));
            for (at, name) in names.iter().enumerate() {
                assert!(name.len() < 64 && !names[..at].contains(name), "{name}");
                assert!(is_transfer_reservation(kind, "debian", &uid, name));
                assert!(!is_transfer_reservation(kind, "debian", &other, name));
                assert!(!is_transfer_reservation(kind, "other", &uid, name));
            }
        }
        let import = transfer_reservation_name(TransferKind::Import, "debian", &uid);
        assert!(!is_transfer_reservation(TransferKind::Transfer, "debian", &uid, &import));
    }
}
