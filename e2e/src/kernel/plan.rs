//! What a host consists of, and how its kernel is told.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::config::Config;
use super::error::BootError;
use super::host::KernelHost;
use super::network::{KernelNetwork, Link};
use super::{MIB, obstacle};
use crate::process::Program;

/// The first process of every guest.
const INIT: &str = include_str!("../../kernel/init");

/// What is loaded unless asked otherwise; other modules load when something needs them, or by `modprobe NAME`.
const MODULES: [&str; 14] = [
    "loop",
    "nbd",
    "dm-mod",
    "dm-bufio",
    "dm-thin-pool",
    "dm-snapshot",
    "dm-flakey",
    "dm-delay",
    "dm-dust",
    "dm-log-writes",
    "dm-zero",
    "dm-mirror",
    "fuse",
    "overlay",
];

/// The most disks that the kernel takes here: `/dev/ubda` to `/dev/ubdh`.
const MAX_DISKS: usize = 8;

/// Makes the serial line two descriptors of the kernel, whose own words go to the log. The shell stays: as the first
/// process of the namespace the kernel could not be ended by its own signals.
const WRAPPER: &str = r#"exec 5<&0 6>&1 >&2 </dev/null; "$@"; exit $?"#;

/// A disk of a host: a file that stays as it is from boot to boot.
#[derive(Debug, Clone)]
pub struct Disk {
    pub(super) name: String,
    pub(super) size: u64,
    file: Option<PathBuf>,
    flags: String,
}

impl Disk {
    /// A disk of so many bytes: a sparse file `NAME.img` in the host's folder, made when it is not there.
    pub fn new(name: &str, size: u64) -> Self {
        Self { name: name.to_owned(), size, file: None, flags: String::new() }
    }

    /// On this file instead; one that exists keeps its size.
    #[must_use]
    pub fn file(mut self, file: &Path) -> Self {
        self.file = Some(file.to_owned());
        self
    }

    /// Every write goes to the machine's own disk (`O_SYNC`): slow, and not needed for cuts of the guest's power.
    #[must_use]
    pub fn synchronous(self) -> Self {
        self.flag('s')
    }

    /// Read-only; several hosts may have it at once.
    #[must_use]
    pub fn read_only(self) -> Self {
        self.flag('r')
    }

    /// Several hosts may have it at once, and write.
    #[must_use]
    pub fn shared(self) -> Self {
        self.flag('c')
    }

    /// Takes no discards. (One that does takes 32 KiB at a time, too little for thin pools to pass theirs down.)
    #[must_use]
    pub fn without_discard(self) -> Self {
        self.flag('t')
    }

    fn flag(mut self, flag: char) -> Self {
        self.flags.push(flag);
        self
    }

    pub(super) fn path(&self, dir: &Path) -> PathBuf {
        self.file.clone().unwrap_or_else(|| dir.join(format!("{}.img", self.name)))
    }
}

/// What a host is to consist of.
#[derive(Debug, Clone)]
#[must_use = "it is no host until it is booted"]
pub struct KernelHostBuilder {
    pub(super) dir: PathBuf,
    pub(super) name: String,
    pub(super) memory: u64,
    pub(super) disks: Vec<Disk>,
    tmpfs: Vec<PathBuf>,
    shares: Vec<PathBuf>,
    overlay: bool,
    modules: Vec<String>,
    pub(super) env: Vec<(OsString, OsString)>,
    network: Option<KernelNetwork>,
    pub(super) command_limit: Duration,
}

