//! How long a call waits for what is under way: until shortly before its caller gives up, so that the answer still
//! reaches it.

use std::time::Duration;

use tokio::time::Instant;
use tonic::metadata::MetadataMap;

/// How long the caller waits, as gRPC sends it: up to 8 digits and a unit ("gRPC over HTTP2", `Timeout`).
const HEADER: &str = "grpc-timeout";
/// What is kept of the caller's time for the answer; of less than two of it, half of the time.
const FOR_THE_ANSWER: Duration = Duration::from_secs(1);
/// The longest wait, also for a caller that never gives up.
const LONGEST: Duration = Duration::from_secs(60);

/// When a call that came now with this metadata stops waiting.
pub fn until(metadata: &MetadataMap) -> Instant {
    Instant::now() + of(metadata.get(HEADER).and_then(|value| value.to_str().ok()))
}

/// How long a call waits whose caller sends `header`; a minute for one that sends nothing, or nothing that is understood.
pub fn of(header: Option<&str>) -> Duration {
    let Some(allowed) = header.and_then(parse) else { return LONGEST };
    allowed.saturating_sub(FOR_THE_ANSWER.min(allowed / 2)).min(LONGEST)
}

fn parse(header: &str) -> Option<Duration> {
    let (digits, unit) = header.split_at_checked(header.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_comes_before_the_caller_gives_up() {
        for (header, millis) in [
            (Some("10S"), 9_000),
            (Some("9999999u"), 8_999),
            (Some("2500m"), 1_500),
            (Some("1S"), 500),
            (Some("0n"), 0),
            (Some("1H"), 60_000),
            (Some("99999999H"), 60_000),
            (None, 60_000),
            (Some(""), 60_000),
            (Some("S"), 60_000),
            (Some("+5S"), 60_000),
            (Some("10s"), 60_000),
            (Some("123456789n"), 60_000),
        ] {
            assert_eq!(of(header).as_millis(), millis, "{header:?}");
        }
    }

    #[test]
    fn a_caller_says_it_in_its_metadata() {
        let mut request = tonic::Request::new(());
        request.set_timeout(Duration::from_secs(10));
        let left = until(request.metadata()).saturating_duration_since(Instant::now());
        assert!(left <= Duration::from_secs(9) && left > Duration::from_secs(5), "{left:?}");
    }
}
