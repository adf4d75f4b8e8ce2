//! A web server as a source.

use std::ops::Range;
use std::time::Duration;

use berth_core::units::Bytes as Size;
use bytes::{Bytes, BytesMut};
use futures::{StreamExt as _, TryStreamExt as _};
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_MATCH,
    LOCATION, RANGE,
};
use reqwest::{Response, StatusCode, Url};

use super::address::AddressPolicy;
use super::client::{CONNECT_TIMEOUT, RefusedAddress, caused_by, chain, client, refused_literal};
use super::{SourceError, SourceInfo, SourceStream};
use crate::s3::Secret;

/// How many redirects are followed.
const REDIRECTS: usize = 5;

/// How a URL is read.
#[derive(Clone, Debug)]
pub struct HttpConfig {
    /// http or https. Userinfo in it is sent as basic authentication.
    pub url: String,
    /// Sent with every request to the URL's own host, for example for authorization.
    pub headers: Vec<(String, Secret)>,
    /// PEM certificates to trust beside the system's.
    pub ca_bundle: Option<Vec<u8>>,
    /// From where it may be read.
    pub addresses: AddressPolicy,
    /// Nothing for this long counts as stalled.
    pub stall: Duration,
}

/// A web server's file.
#[derive(Clone, Debug)]
pub struct HttpSource {
    client: reqwest::Client,
    url: Url,
    headers: HeaderMap,
    addresses: AddressPolicy,
    stall: Duration,
    known: Known,
}

/// What the first answer said; all later ones must agree.
#[derive(Clone, Debug, Default)]
struct Known {
    size: Option<Size>,
    etag: Option<String>,
    ranges: bool,
}

impl HttpSource {
    /// A reader of the URL. Nothing is sent yet.
    pub fn new(config: HttpConfig) -> Result<Self, SourceError> {
        let url = Url::parse(&config.url)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
            .ok_or_else(|| SourceError::Url { location: without_query(&config.url) })?;
        let location = shown(&url);
        if let Some(address) = refused_literal(&config.addresses, &url) {
            return Err(SourceError::Refused { location, address });
        }
        let unusable = |said: String| SourceError::Client { location: location.clone(), said };
        let mut headers = HeaderMap::new();
        for (name, value) in &config.headers {
            let bad = || unusable(format!("`{name}` is not a header"));
            let header = HeaderName::try_from(name).map_err(|_| bad())?;
            let mut value = HeaderValue::try_from(value.reveal()).map_err(|_| bad())?;
            value.set_sensitive(true);
            headers.append(header, value);
        }
        let client = client(&config).map_err(unusable)?;
        Ok(Self {
            client,
            url,
            headers,
            addresses: config.addresses,
            stall: config.stall,
            known: Known::default(),
        })
    }

    fn location(&self) -> String {
        shown(&self.url)
    }

    pub(super) async fn open(
        &mut self,
        first: u64,
        version: Option<&str>,
    ) -> Result<SourceInfo, SourceError> {
        self.known = Known { etag: version.map(str::to_owned), ..Known::default() };
        let response = self.get(Some(0..first.max(1))).await?;
        let status = response.status();
        let (size, ranges) = match status {
            StatusCode::PARTIAL_CONTENT => (whole_size(&response), true),
            // An empty file has no first byte.
            StatusCode::RANGE_NOT_SATISFIABLE => {
                (whole_size(&response).filter(|size| *size == Size::ZERO), true)
            }
            _ => (response.content_length().map(Size), false),
        };
        self.same_version(&response)?;
        if status == StatusCode::RANGE_NOT_SATISFIABLE && size.is_none() {
            return Err(self.unusable("it refuses to send its first bytes"));
        }
        self.known = Known { size, etag: strong_etag(&response), ranges };
        let wanted = if status == StatusCode::RANGE_NOT_SATISFIABLE { 0 } else { first };
        let head = self.head(response, wanted).await?;
        Ok(SourceInfo { size, version: self.known.etag.clone(), accepts_ranges: ranges, head })
    }

    /// The first bytes of an answer, of which more may follow.
    async fn head(&self, response: Response, first: u64) -> Result<Bytes, SourceError> {
        let wanted = first.min(self.known.size.map_or(u64::MAX, |size| size.0));
        let len = self.known.size.map(|_| wanted);
        let mut stream = self.stream(response, 0, len);
        let mut head = BytesMut::new();
        while (head.len() as u64) < wanted {
            let Some(piece) = stream.next().await else { break };
            head.extend_from_slice(&piece?);
        }
        head.truncate(usize::try_from(wanted).unwrap_or(usize::MAX));
        Ok(head.freeze())
    }

