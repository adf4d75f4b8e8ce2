//! Listings: keys in byte order, a delimiter, and pages.

use std::collections::BTreeMap;
use std::ops::Bound;

use super::{Bucket, Store, StoreError, StoredObject};
use crate::s3::log::now_ms;
use crate::wire::{hex, unhex};

/// What a listing says about an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) key: String,
    /// Bytes.
    pub(crate) size: u64,
    pub(crate) etag: String,
    /// Milliseconds since 1970.
    pub(crate) modified_ms: u64,
}

impl Listed {
    pub(super) fn of(object: &StoredObject) -> Self {
        let meta = &object.meta;
        Self {
            key: meta.key.clone(),
            size: meta.size,
            etag: meta.etag.clone(),
            modified_ms: meta.modified_ms,
        }
    }
}

/// Where a page starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum After {
    /// Behind this key.
    Key(String),
    /// Behind every key with this prefix.
    Prefix(String),
}

impl After {
    /// As a continuation token: plain ASCII, opaque to clients.
    pub(crate) fn to_token(&self) -> String {
        let (kind, text) = match self {
            Self::Key(key) => ('k', key),
            Self::Prefix(prefix) => ('p', prefix),
        };
        format!("{kind}{}", hex(text.as_bytes()))
    }

    /// Reads a token back; `None` if it is not one of ours.
    pub(crate) fn from_token(token: &str) -> Option<Self> {
        let text = String::from_utf8(unhex(token.get(1..)?)?).ok()?;
        match token.as_bytes()[0] {
            b'k' => Some(Self::Key(text)),
            b'p' => Some(Self::Prefix(text)),
            _ => None,
        }
    }
}

/// A request for one page.
#[derive(Debug, Clone, Default)]
pub(crate) struct ListQuery {
    pub(crate) prefix: String,
    pub(crate) delimiter: Option<String>,
    pub(crate) after: Option<After>,
    /// Most keys and common prefixes together.
    pub(crate) max: usize,
    /// Shows the bucket as it was this many milliseconds ago.
    pub(crate) stale_ms: Option<u64>,
}

/// One page of whatever `T` stands for an object.
#[derive(Debug, Clone)]
pub(crate) struct Page<T = Listed> {
    pub(crate) objects: Vec<T>,
    pub(crate) prefixes: Vec<String>,
    /// Where the next page starts; `None` on the last one.
    pub(crate) next: Option<After>,
}

impl Store {
    /// Lists one page of `bucket`.
    pub(crate) fn list(&self, bucket: &str, query: &ListQuery) -> Result<Page, StoreError> {
        let index = self.index();
        let bucket = index.bucket(bucket)?;
        let range = (start(query), Bound::Unbounded);
        if let Some(age) = query.stale_ms {
            let old = as_it_was(bucket, now_ms().saturating_sub(age));
            return Ok(page(query, old.range::<str, _>(range).map(|(k, v)| (*k, v.clone()))));
        }
        // Only what is shown is copied.
        let Page { objects, prefixes, next } =
            page(query, bucket.objects.range::<str, _>(range).map(|(k, v)| (k.as_str(), v)));
        Ok(Page { objects: objects.into_iter().map(|o| Listed::of(o)).collect(), prefixes, next })
    }
}

fn as_it_was(bucket: &Bucket, then: u64) -> BTreeMap<&str, Listed> {
    let gone = bucket.deleted.iter().filter(|(at, _)| *at > then).map(|(_, l)| (l.key.as_str(), l.clone()));
    let there = bucket.objects.iter().filter(|(_, o)| o.meta.created_ms <= then);
    gone.chain(there.map(|(k, o)| (k.as_str(), Listed::of(o)))).collect()
}

fn start(query: &ListQuery) -> Bound<&str> {
    match &query.after {
        Some(After::Key(key)) if *key >= query.prefix => Bound::Excluded(key),
        Some(After::Prefix(prefix)) if *prefix >= query.prefix => Bound::Included(prefix),
        _ => Bound::Included(&query.prefix),
    }
}

/// Takes one page from `rows`, which are in key order and start at [`start`].
fn page<'a, T>(query: &ListQuery, rows: impl Iterator<Item = (&'a str, T)>) -> Page<T> {
    let mut page = Page { objects: Vec::new(), prefixes: Vec::new(), next: None };
    let mut last = None;
    let skip = match &query.after {
        Some(After::Prefix(prefix)) => Some(prefix.clone()),
        _ => None,
    };
    for (key, row) in rows {
        let Some(rest) = key.strip_prefix(query.prefix.as_str()) else { break };
        let done = page.prefixes.last().or(skip.as_ref());
        if done.is_some_and(|prefix| key.starts_with(prefix.as_str())) {
            continue;
        }
        if page.objects.len() + page.prefixes.len() >= query.max {
            page.next = last;
            break;
        }
        let delimiter = query.delimiter.as_deref().filter(|d| !d.is_empty());
        let end = delimiter.and_then(|d| Some(query.prefix.len() + rest.find(d)? + d.len()));
        if let Some(end) = end {
            page.prefixes.push(key[..end].to_owned());
            last = Some(After::Prefix(key[..end].to_owned()));
        } else {
            page.objects.push(row);
            last = Some(After::Key(key.to_owned()));
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: [&str; 7] = ["a", "b/1", "b/2", "b/c/3", "b0", "c/", "ä"];

    fn all(prefix: &str, delimiter: Option<&str>, max: usize) -> (Vec<String>, Vec<String>, usize) {
        let keys: BTreeMap<&str, &str> = KEYS.iter().map(|k| (*k, *k)).collect();
        let (mut objects, mut prefixes, mut pages) = (Vec::new(), Vec::new(), 0);
        let mut query = ListQuery {
            prefix: prefix.into(),
            delimiter: delimiter.map(Into::into),
            max,
            ..ListQuery::default()
        };
        loop {
            let rows = keys.range::<str, _>((start(&query), Bound::Unbounded)).map(|(k, v)| (*k, *v));
            let page = page(&query, rows);
            assert!(page.objects.len() + page.prefixes.len() <= max);
            objects.extend(page.objects.into_iter().map(String::from));
            prefixes.extend(page.prefixes);
            pages += 1;
            let Some(next) = page.next else { return (objects, prefixes, pages) };
            query.after = After::from_token(&next.to_token());
            assert_eq!(query.after, Some(next));
        }
    }

    #[test]
    fn every_page_size_gives_the_same_listing() {
        for max in 1..10 {
            assert_eq!(all("", None, max).0, KEYS);
            let (objects, prefixes, pages) = all("", Some("/"), max);
            assert_eq!(
                (objects, prefixes),
                (vec!["a".into(), "b0".into(), "ä".into()], vec!["b/".into(), "c/".into()])
            );
            assert_eq!(pages, 5usize.div_ceil(max));
            assert_eq!(all("b/", Some("/"), max).1, ["b/c/"]);
            assert_eq!(all("b/", Some("/"), max).0, ["b/1", "b/2"]);
        }
        assert_eq!(all("none", None, 5), (vec![], vec![], 1));
    }

    #[test]
    fn foreign_tokens_are_refused() {
        for token in ["", "k", "x61", "k6", "kzz", "kff", "ä61"] {
            assert!(After::from_token(token).is_none_or(|a| a == After::Key(String::new())), "{token}");
        }
    }
}
