//! The life of a host.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::command::{CommandError, GuestCommand, Output, Running};
use super::error::{BootError, NetworkError};
use super::guest::Guest;
use super::network::Link;
use super::plan::KernelHostBuilder;
use super::{MIB, obstacle};

/// How long a guest may take until it takes orders: 2 to 4 s on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// How long a guest may take to write everything to its disks and power off.
const OFF_LIMIT: Duration = Duration::from_secs(60);

/// The present run of a host.
#[derive(Debug, Default)]
struct State {
    boots: u32,
    release: String,
    guest: Option<Arc<Guest>>,
}

/// A host in user-mode Linux. Dropping it cuts its power.
#[derive(Debug)]
pub struct KernelHost {
    plan: KernelHostBuilder,
    link: Option<Link>,
    state: Mutex<State>,
}

impl KernelHost {
    pub(super) fn first_boot(plan: KernelHostBuilder, link: Option<Link>) -> Result<Self, BootError> {
        let host = Self { plan, link, state: Mutex::default() };
        host.boot_again()?;
        Ok(host)
    }

    /// Begins a host whose disks and logs lie in `dir`, which is made when it is not there.
    pub fn at(dir: &Path) -> KernelHostBuilder {
        KernelHostBuilder::new(dir)
    }

    /// Why this machine cannot run one, if so.
    pub fn obstacle() -> Option<String> {
        obstacle::obstacle()
    }

    /// What it is, in one line: `user-mode Linux 6.1.176, 1 CPU, 512 MiB, disks: data 1024 MiB`.
    pub fn description(&self) -> String {
        let mut line = format!("user-mode Linux {}, 1 CPU, {} MiB", self.release(), self.plan.memory / MIB);
        for (number, disk) in self.plan.disks.iter().enumerate() {
            let before = if number == 0 { ", disks:" } else { "," };
            write!(line, "{before} {} {} MiB", disk.name, disk.size / MIB)
                .expect("writing to a string never fails");
        }
        line
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.plan.name
    }

    /// The release of its kernel.
    pub fn release(&self) -> String {
        self.state().release.clone()
    }

    /// Its address in the network, if it has one.
    pub fn address(&self) -> Option<Ipv4Addr> {
        self.link.as_ref().map(Link::address)
    }

    /// The device of a disk, as the guest sees it.
    ///
    /// # Panics
    /// When there is no such disk.
    #[track_caller]
    pub fn device(&self, disk: &str) -> PathBuf {
        let letters = 'a'..='h';
        let found = letters.zip(&self.plan.disks).find(|(_, known)| known.name == disk);
        let Some((letter, _)) = found else { panic!("host {} has no disk {disk}", self.plan.name) };
        PathBuf::from(format!("/dev/ubd{letter}"))
    }

    /// The file of a disk, on the machine.
    ///
    /// # Panics
    /// When there is no such disk.
    #[track_caller]
    pub fn disk_file(&self, disk: &str) -> PathBuf {
        let found = self.plan.disks.iter().find(|known| known.name == disk);
        let Some(found) = found else { panic!("host {} has no disk {disk}", self.plan.name) };
        found.path(&self.plan.dir)
    }

    /// A command, to be run or started: a program of the machine and its arguments.
    pub fn command<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(&self, words: I) -> GuestCommand {
        GuestCommand {
            host: self.plan.name.clone(),
            guest: self.state().guest.clone(),
            words: words.into_iter().map(|word| word.as_ref().to_owned()).collect(),
            env: self.plan.env.clone(),
            folder: PathBuf::from("/"),
            input: Vec::new(),
            limit: self.plan.command_limit,
        }
    }

    /// Runs a command to its end, which must be with status 0.
    ///
    /// # Errors
    /// [`CommandError`].
    pub fn run<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(&self, words: I) -> Result<Output, CommandError> {
        self.command(words).run()
    }

    /// Runs a command to its end, whatever its status.
    ///
    /// # Errors
    /// [`CommandError`], but not [`CommandError::Failed`].
    pub fn output<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(
        &self,
        words: I,
    ) -> Result<Output, CommandError> {
        self.command(words).output()
    }

