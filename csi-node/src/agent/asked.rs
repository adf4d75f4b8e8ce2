//! Operations that are asked for through the agent's socket, `agent.sock` in the node's directory: a line each, and a line
//! back for each, in order ([`crate::operation::lines`]).
//!
//! The socket is root's alone. What a client has asked for is done though it goes away; repeated, it goes on.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_core::ids::{PoolName, volume_handle};
use berth_core::reason::Reason;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::agent::observe::wanted_pools;
use crate::node::Node;
use crate::operation::{Answer, Operation, Outcome, Refusal, carry_out, lines};
use crate::socket::{is_trusted, listen_alone};
use crate::telemetry::chain;

/// How many clients are served at a time; others wait.
const CLIENTS: usize = 64;

/// The agent's socket in a node's directory.
pub fn socket(state_dir: &Path) -> PathBuf {
    state_dir.join("agent.sock")
}

/// What carries operations out.
pub trait Carrier: Send + Sync + 'static {
    /// Carries one out, and returns when it is done or refused.
    fn carry(&self, operation: Operation) -> impl Future<Output = Result<Outcome, Refusal>> + Send;
}

/// Serves a socket until `stop`.
///
/// # Errors
/// If the socket cannot be made.
pub async fn serve(carrier: Arc<impl Carrier>, socket: PathBuf, stop: CancellationToken) -> io::Result<()> {
    let listener = listen_alone(&socket)?;
    let clients = Arc::new(Semaphore::new(CLIENTS));
    tracing::info!(socket = %socket.display(), "operations listening");
    loop {
        let Some(place) = stop.run_until_cancelled(Arc::clone(&clients).acquire_owned()).await else {
            return Ok(());
        };
        let Some(client) = stop.run_until_cancelled(listener.accept()).await else { return Ok(()) };
        let stream = match client {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(error = chain(&error), "a client is not served");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (carrier, stop) = (Arc::clone(&carrier), stop.clone());
        tokio::spawn(async move {
            let _place = place;
            if let Err(error) = converse(&*carrier, stream, &stop).await {
                tracing::debug!(error = chain(&error), "a client is gone");
            }
        });
    }
}

/// Answers line after line, until the client ends, sends what is no line, or `stop`.
async fn converse(
    carrier: &impl Carrier,
    mut stream: UnixStream,
    stop: &CancellationToken,
) -> io::Result<()> {
    if !is_trusted(&stream) {
        tracing::warn!(peer = ?stream.peer_cred(), "a client that is not root is turned away");
        return Ok(());
    }
    let (reader, mut writer) = stream.split();
    let (mut reader, mut line) = (BufReader::new(reader), Vec::new());
    loop {
        line.clear();
        let mut limited = (&mut reader).take(lines::LONGEST as u64 + 2);
        let Some(read) = stop.run_until_cancelled(limited.read_until(b'\n', &mut line)).await else {
            return Ok(());
        };
        if read? == 0 {
            return Ok(());
        }
        let whole = line.pop_if(|byte| *byte == b'\n').is_some();
        let answer: Answer = match lines::read(&line) {
            Ok(operation) => carrier.carry(operation).await.into(),
            Err(refusal) => Answer::Refused(refusal),
        };
        writer.write_all(&lines::write(&answer)).await?;
        if !whole && line.len() > lines::LONGEST {
            return Ok(()); // where the next line begins is not known
        }
    }
}

/// Carries out on the agent's own pools.
pub struct Agent(pub Arc<Node>);

impl Carrier for Agent {
    /// No CSI call works on a volume of the operation meanwhile. The agent's steps and operations take turns in each pool, of
    /// themselves.
    async fn carry(&self, operation: Operation) -> Result<Outcome, Refusal> {
        let Self(node) = self;
        let name = operation.name();
        let mut held = Vec::new();
        for volume in operation.volumes() {
            let busy = |error| Refusal { reason: Reason::InUse, message: chain(&error) };
            held.push(node.in_flight.begin(&volume_handle(volume), name).map_err(busy)?);
        }
        if let Operation::PoolDestroy { pool, .. } = &operation {
            require_no_cluster(node, pool)?;
        }
        let here = Arc::clone(node);
        tracing::info!(operation = name, pool = operation.pool().map(tracing::field::display), "asked for");
        let work = tokio::task::spawn_blocking(move || {
            let _held = held; // though the client goes away
            carry_out(&here.pools, &operation)
        });
        let outcome = work.await.unwrap_or_else(|error| {
            Err(Refusal { reason: Reason::PoolAreaFailed, message: format!("{name} broke off: {error}") })
        });
        if let Err(refusal) = &outcome {
            tracing::warn!(operation = name, %refusal, "refused");
        }
        node.wake.notify_one();
        outcome
    }
}

/// Refuses to destroy a pool that the cluster has here: the agent would make it anew, and its volumes empty.
fn require_no_cluster(node: &Node, pool: &PoolName) -> Result<(), Refusal> {
    let local = node.pools.is_local(pool);
    let local = local.map_err(|error| Refusal { reason: error.reason(), message: chain(&error) })?;
    let wanted = wanted_pools(node).contains_key(pool);
    if may_destroy(local, node.watches.synced(), wanted) {
        return Ok(());
    }
    let message = format!("StagingPool {pool} selects this node, or may: delete it, or let it select others");
    Err(Refusal { reason: Reason::InUse, message })
}

/// What the API server has not shown yet is not known to be gone.
const fn may_destroy(local: bool, synced: bool, wanted: bool) -> bool {
    !wanted && (local || synced)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::Mutex;

    use super::*;
    use crate::commands::asking::Carrier as _;
    use crate::commands::session::{Conversation, SessionError};

    #[test]
    fn a_pool_of_the_cluster_is_not_destroyed_nor_one_that_may_be() {
        for (local, synced) in [(true, true), (true, false), (false, true), (false, false)] {
            assert!(!may_destroy(local, synced, true));
        }
        assert!(may_destroy(true, false, false) && may_destroy(false, true, false));
        assert!(!may_destroy(false, false, false), "the API server has not shown it yet");
    }

    /// Notes what is asked, and refuses to forget pools.
    #[derive(Default)]
    struct Fake(Mutex<Vec<Operation>>);

    impl Carrier for Fake {
        async fn carry(&self, operation: Operation) -> Result<Outcome, Refusal> {
            self.0.lock().unwrap().push(operation.clone());
            match operation {
                Operation::PoolForget { pool } => {
                    Err(Refusal { reason: Reason::PoolNotFound, message: pool.to_string() })
                }
                _ => Ok(Outcome::Device("/dev/x".into())),
            }
        }
    }

    struct Bed {
        dir: tempfile::TempDir,
        fake: Arc<Fake>,
        stop: CancellationToken,
    }

    impl Bed {
        /// Returns once the socket is served.
        async fn new() -> Self {
            let (dir, fake) = (tempfile::tempdir().unwrap(), Arc::new(Fake::default()));
            let stop = CancellationToken::new();
            let path = socket(dir.path());
            // What an earlier agent has left.
            drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
            assert!(Conversation::begin(&path).unwrap().is_none(), "nobody listens any more");
            tokio::spawn(serve(Arc::clone(&fake), path.clone(), stop.clone()));
            while !matches!(Conversation::begin(&path), Ok(Some(_))) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Self { dir, fake, stop }
        }

        async fn talk<T: Send + 'static>(
            &self,
            act: impl FnOnce(&mut Conversation) -> T + Send + 'static,
        ) -> T {
            let path = socket(self.dir.path());
            let talk = move || act(&mut Conversation::begin(&path).unwrap().unwrap());
            tokio::task::spawn_blocking(talk).await.unwrap()
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn answers_come_in_order_and_the_socket_is_private() {
        let bed = Bed::new().await;
        let mode = std::fs::metadata(socket(bed.dir.path())).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let asked = [Operation::PoolForget { pool: "p".into() }, Operation::PoolList {}];
        let ask = asked.clone();
        let answers = bed.talk(move |agent| ask.map(|operation| agent.ask(&operation).unwrap())).await;
        let refused = Refusal { reason: Reason::PoolNotFound, message: "p".to_owned() };
        assert_eq!(answers, [Answer::Refused(refused), Answer::Done(Outcome::Device("/dev/x".into()))]);
        assert_eq!(*bed.fake.0.lock().unwrap(), asked);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_no_operation_is_refused_and_too_long_a_line_ends_the_conversation() {
        let bed = Bed::new().await;
        let bad = Operation::PoolForget { pool: "../p".into() };
        let long = Operation::VolumeCreate {
            pool: "p".into(),
            volume: "v".into(),
            size: berth_core::units::Bytes(1),
            origin: None,
            labels: [("k".to_owned(), "v".repeat(lines::LONGEST))].into(),
        };
        let (bad, long, after) = bed
            .talk(move |agent| {
                let bad = agent.ask(&bad).unwrap();
                (bad, agent.ask(&long), agent.ask(&Operation::PoolList {}))
            })
            .await;
        assert!(matches!(&bad, Answer::Refused(why) if why.reason == Reason::InvalidSpec), "{bad:?}");
        // The rest of the line is not read, so the end may come before the answer does.
        match long {
            Ok(answer) => assert_eq!(answer, Answer::Refused(lines::too_long())),
            Err(error) => assert!(matches!(error, SessionError::Closed { .. }), "{error}"),
        }
        assert!(matches!(after, Err(SessionError::Closed { .. })), "{after:?}");
        assert!(bed.fake.0.lock().unwrap().is_empty(), "nothing was carried out");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_client_that_says_nothing_ends_with_the_agent() {
        let bed = Bed::new().await;
        let idle = Conversation::begin(&socket(bed.dir.path())).unwrap().unwrap();
        bed.stop.cancel();
        let ask = move || {
            let mut idle = idle;
            loop {
                match idle.ask(&Operation::PoolList {}) {
                    Ok(_) => std::thread::sleep(Duration::from_millis(5)),
                    Err(error) => return error,
                }
            }
        };
        let error = tokio::task::spawn_blocking(ask).await.unwrap();
        assert!(matches!(error, SessionError::Closed { .. }), "{error}");
    }
}