    pub(super) async fn read(&self, range: Range<u64>) -> Result<SourceStream, SourceError> {
        let len = range.end.saturating_sub(range.start);
        if len == 0 {
            return Ok(futures::stream::empty().boxed());
        }
        if !self.known.ranges {
            let response = self.get(None).await?;
            self.same_version(&response)?;
            return Ok(self.stream(response, range.start, Some(len)));
        }
        let start = range.start;
        let response = self.get(Some(range)).await?;
        self.same_version(&response)?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT if starts_at(&response, start) => {
                if self.known.size.is_some() && whole_size(&response) != self.known.size {
                    return Err(SourceError::Changed { location: self.location() });
                }
                Ok(self.stream(response, 0, Some(len)))
            }
            StatusCode::RANGE_NOT_SATISFIABLE => Err(SourceError::Changed { location: self.location() }),
            status => Err(self.unusable(&format!("a range was asked for, {status} came"))),
        }
    }

    /// Sends a request; statuses that end everything are errors.
    async fn get(&self, range: Option<Range<u64>>) -> Result<Response, SourceError> {
        let mut response = self.send(&self.url, range.as_ref()).await?;
        for _ in 0..REDIRECTS {
            match self.next_hop(&response)? {
                Some(url) => response = self.send(&url, range.as_ref()).await?,
                None => return self.judge(response),
            }
        }
        match self.next_hop(&response)? {
            Some(_) => Err(SourceError::Redirects { location: self.location(), limit: REDIRECTS }),
            None => self.judge(response),
        }
    }

    async fn send(&self, url: &Url, range: Option<&Range<u64>>) -> Result<Response, SourceError> {
        // Ranges are of the bytes as they are stored.
        let mut request = self.client.get(url.clone()).header(ACCEPT_ENCODING, "identity");
        if url.origin() == self.url.origin() {
            request = request.headers(self.headers.clone());
        }
        if let Some(range) = range {
            request = request.header(RANGE, format!("bytes={}-{}", range.start, range.end.saturating_sub(1)));
        }
        if let Some(etag) = &self.known.etag {
            request = request.header(IF_MATCH, etag);
        }
        tokio::time::timeout(self.stall.max(CONNECT_TIMEOUT), request.send())
            .await
            .map_err(|_| SourceError::Stalled { location: self.location(), after: self.stall })?
            .map_err(|error| self.failed(&error))
    }

    /// Where an answer redirects to, if it does and may.
    fn next_hop(&self, response: &Response) -> Result<Option<Url>, SourceError> {
        if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
            return Ok(None);
        }
        let target = response.headers().get(LOCATION).and_then(|target| target.to_str().ok());
        let url = target
            .and_then(|target| response.url().join(target).ok())
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
            .ok_or_else(|| self.unusable("it redirects to no http or https url"))?;
        match refused_literal(&self.addresses, &url) {
            Some(address) => Err(SourceError::Refused { location: self.location(), address }),
            None => Ok(Some(url)),
        }
    }

    fn judge(&self, response: Response) -> Result<Response, SourceError> {
        let status = response.status();
        let location = self.location();
        match status.as_u16() {
            200..300 if response.headers().contains_key(CONTENT_ENCODING) && !is_identity(&response) => {
                Err(self.unusable("it is sent compressed though that was not asked for"))
            }
            200..300 | 416 => Ok(response),
            401 | 403 | 407 => Err(SourceError::Forbidden { location, said: status.to_string() }),
            404 | 410 => Err(SourceError::NotFound { location }),
            412 => Err(SourceError::Changed { location }),
            408 | 425 | 429 | 500.. => Err(SourceError::Unavailable { location, said: status.to_string() }),
            _ => Err(SourceError::Unusable { location, said: status.to_string() }),
        }
    }

    /// Servers that do not know `If-Match` answer with what they have.
    fn same_version(&self, response: &Response) -> Result<(), SourceError> {
        let changed = || SourceError::Changed { location: self.location() };
        if let Some(known) = &self.known.etag
            && response.status() != StatusCode::RANGE_NOT_SATISFIABLE
            && strong_etag(response).as_ref() != Some(known)
        {
            return Err(changed());
        }
        match (self.known.size, response.status(), response.content_length()) {
            (Some(known), StatusCode::OK, Some(found)) if known.0 != found => Err(changed()),
            _ => Ok(()),
        }
    }

    fn stream(&self, response: Response, skip: u64, len: Option<u64>) -> SourceStream {
        let this = self.clone();
        let body = response.bytes_stream().map_err(move |error| this.failed(&error)).boxed();
        bounded(self.location(), body, skip, len, self.stall)
    }

    fn unusable(&self, said: &str) -> SourceError {
        SourceError::Unusable { location: self.location(), said: said.to_owned() }
    }

    fn failed(&self, error: &reqwest::Error) -> SourceError {
        let location = self.location();
        if let Some(refused) = caused_by::<RefusedAddress>(error) {
            return SourceError::Refused { location, address: refused.0.clone() };
        }
        if error.is_builder() {
            return SourceError::Unusable { location, said: chain(error) };
        }
        SourceError::Unavailable { location, said: chain(error) }
    }
}

