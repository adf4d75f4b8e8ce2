//! Whose a pool directory is: a small file beside the image, written before anything else.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use berth_core::ids::{NodeName, PoolName, Sha256Sum, Uid};
use berth_core::units::Bytes;
use serde::{Deserialize, Serialize};

use super::ClaimError;
use crate::files;

/// The version of the claim's format that this program writes, and the newest that it reads.
const FORMAT: u32 = 1;
const NAME: &str = "berth-pool.json";

/// Which pool an area belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolIdentity {
    /// The UID of the `StagingPool`.
    pub pool: Uid,
    /// Its name, for people.
    pub name: PoolName,
    /// The node.
    pub node: NodeName,
}

impl PoolIdentity {
    /// The UUID of the pool's file system: the first 16 bytes of the SHA-256 of the pool's UID, marked as a UUID of
    /// version 8.
    pub fn filesystem_uuid(&self) -> [u8; 16] {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&Sha256Sum::of(self.pool.as_str().as_bytes()).0[..16]);
        uuid[6] = (uuid[6] & 0x0F) | 0x80;
        uuid[8] = (uuid[8] & 0x3F) | 0x80;
        uuid
    }
}

/// How far the making of an area got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Stage {
    /// The image may not exist yet.
    Creating,
    /// The image exists; if it does not, it was lost.
    Image,
    /// There is no image: a plain directory stands in for it.
    Directory,
}

/// The content of the claim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Claim {
    pub format: u32,
    #[serde(flatten)]
    pub identity: PoolIdentity,
    pub size: Bytes,
    pub stage: Stage,
    /// Free bytes of the area before anything was stored in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub empty_free: Option<Bytes>,
}

impl Claim {
    pub fn new(identity: PoolIdentity, size: Bytes) -> Self {
        Self { format: FORMAT, identity, size, stage: Stage::Creating, empty_free: None }
    }

    pub fn path(dir: &Path) -> PathBuf {
        dir.join(NAME)
    }

    /// The claim on `dir`, if there is one, whoever made it.
    pub fn read(dir: &Path) -> Result<Option<Self>, ClaimError> {
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let path = Self::path(dir);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ClaimError::Directory { path, source }),
        };
        let corrupt = |source| ClaimError::Corrupt { path: path.clone(), source };
        let Version { format } = serde_json::from_slice(&text).map_err(corrupt)?;
        if format > FORMAT {
            return Err(ClaimError::NewerFormat { path, found: format });
        }
        serde_json::from_slice(&text).map(Some).map_err(corrupt)
    }

    /// Fails unless this is the claim of `identity`.
    pub fn check(&self, identity: &PoolIdentity, dir: &Path) -> Result<(), ClaimError> {
        let dir = dir.to_owned();
        if self.identity.pool != identity.pool {
            return Err(ClaimError::InUseByPool {
                dir,
                pool: self.identity.pool.clone(),
                name: self.identity.name.clone(),
            });
        }
        if self.identity.node != identity.node {
            return Err(ClaimError::InUseByNode { dir, node: self.identity.node.clone() });
        }
        Ok(())
    }

    pub fn write(&self, dir: &Path) -> Result<(), ClaimError> {
        let path = Self::path(dir);
        let text = serde_json::to_vec_pretty(self)
            .map_err(|source| ClaimError::Corrupt { path: path.clone(), source })?;
        Ok(files::write_durably(&path, &text)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(pool: &str) -> PoolIdentity {
        PoolIdentity { pool: pool.into(), name: "fast".into(), node: "n1".into() }
    }

    #[test]
    fn a_claim_reads_back_and_holds_against_others() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Claim::read(dir.path()).unwrap(), None);
        let claim = Claim::new(identity("u1"), Bytes::mib(300));
        claim.write(dir.path()).unwrap();
        let found = Claim::read(dir.path()).unwrap().unwrap();
        assert_eq!(found, claim);
        found.check(&identity("u1"), dir.path()).unwrap();
        let error = found.check(&identity("u2"), dir.path()).unwrap_err();
        assert!(matches!(error, ClaimError::InUseByPool { pool, .. } if pool == "u1".into()));
        let elsewhere = PoolIdentity { node: "n2".into(), ..identity("u1") };
        assert!(matches!(found.check(&elsewhere, dir.path()), Err(ClaimError::InUseByNode { .. })));
    }

    #[test]
    fn damaged_and_newer_claims_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(Claim::path(dir.path()), b"{").unwrap();
        assert!(matches!(Claim::read(dir.path()), Err(ClaimError::Corrupt { .. })));
        fs::write(Claim::path(dir.path()), br#"{"format": 2, "all": "different"}"#).unwrap();
        assert!(matches!(Claim::read(dir.path()), Err(ClaimError::NewerFormat { found: 2, .. })));
    }

    #[test]
    fn the_uuid_depends_on_the_pool_alone() {
        let uuid = identity("u1").filesystem_uuid();
        assert_eq!(uuid, PoolIdentity { node: "n2".into(), ..identity("u1") }.filesystem_uuid());
        assert_ne!(uuid, identity("u2").filesystem_uuid());
        assert_eq!((uuid[6] >> 4, uuid[8] >> 6), (8, 2));
    }
}
