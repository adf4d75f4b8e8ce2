//! A network for guests that is none of the machine's: a bridge in a network namespace that only this process holds.
//!
//! The namespace has no name and no process. It is kept by one open file of this process and by the guests in it, so
//! it goes, with everything in it, when they do.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsRawFd as _;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

use super::error::NetworkError;

/// The machine's own address in the network of guests.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

/// The addresses of the network of guests: the gateway's and their own.
pub const NETWORK: &str = "10.77.0.0/24";

/// The bridge.
const BRIDGE: &str = "guests";

/// The last part of the first guest's address.
const FIRST: u8 = 11;

/// How long a connection may take to come about.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Passes connections on; never ends, so its tasks end with this process or with their network.
static PASSING: LazyLock<Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("kernel-network")
        .enable_all()
        .build()
        .expect("the runtime starts")
});

/// A network that hosts and programs of this machine share; clones are the same network.
#[derive(Debug, Clone)]
pub struct KernelNetwork {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    namespace: Arc<File>,
    next: AtomicU8,
    passing: std::sync::Mutex<Vec<tokio::task::AbortHandle>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let passing = self.passing.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        passing.iter().for_each(tokio::task::AbortHandle::abort);
    }
}

impl KernelNetwork {
    /// Makes one, empty but for the machine's side at [`GATEWAY`].
    ///
    /// # Errors
    /// [`NetworkError`]; it takes root and `ip` (iproute2).
    pub fn new() -> Result<Self, NetworkError> {
        let made = thread::spawn(|| -> io::Result<File> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        });
        let namespace = made.join().map_err(|_| io::Error::other("a thread panicked"));
        let namespace = Arc::new(namespace.flatten().map_err(NetworkError::Namespace)?);
        let inner = Inner { namespace, next: AtomicU8::new(FIRST), passing: std::sync::Mutex::default() };
        let network = Self { inner: Arc::new(inner) };
        network.ip("link set lo up")?;
        network.ip(&format!("link add {BRIDGE} type bridge forward_delay 0"))?;
        network.ip(&format!("address add {GATEWAY}/24 dev {BRIDGE}"))?;
        network.ip(&format!("link set {BRIDGE} up"))?;
        Ok(network)
    }

    /// Lets every host reach what listens on a port of this machine's 127.0.0.1; returns the address for the hosts,
    /// which has the same port.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub fn expose(&self, port: u16) -> Result<SocketAddrV4, NetworkError> {
        let address = SocketAddrV4::new(GATEWAY, port);
        let listener = self.within(move || std::net::TcpListener::bind(address))?;
        let target = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        self.pass(address, listener, move || TcpStream::connect(target))?;
        Ok(address)
    }

    /// Lets this machine reach a port of a host; returns the address for the machine, on 127.0.0.1.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub fn reach(&self, guest: SocketAddrV4) -> Result<SocketAddrV4, NetworkError> {
        let any = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);
        let listener = std::net::TcpListener::bind(any);
        let local = listener.as_ref().ok().and_then(|listener| listener.local_addr().ok());
        let port = local.map_or(0, |address| address.port());
        let namespace = Arc::clone(&self.inner.namespace);
        self.pass(any, listener, move || {
            let namespace = Arc::clone(&namespace);
            async move {
                let connect = move || std::net::TcpStream::connect_timeout(&guest.into(), CONNECT_LIMIT);
                let stream = tokio::task::spawn_blocking(move || within(&namespace, connect)).await??;
                let stream = stream?;
                stream.set_nonblocking(true)?;
                TcpStream::from_std(stream)
            }
        })?;
        Ok(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port))
    }

    /// Runs something on a thread of its own in the network: sockets that it makes and commands that it runs belong
    /// there (but not a [`crate::process::Program`], which another thread starts).
    ///
    /// # Errors
    /// [`NetworkError::Enter`].
    pub fn within<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, NetworkError> {
        within(&self.inner.namespace, work).map_err(NetworkError::Enter)
    }

    /// A new link, connected, with the next free address.
    pub(super) fn attach(&self) -> Result<Link, NetworkError> {
        let taken = self
            .inner
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| (next < u8::MAX).then(|| next + 1));
        let number = taken.map_err(|_| NetworkError::Full)?;
        let link = Link { network: self.clone(), number };
        self.ip(&format!("tuntap add dev {} mode tap vnet_hdr", link.tap()))?;
        self.ip(&format!("link set {} master {BRIDGE} up", link.tap()))?;
        Ok(link)
    }

    fn ip(&self, arguments: &str) -> Result<(), NetworkError> {
        let words: Vec<String> = arguments.split(' ').map(str::to_owned).collect();
        let ran = self.within(move || Command::new("ip").args(words).stdin(Stdio::null()).output())?;
        let output = ran.map_err(|source| NetworkError::Run { arguments: arguments.to_owned(), source })?;
        if output.status.success() {
            return Ok(());
        }
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(NetworkError::Refused { arguments: arguments.to_owned(), message })
    }

    /// Passes each connection that the listener takes on to what `connect` gives.
    fn pass<F, Fut>(
        &self,
        address: SocketAddrV4,
        listener: io::Result<std::net::TcpListener>,
        connect: F,
    ) -> Result<(), NetworkError>
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = io::Result<TcpStream>> + Send + 'static,
    {
        let entered = PASSING.enter();
        let listener = listener.and_then(|listener| {
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        });
        drop(entered);
        let listener =
            listener.map_err(|source| NetworkError::Listen { address: address.to_string(), source })?;
        let task = PASSING.spawn(async move {
            // The connections go with the task that took them.
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((mut from, _)) = listener.accept().await {
                let connecting = connect();
                connections.spawn(async move {
                    // A connection that does not come about, or breaks, shows on the other side as an end.
                    if let Ok(Ok(mut to)) = tokio::time::timeout(CONNECT_LIMIT, connecting).await {
                        tokio::io::copy_bidirectional(&mut from, &mut to).await.ok();
                    }
                });
                while connections.try_join_next().is_some() {}
            }
        });
        let mut passing = self.inner.passing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        passing.push(task.abort_handle());
        Ok(())
    }
}

