//! An S3 server for tests: real signatures, checksums and conditions, objects in plain files, faults on request, and a log
//! of what it received.
//!
//! Guarantees: what was acknowledged is there after `kill -9` and a new start on the same directory; a killed write leaves
//! the old object or the new one; conditional writes of one key are atomic; memory does not grow with object sizes.
//! What it does not have: versions, access control beyond one key pair, `UploadPartCopy`, `ListObjects` (version 1).

mod convert;
pub mod fault;
pub mod log;
mod ops;
mod service;
mod store;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;

use self::fault::{FaultEngine, FaultRule, FaultsError, write_rules};
use self::log::{LogError, LogWriter, RequestLog};
use self::ops::Operations;
use self::service::{Gate, LoggedS3};
use self::store::{Store, StoreError};
use crate::wire::Server;

/// The request log's file name in the data directory.
pub const LOG_FILE: &str = "requests.jsonl";
/// Part size that AWS demands of all but the last part: 5 MiB.
pub const AWS_MIN_PART_SIZE: u64 = 5 << 20;

/// How an S3 server runs.
#[derive(Debug, Clone)]
pub struct S3Options {
    /// Address to listen on; port 0 lets the system choose.
    pub listen: SocketAddr,
    /// Access key id.
    pub access_key: String,
    /// Secret key.
    pub secret_key: String,
    /// Buckets that are created if they do not exist.
    pub buckets: Vec<String>,
    /// Whether files and the log are synced before an answer. Without it everything still survives the end of the process.
    pub fsync: bool,
    /// Smallest size, in bytes, of a part that is not the last.
    pub min_part_size: u64,
}

impl Default for S3Options {
    /// A free port on the loopback interface, fixed test keys, no buckets, synced, AWS's part size.
    fn default() -> Self {
        Self {
            listen: (Ipv4Addr::LOCALHOST, 0).into(),
            access_key: "AKIATEST".to_owned(),
            secret_key: "SECRETTEST".to_owned(),
            buckets: Vec::new(),
            fsync: true,
            min_part_size: AWS_MIN_PART_SIZE,
        }
    }
}

/// Why an S3 server did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory is not usable.
    #[error("data directory {dir} cannot be used")]
    Data {
        /// The directory.
        dir: PathBuf,
        /// What failed in it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The address is not usable.
    #[error("cannot listen on {addr}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// A running S3 server. Dropping it cuts all connections; its data stays.
#[derive(Debug)]
pub struct TestS3 {
    server: Server,
    options: S3Options,
    dir: PathBuf,
}

impl TestS3 {
    /// Starts a server with default options and bucket `test` on the data in `dir`.
    pub async fn start(dir: &Path) -> Result<Self, StartError> {
        Self::start_with(dir, S3Options { buckets: vec!["test".to_owned()], ..S3Options::default() }).await
    }

    /// Starts a server on the data in `dir`, which is created if needed.
    pub async fn start_with(dir: &Path, options: S3Options) -> Result<Self, StartError> {
        let fail = |source| StartError::Data { dir: dir.to_owned(), source };
        let (data, wanted) = (dir.to_owned(), options.clone());
        let opened = tokio::task::spawn_blocking(move || open(&data, &wanted)).await;
        let logged = opened.map_err(|e| fail(e.into()))?.map_err(fail)?;
        let listen = options.listen;
        let server = Server::start(listen, Arc::new(logged))
            .await
            .map_err(|source| StartError::Listen { addr: listen, source })?;
        Ok(Self { server, options, dir: dir.to_owned() })
    }

    /// The address in use.
    pub fn addr(&self) -> SocketAddr {
        self.server.addr()
    }

    /// `http://127.0.0.1:PORT`, for path-style requests in region `us-east-1`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.addr())
    }

    /// The access key id.
    pub fn access_key(&self) -> &str {
        &self.options.access_key
    }

    /// The secret key.
    pub fn secret_key(&self) -> &str {
        &self.options.secret_key
    }

    /// The data directory.
    pub fn data_dir(&self) -> &Path {
        &self.dir
    }

    /// Everything logged so far.
    pub fn log(&self) -> Result<RequestLog, LogError> {
        RequestLog::read(&self.dir.join(LOG_FILE))
    }

    /// Replaces the fault rules; none of the old ones stays.
    pub fn set_faults(&self, rules: &[FaultRule]) -> Result<(), FaultsError> {
        write_rules(&self.dir, rules)
    }
}

fn open(dir: &Path, options: &S3Options) -> Result<LoggedS3, Box<dyn std::error::Error + Send + Sync>> {
    let store = Store::open(dir, options.fsync, options.min_part_size)?;
    for bucket in &options.buckets {
        match store.create_bucket(bucket) {
            Err(StoreError::BucketExists(_)) | Ok(()) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let log = LogWriter::open(&dir.join(LOG_FILE), options.fsync)?;
    let fired = RequestLog::read(log.path())?.faults();
    let mut builder = S3ServiceBuilder::new(Operations { store: Arc::new(store) });
    builder.set_auth(SimpleAuth::from_single(options.access_key.clone(), options.secret_key.clone()));
    builder.set_access(Gate { faults: FaultEngine::new(dir, fired) });
    Ok(LoggedS3 { service: builder.build(), log: Arc::new(log) })
}
