//! Devices of ours: made, found again, reconnected and let go.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use berth_core::reason::Reason;
use berth_core::units::Bytes;
use nix::errno::Errno;
use nix::libc;
use thiserror::Error;

use super::handshake::{Export, ExportFlags, HandshakeError, handshake};
use super::holders::{HoldersError, holders};
use super::netlink::{Connect, Nbd, NetlinkError};
use super::slots::{BackendId, Slot, SlotUse, Slots, SlotsExhausted};
use super::sysfs::{SysfsError, folder, observe, observe_one};

/// What guests expect of a disk, and what a clone inherits from its origin: more would hide its partitions.
const BLOCK: Bytes = Bytes(512);
/// The largest block that the kernel takes where pages are smallest.
const MOST_BLOCK: Bytes = Bytes::kib(4);
/// What a device is asked for to know that it answers.
const PROBE: usize = 4096;
/// How long an answer is waited for before the connection is offered again.
const PROBE_PAUSE: Duration = Duration::from_millis(500);
/// After how long without an answer the kernel looks after a request: one that went out over a connection that is replaced
/// by now is sent again then, and all others go on waiting. Linux takes 30 s, about what a guest has patience for.
const RESEND_AFTER: Duration = Duration::from_secs(5);
/// What the kernel begins with, and the next user of the device expects.
const RESEND_DEFAULT: Duration = Duration::from_secs(30);
/// A device that is in use for longer than this is in use: some only look at it in passing.
const BUSY_WAIT: Duration = Duration::from_secs(2);
/// How long the kernel may take to let a device go that nobody has open.
const RELEASE_LIMIT: Duration = Duration::from_secs(10);

/// Why a device could not be attached, found, reconnected or let go.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The kernel refused.
    #[error("failed to use kernel NBD")]
    Netlink(#[from] NetlinkError),
    /// The devices could not be looked at.
    #[error("failed to look at NBD devices")]
    Observe(#[from] SysfsError),
    /// The server did not open the export.
    #[error("failed to open the export for {id}")]
    Handshake {
        /// Whose device it is.
        id: BackendId,
        /// Why.
        source: HandshakeError,
    },
    /// No device is free.
    #[error("failed to find a device for {id}")]
    Exhausted {
        /// Whose it would be.
        id: BackendId,
        /// What they are used for.
        source: SlotsExhausted,
    },
    /// The server exports something of another size than expected, or of none that a device can have.
    #[error("the server of {id} exports {found} and not {expected}, or not a positive multiple of 512 bytes")]
    Size {
        /// Whose device it is.
        id: BackendId,
        /// What it should have.
        expected: Bytes,
        /// What the server says.
        found: Bytes,
    },
    /// The server takes requests in larger blocks than the kernel makes.
    #[error("the server of {id} wants blocks of {minimum}")]
    BlockSize {
        /// Whose device it is.
        id: BackendId,
        /// The server's smallest.
        minimum: Bytes,
    },
    /// The device is not connected, or not ours any more.
    #[error("nbd{index} is not connected to {id}")]
    NotAttached {
        /// The device.
        index: u32,
        /// Whose it should be.
        id: BackendId,
    },
    /// It does not answer, neither over its old connection nor over a new one.
    #[error("nbd{index} did not answer for {} s", limit.as_secs())]
    Silent {
        /// The device.
        index: u32,
        /// How long it had.
        limit: Duration,
    },
    /// It answers with errors.
    #[error("failed to read nbd{index}")]
    Read {
        /// The device.
        index: u32,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel does not take how long it is to wait before it sends a request again.
    #[error("failed to set the time after which nbd{index} looks after its requests")]
    Resend {
        /// The device.
        index: u32,
        /// What the system said.
        source: io::Error,
    },
    /// It is not known who uses it, so it was left alone.
    #[error("failed to find out who uses nbd{index}")]
    Holders {
        /// The device.
        index: u32,
        /// Why.
        source: HoldersError,
    },
    /// It is in use, and was left alone.
    #[error("nbd{index} is in use: {}", holders.join(", "))]
    InUse {
        /// The device.
        index: u32,
        /// Devices made of it, mounts, and processes.
        holders: Vec<String>,
    },
    /// It was disconnected and somebody still has it open; its number is not used until it is idle.
    #[error("nbd{index} was disconnected, and is not let go")]
    NotLetGo {
        /// The device.
        index: u32,
    },
}

impl AttachError {
    /// The machine-readable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Netlink(NetlinkError::NoFamily) => Reason::PreflightFailed,
            Self::Exhausted { .. } => Reason::SlotsExhausted,
            Self::Handshake { .. } | Self::Silent { .. } | Self::Read { .. } => Reason::OriginSilent,
            Self::Size { .. } => Reason::AlreadyDifferent,
            Self::BlockSize { .. } => Reason::ImageFormatUnsupported,
            Self::InUse { .. } | Self::NotLetGo { .. } => Reason::InUse,
            Self::NotAttached { .. } => Reason::VolumeNotFound,
            Self::Netlink(_) | Self::Observe(_) | Self::Resend { .. } | Self::Holders { .. } => {
                Reason::PoolAreaFailed
            }
        }
    }
}

