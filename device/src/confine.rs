//! What a child process gives up between fork and exec.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::libc;

/// A child's limits and what it inherits.
#[derive(Default)]
pub(crate) struct Confinement {
    /// User and group id to become; supplementary groups are dropped.
    pub user: Option<u32>,
    /// The largest file it may write, in bytes.
    pub file_size: Option<u64>,
    /// The `cgroup.procs` file of the control group to enter.
    pub group: Option<File>,
    /// Descriptors that stay open across exec, under their own numbers.
    pub inherited: Vec<OwnedFd>,
}

/// Makes `command` confine itself before it executes its program. It never gains privileges again and leaves no core file.
pub(crate) fn confine(command: &mut Command, confinement: Confinement) {
    let enter = move || enter(&confinement);
    // SAFETY: `enter` makes only async-signal-safe system calls on values made before the fork, and never allocates.
    unsafe { command.pre_exec(enter) };
}

fn enter(confinement: &Confinement) -> io::Result<()> {
    if let Some(group) = &confinement.group {
        // SAFETY: writes one byte from a static string to an open descriptor; "0" means the writing process.
        check(unsafe { libc::write(group.as_raw_fd(), c"0".as_ptr().cast(), 1) })?;
    }
    for fd in &confinement.inherited {
        // SAFETY: clears close-on-exec in this child only.
        check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) } as isize)?;
    }
    set_limit(libc::RLIMIT_CORE, 0)?;
    if let Some(bytes) = confinement.file_size {
        set_limit(libc::RLIMIT_FSIZE, bytes)?;
    }
    if let Some(id) = confinement.user {
        // SAFETY: plain system calls on integers; the null list has length zero.
        unsafe {
            check(libc::setgroups(0, std::ptr::null()) as isize)?;
            check(libc::setresgid(id, id, id) as isize)?;
            check(libc::setresuid(id, id, id) as isize)?;
        }
    }
    // SAFETY: a plain system call on integers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } as isize)
}

fn set_limit(resource: libc::__rlimit_resource_t, bytes: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    // SAFETY: the kernel reads one `rlimit` that lives for the call.
    check(unsafe { libc::setrlimit(resource, &raw const limit) } as isize)
}

fn check(result: isize) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
