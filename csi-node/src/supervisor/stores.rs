//! Servers of images of an image store: what they are told, and what they tell.
//!
//! Each has a folder of its own, for root only. In it lie what it serves with the credentials for that, the order to make a
//! template local, if there is one, and what it says of itself. Files and not a conversation, so that whoever runs it, and
//! it itself, may be killed and go on at any moment.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use berth_core::ids::{Digest, Uid};
use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_device::files;
use berth_objectstore::s3::{Addressing, Credentials, S3Config, Secret};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize, Serializer};

use super::servers::{ServeError, StateError};

/// In a server's folder: what it serves, what it is to do beside that, and how it is.
const SERVED: &str = "server.json";
const ORDER: &str = "order.json";
const STATUS: &str = "status.json";

/// An image of an image store that is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StoreServerSpec {
    /// Whose device reads from it: the UID in the identifier of that device.
    pub id: Uid,
    /// The image.
    pub digest: Digest,
    /// The size that it must have as a disk.
    pub size: Bytes,
    /// The most of it that may be data.
    pub data: Bytes,
    /// How it is reached.
    pub access: StoreAccess,
}

/// How an image store is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StoreAccess {
    /// The store's URL; nothing means AWS.
    pub endpoint: Option<String>,
    /// The region that signatures name.
    pub region: String,
    /// The bucket.
    pub bucket: String,
    /// Where in the bucket the image store lies.
    pub prefix: String,
    /// True if the bucket is a part of the host's name.
    pub virtual_host: bool,
    /// PEM certificates to trust.
    pub ca_bundle: Option<String>,
    /// Who asks; nothing means whatever the environment of the server provides.
    pub keys: Option<KeyPair>,
}

/// Credentials. They never print.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KeyPair {
    /// The public part.
    pub access_key_id: String,
    /// The secret part.
    #[serde(serialize_with = "reveal")]
    pub secret_key: Secret,
    /// For temporary credentials.
    #[serde(default, serialize_with = "reveal_if_any")]
    pub session_token: Option<Secret>,
}

fn reveal<S: Serializer>(secret: &Secret, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(secret.reveal())
}

#[allow(clippy::ref_option)] // as serde calls it
fn reveal_if_any<S: Serializer>(secret: &Option<Secret>, serializer: S) -> Result<S::Ok, S::Error> {
    secret.as_ref().map(Secret::reveal).serialize(serializer)
}

/// The order to make a template local: each chunk that is fetched is written through its device, and all of them are fetched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HydrationOrder {
    /// The staging pool of the template.
    pub pool: Uid,
    /// Whose template it is.
    pub holder: Uid,
    /// How many bytes a second are fetched that nobody waits for, at most; nothing is no limit.
    pub rate: Option<Bytes>,
}

/// What a server says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoreStatus {
    /// What is wrong, by the name of a reason, and in words. Reads that need it wait, or fail.
    #[serde(default)]
    pub trouble: Option<(String, String)>,
    /// Chunks that were fetched and were right.
    pub chunks_fetched: u64,
    /// Bytes that were transferred for them.
    pub bytes_fetched: u64,
    /// Of these chunks, those that nobody waited for.
    pub chunks_background: u64,
    /// True if it has an order to make a template local.
    pub ordered: bool,
}

impl StoreStatus {
    /// Nothing but what is wrong.
    pub fn failing(reason: Reason, message: String) -> Self {
        Self { trouble: Some((reason.as_str().to_owned(), message)), ..Self::default() }
    }

    /// What is wrong. A reason that a newer server tells and nobody here knows is that of a store that does not answer.
    pub fn trouble(&self) -> Option<(Reason, String)> {
        let (reason, message) = self.trouble.as_ref()?;
        Some((Reason::from_name(reason).unwrap_or(Reason::ObjectStoreUnavailable), message.clone()))
    }
}

impl StoreServerSpec {
    /// What could never be served.
    pub fn check(&self) -> Result<(), ServeError> {
        let why = if self.size == Bytes::ZERO || !self.size.0.is_multiple_of(512) {
            "the size is not a positive multiple of 512 bytes"
        } else if berth_device::nbd::BackendId::new(&self.id).is_err() {
            "the id is not a UUID of lower-case digits"
        } else {
            return Ok(());
        };
        Err(ServeError::Refused { id: self.id.clone(), why: why.to_owned() })
    }

    /// True if it is the same image, however that is reached.
    pub fn is_same_image(&self, other: &Self) -> bool {
        (&self.id, self.digest, self.size) == (&other.id, other.digest, other.size)
    }

    /// Leaves it for the server of a folder, which is made if it is not there.
    pub(super) fn leave_in(&self, folder: &Path) -> Result<(), StateError> {
        use std::os::unix::fs::DirBuilderExt as _;
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(StateError::io(folder))?;
        write(&folder.join(SERVED), self)
    }

    /// What the server of a folder serves.
    pub fn of(folder: &Path) -> Result<Self, StateError> {
        let path = folder.join(SERVED);
        read(&path)?.ok_or_else(|| StateError::io(&path)(io::ErrorKind::NotFound.into()))
    }
}

