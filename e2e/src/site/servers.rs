//! The object store and the file server of a site.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::process::Command;

use super::{READY_LIMIT, STOP_GRACE};
use crate::minio::{ACCESS_KEY_ID, Minio, MinioError, REGION, SECRET_ACCESS_KEY};
use crate::ports::free_port;
use crate::process::{Process, Program, ReadyError, SpawnError};

/// The bucket that every object store of a site has.
pub const BUCKET: &str = "berth-quickstart";

/// Which program is the object store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum S3Kind {
    /// The test server, which logs every request and can be told to fail.
    Test,
    /// `MinIO`.
    Minio,
}

/// Why a server does not work.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// `MinIO` did not start.
    #[error(transparent)]
    Minio(#[from] MinioError),
    /// A folder could not be made.
    #[error("failed to make folder {path}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The machine has no free port.
    #[error("failed to find a free port")]
    Port(#[source] io::Error),
    /// A process could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// A process did not get ready; the message holds the end of its log.
    #[error(transparent)]
    Ready(#[from] ReadyError),
    /// A client for the readiness probe could not be made.
    #[error("failed to make the client that probes readiness")]
    Probe(#[source] reqwest::Error),
    /// curl could not be started.
    #[error("failed to run curl")]
    Curl(#[source] io::Error),
    /// A signed request was refused.
    #[error("{method} {url} was answered with {status}: {body}")]
    Request {
        /// The method.
        method: &'static str,
        /// The address.
        url: String,
        /// The status code.
        status: String,
        /// What else was said.
        body: String,
    },
}

/// The object store of a site; signed requests, path-style.
pub enum S3Server {
    /// The test server: what starts it, where it listens, and its process while it runs.
    Test {
        /// Starts it, on the same port and data each time.
        program: Program,
        /// Its address.
        endpoint: String,
        /// Its data, with the request log.
        data: PathBuf,
        /// While it runs.
        process: Option<Process>,
    },
    /// `MinIO`.
    Minio(Minio),
}

impl S3Server {
    pub(super) async fn start(kind: S3Kind, dir: &Path, program: &Path) -> Result<Self, ServerError> {
        match kind {
            S3Kind::Minio => {
                let minio = Minio::start(&dir.join("s3")).await?;
                let bucket = format!("{}/{BUCKET}", minio.endpoint());
                signed("PUT", &bucket, None).await?;
                Ok(Self::Minio(minio))
            }
            S3Kind::Test => {
                let data = dir.join("s3");
                fs::create_dir_all(&data)
                    .map_err(|source| ServerError::Folder { path: data.clone(), source })?;
                let address = format!("127.0.0.1:{}", free_port().map_err(ServerError::Port)?);
                let program = Program::new("test S3 server", program, &dir.join("logs/s3.log"))
                    .args(["--listen", &address, "--bucket", BUCKET])
                    .args(["--access-key", ACCESS_KEY_ID, "--secret-key", SECRET_ACCESS_KEY])
                    .args([Path::new("--data"), &data]);
                let endpoint = format!("http://{address}");
                let mut server = Self::Test { program, endpoint, data, process: None };
                server.restart().await?;
                Ok(server)
            }
        }
    }

    /// Its address.
    pub fn endpoint(&self) -> String {
        match self {
            Self::Test { endpoint, .. } => endpoint.clone(),
            Self::Minio(minio) => minio.endpoint(),
        }
    }

    /// The access key id.
    pub fn access_key(&self) -> &'static str {
        ACCESS_KEY_ID
    }

    /// The secret key.
    pub fn secret_key(&self) -> &'static str {
        SECRET_ACCESS_KEY
    }

    /// Kills it (SIGKILL), until [`S3Server::restart`]. `MinIO` is left alone.
    pub fn kill9(&mut self) {
        if let Self::Test { process, .. } = self {
            *process = None;
        }
    }

    /// Starts it again on the same port and data, unless it runs, and waits until it answers.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn restart(&mut self) -> Result<(), ServerError> {
        if let Self::Test { program, endpoint, process, .. } = self
            && !process.as_ref().is_some_and(Process::is_running)
        {
            let started = program.spawn()?;
            wait_for_answer(&started, endpoint).await?;
            *process = Some(started);
        }
        Ok(())
    }

    /// The keys of the bucket that start with `prefix`, in order.
    ///
    /// # Errors
    /// [`ServerError::Request`].
    pub async fn keys(&self, prefix: &str) -> Result<Vec<String>, ServerError> {
        let mut keys: Vec<String> = Vec::new();
        loop {
            // Keys of ours need no escaping in XML, and only `/` in an address.
            let after = keys.last().map(|key| format!("&start-after={}", key.replace('/', "%2F")));
            let prefix = prefix.replace('/', "%2F");
            // The parameters in the order of their names, as curl signs them.
            let list = format!("list-type=2&prefix={prefix}{}", after.unwrap_or_default());
            let page = signed("GET", &format!("{}/{BUCKET}?{list}", self.endpoint()), None).await?;
            let found = page.split("<Key>").skip(1).filter_map(|rest| rest.split("</Key>").next());
            keys.extend(found.map(str::to_owned));
            if !page.contains("<IsTruncated>true</IsTruncated>") {
                return Ok(keys);
            }
        }
    }

    /// The keys of uploads that were begun and neither completed nor given up, as the server lists them: at most 1,000.
    ///
    /// # Errors
    /// [`ServerError::Request`].
    pub async fn open_uploads(&self) -> Result<Vec<String>, ServerError> {
        let page = signed("GET", &format!("{}/{BUCKET}?uploads=", self.endpoint()), None).await?;
        let uploads = page.split("<Upload>").skip(1);
        let keys = uploads.filter_map(|rest| rest.split("<Key>").nth(1)?.split("</Key>").next());
        Ok(keys.map(str::to_owned).collect())
    }

    /// Copies one object into a file, by another implementation of the protocol than ours.
    ///
    /// # Errors
    /// [`ServerError::Request`].
    pub async fn fetch(&self, key: &str, into: &Path) -> Result<(), ServerError> {
        http_get_signed(&format!("{}/{BUCKET}/{key}", self.endpoint()), into).await
    }

    /// Stores a file as an object.
    ///
    /// # Errors
    /// [`ServerError::Request`].
    pub async fn store(&self, key: &str, file: &Path) -> Result<(), ServerError> {
        let url = format!("{}/{BUCKET}/{key}", self.endpoint());
        let upload = ["--upload-file".into(), file.to_string_lossy().into_owned()];
        curl("PUT", &url, &upload).await.map(drop)
    }
}

/// Copies what a signed GET answers into a file.
///
/// # Errors
/// [`ServerError::Request`].
pub async fn http_get_signed(url: &str, into: &Path) -> Result<(), ServerError> {
    signed("GET", url, Some(into)).await.map(drop)
}

/// What a signed request without a body answers; with `into`, the answer goes into that file.
///
/// # Errors
/// [`ServerError::Request`].
pub(crate) async fn signed(
    method: &'static str,
    url: &str,
    into: Option<&Path>,
) -> Result<String, ServerError> {
    let output = into.map(|path| ["--output".to_owned(), path.to_string_lossy().into_owned()]);
    curl(method, url, output.as_ref().map_or(&[], |flags| &flags[..])).await
}

async fn curl(method: &'static str, url: &str, more: &[String]) -> Result<String, ServerError> {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--noproxy", "*", "--max-time", "120"]);
    command.args(["--request", method, "--aws-sigv4", &format!("aws:amz:{REGION}:s3")]);
    command.args(["--user", &format!("{ACCESS_KEY_ID}:{SECRET_ACCESS_KEY}")]);
    command.args(["--header", "x-amz-content-sha256: UNSIGNED-PAYLOAD"]);
    command.args(["--write-out", "\n%{http_code}"]).args(more).arg(url);
    let output = command.output().await.map_err(ServerError::Curl)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (body, status) = text.rsplit_once('\n').unwrap_or(("", ""));
    if !status.starts_with('2') {
        let body = format!("{body} {}", String::from_utf8_lossy(&output.stderr));
        return Err(ServerError::Request { method, url: url.to_owned(), status: status.to_owned(), body });
    }
    Ok(body.to_owned())
}

/// The file server of a site.
pub(super) struct HttpServer {
    endpoint: String,
    process: Process,
}

impl HttpServer {
    pub(super) async fn start(dir: &Path, program: &Path) -> Result<Self, ServerError> {
        let address = format!("127.0.0.1:{}", free_port().map_err(ServerError::Port)?);
        let process = Program::new("test HTTP server", program, &dir.join("logs/http.log"))
            .args(["--listen", &address])
            .args([
                Path::new("--dir"),
                &dir.join("files"),
                Path::new("--log"),
                &dir.join("logs/http-requests.log"),
            ])
            .spawn()?;
        let endpoint = format!("http://{address}");
        wait_for_answer(&process, &endpoint).await?;
        Ok(Self { endpoint, process })
    }

    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.process.stop(STOP_GRACE).ok();
    }
}

