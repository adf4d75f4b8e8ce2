//! One server that is kept running.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_core::units::Bytes;
use berth_device::cgroup::ToolGroup;
use berth_device::nbd::{
    Attachment, BackendId, Nbd, NbdServer, NetlinkError, OwnServerConfig, ServerConfig, ServerError,
    handshake,
};

use super::servers::{ServeError, ServerLine, ServerSpec};
use super::spec::Spec;
use super::stores::StoreServerSpec;
use crate::telemetry::chain;

/// The user that servers run as.
const NOBODY: u32 = 65534;
/// What a server may use besides the image's pages.
const MEMORY: Bytes = Bytes::mib(512);
/// The kernel's connection, and handshakes of those who connect the device again.
const CONNECTIONS: u32 = 4;
/// How long a server may take to answer, and a device to answer over its new connection.
const LIMIT: Duration = Duration::from_secs(30);
/// How long one that an earlier keeper has left may take to answer before it counts as dead.
const ADOPT_LIMIT: Duration = Duration::from_secs(5);

/// A server, and what is known of it.
pub(super) struct Kept {
    spec: Spec,
    folder: PathBuf,
    running: Option<Running>,
    /// True until its device, if it has one, reads from the server that runs.
    connect: bool,
    started: u32,
    stopped: bool,
    why: Option<String>,
}

enum Running {
    /// Started by this process.
    Child { server: NbdServer, group: Option<ToolGroup> },
    /// Left by an earlier one.
    Adopted { group: ToolGroup },
}

impl Kept {
    /// Not looked for yet.
    pub(super) fn new(spec: Spec, folder: PathBuf) -> Self {
        Self { spec, folder, running: None, connect: true, started: 0, stopped: false, why: None }
    }

    /// Where it answers.
    pub(super) fn socket(&self) -> PathBuf {
        NbdServer::socket_in(&self.folder)
    }

    /// How it is.
    pub(super) fn line(&mut self) -> ServerLine {
        let running = self.is_alive();
        ServerLine {
            id: self.spec.id().clone(),
            image: self.spec.shown(),
            running,
            restarts: self.started.saturating_sub(1),
            message: self.why.clone(),
            store: None,
        }
    }

    /// How one is that somebody starts, connects or stops at this moment.
    pub(super) fn line_of_busy(spec: &Spec) -> ServerLine {
        let message = Some("it is being started, connected or stopped".to_owned());
        let (id, image) = (spec.id().clone(), spec.shown());
        ServerLine { id, image, running: false, restarts: 0, message, store: None }
    }

    /// Serves the same image from now on, reached in another way: whoever serves it now is ended. Its device waits.
    pub(super) fn change(&mut self, spec: Spec) -> Result<(), ServeError> {
        self.spec = spec;
        self.end_running()
    }

    /// As [`Self::ensure`]; nothing is done for one that was told to stop.
    pub(super) fn ensure_if_kept(&mut self) -> Result<(), ServeError> {
        if self.stopped { Ok(()) } else { self.ensure() }
    }

    /// Finds it, or starts it, and connects its device. Blocks for a minute at most.
    pub(super) fn ensure(&mut self) -> Result<(), ServeError> {
        if self.stopped {
            let why = "it is being stopped".to_owned();
            return Err(ServeError::Refused { id: self.spec.id().clone(), why });
        }
        let ensured = self.try_ensure();
        let why = ensured.as_ref().err().map(|error| chain(error));
        if let Some(why) = &why
            && self.why.as_ref() != Some(why)
        {
            tracing::warn!(why, "a server does not run");
        }
        self.why = why;
        ensured
    }

    fn try_ensure(&mut self) -> Result<(), ServeError> {
        if !self.is_alive() {
            self.connect = true;
            self.running = Some(match self.left_running() {
                Some(group) => Running::Adopted { group },
                None => self.start()?,
            });
        }
        if self.connect {
            self.connect_device()?;
            self.connect = false;
        }
        Ok(())
    }

    fn is_alive(&mut self) -> bool {
        let ended = match &mut self.running {
            None => return false,
            Some(Running::Child { server, .. }) => server.ended().map(|error| chain(&error)),
            Some(Running::Adopted { group }) => {
                let gone = group.processes().is_ok_and(|processes| processes.is_empty());
                gone.then(|| "it is gone".to_owned())
            }
        };
        if let Some(why) = &ended {
            tracing::warn!(server = %self.spec.id(), image = %self.spec.shown().display(), why, "a server has ended");
            self.running = None;
        }
        ended.is_none()
    }

