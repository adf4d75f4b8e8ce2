//! `qemu-nbd` as a plain server: an image of a stated format, read-only, on a Unix socket.
//!
//! **No surprises with memory.** The image is read through the host's page memory: it is immutable, so what is kept there
//! is never wrong, no write is ever held back, and clones of a template that read the same block read the disk once.
//! Nothing is kept a second time above: device mapper reads `/dev/nbdN` past memory.
//!
//! **Confined.** It gets the image as an open descriptor, runs as an unprivileged user with a socket in a folder of its own,
//! is told the driver of every layer and never looks for another file. It probes nothing.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::unistd::{Gid, Uid, chown, fchown};
use thiserror::Error;

use super::handshake::{Export, HandshakeError, handshake};
use crate::cgroup::{GroupError, ToolGroup};
use crate::confine::{Confinement, confine};
use crate::program::{RunError, Service};
use crate::qemu::{GuardError, SourceDriver, guard_file};

/// The socket in a server's folder.
const SOCKET: &str = "socket";
/// How long it may take to end by itself; it has nothing to write.
const GRACE: Duration = Duration::from_secs(2);
/// How often a server that is starting is asked.
const PAUSE: Duration = Duration::from_millis(20);

/// How an image is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServedFormat {
    /// Its bytes are the disk.
    Raw,
    /// As this format, which was checked before in memory-safe code.
    Image(SourceDriver),
}

/// Why there is no server.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The image is not to be opened by the tool.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// The image or the folder could not be prepared.
    #[error("failed to {action} {path}", path = path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Its control group cannot be entered.
    #[error("failed to enter the control group of the server of {image}", image = image.display())]
    Group {
        /// The image.
        image: PathBuf,
        /// Why.
        source: GroupError,
    },
    /// It could not be started or stopped, or ended by itself.
    #[error("failed to run the server of {image}", image = image.display())]
    Run {
        /// The image.
        image: PathBuf,
        /// Why.
        source: RunError,
    },
    /// It runs and does not answer.
    #[error("the server of {image} does not answer", image = image.display())]
    Silent {
        /// The image.
        image: PathBuf,
        /// The last attempt.
        source: HandshakeError,
    },
}

/// What is served, and how.
#[derive(Clone, Debug)]
pub struct ServerConfig<'a> {
    /// The image.
    pub image: &'a Path,
    /// Its format.
    pub format: ServedFormat,
    /// A folder for this server alone, made if it is not there. What a killed one left in it is replaced.
    pub folder: &'a Path,
    /// User and group id that it runs as, if we are root.
    pub user: u32,
    /// How many connections it takes at once; one for the kernel, and one for a handshake while that is dead.
    pub connections: u32,
    /// The control group that it enters.
    pub group: Option<&'a ToolGroup>,
    /// How long it may take to answer.
    pub limit: Duration,
}

/// A server of our own, which finds in its folder what it serves, and listens there.
#[derive(Clone, Copy, Debug)]
pub struct OwnServerConfig<'a> {
    /// The program, by its absolute path.
    pub program: &'a Path,
    /// Its arguments.
    pub arguments: &'a [&'a OsStr],
    /// What it serves, for people.
    pub image: &'a Path,
    /// A folder for this server alone, made if it is not there.
    pub folder: &'a Path,
    /// The control group that it enters.
    pub group: Option<&'a ToolGroup>,
    /// How long it may take to answer.
    pub limit: Duration,
}

/// A server that answers. **Dropping it leaves it running**: devices live as long as it does.
#[derive(Debug)]
pub struct NbdServer {
    service: Service,
    image: PathBuf,
    socket: PathBuf,
    export: Export,
}