/// Waits until a process answers anything at all at `url`.
async fn wait_for_answer(process: &Process, url: &str) -> Result<(), ServerError> {
    let client = probe().map_err(ServerError::Probe)?;
    let answer = || async { client.get(url).send().await.map(drop).map_err(|error| format!("{error:?}")) };
    Ok(process.wait_ready(READY_LIMIT, answer).await?)
}

/// Asks whether something answers 200.
pub(super) struct OkProbe {
    client: reqwest::Client,
    url: String,
}

impl OkProbe {
    pub(super) fn new(url: &str) -> Result<Self, ServerError> {
        Ok(Self { client: probe().map_err(ServerError::Probe)?, url: url.to_owned() })
    }

    /// What it answers instead, in words.
    pub(super) async fn ask(&self) -> Result<(), String> {
        self.text().await.map(drop)
    }

    /// What it says when all is well, or else what it answers instead, in words.
    pub(super) async fn text(&self) -> Result<String, String> {
        let answer = self.client.get(&self.url).send().await.map_err(|error| format!("{error:?}"))?;
        let status = answer.status();
        let text = answer.text().await.map_err(|error| format!("{error:?}"))?;
        if status.is_success() { Ok(text) } else { Err(format!("{status}: {}", text.trim())) }
    }
}

fn probe() -> reqwest::Result<reqwest::Client> {
    reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build()
}