/// Drops `skip` bytes, gives `len` and ends there; fewer are an error, and so is silence.
pub(super) fn bounded(
    location: String,
    body: SourceStream,
    skip: u64,
    len: Option<u64>,
    stall: Duration,
) -> SourceStream {
    struct State {
        location: String,
        body: SourceStream,
        skip: u64,
        left: Option<u64>,
        stall: Duration,
    }
    let state = State { location, body, skip, left: len, stall };
    futures::stream::try_unfold(state, |mut state| async move {
        while state.left != Some(0) {
            let next = tokio::time::timeout(state.stall, state.body.next()).await;
            let piece = match next {
                Err(_) => return Err(SourceError::Stalled { location: state.location, after: state.stall }),
                Ok(Some(piece)) => piece?,
                Ok(None) => {
                    return match state.left {
                        None => Ok(None),
                        Some(left) => Err(SourceError::Unavailable {
                            said: format!("the connection ended {} too early", Size(left)),
                            location: state.location,
                        }),
                    };
                }
            };
            let piece = take(piece, &mut state.skip, &mut state.left);
            if !piece.is_empty() {
                return Ok(Some((piece, state)));
            }
        }
        Ok(None)
    })
    .boxed()
}

/// What of a piece is wanted.
fn take(mut piece: Bytes, skip: &mut u64, left: &mut Option<u64>) -> Bytes {
    let skipped = piece.len().min(usize::try_from(*skip).unwrap_or(usize::MAX));
    *skip -= skipped as u64;
    let mut piece = piece.split_off(skipped);
    if let Some(left) = left {
        piece.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
        *left -= piece.len() as u64;
    }
    piece
}

/// The `ETag`, unless it is a weak one: that does not promise the same bytes.
fn strong_etag(response: &Response) -> Option<String> {
    let etag = response.headers().get(ETAG)?.to_str().ok()?;
    etag.starts_with('"').then(|| etag.to_owned())
}

/// The size in `bytes 0-9/100` or `bytes */100`.
fn whole_size(response: &Response) -> Option<Size> {
    let range = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    range.rsplit_once('/')?.1.trim().parse().ok().map(Size)
}

fn starts_at(response: &Response, start: u64) -> bool {
    let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
    let first = range.and_then(|range| range.strip_prefix("bytes ")?.split_once('-'));
    first.is_some_and(|(first, _)| first.trim().parse() == Ok(start))
}

fn is_identity(response: &Response) -> bool {
    response
        .headers()
        .get(CONTENT_ENCODING)
        .is_some_and(|coding| coding.as_bytes().eq_ignore_ascii_case(b"identity"))
}

/// A URL as it may be shown: without credentials and query.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    // These fail only for URLs without a host, which are refused before.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.into()
}

fn without_query(text: &str) -> String {
    text.split(['?', '@']).next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(url: &str) -> HttpConfig {
        HttpConfig {
            url: url.to_owned(),
            headers: Vec::new(),
            ca_bundle: None,
            addresses: AddressPolicy::default(),
            stall: Duration::from_secs(1),
        }
    }

    #[test]
    fn only_web_addresses_that_are_allowed() {
        for bad in ["", "file:///etc/passwd", "ftp://x/y", "x"] {
            assert!(matches!(HttpSource::new(config(bad)), Err(SourceError::Url { .. })), "{bad}");
        }
        for bad in [
            "http://169.254.169.254/latest",
            "http://[fe80::1]/",
            "http://[::ffff:a9fe:a9fe]/",
            "http://2852039166/",
        ] {
            assert!(matches!(HttpSource::new(config(bad)), Err(SourceError::Refused { .. })), "{bad}");
        }
        assert!(HttpSource::new(config("https://example.org/a.qcow2")).is_ok());
    }

    #[test]
    fn secrets_are_not_shown() {
        let source = HttpSource::new(config("https://me:hush@example.org/a?token=hush")).unwrap();
        assert_eq!(source.location(), "https://example.org/a");
        let mut bad = config("https://example.org/a");
        bad.headers.push(("not a header".to_owned(), Secret::new("hush")));
        assert!(
            matches!(HttpSource::new(bad), Err(SourceError::Client { said, .. }) if !said.contains("hush"))
        );
    }

    #[tokio::test]
    async fn streams_are_exactly_what_was_asked_for() {
        let pieces = || futures::stream::iter([Ok(Bytes::from("abc")), Ok(Bytes::from("defg"))]).boxed();
        let second = Duration::from_secs(1);
        let read = |skip, len| bounded("x".to_owned(), pieces(), skip, len, second).try_concat_bytes();
        assert_eq!(read(0, None).await.unwrap(), "abcdefg");
        assert_eq!(read(2, Some(3)).await.unwrap(), "cde");
        assert_eq!(read(4, Some(3)).await.unwrap(), "efg");
        let error = read(4, Some(5)).await.unwrap_err();
        assert!(error.is_transient() && error.to_string().ends_with("ended 2 bytes too early"), "{error}");
        let silent = futures::stream::pending().boxed();
        let mut silent = bounded("x".to_owned(), silent, 0, None, Duration::from_millis(10));
        assert!(matches!(silent.next().await, Some(Err(SourceError::Stalled { .. }))));
    }

    trait Concat {
        async fn try_concat_bytes(self) -> Result<String, SourceError>;
    }

    impl Concat for SourceStream {
        async fn try_concat_bytes(self) -> Result<String, SourceError> {
            let all: Vec<Bytes> = self.try_collect().await?;
            Ok(all.iter().map(|piece| String::from_utf8_lossy(piece).into_owned()).collect())
        }
    }
}
