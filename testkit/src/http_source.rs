//! An HTTP file server for import sources, with the moods of real ones.
//!
//! The first path segment chooses: `/plain/FILE` behaves; `/noranges/` ignores ranges; `/stall/` sends the first MiB, then
//! nothing more; `/forbidden/` answers 403; `/missing/` 404; `/slow/<bytes per second>/FILE` is throttled;
//! `/cut/<bytes>/FILE` resets the connection after that many body bytes; `/nohead/` refuses HEAD with 403; `/changing/`
//! has another `ETag` at each request.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use hyper::body::Incoming;
use hyper::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderName, IF_MATCH, IF_NONE_MATCH, IF_RANGE, RANGE,
};
use hyper::{Method, Request, Response, StatusCode};

use crate::s3::log::{Entry, LogError, LogWriter, RequestLog};
use crate::wire::{
    BoxError, Conn, Cut, CutKind, End, FileBody, Handler, Piece, SentBody, Server, percent_decode,
};

/// Body bytes that `/stall/` sends.
pub const STALL_AFTER: u64 = 1 << 20;

/// What the first path segment asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Switch {
    Plain,
    NoRanges,
    Stall,
    Forbidden,
    Missing,
    Slow(u64),
    Cut(u64),
    NoHead,
    Changing,
}

impl Switch {
    /// Splits a decoded path into the switch and the file's path.
    fn parse(path: &str) -> Option<(Self, &str)> {
        let (name, rest) = path.trim_start_matches('/').split_once('/')?;
        let numbered = || {
            let (number, rest) = rest.split_once('/')?;
            Some((number.parse::<u64>().ok()?, rest))
        };
        Some(match name {
            "plain" => (Self::Plain, rest),
            "noranges" => (Self::NoRanges, rest),
            "stall" => (Self::Stall, rest),
            "forbidden" => (Self::Forbidden, rest),
            "missing" => (Self::Missing, rest),
            "nohead" => (Self::NoHead, rest),
            "changing" => (Self::Changing, rest),
            "slow" => numbered().map(|(n, rest)| (Self::Slow(n), rest))?,
            "cut" => numbered().map(|(n, rest)| (Self::Cut(n), rest))?,
            _ => return None,
        })
    }

    fn refusal(self, method: &Method) -> Option<StatusCode> {
        match self {
            Self::Forbidden => Some(StatusCode::FORBIDDEN),
            Self::Missing => Some(StatusCode::NOT_FOUND),
            Self::NoHead if method == Method::HEAD => Some(StatusCode::FORBIDDEN),
            _ => None,
        }
    }

    fn cut(self) -> Option<Cut> {
        match self {
            Self::Stall => Some(Cut { after: STALL_AFTER, kind: CutKind::Stall }),
            Self::Cut(after) => Some(Cut { after, kind: CutKind::Reset }),
            _ => None,
        }
    }
}

/// A running HTTP file server. Dropping it cuts all connections.
#[derive(Debug)]
pub struct HttpSource {
    server: Server,
    log: PathBuf,
}

impl HttpSource {
    /// Serves the files in `dir` on a free port of the loopback interface, logging to the file `log`.
    pub async fn start(dir: &Path, log: &Path) -> Result<Self, SourceError> {
        Self::start_on((Ipv4Addr::LOCALHOST, 0).into(), dir, log).await
    }

    /// Serves the files in `dir` on `addr`, logging to the file `log`.
    pub async fn start_on(addr: SocketAddr, dir: &Path, log: &Path) -> Result<Self, SourceError> {
        let writer = Arc::new(LogWriter::open(log, false)?);
        let files = Arc::new(Files { dir: dir.to_owned(), log: writer, requests: AtomicU64::new(0) });
        let server =
            Server::start(addr, files).await.map_err(|source| SourceError::Listen { addr, source })?;
        Ok(Self { server, log: log.to_owned() })
    }

    /// `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.server.addr())
    }

    /// The URL of `file` with `switch`, for example `plain` or `slow/1000000`.
    pub fn url(&self, switch: &str, file: &str) -> String {
        format!("{}/{switch}/{file}", self.endpoint())
    }

    /// Everything logged so far.
    pub fn log(&self) -> Result<RequestLog, LogError> {
        RequestLog::read(&self.log)
    }
}

/// Why an HTTP file server did not start.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The log is not usable.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The address is not usable.
    #[error("cannot listen on {addr}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

#[derive(Debug)]
struct Files {
    dir: PathBuf,
    log: Arc<LogWriter>,
    requests: AtomicU64,
}

/// What a request gets, before it is turned into a response.
struct Plan {
    status: StatusCode,
    headers: Vec<(HeaderName, String)>,
    file: Option<(PathBuf, Range<u64>)>,
}

impl Plan {
    fn refuse(status: StatusCode) -> Self {
        Self { status, headers: Vec::new(), file: None }
    }
}

impl Files {
    /// The file that `name` means, if that is inside the directory.
    fn resolve(&self, name: &str) -> Option<PathBuf> {
        let inside = Path::new(name).components().all(|c| matches!(c, Component::Normal(_)));
        (inside && !name.is_empty()).then(|| self.dir.join(name))
    }