impl StoreAccess {
    /// The client that it takes.
    pub fn config(&self) -> S3Config {
        let credentials = match &self.keys {
            None => Credentials::Ambient,
            Some(KeyPair { access_key_id, secret_key, session_token }) => Credentials::Static {
                access_key_id: access_key_id.clone(),
                secret_key: secret_key.clone(),
                session_token: session_token.clone(),
            },
        };
        S3Config {
            endpoint: self.endpoint.clone(),
            region: self.region.clone(),
            bucket: self.bucket.clone(),
            addressing: if self.virtual_host { Addressing::VirtualHost } else { Addressing::Path },
            credentials,
            ca_bundle: self.ca_bundle.clone().map(String::into_bytes),
        }
    }
}

impl KeyPair {
    /// Nothing for those of the environment.
    pub fn of(credentials: Credentials) -> Option<Self> {
        match credentials {
            Credentials::Ambient => None,
            Credentials::Static { access_key_id, secret_key, session_token } => {
                Some(Self { access_key_id, secret_key, session_token })
            }
        }
    }
}

/// Leaves an order for the server of a folder, or takes it back.
pub(super) fn give_order(folder: &Path, order: Option<&HydrationOrder>) -> Result<(), StateError> {
    let path = folder.join(ORDER);
    match order {
        Some(order) => write(&path, order),
        None => match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StateError::io(&path)(error)),
            _ => Ok(()),
        },
    }
}

/// The order for the server of a folder, if there is one.
pub fn order_in(folder: &Path) -> Result<Option<HydrationOrder>, StateError> {
    read(&folder.join(ORDER))
}

/// Says how the server of a folder is.
pub fn say_status(folder: &Path, status: &StoreStatus) -> Result<(), StateError> {
    write(&folder.join(STATUS), status)
}

/// What the server of a folder said last, if it said anything.
pub(super) fn status_in(folder: &Path) -> Option<StoreStatus> {
    read(&folder.join(STATUS)).ok().flatten()
}

/// For root only: it may hold credentials.
pub(super) fn write(path: &Path, what: &impl Serialize) -> Result<(), StateError> {
    let text = serde_json::to_vec_pretty(what).map_err(|error| unreadable(path, &error))?;
    Ok(files::write_durably(path, &text)?)
}

/// Nothing if it is not there.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StateError> {
    match fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| unreadable(path, &error)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StateError::io(path)(error)),
    }
}

fn unreadable(path: &Path, error: &serde_json::Error) -> StateError {
    StateError::Unreadable { path: PathBuf::from(path), reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    fn spec() -> StoreServerSpec {
        StoreServerSpec {
            id: Uid::from("0f3c9a1e-5b7d-4c2a-9e10-00a1b2c3d4e5"),
            digest: format!("sha256:{}", "ab".repeat(32)).parse().unwrap(),
            size: Bytes::gib(1),
            data: Bytes::mib(100),
            access: StoreAccess {
                endpoint: Some("http://127.0.0.1:9000".into()),
                region: "r".into(),
                bucket: "b".into(),
                prefix: "p".into(),
                virtual_host: false,
                ca_bundle: None,
                keys: Some(KeyPair {
                    access_key_id: "id".into(),
                    secret_key: Secret::new("hidden"),
                    session_token: Some(Secret::new("hidden too")),
                }),
            },
        }
    }

    #[test]
    fn credentials_reach_the_server_alone_and_are_never_printed() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("server");
        let spec = spec();
        assert!(!format!("{spec:?}").contains("hidden"));
        spec.leave_in(&folder).unwrap();
        assert_eq!(StoreServerSpec::of(&folder).unwrap(), spec);
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&folder), mode(&folder.join(SERVED))), (0o700, 0o600));
        let Credentials::Static { secret_key, .. } = spec.access.config().credentials else { panic!() };
        assert_eq!(secret_key.reveal(), "hidden");
    }

    #[test]
    fn orders_come_and_go_and_a_reason_of_tomorrow_is_a_store_that_is_away() {
        let dir = tempfile::tempdir().unwrap();
        let order = HydrationOrder { pool: "p".into(), holder: "h".into(), rate: Some(Bytes::mib(1)) };
        assert_eq!(order_in(dir.path()).unwrap(), None);
        give_order(dir.path(), Some(&order)).unwrap();
        assert_eq!(order_in(dir.path()).unwrap(), Some(order));
        for _ in 0..2 {
            give_order(dir.path(), None).unwrap();
        }
        assert_eq!(order_in(dir.path()).unwrap(), None);
        let status = StoreStatus::failing(Reason::ChunkMissing, "gone".into());
        say_status(dir.path(), &status).unwrap();
        let read = status_in(dir.path()).unwrap();
        assert_eq!(read.trouble(), Some((Reason::ChunkMissing, "gone".to_owned())));
        let tomorrow = StoreStatus { trouble: Some(("Eclipse".into(), "dark".into())), ..read };
        assert_eq!(tomorrow.trouble().unwrap().0, Reason::ObjectStoreUnavailable);
    }

    #[test]
    fn what_could_never_be_served_is_refused() {
        assert!(spec().check().is_ok());
        for bad in [
            StoreServerSpec { size: Bytes(100), ..spec() },
            StoreServerSpec { size: Bytes::ZERO, ..spec() },
            StoreServerSpec { id: "no-uuid".into(), ..spec() },
        ] {
            assert!(matches!(bad.check(), Err(ServeError::Refused { .. })), "{bad:?}");
        }
    }
}
