//! The API server itself: whether it answers, how fast, and what time it is there.

use std::time::{Duration, Instant};

use berth_core::units::Timestamp;
use k8s_openapi::jiff;
use kube::Client;
use kube::client::Body;
use thiserror::Error;

/// Why the API server does not tell the time.
#[derive(Debug, Error)]
pub enum ClockError {
    /// It does not answer.
    #[error("the API server does not answer")]
    Silent(#[source] kube::Error),
    /// It does not answer in time.
    #[error("the API server did not answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// Its answer has no usable `Date`.
    #[error("the API server's answer has the header Date `{0}`, which is no time")]
    NoDate(String),
}

/// An answer of the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The time there, exact to a second.
    pub now: Timestamp,
    /// This machine's time when it answered.
    pub here: Timestamp,
    /// How long it took, in milliseconds.
    pub millis: u64,
}

/// Asks for its version, which everybody may, and looks at the time of the answer.
///
/// # Errors
/// [`ClockError`].
pub async fn ask(client: &Client, timeout: Duration) -> Result<Answer, ClockError> {
    let mut request = http::Request::new(Body::empty());
    *request.uri_mut() = http::Uri::from_static("/version");
    let asked = Instant::now();
    let answer = match tokio::time::timeout(timeout, client.send(request)).await {
        Ok(answer) => answer.map_err(ClockError::Silent)?,
        Err(_) => return Err(ClockError::Timeout(timeout)),
    };
    let millis = u64::try_from(asked.elapsed().as_millis()).unwrap_or(u64::MAX);
    let date = answer.headers().get(http::header::DATE);
    let date =
        String::from_utf8_lossy(date.map(http::HeaderValue::as_bytes).unwrap_or_default()).into_owned();
    let now = parse_date(&date).ok_or(ClockError::NoDate(date))?;
    Ok(Answer { now, here: here(), millis })
}

/// This machine's time.
pub fn here() -> Timestamp {
    timestamp(jiff::Timestamp::now())
}

/// Milliseconds since 1970; times before that count as 1970.
pub fn timestamp(time: jiff::Timestamp) -> Timestamp {
    Timestamp(u64::try_from(time.as_millisecond()).unwrap_or_default())
}

/// In UTC, to the second, as Kubernetes writes times. The epoch outside the years 0 to 9999.
pub fn rfc3339(time: Timestamp) -> String {
    berth_api::conditions::time(time).0.to_string()
}

fn parse_date(date: &str) -> Option<Timestamp> {
    jiff::fmt::rfc2822::parse(date).ok().map(|zoned| timestamp(zoned.timestamp()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_read_and_times_are_written_as_kubernetes_does() {
        let time = parse_date("Thu, 01 Jan 2026 10:00:00 GMT").expect("a date");
        assert_eq!(rfc3339(time), "2026-01-01T10:00:00Z");
        assert_eq!(parse_date(""), None);
    }
}