/// What is attached, and how.
#[derive(Clone, Copy, Debug)]
pub struct AttachConfig<'a> {
    /// Whose device it is.
    pub id: &'a BackendId,
    /// The server's socket.
    pub socket: &'a Path,
    /// The size that was promised for it. A multiple of 512 bytes.
    pub size: Bytes,
    /// How long requests wait for a server that is away before they end in errors. Unit: whole seconds.
    pub dead_connection: Duration,
    /// How long the server may take for a handshake, and the device for its first answer.
    pub limit: Duration,
}

/// A device that carries an identifier of ours. Dropping it leaves it attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    index: u32,
    id: BackendId,
    size: Bytes,
}

impl Attachment {
    /// Gives the export at `config.socket` a device, read-only. One that carries the identifier already is taken over, and
    /// reconnected if its server is away.
    ///
    /// # Errors
    /// [`AttachError::Exhausted`]; [`AttachError::Size`] if the export or the device is of another size.
    pub fn attach(nbd: &mut Nbd, slots: &mut Slots, config: &AttachConfig<'_>) -> Result<Self, AttachError> {
        if let Some(found) = Self::find(nbd, config.id)? {
            found.expect_size(config.size, found.size)?;
            found.reconnect(nbd, config.socket, config.limit)?;
            return Ok(found);
        }
        let mut tried = BTreeSet::new();
        loop {
            let seen = observe(nbd)?;
            slots.observe(&seen);
            let id = config.id.clone();
            let index = slots.pick(&seen, &tried).map_err(|source| AttachError::Exhausted { id, source })?;
            match Self::connect(nbd, index, config) {
                // Somebody else was faster.
                Err(AttachError::Netlink(error)) if error.errno() == Some(Errno::EBUSY) => {
                    tried.insert(index)
                }
                Err(error) => return Err(error),
                Ok(attached) => {
                    attached.await_answer(config.limit, |_| Ok(()))?;
                    return Ok(attached);
                }
            };
        }
    }

    /// The device that carries an identifier, if there is one; its server may be away.
    pub fn find(nbd: &mut Nbd, id: &BackendId) -> Result<Option<Self>, AttachError> {
        Ok(Self::list(nbd)?.into_iter().find(|attachment| attachment.id == *id))
    }

    /// Every device of ours.
    pub fn list(nbd: &mut Nbd) -> Result<Vec<Self>, AttachError> {
        Ok(observe(nbd)?.iter().filter_map(Self::of).collect())
    }

    /// Its number.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Whose it is.
    pub fn id(&self) -> &BackendId {
        &self.id
    }

    /// Its size.
    pub fn size(&self) -> Bytes {
        self.size
    }