    /// The group of a server that an earlier keeper has left and that answers.
    fn left_running(&self) -> Option<ToolGroup> {
        let group = ToolGroup::find(&self.group_name()).ok()??;
        if group.processes().ok()?.is_empty() {
            return None;
        }
        let (_, export) = handshake(&self.socket(), "", ADOPT_LIMIT).ok()?;
        if export.size != self.spec.size() {
            return None;
        }
        tracing::info!(server = %self.spec.id(), image = %self.spec.shown().display(), "took over a server");
        Some(group)
    }

    fn start(&mut self) -> Result<Running, ServeError> {
        // This kills what is left of an earlier one, too.
        let group = match ToolGroup::create(&self.group_name(), MEMORY) {
            Ok(group) => Some(group.outliving()),
            Err(error) => {
                tracing::warn!(server = %self.spec.id(), error = chain(&error), "a server has no control group");
                None
            }
        };
        let server = match &self.spec {
            Spec::Image(spec) => {
                self.start_image(spec, group.as_ref()).map_err(|error| self.cannot(&error))?
            }
            Spec::Store(spec) => {
                spec.leave_in(&self.folder)?;
                self.start_store(spec, group.as_ref()).map_err(|error| self.cannot(&error))?
            }
        };
        self.started += 1;
        let (id, image) = (self.spec.id(), self.spec.shown());
        tracing::info!(server = %id, image = %image.display(), process = server.id(), started = self.started, "started a server");
        let found = server.export().size;
        let running = Running::Child { server, group };
        if found != self.spec.size() {
            end(running).map_err(|error| self.cannot(&*error))?;
            let why = format!("as a disk it has {found} and not {}", self.spec.size());
            return Err(ServeError::Cannot { id: id.clone(), image, why });
        }
        Ok(running)
    }

    fn start_image(&self, spec: &ServerSpec, group: Option<&ToolGroup>) -> Result<NbdServer, ServerError> {
        NbdServer::start(&ServerConfig {
            image: &spec.image,
            format: spec.format.served(),
            folder: &self.folder,
            user: NOBODY,
            connections: CONNECTIONS,
            group,
            limit: LIMIT,
        })
    }

    /// This program, as it was when this process began.
    fn start_store(
        &self,
        spec: &StoreServerSpec,
        group: Option<&ToolGroup>,
    ) -> Result<NbdServer, ServerError> {
        let own = std::env::current_exe().ok().filter(|path| path.exists());
        let program = own.unwrap_or_else(|| Path::new("/proc/self/exe").to_owned());
        let arguments = [OsStr::new("serve-store"), OsStr::new("--folder"), self.folder.as_os_str()];
        let image = PathBuf::from(spec.digest.to_string());
        NbdServer::start_own(&OwnServerConfig {
            program: &program,
            arguments: &arguments,
            image: &image,
            folder: &self.folder,
            group,
            limit: LIMIT,
        })
    }

    /// Gives the device of this id, if there is one, the server that runs now.
    fn connect_device(&self) -> Result<(), ServeError> {
        let mut nbd = match Nbd::open() {
            Err(NetlinkError::NoFamily) => return Ok(()), // so there is no device
            opened => opened.map_err(|error| self.cannot(&error))?,
        };
        let id = BackendId::new(self.spec.id()).map_err(|error| self.cannot(&error))?;
        let found = Attachment::find(&mut nbd, &id).map_err(|error| self.cannot(&error))?;
        let Some(device) = found else { return Ok(()) };
        device.reconnect(&mut nbd, &self.socket(), LIMIT).map_err(|error| self.cannot(&error))?;
        tracing::info!(server = %self.spec.id(), device = %device.path().display(), "connected");
        Ok(())
    }

    /// Ends it, whoever started it. It is not started again.
    pub(super) fn stop(&mut self) -> Result<(), ServeError> {
        self.stopped = true;
        self.end_running()
    }

    fn end_running(&mut self) -> Result<(), ServeError> {
        let running = match self.running.take() {
            Some(running) => Some(running),
            None => ToolGroup::find(&self.group_name())
                .map_err(|error| self.cannot(&error))?
                .map(|group| Running::Adopted { group }),
        };
        running.map_or(Ok(()), end).map_err(|error| self.cannot(&*error))
    }

    fn group_name(&self) -> String {
        format!("nbd-{}", self.spec.id())
    }

    fn cannot(&self, error: &dyn std::error::Error) -> ServeError {
        let (id, image) = (self.spec.id().clone(), self.spec.shown());
        ServeError::Cannot { id, image, why: chain(error) }
    }
}

fn end(running: Running) -> Result<(), Box<dyn std::error::Error>> {
    let group = match running {
        Running::Child { server, group } => {
            server.stop()?;
            group
        }
        Running::Adopted { group } => Some(group),
    };
    Ok(group.map_or(Ok(()), ToolGroup::remove)?)
}
