//! Around the S3 protocol: every request is counted, logged and, if a rule says so, made to fail.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::{Method, Request, Response, header};
use s3s::access::{S3Access, S3AccessContext};
use s3s::service::S3Service;
use s3s::{S3Result, s3_error};

use super::fault::{FaultAction, FaultEngine};
use super::log::{Entry, LogError, LogWriter};
use crate::wire::{
    BoxError, Conn, Cut, CutKind, CutOff, End, Handler, ReceivedBody, SentBody, drain, percent_decode,
};

/// What is known about a request while it runs. Travels in the request's extensions.
pub(crate) struct Trace {
    entry: Mutex<Entry>,
    fault: Mutex<Option<FaultAction>>,
    body: ReceivedBody,
    conn: Arc<Conn>,
    started: Instant,
}

impl Trace {
    fn new(request: &Request<()>, body: ReceivedBody, conn: Arc<Conn>) -> Self {
        let path = percent_decode(request.uri().path());
        let (bucket, key) =
            path.trim_start_matches('/').split_once('/').unwrap_or((path.trim_matches('/'), ""));
        let query = request.uri().query().unwrap_or("");
        let param = |name: &str| query_param(query, name);
        let range = request.headers().get(header::RANGE).and_then(|r| r.to_str().ok()).map(str::to_owned);
        let entry = Entry {
            method: request.method().to_string(),
            op: "Refused".to_owned(),
            bucket: bucket.to_owned(),
            key: key.to_owned(),
            range,
            upload_id: param("uploadId"),
            part: param("partNumber").and_then(|n| n.parse().ok()),
            ..Entry::default()
        };
        let (fault, entry) = (Mutex::default(), Mutex::new(entry));
        Self { entry, fault, body, conn, started: Instant::now() }
    }