impl KernelHostBuilder {
    pub(super) fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            name: "host".to_owned(),
            memory: 512 * MIB,
            disks: Vec::new(),
            tmpfs: Vec::new(),
            shares: Vec::new(),
            overlay: true,
            modules: MODULES.map(str::to_owned).to_vec(),
            env: vec![("HOME".into(), "/root".into())],
            network: None,
            command_limit: Duration::from_secs(120),
        }
    }

    /// Its host name, `host` otherwise. Two hosts in one folder need two.
    pub fn name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// Its memory in bytes, rounded down to MiB; 512 MiB otherwise. It comes from `/dev/shm` when it is touched.
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }

    /// A disk of so many bytes, see [`Disk::new`]. The first one is `/dev/ubda`, the second `/dev/ubdb`, 8 at most.
    pub fn disk(self, name: &str, bytes: u64) -> Self {
        self.disk_with(Disk::new(name, bytes))
    }

    /// A disk of another kind.
    pub fn disk_with(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// An empty folder in the guest's memory, in place of what the machine has there. `/run` and `/dev/shm` are.
    pub fn tmpfs(mut self, path: &Path) -> Self {
        self.tmpfs.push(path.to_owned());
        self
    }

    /// A folder of the machine that the guest writes to.
    pub fn share(mut self, path: &Path) -> Self {
        self.shares.push(path.to_owned());
        self
    }

    /// Without the layer in memory: **what the guest writes anywhere, it writes to the machine**, as root.
    pub fn writing_to_machine(mut self) -> Self {
        self.overlay = false;
        self
    }

    /// The kernel modules to load in place of the usual ones (device-mapper, nbd, loop, fuse, overlay).
    pub fn modules<'a>(mut self, modules: impl IntoIterator<Item = &'a str>) -> Self {
        self.modules = modules.into_iter().map(str::to_owned).collect();
        self
    }

    /// A variable in the environment of every command.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// A link to this network, with an address of its own.
    pub fn network(mut self, network: &KernelNetwork) -> Self {
        self.network = Some(network.clone());
        self
    }

    /// How long a command may run unless it says otherwise; 2 min.
    pub fn command_limit(mut self, limit: Duration) -> Self {
        self.command_limit = limit;
        self
    }

    /// Switches it on and waits until it takes commands.
    ///
    /// # Errors
    /// [`BootError`].
    pub fn boot(mut self) -> Result<KernelHost, BootError> {
        if let Some(reason) = KernelHost::obstacle() {
            return Err(BootError::Obstacle(reason));
        }
        let prepare = |path: &Path, source| BootError::Prepare {
            host: self.name.clone(),
            path: path.to_owned(),
            source,
        };
        for path in [&self.dir].into_iter().chain(&self.shares) {
            fs::create_dir_all(path).map_err(|source| prepare(path, source))?;
        }
        self.dir = fs::canonicalize(&self.dir).map_err(|source| prepare(&self.dir, source))?;
        self.check()?;
        let link = self.network.as_ref().map(KernelNetwork::attach).transpose()?;
        KernelHost::first_boot(self, link)
    }

    /// The kernel's command line separates by spaces and, in disks, by commas.
    fn check(&self) -> Result<(), BootError> {
        if self.disks.len() > MAX_DISKS {
            return Err(BootError::Disks { host: self.name.clone(), count: self.disks.len() });
        }
        let disks = self.disks.iter().map(|disk| disk.path(&self.dir));
        let paths = disks.chain(self.tmpfs.iter().chain(&self.shares).cloned()).chain([self.dir.clone()]);
        for path in paths {
            let plain = path.to_str().is_some_and(|text| !text.contains([' ', ',', '\n', '\t']));
            if !plain || !path.is_absolute() {
                return Err(BootError::Path { path });
            }
        }
        Ok(())
    }

    /// Writes what the first process reads.
    pub(super) fn prepare(&self, dir: &Path, link: Option<&Link>) -> io::Result<()> {
        // From an earlier host of that name in the same folder.
        if dir.exists() {
            fs::remove_dir_all(dir)?;
        }
        fs::create_dir_all(dir.join("jobs"))?;
        let init = dir.join("init");
        fs::write(&init, INIT)?;
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
        let config = Config {
            host_name: &self.name,
            overlay: self.overlay,
            tmpfs: &self.tmpfs,
            shares: &self.shares,
            modules: &self.modules,
            module_root: Path::new(obstacle::MODULE_ROOT),
            network: link.map(Link::configuration),
        };
        fs::write(dir.join("config"), config.to_script())
    }

    /// Makes the disks that are not there, and locks all: the kernel itself does so only while a guest has one open.
    pub(super) fn open_disks(&self) -> Result<Vec<File>, BootError> {
        let host = || self.name.clone();
        let mut locks = Vec::new();
        for disk in &self.disks {
            let path = disk.path(&self.dir);
            let error = |source| BootError::Prepare { host: host(), path: path.clone(), source };
            let file = if path.exists() {
                File::open(&path).map_err(error)?
            } else {
                let file = File::create_new(&path).map_err(error)?;
                file.set_len(disk.size).map_err(error)?;
                file
            };
            let locked = match disk.flags.as_str() {
                flags if flags.contains('c') => Ok(()),
                flags if flags.contains('r') => file.try_lock_shared(),
                _ => file.try_lock(),
            };
            match locked {
                Ok(()) => locks.push(file),
                Err(TryLockError::WouldBlock) => return Err(BootError::DiskInUse { host: host(), path }),
                Err(TryLockError::Error(source)) => return Err(error(source)),
            }
        }
        Ok(locks)
    }

    /// The kernel with its command line, in a process-id namespace of its own.
    pub(super) fn program(&self, dir: &Path, link: Option<&Link>) -> Result<Program, BootError> {
        let gone = || BootError::Obstacle("linux.uml is not on PATH any more".to_owned());
        let kernel = obstacle::kernel().ok_or_else(gone)?;
        let mut words: Vec<OsString> = Vec::new();
        if let Some(link) = link {
            words.extend(["nsenter".into(), link.namespace_argument(), "--".into()]);
        }
        words.extend(["unshare", "--pid", "--fork", "--kill-child=KILL", "--"].map(OsString::from));
        words.extend(["sh", "-c", WRAPPER, "sh"].map(OsString::from));
        words.push(kernel.into());
        words.extend(self.kernel_arguments(dir, link).into_iter().map(OsString::from));
        let mut words = words.into_iter();
        let first = words.next().expect("there are words");
        Ok(Program::new(&self.name, Path::new(&first), &dir.join("console"))
            .args(words)
            .env("TMPDIR", obstacle::MEMORY))
    }

    fn kernel_arguments(&self, dir: &Path, link: Option<&Link>) -> Vec<String> {
        let dir = dir.display();
        let mut arguments = vec![
            format!("mem={}M", self.memory / MIB),
            format!("init={dir}/init"),
            format!("uml_dir={dir}/"),
        ];
        // The root is the machine's; consoles go nowhere or to the log, the serial line to the two descriptors of the
        // wrapper; a panic ends the process.
        let always = "umid=uml root=/dev/root rootfstype=hostfs rootflags=/ rw con=null con0=null,fd:2 \
                      ssl=null ssl0=fd:5,fd:6 panic=-1 noreboot";
        arguments.extend(always.split(' ').map(str::to_owned));
        for (number, disk) in self.disks.iter().enumerate() {
            // `d`: the file is the whole disk, never a difference to another one.
            arguments.push(format!("ubd{number}{}d={}", disk.flags, disk.path(&self.dir).display()));
        }
        arguments.extend(link.map(Link::kernel_argument));
        arguments
    }
}