    /// Its node.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/nbd{}", self.index))
    }

    /// Connects it to the server at `socket` if its old one is away, and returns when it answers. What waited goes on at
    /// once; what the old server had taken and not answered is sent again up to six seconds after it was first sent.
    ///
    /// # Errors
    /// [`AttachError::Silent`] if it does not answer within `limit`: its server is there and hangs. End that server and try
    /// again.
    pub fn reconnect(&self, nbd: &mut Nbd, socket: &Path, limit: Duration) -> Result<(), AttachError> {
        self.require_ours(nbd)?;
        self.set_resend(RESEND_AFTER)?;
        self.await_answer(limit, |left| {
            let (stream, export) = self.open(socket, left)?;
            self.expect_size(self.size, export.size)?;
            nbd.reconfigure(self.index, &self.id, &stream)?;
            Ok(())
        })
    }

    /// Refuses with [`AttachError::InUse`] while anybody goes on using it.
    pub fn require_unused(&self) -> Result<(), AttachError> {
        require_unused(self.index)
    }

    /// Lets the device go. One that is not ours any more is no error, and left alone.
    ///
    /// # Errors
    /// [`AttachError::InUse`] names who uses it. [`AttachError::NotLetGo`] if somebody opened it in that moment; its number
    /// is quarantined.
    pub fn detach(self, nbd: &mut Nbd, slots: &mut Slots) -> Result<(), AttachError> {
        let index = self.index;
        if !self.is_ours(nbd)? {
            return Ok(());
        }
        require_unused(index)?;
        self.set_resend(RESEND_DEFAULT)?;
        slots.quarantine(index);
        nbd.disconnect(index)?;
        let deadline = Instant::now() + RELEASE_LIMIT;
        loop {
            let seen: Vec<_> = observe_one(nbd, index)?.into_iter().collect();
            slots.observe(&seen);
            if !slots.quarantined().any(|quarantined| quarantined == index) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(AttachError::NotLetGo { index });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn of(slot: &Slot) -> Option<Self> {
        match slot.usage() {
            SlotUse::Ours(id) => Some(Self { index: slot.index, id, size: slot.size }),
            SlotUse::Free | SlotUse::Foreign | SlotUse::Held => None,
        }
    }

    fn connect(nbd: &mut Nbd, index: u32, config: &AttachConfig<'_>) -> Result<Self, AttachError> {
        let attachment = Self { index, id: config.id.clone(), size: config.size };
        let (stream, export) = attachment.open(config.socket, config.limit)?;
        attachment.expect_size(config.size, export.size)?;
        let minimum = export.blocks.map_or(BLOCK, |blocks| blocks.minimum.max(BLOCK));
        if minimum > MOST_BLOCK || !config.size.0.is_multiple_of(minimum.0) {
            return Err(AttachError::BlockSize { id: attachment.id, minimum });
        }
        let connect = Connect {
            index: Some(index),
            size: config.size,
            block_size: minimum,
            flags: export.flags.and(ExportFlags::HAS_FLAGS).and(ExportFlags::READ_ONLY),
            io_timeout: None, // a slow store is no dead one: its server says what failed
            dead_connection: config.dead_connection,
            identifier: config.id,
        };
        nbd.connect(&connect, &stream)?;
        attachment.set_resend(RESEND_AFTER)?;
        Ok(attachment)
    }

    fn set_resend(&self, after: Duration) -> Result<(), AttachError> {
        let written = fs::write(folder(self.index).join("queue/io_timeout"), after.as_millis().to_string());
        written.map_err(|source| AttachError::Resend { index: self.index, source })
    }

    fn open(
        &self,
        socket: &Path,
        limit: Duration,
    ) -> Result<(std::os::unix::net::UnixStream, Export), AttachError> {
        handshake(socket, "", limit).map_err(|source| AttachError::Handshake { id: self.id.clone(), source })
    }

    fn expect_size(&self, expected: Bytes, found: Bytes) -> Result<(), AttachError> {
        if expected == found && found.0.is_multiple_of(BLOCK.0) && found > Bytes::ZERO {
            return Ok(());
        }
        Err(AttachError::Size { id: self.id.clone(), expected, found })
    }

    fn is_ours(&self, nbd: &mut Nbd) -> Result<bool, AttachError> {
        Ok(observe_one(nbd, self.index)?.as_ref().and_then(Self::of).is_some_and(|found| found.id == self.id))
    }

    fn require_ours(&self, nbd: &mut Nbd) -> Result<(), AttachError> {
        if self.is_ours(nbd)? {
            return Ok(());
        }
        Err(AttachError::NotAttached { index: self.index, id: self.id.clone() })
    }

    /// Reads a block past memory and does `connect` before, and again and again while there is no answer: the kernel
    /// takes a new connection only when it has noticed that the old one is dead, and does not say whether it took it.
    fn await_answer(
        &self,
        limit: Duration,
        mut connect: impl FnMut(Duration) -> Result<(), AttachError>,
    ) -> Result<(), AttachError> {
        let deadline = Instant::now() + limit;
        let mut answer: Option<Receiver<io::Result<()>>> = None;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            connect(left.max(PROBE_PAUSE))?;
            // One reader at a time: a read that waits cannot be given up.
            let waiting = answer.get_or_insert_with(|| self.probe());
            match waiting.recv_timeout(left.min(PROBE_PAUSE)) {
                Ok(Ok(())) => return Ok(()),
                // An error may be that of the time before the new connection: it was offered once more since.
                Ok(Err(source)) if Instant::now() >= deadline => {
                    return Err(AttachError::Read { index: self.index, source });
                }
                Ok(Err(_)) => {
                    answer = None;
                    std::thread::sleep(left.min(PROBE_PAUSE));
                }
                Err(RecvTimeoutError::Disconnected) => answer = None,
                Err(RecvTimeoutError::Timeout) if Instant::now() >= deadline => {
                    return Err(AttachError::Silent { index: self.index, limit });
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn probe(&self) -> Receiver<io::Result<()>> {
        let (give, take) = sync_channel(1);
        let (path, length) = (self.path(), usize::try_from(self.size.0).unwrap_or(PROBE).min(PROBE));
        std::thread::spawn(move || give.send(read_direct(&path, length)));
        take
    }
}

/// Fails with who uses a device, if they go on using it.
fn require_unused(index: u32) -> Result<(), AttachError> {
    let deadline = Instant::now() + BUSY_WAIT;
    loop {
        let holders = holders(index).map_err(|source| AttachError::Holders { index, source })?;
        if holders.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(AttachError::InUse { index, holders });
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn read_direct(device: &Path, length: usize) -> io::Result<()> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT | libc::O_CLOEXEC).open(device)?;
    let mut buffer = vec![0; 2 * PROBE];
    let start = buffer.as_ptr().align_offset(PROBE);
    file.read_exact_at(&mut buffer[start..start + length], 0)
}
