//! What is said on the socket, and by whom.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;

use berth_node::supervisor::protocol::{Answer, FailureKind, MOST_LINE, Request};
use berth_node::supervisor::servers::{ServeError, Servers as _};

use super::{SOON, Stage};

/// A connection on which anything can be said.
struct Peer(BufReader<UnixStream>);

impl Peer {
    fn new(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        Self(BufReader::new(stream))
    }

    /// Says a line. One that nobody listens to any more is heard as silence.
    fn say(&mut self, line: &str) {
        let _ = self.0.get_mut().write_all(format!("{line}\n").as_bytes());
    }

    /// The next line; nothing if the connection was ended.
    fn hear(&mut self) -> String {
        let mut line = String::new();
        let _ = self.0.read_line(&mut line); // a connection that was reset was ended
        line.trim_end().to_owned()
    }

    fn ask(&mut self, line: &str) -> String {
        self.say(line);
        self.hear()
    }
}

/// The answer to one request.
pub fn ask(socket: &Path, request: &Request) -> Answer {
    let mut peer = Peer::new(socket);
    assert_ne!(peer.ask(r#"{"protocol":1,"oldest":1}"#), "");
    serde_json::from_str(&peer.ask(&serde_json::to_string(request).unwrap())).unwrap()
}

#[test]
fn versions_are_negotiated_and_what_is_not_understood_is_refused() {
    let stage = Stage::new();
    let supervisor = stage.supervisor();
    let socket = stage.socket();
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(stage.client().hello(), Ok(2));

    for (hello, speaks) in [
        (r#"{"protocol":1,"oldest":1}"#, true),
        (r#"{"protocol":2,"oldest":1}"#, true),
        (r#"{"protocol":3,"oldest":2,"name":"of the future"}"#, true),
        (r#"{"protocol":4,"oldest":3}"#, false),
    ] {
        let mut peer = Peer::new(&socket);
        assert_eq!(peer.ask(hello), r#"{"protocol":2,"oldest":1}"#, "to {hello}");
        let answer = peer.ask(r#"{"do":"list"}"#);
        assert_eq!(answer, if speaks { r#"{"servers":[]}"# } else { "" }, "after {hello}");
    }
    for bad in ["", "{}", "hello", r#"{"protocol":-1,"oldest":1}"#] {
        assert_eq!(Peer::new(&socket).ask(bad), "", "after {bad}");
    }

    let mut peer = Peer::new(&socket);
    assert_ne!(peer.ask(r#"{"protocol":1,"oldest":1}"#), "");
    for bad in ["{}", r#"{"do":"reboot"}"#, r#"{"do":"list","all":true}"#, "", "list"] {
        let answer: Answer = serde_json::from_str(&peer.ask(bad)).unwrap();
        let refused = matches!(&answer, Answer::Failed(failure) if failure.kind == FailureKind::Refused);
        assert!(refused, "{bad}: {answer:?}");
    }
    assert_eq!(peer.ask(r#"{"do":"list"}"#), r#"{"servers":[]}"#, "it goes on");
    let long = format!(r#"{{"do":"list","more":"{}"}}"#, "x".repeat(MOST_LINE));
    assert_eq!(peer.ask(&long), "", "nobody waits for its end");
    assert_eq!(peer.ask(r#"{"do":"list"}"#), "");

    // Whoever is not root is not listened to, whatever the modes of files.
    if nix::unistd::Uid::effective().is_root() {
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
        fs::set_permissions(stage.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let script = "import socket, sys, os\nos.setuid(65534)\ns = socket.socket(socket.AF_UNIX)\n\
                      s.connect(sys.argv[1])\ns.sendall(b'{\"protocol\":1,\"oldest\":1}\\n')\nprint(len(s.recv(99)))";
        let program = berth_device::find_program("python3");
        if let Some(python) = program {
            let output =
                std::process::Command::new(python).arg("-c").arg(script).arg(&socket).output().unwrap();
            let printed = String::from_utf8_lossy(&output.stdout);
            let failed = String::from_utf8_lossy(&output.stderr);
            let ended =
                printed.trim() == "0" || failed.contains("ConnectionReset") || failed.contains("BrokenPipe");
            assert!(ended, "{printed} {failed}");
        }
    }
    supervisor.end();
}

#[test]
fn only_one_runs_in_a_folder() {
    let stage = Stage::new();
    let first = stage.supervisor();
    let mut second = stage.start_supervisor();
    assert!(!second.0.wait().unwrap().success());
    assert_eq!(stage.client().hello(), Ok(2), "the first one is as it was");
    first.end();
    stage.supervisor().end();
}

/// A supervisor of the version before, which says so and answers nothing.
fn of_version_1(stage: &Stage) -> std::thread::JoinHandle<()> {
    fs::create_dir_all(stage.path("run")).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(stage.socket()).unwrap();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut reader = BufReader::new(&stream);
        reader.read_line(&mut String::new()).unwrap();
        (&stream).write_all(b"{\"protocol\":1,\"oldest\":1}\n").unwrap();
    })
}

#[test]
fn a_supervisor_of_the_version_before_is_not_asked_for_what_it_does_not_know() {
    let stage = Stage::new();
    let old = of_version_1(&stage);
    let error = stage.client().serves_stores().unwrap_err();
    assert!(matches!(error, ServeError::TooOld { .. }), "{error}");
    old.join().unwrap();
}