/// One host's link to a network. It stays when the host is off, and goes when it is dropped.
#[derive(Debug)]
pub struct Link {
    network: KernelNetwork,
    number: u8,
}

impl Link {
    /// The host's address.
    pub fn address(&self) -> Ipv4Addr {
        let [a, b, c, _] = GATEWAY.octets();
        Ipv4Addr::new(a, b, c, self.number)
    }

    /// The address with the length of its prefix, and the way out.
    pub fn configuration(&self) -> (String, String) {
        (format!("{}/24", self.address()), GATEWAY.to_string())
    }

    /// What tells the kernel to have it as `vec0`. Without `gro` what the host receives crawls.
    pub fn kernel_argument(&self) -> String {
        format!(
            "vec0:transport=tap,ifname={},depth=128,gro=1,mac=02:be:00:00:00:{:02x}",
            self.tap(),
            self.number
        )
    }

    /// What `nsenter` is to be told to enter the network. This process keeps the file open as long as the link is.
    pub fn namespace_argument(&self) -> OsString {
        let file = self.network.inner.namespace.as_raw_fd();
        format!("--net=/proc/{}/fd/{file}", std::process::id()).into()
    }

    /// Puts the link onto the bridge or takes it off. (The link itself must not go down: the host's end of it would
    /// never come back.)
    pub fn set_connected(&self, connected: bool) -> Result<(), NetworkError> {
        let master = if connected { format!("master {BRIDGE}") } else { "nomaster".to_owned() };
        self.network.ip(&format!("link set {} {master}", self.tap()))
    }

    fn tap(&self) -> String {
        format!("guest{}", self.number)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // What stays goes with the network.
        self.network.ip(&format!("link del {}", self.tap())).ok();
    }
}

/// Runs `work` on a thread in a network namespace.
fn within<T: Send + 'static>(
    namespace: &Arc<File>,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let namespace = Arc::clone(namespace);
    let entered = thread::spawn(move || -> io::Result<T> {
        setns(&*namespace, CloneFlags::CLONE_NEWNET)?;
        Ok(work())
    });
    entered.join().map_err(|_| io::Error::other("a thread panicked in the network namespace"))?
}
