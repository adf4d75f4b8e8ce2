//! A real S3 server as one process of a test, on 127.0.0.1.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::ports::free_port;
use crate::process::{Process, Program, ReadyError, SpawnError};
use crate::site::signed;
use crate::tools::{Tool, ToolUnavailable};

/// The access key id of every test server.
pub const ACCESS_KEY_ID: &str = "berth-e2e";

/// The secret access key of every test server: they listen on loopback only and hold test data only.
pub const SECRET_ACCESS_KEY: &str = "berth-e2e-secret";

/// The region that requests are signed for.
pub const REGION: &str = "us-east-1";

/// How long the server may take to answer, on a machine that is busy compiling something else.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// How long the server gets to end by itself.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// How often a start is tried with a new port when somebody else took it.
const ATTEMPTS: u32 = 3;

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
pub enum MinioError {
    /// The program is missing; [`ToolUnavailable::is_missing_prerequisite`] says whether to skip the test.
    #[error(transparent)]
    Tool(#[from] ToolUnavailable),
    /// The folder of its data could not be made.
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
    /// The process could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// It did not get ready; the message holds the end of its log.
    #[error(transparent)]
    Ready(#[from] ReadyError),
}

/// A running `MinIO` server. Dropping it kills the process; the data stay in the folder it was given.
#[derive(Debug)]
pub struct Minio {
    process: Process,
    port: u16,
}

impl Minio {
    /// Starts a server with its data and log in `dir`, ready for requests signed with [`ACCESS_KEY_ID`] and
    /// [`SECRET_ACCESS_KEY`], path-style. The program is built first if it is missing, which takes minutes, once.
    ///
    /// # Errors
    /// [`MinioError`].
    pub async fn start(dir: &Path) -> Result<Self, MinioError> {
        let program = tokio::task::spawn_blocking(|| Tool::Minio.obtain()).await;
        let program = program.expect("obtaining a tool does not panic")?;
        let data = dir.join("data");
        fs::create_dir_all(&data).map_err(|source| MinioError::Folder { path: data.clone(), source })?;
        let mut attempt = 1;
        loop {
            let port = free_port().map_err(MinioError::Port)?;
            match Self::listen(&program, dir, &data, port).await {
                Err(MinioError::Ready(error)) if error.is_port_race() && attempt < ATTEMPTS => attempt += 1,
                outcome => return outcome,
            }
        }
    }

    async fn listen(program: &Path, dir: &Path, data: &Path, port: u16) -> Result<Self, MinioError> {
        let process = Program::new("minio", program, &dir.join("minio.log"))
            .args(["server", "--quiet", "--address", &format!("127.0.0.1:{port}")])
            .args([data])
            .env("MINIO_ROOT_USER", ACCESS_KEY_ID)
            .env("MINIO_ROOT_PASSWORD", SECRET_ACCESS_KEY)
            .env("MINIO_REGION", REGION)
            .env("MINIO_BROWSER", "off")
            .env("MINIO_UPDATE", "off")
            // It must not write to the home directory.
            .env("HOME", dir)
            .spawn()?;
        let server = Self { process, port };
        // Its own readiness page answers 200 before it can take a request.
        let buckets = format!("{}/", server.endpoint());
        let answers = || async { signed("GET", &buckets, None).await.map(drop).map_err(|e| e.to_string()) };
        server.process.wait_ready(READY_LIMIT, answers).await?;
        Ok(server)
    }

    /// Its address, `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Its process, to be stopped, continued or looked at.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Ends it; the data stay.
    pub fn stop(mut self) {
        // A process that cannot be waited for is gone already.
        self.process.stop(STOP_GRACE).ok();
    }
}
