//! The API server's own count of the writes that it has carried out.

use std::collections::BTreeMap;

use anyhow::Context as _;
use http::Request;
use kube::Client;

/// Writes by what was written: the plural of the kind, with `/status` for that part of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Writes(BTreeMap<String, u64>);

/// Verbs that write, as the API server calls them in its metrics.
const VERBS: &[&str] = &["POST", "PUT", "PATCH", "APPLY", "DELETE"];

impl Writes {
    /// All since the API server's start.
    ///
    /// # Errors
    /// If it does not tell.
    pub async fn so_far(client: &Client) -> anyhow::Result<Self> {
        let request = Request::get("/metrics").body(Vec::new())?;
        Ok(Self::read(&client.request_text(request).await.context("asking for the API server's metrics")?))
    }

    fn read(text: &str) -> Self {
        let mut writes = BTreeMap::new();
        for line in text.lines().filter_map(|line| line.strip_prefix("apiserver_request_total{")) {
            let Some((labels, count)) = line.rsplit_once("} ") else { continue };
            let label = |name: &str| {
                let (_, rest) = labels.split_once(&format!("{name}=\""))?;
                rest.split_once('"').map(|(value, _)| value)
            };
            let done = label("code").is_some_and(|code| code.starts_with('2'));
            if !done || !label("verb").is_some_and(|verb| VERBS.contains(&verb)) {
                continue;
            }
            let (resource, part) = (label(",resource").or(label("resource")), label("subresource"));
            let part = part.filter(|part| !part.is_empty()).map_or(String::new(), |part| format!("/{part}"));
            let count = count.trim().parse::<f64>().map_or(0, whole);
            *writes.entry(format!("{}{part}", resource.unwrap_or_default())).or_default() += count;
        }
        Self(writes)
    }

    /// Those since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let new = self.0.iter().map(|(what, count)| (what.clone(), count.saturating_sub(before.of(what))));
        Self(new.filter(|(_, count)| *count > 0).collect())
    }

    /// Writes of one thing.
    pub fn of(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or_default()
    }

    /// Of everything but these.
    pub fn without(&self, others: &[&str]) -> u64 {
        self.0.iter().filter(|(what, _)| !others.contains(&what.as_str())).map(|(_, count)| count).sum()
    }

    /// What was written, and how often.
    pub fn all(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().map(|(what, count)| (what.as_str(), *count))
    }
}

/// A count that the metrics write as a number with a point.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturates, and is never negative
fn whole(count: f64) -> u64 {
    count as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_that_went_through_are_counted_by_what_was_written() {
        let text = "\
apiserver_request_total{code=\"200\",component=\"apiserver\",dry_run=\"\",group=\"g\",resource=\"pods\",scope=\"r\",subresource=\"status\",verb=\"PATCH\",version=\"v1\"} 3
apiserver_request_total{code=\"201\",component=\"apiserver\",dry_run=\"\",group=\"g\",resource=\"pods\",scope=\"r\",subresource=\"\",verb=\"POST\",version=\"v1\"} 1.2e+06
apiserver_request_total{code=\"409\",component=\"apiserver\",dry_run=\"\",group=\"g\",resource=\"pods\",scope=\"r\",subresource=\"\",verb=\"PUT\",version=\"v1\"} 9
apiserver_request_total{code=\"200\",component=\"apiserver\",dry_run=\"\",group=\"g\",resource=\"pods\",scope=\"r\",subresource=\"\",verb=\"GET\",version=\"v1\"} 9
";
        let writes = Writes::read(text);
        assert_eq!(writes.all().collect::<Vec<_>>(), [("pods", 1_200_000), ("pods/status", 3)]);
        assert_eq!(writes.without(&["pods"]), 3);
        assert_eq!(writes.since(&writes).all().count(), 0);
    }
}