impl NbdServer {
    /// Starts one, and waits until it answers a handshake.
    pub fn start(config: &ServerConfig<'_>) -> Result<Self, ServerError> {
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| ServerError::File { action, path, source }
        };
        let image = File::open(config.image).map_err(failed("open", config.image))?;
        if let ServedFormat::Image(driver) = config.format {
            guard_file(&image, config.image, driver)?;
        }
        let user = Uid::effective().is_root().then_some(config.user);
        prepare_folder(config.folder, user).map_err(failed("prepare", config.folder))?;
        let socket = Self::socket_in(config.folder);
        match fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", &socket)(error));
            }
            _ => {}
        }
        let loan = Loan::new(image, user).map_err(failed("hand to the server's user", config.image))?;
        let service = start(config, &loan.image, user)?;
        Self::answering(service, config.image, socket, config.limit)
    }

    /// Starts one of our own, as who we are and with our environment, and waits until it answers a handshake.
    pub fn start_own(config: &OwnServerConfig<'_>) -> Result<Self, ServerError> {
        let prepare =
            |source| ServerError::File { action: "prepare", path: config.folder.to_owned(), source };
        prepare_folder(config.folder, None).map_err(prepare)?;
        let image = config.image.to_owned();
        let group = config.group.map(ToolGroup::entrance).transpose();
        let group = group.map_err(|source| ServerError::Group { image: image.clone(), source })?;
        let service = Service::start(&config.program.to_string_lossy(), |command| {
            command.envs(std::env::vars_os()).args(config.arguments);
            confine(command, Confinement { group, ..Confinement::default() });
        });
        let service = service.map_err(|source| ServerError::Run { image: image.clone(), source })?;
        Self::answering(service, &image, Self::socket_in(config.folder), config.limit)
    }

    /// The same once it answers; ended if it does not.
    fn answering(
        service: Service,
        image: &Path,
        socket: PathBuf,
        limit: Duration,
    ) -> Result<Self, ServerError> {
        let mut server = Self { service, image: image.to_owned(), socket, export: Export::default() };
        match server.wait_ready(limit) {
            Ok(export) => {
                server.export = export;
                Ok(server)
            }
            Err(error) => {
                // The error that is told is why it did not answer.
                let _ = server.service.stop(Duration::ZERO);
                Err(error)
            }
        }
    }

    /// Where one with this folder listens.
    pub fn socket_in(folder: &Path) -> PathBuf {
        folder.join(SOCKET)
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What it serves.
    pub fn export(&self) -> Export {
        self.export
    }

    /// Its process, which leads a group of its own.
    pub fn id(&self) -> u32 {
        self.service.id()
    }

    /// Why it has ended, if it has.
    pub fn ended(&mut self) -> Option<ServerError> {
        let image = self.image.clone();
        match self.service.ended() {
            Ok(ended) => ended.map(|source| ServerError::Run { image, source }),
            Err(source) => Some(ServerError::Run { image, source }),
        }
    }

    /// Ends it. Devices that it serves wait for another one. Of one that had ended by itself nothing is removed: its place
    /// may be another's by now.
    pub fn stop(mut self) -> Result<(), ServerError> {
        if self.ended().is_some() {
            return Ok(());
        }
        let Self { service, image, socket, .. } = self;
        service.stop(GRACE).map_err(|source| ServerError::Run { image, source })?;
        match fs::remove_file(&socket) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(ServerError::File { action: "remove", path: socket, source })
            }
            _ => Ok(()),
        }
    }

    fn wait_ready(&mut self, limit: Duration) -> Result<Export, ServerError> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).max(PAUSE);
            match handshake(&self.socket, "", left) {
                Ok((_, export)) => return Ok(export),
                Err(source) if Instant::now() >= deadline => {
                    return Err(ServerError::Silent { image: self.image.clone(), source });
                }
                Err(_) => {}
            }
            if let Some(error) = self.ended() {
                return Err(error);
            }
            std::thread::sleep(PAUSE);
        }
    }
}

/// The image, lent to the server's user until the server has opened it.
struct Loan {
    image: File,
    owner: Option<(u32, u32)>,
}

impl Loan {
    fn new(image: File, user: Option<u32>) -> io::Result<Self> {
        let metadata = image.metadata()?;
        let mut loan = Self { image, owner: None };
        if let Some(user) = user.filter(|user| *user != metadata.uid()) {
            loan.owner = Some((metadata.uid(), metadata.gid()));
            set_owner(&loan.image, (user, user))?;
        }
        Ok(loan)
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let Some(owner) = self.owner
            && let Err(error) = set_owner(&self.image, owner)
        {
            tracing::warn!(%error, "an image stays with the server's user");
        }
    }
}

