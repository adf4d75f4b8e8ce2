//! Free TCP ports on 127.0.0.1.

use std::collections::HashSet;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::{Mutex, PoisonError};

/// Ports this process has handed out already: the kernel may give the same one twice before anybody listens.
static HANDED_OUT: Mutex<Option<HashSet<u16>>> = Mutex::new(None);

/// Returns a port of 127.0.0.1 on which nothing listens, and never the same one twice in this process.
///
/// Assumes that other programs ask the kernel for free ports too: between this call and the listening, one of them
/// may still get it, so whoever starts a server tries again with a new port when the address is in use.
///
/// # Errors
/// When the machine has no free port left.
pub fn free_port() -> std::io::Result<u16> {
    // Listeners are kept until the end of the search, so that the kernel does not offer a rejected port again.
    let mut rejected = Vec::new();
    let mut handed_out = HANDED_OUT.lock().unwrap_or_else(PoisonError::into_inner);
    let handed_out = handed_out.get_or_insert_with(HashSet::new);
    loop {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        if handed_out.insert(port) {
            return Ok(port);
        }
        rejected.push(listener);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_distinct_and_can_be_listened_on() {
        let ports: Vec<u16> = (0..64).map(|_| free_port().unwrap()).collect();
        let distinct: HashSet<u16> = ports.iter().copied().collect();
        assert_eq!(distinct.len(), ports.len());
        let open =
            ports.iter().filter(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, **port)).is_ok()).count();
        // Another program may have taken one or two in the meantime, not more.
        assert!(open >= 60, "only {open} of 64 ports could be listened on");
    }
}
