//! What a process keeps of memory that it has freed.
#![allow(unsafe_code)]

use nix::libc;

/// Buffers from this size on come from the system and go back to it. Smaller ones, such as chunks of an image store, are made and
/// freed too often for that. Unit: bytes.
const LARGE: libc::c_int = 1 << 20;

/// Has the C library give large buffers back to the system as soon as they are freed. Left alone, it raises the size from which it
/// does so to that of the largest buffer that was ever freed, up to 32 MiB, and keeps all others for itself: a process that reads
/// images in windows of some MiB, on several threads, holds more than twice what it uses.
///
/// Returns false where the C library knows no such thing. See mallopt(3), `M_MMAP_THRESHOLD`.
pub fn give_large_buffers_back() -> bool {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: sets a number inside the allocator, which takes its own lock for that.
        unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) == 1 }
    }
    #[cfg(not(target_env = "gnu"))]
    {
        let _ = LARGE;
        false
    }
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg(target_env = "gnu")]
    fn the_c_library_takes_it() {
        assert!(super::give_large_buffers_back());
    }
}
