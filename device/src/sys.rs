//! The ioctls of loop devices, block devices, reflink and the maps of files, waiting for a socket, and the clock's state, each as a safe
//! function over a borrowed descriptor.
//!
//! Sources: `include/uapi/linux/loop.h`, `include/uapi/linux/fs.h` and `include/uapi/linux/fiemap.h` of the kernel.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc::c_int;

/// `LO_FLAGS_READ_ONLY`.
pub(crate) const LO_READ_ONLY: u32 = 1;
/// `LO_FLAGS_DIRECT_IO`.
pub(crate) const LO_DIRECT_IO: u32 = 16;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct LoopInfo64 {
    pub device: u64,
    pub inode: u64,
    pub rdevice: u64,
    pub offset: u64,
    pub size_limit: u64,
    pub number: u32,
    pub encrypt_type: u32,
    pub encrypt_key_size: u32,
    pub flags: u32,
    pub file_name: [u8; 64],
    pub crypt_name: [u8; 64],
    pub encrypt_key: [u8; 32],
    pub init: [u64; 2],
}

impl LoopInfo64 {
    /// All zero.
    pub(crate) const EMPTY: Self = Self {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// `struct loop_config`.
#[repr(C)]
pub(crate) struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

/// `FIEMAP_FLAG_SYNC`.
const FIEMAP_SYNC: u32 = 1;
/// How many extents of a file are asked for at once.
pub(crate) const FIEMAP_COUNT: usize = 128;

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct FiemapExtent {
    pub logical: u64,
    pub physical: u64,
    pub length: u64,
    reserved64: [u64; 2],
    pub flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap`, with room for [`FIEMAP_COUNT`] extents.
#[repr(C)]
pub(crate) struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [FiemapExtent; FIEMAP_COUNT],
}

mod raw {
    use super::{Fiemap, LoopConfig, LoopInfo64};
    nix::ioctl_none_bad!(loop_clr_fd, 0x4C01);
    nix::ioctl_read_bad!(loop_get_status64, 0x4C05, LoopInfo64);
    nix::ioctl_none_bad!(loop_set_capacity, 0x4C07);
    nix::ioctl_write_ptr_bad!(loop_configure, 0x4C0A, LoopConfig);
    nix::ioctl_write_int_bad!(loop_ctl_add, 0x4C80);
    nix::ioctl_write_int_bad!(loop_ctl_remove, 0x4C81);
    nix::ioctl_none_bad!(loop_ctl_get_free, 0x4C82);
    nix::ioctl_write_int_bad!(ficlone, nix::libc::FICLONE);
    nix::ioctl_readwrite_bad!(fiemap, 0xC020_660B, Fiemap);
    nix::ioctl_read!(blkgetsize64, 0x12, 114, usize);
    nix::ioctl_none!(blkflsbuf, 0x12, 97);
    nix::ioctl_write_ptr_bad!(blkdiscard, 0x1277, [u64; 2]);
}

/// The number of a loop device that nobody used when it was asked.
pub(crate) fn loop_get_free(control: &File) -> Result<u32, Errno> {
    // SAFETY: takes no argument; an ioctl on a borrowed, open descriptor.
    let number = unsafe { raw::loop_ctl_get_free(control.as_raw_fd()) }?;
    u32::try_from(number).map_err(|_| Errno::ENODEV)
}

/// Makes the unbound loop device `number` anew, with no setting left of the old one; `EBUSY` if anyone has it open.
pub(crate) fn loop_renew(control: &File, number: u32) -> Result<(), Errno> {
    let number = c_int::try_from(number).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the argument is an integer; an ioctl on a borrowed, open descriptor.
    unsafe { raw::loop_ctl_remove(control.as_raw_fd(), number) }?;
    // SAFETY: as above.
    match unsafe { raw::loop_ctl_add(control.as_raw_fd(), number) } {
        Ok(_) | Err(Errno::EEXIST) => Ok(()), // someone else was given the number meanwhile
        Err(errno) => Err(errno),
    }
}

/// Binds `backing` to the loop device `device`, in one step.
pub(crate) fn loop_configure(
    device: &File,
    backing: &File,
    block_size: u32,
    info: LoopInfo64,
) -> Result<(), Errno> {
    let fd = u32::try_from(backing.as_raw_fd()).map_err(|_| Errno::EBADF)?;
    let config = LoopConfig { fd, block_size, info, reserved: [0; 8] };
    // SAFETY: `config` has the kernel's layout, lives for the call and is only read; both descriptors are borrowed.
    unsafe { raw::loop_configure(device.as_raw_fd(), &raw const config) }.map(drop)
}

/// What a loop device is bound to; `ENXIO` when to nothing.
pub(crate) fn loop_status(device: &File) -> Result<LoopInfo64, Errno> {
    let mut info = LoopInfo64::EMPTY;
    // SAFETY: the kernel writes one `loop_info64` into `info`, which has its layout and lives for the call.
    unsafe { raw::loop_get_status64(device.as_raw_fd(), &raw mut info) }?;
    Ok(info)
}

/// Unbinds a loop device, at once or (while others have it open) when the last of them closes it.
pub(crate) fn loop_clear(device: &File) -> Result<(), Errno> {
    // SAFETY: takes no argument; an ioctl on a borrowed, open descriptor.
    unsafe { raw::loop_clr_fd(device.as_raw_fd()) }.map(drop)
}

/// Makes a loop device take over the present size of its backing file.
pub(crate) fn loop_set_capacity(device: &File) -> Result<(), Errno> {
    // SAFETY: takes no argument; an ioctl on a borrowed, open descriptor.
    unsafe { raw::loop_set_capacity(device.as_raw_fd()) }.map(drop)
}

/// Makes `target` share all blocks of `source`.
pub(crate) fn clone_file(target: &File, source: &File) -> Result<(), Errno> {
    let source: c_int = source.as_raw_fd();
    // SAFETY: the argument is a descriptor number, borrowed for the call.
    unsafe { raw::ficlone(target.as_raw_fd(), source) }.map(drop)
}

/// The first extents of a file at or behind the byte `start`, after what was written to it has its place.
pub(crate) fn file_extents(file: &File, start: u64) -> Result<Vec<FiemapExtent>, Errno> {
    let none =
        FiemapExtent { logical: 0, physical: 0, length: 0, reserved64: [0; 2], flags: 0, reserved: [0; 3] };
    let count = u32::try_from(FIEMAP_COUNT).map_err(|_| Errno::EINVAL)?;
    let mut map = Fiemap {
        start,
        length: u64::MAX - start,
        flags: FIEMAP_SYNC,
        mapped: 0,
        count,
        reserved: 0,
        extents: [none; FIEMAP_COUNT],
    };
    // SAFETY: the kernel reads the head of `map` and writes as many extents behind it as `count` says, which is their number.
    unsafe { raw::fiemap(file.as_raw_fd(), &raw mut map) }?;
    Ok(map.extents.iter().take(map.mapped as usize).copied().collect())
}

/// The size of a block device in bytes.
pub(crate) fn block_device_bytes(device: &File) -> Result<u64, Errno> {
    let mut bytes: usize = 0;
    // SAFETY: the kernel writes one u64 (a `usize` on every target Berth supports) into `bytes`.
    unsafe { raw::blkgetsize64(device.as_raw_fd(), &raw mut bytes) }?;
    Ok(bytes as u64)
}

/// Writes out and forgets what the kernel holds in memory of a block device.
pub(crate) fn flush_buffers(device: &File) -> Result<(), Errno> {
    // SAFETY: takes no argument; an ioctl on a borrowed, open descriptor.
    unsafe { raw::blkflsbuf(device.as_raw_fd()) }.map(drop)
}

/// Tells a block device that these bytes are not needed any more.
pub(crate) fn discard(device: &File, offset: u64, length: u64) -> Result<(), Errno> {
    let range = [offset, length];
    // SAFETY: the kernel reads two u64 from `range`, which lives for the call; the descriptor is borrowed.
    unsafe { raw::blkdiscard(device.as_raw_fd(), &raw const range) }.map(drop)
}

/// Waits until there is something to read; false if there is nothing after `limit`.
pub(crate) fn wait_readable(descriptor: RawFd, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let mut entry = nix::libc::pollfd { fd: descriptor, events: nix::libc::POLLIN, revents: 0 };
        let left = deadline.saturating_duration_since(Instant::now()).as_millis();
        let milliseconds = i32::try_from(left).unwrap_or(i32::MAX).max(1);
        // SAFETY: the kernel reads and writes one `pollfd` that lives for the call; a stale number is only refused.
        match unsafe { nix::libc::poll(&raw mut entry, 1, milliseconds) } {
            0 if Instant::now() >= deadline => return Ok(false),
            0 => {}
            1.. => return Ok(true),
            _ => match Errno::last() {
                Errno::EINTR => {}
                error => return Err(error.into()),
            },
        }
    }
}

/// True if the kernel's clock is disciplined by something.
pub(crate) fn clock_is_synchronised() -> Result<bool, Errno> {
    // SAFETY: `timex` is a plain structure of integers, for which zeros are valid; modes 0 asks and changes nothing.
    let mut state: nix::libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel reads and writes one `timex` that lives for the call.
    let clock = Errno::result(unsafe { nix::libc::adjtimex(&raw mut state) })?;
    Ok(clock != nix::libc::TIME_ERROR)
}

const _: () = assert!(size_of::<Fiemap>() == 32 + FIEMAP_COUNT * 56);
const _: () =
    assert!(size_of::<LoopInfo64>() == 232 && size_of::<LoopConfig>() == 304 && size_of::<usize>() == 8);