    /// Adds to the log entry.
    pub(crate) fn note(&self, add: impl FnOnce(&mut Entry)) {
        add(&mut self.entry.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The fault chosen for this request.
    pub(crate) fn fault(&self) -> Option<FaultAction> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn query_param(query: &str, name: &str) -> Option<String> {
    let mut pairs = query.split('&').filter_map(|p| p.split_once('='));
    pairs.find(|(n, _)| *n == name).map(|(_, value)| percent_decode(value))
}

/// Lets signed requests through and applies the faults that prevent a request.
pub(crate) struct Gate {
    pub(crate) faults: FaultEngine,
}

#[async_trait::async_trait]
impl S3Access for Gate {
    async fn check(&self, cx: &mut S3AccessContext<'_>) -> S3Result<()> {
        let Some(trace) = cx.extensions_mut().get::<Arc<Trace>>().cloned() else {
            return Err(s3_error!(InternalError, "request without a trace"));
        };
        let op = cx.s3_op().name();
        trace.note(|e| op.clone_into(&mut e.op));
        if cx.credentials().is_none() {
            return Err(s3_error!(AccessDenied, "signature is required"));
        }
        let prefix = query_param(cx.uri().query().unwrap_or(""), "prefix");
        let key = cx.s3_path().get_object_key().map(str::to_owned).or(prefix).unwrap_or_default();
        let fault = self.faults.decide(op, &key).map_err(s3s::S3Error::internal_error)?;
        let Some((rule, action)) = fault else { return Ok(()) };
        trace.note(|e| e.fault = Some(rule));
        *trace.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(action.clone());
        match action {
            FaultAction::SlowDown => Err(s3_error!(SlowDown, "please reduce your request rate")),
            FaultAction::Deny => Err(s3_error!(AccessDenied, "denied by a fault rule")),
            FaultAction::Reset { after_bytes: 0 } => {
                trace.conn.reset();
                Err(s3_error!(InternalError, "reset by a fault rule"))
            }
            FaultAction::Reset { after_bytes } if is_upload(cx.method()) => {
                trace.body.reset_after(after_bytes);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

fn is_upload(method: &Method) -> bool {
    method == Method::PUT || method == Method::POST
}

/// The log entry of a running request: written once, at the latest when it is dropped.
struct Pending {
    log: Arc<LogWriter>,
    trace: Arc<Trace>,
    status: u16,
    done: bool,
}

impl Pending {
    fn finish(&mut self, end: End) -> Result<u64, LogError> {
        self.done = true;
        let mut entry = self.trace.entry.lock().unwrap_or_else(PoisonError::into_inner);
        entry.received = self.trace.body.received();
        entry.sent = end.sent;
        entry.complete = end.complete;
        entry.status = self.status;
        entry.took_ms = u64::try_from(self.trace.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.log.append(&mut entry)
    }

    fn finish_or_complain(&mut self, end: End) {
        if self.done {
            return;
        }
        if let Err(error) = self.finish(end) {
            tracing::error!(%error, "request is missing in the log");
        }
    }

    /// Logs the request now and waits until that is on disk.
    async fn finish_synced(mut self, end: End) -> Result<(), BoxError> {
        tokio::task::spawn_blocking(move || {
            let seq = self.finish(end)?;
            self.log.sync(seq)
        })
        .await??;
        Ok(())
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.finish_or_complain(End { sent: 0, complete: false });
    }
}

/// The S3 service with its log.
pub(crate) struct LoggedS3 {
    pub(crate) service: S3Service,
    pub(crate) log: Arc<LogWriter>,
}

impl Handler for LoggedS3 {
    async fn handle(
        self: Arc<Self>,
        request: Request<Incoming>,
        conn: Arc<Conn>,
    ) -> Result<Response<SentBody>, BoxError> {
        let (parts, incoming) = request.into_parts();
        let body = ReceivedBody::new(incoming, conn.clone());
        let mut request = Request::from_parts(parts, ());
        let method = request.method().clone();
        let trace = Arc::new(Trace::new(&request, body.clone(), conn.clone()));
        request.extensions_mut().insert(trace.clone());
        let mut pending = Pending { log: self.log.clone(), trace: trace.clone(), status: 0, done: false };
        let response = self.service.call(request.map(|()| s3s::Body::http_body(body.clone()))).await;
        let response = response.map_err(BoxError::from)?;
        if conn.is_reset() {
            return Err(CutOff.into());
        }
        drain(body).await;
        pending.status = response.status().as_u16();
        let fault = trace.fault();
        match &fault {
            Some(FaultAction::Delay { ms }) => tokio::time::sleep(Duration::from_millis(*ms)).await,
            Some(FaultAction::LostResponse) => {
                pending.finish_synced(End { sent: 0, complete: false }).await?;
                conn.reset();
                return Err(CutOff.into());
            }
            _ => {}
        }
        answer(response, &method, fault.as_ref(), pending, conn).await
    }
}

/// Shapes the answer after the fault, and logs: before a mutating request is answered, at the end of the body of others.
async fn answer(
    response: Response<s3s::Body>,
    method: &Method,
    fault: Option<&FaultAction>,
    mut pending: Pending,
    conn: Arc<Conn>,
) -> Result<Response<SentBody>, BoxError> {
    let size = http_body::Body::size_hint(response.body()).exact();
    let cut = response_cut(method, fault).filter(|cut| size.is_none_or(|s| cut.after < s));
    let corrupt = match fault {
        Some(FaultAction::Corrupt { at }) => Some(*at),
        _ => None,
    };
    let shape = |body: SentBody| body.cut(cut).corrupt(corrupt);
    if method != Method::GET && method != Method::HEAD {
        let sent = cut.map_or(size.unwrap_or(0), |c| c.after);
        pending.finish_synced(End { sent, complete: cut.is_none() }).await?;
        return Ok(response.map(|body| shape(SentBody::new(body, conn, |_| ()))));
    }
    if method == Method::HEAD || size == Some(0) {
        pending.finish(End { sent: 0, complete: true })?;
        return Ok(response.map(|body| SentBody::new(body, conn, |_| ())));
    }
    Ok(response.map(|body| shape(SentBody::new(body, conn, move |end| pending.finish_or_complain(end)))))
}

fn response_cut(method: &Method, fault: Option<&FaultAction>) -> Option<Cut> {
    match fault? {
        FaultAction::Reset { after_bytes } if !is_upload(method) => {
            Some(Cut { after: *after_bytes, kind: CutKind::Reset })
        }
        FaultAction::Truncate { after_bytes } => Some(Cut { after: *after_bytes, kind: CutKind::Truncate }),
        FaultAction::Stall { after_bytes } => Some(Cut { after: *after_bytes, kind: CutKind::Stall }),
        _ => None,
    }
}
