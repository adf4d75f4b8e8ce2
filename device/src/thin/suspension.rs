//! Suspending a device of ours, with its resumption guaranteed as far as a program can.
//!
//! A suspended device stops everything that uses it, so none may be left behind:
//! 1. [`Suspended`] resumes when it is dropped, also while unwinding, and tries again if that fails.
//! 2. A suspension that fails or runs out of time may take effect late, when the kernel is done waiting. A resumption is
//!    sent after it in any case: the kernel takes both in turn (`suspend_lock` in `drivers/md/dm.c`). A new table is
//!    cleared before that, because a device that works and has one is suspended by the kernel in order to take it
//!    (`do_resume` in `drivers/md/dm-ioctl.c`), and the resumption then hangs where the suspension did (tried).
//! 3. New tables are loaded before the suspension, so that what can fail fails while the device works; a device that does
//!    not resume with its new table gets its old one back.
//! 4. A process that dies in between leaves the device to `resume_left_behind`, which is called before anything else at
//!    start. That is why all of it can be left to a process of its own (`super::suspender`).

use std::time::Duration;

use super::dmsetup::{self, DmError, Quiesce};

/// How often, and with which pauses (doubling), a resumption is tried: about 12 s besides the attempts themselves.
const ATTEMPTS: u32 = 8;
const PAUSE: Duration = Duration::from_millis(100);

/// A device while it is suspended.
#[derive(Debug)]
#[must_use = "dropped, the device resumes"]
pub(super) struct Suspended<'a> {
    uuid: &'a str,
    resumed: bool,
}

impl<'a> Suspended<'a> {
    /// Suspends the device.
    ///
    /// # Errors
    /// If it could not be suspended. It works then, unless that is [`DmError::StillSuspended`].
    pub(super) fn new(uuid: &'a str, how: Quiesce) -> Result<Self, DmError> {
        match dmsetup::suspend(uuid, how) {
            Ok(()) => Ok(Self { uuid, resumed: false }),
            Err(error) => {
                if dmsetup::info(uuid).is_ok_and(|info| info.is_none()) {
                    return Err(error); // there is nothing to resume
                }
                let cleared = dmsetup::clear(uuid);
                resume_stubbornly(uuid)?;
                cleared.and(Err(error))
            }
        }
    }

    /// Resumes it.
    ///
    /// # Errors
    /// [`DmError::StillSuspended`] after several attempts.
    pub(super) fn resume(mut self) -> Result<(), DmError> {
        self.resumed = true;
        resume_stubbornly(self.uuid)
    }

    /// Resumes it with the table that was loaded before, or with `old` if it does not work with that.
    ///
    /// # Errors
    /// Why the new table was not taken. The device works with the old one then, unless it is
    /// [`DmError::StillSuspended`].
    fn resume_or_go_back(mut self, old: Loaded<'_>) -> Result<(), DmError> {
        self.resumed = true;
        let Err(error) = dmsetup::resume_uuid(self.uuid) else { return Ok(()) };
        if dmsetup::info(self.uuid).is_ok_and(|info| info.is_some_and(|info| !info.suspended)) {
            return Err(error);
        }
        let reloaded = old.load(self.uuid);
        resume_stubbornly(self.uuid)?;
        reloaded.and(Err(error))
    }
}

impl Drop for Suspended<'_> {
    fn drop(&mut self) {
        if !self.resumed
            && let Err(error) = resume_stubbornly(self.uuid)
        {
            tracing::error!(device = self.uuid, %error, "a device is left suspended");
        }
    }
}

/// A table, and whether the device refuses writes with it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loaded<'a> {
    pub line: &'a str,
    pub read_only: bool,
}

impl Loaded<'_> {
    fn load(self, uuid: &str) -> Result<(), DmError> {
        dmsetup::load(uuid, self.line, self.read_only)
    }
}

/// Makes a device use a new table, in place.
///
/// # Errors
/// If it does not. It works with its old table then, unless that is [`DmError::StillSuspended`].
pub(super) fn replace_table(uuid: &str, old: Loaded<'_>, new: Loaded<'_>) -> Result<(), DmError> {
    if let Err(error) = new.load(uuid) {
        // It may have been loaded although the answer was lost.
        return clear(uuid).and(Err(error));
    }
    Suspended::new(uuid, Quiesce::Hold)?.resume_or_go_back(old)
}

fn clear(uuid: &str) -> Result<(), DmError> {
    if dmsetup::info(uuid)?.is_none() {
        return Ok(());
    }
    dmsetup::clear(uuid)
}

fn resume_stubbornly(uuid: &str) -> Result<(), DmError> {
    let mut pause = PAUSE;
    let mut attempt = 1;
    loop {
        match dmsetup::resume_uuid(uuid) {
            Ok(()) => return Ok(()),
            Err(source) if attempt >= ATTEMPTS => {
                let (device, source) = (uuid.to_owned(), Box::new(source));
                return Err(DmError::StillSuspended { device, attempts: attempt, source });
            }
            Err(error) => tracing::warn!(device = uuid, %error, attempt, "failed to resume"),
        }
        std::thread::sleep(pause);
        pause *= 2;
        attempt += 1;
    }
}