    fn plan<B>(&self, request: &Request<B>, switch: Switch, name: &str) -> Plan {
        if request.method() != Method::GET && request.method() != Method::HEAD {
            return Plan::refuse(StatusCode::METHOD_NOT_ALLOWED);
        }
        if let Some(status) = switch.refusal(request.method()) {
            return Plan::refuse(status);
        }
        let found = self.resolve(name).and_then(|path| Some((std::fs::metadata(&path).ok()?, path)));
        let Some((meta, path)) = found.filter(|(meta, _)| meta.is_file()) else {
            return Plan::refuse(StatusCode::NOT_FOUND);
        };
        let mut etag = format!("\"{:x}-{:x}-{:x}\"", meta.size(), meta.mtime(), meta.mtime_nsec());
        if switch == Switch::Changing {
            etag = format!("\"{}\"", self.requests.fetch_add(1, Ordering::AcqRel));
        }
        let header = |name: HeaderName| request.headers().get(name).and_then(|v| v.to_str().ok());
        let lists = |list: &str| list.trim() == "*" || list.split(',').any(|e| e.trim() == etag);
        if header(IF_MATCH).is_some_and(|list| !lists(list)) {
            return Plan::refuse(StatusCode::PRECONDITION_FAILED);
        }
        if header(IF_NONE_MATCH).is_some_and(lists) {
            return Plan { headers: vec![(ETAG, etag)], ..Plan::refuse(StatusCode::NOT_MODIFIED) };
        }
        let range = header(RANGE)
            .filter(|_| switch != Switch::NoRanges && header(IF_RANGE).is_none_or(|tag| tag == etag))
            // Several ranges, or other units, are answered with the whole file, as RFC 9110 allows.
            .and_then(|range| s3s::dto::Range::parse(range).ok());
        ranged(path, meta.size(), range, etag, switch)
    }
}

fn ranged(path: PathBuf, size: u64, range: Option<s3s::dto::Range>, etag: String, switch: Switch) -> Plan {
    let mut headers = vec![(ETAG, etag)];
    if switch != Switch::NoRanges {
        headers.push((ACCEPT_RANGES, "bytes".to_owned()));
    }
    match range.map(|r| r.check(size)) {
        None => Plan { status: StatusCode::OK, headers, file: Some((path, 0..size)) },
        Some(Ok(range)) => {
            headers.push((CONTENT_RANGE, format!("bytes {}-{}/{size}", range.start, range.end - 1)));
            Plan { status: StatusCode::PARTIAL_CONTENT, headers, file: Some((path, range)) }
        }
        Some(Err(_)) => Plan {
            headers: vec![(CONTENT_RANGE, format!("bytes */{size}"))],
            ..Plan::refuse(StatusCode::RANGE_NOT_SATISFIABLE)
        },
    }
}

impl Handler for Files {
    async fn handle(
        self: Arc<Self>,
        request: Request<Incoming>,
        conn: Arc<Conn>,
    ) -> Result<Response<SentBody>, BoxError> {
        let started = Instant::now();
        let path = percent_decode(request.uri().path());
        let (switch, name) = Switch::parse(&path).unwrap_or((Switch::Missing, &path));
        let plan = self.plan(&request, switch, name);
        let mut entry = Entry {
            method: request.method().to_string(),
            op: format!("{switch:?}"),
            key: name.to_owned(),
            range: request.headers().get(RANGE).and_then(|r| r.to_str().ok()).map(str::to_owned),
            status: plan.status.as_u16(),
            ..Entry::default()
        };
        let mut response = Response::builder().status(plan.status);
        for (name, value) in plan.headers {
            response = response.header(name, value);
        }
        let length = plan.file.as_ref().map_or(0, |(_, range)| range.end - range.start);
        response = response.header(CONTENT_LENGTH, length);
        let no_body = request.method() == Method::HEAD || length == 0;
        let rate = if let Switch::Slow(rate) = switch { Some(rate) } else { None };
        let body = match plan.file.filter(|_| !no_body) {
            Some((path, range)) => FileBody::new([Piece { path, range, keep: None }], rate).into_body(),
            None => s3s::Body::empty(),
        };
        let log = self.log.clone();
        let mut body = SentBody::new(body, conn, move |end: End| {
            (entry.sent, entry.complete) = (end.sent, end.complete);
            entry.took_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
            if let Err(error) = log.append(&mut entry) {
                tracing::error!(%error, "request is missing in the log");
            }
        })
        .cut(switch.cut().filter(|cut| cut.after < length));
        if no_body {
            body.end(true);
        }
        Ok(response.body(body)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_take_their_numbers_and_leave_the_file() {
        assert_eq!(Switch::parse("/plain/a/b.img"), Some((Switch::Plain, "a/b.img")));
        assert_eq!(Switch::parse("/slow/1000/b.img"), Some((Switch::Slow(1000), "b.img")));
        assert_eq!(Switch::parse("/cut/5/b"), Some((Switch::Cut(5), "b")));
        for wrong in ["/slow/b.img", "/slow/x/b.img", "/other/b", "/plain", "/"] {
            assert_eq!(Switch::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn files_outside_the_directory_do_not_exist() {
        let dir = tempfile::tempdir().unwrap();
        let log = Arc::new(LogWriter::open(&dir.path().join("log"), false).unwrap());
        let files = Files { dir: dir.path().join("files"), log, requests: AtomicU64::new(0) };
        for outside in ["../log", "a/../../log", "/etc/passwd", ""] {
            assert_eq!(files.resolve(outside), None, "{outside}");
        }
        assert_eq!(files.resolve("a/b"), Some(dir.path().join("files/a/b")));
    }
}