fn set_owner(file: &File, (user, group): (u32, u32)) -> io::Result<()> {
    Ok(fchown(file, Some(Uid::from_raw(user)), Some(Gid::from_raw(group)))?)
}

/// Nobody else may look into it, because whoever connects reads the image.
fn prepare_folder(folder: &Path, user: Option<u32>) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::set_permissions(folder, Permissions::from_mode(0o700))?;
        }
        made => made?,
    }
    if let Some(user) = user {
        chown(folder, Some(Uid::from_raw(user)), Some(Gid::from_raw(user)))?;
    }
    Ok(())
}

fn start(config: &ServerConfig<'_>, image: &File, user: Option<u32>) -> Result<Service, ServerError> {
    let path = config.image;
    let group = config.group.map(ToolGroup::entrance).transpose();
    let group = group.map_err(|source| ServerError::Group { image: path.to_owned(), source })?;
    let duplicate = image.try_clone();
    let duplicate =
        duplicate.map_err(|source| ServerError::File { action: "open", path: path.to_owned(), source })?;
    // Its user need not reach the folder by its path.
    let folder = File::open(config.folder).map_err(|source| ServerError::File {
        action: "open",
        path: config.folder.to_owned(),
        source,
    })?;
    let socket = format!("--socket=/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd());
    let image = description(config.format, duplicate.as_raw_fd());
    let inherited = vec![duplicate.into(), folder.into()];
    let confinement = Confinement { user, file_size: Some(0), group, inherited };
    Service::start("qemu-nbd", |command| {
        command.args(["--read-only", "--persistent", "--cache=writeback"]);
        command.arg(format!("--shared={}", config.connections)).args([socket, image]);
        confine(command, confinement);
    })
    .map_err(|source| ServerError::Run { image: path.to_owned(), source })
}

/// The image as JSON: there a missing backing file can be said (`null`), nothing needs escaping, and nothing is guessed.
fn description(format: ServedFormat, descriptor: i32) -> String {
    let file = serde_json::json!({
        "driver": "file",
        "filename": format!("/proc/self/fd/{descriptor}"),
        "read-only": true,
    });
    let mut description = serde_json::json!({ "read-only": true, "file": file });
    match format {
        ServedFormat::Raw => description["driver"] = "raw".into(),
        ServedFormat::Image(driver) => {
            description["driver"] = driver.as_str().into();
            description["backing"] = serde_json::Value::Null;
            if driver == SourceDriver::Vpc {
                // The header's size, not one guessed from its creator.
                description["force_size_calc"] = "current_size".into();
            }
        }
    }
    format!("json:{description}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_is_stated_and_nothing_else_is_opened() {
        let read = |format| -> serde_json::Value {
            serde_json::from_str(description(format, 7).strip_prefix("json:").unwrap()).unwrap()
        };
        let image = read(ServedFormat::Image(SourceDriver::Qcow2));
        assert_eq!(image["driver"], "qcow2");
        assert!(image.as_object().unwrap().contains_key("backing"), "absent would mean: look for one");
        assert_eq!(image["file"]["filename"], "/proc/self/fd/7");
        assert_eq!((&image["read-only"], &image["file"]["driver"]), (&true.into(), &"file".into()));
        let raw = read(ServedFormat::Raw);
        assert_eq!(raw["driver"], "raw");
        assert!(!raw.as_object().unwrap().contains_key("backing"), "raw has none");
    }

    #[test]
    fn an_image_that_reaches_outside_is_never_served() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        let mut header = vec![0; 4096];
        header[..8].copy_from_slice(b"QFI\xFB\0\0\0\x03");
        header[15] = 8;
        fs::write(&image, header).unwrap();
        let folder = dir.path().join("server");
        let config = ServerConfig {
            image: &image,
            format: ServedFormat::Image(SourceDriver::Qcow2),
            folder: &folder,
            user: 65534,
            connections: 2,
            group: None,
            limit: Duration::from_secs(5),
        };
        let error = NbdServer::start(&config).unwrap_err();
        assert!(matches!(error, ServerError::Guard(_)), "{error}");
        assert!(!folder.exists());
    }
}