    /// Starts a command and returns at once.
    ///
    /// # Errors
    /// [`CommandError::Off`], [`CommandError::Pass`].
    pub fn start<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(
        &self,
        words: I,
    ) -> Result<Running, CommandError> {
        self.command(words).start()
    }

    /// Runs lines of bash, which end at the first one that fails; the last status must be 0.
    ///
    /// # Errors
    /// [`CommandError`].
    pub fn shell(&self, script: &str) -> Result<Output, CommandError> {
        self.command(["bash", "-euo", "pipefail", "-c", script]).run()
    }

    /// Whether it is on. A host that hangs is.
    pub fn is_running(&self) -> bool {
        self.state().guest.as_ref().is_some_and(|guest| guest.ended().is_none())
    }

    /// The end of its present or last console.
    pub fn console(&self) -> String {
        self.state().guest.as_ref().map(|guest| guest.console()).unwrap_or_default()
    }

    /// Cuts its power: everything in it is gone when this returns. Nothing happens when it is off.
    pub fn cut(&self) {
        if let Some(guest) = self.guest() {
            guest.cut();
        }
    }

    /// Stops its processor, as a machine that hangs; returns whether it was on.
    pub fn hang(&self) -> bool {
        self.guest().is_some_and(|guest| guest.set_hung(true))
    }

    /// Lets its processor go on; its clock jumps ahead by the pause. Returns whether it was on.
    pub fn resume(&self) -> bool {
        self.guest().is_some_and(|guest| guest.set_hung(false))
    }

    /// Has it write everything to its disks and power off; one that does not within a minute is cut. Services are not
    /// stopped and file systems not unmounted. Nothing happens when it is off.
    pub fn shut_down(&self) {
        if let Some(guest) = self.guest() {
            guest.power_off(OFF_LIMIT);
        }
    }

    /// Shuts it down and switches it on again.
    ///
    /// # Errors
    /// [`BootError`].
    pub fn reboot(&self) -> Result<(), BootError> {
        self.shut_down();
        self.boot_again()
    }

    /// Switches it on with the same disks, and waits until it takes commands.
    ///
    /// # Errors
    /// [`BootError`]; [`BootError::Running`] when it is on.
    pub fn boot_again(&self) -> Result<(), BootError> {
        let guest = self.switch_on()?;
        if let Some(release) = guest.wait_ready(BOOT_LIMIT) {
            self.state().release = release;
            return Ok(());
        }
        let (host, ended, console) = (self.plan.name.clone(), guest.ended().is_some(), guest.console());
        guest.cut();
        Err(if ended {
            BootError::Ended { host, console }
        } else {
            BootError::TimedOut { host, limit: BOOT_LIMIT, console }
        })
    }

    /// Takes its link out of the network: nothing goes in or out any more, and nobody is told.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub fn partition(&self) -> Result<(), NetworkError> {
        self.link.as_ref().map_or(Ok(()), |link| link.set_connected(false))
    }

    /// Puts its link back; it works again within half a second.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub fn heal(&self) -> Result<(), NetworkError> {
        self.link.as_ref().map_or(Ok(()), |link| link.set_connected(true))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the next run, if there is none.
    fn switch_on(&self) -> Result<Arc<Guest>, BootError> {
        let mut state = self.state();
        let host = || self.plan.name.clone();
        if state.guest.as_ref().is_some_and(|guest| guest.ended().is_none()) {
            return Err(BootError::Running { host: host() });
        }
        state.boots += 1;
        let dir = self.plan.dir.join(format!("{}.boot-{}", self.plan.name, state.boots));
        let prepared = self.plan.prepare(&dir, self.link.as_ref());
        prepared.map_err(|source| BootError::Prepare { host: host(), path: dir.clone(), source })?;
        let locks = self.plan.open_disks()?;
        let program = self.plan.program(&dir, self.link.as_ref())?;
        let guest = Arc::new(Guest::start(&program, &dir, locks)?);
        state.guest = Some(Arc::clone(&guest));
        Ok(guest)
    }

    fn guest(&self) -> Option<Arc<Guest>> {
        self.state().guest.clone().filter(|guest| guest.ended().is_none())
    }
}

impl Drop for KernelHost {
    fn drop(&mut self) {
        self.cut();
    }
}
